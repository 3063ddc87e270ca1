"""Compile kernels for a GPU that is not there, exactly as they would be launched on it, and read
what they need.

    TRITON_INTERPRET=0 python -m benchmarks.compiled_kernels 90|100 [FAMILY...]

Triton asks its driver which GPU to compile for; here the answer is made up, and a launch stops
after compiling. So the code under test chooses its own configuration, from CPU tensors, and what is
compiled is what users run. Prints a table, or with --json one object a line: registers and stack
bytes (spills) a thread, shared memory bytes and tensor memory columns a block.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

GPUS = {90: "NVIDIA H100 80GB HBM3", 100: "NVIDIA B200"}


class Usage(NamedTuple):
    """What a kernel asks of the GPU."""

    kernel: str
    arch: int
    registers: int  # a thread
    stack: int  # bytes a thread; more than 0 means that registers spilled
    shared: int  # bytes a block
    tensor_memory: int  # columns, on Blackwell
    constants: dict[str, Any]


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Usage]]:
    """Within, launching a kernel only compiles it for sm_<arch>; what was compiled is in the
    list.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from motif_kernels import tuning

    class Driver:
        def get_current_device(self) -> int:
            return arch  # Triton keeps compiled kernels apart by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    compiled: dict[str, Usage] = {}
    run, table = triton.JITFunction.run, tuning._table
    tuning._table = lambda device: tuning.merged_table(GPUS[arch])  # type: ignore[assignment]  # a stand-in without its cache

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            registers, stack = _resource_usage(kernel.asm["cubin"])
            shown = {k: v for k, v in kwargs.items() if isinstance(v, int | float | bool | str)}
            name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
            compiled[kernel.hash] = Usage(
                name, arch, registers, stack, kernel.metadata.shared, kernel.metadata.tmem_size, shown
            )
        return kernel

    triton.JITFunction.run = warm_up
    driver.set_active(Driver())
    usages: list[Usage] = []
    try:
        yield usages
    finally:
        triton.JITFunction.run, tuning._table = run, table
        usages.extend(compiled.values())


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and stack bytes a thread, from the cuobjdump that triton's package
    carries.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])


def _poly_norm() -> None:
    """Every entry of every table, for two- and four-byte elements, with and without ``up``, whole
    rows and sharded.
    """
    from motif_kernels.impl.triton import poly_norm

    weight, bias = torch.ones(3), torch.ones(1)
    for dtype in (torch.bfloat16, torch.float32):
        lengths = {e["up_to"] or 1 << 20 for k in ("forward", "backward", "sums") for e in _entries(f"poly_norm_{k}")}
        for columns in sorted(length // dtype.itemsize for length in lengths):
            for x, has_up in itertools.product(
                (torch.empty(64, columns, dtype=dtype), torch.empty(1, columns)), (0, 1)
            ):
                up = x if has_up else None
                fixed: dict[str, Any] = {"eps": 1e-6, "hidden_clamp": None}
                poly_norm.forward(x, up, weight, bias, inverse_rms=None, out_dtype=x.dtype, **fixed)
                poly_norm.backward(x, x, up, weight, bias, inverse_rms=None, mean_products=None, **fixed)
                moments = torch.empty(3, len(x))
                poly_norm.power_sums(x, hidden_clamp=None)
                poly_norm.product_sums(x, x, up, hidden_clamp=None)
                fixed["hidden_clamp"] = 1000.0
                poly_norm.forward(x, up, weight, bias, inverse_rms=moments, out_dtype=x.dtype, **fixed)
                poly_norm.backward(x, x, up, weight, bias, inverse_rms=moments, mean_products=moments, **fixed)


def _combine() -> None:
    """Every head width and ratio that attention kernels serve, with each epilogue."""
    from motif_kernels.impl.triton import combine

    for dtype, ratios in ((torch.bfloat16, (1, 2, 3, 4, 7)), (torch.float32, (1, 4))):
        for width in (64, 128, 192, 256):
            for group in ratios:
                signal = torch.empty(64, 2 * group, width, dtype=dtype)
                noise, lam = torch.empty(64, 2, width, dtype=dtype), torch.ones(())
                for weight, gate in ((None, None), (torch.ones(width), None), (None, signal)):
                    fixed = {"norm_eps": 1e-5, "out_scale": 0.5}
                    combine.forward(signal, noise, lam, weight, gate, out_dtype=dtype, **fixed)
                    combine.backward(signal, signal, noise, lam, weight, gate, **fixed)


def _attention() -> None:
    """Every pair of widths that is promised: whole and grouped, every epilogue, masks, and both
    backward modes.
    """
    for d, dv in WIDTHS:
        for options in CALLS:
            _attention_call(torch.bfloat16, d, dv, **options)
    _attention_call(torch.float32, 64, 64, **CALLS[1])  # for checks; each compiles for half a minute


WIDTHS = ((64, 64), (64, 128), (96, 192), (128, 128), (128, 256), (192, 128))
CALLS: tuple[dict[str, Any], ...] = (
    {"group": 1, "right": 0, "epilogue": "norm"},
    {"group": 4, "right": 0, "epilogue": "norm"},
    {"group": 1, "right": 0, "epilogue": "none", "left": 511},
    {"group": 1, "right": 0, "epilogue": "none", "packed": True},
    {"group": 3, "right": -1, "epilogue": "gate", "deterministic": False, "softcap": 20.0},
)


def _attention_call(
    dtype: torch.dtype,
    d: int,
    dv: int,
    *,
    group: int,
    right: int,
    epilogue: str,
    left: int = -1,
    packed: bool = False,
    deterministic: bool = True,
    softcap: float = 0.0,
) -> None:
    """A forward and a backward of 256 tokens with 2 noise heads."""
    from motif_kernels.impl.triton import diff_attention as attention
    from motif_kernels.ops.diff_attention import Options, Tensors, empty_gradients, empty_results

    leading = (256,) if packed else (1, 256)
    signal, noise, value = (torch.empty(*leading, h, w, dtype=dtype) for h, w in ((2 * group, d), (2, d), (2, dv)))
    cu_seqlens = torch.tensor([0, 256], dtype=torch.int32) if packed else None
    weight = torch.empty(dv) if epilogue == "norm" else None
    gate = torch.empty(*leading, 2 * group, dv, dtype=dtype) if epilogue == "gate" else None
    lam = torch.empty(())
    tensors = Tensors(signal, noise, noise, noise, value, lam, weight, gate, cu_seqlens, cu_seqlens)
    options = Options(256, 256, d**-0.5, left, right, softcap, 1e-5, 1.0, deterministic, True, True)
    results = empty_results(tensors, options)
    attention.forward(tensors, options, results)
    attention.backward(
        results.out, tensors, options, results.out.flatten(0, -3), *results[2:6], empty_gradients(tensors)
    )


def _decoding() -> None:
    """One new token against a cache: the promised widths, groups that share a key head, both kinds
    of cache.
    """
    from motif_kernels.impl.triton import cache_append, decoding
    from motif_kernels.ops.decoding import Options, Tensors

    for dtype in (torch.float32, torch.bfloat16):
        for heads, width in ((2, 512), (16, 128)):
            cache, tokens = (torch.empty(2, n, heads, width, dtype=dtype) for n in (256, 1))
            for table in (None, torch.empty(2, 1, dtype=torch.int32)):
                cache_append.append(cache, tokens, torch.empty(2, dtype=torch.int32), table)

    for d, dv in WIDTHS:
        for group, noises, paged in ((1, 1, False), (4, 1, False), (1, 4, True), (4, 2, True)):
            q1 = torch.empty(2, 1, 2 * group * noises, d, dtype=torch.bfloat16)
            q2, k = (torch.empty(2, n, h, d, dtype=torch.bfloat16) for n, h in ((1, 2 * noises), (256, 2)))
            tensors = Tensors(
                q1=q1,
                k1_cache=k,
                q2=q2,
                k2_cache=k,
                v_cache=torch.empty(2, 256, 2, dv, dtype=torch.bfloat16),
                lam=torch.empty(()),
                lengths=torch.empty(2, dtype=torch.int32),
                leftpad=None,
                block_table=torch.empty(2, 1, dtype=torch.int32) if paged else None,
                norm_weight=torch.empty(dv),
                gate=None,
            )
            decoding.attend(tensors, Options(2, d**-0.5, -1, 0, 0.0, 1e-5, 0.5, "triton", ""))


def _entries(kernel: str) -> list[dict[str, Any]]:
    from motif_kernels.tuning import tables

    return [e for table in tables().values() for e in table["kernels"].get(kernel, [])]


FAMILIES = {"poly_norm": _poly_norm, "combine": _combine, "attention": _attention, "decoding": _decoding}


def _main(arguments: list[str]) -> None:
    as_json = "--json" in arguments
    arch, *families = [a for a in arguments if a != "--json"]
    with compile_only(int(arch)) as found:
        for family in families or FAMILIES:
            FAMILIES[family]()
    if as_json:
        for usage in found:
            print(json.dumps(usage._asdict()))
        return
    print(f"{'kernel':<38} {'registers':>9} {'stack':>6} {'shared':>7} {'tensor':>6}  constants")
    for u in found:
        constants = ", ".join(f"{k}={v}" for k, v in u.constants.items())
        print(f"{u.kernel:<38} {u.registers:>9} {u.stack:>6} {u.shared:>7} {u.tensor_memory:>6}  {constants}")


if __name__ == "__main__":
    _main(sys.argv[1:])
