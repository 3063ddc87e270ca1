"""Arithmetic, comparisons, conversions and moves between registers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.binding import Binder, Step, instruction
from tests.kernels.ptx.program import elements

COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f32_to_half(x: np.ndarray, type: str) -> np.ndarray:
    """The bits of float32 numbers rounded to "bf16" or "f16"."""
    return f32_to_bf16(x) if type == "bf16" else x.astype(np.float16).view(np.uint16)


def half_to_f32(bits: np.ndarray, type: str) -> np.ndarray:
    return bf16_to_f32(bits) if type == "bf16" else bits.view(np.float16).astype(np.float32)


def packed(b: Binder, function: Callable[..., np.ndarray]) -> Step:
    """An operation on two, or one, half-precision numbers in a register, each rounded once."""
    pair = b.ins.type.endswith("x2")
    kind = b.ins.type.removesuffix("x2")
    width = "b32" if pair else "b16"
    sources = [b.read(o, width) for o in b.operands[1:]]

    def value() -> np.ndarray:
        halves = [np.ascontiguousarray(s).view(np.uint16) for s in sources]
        wide = [half_to_f32(h, kind).astype(np.float64) for h in halves]
        return f32_to_half(function(*wide).astype(np.float32), kind).view(sources[0].dtype)

    return b.assign(b.write(b.operands[0], width), value)


def pair(b: Binder, function: Callable[..., np.ndarray]) -> Step:
    """An operation on the two float32 numbers of 64-bit registers."""
    sources = [b.read(o, "b64") for o in b.operands[1:]]

    def value() -> np.ndarray:
        parts = [np.ascontiguousarray(s).view(np.float32).astype(np.float64) for s in sources]
        return function(*parts).astype(np.float32).view(np.uint64)

    return b.assign(b.write(b.operands[0], "b64"), value)


def mixed(b: Binder, function: Callable[..., np.ndarray]) -> Step:
    """Halves with a float32 as the last source, rounded once."""
    kind = b.ins.type
    *halves, last = b.operands[1:]
    raw, number = [b.read(o, "b16") for o in halves], b.read(last, "f32")

    def value() -> np.ndarray:
        wide = [half_to_f32(np.ascontiguousarray(r), kind).astype(np.float64) for r in raw]
        return function(*wide, number.astype(np.float64))

    return b.assign(b.write(b.operands[0], "f32"), value)


def binary(*names: str, ufunc: np.ufunc, number_ufunc: np.ufunc | None = None) -> None:
    """Operations that NumPy has; ``number_ufunc`` is for floats unless NaN is to be kept."""

    @instruction(*names)
    def build(b: Binder) -> Step:
        kind = b.ins.type
        function = number_ufunc if number_ufunc and kind.startswith(("f", "bf")) and not b.has("NaN") else ufunc
        if kind in ("bf16", "f16") and b.has("f32"):
            return mixed(b, function)
        if kind in ("bf16", "f16", "bf16x2", "f16x2"):
            return packed(b, function)
        if kind == "f32x2":
            return pair(b, function)
        if b.has("relu"):
            sources = [b.read(o, kind) for o in b.operands[1:]]
            return b.assign(b.write(b.operands[0], kind), lambda: np.maximum(function(*sources), 0))
        if len(b.operands) == 4:  # of three numbers
            x, y, z = (b.read(o, kind) for o in b.operands[1:])
            return b.assign(b.write(b.operands[0], kind), lambda: function(function(x, y), z))
        return b.elementwise(function, [kind] * (len(b.operands) - 1), kind)


binary("add", ufunc=np.add)
binary("sub", ufunc=np.subtract)
binary("max", ufunc=np.maximum, number_ufunc=np.fmax)
binary("min", ufunc=np.minimum, number_ufunc=np.fmin)
binary("and", ufunc=np.bitwise_and)
binary("or", ufunc=np.bitwise_or)
binary("xor", ufunc=np.bitwise_xor)
binary("not", ufunc=np.invert)
binary("neg", ufunc=np.negative)
binary("abs", ufunc=np.absolute)
binary("ex2", ufunc=np.exp2)
binary("lg2", ufunc=np.log2)
binary("sqrt", ufunc=np.sqrt)
binary("tanh", ufunc=np.tanh)
binary("sin", ufunc=np.sin)
binary("cos", ufunc=np.cos)


@instruction("rcp", "rsqrt")
def reciprocal(b: Binder) -> Step:
    x = b.read(b.operands[1], b.ins.type)
    one = x.dtype.type(1)
    value = (lambda: one / x) if b.parts[0] == "rcp" else (lambda: one / np.sqrt(x))
    return b.assign(b.write(b.operands[0], b.ins.type), value)


@instruction("mul", "mul24")
def multiply(b: Binder) -> Step:
    kind = b.ins.type
    if b.has("wide"):
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        x, y = (b.read(o, kind) for o in b.operands[1:])
        out = b.write(b.operands[0], wide)
        return b.assign(out, lambda: np.multiply(x, y, dtype=out.dtype))
    if b.has("hi"):
        x, y = (b.read(o, kind) for o in b.operands[1:])
        if kind[1:] == "64":
            return b.assign(b.write(b.operands[0], kind), lambda: _high_64(x, y, kind[0] == "s"))
        shift = int(kind[1:])
        wide_type = np.int64 if kind[0] == "s" else np.uint64
        return b.assign(b.write(b.operands[0], kind), lambda: np.multiply(x, y, dtype=wide_type) >> shift)
    if kind in ("bf16", "f16", "bf16x2", "f16x2"):
        return packed(b, np.multiply)
    if kind == "f32x2":
        return pair(b, np.multiply)
    return b.elementwise(np.multiply, [kind, kind], kind)


def _high_64(x: np.ndarray, y: np.ndarray, signed: bool) -> np.ndarray:
    products = [int(i) * int(j) >> 64 for i, j in zip(x, y, strict=True)]
    return np.array([p & (1 << 64) - 1 for p in products], np.uint64).view(np.int64 if signed else np.uint64)


@instruction("mad")
def multiply_add(b: Binder) -> Step:
    kind = b.ins.type
    wide = f"{kind[0]}{2 * int(kind[1:])}" if b.has("wide") else kind
    x, y = (b.read(o, kind) for o in b.operands[1:3])
    z = b.read(b.operands[3], wide)
    out = b.write(b.operands[0], wide)
    if kind[0] == "f":
        return fused(b)
    return b.assign(out, lambda: np.multiply(x, y, dtype=out.dtype) + z)


@instruction("fma")
def fused(b: Binder) -> Step:
    """One rounding: the product of two float32 is exact in float64."""
    kind = b.ins.type

    def in_float64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return x * y + z

    if kind in ("bf16", "f16") and b.has("f32"):
        return mixed(b, in_float64)
    if kind in ("bf16", "f16", "bf16x2", "f16x2"):
        function = (lambda x, y, z: np.maximum(x * y + z, 0)) if b.has("relu") else in_float64
        return packed(b, function)
    if kind == "f32x2":
        return pair(b, in_float64)
    x, y, z = (b.read(o, kind) for o in b.operands[1:])
    out = b.write(b.operands[0], kind)
    exact = np.empty(b.count)
    if b.ins.guard is None:

        def step() -> None:
            np.multiply(x, y, exact, dtype=np.float64)
            np.add(exact, z, exact)
            out[:] = exact

        return step
    return b.assign(out, lambda: np.multiply(x, y, dtype=np.float64) + z)


@instruction("div")
def divide(b: Binder) -> Step:
    kind = b.ins.type
    if kind[0] == "f":
        return b.elementwise(np.divide, [kind, kind], kind)
    x, y = (b.read(o, kind) for o in b.operands[1:])
    return b.assign(b.write(b.operands[0], kind), lambda: _truncated(x, y)[0])


@instruction("rem")
def remainder(b: Binder) -> Step:
    kind = b.ins.type
    x, y = (b.read(o, kind) for o in b.operands[1:])
    return b.assign(b.write(b.operands[0], kind), lambda: _truncated(x, y)[1])


def _truncated(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient towards zero, and what is left; by zero: all ones, as GPUs give."""
    safe = np.where(y == 0, 1, y).astype(y.dtype)
    rest = np.fmod(x, safe)
    quotient = (x - rest) // safe
    return np.where(y == 0, np.array(-1).astype(y.dtype), quotient), np.where(y == 0, x, rest)


@instruction("shl", "shr")
def shift(b: Binder) -> Step:
    kind = b.ins.type
    bits = int(kind[1:])
    x, n = b.read(b.operands[1], kind), b.read(b.operands[2], "u32")
    move = np.left_shift if b.parts[0] == "shl" else np.right_shift
    out = b.write(b.operands[0], kind)
    if not n.flags.writeable and int(n[0]) < bits and b.ins.guard is None:  # by a constant, as nearly always
        amount = n.astype(x.dtype)
        return lambda: move(x, amount, out)

    def value() -> np.ndarray:
        amount = np.minimum(n, bits - 1).astype(x.dtype)
        over = move(move(x, amount), x.dtype.type(1)) if kind[0] == "s" else np.zeros_like(x)
        return np.where(n >= bits, over, move(x, amount))

    return b.assign(out, value)


@instruction("bfe")
def extract(b: Binder) -> Step:
    """Bits from a position; sign-extended if signed."""
    kind = b.ins.type
    width = int(kind[1:])
    x = b.read(b.operands[1], f"u{width}")
    position, length = (b.read(o, "u32") for o in b.operands[2:4])

    def value() -> np.ndarray:
        n = np.minimum(length & 255, width).astype(np.uint64)
        field = (x.astype(np.uint64) >> (position & 255).astype(np.uint64)) & ((np.uint64(1) << n) - np.uint64(1))
        if kind[0] == "s":
            sign = np.uint64(1) << (np.maximum(n, 1) - np.uint64(1))
            return ((field ^ sign) - sign).astype(x.dtype)
        return field.astype(x.dtype)

    return b.assign(b.write(b.operands[0], f"u{width}"), value)


@instruction("bfi")
def insert(b: Binder) -> Step:
    width = int(b.ins.type[1:])
    x, y = (b.read(o, f"u{width}").astype for o in b.operands[1:3])
    position, length = (b.read(o, "u32") for o in b.operands[3:5])

    def value() -> np.ndarray:
        at = (position & 255).astype(np.uint64)
        mask = ((np.uint64(1) << (length & 255).astype(np.uint64)) - np.uint64(1)) << at
        return (y(np.uint64) & ~mask) | ((x(np.uint64) << at) & mask)

    return b.assign(b.write(b.operands[0], f"u{width}"), value)


@instruction("lop3")
def lop3(b: Binder) -> Step:
    x, y, z = (b.read(o, "b32") for o in b.operands[1:4])
    table = int(b.operands[4], 0)

    def value() -> np.ndarray:
        out = np.zeros_like(x)
        for row in range(8):
            if table >> row & 1:
                out |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        return out

    return b.assign(b.write(b.operands[0], "b32"), value)


@instruction("shf")
def funnel_shift(b: Binder) -> Step:
    low, high, n = (b.read(o, "u32") for o in b.operands[1:4])
    left = b.has("l")

    def value() -> np.ndarray:
        amount = (np.minimum(n, 32) if b.has("clamp") else n & 31).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return (both << amount) >> np.uint64(32) if left else both >> amount

    return b.assign(b.write(b.operands[0], "u32"), value)


@instruction("popc", "clz", "brev")
def count_bits(b: Binder) -> Step:
    width = int(b.ins.type[1:])
    x = b.read(b.operands[1], f"u{width}")
    form = f"0{width}b"
    of = {
        "popc": lambda v: bin(v).count("1"),
        "clz": lambda v: width - v.bit_length(),
        "brev": lambda v: int(format(v, form)[::-1], 2),
    }[b.parts[0]]
    kind = f"u{width}" if b.parts[0] == "brev" else "u32"
    return b.assign(b.write(b.operands[0], kind), lambda: np.array([of(int(v)) for v in x], np.uint64))


@instruction("prmt")
def permute_bytes(b: Binder) -> Step:
    x, y, selector = (b.read(o, "u32") for o in b.operands[1:4])
    everyone = np.arange(b.count)

    def value() -> np.ndarray:
        source = np.stack([x, y], 1).view(np.uint8)
        out = np.zeros((b.count, 4), np.uint8)
        for i in range(4):
            nibble = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = source[everyone, nibble & 7]
            out[:, i] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        return out.view(np.uint32)[:, 0]

    return b.assign(b.write(b.operands[0], "u32"), value)


@instruction("selp")
def select(b: Binder) -> Step:
    kind = b.ins.type
    x, y = (b.read(o, kind) for o in b.operands[1:3])
    chosen = b.read(b.operands[3], "pred")
    return b.assign(b.write(b.operands[0], kind), lambda: np.where(chosen, x, y))


@instruction("setp")
def compare(b: Binder) -> Step:
    kind, sources = b.ins.type, b.operands[1:3]
    if kind.endswith("x2"):
        return _compare_halves(b, kind.removesuffix("x2"))
    x, y = (b.read(o, kind) for o in sources)
    if kind == "bf16":
        return _compare(b, lambda: bf16_to_f32(x), lambda: bf16_to_f32(y), True)
    return _compare(b, lambda: x, lambda: y, kind[0] == "f")


def _compare_halves(b: Binder, kind: str) -> Step:
    """Two numbers of a register each, into two predicates, the low half's first."""
    test = COMPARISONS[b.parts[1]]
    if b.parts[1] == "ne" or b.ins.guard is not None:
        raise NotImplementedError(b.ins.text)
    x, y = (b.read(o, "b32") for o in b.operands[1:3])
    low, high = (b.write(name, "pred") for name in b.operands[0].split("|"))

    def step() -> None:
        halves = (half_to_f32(np.ascontiguousarray(v).view(np.uint16), kind) for v in (x, y))
        low[:], high[:] = test(*halves).reshape(-1, 2).T

    return step


def _compare(b: Binder, x: Callable[[], np.ndarray], y: Callable[[], np.ndarray], floats: bool) -> Step:
    name = b.parts[1]
    if floats and name in ("num", "nan"):
        test: Callable[[], Any] = lambda: (np.isnan(x()) | np.isnan(y())) ^ (name == "num")  # noqa: E731
    elif floats and name not in COMPARISONS:  # unordered: true of NaN
        opposite = COMPARISONS[{"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "equ": "ne", "neu": "eq"}[name]]
        test = lambda: ~(opposite(x(), y()) & ~(np.isnan(x()) | np.isnan(y())))  # noqa: E731
    elif floats and name == "ne":  # NumPy's is true of NaN
        test = lambda: (x() != y()) & ~(np.isnan(x()) | np.isnan(y()))  # noqa: E731
    elif len(b.operands) == 3 and b.ins.guard is None:
        function, out = COMPARISONS[name], b.write(b.operands[0], "pred")
        return lambda: function(x(), y(), out)
    else:
        test = lambda: COMPARISONS[name](x(), y())  # noqa: E731
    if len(b.operands) == 4:  # combined with a predicate
        other = b.read(b.operands[3].lstrip("!"), "pred")
        negated = b.operands[3].startswith("!")
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[b.parts[2]]
        return b.assign(b.write(b.operands[0], "pred"), lambda: combine(test(), other ^ negated))
    return b.assign(b.write(b.operands[0], "pred"), test)


@instruction("mov", "cvta")
def move(b: Binder) -> Step:
    to, source = b.operands
    kind = b.ins.type
    if to.startswith("{"):
        width = 8 * np.dtype(f"u{int(kind[1:]) // 8}").itemsize // len(elements(to))
        whole = b.read(source, kind)
        parts = [b.write(name, f"b{width}") for name in elements(to)]

        def unpack() -> None:
            for i, part in enumerate(parts):
                np.copyto(part, whole >> whole.dtype.type(width * i), casting="unsafe")

        return unpack
    if source.startswith("{"):
        width = int(kind[1:]) // len(elements(source))
        pieces = [b.read(name, f"b{width}") for name in elements(source)]
        out = b.write(to, kind)

        def pack() -> np.ndarray:
            return sum(piece.astype(out.dtype) << out.dtype.type(width * i) for i, piece in enumerate(pieces))

        return b.assign(out, pack)
    value, out = b.read(source, kind), b.write(to, kind)
    if b.ins.guard is None:
        return lambda: np.copyto(out, value)
    return b.assign(out, lambda: value)


@instruction("cvt")
def convert(b: Binder) -> Step:
    to, source = b.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        high, low = (b.read(o, "f32") for o in b.operands[1:3])
        kind = to.removesuffix("x2")
        relu = b.has("relu")

        def both() -> np.ndarray:
            halves = np.stack([low, high], 1)
            return f32_to_half(np.maximum(halves, 0) if relu else halves, kind).view(np.uint32)[:, 0]

        return b.assign(b.write(b.operands[0], "b32"), both)
    x = b.read(b.operands[1], source)
    if source in ("bf16", "f16"):
        raw = b.read(b.operands[1], "b16")
        if to in ("bf16", "f16"):
            return b.assign(b.write(b.operands[0], "b16"), lambda: f32_to_half(half_to_f32(raw, source), to))
        return b.assign(b.write(b.operands[0], to), lambda: half_to_f32(np.ascontiguousarray(raw), source))
    if to in ("bf16", "f16"):
        return b.assign(b.write(b.operands[0], "b16"), lambda: f32_to_half(x.astype(np.float32), to))
    out = b.write(b.operands[0], "b16" if to in ("u8", "s8") else to)
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    function = next((rounding[p] for p in b.parts if p in rounding), None)
    if source[0] == "f" and to[0] in "us":
        limits = np.iinfo(out.dtype)
        assert function
        # What is too large becomes the largest integer, and NaN 0.
        return b.assign(out, lambda: np.nan_to_num(np.clip(function(x.astype(np.float64)), limits.min, limits.max)))
    if source[0] == "f" and to[0] == "f":
        whole = function or (lambda v: v)
        return b.assign(out, (lambda: np.clip(whole(x), 0, 1)) if b.has("sat") else lambda: whole(x))
    if to in ("u8", "s8"):
        narrow = np.uint8 if to == "u8" else np.int8
        return b.assign(out, lambda: x.astype(narrow).astype(np.int16).view(np.uint16))
    return b.assign(out, lambda: x)
