"""The project's own launches, run by the emulator on CPU tensors."""

import contextlib
import importlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.lib.compiling import compile_only, launches_through
from tests.kernels.ptx import accesses, arithmetic, control, copies, tensor_cores  # noqa: F401  they register instructions
from tests.kernels.ptx.block import Block
from tests.kernels.ptx.copies import Tensormap
from tests.kernels.ptx.memory import Memory
from tests.kernels.ptx.ordering import Time
from tests.kernels.ptx.program import Fault, Program, parse

ORDERED = ("_backward_kernel",)
"""Kernels that add floats to global memory in an order that is the same in every run."""


@dataclass
class Launch:
    """A launch that was emulated.

    Args:
        steps: instructions that contexts of warps ran.
        reached: which of the program's instructions were.
        completed: how many threads' cp.async each wait has completed.
        unfinished: how many were not waited for when their programs ended: nobody has touched what
            they write.
    """

    kernel: str
    grid: tuple[int, ...]
    steps: int
    reached: frozenset[int] = field(repr=False)
    completed: Counter[int] = field(repr=False)
    unfinished: int
    seconds: float = 0.0


@contextlib.contextmanager
def emulated(
    arch: int = 90, *, gluon: bool = False, run: "Callable[..., Launch] | None" = None, verbose: bool = False
) -> Iterator[list[Launch]]:
    """Within, Triton kernels compile for sm_<arch> and run on CPU tensors.

    Args:
        arch: the GPU's compute capability without its dot.
        gluon: the Gluon kernels serve what they can, else the Triton kernels do.
        run: what runs a launch instead of :func:`execute`, with its arguments.
        verbose: print each launch.

    Returns:
        The launches, in order.

    Raises:
        Fault: what a GPU would answer with wrong numbers, an error or a hang.
    """
    programs: dict[str, Program] = {}
    launches: list[Launch] = []

    def launch_kernel(launch: Callable[..., Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(*args, grid=grid, warmup=True, **kwargs)
        function = launch.__self__  # type: ignore[attr-defined]
        named = dict(zip(function.arg_names, args, strict=False)) | kwargs
        dimensions = tuple(grid(named)) if callable(grid) else tuple(grid)
        dimensions += (1,) * (3 - len(dimensions))
        if kernel.hash not in programs:
            programs[kernel.hash] = parse(kernel.asm["ptx"])
        arguments = [(n, named[n]) for n in function.arg_names if kernel.src.signature.get(n) != "constexpr"]
        begun = time.perf_counter()
        launches.append((run or execute)(programs[kernel.hash], kernel.metadata, arguments, dimensions))
        launches[-1].seconds = time.perf_counter() - begun
        if verbose:
            print(f"  {launches[-1]}", flush=True)
        return kernel

    with compile_only(arch, gluon=gluon), launches_through(launch_kernel), _triton_operators():
        yield launches


@contextlib.contextmanager
def _triton_operators() -> Iterator[None]:
    """Within, the Triton implementation serves operators that have another one for CPU tensors."""
    families = "poly_norm", "grouped_poly_norm", "combine", "hyper_connections", "routing", "expert_rows"
    modules = {family: importlib.import_module(f"motif_kernels.ops.{family}") for family in families}
    before = {family: module.implementation for family, module in modules.items()}
    for module in modules.values():
        module.implementation = lambda family, device: importlib.import_module(f"motif_kernels.impl.triton.{family}")
    try:
        yield
    finally:
        for family, module in modules.items():
            module.implementation = before[family]


def execute(program: Program, metadata: Any, arguments: list[tuple[str, Any]], grid: tuple[int, ...]) -> Launch:
    """Run a grid; tensors among the arguments are read and written."""
    storages: dict[int, tuple[str, torch.UntypedStorage]] = {}
    for name, value in arguments:
        tensor = value if isinstance(value, torch.Tensor) else getattr(value, "base", None)
        if tensor is not None:
            storages.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor.untyped_storage()))
    raw = [torch.tensor([], dtype=torch.uint8).set_(storage).numpy() for _, storage in storages.values()]
    sizes, called = [r.nbytes for r in raw], [name for name, _ in storages.values()]
    memory = Memory(sizes, called, program.narrowest("global"), Time(), ordered=program.name in ORDERED)
    for i, content in enumerate(raw):
        memory.bytes_of(i)[:] = content
    allocation = {pointer: i for i, pointer in enumerate(storages)}
    values = _values(metadata, arguments, memory, allocation)
    names = [p.name for p in program.parameters]
    values += [0] * (len(names) - len(values))  # scratch memory that none of these kernels asks for
    parameters = dict(zip(names, values, strict=True))
    launch = run_grid(program, memory, 32 * metadata.num_warps, metadata.shared, parameters, grid)
    for i, content in enumerate(raw):
        content[:] = memory.bytes_of(i)
    return launch


def _values(metadata: Any, arguments: list[tuple[str, Any]], memory: Memory, allocation: dict[int, int]) -> list[Any]:
    """What the launcher passes: bits, and tensor maps, which shapes and strides follow."""
    values: list[Any] = []
    described = iter(metadata.tensordesc_meta or ())
    for _, value in arguments:
        if isinstance(value, torch.Tensor):
            start = memory.address(allocation[value.untyped_storage().data_ptr()])
            values.append(start + value.storage_offset() * value.element_size())
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            values += _describe(value, next(described), allocation)
        elif isinstance(value, float):
            values.append(int(np.float32(value).view(np.uint32)))
        else:
            values.append(int(value) & (1 << 64) - 1)
    return values


def _describe(descriptor: Any, meta: dict[str, Any], allocation: dict[int, int]) -> list[Any]:
    base, size = descriptor.base, descriptor.base.element_size()
    tensormap = Tensormap(
        allocation=allocation[base.untyped_storage().data_ptr()],
        offset=base.storage_offset() * size,
        shape=tuple(reversed(descriptor.shape)),
        strides=tuple(size * s for s in reversed(descriptor.strides)),
        box=tuple(reversed(meta["block_size"])),
        element=size,
        swizzle=16 << meta["swizzle"],
        fill_nan=descriptor.padding == "nan",
    )
    if base.data_ptr() % 16 or any(s % 16 for s in tensormap.strides[1:]) or tensormap.strides[0] != size:
        raise Fault("a tensor descriptor needs 16-byte aligned rows and a contiguous last dimension")
    if max(tensormap.box) > 256 or tensormap.box[0] * size > max(
        tensormap.swizzle, 256 if tensormap.swizzle == 16 else 0
    ):
        raise Fault(f"a tensor descriptor's box of {meta['block_size']} is too large")
    return [tensormap, *descriptor.shape, *descriptor.strides]


def run_grid(
    program: Program, memory: Memory, threads: int, shared: int, parameters: dict[str, Any], grid: tuple[int, ...]
) -> Launch:
    """One program after the other; those that wait for others take turns with later ones."""
    idle: list[Block] = []
    waiting: list[Block] = []
    fresh = ((x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(grid))))
    for index in itertools.count():
        seen = memory.version
        for block in list(waiting):
            if _run(block):
                waiting.remove(block)
                idle.append(block)
        program_id = next(fresh, None)
        if program_id is not None:
            block = idle.pop() if idle else Block(program, memory, threads, shared, parameters, grid)
            block.start(index, program_id)
            (idle if _run(block) else waiting).append(block)
        elif not waiting:
            break
        elif memory.version == seen:
            raise Fault("deadlock: " + "; ".join(f"program {b.program_id}: {s}" for b in waiting for s in b.states()))
    reached = (range(line[2], block.lines[line].end + 1) for block in idle for line in block.lines)
    return Launch(
        program.name,
        grid,
        sum(b.steps for b in idle),
        frozenset(itertools.chain(*reached)),
        sum((b.completed for b in idle), Counter()),
        sum(b.unfinished for b in idle),
    )


def _run(block: Block) -> bool:
    try:
        with np.errstate(all="ignore"):
            return block.run()
    except Exception as error:
        notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
        message = f"{error}{notes} [{block.program.name}, program {block.program_id}, {block.where()}]"
        if isinstance(error, Fault | NotImplementedError):
            raise type(error)(message) from error
        error.add_note(message)
        raise
