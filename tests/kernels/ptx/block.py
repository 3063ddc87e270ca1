"""A block of threads: contexts of warps with one program counter each, and who runs next.

A context is a range of warps. A branch that some of its warps take splits it; contexts that leave a
barrier at the same place become one again. Threads of one warp never part: a branch inside of a
warp is a fault.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tests.kernels.ptx.binding import BUILDERS, CONTROLS, Binder, find, registers
from tests.kernels.ptx.memory import Memory
from tests.kernels.ptx.ordering import Clocks, Snapshot
from tests.kernels.ptx.program import Fault, Instruction, Program
from tests.kernels.ptx.shared import Shared
from tests.kernels.ptx.swizzle import Operands

LIMIT = 20_000_000  # instructions of a block
PARAMETERS = 1 << 50  # where parameters lie that are taken by their address


@dataclass
class Mbarrier:
    """An mbarrier in shared memory."""

    number: int
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    arriving: Snapshot | None = None  # of the phase under way
    completed: Snapshot | None = None


@dataclass
class NamedBarrier:
    """One of a block's sixteen barriers."""

    expected: int
    arrived: int = 0
    snapshot: Snapshot | None = None
    waiting: list["Context"] = field(default_factory=list)


@dataclass
class Line:
    """Instructions in a row, the last of which may be a control."""

    steps: list[Callable[[], Any]]
    control: Callable[["Context"], Any] | None
    end: int
    registers: frozenset[str]
    written: frozenset[str]


@dataclass(eq=False)
class Context:
    """Warps that run together.

    ``results`` are registers that an unfinished wgmma writes, ``sources`` those that it reads.
    ``ready`` says whether what blocks it is over; None: it is not blocked. ``why`` is for faults.
    """

    block: "Block"
    low: int
    high: int
    pc: int = 0
    ready: Callable[[], bool] | None = None
    why: str = ""
    copies: list[Any] = field(default_factory=list)  # cp.async not committed
    copy_groups: list[list[Any]] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)  # wgmma not committed
    product_groups: list[list[Any]] = field(default_factory=list)
    stores: list[Any] = field(default_factory=list)  # bulk stores not committed
    store_groups: list[list[Any]] = field(default_factory=list)
    results: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    unfenced: set[str] | None = None  # registers used since the last wgmma.fence; None: there was none
    polled: dict[int, Any] = field(default_factory=dict)  # what it last read where it waits for other blocks

    @property
    def warps(self) -> slice:
        return slice(self.low // 32, self.high // 32)

    def busy(self) -> bool:
        return bool(
            self.copies or self.copy_groups or self.products or self.product_groups or self.stores or self.store_groups
        )

    def run(self) -> None:
        """Until it ends, is blocked, or has been split."""
        block = self.block
        while self.ready is None and self in block.contexts:
            line = block.line(self.low, self.high, self.pc)
            if self.results and not self.results.isdisjoint(line.registers):
                self._find(
                    line, lambda i: self.results & i.registers, "is the accumulator of a wgmma that was not waited for"
                )
            if self.sources and not self.sources.isdisjoint(line.written):
                self._find(line, lambda i: self.sources & i.written, "is read by a wgmma that was not waited for")
            first = self.pc
            for at, step in enumerate(line.steps, first):
                self.pc = at  # for a fault
                step()
            block.steps += len(line.steps) + 1
            if self.unfenced is not None:
                self.unfenced |= line.registers
            self.pc = line.end
            if line.control:
                line.control(self)
            if block.steps > LIMIT:
                raise Fault("does not end")

    def _find(self, line: Line, touched: Callable[[Instruction], frozenset[str]], what: str) -> None:
        for at in range(self.pc, line.end + 1):
            one = self.block.program.instructions[at]
            if one.parts[0] != "wgmma" and (found := touched(one)):
                self.pc = at
                raise Fault(f"{min(found)} {what}")

    def split(self, of_warp: np.ndarray) -> None:
        """Into ranges of warps with the same value."""
        block = self.block
        cuts = [0, *(np.flatnonzero(np.diff(of_warp)) + 1).tolist(), len(of_warp)]
        if len(cuts) == 2:
            raise Fault("nothing to split")
        block.contexts.remove(self)
        for first, last in pairwise(cuts):
            part = Context(block, self.low + 32 * first, self.low + 32 * last, self.pc)
            part.results, part.sources = self.results, self.sources
            part.unfenced = None if self.unfenced is None else set(self.unfenced)
            for name in ("copies", "products", "stores"):
                setattr(part, name, [piece for item in getattr(self, name) if (piece := item.part(part))])
            for name in ("copy_groups", "product_groups", "store_groups"):
                groups = [[piece for item in g if (piece := item.part(part))] for g in getattr(self, name)]
                setattr(part, name, groups)
            block.contexts.append(part)
        block.contexts.sort(key=lambda c: c.low)


class Block:
    """A block that runs programs of a grid, one after the other.

    Args:
        shared: bytes of shared memory.
        parameters: the value of each parameter by name: bits, or what a tensormap describes.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        threads: int,
        shared: int,
        parameters: dict[str, Any],
        grid: tuple[int, ...],
    ) -> None:
        self.program, self.memory, self.parameters, self.grid = program, memory, parameters, grid
        self.threads = np.arange(threads)
        self.shared = Shared(shared, program.narrowest("shared"), threads // 32)
        self.registers = registers(program.registers, threads)
        self.parameter_addresses = {name: PARAMETERS + 256 * i for i, name in enumerate(parameters)}
        tid = np.arange(threads, dtype=np.uint32)
        fixed = dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), grid, strict=True))
        fixed |= {"%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}
        fixed |= {f"%ctaid.{axis}": 0 for axis in "xyz"} | {"%nwarpid": threads // 32}
        fixed |= {"%clusterid.x": 0, "%cluster_ctarank": 0, "%cluster_ctaid.x": 0, "%smid": 0}
        self.special = {name: np.full(threads, value, np.uint32) for name, value in fixed.items()}
        self.special |= {"%tid.x": tid, "%laneid": tid % 32, "%warpid": tid // 32}
        self.operands = Operands(self.shared)
        self.lines: dict[tuple[int, int, int], Line] = {}
        self._constants: dict[tuple[int, str, int], np.ndarray] = {}
        self.steps = self.unfinished = 0
        self.completed: Counter[int] = Counter()

    def start(self, index: int, program_id: tuple[int, ...]) -> None:
        """Begin a program of the grid."""
        self.index, self.program_id = index, program_id
        for axis, value in zip("xyz", program_id, strict=True):
            self.special[f"%ctaid.{axis}"][:] = value
        for kind, file in self.registers.items():
            file[:] = True if kind == "pred" else np.iinfo(file.dtype).max  # NaN, or far away
        self.clocks = Clocks(index, len(self.threads) // 32, self.memory.time)
        self.shared.reset(self.clocks)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.numbers: dict[int, int] = {}  # of mbarriers by address
        self.barriers: dict[int, NamedBarrier] = {}
        self.exited = 0
        self.contexts = [Context(self, 0, len(self.threads))]

    def run(self) -> bool:
        """Whether it has ended; if not, it waits for other programs of the grid."""
        while self.contexts:
            progress = False
            for context in list(self.contexts):
                if context not in self.contexts:
                    continue  # it has become part of another
                if context.ready is not None and context.ready():
                    context.ready = None
                if context.ready is None:
                    progress = True
                    self.current = context
                    context.run()
            if not progress:
                if any(c.why == "another program" for c in self.contexts):
                    return False
                raise Fault("deadlock: " + "; ".join(self.states()))
        return True

    def states(self) -> list[str]:
        """What each context waits for."""
        return [
            f"warps {c.low // 32} to {c.high // 32 - 1} wait for {c.why} at {self.program.instructions[c.pc].text}"
            for c in self.contexts
        ]

    def where(self) -> str:
        """The instruction under way, for faults."""
        context = self.current
        at = min(context.pc, len(self.program.instructions) - 1)
        return f"warps {context.low // 32} to {context.high // 32 - 1}, {self.program.instructions[at].text[:200]}"

    def line(self, low: int, high: int, pc: int) -> Line:
        """The straight line from an instruction, bound to a range of threads."""
        key = low, high, pc
        if key not in self.lines:
            steps: list[Callable[[], Any]] = []
            last: Callable[[Context], Any] | None = None
            at = pc
            names: list[frozenset[str]] = []
            written: list[frozenset[str]] = []
            while at < len(self.program.instructions):
                ins = self.program.instructions[at]
                binder = Binder(self, low, high, ins)
                builder = find(CONTROLS, ins.parts)
                try:
                    if builder:
                        last = builder(binder)
                    else:
                        builder = find(BUILDERS, ins.parts)
                        if builder is None:
                            raise NotImplementedError(ins.opcode)
                        steps.append(builder(binder))
                except Exception as error:
                    error.add_note(f"binding {ins.text}")
                    raise
                if ins.parts[0] != "wgmma":
                    names.append(ins.registers)
                    written.append(ins.written)
                if last:
                    break
                at += 1
            everything = frozenset().union(*names)
            self.lines[key] = Line(steps, last, at, everything, frozenset().union(*written))
        return self.lines[key]

    def constants(self, bits: int, dtype: np.dtype, count: int) -> np.ndarray:
        key = bits, dtype.str, count
        if key not in self._constants:
            self._constants[key] = np.full(count, bits, dtype)
            self._constants[key].flags.writeable = False
        return self._constants[key]
