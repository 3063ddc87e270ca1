"""Kernels on their way to a launch: looked at, or only compiled, for any GPU."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GPUS = {90: "NVIDIA H100 80GB HBM3", 100: "NVIDIA B200"}


@contextlib.contextmanager
def launches_through(run: Callable[..., Any]) -> Iterator[None]:
    """Within, Triton's compiled launches go through ``run(launch, *args, **kwargs)``."""
    import triton

    original = triton.JITFunction.run
    triton.JITFunction.run = lambda self, *args, **kwargs: run(original.__get__(self), *args, **kwargs)
    try:
        yield
    finally:
        triton.JITFunction.run = original


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[dict[str, Any]]]:
    """Within, launching a kernel only compiles it for sm_<arch>; what each needs is in the list
    afterwards.

    Triton asks its driver which GPU to compile for; here the answer is made up. So the code under
    test chooses its own configuration, from CPU tensors, and what is compiled is what users run.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from motif_kernels import tuning
    from motif_kernels.impl.triton import (  # noqa: F401  before what follows
        cache_append,
        combine,
        decoding,
        diff_attention,
        poly_norm,
    )

    class Driver:
        def get_current_device(self) -> int:
            return arch  # Triton keeps compiled kernels apart by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    compiled: dict[str, dict[str, Any]] = {}
    table = tuning._table
    tuning._table = lambda device: tuning.merged_table(GPUS[arch])  # type: ignore[assignment]  # a stand-in without its cache

    def warm_up(launch: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(*args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            registers, stack = _resource_usage(kernel.asm["cubin"])
            function = launch.__self__.fn
            compiled[kernel.hash] = {
                "kernel": f"{function.__module__.rpartition('.')[2]}.{function.__name__}",
                "arch": arch,
                "registers": registers,
                "stack": stack,
                "shared": kernel.metadata.shared,
                "tensor_memory": kernel.metadata.tmem_size,
                "constants": {k: v for k, v in kwargs.items() if isinstance(v, int | float | bool | str)},
            }
        return kernel

    driver.set_active(Driver())
    # The public functions take CPU tensors to these kernels where they are interpreted. Those here
    # were defined to be compiled.
    triton.knobs.runtime.interpret = True
    usages: list[dict[str, Any]] = []
    try:
        with launches_through(warm_up):
            yield usages
    finally:
        tuning._table, triton.knobs.runtime.interpret = table, False
        usages.extend(compiled.values())


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, from triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2])
