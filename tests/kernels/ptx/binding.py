"""From instructions to Python callables: operands become array views once, not at every step."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.ptx.program import STORAGE, Fault, Instruction, elements
from tests.kernels.ptx.shared import BASE

if TYPE_CHECKING:
    from tests.kernels.ptx.block import Block, Context

Step = Callable[[], Any]
Control = Callable[["Context"], Any]
Builder = Callable[["Binder"], Step]

# What arithmetic sees in a register, by PTX's name of the type.
TYPES = {
    "pred": np.bool_,
    **{f"{k}16": np.uint16 for k in ("b", "u", "bf")},
    **{f"{k}32": np.uint32 for k in "bu"},
    **{f"{k}64": np.uint64 for k in "bu"},
    **{"b8": np.uint8, "u8": np.uint8, "s8": np.int8},
    **{"s16": np.int16, "s32": np.int32, "s64": np.int64, "f16": np.float16, "f32": np.float32, "f64": np.float64},
}

BUILDERS: dict[str, Builder] = {}
CONTROLS: dict[str, Callable[["Binder"], Control]] = {}  # they may block, branch or begin what registers wait for


def instruction(*names: str) -> Callable[[Builder], Builder]:
    """Register how instructions of these names are bound."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def control(*names: str) -> Callable[[Callable[["Binder"], Control]], Callable[["Binder"], Control]]:
    """Register how instructions that end a straight line are bound; a name may be a prefix."""

    def register(builder: Callable[["Binder"], Control]) -> Callable[["Binder"], Control]:
        CONTROLS.update(dict.fromkeys(names, builder))
        return builder

    return register


def find(table: dict[str, Any], parts: tuple[str, ...]) -> Any:
    """The entry of the longest prefix of an opcode's parts."""
    for count in range(len(parts), 0, -1):
        if (name := ".".join(parts[:count])) in table:
            return table[name]
    return None


class Binder:
    """One instruction and the threads ``low`` to ``high`` of a block that run it."""

    def __init__(self, block: "Block", low: int, high: int, ins: Instruction) -> None:
        self.block, self.low, self.high, self.ins = block, low, high, ins
        self.count = high - low
        self.threads = block.threads[low:high]
        self.warps = slice(low // 32, high // 32)
        self.parts, self.operands = ins.parts, ins.operands

    @property
    def shape(self) -> tuple[int, int]:
        return self.count // 32, 32

    def has(self, part: str) -> bool:
        return part in self.parts

    # --- Operands ---------------------------------------------------------------------------------

    def register(self, name: str) -> np.ndarray:
        """A register's own storage."""
        kind, row = self.block.program.registers[name]
        return self.block.registers[kind][row, self.low : self.high]

    def read(self, operand: str, type: str) -> np.ndarray:
        """A source as numbers of a type; a register of another width is converted at each step only
        where ``widened`` says so.
        """
        dtype = np.dtype(TYPES[type])
        if operand in self.block.program.registers:
            storage = self.register(operand)
            if storage.dtype.itemsize < dtype.itemsize:
                raise Fault(f"a source narrower than {type}")
            if storage.dtype.itemsize > dtype.itemsize:  # the low part
                return storage.view(dtype)[:: storage.dtype.itemsize // dtype.itemsize]
            return storage.view(dtype)
        if operand in self.block.special:
            return self.block.special[operand][self.low : self.high].view(dtype)
        return self.constant(operand, dtype)

    def constant(self, operand: str, dtype: np.dtype) -> np.ndarray:
        if operand.startswith(("0f", "0F")) or operand.startswith(("0d", "0D")):
            bits = int(operand[2:], 16)
        elif operand.startswith("global_smem"):
            bits = BASE + int(operand[len("global_smem") :].replace(" ", "").lstrip("+") or 0)
        elif operand in self.block.parameters:
            bits = self.block.parameter_addresses[operand]
        else:
            bits = int(operand.rstrip("U"), 0) if operand not in ("true", "false") else operand == "true"
        if dtype == np.bool_:
            return self.block.constants(bool(bits), dtype, self.count)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return self.block.constants(int(bits) & (1 << 8 * dtype.itemsize) - 1, unsigned, self.count).view(dtype)

    def write(self, operand: str, type: str) -> np.ndarray:
        """A destination; "_" is nobody's."""
        dtype = np.dtype(TYPES[type])
        if operand == "_":
            return np.empty(self.count, dtype)
        storage = self.register(operand)
        if storage.dtype.itemsize != dtype.itemsize:
            raise Fault(f"a destination of {storage.dtype} for {type}")
        return storage.view(dtype)

    def rows(self, operand: str) -> np.ndarray:
        """The rows in the file of 32-bit registers of ``{%r1, ...}``."""
        found = [self.block.program.registers[name] for name in elements(operand)]
        assert {kind for kind, _ in found} == {"32"}
        return np.array([row for _, row in found])

    def address(self, operand: str) -> Callable[[], np.ndarray]:
        """What ``[%rd1 + 16]`` is, as int64, one a thread."""
        found = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        assert found, operand
        offset = int(found[2] or "0", 0)
        if found[1] not in self.block.program.registers:
            constant = self.constant(found[1], np.dtype(np.int64)) + offset
            return lambda: constant
        base = self.register(found[1])
        return lambda: base.astype(np.int64) + offset

    # --- Guards -----------------------------------------------------------------------------------

    def guard(self) -> Callable[[], np.ndarray] | None:
        """Which threads run this; None if all."""
        if self.ins.guard is None:
            return None
        predicate = self.register(self.ins.guard)
        if self.ins.negated:
            return lambda: ~predicate
        return lambda: predicate

    def active(self) -> Callable[[], np.ndarray]:
        """The numbers, among these threads, of those that run this."""
        guard, everyone = self.guard(), np.arange(self.count)
        if guard is None:
            return lambda: everyone
        return lambda: np.flatnonzero(guard())

    def leaders(self) -> Callable[[], np.ndarray]:
        """The threads of the block that run this."""
        active, low = self.active(), self.low
        return lambda: active() + low

    def assign(self, destination: np.ndarray, value: Callable[[], Any]) -> Step:
        """Write where the guard allows."""
        guard = self.guard()
        if guard is None:
            return lambda: np.copyto(destination, value(), casting="unsafe")
        return lambda: np.copyto(destination, value(), where=guard(), casting="unsafe")

    def elementwise(self, ufunc: np.ufunc, types: list[str], result: str) -> Step:
        """A NumPy function of the sources, straight into the destination."""
        sources = [self.read(o, t) for o, t in zip(self.operands[1:], types, strict=True)]
        destination = self.write(self.operands[0], result)
        if self.ins.guard is not None:
            guard = self.guard()
            return lambda: ufunc(*sources, out=destination, where=guard())
        if len(sources) == 1:
            (a,) = sources
            return lambda: ufunc(a, destination)
        a, b = sources
        return lambda: ufunc(a, b, destination)


def registers(program_registers: dict[str, tuple[str, int]], threads: int) -> dict[str, np.ndarray]:
    """The register file: for each storage class, (registers, threads)."""
    counts = dict.fromkeys(STORAGE, 0)
    for kind, row in program_registers.values():
        counts[kind] = max(counts[kind], row + 1)
    return {kind: np.zeros((counts[kind], threads), STORAGE[kind]) for kind in STORAGE}
