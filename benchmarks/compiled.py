"""What every shipped kernel configuration needs of a GPU, and what its loops do. No GPU needed.

    python -m benchmarks.compiled                # some ten minutes of two cores
    python -m benchmarks.compiled --families attention --architectures 90 --every
    python -m benchmarks.compiled --calibration  # the static model beside what was published

Each kernel is compiled for Hopper (sm_90) and Blackwell (sm_100; sm_103 is a B300) exactly as it
would be launched, and read with the tools that triton brings. benchmarks/results/compiled.json has
a line for every configuration: registers, stack bytes a thread, shared memory and tensor memory a
block, then each innermost loop. The tests compile them again and hold them to bounds, and to that
file where triton's version is the same. It also has what benchmarks.predicted says, whose tables
are compiled.md. The status is 1 where an attention kernel has a defect that is not known
(benchmarks.lib.lints), or has lost one that is.

A line's loop reads "371: 4*64x64x16 SS 4*64x128x16 RS mufu 34 barriers 2": instructions, products
of a warpgroup, and what else a warp does in an iteration.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.console import Console

from benchmarks import predicted
from benchmarks.lib import calibration, cli, lints, report
from benchmarks.lib.compiling import compile_only, labelled
from benchmarks.lib.sass import Loop
from motif_kernels.impl.gluon import availability

MODULE = "benchmarks.compiled"
ARCHITECTURES = {90: "Hopper", 100: "Blackwell", 103: "Blackwell Ultra"}
NEEDS = ("registers", "stack", "shared", "tensor_memory")


# --- What is compiled, in a process of its own ----------------------------------------------------


def _poly_norm() -> None:
    """Every entry of every table, by width of elements, with and without ``up``, sharded too."""
    from motif_kernels.impl.triton import poly_norm
    from motif_kernels.tuning import tables

    weight, bias = torch.ones(3), torch.ones(1)
    names = [f"poly_norm_{kind}" for kind in ("forward", "backward", "sums")]
    entries = [e for table in tables().values() for name in names for e in table["kernels"].get(name, [])]
    lengths = {entry["up_to"] or 1 << 20 for entry in entries}
    for dtype, has_up in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        for columns in sorted(length // dtype.itemsize for length in lengths):
            for x in (torch.empty(64, columns, dtype=dtype), torch.empty(1, columns)):
                up = x if has_up else None
                moments = torch.empty(3, len(x))
                to_forward: dict[str, Any] = {"eps": 1e-6, "out_dtype": x.dtype, "hidden_clamp": None}
                for keep in (False, True):
                    poly_norm.forward(x, up, weight, bias, inverse_rms=None, keep_inverse_rms=keep, **to_forward)
                to_backward: dict[str, Any] = {"inverse_rms": moments, "mean_products": None, "hidden_clamp": None}
                poly_norm.backward(x, x, up, weight, bias, **to_backward)
                poly_norm.power_sums(x, hidden_clamp=None)
                poly_norm.product_sums(x, x, up, hidden_clamp=None)
                to_forward |= {"inverse_rms": moments, "keep_inverse_rms": False, "hidden_clamp": 1000.0}
                poly_norm.forward(x, up, weight, bias, **to_forward)
                to_backward |= {"mean_products": moments, "hidden_clamp": 1000.0}
                poly_norm.backward(x, x, up, weight, bias, **to_backward)


def _grouped_poly_norm() -> None:
    """At the width of Motif-3's experts and a longer one, halves of one tensor and apart."""
    from motif_kernels.impl.triton import group_sums, poly_norm

    offsets, weight, bias = torch.zeros(384, dtype=torch.int32), torch.ones(384, 3), torch.ones(384, 1)
    for dtype, columns in itertools.product((torch.bfloat16, torch.float32), (1280, 4096)):
        x, up = torch.empty(64, 2 * columns, dtype=dtype).chunk(2, dim=-1)
        clamps: dict[str, Any] = {"hidden_clamp": 1e6, "out_clamp": 5e5}
        moments: dict[str, Any] = {"inverse_rms": torch.empty(3, 64), "mean_products": None}
        for keep in (False, True):
            numbers: dict[str, Any] = {"inverse_rms": None, "keep_inverse_rms": keep, "eps": 1e-6, "out_dtype": dtype}
            poly_norm.forward(x, up, weight, bias, offsets, **numbers, **clamps)
        for joined in (False, True):
            poly_norm.backward(x, x, up, weight, bias, offsets, **moments, **clamps, joined=joined)
        poly_norm.forward_mxfp8(x, up, weight, bias, offsets, eps=1e-6, **clamps)
        group_sums.group_sums(torch.empty(4, 64), offsets)


def _combine() -> None:
    """Every head width and ratio that attention kernels serve, with each epilogue."""
    from motif_kernels.impl.triton import combine

    for dtype, ratios in ((torch.bfloat16, (1, 2, 3, 4, 7)), (torch.float32, (1, 4))):
        for width, group in itertools.product((64, 128, 192, 256), ratios):
            signal = torch.empty(64, 2 * group, width, dtype=dtype)
            noise, lam = torch.empty(64, 2, width, dtype=dtype), torch.ones(())
            for weight, gate in ((None, None), (torch.ones(width), None), (None, signal)):
                fixed: dict[str, Any] = {"norm_eps": 1e-5, "out_scale": 0.5}
                combine.forward(signal, noise, lam, weight, gate, out_dtype=dtype, **fixed)
                combine.backward(signal, signal, noise, lam, weight, gate, **fixed)


def _hyper_connections() -> None:
    """Four streams, narrow and as wide as Motif-3's, and of a width that no vector divides."""
    from motif_kernels.impl.triton import hyper_connections

    n, count, rows = 4, 24, 256
    bias, products, r = torch.zeros(20), torch.zeros(rows, count), torch.zeros(rows)
    post, mix = hyper_connections.maps_forward(products, bias, iterations=20)
    hyper_connections.maps_backward(post, mix, products, bias, iterations=20)
    for dtype, width in ((torch.bfloat16, 4096), (torch.bfloat16, 1001), (torch.float32, 4096)):
        streams, weight = torch.zeros(rows, n, width, dtype=dtype), torch.zeros(count, n * width)
        out = streams[:, 0].contiguous()
        hyper_connections.read_forward(streams, weight, bias[:n], eps=1e-6)
        hyper_connections.read_backward(out, products, streams, weight, bias[:n], products, r)
        hyper_connections.update_forward(streams, out, post, mix)
        hyper_connections.update_backward(streams, streams, out, post, mix)


def _routing() -> None:
    """Motif-3's experts and few, rows of its width and narrow ones, both directions."""
    from motif_kernels.impl.triton import expert_rows, routing

    for experts, top_k in ((384, 8), (16, 1)):
        logits, bias = torch.empty(64, experts), torch.empty(experts)
        selected = torch.zeros(64, top_k, dtype=torch.int64)
        weights, offsets = torch.empty(64, top_k), torch.zeros(experts, dtype=torch.int32)
        for softmax in (False, True)[:top_k]:
            routing.select_experts(logits, bias, top_k, softmax)
            routing.expert_weights(logits, selected, softmax, True, 2.5)
            for dense in (None, logits):
                routing.expert_weights_backward(weights, dense, logits, selected, softmax, True, 2.5)
        expert_rows.sort_by_expert(selected, experts)
        for dtype, width in ((torch.bfloat16, 4096), (torch.float32, 4096)) if top_k > 1 else ((torch.bfloat16, 256),):
            x, rows = torch.empty(64, width, dtype=dtype), torch.empty(64 * top_k, width, dtype=dtype)
            expert_rows.dispatch(x, selected, offsets, len(rows))
            expert_rows.combine(rows, None, selected, offsets, dtype)
            expert_rows.combine(rows, weights, selected, offsets, torch.float32)
            expert_rows.combine_backward(x.float(), rows, weights, selected, offsets)


WIDTHS = ((64, 64), (64, 128), (96, 192), (128, 128), (128, 256), (192, 128))
CALLS: tuple[dict[str, Any], ...] = (
    {"group": 1, "epilogue": "norm"},
    {"group": 4, "epilogue": "norm"},
    {"group": 1, "window_size": (511, 0)},
    {"group": 1, "packed": True},
    {"group": 3, "epilogue": "gate", "causal": False, "deterministic": False, "softcap": 20.0},
    {"group": 1, "softmax": True},
    {"group": 4, "softmax": True, "packed": True},
    {"group": 4, "softmax": True, "window_size": (511, 0), "deterministic": False},
)
# Motif-3 (192, 128): 4 signal heads and their noise head on one key head, lambda a token and head.
_LATENT: dict[str, Any] = {"group": 4, "epilogue": "gate", "shared_keys": True, "return_max_logits": True}
LATENT_CALLS = (_LATENT | {"packed": True}, _LATENT | {"window_size": (128, 0)})


def _attention() -> None:
    """Every pair of widths, epilogue, mask and backward mode that is promised: all with all at the
    widths that are trained most, each with some at the others.
    """
    from motif_kernels import tuning

    for d, dv in WIDTHS:
        for options in CALLS if (d, dv) in ((64, 128), (128, 256)) else CALLS[1:4]:
            attention_call(torch.bfloat16, d, dv, **options)
        with tuning.overriding(attention_forward_tma=None):  # as where tensors are not aligned
            attention_call(torch.bfloat16, d, dv, **CALLS[1])
    for options in LATENT_CALLS:
        attention_call(torch.bfloat16, 192, 128, **options)
    attention_call(torch.float32, 64, 64, **CALLS[1])  # for checks; each compiles for half a minute


def _gluon() -> None:
    """What the Gluon kernels serve on a Hopper GPU."""
    for d, dv in ((64, 128), (128, 256)):
        for options in (*CALLS[1:4], CALLS[5]):
            attention_call(torch.bfloat16, d, dv, **options)


def attention_call(
    dtype: torch.dtype,
    d: int,
    dv: int,
    *,
    group: int,
    epilogue: str = "",
    packed: bool = False,
    softmax: bool = False,
    shared_keys: bool = False,
    **options: Any,
) -> None:
    """Forward and backward of 256 tokens with 2 noise heads, or without noise, and 2 key heads.

    With shared_keys, both maps have one key, and each token and head a lambda: DIFF V2.
    """
    from motif_kernels import diff_attn_func, diff_attn_varlen_func

    leading = (256,) if packed else (1, 256)
    shapes = ((2 * group, d), (2, d), (2, d), (2, d), (2, dv))
    leaves = [torch.zeros(*leading, h, w, dtype=dtype).requires_grad_() for h, w in shapes]
    options = {"causal": True, "backend": "triton", **options}
    if epilogue == "norm":
        options["norm_weight"] = torch.ones(dv).requires_grad_()
    if epilogue == "gate":
        options["gate"] = torch.zeros(*leading, 2 * group, dv, dtype=dtype).requires_grad_()
    lam = torch.zeros((*leading, 2 * group) if shared_keys else ()).requires_grad_()
    bounds = torch.tensor([0, 256], dtype=torch.int32)
    call: Callable[..., Any] = diff_attn_varlen_func if packed else diff_attn_func
    tensors: list[torch.Tensor | None] = [*leaves, lam]
    if softmax:
        tensors[2] = tensors[3] = tensors[5] = None
    if shared_keys:
        tensors[3] = tensors[1]
    with labelled(head_dim=d, v_head_dim=dv):
        out = call(*tensors, *((bounds, bounds, 256, 256) if packed else ()), **options)
        out = out[0] if isinstance(out, tuple) else out
        extra = [options[name] for name in ("norm_weight", "gate") if name in options]
        torch.autograd.grad(out, [t for t in (*tensors, *extra) if t is not None], torch.zeros_like(out))


def _decoding() -> None:
    """One new token, appended to both kinds of cache, at the promised widths."""
    from motif_kernels import diff_attn_with_kvcache
    from motif_kernels.impl.triton import cache_append

    for dtype, (heads, width) in itertools.product((torch.float32, torch.bfloat16), ((2, 512), (16, 128))):
        cache, tokens = (torch.empty(2, n, heads, width, dtype=dtype) for n in (256, 1))
        for table in (None, torch.empty(2, 1, dtype=torch.int32)):
            cache_append.append(cache, tokens, torch.empty(2, dtype=torch.int32), table)

    for d, dv in WIDTHS:
        for group, noises, paged in (
            *((1, 1, False), (4, 1, False), (1, 4, True), (4, 2, True)),
            *((4, 0, False), (1, 0, True)),  # softmax attention
        ):
            k, v = (torch.zeros(2, 256, 2, width, dtype=torch.bfloat16) for width in (d, dv))
            q2: torch.Tensor | None
            q1, q2 = (torch.zeros(2, 1, h, d, dtype=torch.bfloat16) for h in (2 * group * (noises or 1), 2 * noises))
            lengths, pages = torch.tensor([256, 256], dtype=torch.int32), torch.tensor([[0], [1]], dtype=torch.int32)
            options: dict[str, Any] = {"causal": True, "num_splits": 2, "backend": "triton", "out_scale": 0.5}
            options |= {"norm_weight": torch.ones(dv), "block_table": pages if paged else None}
            q2, k2, lam = (q2, k, torch.zeros(())) if noises else (None, None, None)
            diff_attn_with_kvcache(q1, k, q2, k2, v, lam, lengths, **options)
    _latent_decoding()


def _latent_decoding() -> None:
    """Latents of Motif-3 and DeepSeek-V3, whole and by fewer heads: each entry of the tables."""
    from motif_kernels import diff_attn_with_kvcache

    for signals, noises, paged in ((64, 16, False), (64, 16, True), (128, 0, False), (24, 8, True), (12, 4, False)):
        cache = torch.zeros(2, 256, 1, 576, dtype=torch.bfloat16)
        q1, q2 = (torch.zeros(2, 1, heads, 576, dtype=torch.bfloat16) for heads in (signals, noises))
        noise: Any = (q2, cache, torch.zeros(2, 1, signals)) if noises else (None, None, None)
        inputs = q1, cache, noise[0], noise[1], cache[..., :512], noise[2]
        table = torch.tensor([[0], [1]], dtype=torch.int32) if paged else None
        lengths = torch.tensor([256, 256], dtype=torch.int32)
        options: dict[str, Any] = {"causal": True, "num_splits": 2, "backend": "triton", "block_table": table}
        with labelled(head_dim=576, v_head_dim=512):
            diff_attn_with_kvcache(*inputs, lengths, **options)


def _motif() -> None:
    """What the attention of Motif-2-12.7B runs in training: enough to see that kernels compile."""
    attention_call(torch.bfloat16, 128, 256, **CALLS[1])


FAMILIES = {
    "poly_norm": _poly_norm,
    "grouped_poly_norm": _grouped_poly_norm,
    "combine": _combine,
    "hyper_connections": _hyper_connections,
    "routing": _routing,
    "attention": _attention,
    "gluon": _gluon,
    "decoding": _decoding,
}


def jobs(architectures: Iterable[int], families: Iterable[str]) -> list[tuple[int, str]]:
    """What there is to compile: Gluon's kernels are for Hopper, and B300's tables are the default
    ones, of which the attention of the released model is looked at.
    """
    all_of_them = itertools.product(architectures, families)
    return [
        (arch, "motif" if arch == 103 and family == "attention" else family)
        for arch, family in all_of_them
        if family != "gluon" or (arch == 90 and availability.release_serves())
    ]


def _worker(arch: int, family: str) -> None:
    """Compile a family and print an object a line."""
    with compile_only(arch, gluon="gluon" in family) as found:
        (FAMILIES | {"motif": _motif, "motif_gluon": _motif})[family]()
    for usage in found:
        print(json.dumps(usage))


# --- The report -----------------------------------------------------------------------------------


def compile_family(arch: int, family: str) -> list[dict[str, Any]]:
    """Every configuration of a family of kernels, in a fixed order.

    Args:
        arch: one of ARCHITECTURES.
        family: one of FAMILIES, or "motif" or "motif_gluon", some seconds of attention.

    Returns:
        For each: kernel, arch, what :func:`benchmarks.lib.compiling.usage` gives, lints, and the
        constants that it was compiled with.

    Raises:
        RuntimeError: it did not compile.
    """
    # A process of its own: whether kernels are interpreted is decided when triton is imported. The
    # default of fusion is that of triton 3.10: launches ask for it.
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "0",
        "PYTHONPATH": os.pathsep.join([str(report.ROOT), *sys.path]),
    }
    command = [sys.executable, "-m", MODULE, "--worker", str(arch), family]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{family} does not compile for sm_{arch}: {done.stderr.strip()}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return sorted(found, key=lambda usage: json.dumps(usage, sort_keys=True))


def rows_of(kernels: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel and GPU its configurations: the needs, and the constants that differ."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for usage in kernels:
        groups.setdefault((usage["kernel"], usage["arch"]), []).append(usage)
    rows = []
    for (kernel, arch), group in groups.items():
        values = {n: {u["constants"].get(n) for u in group} for u in group for n in u["constants"]}
        shown = [n for n, found in values.items() if len(found) > 1]
        needs = (
            " ".join([*(str(u[n]) for n in NEEDS), *(f"{n}={u['constants'][n]}" for n in shown if n in u["constants"])])
            + "".join(f" | {Loop.parse(loop)}" for loop in u["loops"])
            for u in group
        )
        # Some differ in what is no constant alone: the arguments' types, or what divides them.
        rows.append({"kernel": kernel, "for": f"sm_{arch}", "configurations": list(dict.fromkeys(needs))})
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(MODULE, __doc__)
    add = made.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    archs = list(ARCHITECTURES)
    add("--architectures", nargs="+", type=int, choices=archs, default=archs, help="default: all")
    add("--jobs", type=int, default=2, help="compilations side by side; default %(default)s")
    add("--every", action="store_true", help="print every configuration")
    add("--calibration", action="store_true", help="compare the static model with what was published, and record it")
    add("--worker", nargs=2, metavar=("ARCH", "FAMILY"), help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(argv)
    if options.worker:
        _worker(int(options.worker[0]), options.worker[1])
        return 0
    console = Console()
    if options.calibration:
        console.print(calibration.describe(*calibration.rows()), soft_wrap=True)
        calibration.write()
        return 0
    work = jobs(options.architectures, options.families)
    whole = len(work) == len(jobs(ARCHITECTURES, FAMILIES))
    path = options.output or (report.RESULTS if whole else report.ROOT / "runs") / "compiled.json"
    kernels: list[dict[str, Any]] = []
    with cli.terminate_as_interrupt(), ThreadPoolExecutor(options.jobs) as pool:
        layers = pool.submit(predicted.collect, ["--figures"]) if whole else None
        for (arch, family), found in zip(work, pool.map(lambda job: compile_family(*job), work), strict=True):
            kernels += found
            console.print(f"{family} for sm_{arch}: {len(found)} kernels")
    env = report.environment(MODULE, torch.device("cpu"), ("motifarch", "triton"))
    content = {"benchmark": "compiled", "format": 3, "environment": env, "configuration": NEEDS}
    rows = rows_of(kernels)
    content |= {"kernels": rows}
    found_layers = layers.result() if layers else {}
    report.write_json(path, content | found_layers)
    if layers:
        path.with_suffix(".md").write_text(predicted.markdown(found_layers), encoding="utf-8")
    for row in rows if options.every else ():
        for configuration in row["configurations"]:
            console.print(row["kernel"], row["for"], configuration, soft_wrap=True)
    console.print(f"all configurations: {path}", soft_wrap=True)
    offences, mended = lints.judge(kernels)
    for text in (*offences, *(mended if whole else ())):
        console.print(text, style="bold red", soft_wrap=True)
    return 1 if offences or (whole and mended) else 0


if __name__ == "__main__":
    sys.exit(main())
