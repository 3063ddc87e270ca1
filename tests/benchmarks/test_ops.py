"""The benchmarks of kernels: work counted, wrong providers found, and a small run of each."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lib import rows
from benchmarks.lib.bench import DTYPES, Roofline, cpu_clock
from benchmarks.lib.exact import exact_results
from benchmarks.lib.measure import check, measure
from benchmarks.lib.providers import Function, Provider, compose, flash_attn, flex, sdpa, varlen
from benchmarks.lib.shapes import DIRECTIONS, LAYOUTS, AttentionCase, attention_case, draw_from, mix_documents
from benchmarks.ops import attention, combine, decode, grouped_poly_norm, hyper_connections, poly_norm
from motif_kernels.reference import attention as plain_attention
from motif_kernels.reference import packed_attention_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOFLINE = Roofline(1, 1e9, 1, dict.fromkeys(DTYPES, 1e12))
MASKS = [
    *("v1_64", "v1_64_w128", "v1_64_packed", "gda4_64", "gda4_128_w128", "gda4_128_packed", "v2_64"),
    *("softmax_64", "softmax_128", "softmax_128_packed"),
]


def small(name: str, dtype: str = "float32", length: int = 150) -> AttentionCase:
    """A layout at a length that no block divides, with the fewest heads that there can be."""
    return attention_case(name, dtype, length, tokens=2 * length, head_divisor=64)


def inputs_of(case: AttentionCase) -> dict[str, Tensor]:
    inputs = case.make(draw_from(0, DTYPES[case.dtype], CPU))
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def verdict(case: AttentionCase, *tried: tuple[str, Function]) -> Any:
    """The form of a provider that ran, its function and errors; or why it is not measured."""
    inputs = inputs_of(case)
    exact = exact_results(case, inputs, draw_from(1, DTYPES[case.dtype], CPU))
    return check(Provider("it", tried), inputs, exact, 1e-4 if case.dtype == "float32" else 0.15)


def run_quick(main: Callable[[list[str]], int], path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the figures of a quick run."""
    fixed = ["--quick", "--device", "cpu", "--threads", "1", "--output", str(path)]
    status = main([*fixed, *arguments])
    return status, json.loads(path.read_text())


def assert_consistent(content: Mapping[str, Any], path: Path) -> None:
    assert content["complete"] is True
    assert content["failed"] == content["not_begun"] == content["aims"] == []
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    bandwidth = content["copy"]["gb_per_second"] * 1e9
    for r in content["results"]:
        for d, seconds in r["seconds"].items():
            assert 0 < seconds["lower"] <= seconds["median"] <= seconds["upper"]
            assert r["gb_per_second"][d] == pytest.approx(r["bytes"][d] / seconds["median"] * 1e-9)
            assert r["copy_share"][d] == pytest.approx(r["bytes"][d] / seconds["median"] / bandwidth)
            bound = r["roofline_seconds"][d]
            assert bound["bytes"] == pytest.approx(r["bytes"][d] / bandwidth)
            if "matrix" in content:
                rate = content["matrix"]["tflops"][r["dtype"]] * 1e12
                assert bound["flops"] == pytest.approx(r["flops"][d] / rate)
            assert bound["bound"] == max(bound["bytes"], bound["flops"] or 0)
            assert r["share_of_roofline"][d] == pytest.approx(bound["bound"] / seconds["median"])
        assert all(e["relative"] <= content["tolerances"][r["dtype"]] for e in r["errors"].values())
        if "backward" in r["seconds"]:
            assert r["peak_bytes"] > r["saved_bytes"]["total"] >= r["saved_bytes"]["beyond_inputs"]


# --- PolyNorm and the epilogue --------------------------------------------------------------------


def test_poly_norm_runs_with_every_provider_of_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "poly.json"
    status, content = run_quick(poly_norm.main, path, "--functions", "mul_poly_norm", "--dtypes", "bf16")
    assert status == 0
    assert_consistent(content, path)
    assert content["left_out"] == {"liger": "liger-kernel has no CPU path"}
    found = {r["provider"]: r for r in content["results"]}
    assert found.keys() == {"eager", "compile", "ours"}
    assert found["ours"]["errors"].keys() == {"output", "gate", "up", "weight", "bias"}
    # Its own intermediates are what eager keeps; ours keeps three numbers a row.
    ours = found["ours"]
    assert ours["saved_bytes"]["beyond_inputs"] == 12 * ours["rows"]
    assert found["eager"]["saved_bytes"]["beyond_inputs"] > 10 * ours["saved_bytes"]["beyond_inputs"]


def test_grouped_poly_norm_runs_with_more_experts_than_rows(tmp_path: Path) -> None:
    path = tmp_path / "grouped.json"
    status, content = run_quick(grouped_poly_norm.main, path, "--providers", "eager", "ours", "--dtypes", "bf16")
    assert status == 0
    assert_consistent(content, path)
    assert {r["function"] for r in content["results"]} == {"384 experts", "8 experts"}
    ours = next(r for r in content["results"] if r["provider"] == "ours")
    assert ours["errors"].keys() == {"output", "gate", "up", "weight", "bias"}


def test_hyper_connections_run_and_keep_little(tmp_path: Path) -> None:
    path = tmp_path / "hyper_connections.json"
    status, content = run_quick(hyper_connections.main, path, "--providers", "eager", "ours", "--dtypes", "bf16")
    assert status == 0
    assert_consistent(content, path)
    found = {r["provider"]: r for r in content["results"]}
    assert found["ours"]["errors"].keys() == {"output", "streams", "weight", "bias"}
    assert found["eager"]["saved_bytes"]["beyond_inputs"] > 2 * found["ours"]["saved_bytes"]["beyond_inputs"]


def test_combine_runs_every_layout(tmp_path: Path) -> None:
    path = tmp_path / "combine.json"
    status, content = run_quick(combine.main, path, "--providers", "eager", "ours", "--dtypes", "bf16")
    assert status == 0
    assert_consistent(content, path)
    assert {(r["function"], r["columns"]) for r in content["results"]} == {
        ("GDA 4:1, no epilogue", 1024),
        ("GDA 4:1, sub-norm", 1024),
        ("GDA 4:1, gate", 1024),
        ("DIFF V1, sub-norm", 128),
        ("DIFF V2, no epilogue", 128),
    }


@pytest.mark.parametrize(("function", "forward", "backward"), [("poly_norm", 4, 6), ("mul_poly_norm", 6, 10)])
def test_bytes_an_element_of_poly_norm(function: str, forward: int, backward: int) -> None:
    for dtype, scale in (("bf16", 1), ("float32", 2)):
        moved = poly_norm.case(function, dtype, 16, 64).bytes_moved()
        per_element = [moved[d] / (16 * 64) for d in DIRECTIONS]
        assert per_element == [scale * forward, scale * backward, scale * (forward + backward)]


@pytest.mark.parametrize(
    ("layout", "epilogue", "forward", "backward"),
    [
        # Units of a signal-sized tensor; GDA's noise is a quarter of one.
        ("gda", "none", 2 + 1 / 4, 2 + 2 / 4),
        ("gda", "sub-norm", 2 + 1 / 4, 3 + 2 / 4),
        ("gda", "gate", 3 + 1 / 4, 5 + 2 / 4),
        ("diff_v1", "sub-norm", 3, 5),
        # lambda: four bytes for each head of 128 elements of two bytes.
        ("diff_v2", "none", 3 + 4 / 256, 4 + 8 / 256),
        ("diff_v2", "gate", 4 + 4 / 256, 7 + 8 / 256),
    ],
)
def test_bytes_of_the_epilogues(layout: str, epilogue: str, forward: float, backward: float) -> None:
    moved = combine.case(combine.LAYOUTS[layout], epilogue, "bf16", 16, 4096).bytes_moved()
    signal = 16 * 4096 * 2
    assert (moved["forward"] / signal, moved["backward"] / signal) == (forward, backward)


def wrong_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return poly_norm._plain(x, weight.flip(0), bias)


def wrong_backward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return poly_norm._plain(x, weight.detach() + 0 * weight, bias)


def broken(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    raise RuntimeError("out of registers\nand more lines")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wrong_forward, "its output is off by"),
        (wrong_backward, "its gradient of weight is off by"),
        (lambda x, weight, bias: poly_norm._plain(x, weight, bias) / 0, "its output is off by"),
        (broken, "it failed with RuntimeError: out of registers"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_provider_that_is_wrong_is_named_and_not_timed(function: Any, reason: str, dtype: str) -> None:
    case = dataclasses.replace(poly_norm.case("poly_norm", dtype, 16, 64), ours=function)
    providers = rows.providers(case, ["eager", "ours"], CPU)
    settings: dict[str, Any] = {"tolerance": rows.TOLERANCES[dtype], "seconds": 0, "rounds": 1}
    results, failed = measure(case, providers, CPU, cpu_clock, ROOFLINE, **settings)
    assert [r["provider"] for r in results] == ["eager"]
    assert [r["provider"] for r in failed] == ["ours"]
    assert failed[0]["reason"].startswith(reason)
    assert "\n" not in failed[0]["reason"]


def test_ours_that_is_wrong_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poly_norm, "poly_norm", lambda *inputs, eps: wrong_forward(*inputs))
    only = ["--providers", "eager", "ours", "--dtypes", "float32", "--functions", "poly_norm"]
    status, content = run_quick(poly_norm.main, tmp_path / "figures.json", *only)
    assert status == 1
    assert [r["provider"] for r in content["results"]] == ["eager"]
    assert [r["provider"] for r in content["failed"]] == ["ours"]


# --- Attention ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_attention_measures_what_runs_on_a_cpu_and_names_the_softmax_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "attention.json"
    status, content = run_quick(attention.main, path, "--dtypes", "bf16")
    assert status == 0
    assert_consistent(content, path)
    assert "TFLOP/s" in capsys.readouterr().out
    found: dict[str, set[str]] = {}
    for r in content["results"]:
        found.setdefault(r["layout"], set()).add(r["provider"])
        assert r["best"] is True  # a CPU has one kernel for each provider
        assert r["seconds"].keys() == ({"forward"} if r["provider"] == "flex" else set(DIRECTIONS))
    compositions = {"cpu", "sdpa", "two", "four", "naive"}
    assert found == {
        "v1_64": compositions | {"flex"},
        "gda4_128_w128": compositions,
        "v2_64": compositions - {"four"},
        "softmax_64": {"cpu", "sdpa", "one", "naive"},
        "v1_64_packed": compositions,
    }
    (baseline,) = content["softmax_baselines"]
    softmax = [r for r in content["results"] if r["layout"] == "softmax_64"]
    fastest = min(softmax, key=lambda r: r["seconds"]["both"]["median"])
    assert baseline["provider"] == fastest["provider"]
    assert baseline["seconds"] == fastest["seconds"]
    skipped = {(s["layout"], s["provider"]): s["reason"] for s in content["skipped"]}
    assert "nothing to split" in skipped["v2_64", "four"]
    assert "compiles for long" in skipped["v2_64", "flex"]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        # For each noise head, or without noise each head, in units of the width.
        *(("v1_64", 12, 20), ("v1_128", 12, 20), ("gda4_128", 30, 62), ("gda2_64", 18, 34), ("v2_64", 8, 16)),
        ("softmax_64", 4, 10),
    ],
)
def test_flops_of_a_pair(name: str, forward: int, backward: int) -> None:
    layout = LAYOUTS[name]
    heads = layout.noise_heads or layout.signal_heads
    counted = {d: flops / layout.head_dim / heads for d, flops in layout.flops_per_pair().items()}
    assert counted == {"forward": forward, "backward": backward, "both": forward + backward}


@pytest.mark.parametrize("name", MASKS)
def test_every_tensor_is_moved_once_and_visible_pairs_alone_are_work(name: str) -> None:
    case = small(name, "bf16")
    inputs = inputs_of(case)
    given = sum(t.nbytes for t in inputs.values() if t.ndim > 1)  # vectors of a head's width are left out
    out = attention.ours(case, "naive", CPU)(inputs)
    moved = case.bytes_moved()
    assert (moved["forward"], moved["backward"]) == (given + out.nbytes, 2 * (given + out.nbytes))
    row, window = range(case.rows), case.layout.window or case.rows
    starts = [max(b for b in case.bounds if b <= i) if case.documents else 0 for i in row]
    visible = sum(starts[i] <= k <= i and i - k < window for i in row for k in row)
    assert case.pairs == case.batch * visible
    share = case.kv_heads / case.layout.kv_heads
    assert case.flops()["forward"] == case.pairs * case.layout.flops_per_pair()["forward"] * share


def test_sizes_are_those_of_the_released_models() -> None:
    assert attention_case("v1_64", "bf16", 4096, tokens=16384).batch == 4
    # Motif-2-12.7B has 32 signal and 8 noise heads over 8 of each of its keys and its values.
    heads = attention_case("gda4_128", "bf16", 512, tokens=512).heads
    assert heads == {"q1": 32, "k1": 8, "q2": 8, "k2": 8, "v": 8, "lambda": 32, "output": 32}
    documents = mix_documents(16384, 4096)
    assert documents == mix_documents(16384, 4096)
    assert (sum(documents), max(documents)) == (16384, 4096)
    assert sum(length < 512 for length in documents) >= 5


@pytest.mark.parametrize("name", MASKS)
def test_every_provider_of_a_cpu_is_right(name: str) -> None:
    case = small(name)
    arguments = SimpleNamespace(device="cpu", lengths=[150], layouts=[name], flex_everywhere=False)
    names = [
        n
        for n in ("cpu", "sdpa", "two", "four", "one", "naive")
        if not attention.BENCHMARK.unsupported(case, n, arguments)
    ]
    assert len(names) >= 3
    for provider in attention.providers(case, names, CPU):
        found = verdict(case, *provider.forms)
        assert not isinstance(found, str), (provider.name, found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t | {"lambda": 1.1 * t["lambda"]}, "its output is off"),
        (lambda t: t | {"k1": t["k1"].roll(1, dims=1)}, "its output is off"),
        (lambda t: t | {"v": 0.5 * t["v"] + 0.5 * t["v"].detach()}, "its gradient of v is off"),
        (lambda t: t | {"q2": t["q2"].where(torch.arange(t["q2"].shape[1])[:, None, None] != 149, 0)}, "its output"),
    ],
    ids=["lambda", "later keys", "half a gradient", "the last query"],
)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_attention_that_is_wrong_is_found(change: Any, reason: str, dtype: str) -> None:
    case = small("gda4_64", dtype)
    right = attention.ours(case, "sdpa", CPU)
    assert reason in verdict(case, ("", lambda t: right(change(dict(t)))))
    assert not isinstance(verdict(case, ("", right)), str)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["v1_64_w128", "gda4_64", "gda4_128_packed", "v2_64", "softmax_128"])
def test_flex_attention_has_the_layouts_masks(name: str) -> None:
    case = small(name)
    inputs = {n: t.detach() for n, t in inputs_of(case).items()}
    exact = exact_results(case, inputs, draw_from(1, torch.float32, CPU))
    out = compose(flex(case, CPU, lambda function, dynamic: function), case.calls)(inputs)
    assert exact.errors({"output": out})["output"]["relative"] < 1e-4


def masked(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: tuple[int, int], scale: float) -> Tensor:
    """Packed attention by the plain formula: it stands in for kernels that need a GPU."""
    mask = packed_attention_mask(bounds, bounds, len(q), len(k), causal=True, window_size=window)
    return plain_attention(q[None], k[None], v[None], mask=mask, softmax_scale=scale)[0][0]


@pytest.mark.parametrize("gqa", [True, False], ids=["with enable_gqa", "without it, as some torch"])
@pytest.mark.parametrize("name", ["v1_64_w128", "gda4_128_packed"])
def test_varlen_is_given_every_sequence_and_window(name: str, gqa: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen as library

    def old(q: Any, k: Any, v: Any, bounds: Any, _: Any, __: int, ___: int, *, scale: float, window_size: Any) -> Any:
        return masked(q, k, v, bounds, window_size, scale)

    def new(q: Tensor, k: Tensor, *rest: Any, enable_gqa: bool, **options: Any) -> Tensor:
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return old(q, k, *rest, **options)

    monkeypatch.setattr(library, "varlen_attn", new if gqa else old)
    case = small(name)
    assert not isinstance(verdict(case, ("", compose(varlen(case, CPU), 4))), str)


@pytest.mark.parametrize("name", ["v1_64_w128", "gda4_128_packed", "softmax_128"])
def test_flash_attn_is_given_every_sequence_and_window(name: str) -> None:
    case = small(name)

    class Module:
        @staticmethod
        def flash_attn_func(
            q: Any, k: Any, v: Any, softmax_scale: float, causal: bool, window_size: Any = (-1, 0)
        ) -> Any:
            bounds = torch.tensor([0, q.shape[1]], dtype=torch.int32)
            each = [masked(*parts, bounds, window_size, softmax_scale) for parts in zip(q, k, v, strict=True)]
            return torch.stack(each), "the log-sum-exp"

        @staticmethod
        def flash_attn_varlen_func(
            q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, softmax_scale: float, causal: bool
        ) -> Any:
            return masked(q, k, v, cu_seqlens_q, (-1, 0), softmax_scale)

    found = verdict(case, ("", compose(flash_attn(case, CPU, Module), case.calls)))
    assert not isinstance(found, str), found


# --- Decoding -------------------------------------------------------------------------------------


def small_decode(name: str, dtype: str = "float32", context: int = 100) -> decode.DecodeCase:
    return decode.decode_case(name, dtype, 3, context, head_divisor=4)


def decode_verdict(case: decode.DecodeCase, *tried: tuple[str, Function]) -> Any:
    inputs = case.make(draw_from(0, DTYPES[case.dtype], CPU))
    exact = exact_results(case, inputs, draw_from(1, DTYPES[case.dtype], CPU))
    tolerance = 1e-4 if case.dtype == "float32" else 0.15
    return check(Provider("it", tried, directions=("forward",)), inputs, exact, tolerance)


def test_decoding_runs_with_every_provider_of_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    status, content = run_quick(decode.main, path)
    assert status == 0
    assert_consistent(content, path)
    cells: dict[tuple[Any, ...], set[str]] = {}
    for r in content["results"]:
        cells.setdefault((r["layout"], r["dtype"], r["batch"], r["context"]), set()).add(r["provider"])
        # One key head of GDA is left, two of DIFF V1: two keys and values as wide as both.
        widths = {"gda4_128": 512, "v1_64": 2 * 256, "softmax_128": 256, "gdla_latent": 576}[r["layout"]]
        assert r["bytes"]["forward"] == r["batch"] * r["context"] * widths * DTYPES[r["dtype"]].itemsize
    layouts = {"gda4_128": {"sdpa", "four", "two", "one"}, "softmax_128": {"sdpa", "one"}}
    layouts |= {"v1_64": layouts["gda4_128"], "gdla_latent": layouts["softmax_128"]}
    assert cells == {(n, d, b, 96): names for n, names in layouts.items() for d in DTYPES for b in (1, 2)}
    assert len(content["softmax_baselines"]) == 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["gda4_64", "gda4_128", "v1_64", "softmax_128", "gdla_latent"])
def test_every_way_to_decode_is_right(name: str) -> None:
    case = small_decode(name)
    names = ["sdpa", "one"] if name in ("softmax_128", "gdla_latent") else ["sdpa", "four", "two", "one"]
    for provider in decode.providers(case, names, CPU):
        found = decode_verdict(case, *provider.forms)
        assert not isinstance(found, str), (provider.name, found)
        # A CPU's flash attention has one width for all.
        assert found[0] == ("joined keys" if provider.name == "two" else "")
    eager = flex(case, CPU, lambda function, dynamic: function)
    assert not isinstance(decode_verdict(case, ("", compose(eager, case.calls))), str)


@pytest.mark.parametrize("part", [slice(1, None), slice(None, -1), slice(0, 1024)], ids=["oldest", "newest", "rest"])
def test_decoding_that_leaves_out_keys_is_found_at_any_length(part: slice) -> None:
    case = small_decode("gda4_64", "bf16", 4096)
    twice = compose(sdpa(case, CPU, None), 2)

    def partial(t: Mapping[str, Tensor]) -> Tensor:
        return twice({**t, **{name: t[name][:, part] for name in ("k1", "k2", "v")}})

    assert not isinstance(decode_verdict(case, ("", twice)), str)
    assert "its output is off by" in decode_verdict(case, ("", partial))


def test_flash_attn_decodes_with_the_lengths_it_is_told() -> None:
    case = small_decode("gda4_64")
    plain = sdpa(case, CPU, None)

    class Module:
        @staticmethod
        def flash_attn_with_kvcache(
            q: Any, k: Any, v: Any, cache_seqlens: Tensor, softmax_scale: float, causal: bool, num_splits: int = 1
        ) -> Tensor:
            assert cache_seqlens.tolist() == [100] * 3
            assert (causal, num_splits) == (True, 0)
            return plain(q, k, v)

    attend = decode.flash_attn(Module, case.scale, torch.full((3,), 100))
    for calls in ("four", "two", "one"):
        assert not isinstance(decode_verdict(case, *decode.forms(calls, attend)), str)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (poly_norm.main, ["--rows", "-1"], "--rows is -1; it must be above 0"),
        (poly_norm.main, ["--columns", "64", "0"], "--columns is 0; it must be above 0"),
        (poly_norm.main, ["--providers", "liger"], "--providers liger: liger-kernel has no CPU path"),
        (combine.main, ["--columns", "1000"], "--columns 1000 is not a whole number of groups of GDA 4:1's heads"),
        (attention.main, ["--head-divisor", "0"], "--head-divisor is 0; it must be above 0"),
        (attention.main, ["--providers", "triton"], "--providers triton: it needs a GPU"),
        (decode.main, ["--batches", "0"], "--batches is 0; it must be above 0"),
    ],
)
def test_impossible_arguments_end_in_one_message(
    main: Any, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "figures.json")]
    assert main([*arguments, *output, "--device", "cpu", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
