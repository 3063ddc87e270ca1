"""Kernels on their way to a launch: looked at, or only compiled, for any GPU."""

import contextlib
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import lints
from benchmarks.lib.sass import disassemble, structure

SHARED_MEMORY = 227 * 1024  # bytes a block may use, on all of these
TENSOR_MEMORY = 512  # columns, on Blackwell
GPUS = {90: "NVIDIA H100 80GB HBM3", 100: "NVIDIA B200", 103: "NVIDIA B300 SXM6 AC"}


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


_labels: dict[str, Any] = {}


@contextlib.contextmanager
def labelled(**labels: Any) -> Iterator[None]:
    """Within, kernels that are compiled by :func:`compile_only` are listed with these labels."""
    _labels.update(labels)
    try:
        yield
    finally:
        for name in labels:
            del _labels[name]


@contextlib.contextmanager
def compile_only(
    arch: int, *, gluon: bool = False, read: bool = True, gpu: str | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Within, launching a kernel only compiles it for sm_<arch>; what each needs is in the list
    afterwards.

    Args:
        arch: 90, 100 or 103.
        gluon: the Gluon kernels serve what they can on this GPU, else the Triton kernels do.
        read: read what each needs; if not, only that it is there.
        gpu: the name whose launch tables serve; default one of :data:`GPUS`.

    Triton asks its driver which GPU to compile for; here the answer is made up. So the code under
    test chooses its own configuration, from CPU tensors, and what is compiled is what users run.
    What needs more than the GPU has raises Triton's OutOfResources, as it would there.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.errors import OutOfResources

    from motif_kernels import tuning
    from motif_kernels.impl import gluon as gluon_kernels
    from motif_kernels.impl import triton as triton_kernels
    from motif_kernels.impl.gluon import availability

    # All kernels are defined before what follows.
    for package in (triton_kernels, *([gluon_kernels] if availability.interface_is_present() else [])):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)

    class Driver:
        def get_current_device(self) -> int:
            return arch  # Triton keeps compiled kernels apart by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    compiled: dict[str, dict[str, Any]] = {}
    table, runs_on = tuning._table, availability.runs_on
    availability.runs_on = lambda device: gluon and arch == 90  # type: ignore[assignment]  # a stand-in without its cache
    tuning._table = lambda device: tuning.merged_table(gpu or GPUS[arch])  # type: ignore[assignment]  # a stand-in without its cache

    def warm_up(launch: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(*args, grid=grid, warmup=True, **kwargs)
        if kernel.metadata.shared > SHARED_MEMORY:
            raise OutOfResources(kernel.metadata.shared, SHARED_MEMORY, "shared memory")
        if (kernel.metadata.tmem_size or 0) > TENSOR_MEMORY:
            raise OutOfResources(kernel.metadata.tmem_size, TENSOR_MEMORY, "tensor memory")
        if not read:
            compiled.setdefault(kernel.hash, {})
        elif kernel.hash not in compiled:
            function = launch.__self__.fn
            name = f"{function.__module__.removeprefix('motif_kernels.impl.')}.{function.__name__}"
            constants = {k: v for k, v in kwargs.items() if isinstance(v, int | float | bool | str)}
            needs = usage(kernel)
            found = {} if "attention_" not in name else {"lints": lints.lints(name, needs, kernel.asm["ttgir"])}
            own = {"kernel": name, "arch": arch, "constants": constants, "lints": [], "triton": triton.__version__}
            compiled[kernel.hash] = own | _labels | needs | found
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
        tuning._table, triton.knobs.runtime.interpret, availability.runs_on = table, False, runs_on
        usages.extend(compiled.values())


def usage(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel needs of a GPU, and what its loops do.

    Returns:
        registers and stack bytes a thread; shared memory bytes, tensor memory columns, threads and
        bytes of global scratch a block; warps that work in step, streams of them that run apart
        (the consumers of a warp-specialised kernel) and stages of loads; loops, outer and once as
        in :class:`benchmarks.lib.sass.Structure`.
    """
    registers, stack = _resource_usage(kernel.asm["cubin"])
    found = max(map(structure, disassemble(kernel.asm["cubin"]).values()), key=lambda s: s.once)
    code, metadata = kernel.asm["ttgir"], kernel.metadata
    regions = re.split(r"\n\s+(?:default \{|partition\d+\()", code)
    warps = re.search(r'"ttg.num-warps" = (\d+)', code)
    return {
        "registers": registers,
        "stack": stack,
        "shared": metadata.shared,
        "tensor_memory": metadata.tmem_size,
        "global_scratch": metadata.global_scratch_size,
        "fp_fusion": metadata.enable_fp_fusion,
        "threads": 32 * metadata.num_warps,
        "warps": int(warps[1]) if warps else metadata.num_warps,
        "streams": max(1, sum("warp_group_dot" in region for region in regions[1:])),
        "stages": metadata.num_stages,
        "loops": [loop.as_json() for loop in found.loops],
        "outer": [loop.as_json() for loop in found.outer],
        "once": found.once,
    }


def executed_spills(kernel: Any) -> int:
    """Instructions that spill registers where it costs: in the innermost loops with products, or,
    in a kernel without any, anywhere.
    """
    functions = disassemble(kernel.asm["cubin"]).values()
    loops = [loop for code in functions for loop in structure(code).loops]
    walks = [loop for loop in loops if loop.mma or loop["hmma"] or loop["tcgen05"]]
    if walks:
        return sum(loop["ldl"] + loop["stl"] for loop in walks)
    return sum(x.opcode.startswith(("LDL", "STL")) for code in functions for x in code.instructions)


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
