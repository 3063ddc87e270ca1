from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.contenders import CONTENDERS, Sizes, match_parameters
from benchmarks.train_step import AIMS, judge, main, print_results
from benchmarks.training import Setup, peak_memory, time_rounds
from motifarch.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = Sizes(128, num_layers=1, head_dim=16, vocab_size=64, intermediate_size=352, intermediate_multiple=8)


def quick(output: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--quick", "--device", "cpu", "--output", output, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What a quick run of everything printed, its figures, and its picture."""
    path = tmp_path_factory.mktemp("benchmark") / "new folder" / "quick.json"
    printed = quick(path, "--seq-lens", "64", "--rounds", "2")
    return printed, json.loads(path.read_text()), path.with_suffix(".png")


def test_the_tables_name_every_model(smoke: tuple[str, dict[str, Any], Path]) -> None:
    printed, content, _ = smoke
    for precision in ("float32", "bf16"):
        section = printed.split(f"{precision}, sequences of 64 tokens")[1].split("sequences of")[0]
        for contender in CONTENDERS.values():
            assert f"\n  {contender.label}  " in section
    for model in content["models"]:
        assert f"{model['parameters']:,}" in printed


def test_the_figures_are_complete(smoke: tuple[str, dict[str, Any], Path]) -> None:
    _, content, picture = smoke
    assert content["benchmark"] == "train_step"
    assert content["format"] == 1
    assert [m["name"] for m in content["models"]] == list(CONTENDERS)
    for model in content["models"]:
        assert 0.97 <= model["relative_parameters"] <= 1.03
    cells = {(r["model"], r["precision"], r["seq_len"]) for r in content["results"]}
    assert cells == {(name, precision, 64) for name in CONTENDERS for precision in ("float32", "bf16")}
    for result in content["results"]:
        assert result["tokens_per_step"] == 64
        assert len(result["seconds"]) == 2
        assert min(result["seconds"]) > 0
        speed = result["tokens_per_second"]
        assert 0 < speed["lower"] <= speed["median"] <= speed["upper"]
        # At the least weights, gradients and two moments of each parameter, in float32.
        parameters = next(m["parameters"] for m in content["models"] if m["name"] == result["model"])
        assert result["peak_memory_bytes"] > 12 * parameters
    environment = content["environment"]
    assert environment["command"].startswith("python -m benchmarks.train_step --quick")
    assert environment["threads"] == 1
    assert environment["cpu"]
    assert {"motifarch", "torch", "transformers"} <= environment["versions"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_autocast_trains_without_a_process_group(tmp_path: Path) -> None:
    path, models = tmp_path / "autocast.json", ["gda", "diff_v2", "diffllama_sdpa"]
    quick(path, "--autocast", "--models", *models, "--precisions", "bf16", "--seq-lens", "16", "--rounds", "1")
    content = json.loads(path.read_text())
    assert content["settings"]["autocast"] is True
    assert [r["model"] for r in content["results"]] == models


def test_the_profile_splits_a_step_into_operators(tmp_path: Path) -> None:
    printed = quick(tmp_path / "none.json", "--profile", "gda", "--precisions", "float32", "--seq-lens", "16")
    for operator in ("step: backward", "aten::mm", "Self CPU"):
        assert operator in printed
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(hidden_size=640, gda_heads=10), TINY])
def test_parameters_match_at_every_geometry(sizes: Sizes) -> None:
    names = CONTENDERS.keys() - ({"gda_narrow"} if sizes.heads % 8 else set())
    entries = match_parameters(names, sizes)
    assert entries.keys() == names
    for entry in entries.values():
        assert 0.97 <= entry.relative_parameters <= 1.03
        assert entry.intermediate_size % sizes.intermediate_multiple == 0


def test_the_model_has_the_parameters_that_were_reckoned() -> None:
    for entry in match_parameters(CONTENDERS, TINY).values():
        model = entry.build(TINY)
        assert sum(p.numel() for p in model.parameters()) == entry.parameters
        assert model.config.num_hidden_layers == TINY.num_layers
        assert model.config.hidden_size == TINY.hidden_size


@pytest.mark.parametrize(("name", "heads"), [("gda", (10, 2, 4)), ("gda_narrow", (5, 1, 2)), ("diff_v1", (8, 4, 8))])
def test_heads_have_the_proportions_that_are_claimed(name: str, heads: tuple[int, int, int]) -> None:
    sizes = Sizes(num_layers=1)
    config = match_parameters([name], sizes)[name].build(sizes).config
    assert (config.num_attention_heads, config.noise_heads, config.num_key_value_heads) == heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens-per-step", "1000"], "not a whole number of rows of 512 tokens"),
        (["--hidden-size", "500"], "hidden_size=500 is not an even number of heads"),
        (["--hidden-size", "640"], "GDA 4:1 cannot have 12.5 query heads"),
        (["--gda-heads", "8"], "GDA 4:1 cannot have 8 query heads"),
        (["--hidden-size", "640", "--gda-heads", "10"], "GDA 4:1, narrow, cannot have 6.25 query heads"),
        (["--rounds", "-1"], "--rounds is -1"),
        (["--hidden-size", "256", "--vocab-size", "64", "--intermediate-size", "64"], "more than 3% away"),
    ],
)
def test_impossible_arguments_end_in_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "figures.json")]
    assert main([*arguments, *output, "--device", "cpu", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


class FakeStep:
    """Stands in for a model's step: notes its turns, and gives a loss."""

    def __init__(self, name: str, turns: list[str], loss: float = 1.0):
        self.name, self.turns, self.loss = name, turns, loss
        self.setup = Setup(TINY, 16, "cpu", 1, autocast=True)

    def __call__(self, batch: object) -> float:
        self.turns.append(self.name)
        return self.loss


def test_models_take_turns_in_an_order_that_rotates() -> None:
    turns: list[str] = []
    steps: Any = {name: FakeStep(name, turns) for name in "abc"}
    seconds = time_rounds(steps, Setup(TINY, 16, "cpu", 1, True).batch(16), rounds=3, warmup=1, on_step=lambda _: None)
    assert "".join(turns) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_model_whose_loss_is_lost_is_not_timed() -> None:
    steps: Any = {"a": FakeStep("a", [], float("nan"))}
    with pytest.raises(UserError, match="the loss became nan in step 1"):
        time_rounds(steps, Setup(TINY, 16, "cpu", 1, True).batch(16), rounds=1, warmup=0, on_step=lambda _: None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_by_what_a_wider_model_needs() -> None:
    peaks, parameters = [], []
    for width in (352, 1376):
        sizes = Sizes(128, 4, 16, 4096, width, 8)
        entry = match_parameters(["llama"], sizes)["llama"]
        peaks.append(peak_memory(entry, Setup(sizes, 16, "cpu", 1, True), "float32", 16, 2))
        parameters.append(entry.parameters)
    # Weight, gradient and two moments in float32, and little more for so few tokens.
    grown = (peaks[1] - peaks[0]) / (16 * (parameters[1] - parameters[0]))
    assert 0.75 < grown < 2


def test_a_measuring_process_that_dies_is_reported() -> None:
    entry = match_parameters(["llama"], TINY)["llama"]
    with pytest.raises(UserError, match=r"process that measured Llama .* ended with exit code 1"):
        peak_memory(dataclasses.replace(entry, parameters=1), Setup(TINY, 16, "cpu", 1, True), "float32", 16, 2)


def result(model: str, seq_len: int, speed: float, memory: int) -> dict[str, Any]:
    spread = {"median": speed, "lower": speed, "upper": speed}
    cell = {"model": model, "precision": "bf16", "seq_len": seq_len}
    return cell | {"tokens_per_second": spread, "peak_memory_bytes": memory}


def test_aims_are_held_against_the_faster_diffllama() -> None:
    judged = judge(
        [
            result("gda", 512, 90.0, 10),
            result("diffllama_sdpa", 512, 80.0, 20),
            result("diffllama_eager", 512, 100.0, 9),
            result("llama", 512, 100.0, 5),
            result("gda", 2048, 120.0, 10),
            result("diffllama_sdpa", 2048, 100.0, 11),
            result("diffllama_eager", 2048, 50.0, 40),
            result("llama", 2048, 500.0, 1),
        ]
    )
    assert len(judged) == len(AIMS)
    assert {j["model"] for j in judged} == {"gda"}
    verdicts = {(j["measure"], j["rival"], j["seq_len"]): (pytest.approx(j["ratio"]), j["met"]) for j in judged}
    assert verdicts == {
        ("tokens_per_second", "diffllama_eager", 512): (0.9, False),
        ("tokens_per_second", "diffllama_sdpa", 2048): (1.2, True),
        ("tokens_per_second", "llama", 512): (0.9, True),
        ("peak_memory_bytes", "diffllama_eager", 512): (10 / 9, False),
        ("peak_memory_bytes", "diffllama_sdpa", 2048): (10 / 11, True),
    }


def test_each_aim_is_printed_with_its_verdict_and_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    results = [result("gda", 512, 90.0, 10), result("diffllama_sdpa", 512, 80.0, 5), result("llama", 512, 100.0, 5)]
    names = ("gda", "diffllama_sdpa", "llama")
    models = [entry.describe() for entry in match_parameters(names, TINY).values()]
    print_results(Console(width=80), {"models": models, "results": results, "aims": judge(results)})
    lines = [line for line in capsys.readouterr().out.splitlines() if " GDA 4:1: " in line]
    assert [line.split()[0] for line in lines] == ["met", "met", "not"]
    for line, ratio in zip(lines, ("1.125", "0.900", "2.000"), strict=True):
        assert f": {ratio}" in line


def test_aims_that_were_not_measured_are_not_judged() -> None:
    assert judge([result("gda", 512, 1.0, 1), result("gda", 64, 1.0, 1), result("llama", 64, 1.0, 1)]) == []
