"""Branches, barriers, shuffles and what else threads do together."""

from itertools import pairwise

import numpy as np

from tests.kernels.ptx.binding import Binder, Control, Step, control, instruction
from tests.kernels.ptx.block import Context, NamedBarrier
from tests.kernels.ptx.program import Fault


def by_warp(values: np.ndarray) -> np.ndarray:
    """The one value of each warp."""
    of_warp = values.reshape(-1, 32)
    if (of_warp != of_warp[:, :1]).any():
        raise Fault("threads of one warp part")
    return of_warp[:, 0]


@control("bra")
def branch(b: Binder) -> Control:
    guard, target = b.guard(), b.block.program.labels[b.operands[0]]

    def step(context: Context) -> None:
        if guard is None:
            context.pc = target
            return
        taken = guard()
        if taken.all():
            context.pc = target
        elif not taken.any():
            context.pc += 1
        else:
            context.split(by_warp(taken))

    return step


@control("brx.idx")
def branch_by_index(b: Binder) -> Control:
    index, targets = b.read(b.operands[0], "u32"), [b.block.program.labels[name] for name in b.operands[1:]]

    def step(context: Context) -> None:
        which = by_warp(index)
        if (which == which[0]).all():
            context.pc = targets[which[0]]
        else:
            context.split(which)

    return step


@control("ret", "exit")
def leave(b: Binder) -> Control:
    guard = b.guard()

    def step(context: Context) -> None:
        if guard is not None and not (leaves := guard()).all():
            if leaves.any():
                context.split(by_warp(leaves))
            else:
                context.pc += 1
            return
        end(context)

    return step


def end(context: Context) -> None:
    block = context.block
    if context.products or context.product_groups:
        raise Fault("the program ends before its wgmma was waited for")
    if any(store.reads_shared for group in [*context.store_groups, context.stores] for store in group):
        raise Fault("the program ends before its bulk stores have read shared memory")
    block.unfinished += sum(len(one.threads) for group in [*context.copy_groups, context.copies] for one in group)
    block.contexts.remove(context)
    block.exited += context.high - context.low
    for number in list(block.barriers):
        release_if_complete(block, number)


@control("trap")
def trap(b: Binder) -> Control:
    def step(context: Context) -> None:
        raise Fault("trap: an assertion of the kernel failed")

    return step


# --- Barriers -------------------------------------------------------------------------------------


@control(
    "bar.sync", "barrier.sync", "barrier.cta.sync", "bar.cta.sync", "bar.arrive", "barrier.arrive", "barrier.cta.arrive"
)
def named_barrier(b: Binder) -> Control:
    waits = "sync" in b.parts
    number = b.read(b.operands[0], "u32")
    count = b.read(b.operands[1], "u32") if len(b.operands) > 1 else None

    def step(context: Context) -> None:
        numbers = by_warp(number)
        counts = numbers * 0 if count is None else by_warp(count)
        which = numbers.astype(np.int64) << 32 | counts
        if (which != which[0]).any():
            context.split(which)
            return
        arrive(context, int(numbers[0]), int(counts[0]), waits)

    return step


@control("bar.warp.sync")
def warp_barrier(b: Binder) -> Control:
    warps = b.warps

    def step(context: Context) -> None:
        context.block.clocks.warp_sync(warps)
        context.pc += 1

    return step


def arrive(context: Context, number: int, count: int, waits: bool) -> None:
    """``count`` threads, or 0 for all, make the barrier complete."""
    block, clocks = context.block, context.block.clocks
    barrier = block.barriers.setdefault(number, NamedBarrier(count))
    if barrier.expected != count:
        raise Fault(f"barrier {number} is met by {barrier.expected} threads and by {count}")
    barrier.arrived += context.high - context.low
    total = count or len(block.threads) - block.exited
    if barrier.arrived > total:
        raise Fault(f"{barrier.arrived} threads at barrier {number}, which is for {total}")
    if waits and barrier.arrived == context.high - context.low == total:  # alone
        clocks.barrier_alone(context.warps)
        del block.barriers[number]
        context.pc += 1
        return
    for warp in range(context.low // 32, context.high // 32):
        known = clocks.release(warp)
        if barrier.snapshot is None:
            barrier.snapshot = known
        else:
            barrier.snapshot.join(known)
    if waits:
        barrier.waiting.append(context)
        context.ready = lambda: False
        context.why = f"barrier {number}, where {barrier.arrived} of {total} threads are"
    else:
        context.pc += 1
    release_if_complete(block, number)


def release_if_complete(block, number: int) -> None:  # type: ignore[no-untyped-def]  # a Block
    barrier = block.barriers[number]
    if barrier.arrived < (barrier.expected or len(block.threads) - block.exited):
        return
    del block.barriers[number]
    for context in barrier.waiting:
        assert barrier.snapshot is not None
        block.clocks.barrier(context.warps, barrier.snapshot)
        context.ready = None
        context.pc += 1
    merge(block, barrier.waiting)


def merge(block, contexts: list[Context]) -> None:  # type: ignore[no-untyped-def]  # a Block
    """Contexts side by side that are at the same place become one."""
    ordered = sorted((c for c in contexts if not c.busy() and not c.results), key=lambda c: c.low)
    for first, second in pairwise(ordered):
        if first.high == second.low and first.pc == second.pc:
            block.contexts.remove(first)
            second.low = first.low


# --- Within a warp --------------------------------------------------------------------------------


@instruction("shfl")
def shuffle(b: Binder) -> Step:
    mode = b.parts[2]
    to, _, valid = b.operands[0].partition("|")
    x, lanes, clamp = b.read(b.operands[1], "u32"), b.read(b.operands[2], "u32"), b.read(b.operands[3], "u32")
    if int(clamp[0]) not in (31, 0):
        raise NotImplementedError(b.ins.text)
    everyone = np.arange(b.count)
    lane = everyone & 31
    out, found = b.write(to, "b32"), b.write(valid, "pred") if valid else None

    def source() -> tuple[np.ndarray, np.ndarray]:
        n = lanes.astype(np.int64)
        at = {"bfly": lane ^ n, "idx": n & 31, "up": lane - n, "down": lane + n}[mode]
        inside = (at >= 0) & (at < 32)
        return everyone - lane + np.where(inside, at, lane), inside

    if not lanes.flags.writeable and found is None and b.ins.guard is None:
        fixed = source()[0]
        return lambda: np.take(x, fixed, out=out, mode="clip")

    def step() -> None:
        at, inside = source()
        np.copyto(out, x[at])
        if found is not None:
            np.copyto(found, inside)

    return step


@instruction("elect")
def elect(b: Binder) -> Step:
    to, _, chosen = b.operands[0].partition("|")
    leader, elected = b.write(to, "b32"), b.write(chosen, "pred")
    first = (b.threads & 31) == 0

    def step() -> None:
        leader[:] = 0
        np.copyto(elected, first)

    return step


@instruction("vote")
def vote(b: Binder) -> Step:
    mode = b.parts[2]
    name = b.operands[1]
    x = b.read(name.lstrip("!"), "pred")
    negated = name.startswith("!")
    powers = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def value() -> np.ndarray:
        of_warp = (x ^ negated).reshape(-1, 32)
        if mode == "ballot":
            return np.repeat((of_warp * powers).sum(1).astype(np.uint32), 32)
        if mode == "uni":
            return np.repeat(of_warp.all(1) | ~of_warp.any(1), 32)
        return np.repeat(of_warp.all(1) if mode == "all" else of_warp.any(1), 32)

    return b.assign(b.write(b.operands[0], "b32" if mode == "ballot" else "pred"), value)


@instruction("redux")
def reduce(b: Binder) -> Step:
    kind = b.ins.type
    x = b.read(b.operands[1], kind)
    ufunc = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[b.parts[2]]
    if kind == "f32":
        ufunc = {"min": np.fmin, "max": np.fmax}[b.parts[2]]
    value = lambda: np.repeat(ufunc.reduce(x.reshape(-1, 32), 1, dtype=x.dtype), 32)  # noqa: E731
    return b.assign(b.write(b.operands[0], kind), value)


@instruction("match")
def match(b: Binder) -> Step:
    x = b.read(b.operands[1], b.ins.type)
    powers = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def value() -> np.ndarray:
        of_warp = x.reshape(-1, 32)
        return ((of_warp[:, :, None] == of_warp[:, None, :]) * powers).sum(2).astype(np.uint32).reshape(-1)

    if b.parts[1] != "any":
        raise NotImplementedError(b.ins.text)
    return b.assign(b.write(b.operands[0], "b32"), value)


# --- What changes no number -----------------------------------------------------------------------


@instruction("setmaxnreg", "nanosleep", "griddepcontrol", "prefetch", "prefetchu", "discard", "applypriority")
def nothing(b: Binder) -> Step:
    return lambda: None


@instruction("fence", "membar")
def fence(b: Binder) -> Step:
    warps, block = b.warps, b.block
    if b.has("mbarrier_init"):
        return lambda: None
    if b.has("proxy"):
        return lambda: block.clocks.fence_proxy(warps)
    return lambda: block.clocks.fence(warps)
