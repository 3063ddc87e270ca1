"""The machine code of a compiled kernel: its innermost loops, and what an iteration of each does.

nvdisasm, which triton brings, turns a cubin into text. A loop is what lies between a label and a
branch back to it; an innermost loop has no other inside. What a kernel does once stands outside of
all loops, what it does once a head or a tile in an outer loop.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_LABEL = re.compile(r"\s*\.(L_x_\d+):")
_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\S+\s+)?([A-Z][A-Z0-9_.a-z]+)\s*([^;]*);")
_WARPGROUP_MMA = re.compile(r"HGMMA\.(?:SP\.)?64x(\d+)x16")
_FROM_SHARED = re.compile(r"\S+, gdesc")
_TARGET = re.compile(r"`?\(?\.(L_x_\d+)")


class Instruction(NamedTuple):
    """One line of SASS."""

    opcode: str
    """With its modifiers: "HGMMA.64x128x16.F32.BF16"."""
    operands: str
    guard: str = ""
    """The predicate, as in "@!P2"."""


@dataclass(frozen=True)
class Code:
    """A function's instructions in order, and the instruction that each label stands before."""

    instructions: Sequence[Instruction]
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) of what lies between a label and a branch back to it."""
        found = []
        for last, (opcode, operands, _) in enumerate(self.instructions):
            target = _TARGET.search(operands) if opcode.startswith(("BRA", "BRX")) else None
            if target and self.labels.get(target[1], last + 1) <= last:
                found.append((self.labels[target[1]], last))
        return found

    def innermost_loops(self) -> list[tuple[int, int]]:
        """Those with no other inside; a branch to itself, where code ends, is none."""
        loops = [(a, b) for a, b in self.loops() if b > a]
        return [(a, b) for a, b in loops if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in loops)]


def disassemble(cubin: bytes) -> dict[str, Code]:
    """The functions of a cubin by (mangled) name, in order.

    Raises:
        RuntimeError: nvdisasm cannot read it.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm cannot read this cubin: {done.stderr.strip()}")
    return parse(done.stdout.splitlines())


def parse(lines: Iterable[str]) -> dict[str, Code]:
    """The functions in nvdisasm's text by name, in order."""
    functions: dict[str, Code] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if section := _SECTION.match(line):
            instructions, labels = [], {}
            functions[section[1]] = Code(instructions, labels)
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[2], found[3].strip(), (found[1] or "").strip()))
    return functions


# --- What an iteration does -----------------------------------------------------------------------

# Opcode (its start) -> the name under which it is counted; the first that fits.
_COUNTED = {
    "HMMA": "hmma",
    "UTCHMMA": "tcgen05",
    "UTCQMMA": "tcgen05",
    "MUFU": "mufu",
    "LDSM": "ldsm",
    "STSM": "stsm",
    "LDS": "lds",
    "STS": "sts",
    "LDL": "ldl",
    "STL": "stl",
    "LDGSTS": "cp_async",
    "LDGDEPBAR": "copy_groups",
    "LDG": "ldg",
    "STG": "stg",
    "UTMALDG": "tma_load",
    "UTMASTG": "tma_store",
    "UBLKCP": "tma_load",
    "UBLKRED": "tma_store",
    "UTMAREDG": "tma_store",
    "RED": "atomics",
    "ATOM": "atomics",
    "BAR": "barriers",
    "SYNCS": "mbarrier",
    "DEPBAR": "async_waits",
    "WARPGROUP.DEPBAR": "mma_waits",
    "MEMBAR": "fences",
    "FENCE": "fences",
    "SHFL": "shuffles",
}


class Mma(NamedTuple):
    """The shape of a warpgroup's MMA, 64 x n x 16."""

    n: int
    from_registers: bool
    """The first factor; the other is in shared memory."""

    def __str__(self) -> str:
        return f"64x{self.n}x16 {'RS' if self.from_registers else 'SS'}"

    @classmethod
    def parse(cls, text: str) -> "Mma":
        """What str() gave."""
        shape, source = text.split()
        return cls(int(shape.split("x")[1]), source == "RS")


@dataclass(frozen=True)
class Loop:
    """What one warp does in an iteration; of a loop around others, in its own instructions."""

    instructions: int
    mma: dict[Mma, int]
    """How often each shape is issued, by a warpgroup together."""
    counts: dict[str, int]
    """By kind of instruction, see _COUNTED; what does not occur is left out."""
    shared_words: int
    """Transactions of 32 words with shared memory: 4 for an LDSM or a 128-bit access."""
    under_mma: int
    """Instructions issued while an MMA of the same warpgroup runs: from its issue to its wait."""
    loads: tuple[int, ...]
    """Where, as a number of instructions before the next iteration's first wait, tiles are asked
    for from global memory without waiting (cp.async, TMA); each group of copies once.
    """
    synchronous_loads: int
    """Groups of loads of tiles to registers, parted by barriers: each is waited for."""
    parent: int | None = None
    """Which of the kernel's outer loops it is in."""

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)

    def __str__(self) -> str:
        products = " ".join(f"{n}*{shape}" for shape, n in self.mma.items())
        return f"{self.instructions}: {products} " + " ".join(f"{name} {n}" for name, n in self.counts.items())

    @property
    def signature(self) -> tuple[tuple[Mma, int], ...]:
        """Loops that do the same work, with a mask or without, have the same."""
        return (*sorted(self.mma.items()), (Mma(0, False), self["hmma"]))

    def as_json(self) -> dict[str, Any]:
        """Plain values; :meth:`parse` reads them."""
        return dataclasses.asdict(self) | {"mma": {str(shape): n for shape, n in self.mma.items()}}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Loop":
        """What :meth:`as_json` gave."""
        mma = {Mma.parse(shape): n for shape, n in values["mma"].items()}
        return cls(**{**values, "mma": mma, "loads": tuple(values["loads"])})


def count(instructions: Sequence[Instruction], parent: int | None = None) -> Loop:
    """What an iteration over these instructions does."""
    mma: Counter[Mma] = Counter()
    counts: Counter[str] = Counter()
    words = 0
    for opcode, operands, guard in instructions:
        if shape := _WARPGROUP_MMA.match(opcode):
            mma[Mma(int(shape[1]), not _FROM_SHARED.match(operands))] += 1
            continue
        name = _kind(opcode)
        if name:
            counts[name] += 1
        if name in ("ldsm", "stsm"):
            words += 4
        elif name in ("lds", "sts") and guard != "@!PT":  # never executed: what ptxas leaves between others
            words += 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    under = _under_mma(instructions)
    return Loop(len(instructions), dict(mma), dict(counts), words, under, *_loads(instructions), parent)


def _kind(opcode: str) -> str | None:
    return next((name for start, name in _COUNTED.items() if opcode.startswith(start)), None)


def _under_mma(instructions: Sequence[Instruction]) -> int:
    open_group, groups, found = False, 0, 0
    for iteration in range(2):  # the first fills the pipeline
        for opcode, operands, _ in instructions:
            if opcode.startswith("HGMMA"):
                open_group = "gsb0" not in operands
                groups += not open_group
                continue
            if opcode.startswith("WARPGROUP.DEPBAR"):
                groups = min(groups, int(operands.rsplit(",", 1)[1], 16))
            found += iteration and (open_group or groups > 0)
    return found


def _loads(instructions: Sequence[Instruction]) -> tuple[tuple[int, ...], int]:
    kinds = [_kind(opcode) for opcode, _, _ in instructions]
    waits = [i for i, kind in enumerate(kinds) if kind in ("async_waits", "mbarrier")]
    asynchronous: list[int] = []
    synchronous, waited, asked = 0, False, False
    for i, kind in enumerate(kinds):
        if kind in ("cp_async", "tma_load"):
            if not asked and waits:
                asynchronous.append(len(kinds) - i + waits[0])
            asked = True
        if kind == "copy_groups":  # a group of copies is complete
            asked = False
        if kind == "ldg" and not waited and re.search(r"\.(64|128)\b", instructions[i].opcode):
            synchronous, waited = synchronous + 1, True
        if kind == "barriers":
            waited = False
    return tuple(asynchronous), synchronous


class Structure(NamedTuple):
    """A kernel's loops."""

    loops: list[Loop]
    """The innermost ones, in order."""
    outer: list[Loop]
    """Those directly around them, without what is in them."""
    once: int
    """Instructions in no loop."""


def structure(code: Code, least: int = 8) -> Structure:
    """Take a kernel apart; loops of fewer instructions than ``least`` do not count."""
    inner = [(a, b) for a, b in code.innermost_loops() if b + 1 - a >= least]
    inside = {i for a, b in inner for i in range(a, b + 1)}
    parents: list[tuple[int, int]] = []
    loops = []
    for a, b in inner:
        around = [(c, d) for c, d in code.loops() if c <= a and b <= d and (c, d) != (a, b)]
        parent = min(around, key=lambda span: span[1] - span[0], default=None)
        if parent and parent not in parents:
            parents.append(parent)
        index = parents.index(parent) if parent else None
        loops.append(count(code.instructions[a : b + 1], index))
    own = [[x for i, x in enumerate(code.instructions[a : b + 1], a) if i not in inside] for a, b in parents]
    covered = inside | {i for a, b in parents for i in range(a, b + 1)}
    return Structure(loops, [count(x) for x in own], len(code.instructions) - len(covered))
