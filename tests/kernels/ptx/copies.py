"""Asynchronous copies: cp.async of threads, bulk copies by tensor descriptors, and mbarriers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.ptx.binding import Binder, Control, Step, control, instruction
from tests.kernels.ptx.block import Context, Mbarrier
from tests.kernels.ptx.control import by_warp
from tests.kernels.ptx.ordering import MBARRIERS, Snapshot
from tests.kernels.ptx.program import Fault, elements
from tests.kernels.ptx.shared import BASE
from tests.kernels.ptx.swizzle import swizzled


def _run(step: Callable[[Context], Any]) -> Control:
    def and_on(context: Context) -> None:
        step(context)
        context.pc += 1

    return and_on


# --- Threads' own copies --------------------------------------------------------------------------


@dataclass
class Copy:
    """A cp.async: it is carried out when it is waited for."""

    threads: np.ndarray
    at: np.ndarray
    granules: np.ndarray
    data: np.ndarray

    def part(self, context: Context) -> "Copy | None":
        own = (self.threads >= context.low) & (self.threads < context.high)
        return Copy(self.threads[own], self.at[own], self.granules[own], self.data[own]) if own.any() else None


@control("cp.async.ca.shared", "cp.async.cg.shared")
def copy(b: Binder) -> Control:
    size = int(b.operands[2], 0)
    to, source, active, threads, block = (
        b.address(b.operands[0]),
        b.address(b.operands[1]),
        b.active(),
        b.threads,
        b.block,
    )
    amount = b.read(b.operands[3], "u32") if len(b.operands) > 3 else None

    def step(context: Context) -> None:
        who = active()
        if not len(who):
            return
        memory, shared = block.memory, block.shared
        at = to()[who]
        data = np.zeros((len(who), size), np.uint8)
        full = np.ones(len(who), bool) if amount is None else amount[who] != 0
        if amount is not None and (amount[who][full] != size).any():
            raise NotImplementedError("a cp.async of a part")
        if full.any():
            where = memory.offsets(source()[who][full], size, "cp.async")
            memory.note_read(block.clocks, where, size, threads[who][full], "cp.async")
            data[full] = memory.rows[size][where // size]
        g = shared.granules(at, size, "cp.async")
        shared.note_write(g, threads[who], None, "cp.async")
        shared.copying[g] = True
        context.copies.append(Copy(threads[who], at, g, data))

    return _run(step)


@control("cp.async.commit_group")
def commit_copies(b: Binder) -> Control:
    def step(context: Context) -> None:
        context.copy_groups.append(context.copies)
        context.copies = []

    return _run(step)


@control("cp.async.wait_group", "cp.async.wait_all")
def wait_for_copies(b: Binder) -> Control:
    left = int(b.operands[0]) if b.operands else 0
    everything = b.has("wait_all")
    shared = b.block.shared

    def step(context: Context) -> None:
        if everything and context.copies:
            context.copy_groups.append(context.copies)
            context.copies = []
        while len(context.copy_groups) > left:
            for one in context.copy_groups.pop(0):
                width = one.data.shape[1]
                b.block.completed[context.pc] += len(one.threads)
                shared.copying[one.granules] = False
                shared.note_write(one.granules, one.threads, None, "cp.async")
                shared.rows[width][one.at // width] = one.data

    return _run(step)


# --- mbarriers ------------------------------------------------------------------------------------


def _find(block, address: int) -> Mbarrier:  # type: ignore[no-untyped-def]  # a Block
    if address not in block.mbarriers:
        raise Fault(f"no mbarrier at byte {address - BASE} of shared memory")
    return block.mbarriers[address]


def _complete(block, barrier: Mbarrier) -> None:  # type: ignore[no-untyped-def]  # a Block
    if barrier.pending < 0:
        raise Fault(f"more arrivals than the {barrier.count} that an mbarrier expects")
    if not barrier.pending and not barrier.bytes:
        barrier.phase += 1
        barrier.pending = barrier.count
        barrier.completed, barrier.arriving = barrier.arriving, None


def _arrive(block, barrier: Mbarrier, snapshot: Snapshot) -> None:  # type: ignore[no-untyped-def]  # a Block
    if barrier.arriving is None:
        barrier.arriving = snapshot
    else:
        barrier.arriving.join(snapshot)


def _place(operand: str) -> str:
    return operand if operand.startswith("[") else f"[{operand}]"


@instruction("mbarrier.init", "mbarrier.inval")
def mbarrier_init(b: Binder) -> Step:
    address, active, threads, block = b.address(_place(b.operands[0])), b.active(), b.threads, b.block
    begins = b.has("init")
    count = b.read(b.operands[1], "u32") if begins else None

    def step() -> None:
        who = active()
        for thread, at in zip(threads[who], address()[who], strict=True):
            shared, place = block.shared, int(at)
            g = shared.granules(np.array([place]), 8, "mbarrier.init")
            shared.note_write(g, np.array([thread]), None, "mbarrier.init")
            if count is None:
                _find(block, place)
                del block.mbarriers[place]
            else:
                if place in block.mbarriers:
                    raise Fault(f"an mbarrier is initialised twice, at byte {place - BASE} of shared memory")
                number = block.numbers.setdefault(place, len(block.numbers))
                if number >= MBARRIERS:
                    raise NotImplementedError(f"more than {MBARRIERS} mbarriers")
                expected = int(count[thread - b.low])
                block.mbarriers[place] = Mbarrier(number, expected, expected)

    return step


def _check_initialised(block, thread: int, place: int) -> Mbarrier:  # type: ignore[no-untyped-def]  # a Block
    shared = block.shared
    g = shared.granules(np.array([place]), 8, "an mbarrier operation")
    shared.check_written(g, np.array([[thread]]), "an mbarrier operation")
    shared.read_time[thread >> 5, g], shared.read_lane[thread >> 5, g] = block.clocks.time.now, thread & 31
    return _find(block, place)


@instruction("mbarrier.arrive", "mbarrier.expect_tx")
def mbarrier_arrive(b: Binder) -> Step:
    expects, arrives = b.has("expect_tx"), b.has("arrive")
    operands = [o for o in b.operands if o != "_"]
    if operands[0].startswith("%"):
        raise NotImplementedError(b.ins.text)  # the state, as a result
    address, active, threads, block = b.address(operands[0]), b.active(), b.threads, b.block
    number = b.read(operands[1], "u32") if len(operands) > 1 else None

    def step() -> None:
        who = active()
        if not len(who):
            return
        b.ins.acted = True
        for local, at in zip(who, address()[who], strict=True):
            thread = int(threads[local])
            barrier = _check_initialised(block, thread, int(at))
            value = 1 if number is None else int(number[local])
            if expects:
                barrier.bytes += value
            if arrives:
                _arrive(block, barrier, block.clocks.release(thread >> 5))
                barrier.pending -= 1 if expects else value
                _complete(block, barrier)

    return step


@control("mbarrier.try_wait", "mbarrier.test_wait")
def mbarrier_wait(b: Binder) -> Control:
    if not b.has("parity") or b.ins.guard is not None:
        raise NotImplementedError(b.ins.text)
    out, address, parity = b.write(b.operands[0], "pred"), b.address(b.operands[1]), b.read(b.operands[2], "u32")
    block, warps = b.block, b.warps

    def step(context: Context) -> None:
        places = by_warp(address()) << 1 | by_warp(parity & 1)
        if (places != places[0]).any():
            context.split(places)
            return
        place, phase = int(places[0]) >> 1, int(places[0]) & 1
        for warp in range(warps.start, warps.stop):
            barrier = _check_initialised(block, 32 * warp, place)

        def over() -> bool:
            return barrier.phase & 1 != phase

        if over():
            if barrier.completed is not None:
                block.clocks.acquire(warps, barrier.completed)
            out[:] = True
            context.pc += 1
            return
        context.ready = over
        context.why = (
            f"the mbarrier at byte {place - BASE} (parity {phase}; in phase {barrier.phase}, of {barrier.count} "
            f"arrivals {barrier.pending} are missing, and {barrier.bytes} bytes)"
        )

    return step


# --- Bulk copies by descriptors -------------------------------------------------------------------


@dataclass
class Tensormap:
    """What a tensor descriptor says, innermost dimension first.

    Args:
        allocation: of the memory; ``offset`` bytes into it the tensor begins.
        strides: bytes, of all dimensions.
        swizzle: bytes of a row whose chunks are exchanged; 16: none are.
    """

    allocation: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int
    swizzle: int
    fill_nan: bool = False

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def places(self, start: list[int], base: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each element of a box, in the order of shared memory: where it lies in global memory
        from the tensor's beginning, whether it is inside, and where in shared memory.
        """
        grids = np.indices(self.box[::-1]).reshape(len(self.box), -1)[::-1]  # innermost first
        at = grids + np.array(start)[:, None]
        inside = ((at >= 0) & (at < np.array(self.shape)[:, None])).all(0)
        where = (at * np.array(self.strides)[:, None]).sum(0)
        to = swizzled(base + np.arange(len(inside)) * self.element, self.swizzle)
        return where, inside, to


@dataclass
class BulkStore:
    """A bulk store: shared memory is read until it is waited for."""

    block: Any
    warp: int
    granules: np.ndarray
    written: np.ndarray
    reads_shared: bool = True

    def part(self, context: Context) -> "BulkStore | None":
        return self if context.low // 32 <= self.warp < context.high // 32 else None

    def read(self) -> None:
        if self.reads_shared:
            self.block.shared.end_async_read(self.granules, slice(self.warp, self.warp + 1))
            self.reads_shared = False

    def finish(self) -> None:
        self.read()
        memory = self.block.memory
        memory.write_time[self.written] = memory.time.now
        memory.write_thread[self.written] = 32 * self.warp


def _tensormap(b: Binder, operand: str) -> tuple[Callable[[int], Tensormap], list[np.ndarray]]:
    found = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*\{([^}]*)\}\s*\]", operand)
    assert found, operand
    pointer = b.read(found[1], "u64")
    coordinates = [b.read(c, "s32") for c in elements(found[2])]
    maps = {address: b.block.parameters[name] for name, address in b.block.parameter_addresses.items()}

    def of(local: int) -> Tensormap:
        found = maps.get(int(pointer[local]))
        if not isinstance(found, Tensormap):
            raise Fault("a bulk copy whose descriptor is none")
        return found

    return of, coordinates


@instruction("cp.async.bulk.tensor")
def bulk(b: Binder) -> Step:
    raise NotImplementedError(b.ins.text)


@control(*(f"cp.async.bulk.tensor.{n}d.shared" for n in range(1, 6)))
def bulk_load(b: Binder) -> Control:
    if b.has("im2col") or b.has("multicast"):
        raise NotImplementedError(b.ins.text)
    to, barrier_at = b.address(b.operands[0]), b.address(_place(b.operands[2]))
    of, coordinates = _tensormap(b, b.operands[1])
    active, threads, block = b.active(), b.threads, b.block

    def step(context: Context) -> None:
        for local in active():
            thread, base, descriptor = int(threads[local]), int(to()[local]), of(local)
            memory, shared = block.memory, block.shared
            if base % max(128, descriptor.swizzle * 8 if descriptor.swizzle > 16 else 128):
                raise Fault(f"a bulk copy to byte {base - BASE} of shared memory, which is not aligned")
            where, inside, at = descriptor.places([int(c[local]) for c in coordinates], base)
            g = shared.granules(np.arange(base, base + descriptor.bytes, 16), 16, "a bulk copy").reshape(-1)
            barrier = _check_initialised(block, thread, int(barrier_at()[local]))
            shared.note_bulk_write(g, thread, shared.threads + 32 * barrier.number, "a bulk copy")
            size = descriptor.element
            fill = 0xFF if descriptor.fill_nan else 0
            shared.rows[size][at // size] = fill
            start = memory.address(descriptor.allocation) + descriptor.offset
            source = memory.offsets(start + where[inside], size, "a bulk copy")
            memory.note_read(block.clocks, source, size, np.full(len(source), thread), "a bulk copy")
            shared.rows[size][at[inside] // size] = memory.rows[size][source // size]
            barrier.bytes -= descriptor.bytes
            known = Snapshot(np.zeros_like(block.clocks.seen[0]), np.zeros_like(block.clocks.seen[0]), {})
            column = block.clocks.warps + barrier.number
            known.seen[column] = known.fenced[column] = block.clocks.time.tick()
            _arrive(block, barrier, known)
            _complete(block, barrier)

    return _run(step)


@control(
    *(f"cp.async.bulk.tensor.{n}d.global" for n in range(1, 6)),
    *(f"cp.reduce.async.bulk.tensor.{n}d.global" for n in range(1, 6)),
)
def bulk_store(b: Binder) -> Control:
    of, coordinates = _tensormap(b, b.operands[0])
    source_at = b.address(b.operands[1])
    active, threads, block = b.active(), b.threads, b.block
    adds = b.parts[1] == "reduce"
    if adds and not b.has("add"):
        raise NotImplementedError(b.ins.text)

    def step(context: Context) -> None:
        for local in active():
            thread, base, descriptor = int(threads[local]), int(source_at()[local]), of(local)
            memory, shared, size = block.memory, block.shared, descriptor.element
            where, inside, at = descriptor.places([int(c[local]) for c in coordinates], base)
            g = shared.granules(np.arange(base, base + descriptor.bytes, 16), 16, "a bulk store").reshape(-1)
            warps = slice(thread >> 5, (thread >> 5) + 1)
            shared.begin_async_read(g, warps, "a bulk store")
            start = memory.address(descriptor.allocation) + descriptor.offset
            target = memory.offsets(start + where[inside], size, "a bulk store")
            memory.note_write(block.clocks, target, size, np.full(len(target), thread), "a bulk store", atomic=adds)
            data = shared.rows[size][at[inside] // size]
            if adds:
                if size != 4:
                    raise NotImplementedError("a reduction of other than float32")
                memory.data.view(np.float32)[target // 4] += data.view(np.float32)[:, 0]
            else:
                memory.rows[size][target // size] = data
            written = np.unique(memory.granules(target, size))
            memory.write_time[written] = np.iinfo(np.int32).max  # nobody sees it until it is waited for
            memory.write_thread[written] = 0
            context.stores.append(BulkStore(block, thread >> 5, g, written))

    return _run(step)


@control("cp.async.bulk.commit_group")
def commit_stores(b: Binder) -> Control:
    def step(context: Context) -> None:
        context.store_groups.append(context.stores)
        context.stores = []

    return _run(step)


@control("cp.async.bulk.wait_group")
def wait_for_stores(b: Binder) -> Control:
    left, only_read = int(b.operands[0]), b.has("read")

    def step(context: Context) -> None:
        done = context.store_groups[: max(len(context.store_groups) - left, 0)]
        for group in done:
            for one in group:
                one.read() if only_read else one.finish()
        if not only_read:
            del context.store_groups[: len(done)]

    return _run(step)
