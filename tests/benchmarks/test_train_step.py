from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.contenders import CONTENDERS, Sizes, match_parameters
from benchmarks.train_step import main
from benchmarks.train_step_report import AIMS, judge, print_results
from benchmarks.training import Failed, take_turns
from helpers.bare_machine import without_packages

ROOT = Path(__file__).parents[2]
MODELS = [name for name, c in CONTENDERS.items() if c.unavailable("cpu") is None]
TINY = Sizes(128, num_layers=1, head_dim=16, vocab_size=64, intermediate_size=352, intermediate_multiple=8)


def quick(output: Path, *arguments: str, environment: Mapping[str, str] = os.environ) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--quick", "--device", "cpu", "--output", output, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
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
        for what in ("speed", "peak memory, first step, attention"):
            section = printed.split(f"{precision}, sequences of 64 tokens: {what}")[1].split("sequences of")[0]
            for name in MODELS:
                assert f"\n  {CONTENDERS[name].label}  " in section
    for model in content["models"]:
        assert f"{model['parameters']:,}" in printed


def test_the_figures_are_complete(smoke: tuple[str, dict[str, Any], Path]) -> None:
    _, content, picture = smoke
    assert content["benchmark"] == "train_step"
    assert content["format"] == 1
    assert content["complete"] is True
    assert (content["failed"], content["not_begun"]) == ([], [])
    assert [m["name"] for m in content["models"]] == MODELS
    assert content["left_out"].keys() == {name for name in CONTENDERS if name not in MODELS}
    assert content["peak"] == {"gpu": None, "bf16_flops": None, "source": None, "text": "no MFU: that takes a GPU"}
    for model in content["models"]:
        assert 0.97 <= model["relative_parameters"] <= 1.03
    cells = {(r["model"], r["precision"], r["seq_len"]) for r in content["results"]}
    assert cells == {(name, precision, 64) for name in MODELS for precision in ("float32", "bf16")}
    for result in content["results"]:
        assert result["tokens_per_step"] == 64
        assert len(result["seconds"]) == 2
        assert min(result["seconds"]) > 0
        speed = result["tokens_per_second"]
        assert 0 < speed["lower"] <= speed["median"] <= speed["upper"]
        assert result["mfu"] is None
        assert result["model_tflops"] == pytest.approx(result["flops_per_token"] * speed["median"] / 1e12)
        assert result["first_step_seconds"] > 0
        eager = result["model"] == "diffllama_eager"
        operators = [] if eager else ["aten::_scaled_dot_product_flash_attention_for_cpu"]
        assert result["attention_operators"] == operators
        # At the least weights, gradients and two moments of each parameter, in float32.
        parameters = next(m["parameters"] for m in content["models"] if m["name"] == result["model"])
        assert result["peak_memory_bytes"] > 12 * parameters
    environment = content["environment"]
    assert environment["command"].startswith("python -m benchmarks.train_step --quick")
    assert environment["threads"] == 1
    assert environment["cpu"]
    assert {"motifarch", "torch", "transformers"} <= environment["versions"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_shape_is_measured_with_what_a_gpu_machine_has(tmp_path: Path) -> None:
    path = tmp_path / "shape.json"
    arguments = ["--shape", "300m", "--models", "gda", "llama", "--rounds", "1", "--limit", "400"]
    printed = quick(path, *arguments, environment=without_packages(tmp_path, ROOT, ROOT / "kernels"))
    content = json.loads(path.read_text())
    assert content["shape"]["name"] == "300m"
    assert content["settings"]["compile"] is False
    assert content["settings"]["sizes"]["tied"] is True
    assert [(r["model"], r["seq_len"]) for r in content["results"]] == [("gda", 64), ("llama", 64)]
    # Where the step goes, of both.
    assert [p["model"] for p in content["profiles"]] == ["gda", "llama"]
    for costs in content["profiles"]:
        assert len(costs["largest"]) == 5
        assert costs["kind"] == "CPU operators"
        assert sum(c["share"] for c in costs["largest"]) + costs["other"] == pytest.approx(1)
        assert [c["seconds"] for c in costs["largest"]] == sorted(
            (c["seconds"] for c in costs["largest"]), reverse=True
        )
        assert f"  {costs['largest'][0]['name'][:40]}" in printed


def test_the_profile_splits_a_step_into_operators(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "none.json"
    arguments = ["--profile", "gda", "--precisions", "float32", "--seq-lens", "16", "--rounds", "1"]
    assert main(["--quick", "--device", "cpu", "--threads", "1", "--output", str(output), *arguments]) == 0
    printed = capfd.readouterr().out
    for operator in ("step: backward", "aten::mm", "Self CPU"):
        assert operator in printed
    assert not output.exists()


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(hidden_size=640, gda_heads=10), TINY])
def test_parameters_match_at_every_geometry(sizes: Sizes) -> None:
    names = CONTENDERS.keys() - ({"gda_narrow"} if sizes.heads % 8 else set())
    entries = match_parameters(names, sizes)
    assert entries.keys() == names
    for entry in entries.values():
        assert 0.97 <= entry.relative_parameters <= 1.03
        assert entry.intermediate_size % sizes.intermediate_multiple == 0


def test_the_model_has_the_parameters_that_were_reckoned() -> None:
    for entry in match_parameters(MODELS, TINY).values():
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
        (["--limit", "0"], "--limit is 0.0; it must be above 0"),
        (["--models", "gda", "llama_cudnn"], "llama_cudnn cannot be measured here: cuDNN's attention needs a GPU"),
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


def turns_of(names: str, log: list[str], failing: dict[str, int]) -> dict[str, Any]:
    """Turns that note themselves and take a second; some fail from their n-th on."""

    def turn(name: str) -> list[float]:
        log.append(name)
        if log.count(name) > failing.get(name, 100):
            raise Failed(f"{name} broke")
        return [1.0]

    return {name: partial(turn, name) for name in names}


def take(
    names: str,
    log: list[str],
    *,
    failing: dict[str, int] | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, list[float]], list[tuple[str, str]]]:
    """What three rounds after a warm-up gave, and who failed."""
    rounds: list[dict[str, list[float]]] = []
    failed: list[tuple[str, str]] = []
    take_turns(
        turns_of(names, log, failing or {}),
        rounds=3,
        warmup=1,
        on_turn=lambda _: None,
        on_round=lambda seconds: rounds.append(copy.deepcopy(seconds)),
        on_failure=lambda name, error: failed.append((name, str(error))),
        out_of_time=out_of_time,
    )
    return rounds[-1], failed


def test_models_take_turns_in_an_order_that_rotates() -> None:
    log: list[str] = []
    seconds, failed = take("abc", log)
    assert "".join(log) == "cab" + "abc" + "bca" + "cab"
    assert seconds == {name: [1.0] * 3 for name in "abc"}
    assert failed == []


def test_who_fails_is_named_and_the_others_go_on() -> None:
    log: list[str] = []
    seconds, failed = take("abc", log, failing={"b": 2})
    assert failed == [("b", "b broke")]
    assert seconds == {"a": [1.0] * 3, "c": [1.0] * 3}


def test_when_time_is_over_one_round_is_taken_and_no_more() -> None:
    log: list[str] = []
    seconds, _ = take("ab", log, out_of_time=lambda: True)
    assert "".join(log) == "ab"
    assert seconds == {"a": [1.0], "b": [1.0]}


def result(model: str, seq_len: int, speed: float, memory: int) -> dict[str, Any]:
    spread = {"median": speed, "lower": speed, "upper": speed}
    cell = {"model": model, "precision": "bf16", "seq_len": seq_len, "mfu": None, "model_tflops": 1.0}
    known = {"first_step_seconds": 1.0, "attention_operators": ["motif::diff_attention"]}
    return cell | known | {"tokens_per_second": spread, "peak_memory_bytes": memory}


def test_aims_are_held_against_the_fastest_attention_of_a_rival() -> None:
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
            result("gda", 4096, 89.0, 1),
            result("llama", 4096, 98.0, 1),
            result("llama_cudnn", 4096, 100.0, 1),
        ]
    )
    assert len(judged) == len(AIMS)
    assert {j["model"] for j in judged} == {"gda"}
    verdicts = {(j["measure"], j["rival"], j["seq_len"]): (pytest.approx(j["ratio"]), j["met"]) for j in judged}
    assert verdicts == {
        ("tokens_per_second", "diffllama_eager", 512): (0.9, False),
        ("tokens_per_second", "diffllama_sdpa", 2048): (1.2, True),
        ("tokens_per_second", "llama", 512): (0.9, True),
        ("tokens_per_second", "llama_cudnn", 4096): (0.89, False),
        ("peak_memory_bytes", "diffllama_eager", 512): (10 / 9, False),
        ("peak_memory_bytes", "diffllama_sdpa", 2048): (10 / 11, True),
    }


def test_each_aim_is_printed_with_its_verdict_and_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    results = [result("gda", 512, 90.0, 10), result("diffllama_sdpa", 512, 80.0, 5), result("llama", 512, 100.0, 5)]
    names = ("gda", "diffllama_sdpa", "llama")
    models = [entry.describe() for entry in match_parameters(names, TINY).values()]
    empty: dict[str, Any] = {"failed": [], "left_out": {}, "not_begun": [], "profiles": []}
    peak = {"text": "MFU is of 989 TFLOP/s", "bf16_flops": 989e12}
    measured = {"models": models, "results": results, "aims": judge(results), "peak": peak}
    print_results(Console(width=80), empty | measured | {"environment": {"device": "NVIDIA H100"}})
    printed = capsys.readouterr().out
    assert "MFU is of 989 TFLOP/s" in printed
    assert "diff_attention" in printed
    lines = [line for line in printed.splitlines() if " GDA 4:1: " in line]
    assert [line.split()[0] for line in lines] == ["met", "met", "not"]
    for line, ratio in zip(lines, ("1.125", "0.900", "2.000"), strict=True):
        assert f": {ratio}" in line


def test_aims_that_were_not_measured_are_not_judged() -> None:
    assert judge([result("gda", 512, 1.0, 1), result("gda", 64, 1.0, 1), result("llama", 64, 1.0, 1)]) == []
