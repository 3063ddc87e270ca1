"""Every field of a recipe, with values that its type does not accept and with values that it does.

The fields, their types and their ranges are the schema's own. A wrong value is refused with a
message; whatever is accepted trains, to a finite loss.
"""

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.tiny import RECIPE
from helpers.wrong_values import WRONG, Kind, drawn_values, fields, right_values, time_limit
from motifarch.errors import UserError
from motifarch.train.main import main
from motifarch.train.read_recipe import read_recipe
from motifarch.train.recipe import Recipe
from motifarch.train.run_folder import read_metrics

# torch's compiler takes longer than the limit.
FIELDS = {name: (kind, default) for name, kind, default in fields(Recipe) if name != "compile"}

# Below 0 there is something to say with these alone.
MAY_BE_NEGATIVE = re.compile(r"model\.lambda_init|parallel\.")
# With 0 these mean "none" or "from the start".
MAY_BE_ZERO = re.compile(
    r"run\.seed|model\.(num_noise_heads|lambda_init|num_shared_experts|n_dense_first_layers|mhc_h_post_alpha_end|"
    r"num_nextn_predict_layers)|data\.(ramp|datasets\[0\]\.weight)|batch\.warmup_steps|"
    r"experts\.|optim\.(lr$|momentum|weight_decay|z_loss|mhc_post_alpha_steps|warmup_steps|decay_steps|min_lr_ratio)|"
    r"checkpoint\.keep_last|(average|validation)\.every|parallel\.reshard_after_forward|lora\.(rank|dropout)"
)
# A seed may be any number of 63 bits.
MAY_BE_HUGE = re.compile(r"run\.seed")
# A path may be any text but none, and a dict is open as far as its own check goes.
OPEN = {"model.rope_scaling", "experts.balance_loss_by_layer"}
# What they list may be wrong, or not asked for.
LISTS = {"data.datasets", "lora.targets"}


def must_be_refused(name: str, kind: Kind, value: Any) -> bool:
    """Whether a value is wrong for a field whatever the others are."""
    if value is None:
        return type(None) not in kind.types
    if isinstance(value, list | dict) or value == "" or (isinstance(value, str) and "\0" in value):
        return not (name in OPEN and value == {}) and name not in LISTS
    if isinstance(value, str):
        return str not in kind.types and value not in kind.choices
    if isinstance(value, bool):  # to Python, false is 0
        return not kind.truth
    if not kind.numeric:
        return True  # YAML's 0 and 1 are no truth values, and its numbers are no texts
    if value == -1:
        return not MAY_BE_NEGATIVE.match(name)
    if value == 0:
        return not MAY_BE_ZERO.match(name)
    if value == 10**12:
        return not MAY_BE_HUGE.match(name)
    if abs(value) >= 10**30 or not math.isfinite(value):
        return True
    return (float not in kind.types and value % 1 != 0) or not kind.holds(value)


def write(folder: Path, data: Path, name: str, value: Any) -> Path:
    """A recipe of two steps, with one field's value."""
    content: dict[str, Any] = yaml.safe_load(yaml.safe_dump(RECIPE))
    content |= {"run": {"steps": 2, "output": str(folder / "run")}, "data": {"datasets": [{"path": str(data)}]}}
    content["optim"]["warmup_steps"] = 0
    content["batch"] = {"size": 2, "micro_size": 2}  # the backend "triton" is interpreted within the limit
    content["validation"]["every"], content["log"]["every"] = 0, 1
    place: Any = content
    *sections, last = re.findall(r"[a-z_0-9]+", name)
    for part in sections:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[last] = value
    path = folder / "recipe.yaml"
    path.write_text(_dumped(content))
    return path


def _dumped(content: Any) -> str:
    """As YAML; Python prints no number of 5,000 digits, but in hexadecimal."""
    huge = WRONG["5000 digits"]
    text = yaml.safe_dump(_replaced(content, huge, "HUGE"))
    return text.replace("HUGE", hex(huge))


def _replaced(content: Any, old: Any, new: Any) -> Any:
    if isinstance(content, dict):
        return {key: _replaced(value, old, new) for key, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, old, new) for value in content]
    return new if content == old and not isinstance(content, bool) else content


def outcome(folder: Path, recipe: Path) -> str:
    """What training says: "refused", or "trained" to finite losses; anything else is an error."""
    said = None
    try:
        with time_limit():
            assert main([str(recipe)]) == 0
    except UserError as error:
        said = str(error)
    if said is not None:
        assert len(said.splitlines()) == 1, said
        assert len(said) < 1000
        return "refused"
    rows = [row for metrics in folder.rglob("metrics.jsonl") for row in read_metrics(metrics)]
    losses = [row[key] for row in rows for key in ("loss", "grad_norm") if key in row]
    assert losses, "a run without a row of metrics"
    assert all(value is not None and math.isfinite(value) for value in losses), losses
    return "trained"


def check(folder: Path, data: Path, name: str, value: Any) -> None:
    found = outcome(folder, write(folder, data, name, value))
    if must_be_refused(name, FIELDS[name][0], value):
        assert found == "refused", f"{name}: {value!r:.60} is accepted"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives an empty folder, which is the current one, each time that it is called."""

    def new() -> Path:
        made = tmp_path_factory.mktemp("case")
        monkeypatch.chdir(made)
        return made

    return new


@pytest.mark.nightly
@pytest.mark.parametrize("name", FIELDS)
def test_every_wrong_value_is_refused_or_trains(folder: Any, data: Path, name: str) -> None:
    for value in WRONG.values():
        check(folder(), data, name, value)


# A run of a thousand steps takes longer than the limit.
RIGHT = {name: right_values(*about) for name, about in FIELDS.items()} | {"run.steps": [1, 3]}

# Right by themselves, but not with the rest of this recipe, on one CPU, or without an extra.
REFUSED_HERE = re.compile(
    r"model\.(num_(attention|noise|key_value)_heads|head_dim|attention_type|paired_kv|attention_gate)|parallel\.|"
    r"model\.(use_sliding_window|attn_implementation|q_lora_rank|kv_lora_rank|qk_rope_head_dim|num_experts|mhc_enabled|"
    r"sliding_window_period|polynorm_bias_clamp|hidden_clamp)|data\.datasets$|experts\.|"
    r"optim\.(warmup_steps|mtp_loss)|precision\.matmul"
)


def test_right_values_are_read(folder: Any, data: Path) -> None:
    for name, values in RIGHT.items():
        for value in values:
            read_recipe([str(write(folder(), data, name, value))])


@pytest.mark.nightly
@pytest.mark.parametrize("name", RIGHT)
def test_right_values_train(folder: Any, data: Path, name: str) -> None:
    for value in RIGHT[name]:
        made = folder()
        found = outcome(made, write(made, data, name, value))
        absent = name == "log.tracker" and value != "none" and find_spec(value) is None
        assert found == "trained" or REFUSED_HERE.match(name) or absent, f"{name}: {value} is refused"


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Any]:
    """A field with a value of the table, or one drawn for its type: mostly out of its range."""
    # Many steps take long, and a short time limit ends the process where the machine is slow.
    name = draw(st.sampled_from([name for name in FIELDS if not name.startswith(("run.steps", "distributed.timeout"))]))
    kind, _ = FIELDS[name]
    drawn = drawn_values(kind)
    return name, draw(st.sampled_from(list(WRONG.values())) | drawn)


ONE_FOLDER_EACH = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
SEEDED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=ONE_FOLDER_EACH)


@settings(SEEDED, max_examples=100)
@given(case=cases().filter(lambda case: must_be_refused(case[0], FIELDS[case[0]][0], case[1])))
def test_wrong_values_are_refused(folder: Any, data: Path, case: tuple[str, Any]) -> None:
    check(folder(), data, *case)


@pytest.mark.nightly
@settings(SEEDED, max_examples=500)
@given(case=cases())
def test_whatever_is_accepted_trains(folder: Any, data: Path, case: tuple[str, Any]) -> None:
    check(folder(), data, *case)
