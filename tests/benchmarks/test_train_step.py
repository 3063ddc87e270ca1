"""The training-step and generation benchmarks at tiny sizes: figures, failures, time limits."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.models import generate
from benchmarks.models.providers import PROVIDERS, Sizes, match_parameters
from benchmarks.models.report import MEMORY, SPEED, judge
from benchmarks.models.train_step import AIMS, GDA, Benchmark, finish, main, parser, resolve
from benchmarks.models.training import Setup, Worker
from helpers.bare_machine import without_packages

ROOT = Path(__file__).parents[2]
MODELS = [name for name, p in PROVIDERS.items() if p.unsupported_reason("cpu") is None]
TINY = Sizes(128, num_layers=1, head_dim=16, vocab_size=64, intermediate_size=352, intermediate_multiple=8)


def quick(module: str, output: Path, *arguments: str, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    words = [sys.executable, "-m", f"benchmarks.models.{module}", "--quick", "--device", "cpu", "--output", str(output)]
    variables = {**environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, *arguments], cwd=ROOT, capture_output=True, text=True, env=variables, timeout=600)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    content: dict[str, Any] = json.loads(output.read_text())
    assert content["complete"] is True
    for text in ("Llama", "tokens"):
        assert text in done.stdout
    return content


@pytest.mark.nightly
def test_every_model_is_measured(tmp_path: Path) -> None:
    """With what a machine with a GPU has."""
    environment = without_packages(tmp_path, ROOT, ROOT / "kernels")
    content = quick(
        "train_step", tmp_path / "new" / "t.json", "--seq-lens", "64", "--rounds", "2", environment=environment
    )
    assert (content["failed"], content["not_begun"]) == ([], [])
    assert content["left_out"].keys() == PROVIDERS.keys() - set(MODELS)
    cells = {(r["model"], r["precision"], r["seq_len"]) for r in content["results"]}
    assert cells == {(name, precision, 64) for name in MODELS for precision in ("float32", "bf16")}
    for result in content["results"]:
        speed = result["tokens_per_second"]
        assert 0 < speed["lower"] <= speed["median"] <= speed["upper"]
        assert len(result["seconds"]) == 2
        assert result["model_tflops"] == pytest.approx(result["flops_per_token"] * speed["median"] / 1e12)
        library = next(m["library"] for m in content["models"] if m["name"] == result["model"])
        operator = {
            "motifarch": "motif::blocked_attention",
            "transformers": "aten::_scaled_dot_product_flash_attention_for_cpu",
        }[library]
        assert result["attention_operators"] == ([] if result["model"] == "diffllama_eager" else [operator])
        # At the least weights, gradients and two moments of each parameter, in float32.
        parameters = next(m["parameters"] for m in content["models"] if m["name"] == result["model"])
        assert result["peak_memory_bytes"] > 12 * parameters
    assert [p["model"] for p in content["profiles"]] == ["gda", "llama"] * 2
    assert all(sum(c["share"] for c in p["largest"]) <= 1.001 for p in content["profiles"])


def test_generate_is_measured_at_every_size(tmp_path: Path) -> None:
    content = quick("generate", tmp_path / "g.json", "--models", "gda", "diffllama_sdpa", "llama")
    found = [(r["precision"], r["batch"], r["context"], r["model"]) for r in content["results"]]
    models = ("gda", "diffllama_sdpa", "llama")
    assert found == [(*cell, m) for cell in (("float32", 2, 40), ("bf16", 1, 40)) for m in models]
    sizes = {r["model"]: r["cache_bytes_per_token"] for r in content["results"] if r["precision"] == "float32"}
    assert sizes["gda"] == sizes["llama"] // 2


@pytest.mark.parametrize("cache", generate.CACHES)
def test_a_call_goes_on_from_the_prompt_as_generate_without_its_cache_does(cache: str) -> None:
    sizes = Sizes(128, 2, 16, 256, 352, 8, 300)
    model: Any = generate.build(match_parameters(["gda"], sizes)["gda"], sizes, "float32", "cpu")
    decoder = generate.Decoder(model, generate.Cell("float32", 2, 270), 5, cache)  # a prompt in two parts
    whole = model.generate(decoder.ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert decoder(decoder.prepare()).equal(whole)
    assert decoder(decoder.prepare()).equal(whole)


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


def result(model: str, seq_len: int, speed: float, memory: int) -> dict[str, Any]:
    spread = {"median": speed, "lower": speed, "upper": speed}
    return {"model": model, "precision": "bf16", "seq_len": seq_len, SPEED: spread, MEMORY: memory}


def test_aims_are_held_against_the_fastest_attention_of_a_rival() -> None:
    results = [
        result("gda", 512, 90.0, 10),
        result("diffllama_sdpa", 512, 80.0, 20),
        result("diffllama_eager", 512, 100.0, 9),
        result("llama", 512, 100.0, 5),
        result("gda", 4096, 89.0, 1),
        result("llama", 4096, 98.0, 1),
        result("llama_cudnn", 4096, 100.0, 1),
        result("gda", 64, 1.0, 1),  # no aim there
        result("llama", 64, 1.0, 1),
    ]
    judged = {(j["measure"], j["rival"], j["seq_len"]): (j["ratio"], j["met"]) for j in judge(results, GDA, AIMS)}
    assert judged == {
        (SPEED, "diffllama_eager", 512): (pytest.approx(0.9), False),
        (SPEED, "llama", 512): (pytest.approx(0.9), True),
        (SPEED, "llama_cudnn", 4096): (pytest.approx(0.89), False),
        (MEMORY, "diffllama_eager", 512): (pytest.approx(10 / 9), False),
    }


def benchmark(tmp_path: Path, *arguments: str) -> Benchmark:
    """A quick run of GDA and Llama."""
    words = ["--quick", "--device", "cpu", "--threads", "1", "--precisions", "float32", "--seq-lens", "16"]
    options = parser().parse_args([*words, "--models", "gda", "llama", "--rounds", "1", "--costs", *arguments])
    environment = {"device": "cpu", "cpu": "a CPU", "threads": 1, "versions": {}, "git": None, "date": "2026-01-01"}
    return Benchmark(options, resolve(options), environment, tmp_path / "figures.json")


def test_a_model_that_fails_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = benchmark(tmp_path)
    run.models["gda"] = dataclasses.replace(run.models["gda"], parameters=1)
    run.measure(Console())
    assert finish(run, Console(width=200)) == 1  # one of ours
    content = json.loads((tmp_path / "figures.json").read_text())
    assert [r["model"] for r in content["results"]] == ["llama"]
    (failed,) = content["failed"]
    assert (failed["model"], failed["during"], failed["out_of_time"]) == ("gda", "getting ready", False)
    assert "gda has 660,296 parameters" in failed["reason"]
    assert failed["reason"] in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_by_what_a_wider_model_needs() -> None:
    peaks, parameters = [], []
    for width in (352, 1376):
        sizes = Sizes(128, 4, 16, 4096, width, 8)
        llama = match_parameters(["llama"], sizes)["llama"]
        worker = Worker(llama, Setup(sizes, 16, "cpu", 1, autocast=True), "float32", 16)
        peaks.append(worker.ask("prepare", 2, None)["peak_memory_bytes"])
        worker.close()
        parameters.append(llama.parameters)
    # Weight, gradient and two moments in float32, and little more for so few tokens.
    grown = (peaks[1] - peaks[0]) / (16 * (parameters[1] - parameters[0]))
    assert 0.75 < grown < 2
