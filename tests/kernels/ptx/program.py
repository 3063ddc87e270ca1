"""PTX, parsed: one entry's instructions, labels, parameters and registers."""

import re
from dataclasses import dataclass, field, replace

import numpy as np

# The storage of a register by its declared type.
STORAGE = {"pred": np.bool_, "16": np.uint16, "32": np.uint32, "64": np.uint64}


class Fault(Exception):
    """What a GPU would answer with wrong numbers, an error or a hang."""


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: its name and its type, "tensormap" for one of 128 bytes."""

    name: str
    type: str


@dataclass
class Instruction:
    """One instruction; ``registers`` are all that it names, ``written`` those it may write."""

    text: str
    opcode: str
    operands: list[str]
    guard: str | None = None
    negated: bool = False
    registers: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    parts: tuple[str, ...] = field(init=False)
    acted: bool = field(default=False, init=False)  # set by those whose guard let a thread pass

    def __post_init__(self) -> None:
        self.parts = tuple(self.opcode.replace("::", ".").split("."))

    @property
    def type(self) -> str:
        return self.parts[-1]


@dataclass
class Program:
    """An entry; ``registers`` maps a name to its storage and its row there."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    parameters: list[Parameter]
    registers: dict[str, tuple[str, int]]

    def without(self, index: int) -> "Program":
        """With an instruction left out; of a wait that gives a predicate, the answer is yes."""
        instructions = list(self.instructions)
        lost = instructions[index]
        if lost.parts[:2] == ("mbarrier", "try_wait"):
            done = lost.operands[0]
            instructions[index] = Instruction("mov.pred", "mov.pred", [done, "-1"], None, False, frozenset([done]))
        else:
            instructions[index] = Instruction("nothing", "nanosleep", [])
        return replace(self, instructions=instructions)

    def narrowest(self, space: str) -> int:
        """Bytes of the narrowest plain store to shared or to global memory; at most 4."""
        types = (i.type for i in self.instructions if i.parts[0] in ("st", "red", "atom") and space in i.parts)
        return min((int(t.lstrip("bfusx")[:2].rstrip("x")) // 8 for t in types), default=4) if space else 4


_SPACE = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)+", re.S)
_DIRECTIVE = re.compile(r"\.(?:loc|file|section)[^\n]*\n|\.[^;\n]*[;\n]")
_LABEL = re.compile(r"([$\w]+):(?!:)")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*([^;]*);", re.S)
_NAME = re.compile(r"%[A-Za-z_][\w$.]*|(?<![\w$.%])[A-Za-z_][\w$]*")
_WRITES_NOTHING = {
    "st",
    "red",
    "bar",
    "barrier",
    "cp",
    "mbarrier",
    "fence",
    "bra",
    "brx",
    "ret",
    "exit",
    "prefetch",
    "wgmma",
}


def operands(text: str) -> list[str]:
    """Split at the commas outside brackets and braces."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def elements(operand: str) -> list[str]:
    """The parts of ``{a, b}``, or of ``a``."""
    return [part.strip() for part in operand.strip("{} \n").split(",")]


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.scopes: list[tuple[int, dict[str, str]]] = []  # inner braces: names that are theirs alone
        self.count = 0
        self.types: dict[str, str] = {}  # prefixes and names as declared
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.used: dict[str, tuple[str, int]] = {}
        self.rows = dict.fromkeys(STORAGE, 0)

    def run(self) -> None:
        depth = 0
        while True:
            if space := _SPACE.match(self.text, self.at):
                self.at = space.end()
            letter = self.text[self.at]
            if letter == "{":
                depth, self.at, self.count = depth + 1, self.at + 1, self.count + 1
                self.scopes.append((self.count, {}))
                self._local_labels()
            elif letter == "}":
                depth, self.at = depth - 1, self.at + 1
                self.scopes.pop()
                if not depth:
                    return
            elif letter == ".":
                self._directive()
            elif label := _LABEL.match(self.text, self.at):
                self.labels[self._local(label[1])] = len(self.instructions)
                self.at = label.end()
            elif letter == ";":
                self.at += 1
            else:
                self._statement()

    def _local_labels(self) -> None:
        """Inline assembly repeats its labels; those of the entry itself are left as they are."""
        if len(self.scopes) > 1:
            end = self.text.index("}", self.at)
            for label in re.finditer(r"^\s*([$\w]+):(?!:)", self.text[self.at : end], re.M):
                self.scopes[-1][1][label[1]] = f"{label[1]}#{self.scopes[-1][0]}"

    def _local(self, name: str) -> str:
        for _, names in reversed(self.scopes):
            if name in names:
                return names[name]
        return name

    def _directive(self) -> None:
        found = _DIRECTIVE.match(self.text, self.at)
        assert found, self.text[self.at : self.at + 80]
        self.at = found.end()
        if declared := re.match(r"\.reg\s+\.(\w+)\s+([^;]*);", found[0]):
            kind = declared[1] if declared[1] == "pred" else re.sub(r"\D", "", declared[1])
            for name in operands(declared[2]):
                plain, several, _ = name.partition("<")
                if not several and len(self.scopes) > 1:
                    number, names = self.scopes[-1]
                    names[plain] = plain = f"{plain}#{number}"
                self.types[plain] = kind

    def _register(self, name: str) -> str | None:
        """The register that is meant, with a row of its own; None for what is no register."""
        name = self._local(name)
        if name in self.used:
            return name
        kind = self.types.get(name) or self.types.get(name.rstrip("0123456789"))
        if kind is None:
            return None
        self.used[name] = kind, self.rows[kind]
        self.rows[kind] += 1
        return name

    def _statement(self) -> None:
        found = _STATEMENT.match(self.text, self.at)
        assert found, self.text[self.at : self.at + 80]
        self.at = found.end()
        names: list[str] = []

        def rename(name: re.Match[str]) -> str:
            register = self._register(name[0])
            if register is None:
                return self._local(name[0])
            names.append(register)
            return register

        given = [_NAME.sub(rename, " ".join(o.split())) for o in operands(found[4])]
        guard = self._register(found[2]) if found[2] else None
        opcode = found[3]
        written: frozenset[str] = frozenset()
        if given and opcode.partition(".")[0] not in _WRITES_NOTHING:
            written = frozenset(n for n in re.findall(r"[%\w$.#]+", given[0]) if n in self.used)
        everything = frozenset([*names, *([guard] if guard else [])])
        text = " ".join(found[0].split())
        self.instructions.append(Instruction(text, opcode, given, guard, bool(found[1]), everything, written))


def parse(ptx: str) -> Program:
    """The only entry of a module."""
    for table, targets in re.findall(r"([$\w]+): *\.branchtargets\s+([^;]*);", ptx):
        ptx = re.sub(rf"(brx\.idx\s+%\w+, *){re.escape(table)};", lambda m, t=targets: f"{m[1]}{t};", ptx)
    ptx = re.sub(r"[$\w]+: *\.branchtargets[^;]*;", "", ptx)
    head = re.search(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.S)
    assert head, "no entry"
    parameters = []
    for line in head[2].split("\n"):
        if found := re.match(r"\s*\.param(?: \.align \d+)? \.(\w+).*?(\w+_param_\d+)(\[128\])?", line):
            parameters.append(Parameter(found[2], "tensormap" if found[3] else found[1]))
    parser = _Parser(ptx)
    parser.at = ptx.index("{", head.end())
    parser.run()
    return Program(head[1], parser.instructions, parser.labels, parameters, parser.used)
