"""Recipes by their names, from any folder."""

from pathlib import Path

import pytest

from motifarch import packaged_recipes
from motifarch.errors import UserError
from motifarch.train.read_recipe import read_recipe


@pytest.mark.parametrize("name", packaged_recipes.names())
def test_a_name_reads_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(f"recipes/{name}.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    assert read_recipe([name]) == read_recipe([str(file)])


def test_an_unknown_name_gets_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no file tiny; give the path .* one of .*, motif_2.6b/b200_64, .*tiny_cpu"):
        read_recipe(["tiny"])
