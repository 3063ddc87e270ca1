"""Recipes by their names, from any folder."""

from pathlib import Path

import pytest

from motifarch import packaged_recipes
from motifarch.commands.copy_recipe import main as copy_recipe
from motifarch.commands.recipes import main as list_recipes
from motifarch.errors import UserError
from motifarch.study.grid import read_grid
from motifarch.train.read_recipe import read_recipe


@pytest.mark.parametrize("name", packaged_recipes.names())
def test_a_name_reads_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(f"recipes/{name}.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    assert read_recipe([name]) == read_recipe([str(file)])


@pytest.mark.parametrize("name", packaged_recipes.studies())
def test_a_name_reads_the_study(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(f"recipes/{name}.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    assert read_grid([name]) == read_grid([str(file)])


def test_the_list_names_each_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_recipes([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in [*packaged_recipes.names(), *packaged_recipes.studies()]:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 3


@pytest.mark.parametrize("name", ["tiny_cpu", "motif_2.6b/b200_64_long_16k"])
def test_a_copy_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    assert copy_recipe([name, str(tmp_path)]) == 0
    assert read_recipe([f"{tmp_path}/{name}.yaml"]) == read_recipe([name])
    assert copy_recipe([name, str(tmp_path)]) == 0  # nothing has changed


def test_a_changed_copy_is_kept(tmp_path: Path) -> None:
    (tmp_path / "tiny_cpu.yaml").write_text("run: {steps: 7}\n")
    with pytest.raises(UserError, match=r"tiny_cpu.yaml is there already and differs"):
        copy_recipe(["tiny_cpu", str(tmp_path)])
    assert (tmp_path / "tiny_cpu.yaml").read_text() == "run: {steps: 7}\n"


def test_an_unknown_name_gets_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no file tiny; give the path .* one of .*, motif_2.6b/b200_64, .*tiny_cpu"):
        read_recipe(["tiny"])
    with pytest.raises(UserError, match=r"no file tiny; give the path .* one of study/.*study/tiny_cpu$"):
        read_grid(["tiny"])
