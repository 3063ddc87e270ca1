"""Matrices: ldmatrix, stmatrix, mma.sync, wgmma."""

import re
from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.arithmetic import half_to_f32
from tests.kernels.ptx.binding import Binder, Control, Step, control, instruction
from tests.kernels.ptx.block import Context
from tests.kernels.ptx.program import Fault, elements
from tests.kernels.ptx.shared import Shared

ROW, COLUMN = np.arange(32) // 4, np.arange(32) % 4 * 2  # of a lane's pair in an 8 by 8 matrix


def _matrix_addresses(b: Binder, operand: str, count: int):  # type: ignore[no-untyped-def]  # a callable
    """For each matrix its eight rows' addresses: (count, warps, 8)."""
    address, shape = b.address(operand), b.shape

    def rows() -> np.ndarray:
        return address().reshape(shape)[:, : 8 * count].reshape(-1, count, 8).transpose(1, 0, 2)

    return rows


@instruction("ldmatrix")
def load_matrices(b: Binder) -> Step:
    names = elements(b.operands[0])
    outs, rows = b.rows(b.operands[0]), _matrix_addresses(b, b.operands[1], len(names))
    memory, transposed, part = b.block.shared, b.has("trans"), slice(b.low, b.high)
    file = b.block.registers["32"]
    warps = np.arange(b.warps.start, b.warps.stop)[None, :, None, None]
    if b.ins.guard is not None or b.ins.type != "b16":
        raise NotImplementedError(b.ins.text)

    def step() -> None:
        at = rows()
        g = memory.granules(at.reshape(-1), 16, "ldmatrix").reshape(*at.shape, -1)
        memory.note_warp_read(g, np.broadcast_to(warps, g.shape), "ldmatrix")
        data = memory.rows[16][at >> 4].view(np.uint16)  # (count, warps, 8, 8)
        if transposed:
            data = np.ascontiguousarray(data.swapaxes(-1, -2))
        file[outs, part] = data.view(np.uint32).reshape(len(outs), -1)

    return step


@instruction("stmatrix")
def store_matrices(b: Binder) -> Step:
    names = elements(b.operands[1])
    sources, rows = b.rows(b.operands[1]), _matrix_addresses(b, b.operands[0], len(names))
    memory, transposed, part = b.block.shared, b.has("trans"), slice(b.low, b.high)
    file = b.block.registers["32"]
    count = len(names)
    # Lane 8 i + r gives the address of matrix i's row r, and counts as the one who writes it.
    lanes = b.threads.reshape(b.shape)[:, : 8 * count].reshape(-1, count, 8).transpose(1, 0, 2).reshape(-1)
    if b.ins.guard is not None or b.ins.type != "b16":
        raise NotImplementedError(b.ins.text)

    def step() -> None:
        data = file[sources, part].view(np.uint16).reshape(count, -1, 8, 8)
        if transposed:
            data = np.ascontiguousarray(data.swapaxes(-1, -2))
        at = rows().reshape(-1)
        new = data.view(np.uint8).reshape(-1, 16)
        g = memory.granules(at, 16, "stmatrix")
        same = (memory.rows[16][at >> 4] == new).reshape(*g.shape, -1).all(-1)
        memory.note_write(g, lanes, same, "stmatrix")
        memory.rows[16][at >> 4] = new
        if (memory.rows[16][at >> 4] != new).any():
            raise Fault("stmatrix stores different values to the same place at once")

    return step


def _fragments_a(registers: np.ndarray, kind: str) -> np.ndarray:
    """(4, 32 warps) registers as (warps, 16, 16)."""
    halves = half_to_f32(np.ascontiguousarray(registers).view(np.uint16), kind).reshape(4, -1, 32, 2)
    a = np.empty((halves.shape[1], 16, 16), np.float32)
    for i in range(4):
        for h in range(2):
            a[:, ROW + 8 * (i & 1), COLUMN + h + 8 * (i >> 1)] = halves[i, :, :, h]
    return a


@instruction("mma")
def mma(b: Binder) -> Step:
    if not b.has("m16n8k16") or b.parts[-4:] not in (("f32", k, k, "f32") for k in ("bf16", "f16")):
        raise NotImplementedError(b.ins.text)
    kind, part = b.parts[-2], slice(b.low, b.high)
    d, a, bb, c = (b.rows(o) for o in b.operands)
    file = b.block.registers["32"]
    rows = np.stack([ROW + 8 * (i >> 1) for i in range(4)])  # (4, 32)
    columns = np.stack([COLUMN + (i & 1) for i in range(4)])

    def step() -> None:
        left = _fragments_a(file[a, part], kind)
        halves = half_to_f32(file[bb, part].view(np.uint16), kind).reshape(2, -1, 32, 2)
        right = np.empty((len(left), 16, 8), np.float32)
        for i in range(2):
            for h in range(2):
                right[:, COLUMN + h + 8 * i, ROW] = halves[i, :, :, h]
        product = (left @ right)[:, rows, columns]  # (warps, 4, 32)
        total = product.swapaxes(0, 1) + file[c, part].view(np.float32).reshape(4, -1, 32)
        file[d, part] = total.reshape(4, -1).view(np.uint32)

    return step


# --- wgmma ----------------------------------------------------------------------------------------


@dataclass
class Product:
    """A wgmma under way: the registers that it writes and reads, and each warpgroup's operands."""

    shared: Shared
    results: frozenset[str]
    sources: frozenset[str]
    operands: list[tuple[slice, np.ndarray]]  # warps, granules

    def part(self, context: Context) -> "Product | None":
        """What of it belongs to a part of its context."""
        inside = [(w, g) for w, g in self.operands if context.warps.start <= w.start < context.warps.stop]
        return Product(self.shared, self.results, self.sources, inside)

    def finish(self) -> None:
        for warps, g in self.operands:
            self.shared.end_async_read(g, warps)


@control("wgmma.mma_async")
def wgmma(b: Binder) -> Control:
    shape = re.search(r"m64n(\d+)k16\.f32\.(bf16|f16)\.\2", b.ins.opcode)
    if shape is None or b.operands[4:6] != ["1", "1"] or b.ins.guard is not None:
        raise NotImplementedError(b.ins.text)
    n, kind = int(shape[1]), shape[2]
    if b.count % 128 or b.low % 128:
        raise Fault("a wgmma that not all four warps of a warpgroup reach together")
    outs, part, file, block = b.rows(b.operands[0]), slice(b.low, b.high), b.block.registers["32"], b.block
    from_registers = b.operands[1].startswith("{")
    transposed_b = bool(int(b.operands[-1]))
    transposed_a = not from_registers and bool(int(b.operands[-2]))
    a_rows = b.rows(b.operands[1]) if from_registers else None
    a_descriptor = None if from_registers else b.read(b.operands[1], "u64")
    b_descriptor = b.read(b.operands[2], "u64")
    keep = b.read(b.operands[3] if b.operands[3].startswith("%") else str(bool(int(b.operands[3]))).lower(), "pred")
    results = frozenset(elements(b.operands[0]))
    sources = frozenset(elements(b.operands[1])) if from_registers else frozenset()
    tiles, shared, groups = block.operands, block.shared, b.count // 128
    # Register i of a lane holds row 8 (i / 2 % 2) + lane / 4 of a warp's sixteen, and column
    # 8 (i / 4) + 2 (lane % 4) + i % 2.
    i = np.arange(n // 2)[:, None]
    rows, columns = ROW + 8 * (i >> 1 & 1), COLUMN + 8 * (i >> 2) + (i & 1)
    places = rows * n + columns  # (registers, 32)

    def descriptor(values: np.ndarray, group: int) -> int:
        own = values[128 * group : 128 * group + 128]
        if (own != own[0]).any():
            raise Fault("the threads of a warpgroup give wgmma different descriptors")
        return int(own[0])

    def step(context: Context) -> None:
        if context.unfenced is None:
            raise Fault("no wgmma.fence before the first wgmma")
        if touched := context.unfenced & (sources | results):
            raise Fault(f"no wgmma.fence since {min(touched)} was used otherwise")
        product = np.empty((groups, 4, 16, n), np.float32)
        used = []
        fragments = None if a_rows is None else _fragments_a(file[a_rows, part], kind)
        halves = shared.data.view(np.uint16)
        for group in range(groups):
            warps = slice(b.low // 32 + 4 * group, b.low // 32 + 4 * group + 4)
            where, g = tiles.find(descriptor(b_descriptor, group), n, transposed_b)
            shared.begin_async_read(g, warps, "wgmma")
            used.append((warps, g))
            right = half_to_f32(halves[where], kind)
            if fragments is not None:
                left = fragments[4 * group : 4 * group + 4].reshape(64, 16)
            else:
                assert a_descriptor is not None
                where, g = tiles.find(descriptor(a_descriptor, group), 64, transposed_a)
                shared.begin_async_read(g, warps, "wgmma")
                used.append((warps, g))
                left = half_to_f32(halves[where], kind)
            product[group] = (left @ right.T).reshape(4, 16, n)
        values = product.reshape(4 * groups, -1)[:, places].swapaxes(0, 1).reshape(len(outs), -1)
        if keep.any():
            values = np.where(keep, file[outs, part].view(np.float32), np.float32(0)) + values
        file[outs, part] = values.view(np.uint32)
        context.products.append(Product(shared, results, sources, used))
        context.results |= results
        context.sources |= sources
        context.pc += 1

    return step


@control("wgmma.fence")
def wgmma_fence(b: Binder) -> Control:
    def step(context: Context) -> None:
        context.unfenced = set()
        context.pc += 1

    return step


@control("wgmma.commit_group")
def wgmma_commit(b: Binder) -> Control:
    def step(context: Context) -> None:
        context.product_groups.append(context.products)
        context.products = []
        context.pc += 1

    return step


@control("wgmma.wait_group")
def wgmma_wait(b: Binder) -> Control:
    left = int(b.operands[0])

    def step(context: Context) -> None:
        while len(context.product_groups) > left:
            for product in context.product_groups.pop(0):
                product.finish()
        under_way = [p for group in [*context.product_groups, context.products] for p in group]
        context.results = frozenset().union(*(p.results for p in under_way))
        context.sources = frozenset().union(*(p.sources for p in under_way))
        context.pc += 1

    return step
