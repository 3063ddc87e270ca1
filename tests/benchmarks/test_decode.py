"""The decoding benchmark: what it counts, whom it refuses, what generate is given, how it judges,
and a small run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import decode, decode_contenders
from benchmarks.attention import TOLERANCES, Checked, check
from benchmarks.attention_contenders import Candidate, Function, compose
from benchmarks.contenders import Sizes, match_parameters
from benchmarks.decode_contenders import candidates, flash_attn, flash_attn_libraries, flex, forms_of, ours
from benchmarks.decode_generate import DIFFERENTIAL, MODELS, Cell, Decoder, Setup
from benchmarks.decode_generate import judge as judge_generate
from benchmarks.decode_problems import DECODED, Decoding, Exact, decoding, too_large
from benchmarks.decode_report import judge_kernels, print_aims, print_kernels
from motif_kernels import reference, tuning
from motifarch.errors import UserError

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Sizes(128, 2, 16, 256, 352, 8, max_positions=300)


def small(name: str, dtype: str = "float32", context: int = 37) -> Decoding:
    """Two rows and two pairs of keys, so that no head or row can stand for another."""
    divisor = {"gda4_64": 4, "gda4_128": 4, "v1_64": 8, "gda2_64": 4}[name]
    return decoding(name, dtype, 2, context, head_divisor=divisor)


def verdict(p: Decoding, function: Function, tolerance: float = 1e-4) -> Checked | str:
    inputs = p.make(CPU)
    exact = Exact(p, inputs)
    return check(Candidate("two", "", [("", function)], ("forward",)), inputs, exact, exact.grad, tolerance)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention that takes any widths and groups."""
    visible = torch.ones(1, k.shape[1], dtype=torch.bool)
    # The scale is the layouts', whatever the width of joined keys.
    return reference.attention(q, k, v, mask=visible, softmax_scale=64**-0.5)[0]


def test_a_quick_run_measures_both_parts(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "decode.json"
    command = [sys.executable, "-m", "benchmarks.decode", "--quick", "--device", "cpu", "--parts", "kernel", "generate"]
    done = subprocess.run(
        [*command, "--threads", "1", "--output", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "110"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert content["complete"] is True
    assert content["refused"] == content["not_begun"] == content["aims"] == []
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.with_name("decode_generate.png").read_bytes().startswith(b"\x89PNG")
    assert content["left_out"].keys() == {"triton", "flex"}
    bandwidth = content["copy"]["gb_per_second"]
    cells: dict[tuple[Any, ...], set[str]] = {}
    for r in content["results"]:
        cells.setdefault((r["layout"], r["dtype"], r["batch"], r["context"]), set()).add(r["contender"])
        # One key head of each layout is left: two keys and values as wide as both.
        widths = {"gda4_128": 512, "v1_64": 2 * 256}[r["layout"]]
        assert r["bytes"] == r["batch"] * r["context"] * widths * {"float32": 4, "bf16": 2}[r["dtype"]]
        assert r["gb_per_second"] == pytest.approx(r["bytes"] / r["seconds"]["median"] * 1e-9)
        assert r["copy_share"] == pytest.approx(r["gb_per_second"] / bandwidth)
        floor = r["floor_seconds"]
        # Two products of keys 64 or 128 wide and values twice that, for each query head of the one
        # key head left.
        flops = {"gda4_128": 5 * 2 * (128 + 256), "v1_64": 2 * 2 * 2 * (64 + 128)}[r["layout"]]
        rate = content["matrix"]["tflops"][r["dtype"]] * 1e12
        assert floor["operations"] == pytest.approx(r["batch"] * r["context"] * flops / rate)
        assert floor["bytes"] == pytest.approx(r["bytes"] / bandwidth * 1e-9)
        assert r["share_of_floor"] == pytest.approx(max(floor.values()) / r["seconds"]["median"])
        assert r["errors"]["output"]["relative"] <= content["tolerances"][r["dtype"]]
    layouts = ("gda4_128", "v1_64")
    assert cells.keys() == {(n, d, b, 96) for n in layouts for d in ("float32", "bf16") for b in (1, 2)}
    assert all(found == {"sdpa", "four", "two", "one"} for found in cells.values())
    found = {(r["precision"], r["batch"], r["context"], r["model"]) for r in content["generated"]}
    assert found == {(*cell, name) for cell in (("float32", 2, 40), ("bf16", 1, 40)) for name in MODELS}
    for r in content["generated"]:
        assert len(r["seconds"]) == 2
        median = content["settings"]["new_tokens"] * r["batch"] * sum(1 / s for s in r["seconds"]) / 2
        assert r["tokens_per_second"]["median"] == pytest.approx(median)
    for text in ("GDA 4:1 (128, 256), bf16: one new token a row", "DiffLlama eager", "bf16, 1 x 40: generate"):
        assert text in done.stdout


def test_sizes_are_those_of_the_released_models() -> None:
    p = decoding("gda4_128", "bf16", 3, 1024)
    assert (p.signal_heads, p.noise_heads, p.kv_heads) == (32, 8, 8)
    assert p.cache_bytes == 3 * 1024 * 8 * (128 + 128 + 256) * 2
    p = decoding("v1_64", "bf16", 1, 1024)
    assert (p.signal_heads, p.noise_heads, p.kv_heads) == (16, 16, 16)
    assert "v2_64" not in DECODED
    assert "v1_64_w128" not in DECODED


def test_caches_lie_as_the_layers_keep_them() -> None:
    p = small("v1_64", "bf16")
    t = p.make(CPU)
    assert t["keys"].is_contiguous()
    assert t["keys"].nbytes + t["v"].nbytes == p.cache_bytes
    d = p.layout.width
    assert t["k1"].data_ptr() == t["keys"].data_ptr()
    assert t["k2"].data_ptr() == t["keys"].data_ptr() + 2 * d
    assert torch.equal(torch.cat([t["k1"], t["k2"]], dim=-1), t["keys"])


def test_the_exact_output_is_the_formula_of_every_row_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    p = small("gda4_64")
    t = {name: tensor.double() for name, tensor in p.make(CPU).items()}
    signal, noise = plain(t["q1"], t["k1"], t["v"]), plain(t["q2"], t["k2"], t["v"])
    right = signal - t["lambda"] * noise.repeat_interleave(4, dim=2)
    right = right * torch.rsqrt(right.square().mean(-1, keepdim=True) + 1e-5) * t["norm_weight"] * 0.8
    torch.testing.assert_close(Exact(p, p.make(CPU)).output, right)
    monkeypatch.setattr("benchmarks.decode_problems._BLOCK", 1)  # a head at a time
    torch.testing.assert_close(Exact(p, p.make(CPU)).output, right)


@pytest.mark.parametrize("name", ["gda4_64", "gda4_128", "v1_64", "gda2_64"])
def test_every_contender_of_a_cpu_is_right(name: str) -> None:
    p = small(name)
    inputs = p.make(CPU)
    exact = Exact(p, inputs)
    for candidate in candidates(p, ["sdpa", "four", "two", "one"], CPU):
        checked = check(candidate, inputs, exact, exact.grad, tolerance=1e-4)
        assert isinstance(checked, Checked), (candidate.contender, checked)
        # A CPU's flash attention has one width for all.
        assert checked.form == ("joined keys" if candidate.contender == "two" else "")


@pytest.mark.parametrize("name", ["gda4_64", "v1_64"])
@pytest.mark.parametrize("calls", ["four", "two", "one"])
def test_every_form_is_right_where_widths_do_not_matter(name: str, calls: str) -> None:
    for form, function in forms_of(calls, plain):
        assert isinstance(verdict(small(name), function), Checked), form


def test_the_kernel_is_right_in_the_interpreter() -> None:
    kernels = pytest.importorskip("motif_kernels.impl.triton.decoding", reason="the Triton kernels need triton")
    if not kernels.triton.knobs.runtime.interpret:
        pytest.skip("with a GPU, Triton kernels are compiled in this process, not interpreted")
    with tuning.overriding(decoding_split={"block_n": 16, "num_warps": 4, "num_stages": 1}):
        assert isinstance(verdict(small("gda4_64"), ours(small("gda4_64"), "triton", CPU)), Checked)


@pytest.mark.parametrize("part", [slice(1, None), slice(None, -1), slice(0, 1024)], ids=["oldest", "newest", "rest"])
def test_a_contender_that_leaves_out_keys_is_refused_at_any_length(part: slice) -> None:
    p = small("gda4_64", "bf16", 4096)

    def of(keys: slice) -> Function:
        def function(t: Mapping[str, Tensor]) -> Tensor:
            return compose(plain, 2)({**t, **{name: t[name][:, keys] for name in ("k1", "k2", "v")}})

        return function

    assert isinstance(verdict(p, of(slice(None)), TOLERANCES["bf16"]), Checked)
    assert "its output is off by" in str(verdict(p, of(part), TOLERANCES["bf16"]))


def test_results_of_another_shape_or_without_numbers_are_refused() -> None:
    p = small("v1_64")
    right = compose(plain, 2)
    assert "off by" in str(verdict(p, lambda t: right(t)[:1]))
    assert "off by" in str(verdict(p, lambda t: torch.where(torch.arange(128) == 5, torch.nan, right(t))))


def test_flash_attn_of_every_generation_is_found_and_told_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def with_kvcache(
        q: Tensor, k: Tensor, v: Tensor, *, cache_seqlens: Tensor, softmax_scale: float, causal: bool, num_splits: int
    ) -> Tensor:
        asked.append({"lengths": cache_seqlens.tolist(), "scale": softmax_scale, "splits": num_splits})
        return plain(q, k, v)

    def dense(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool) -> tuple[Tensor, None]:
        asked.append({"scale": softmax_scale})
        return plain(q, k, v), None

    three, four = ModuleType("flash_attn_interface"), ModuleType("flash_attn.cute")
    three.flash_attn_with_kvcache = with_kvcache  # type: ignore[attr-defined]
    four.flash_attn_func = dense  # type: ignore[attr-defined]
    package = ModuleType("flash_attn")
    package.__path__ = []
    for module in (package, three, four):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    flash_attn_libraries.cache_clear()
    try:
        found, missing = flash_attn_libraries()
        p = small("gda4_64")
        variants = {c.variant for c in candidates(p, ["two"], CPU)}
        assert variants == {"flash"}
        for function in found.values():
            attend = flash_attn(function, p.scale, p.lengths(CPU))
            assert isinstance(verdict(p, compose(attend, 4)), Checked)
    finally:
        flash_attn_libraries.cache_clear()
    assert found == {"flash-attn 4": dense, "flash-attn 3": with_kvcache}
    assert "flash_attn_func" in missing["flash-attn 2"]
    assert asked[0] == {"scale": 0.125}
    assert asked[-1] == {"lengths": [37, 37], "scale": 0.125, "splits": 0}


def test_a_gpu_has_every_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_contenders, "flash_attn_libraries", lambda: ({"flash-attn 3": plain}, {}))
    monkeypatch.setattr(Decoding, "lengths", lambda self, device: torch.full((2,), self.context))
    found = [(c.contender, c.variant) for c in candidates(small("v1_64"), ["four", "one"], CUDA)]
    kernels = ["cuDNN", "flash", "efficient", "flash-attn 3"]
    assert found == [(contender, kernel) for contender in ("four", "one") for kernel in kernels]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["gda4_64", "v1_64"])
def test_flex_attention_is_right(name: str) -> None:
    p = small(name)
    assert isinstance(verdict(p, compose(flex(p, lambda function, dynamic: function), 2)), Checked)


def test_what_does_not_fit_the_memory_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    p = decoding("v1_64", "bf16", 128, 131072)
    assert p.cache_bytes == 128 << 30
    assert too_large(p, 132 << 30) is None
    assert too_large(p, 130 << 30) == ("its cache of 128.0 GiB and room to work take 131.0 GiB, and 130.0 GiB are free")
    monkeypatch.setattr(decode, "free_memory", lambda device: 1 << 20)
    content, status = in_process(tmp_path, "--contexts", "32", "4096", "--layouts", "v1_64", "--contenders", "one")
    assert status == 0
    assert [r["context"] for r in content["results"]] == [32, 32]
    (first, _) = content["skipped"]
    assert (first["layout"], first["batch"], first["context"]) == ("v1_64", 1, 4096)
    assert "skipped DIFF V1 (64, 128), float32, 1 x 4,096: its cache of" in capsys.readouterr().out.replace("\n", " ")


def in_process(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    """The figures of a tiny run of the kernels, and its exit status."""
    path = tmp_path / "decode.json"
    fixed = ["--quick", "--parts", "kernel", "--device", "cpu", "--threads", "1", "--dtypes", "float32"]
    status = decode.main([*fixed, "--output", str(path), *arguments])
    return json.loads(path.read_text()), status


def test_after_the_limit_no_new_size_is_begun(tmp_path: Path) -> None:
    content, status = in_process(tmp_path, "--layouts", "v1_64", "--contenders", "one", "--limit", "1e-9")
    assert status == 0
    assert len(content["results"]) + len(content["not_begun"]) == 2
    assert content["not_begun"]


def test_what_was_measured_before_an_interrupt_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = decode.measure

    def interrupted(p: Decoding, *arguments: Any, **rest: Any) -> Any:
        if p.batch == 2:
            raise KeyboardInterrupt
        return measure(p, *arguments, **rest)

    monkeypatch.setattr(decode, "measure", interrupted)
    content, status = in_process(tmp_path, "--layouts", "v1_64", "--contenders", "one")
    assert status == 1
    assert content["complete"] is False
    assert [r["batch"] for r in content["results"]] == [1]
    assert (tmp_path / "decode.png").exists()
    assert "stopped" in capsys.readouterr().out


def test_ours_that_is_wrong_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_contenders, "ours", lambda problem, name, device: lambda t: torch.zeros_like(t["q1"]))
    content, status = in_process(tmp_path, "--layouts", "v1_64", "--contenders", "sdpa", "one")
    assert status == 1
    assert {r["contender"] for r in content["refused"]} == {"sdpa"}
    assert {r["contender"] for r in content["results"]} == {"one"}


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_a_call_goes_on_from_the_prompt_as_generate_without_its_cache_does(name: str, cache: str) -> None:
    setup = Setup(TINY, new_tokens=5, cache=cache, rounds=1, device="cpu")
    model = setup.build(match_parameters([name], TINY)[name], "float32")
    decoder = Decoder(model, Cell("float32", 2, 270), setup)  # the prompt goes in in two parts
    whole = model.generate(decoder.ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert whole.shape == (2, 276)
    for _ in range(2):  # a call leaves the prompt's cache as it was
        given = decoder.prepare()
        assert int(given.get_seq_length()) == 270
        assert torch.equal(decoder(given), whole)
    config = model.config
    heads = {"gda": 4, "gda_narrow": 2}.get(name, 8)
    assert config.num_key_value_heads == heads
    assert decoder.cache_bytes_per_token == 2 * config.num_hidden_layers * heads * 16 * 4


def test_a_model_that_stops_early_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(TINY, new_tokens=5, cache="dynamic", rounds=1, device="cpu")
    model = setup.build(match_parameters(["llama"], TINY)["llama"], "float32")
    decoder = Decoder(model, Cell("float32", 1, 8), setup)
    monkeypatch.setattr(model, "generate", lambda ids, **_: ids)
    with pytest.raises(UserError, match="instead of 5 new ones"):
        decoder(decoder.prepare())


def kernel_result(contender: str, seconds: float, share: float = 0.9, **rest: Any) -> dict[str, Any]:
    """Made-up figures."""
    cell = {"layout": "gda4_128", "dtype": "bf16", "batch": 1, "context": 32768, "variant": "", "form": ""}
    spread = {"median": seconds, "lower": seconds, "upper": seconds}
    figures = {"seconds": spread, "copy_share": share, "gb_per_second": 1000 * share, "best": True}
    figures["floor_seconds"] = {"bytes": seconds * share, "operations": 0.0, "floor": seconds * share}
    figures["share_of_floor"] = share
    return cell | figures | {"contender": contender} | rest


def test_the_kernel_is_judged_by_its_worst_long_context() -> None:
    results = [
        kernel_result("triton", 1.0, 0.9),
        kernel_result("four", 2.0),
        kernel_result("two", 1.3, variant="flash"),
        kernel_result("two", 0.5, variant="cuDNN", best=False),
        kernel_result("triton", 1.0, 0.8, batch=8),
        kernel_result("four", 1.8, batch=8),
        # Not what the aims speak of.
        kernel_result("triton", 9.0, 0.1, context=8192),
        kernel_result("four", 1.0, context=8192),
        kernel_result("triton", 9.0, 0.1, dtype="float32"),
    ]
    judged = {
        (j["layout"], j["bound"]): (j["ratio"], j["batch"], j["sizes"], j["met"]) for j in judge_kernels(results, CUDA)
    }
    assert judged == {
        ("gda4_128", 0.85): (0.8, 8, 2, False),
        ("gda4_128", 1.8): (1.8, 8, 2, True),
        ("gda4_128", 1.35): (1.3, 1, 1, False),
    }
    assert judge_kernels(results, CPU) == []


def generated(model: str, speed: float, **rest: Any) -> dict[str, Any]:
    """Made-up figures."""
    cell = {"precision": "float32", "batch": 1, "context": 512, "model": model}
    return cell | {"tokens_per_second": {"median": speed, "lower": speed, "upper": speed}} | rest


def test_generate_is_judged_at_each_size_by_the_better_difflama() -> None:
    results = [
        generated("gda", 130.0),
        generated("diff_v1", 129.0),
        generated("softmax", 1000.0),
        generated("diffllama_sdpa", 90.0),
        generated("diffllama_eager", 100.0),
        generated("gda", 260.0, batch=8),
        generated("diffllama_sdpa", 100.0, batch=8),
        generated("gda", 1.0, batch=9),  # without a rival
    ]
    judged = [(j["model"], j["rival"], j["batch"], j["ratio"], j["met"]) for j in judge_generate(results)]
    assert judged == [
        ("gda", "diffllama_eager", 1, 1.3, True),
        ("diff_v1", "diffllama_eager", 1, 1.29, False),
        ("gda", "diffllama_sdpa", 8, 2.6, True),
    ]
    assert set(DIFFERENTIAL) <= set(MODELS)


def test_the_best_kernel_is_shown_with_aims_and_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    results = [kernel_result("triton", 1e-4), kernel_result("two", 2e-4, variant="flash", form="joined keys")]
    results.append(kernel_result("two", 3e-4, variant="cuDNN", best=False))
    content = {
        "copy": {"gb_per_second": 3000.0},
        "results": results,
        "refused": [kernel_result("four", 1.0) | {"reason": "it ran out of memory"}],
        "skipped": [],
        "not_begun": [decoding("v1_64", "bf16", 8, 1024).cell()],
    }
    console = Console(width=110)
    print_kernels(console, content)
    print_aims(
        console, [*judge_kernels(results, CUDA), *judge_generate([generated("gda", 1), generated(MODELS[4], 1)])]
    )
    printed = capsys.readouterr().out
    assert re.search(r"floor, by bytes +90\.0", printed)  # microseconds, of the first
    assert "two calls (flash, joined keys)" in printed
    assert "cuDNN" not in printed
    assert "2.00" in printed
    assert "refused four calls at GDA 4:1 (128, 256), bf16, 1 x 32,768: it ran out of memory" in printed
    assert "not begun, for the time was over: DIFF V1 (64, 128), bf16, 8 x 1,024" in printed
    assert "met      GDA 4:1 (128, 256): at least 85% of copy bandwidth from 32K tokens: 0.90 at worst" in printed
    assert "not met  float32, 1 x 512: GDA 4:1: at least 1.3 times DiffLlama's tokens per second: 1.00" in printed


def test_cells_are_parsed_and_those_of_a_precision_put_together() -> None:
    assert Cell.parse("bf16:8x512") == Cell("bf16", 8, 512)
    arguments = decode.parser().parse_args(["--device", "cpu", "--cells", "bf16:1x9", "float32:1x9", "bf16:2x9"])
    decode.resolve(arguments)
    assert arguments.cells == [Cell("bf16", 1, 9), Cell("bf16", 2, 9), Cell("float32", 1, 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "--batches is 0; it must be above 0"),
        (["--new-tokens", "-1"], "--new-tokens is -1; it must be above 0"),
        (["--contenders", "triton"], "--contenders triton: it needs a GPU"),
        (["--cells", "float32:8"], "--cells float32:8 is not PRECISION:BATCHxCONTEXT"),
        (["--cells", "float16:8x512"], "--cells float16:8x512 is not PRECISION:BATCHxCONTEXT"),
    ],
)
def test_impossible_arguments_end_in_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "figures.json")]
    assert decode.main([*arguments, *output, "--device", "cpu", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
