"""Compile kernels for a GPU that is not there, exactly as they would be launched on it, and read what they need.

    TRITON_INTERPRET=0 python -m helpers.compiled_kernels ARCH FAMILY      (from tests/)

Triton asks its driver which GPU to compile for; here the answer is made up, and a launch stops after compiling. So the
code under test chooses its own configuration, from CPU tensors, and what is compiled is what users run. Prints one JSON
object a compiled kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """What a kernel asks of the GPU."""

    kernel: str
    arch: int
    registers: int  # a thread
    stack: int  # bytes a thread; more than 0 means that registers spilled
    shared: int  # bytes a block
    constants: dict[str, Any]


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Usage]]:
    """Within, launching a kernel only compiles it for sm_<arch>; what was compiled is in the list."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        def get_current_device(self) -> int:
            return arch  # Triton keeps compiled kernels apart by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    compiled: dict[str, Usage] = {}
    run = triton.JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            registers, stack = _resource_usage(kernel.asm["cubin"])
            shown = {k: v for k, v in kwargs.items() if isinstance(v, int | float | bool | str)}
            name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
            compiled[kernel.hash] = Usage(name, arch, registers, stack, kernel.metadata.shared, shown)
        return kernel

    triton.JITFunction.run = warm_up
    driver.set_active(Driver())
    usages: list[Usage] = []
    try:
        yield usages
    finally:
        triton.JITFunction.run = run
        usages.extend(compiled.values())


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and stack bytes a thread, from the cuobjdump that triton's package carries."""
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
    """Every entry of every table, for two- and four-byte elements, with and without ``up``, whole rows and sharded."""
    import torch

    from motif_kernels.triton import poly_norm

    weight, bias = torch.ones(3), torch.ones(1)
    for dtype in (torch.bfloat16, torch.float32):
        lengths = {e["up_to"] or 1 << 20 for k in ("forward", "backward", "sums") for e in _entries(f"poly_norm_{k}")}
        for columns in sorted(length // dtype.itemsize for length in lengths):
            x = torch.empty(64, columns, dtype=dtype)
            for up in (None, x):
                fixed: dict[str, Any] = {"eps": 1e-6, "hidden_clamp": None}
                poly_norm.forward(x, up, weight, bias, inverse_rms=None, out_dtype=dtype, **fixed)
                poly_norm.backward(x, x, up, weight, bias, inverse_rms=None, mean_products=None, **fixed)
                moments = torch.empty(3, 64)
                poly_norm.power_sums(x, hidden_clamp=None)
                poly_norm.product_sums(x, x, up, hidden_clamp=None)
                fixed["hidden_clamp"] = 1000.0
                poly_norm.forward(x, up, weight, bias, inverse_rms=moments, out_dtype=dtype, **fixed)
                poly_norm.backward(x, x, up, weight, bias, inverse_rms=moments, mean_products=moments, **fixed)


def _combine() -> None:
    """Every head width and ratio that attention kernels serve, with each epilogue."""
    import torch

    from motif_kernels.triton import combine

    for dtype, ratios in ((torch.bfloat16, (1, 2, 3, 4, 7)), (torch.float32, (1, 4))):
        for width in (64, 128, 192, 256):
            for group in ratios:
                signal = torch.empty(64, 2 * group, width, dtype=dtype)
                noise, lam = torch.empty(64, 2, width, dtype=dtype), torch.ones(())
                for weight, gate in ((None, None), (torch.ones(width), None), (None, signal)):
                    fixed = {"norm_eps": 1e-5, "out_scale": 0.5}
                    combine.forward(signal, noise, lam, weight, gate, out_dtype=dtype, **fixed)
                    combine.backward(signal, signal, noise, lam, weight, gate, **fixed)


def _entries(kernel: str) -> list[dict[str, Any]]:
    from motif_kernels.tuning import tables

    return [e for table in tables().values() for e in table["kernels"].get(kernel, [])]


FAMILIES = {"poly_norm": _poly_norm, "combine": _combine}


if __name__ == "__main__":
    importlib.import_module("torch")
    with compile_only(int(sys.argv[1])) as found:
        FAMILIES[sys.argv[2]]()
    for usage in found:
        print(json.dumps(usage._asdict()))
