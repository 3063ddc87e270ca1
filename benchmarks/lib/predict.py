"""A static model of attention kernels on Hopper: from counted machine code to a predicted time.

No GPU is needed and nothing here is a measurement. An iteration of an innermost loop takes the
clocks of its products and of its other instructions, one after the other unless other warps of the
same multiprocessor (a second block, a second consumer of a warp-specialised kernel) fill the gaps:

    clocks = max(tensor, other) + overlap * min(tensor, other) + exposed loads

and a kernel its iterations by the mask's geometry, what it does once a head and once a program,
and the tail of its last programs. :data:`CONSTANTS` are fitted to published measurements of
FlashAttention-3 and of Triton's own attention, whose loops are counted in the same way:
``benchmarks/results/calibration.json``, which ``python -m benchmarks.compiled --calibration``
compares with. Within 30% is what it is good for; the order of candidates is what it is used for.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.lib.sass import Loop


class Constants(NamedTuple):
    """What the model is made of. A change is printed beside what it changes."""

    multiprocessors: int = 132
    clock: float = 1.70e9
    """Hz under load; H100 SXM's boost clock is 1.98e9, and it is power that limits it here."""
    l2_bytes: float = 24.5
    """A clock and multiprocessor: 5.5 TB/s in all."""
    memory_bytes_per_second: float = 3.0e12
    """Of a copy: about nine tenths of HBM3's 3.35e12."""
    issue: float = 1.4
    """Clocks an instruction and scheduler: fitted to Triton's attention with 8 warps in step."""
    exponential: float = 8.0
    """Clocks of the MUFU unit for a warp: 4 lanes a scheduler and clock."""
    hmma: float = 6.4
    """Clocks of a warp's mma.sync 16x8x16, which Hopper runs at 5/8 of wgmma's rate."""
    shared: float = 0.4
    """The part of shared memory's clocks that nothing hides; wgmma's own are counted with it."""
    overlap: float = 0.9
    """Of tensor cores and the rest, what does not overlap where groups of warps run apart,"""
    overlap_pipelined: float = 0.7
    """where a warpgroup also has instructions to issue while its own product runs,"""
    pipelined_share: float = 0.25
    """at least this part of an iteration;"""
    overlap_wait: float = 0.1
    """and more for each wait for a product past two."""
    latency: float = 550.0
    """Clocks until a load's first bytes are there."""
    load_bytes: float = 100.0
    """A clock, once they come, for a load that nothing hides."""
    launch: float = 1000.0
    """Clocks of a program besides its instructions: its start, and its first and last accesses."""
    streaming: float = 0.7
    """Of a row kernel's instructions, what one block does not hide behind its own copies,"""
    streaming_start: float = 600.0
    """and the clocks until its first bytes come; other blocks of the multiprocessor share both."""
    head: float = 1100.0
    """The same when a program turns to another head: two loads that wait for each other."""


CONSTANTS = Constants()


class Clocks(NamedTuple):
    """Of an iteration, for all warps of a multiprocessor together."""

    tensor: float
    other: float
    exposed: float
    total: float


@dataclass(frozen=True)
class Compiled:
    """What the model knows of a compiled kernel."""

    kernel: str
    loops: tuple[Loop, ...]
    outer: tuple[Loop, ...]
    once: int
    constants: Mapping[str, Any]
    registers: int
    shared: int
    threads: int
    warps: int
    """That run a loop with products in step."""
    streams: int
    """Such groups in a block: the consumers of a warp-specialised kernel."""
    stages: int

    @classmethod
    def of(cls, usage: Mapping[str, Any]) -> "Compiled":
        """From what :func:`benchmarks.lib.compiling.compile_only` found."""
        return cls(
            kernel=usage["kernel"],
            loops=tuple(map(Loop.parse, usage["loops"])),
            outer=tuple(map(Loop.parse, usage["outer"])),
            **{name: usage[name] for name in ("once", "constants", "registers", "shared", "threads")},
            **{name: usage[name] for name in ("warps", "streams", "stages")},
        )

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at a time."""
        a_warp = math.ceil(self.registers * 32 / 256) * 256
        by_registers = 65536 // (a_warp * self.threads // 32)
        by_shared = 228 * 1024 // (self.shared + 1024)
        return max(1, min(by_registers, by_shared, 2048 // self.threads))

    @property
    def products(self) -> list[Loop]:
        """The innermost loops with products."""
        return [loop for loop in self.loops if loop.mma or loop["hmma"] or loop["tcgen05"]]


def tensor_clocks(loop: Loop, constants: Constants = CONSTANTS) -> float:
    """Of one warpgroup's products: a 64 x n x 16 takes n / 2 by arithmetic, and n / 4 (the first
    factor from shared memory: 16 more) by what it reads from shared memory.
    """
    wgmma = sum(
        count * max(shape.n / 2, shape.n / 4 + (0 if shape.from_registers else 16)) for shape, count in loop.mma.items()
    )
    return wgmma + loop["hmma"] * constants.hmma


def clocks(loop: Loop, kernel: Compiled, tile_bytes: float, constants: Constants = CONSTANTS) -> Clocks:
    """An iteration of a loop, of every block that a multiprocessor holds.

    Args:
        loop: one of the kernel's.
        kernel: gives the warps, and what overlaps.
        tile_bytes: what a block asks memory for in an iteration.
        constants: of the model.
    """
    blocks = kernel.blocks
    streams = blocks * kernel.streams
    groups = streams * kernel.warps / 4
    tensor = groups * tensor_clocks(loop, constants)
    issue = groups * constants.issue * loop.instructions
    exponentials = groups * constants.exponential * loop["mufu"]
    words = groups * 4 * (loop.shared_words + loop["ldl"] + loop["stl"])
    other = max(issue, exponentials) + constants.shared * words
    apart = 1.0
    if streams > 1:
        share = min(1.0, loop.under_mma / loop.instructions / constants.pipelined_share)
        apart = constants.overlap - share * (constants.overlap - constants.overlap_pipelined)
        apart = min(1.0, apart + constants.overlap_wait * max(0, loop["mma_waits"] - 2))
    busy = max(tensor, other) + apart * min(tensor, other)
    wait = constants.latency + tile_bytes / constants.load_bytes
    exposed = loop.synchronous_loads * constants.latency
    if loop.synchronous_loads:
        exposed += tile_bytes / constants.load_bytes
    if loop.loads and kernel.stages <= 2:  # asked for at the end of an iteration, waited for at the next's start
        exposed += max(0.0, wait - min(loop.loads) * constants.issue * kernel.warps / 4)
    exposed /= streams  # others go on meanwhile
    return Clocks(tensor, other, exposed, max(busy + exposed, blocks * tile_bytes / constants.l2_bytes))


# --- From iterations to a kernel ------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A layer's attention."""

    head_dim: int
    v_head_dim: int
    group: int
    """Signal heads a noise head."""
    noise_heads: int
    tokens: int
    """Of a sequence."""
    batch: int = 1
    window: int | None = None
    """Keys that a query sees, its own included; None is all before it."""
    causal: bool = True
    noise: bool = True
    """False is softmax attention, ``noise_heads`` groups of ``group`` heads."""

    @property
    def maps(self) -> int:
        """Of a group."""
        return self.group + self.noise

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key, of one head of one sequence."""
        if not self.causal:
            return self.tokens**2
        window = min(self.window or self.tokens, self.tokens)
        return window * (window + 1) // 2 + (self.tokens - window) * window

    def tiles(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """For each tile of ``rows`` queries: (whole, cut) tiles of ``columns`` keys that it sees.

        Keys see the same numbers of queries, in the opposite order.
        """
        if not self.causal:
            return [(math.ceil(self.tokens / columns), 0)] * math.ceil(self.tokens / rows)
        found = []
        for first in range(0, self.tokens, rows):
            last = min(first + rows, self.tokens) - 1
            begin = 0 if self.window is None else max(0, first - self.window + 1)
            full = 0 if self.window is None else max(0, last - self.window + 1)
            tiles = math.ceil((last + 1) / columns) - begin // columns
            whole = max(0, (first + 1) // columns - math.ceil(full / columns))
            found.append((whole, tiles - whole))
        return found


class Part(NamedTuple):
    """A kernel's predicted time, and what its main loop does."""

    seconds: float
    main: Clocks
    blocks: int
    tflops: float
    """Of the main loop alone: what its tiles are worth, on every multiprocessor."""


def attention_kernel(kernel: Compiled, shape: Shape, constants: Constants = CONSTANTS) -> Part:
    """The predicted time of one launch of an attention kernel.

    Raises:
        ValueError: the model does not know the kernel; add it to WALKS.
    """
    walk = WALKS.get(kernel.kernel.rpartition(".")[2])
    if walk is None:
        raise ValueError(f"{kernel.kernel}: the static model has no walk for it; add one to WALKS in {__name__}")
    return walk(kernel, shape, constants)


def _makespan(programs: Iterable[tuple[float, int]], slots: int) -> float:
    """Clocks until all are done: each slot takes the next of (clocks, how often), in order."""
    free = [0.0] * slots
    for each, times in programs:
        for _ in range(times):
            heapq.heapreplace(free, free[0] + each)
    return max(free)


def _finish(
    kernel: Compiled,
    main: Clocks,
    flops: float,
    programs: Iterable[tuple[float, int]],
    constants: Constants,
) -> Part:
    blocks = kernel.blocks
    longest = _makespan(sorted(programs, reverse=True), constants.multiprocessors * blocks)
    rate = blocks * flops * constants.multiprocessors * constants.clock / main.total
    return Part(longest / constants.clock, main, blocks, rate * 1e-12)


def _whole_and_cut(loops: Iterable[Loop]) -> tuple[Loop, Loop]:
    """Of loops that do the same: the one without a mask is the shortest."""
    found = sorted(loops, key=lambda loop: loop.instructions)
    return found[0], found[-1]


def _issue(kernel: Compiled, instructions: float, constants: Constants) -> float:
    return instructions * constants.issue * kernel.warps * kernel.streams / 4


def _tile(kernel: Compiled) -> tuple[int, int]:
    """Queries and keys of a tile: constants of most kernels; a warp-specialised forward's follow
    from its consumers, 64 rows each, and from the keys that S = Q K^T has.
    """
    if {"BLOCK_M", "BLOCK_N"} <= kernel.constants.keys():
        return kernel.constants["BLOCK_M"], kernel.constants["BLOCK_N"]
    keys = max(shape.n for loop in kernel.products for shape in loop.mma if not shape.from_registers)
    return 16 * kernel.warps * kernel.streams, keys


def _forward(kernel: Compiled, shape: Shape, constants: Constants) -> Part:
    """A program is a tile of queries of a group, and walks over the keys once a map."""
    m, n = _tile(kernel)
    maps = shape.maps if kernel.constants.get("GROUPED", True) else 1
    whole, cut = _whole_and_cut(kernel.products)
    width = shape.head_dim + shape.v_head_dim
    a, b = (clocks(loop, kernel, n * width * 2, constants) for loop in (whole, cut))
    own = [kernel.outer[i].instructions for i in {loop.parent for loop in kernel.products} if i is not None]
    head = constants.head + _issue(kernel, max(own, default=0), constants)
    once = constants.launch + _issue(kernel, kernel.once, constants)
    groups = shape.noise_heads * shape.batch * shape.maps // maps
    programs = [(once + maps * (head + x * a.total + y * b.total), groups) for x, y in shape.tiles(m, n)]
    return _finish(kernel, a, 2 * m * n * width, programs, constants)


def _keys(kernel: Compiled, shape: Shape, constants: Constants) -> Part:
    """A program is a tile of keys of a group, and walks over the queries once a head, of both maps
    at a time where a noise head has one signal head; for gradients of keys, of values, or of both.
    """
    m, n = _tile(kernel)
    d, dv, flags = shape.head_dim, shape.v_head_dim, kernel.constants
    both = flags.get("BOTH_MAPS", shape.group == 1 and shape.noise)
    whole, cut = _whole_and_cut(kernel.products)
    maps = 2 if both else 1
    tile_bytes = 2 * m * (maps * d + dv)
    a, b = (clocks(loop, kernel, tile_bytes, constants) for loop in (whole, cut))
    own = [kernel.outer[i].instructions for i in {loop.parent for loop in kernel.products} if i is not None]
    head = constants.head + _issue(kernel, max(own, default=0), constants)
    once = constants.launch + _issue(kernel, kernel.once, constants)
    heads = shape.maps // maps
    programs = [
        (once + heads * (head + x * a.total + y * b.total), shape.noise_heads * shape.batch)
        for x, y in shape.tiles(n, m)
    ]
    flops = maps * d + (maps * d + dv) * flags.get("WITH_K", True) + dv * flags.get("WITH_V", True)
    return _finish(kernel, a, 2 * m * n * flops, programs, constants)


def _queries(kernel: Compiled, shape: Shape, constants: Constants) -> Part:
    """A program is a tile of queries of a head, both maps of it where they share dP."""
    m, n = _tile(kernel)
    d, dv = shape.head_dim, shape.v_head_dim
    both = bool(kernel.constants.get("BOTH_MAPS"))
    whole, cut = _whole_and_cut(kernel.products)
    tile_bytes = 2 * n * ((2 * d if both else d) + dv)
    a, b = (clocks(loop, kernel, tile_bytes, constants) for loop in (whole, cut))
    once = constants.launch + constants.head + _issue(kernel, kernel.once, constants)
    programs_each = shape.noise_heads * shape.batch * (1 if both else shape.maps)
    programs = [(once + x * a.total + y * b.total, programs_each) for x, y in shape.tiles(m, n)]
    return _finish(kernel, a, 2 * m * n * ((4 * d if both else 2 * d) + dv), programs, constants)


def _one_pass(kernel: Compiled, shape: Shape, constants: Constants) -> Part:
    """FlashAttention-3's backward pass: a tile of keys of a head, all five products of a query."""
    m, n = _tile(kernel)
    d, dv = shape.head_dim, shape.v_head_dim
    whole, cut = _whole_and_cut(kernel.products)
    tile_bytes = m * (2 * (d + dv) + 4 * d)  # dQ leaves in float32
    a, b = (clocks(loop, kernel, tile_bytes, constants) for loop in (whole, cut))
    once = constants.launch + constants.head + _issue(kernel, kernel.once, constants)
    heads = shape.noise_heads * shape.batch * shape.maps
    programs = [(once + x * a.total + y * b.total, heads) for x, y in shape.tiles(n, m)]
    part = _finish(kernel, a, 2 * m * n * (3 * d + 2 * dv), programs, constants)
    # Before it, <dO, O>; after it, dQ from float32.
    moved = heads * shape.tokens * (2 * 2 * dv + 4 * d + (4 + 2) * d)
    return part._replace(seconds=part.seconds + moved / constants.memory_bytes_per_second)


def _one_pass_of_groups(kernel: Compiled, shape: Shape, constants: Constants) -> Part:
    """The Gluon backward pass: a program is a tile of keys, and walks over the queries of all heads
    that share them; again for each further piece of values. The noise map is a launch of its own.
    """
    streams, rows = kernel.streams, 16 * kernel.warps
    d, dv = shape.head_dim, shape.v_head_dim
    sweeps = {loop.signature: loop for loop in sorted(kernel.products, key=lambda loop: -loop.instructions)}
    pieces = 1 if len(sweeps) == 1 else dv // max(n.n for n in min(sweeps.values(), key=_work).mma if n.from_registers)
    first, last = max(sweeps.values(), key=_work), min(sweeps.values(), key=_work)
    a = clocks(first, kernel, rows * (2 * (d + dv) + 4 * d), constants)  # dQ leaves in float32
    b = clocks(last, kernel, rows * 2 * (d + dv), constants)
    main = Clocks(*(x + (pieces - 1) * y for x, y in zip(a, b, strict=True)))
    once = constants.launch + constants.head + _issue(kernel, kernel.once, constants)
    tiles = [x + y for x, y in shape.tiles(rows * streams, rows)]
    programs = [
        (once + heads * n * main.total, shape.noise_heads * shape.batch) for n in tiles for heads in _groups(shape)
    ]
    part = _finish(kernel, main, 2 * rows * rows * streams * (3 * d + 2 * dv), programs, constants)
    # dQ from zeros in float32 to its dtype; dV of one map in float32, and the other added to it.
    queries, maps = shape.noise_heads * shape.maps, len(_groups(shape))
    of_a_key = shape.noise_heads * (maps * 2 * d + (2 + 8 * (maps - 1)) * dv)
    moved = shape.tokens * shape.batch * (queries * d * (4 + 4 + 2) + of_a_key)
    return part._replace(seconds=part.seconds + moved / constants.memory_bytes_per_second)


def _groups(shape: Shape) -> list[int]:
    return [shape.group, 1] if shape.noise else [shape.group]


def _work(loop: Loop) -> float:
    return tensor_clocks(loop)


WALKS: dict[str, Callable[[Compiled, Shape, Constants], Part]] = {
    "_backward_kernel": _one_pass_of_groups,
    "_forward_kernel": _forward,
    "_keys_kernel": _keys,
    "_queries_kernel": _queries,
    "_attention_kernel": _forward,
    "flash_forward": _forward,
    "flash_backward": _one_pass,
}
"""How a kernel, by its name, goes through the tiles."""


# --- A layer --------------------------------------------------------------------------------------


def layer(usages: Iterable[Mapping[str, Any]], shape: Shape, constants: Constants = CONSTANTS) -> dict[str, Part]:
    """The predicted time of a layer's attention, each kernel of both directions by its name.

    Args:
        usages: what compiling the layer's forward and backward passes found.
        shape: of the layer.
        constants: of the model.
    """
    found = {}
    for usage in usages:
        name = usage["kernel"]
        if name.rpartition(".")[2] in WALKS:
            found[variant(usage)] = attention_kernel(Compiled.of(usage), shape, constants)
        elif name.endswith("._prepare_kernel"):
            kernel = Compiled.of(usage)
            share = head_rows(kernel, shape.group, shape.v_head_dim).share(kernel, constants)
            seconds = prepare_bytes(shape) / constants.memory_bytes_per_second / share
            found[name] = Part(seconds, Clocks(0.0, 0.0, 0.0, 0.0), kernel.blocks, 0.0)
    return found


def variant(usage: Mapping[str, Any]) -> str:
    """A kernel's name, with what it is for where it is launched more than once with different work:
    gradients of keys and of values. (Launches for signal and for noise heads are one variant.)
    """
    flags = (flag for flag in ("WITH_K", "WITH_V") if usage["constants"].get(flag))
    return " ".join([usage["kernel"], *flags])


def prepare_bytes(shape: Shape) -> int:
    """What the epilogue's backward pass moves: gradient, A and O2 in, dA and dO2 out."""
    heads = 3 * shape.group * shape.noise_heads + 2 * shape.noise_heads * shape.noise
    return 2 * heads * shape.v_head_dim * shape.tokens * shape.batch


class Stream(NamedTuple):
    """What a program of a kernel that makes one row from others moves and does."""

    moved: int
    """Bytes, to and from memory."""
    again: int
    """Bytes that come a second time, from the L2."""
    instructions: float
    """Of a warp."""

    def share(self, kernel: Compiled, constants: Constants = CONSTANTS) -> float:
        """The predicted part of a copy's bandwidth."""
        per_clock = constants.memory_bytes_per_second / constants.multiprocessors / constants.clock
        memory = self.moved / per_clock
        issue = self.instructions * kernel.threads / 32 / 4
        waits = (constants.streaming * min(memory, issue) + constants.streaming_start) / kernel.blocks
        return memory / (max(memory, issue) + self.again / constants.l2_bytes + waits)


def poly_norm(kernel: Compiled, columns: int) -> Stream:
    """PolyNorm times ``up``, in 16 bits: a row that fits is read once, else twice."""
    arrays = 5 if "backward" in kernel.kernel else 3
    rows, passes = kernel.constants.get("ROWS", 1), 1 if kernel.constants["ONE_BLOCK"] else columns // _block(kernel)
    instructions = kernel.once + passes * sum(loop.instructions for loop in kernel.loops)
    row = 2 * columns * rows
    return Stream(arrays * row, 0 if passes == 1 else (arrays + 1) // 2 * row, instructions)


def _block(kernel: Compiled) -> int:
    block: int = kernel.constants["BLOCK"]
    return block


def head_rows(kernel: Compiled, group: int, width: int) -> Stream:
    """The epilogue's kernels: (signals, noise) in, the output out; backward as its gradients."""
    pairs, tiles = kernel.constants["PAIRS"], kernel.constants.get("TILES", 1)
    backward = tiles > 1
    arrays = 3 * group + 2 if backward else 2 * group + 1
    inner = sum(loop.instructions for loop in kernel.loops) * (group if kernel.outer else 1)
    each = inner + sum(loop.instructions for loop in kernel.outer)
    return Stream(2 * arrays * width * pairs * tiles, 0, kernel.once + tiles * each)
