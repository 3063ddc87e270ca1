"""Loads, stores and atomics of threads."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.binding import TYPES, Binder, Control, Step, control, instruction
from tests.kernels.ptx.block import Block, Context
from tests.kernels.ptx.ordering import join_blocks
from tests.kernels.ptx.program import Fault, elements


def _register_type(b: Binder, name: str) -> str:
    kind = b.block.program.registers[name][0]
    return kind if kind == "pred" else f"b{kind}"


def _space(b: Binder) -> str:
    found = [p for p in b.parts if p in ("global", "shared", "param")]
    if not found:
        raise NotImplementedError(f"generic addresses: {b.ins.text}")
    return found[0]


@instruction("ld.param")
def load_parameter(b: Binder) -> Step:
    found = re.fullmatch(r"\[(\w+?_param_\d+)\]", b.operands[1])
    assert found, b.ins.text
    dtype = np.dtype(TYPES[b.ins.type])
    value = np.array([b.block.parameters[found[1]]], np.uint64).view(dtype)[:1]
    out = b.write(b.operands[0], _register_type(b, b.operands[0]))
    wide = out.view(f"i{out.dtype.itemsize}") if dtype.kind == "i" else out
    return lambda: np.copyto(wide, value, casting="unsafe")


def _destinations(b: Binder) -> Callable[[np.ndarray, np.ndarray], None]:
    """Takes loaded bytes, (threads, bytes), to the registers of the threads that loaded."""
    dtype = np.dtype(TYPES[b.ins.type])
    names = elements(b.operands[0])
    outs = [None if n == "_" else b.write(n, _register_type(b, n)) for n in names]
    targets = [None if o is None else o.view(f"i{o.itemsize}") if dtype.kind == "i" else o for o in outs]
    raw = dtype if dtype.kind in "iu" else np.dtype(f"u{dtype.itemsize}")

    def store(active: np.ndarray, data: np.ndarray) -> None:
        values = data.view(raw)
        everyone = len(active) == b.count
        for i, target in enumerate(targets):
            if target is not None:
                if everyone:
                    np.copyto(target, values[:, i], casting="unsafe")
                else:
                    target[active] = values[:, i]

    return store


@instruction("ld")
def load(b: Binder) -> Step:
    names = elements(b.operands[0])
    width = np.dtype(TYPES[b.ins.type]).itemsize * len(names)
    address, active, store = b.address(b.operands[1]), b.active(), _destinations(b)
    threads, block = b.threads, b.block
    if _space(b) == "shared":
        memory = block.shared

        def from_shared() -> None:
            who = active()
            if len(who):
                at = address()[who]
                memory.note_read(memory.granules(at, width, "a load"), threads[who], "a load")
                store(who, memory.rows[width][at // width])

        return from_shared

    def from_global() -> None:
        who = active()
        if len(who):
            where = block.memory.offsets(address()[who], width, "a load")
            block.memory.note_read(block.clocks, where, width, threads[who], "a load")
            store(who, block.memory.rows[width][where // width])

    return from_global


def _values(b: Binder, operand: str) -> Callable[[np.ndarray], np.ndarray]:
    """The bytes, (threads, bytes), that these threads store."""
    size = np.dtype(TYPES[b.ins.type]).itemsize
    sources = [b.read(n, f"b{8 * size}") for n in elements(operand)]

    def collect(active: np.ndarray) -> np.ndarray:
        return np.stack([s[active] for s in sources], 1).view(np.uint8)

    return collect


@instruction("st")
def store(b: Binder) -> Step:
    values = _values(b, b.operands[1])
    width = np.dtype(TYPES[b.ins.type]).itemsize * len(elements(b.operands[1]))
    address, active, threads, block = b.address(b.operands[0]), b.active(), b.threads, b.block
    if _space(b) == "shared":
        memory = block.shared

        def to_shared() -> None:
            who = active()
            if len(who):
                at, new = address()[who], values(who)
                g = memory.granules(at, width, "a store")
                same = (memory.rows[width][at // width] == new).reshape(*g.shape, -1).all(-1)
                memory.note_write(g, threads[who], same, "a store")
                memory.rows[width][at // width] = new
                winner = memory.rows[width][at // width]
                if (winner != new).any():
                    raise Fault("threads store different values to the same place at once")

        return to_shared
    releases = b.has("release") or b.has("relaxed") or b.has("volatile")

    def to_global() -> None:
        who = active()
        if len(who):
            where = block.memory.offsets(address()[who], width, "a store")
            if releases:
                block.memory.version += 1
                for thread, place in zip(threads[who], where, strict=True):
                    publish(block, thread >> 5, int(place), b.has("release"))
            block.memory.note_write(block.clocks, where, width, threads[who], "a store", atomic=releases)
            block.memory.rows[width][where // width] = values(who)

    return to_global


# --- Atomics --------------------------------------------------------------------------------------


def publish(block: Block, warp: int, place: int, releases: bool) -> None:
    """A write that others may wait for: what a release, or a fence before, orders before them."""
    known = block.clocks.publish(warp) if releases else block.clocks.before_fence[warp]
    join_blocks(block.memory.released.setdefault(place, {}), known)


def learn(block: Block, warp: int, place: int, acquires: bool) -> None:
    """A read of what others have published; without acquire it counts from the next fence on."""
    found = block.memory.released.get(place, {})
    if acquires:
        block.clocks.learn(warp, found)
    else:
        join_blocks(block.clocks.before_acquire[warp], found)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, new: old + new,
    "max": lambda old, new: max(old, new),
    "min": lambda old, new: min(old, new),
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


@instruction("red")
def reduce_in_memory(b: Binder) -> Step:
    step = _atomic(b, None, b.operands[0], b.operands[1:])
    return lambda: step() and None


@control("atom")
def atomic(b: Binder) -> Control:
    """Ends a line: whoever reads the same value again and again waits for another program."""
    step = _atomic(b, b.operands[0], b.operands[1], b.operands[2:])

    def control_step(context: Context) -> None:
        wait_if_same(context, step())

    return control_step


_ORDERED = ("acquire", "relaxed", "volatile", "gpu", "sys", "cta")


@control(*(f"ld.{word}" for word in _ORDERED), *(f"ld.global.{word}" for word in _ORDERED))
def load_for_others(b: Binder) -> Control:
    """A load of what another program may store meanwhile."""
    if _space(b) != "global":
        plain = load(b)
        return lambda context: (plain(), setattr(context, "pc", context.pc + 1))
    width = np.dtype(TYPES[b.ins.type]).itemsize * len(elements(b.operands[0]))
    address, active, place_into, threads, block = (
        b.address(b.operands[1]),
        b.active(),
        _destinations(b),
        b.threads,
        b.block,
    )

    def step(context: Context) -> None:
        who = active()
        seen = None
        if len(who):
            where = block.memory.offsets(address()[who], width, "a load")
            for thread, place in zip(threads[who], where, strict=True):
                learn(block, thread >> 5, int(place), b.has("acquire"))
            data = block.memory.rows[width][where // width]
            place_into(who, data)
            seen = data.tobytes()
        wait_if_same(context, seen)

    return step


def wait_if_same(context: Context, value: Any) -> None:
    """Let other contexts and programs run if nothing has changed since this place was last here."""
    memory = context.block.memory
    if value is not None and context.polled.get(context.pc) == value:
        version = memory.version
        context.ready, context.why = (lambda: memory.version != version), "another program"
    context.polled[context.pc] = value
    context.pc += 1


def _atomic(b: Binder, to: str | None, where: str, sources: list[str]) -> Callable[[], Any]:
    """Returns what the first thread found, if ``to`` asks for it and nothing was added: who adds
    does not wait for others.
    """
    dtype = np.dtype(TYPES[b.ins.type.removesuffix("x2")])
    if b.ins.type.endswith("x2") or b.ins.type in ("bf16", "f16"):
        raise NotImplementedError(b.ins.text)
    kind = "f" + b.ins.type[1:] if b.ins.type[0] == "f" else b.ins.type
    count = len(elements(sources[0]))
    width = dtype.itemsize * count
    address, active, threads, block = b.address(where), b.active(), b.threads, b.block
    given = [b.read(n, kind) for n in elements(sources[0])]
    compare = given if "cas" in b.parts else None
    new = [b.read(n, kind) for n in elements(sources[1])] if compare else given
    operation = None if compare else next(OPERATIONS[p] for p in b.parts if p in OPERATIONS)
    outs = [None] * count if to in (None, "_") else [b.write(n, kind) for n in elements(to or "")]
    releases = any(p in ("release", "acq_rel") for p in b.parts)
    acquires = any(p in ("acquire", "acq_rel") for p in b.parts)
    shared = _space(b) == "shared"

    def step() -> Any:
        who = active()
        if not len(who):
            return None
        at = address()[who]
        if shared:
            memory = block.shared
            g = memory.granules(at, width, "an atomic")
            memory.note_write(g, threads[who], np.ones(g.shape, bool), "an atomic")
            place = at
        else:
            memory = block.memory
            place = memory.offsets(at, width, "an atomic")
            # Sums of floats are in conflict where the order in which they are added must be one.
            free = not (memory.ordered and dtype.kind == "f")
            memory.note_write(block.clocks, place, width, threads[who], "an atomic", atomic=free)
        view = memory.data.view(dtype)
        plain = not (releases or acquires or any(block.clocks.before_fence))
        if operation is OPERATIONS["add"] and outs[0] is None and plain:
            block.memory.version += 1
            for i, source in enumerate(new):
                np.add.at(view, place // dtype.itemsize + i, source[who])
            return None
        first, added = None, dtype.kind == "f"
        for thread, local, offset in zip(threads[who], who, place, strict=True):
            if not shared:
                learn(block, thread >> 5, int(offset), acquires)
            for i, source in enumerate(new):
                index = offset // dtype.itemsize + i
                old = view[index]
                if compare is not None:
                    view[index] = source[local] if old == compare[i][local] else old
                else:
                    assert operation is not None
                    view[index] = operation(old, source[local])
                if outs[i] is not None:
                    outs[i][local] = old
                    first = old if first is None else first
                if view[index] != old and not shared:
                    block.memory.version += 1
                    added = True
            if not shared:
                publish(block, thread >> 5, int(offset), releases)
        return None if added else first

    return step
