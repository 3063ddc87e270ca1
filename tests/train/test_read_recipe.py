"""Recipes: what is read, and what is refused with which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from motifarch.errors import UserError
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import Recipe
from motifarch.train.recipe_rules import check_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = {"data": {"datasets": [{"path": "somewhere"}]}}


def write(folder: Path, content: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_values_come_typed_and_overrides_win(tmp_path: Path) -> None:
    content = MINIMAL | {"optim": {"lr": "1e-3", "betas": [0.8, 0.9], "clip": None}, "run": {"steps": 500}}
    recipe = read_recipe([write(tmp_path, content), "--optim.lr", "3e-4", "--run.seed=7", "--compile", "true"])
    check_recipe(recipe)
    assert recipe.optim.lr == 3e-4
    assert list(recipe.optim.betas) == [0.8, 0.9]
    assert recipe.optim.clip is None
    assert (recipe.run.steps, recipe.run.seed, recipe.compile) == (500, 7, True)
    assert recipe.data.datasets[0].path == "somewhere"
    assert recipe.data.datasets[0].weight == 1.0


def test_lists_and_sections_on_the_command_line(tmp_path: Path) -> None:
    recipe = read_recipe(
        [
            *(write(tmp_path, MINIMAL), "--data.datasets", "[{path: data/mine}, {path: other, weight: 2e0}]"),
            *("--optim.clip", "null", "--run.output", "3", "--optim", "{lr: 1e-3}", "--activation_checkpointing", "2"),
        ]
    )
    assert [(d.path, d.weight) for d in recipe.data.datasets] == [("data/mine", 1.0), ("other", 2.0)]
    assert (recipe.optim.clip, recipe.optim.lr, recipe.run.output) == (None, 1e-3, "3")
    assert recipe.activation_checkpointing == 2


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_our_recipes_are_read(path: Path) -> None:
    recipe = read_recipe([str(path)])
    check_recipe(recipe, world_size=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"run": {"stpes": 3}}, r"unknown recipe field 'run\.stpes' in .*did you mean 'run\.steps'\?"),
        ({"lr": 3}, r"unknown recipe field 'lr'.*did you mean 'optim\.lr'\?"),
        ({"data": {"datasets": [{"path": "x", "wieght": 1}]}}, r"datasets\[0\]\.wieght'.*'data\.datasets\.weight'"),
        ({"data": {"datasets": [{"path": "x", "weight": "two"}]}}, r"data\.datasets\[0\]\.weight is 'two'.*a number"),
        ({"data": {"datasets": [{"weight": 1}]}}, r"data\.datasets\[0\]\.path is missing"),
        ({"run": {"steps": "many"}}, r"run\.steps is 'many' .*accepted: a whole number"),
        ({"run": {"steps": 2.5}}, r"run\.steps is 2\.5 .*a whole number"),
        ({"optim": {"schedule": "linear"}}, r"optim\.schedule is 'linear' .*accepted: wsd, cosine, constant"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas is \[0\.9\] .*a list of 2"),
        (
            {"model": {"num_noise_heads": "half"}},
            r"model\.num_noise_heads is 'half' .*a whole number from 0 to .* or null",
        ),
        ({"run": 3}, r"run is 3 .*a section"),
        ("run: [", r"not valid YAML at line 1"),
        ("just text", r"holds no sections"),
        ("run: {steps: 3}\nrun: {seed: 3}", r"not valid YAML at line 2: run is there twice"),
        ({"run": {"steps": True}}, r"run\.steps is True .*a whole number"),
        ({"run": {"spike_sigma": 0}}, r"run\.spike_sigma is 0 .*a number from 1e-09 to .* or null"),
        ({"run": {"spike_window": 1}}, r"run\.spike_window is 1 .*a whole number from 2"),
        ({"run": {"spike_max_in_row": 0}}, r"run\.spike_max_in_row is 0 .*a whole number from 1"),
        ({"distributed": {"timeout_s": 0}}, r"distributed\.timeout_s is 0 .*a number above 0"),
        ({"average": {"last": 0}}, r"average\.last is 0 .*a whole number from 1"),
        ({"parallel": {"shrad": 2}}, r"'parallel\.shrad'.*'parallel\.shard'"),
        ({"activation_checkpointing": "most"}, r"none, full, selective or a whole number from 1"),
    ],
)
def test_slips_in_the_file(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_recipe([write(tmp_path, content)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr", "high"], r"optim\.lr is 'high' on the command line; accepted: a number"),
        (["--optim.wamup_steps", "3"], r"'optim\.wamup_steps' on the command line; did you mean 'optim\.warmup_steps'"),
        (["--batch.size"], r"--batch\.size has no value"),
        (["--data.datasets", "[{path"], r"--data\.datasets .* is not valid YAML"),
        (["--data.datasets", "[{weight: 1}]"], r"data\.datasets\[0\]\.path is missing"),
        (["more"], r"unexpected argument 'more'"),
    ],
)
def test_slips_on_the_command_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe([write(tmp_path, MINIMAL), *arguments])


def test_a_recipe_may_have_a_base(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, MINIMAL | {"optim": {"lr": 1e-3, "clip": None}, "run": {"steps": 500}})
    base = next(tmp_path.glob("*.yaml"))
    middle = tmp_path / "deep" / "middle.yaml"
    middle.write_text(yaml.safe_dump({"base": f"../{base.name}", "run": {"steps": 300, "seed": 4}}))
    top = tmp_path / "deep" / "top.yaml"
    top.write_text(yaml.safe_dump({"base": "middle.yaml", "run": {"seed": 5}}))
    recipe = read_recipe([str(top), "--optim.eps", "1e-6"])
    assert (recipe.run.steps, recipe.run.seed, recipe.optim.lr, recipe.optim.eps) == (300, 5, 1e-3, 1e-6)
    assert recipe.optim.clip is None
    assert recipe.data.datasets[0].path == "somewhere"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("top.yaml", r"top\.yaml is its own base"),
        ("nowhere.yaml", r"nowhere\.yaml can't be read"),
        (3, r"base is 3 .*accepted: a non-empty path or null"),
    ],
)
def test_a_base_that_is_none(tmp_path: Path, base: Any, message: str) -> None:
    (tmp_path / "top.yaml").write_text(yaml.safe_dump(MINIMAL | {"base": base}))
    with pytest.raises(UserError, match=message):
        read_recipe([str(tmp_path / "top.yaml")])


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml can't be read: No such file"):
        read_recipe([str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run.steps", 0, r"run\.steps is 0; accepted: a whole number from 1"),
        ("optim.lr", float("nan"), r"optim\.lr is nan"),
        ("optim.betas", (0.9, 1.0), r"optim\.betas\[1\] is 1\.0; accepted: a number at least 0 and below 1"),
        ("optim.clip", 0.0, r"optim\.clip is 0\.0; .*null"),
        ("optim.min_lr_ratio", 2.0, r"optim\.min_lr_ratio is 2\.0"),
        ("optim.decay_steps", 990, r"optim\.warmup_steps \(100\) and optim\.decay_steps \(990\) together exceed"),
        ("batch.size", 9, r"batch\.size is 9, which 2 ranks can't share evenly"),
        ("batch.warmup_start", 64, r"batch\.warmup_start is 64, more than batch\.size \(32\)"),
        ("distributed.timeout_first_s", 9.0, r"timeout_first_s is 9\.0, below distributed\.timeout_s \(600\.0\)"),
        ("data.ramp_start", 5, r"data\.ramp_end is 0, before data\.ramp_start \(5\)"),
        ("data.datasets", [], r"data\.datasets is empty"),
        ("parallel.shard", 3, r"parallel\.shard 3: the product is 3, which is not the number of ranks, 2"),
    ],
)
def test_impossible_combinations(tmp_path: Path, field: str, value: Any, message: str) -> None:
    recipe: Recipe = read_recipe([write(tmp_path, MINIMAL)])
    section, _, name = field.partition(".")
    setattr(getattr(recipe, section), name, value)
    with pytest.raises(UserError, match=message):
        check_recipe(recipe, world_size=2)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_recipe(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("--optim.lr", "Peak learning rate", "--model.num_noise_heads", "Steps between checkpoints"):
        assert words in printed
