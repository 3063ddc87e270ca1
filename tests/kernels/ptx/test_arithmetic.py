"""Each arithmetic instruction against Python's own numbers, or torch's."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from tests.kernels.ptx.snippets import run

DTYPES = {
    "f32": torch.float32,
    "s32": torch.int32,
    "b32": torch.int32,
    "s64": torch.int64,
    "b64": torch.int64,
    "b16": torch.int16,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
REGISTERS = {2: ("b16", "%rs"), 4: ("b32", "%r"), 8: ("b64", "%rd")}


def apply(code: str, result: str, *sources: torch.Tensor) -> torch.Tensor:
    """``code`` on every thread: {0}, {1}, ... are its sources, {out} its result."""
    threads = len(sources[0])
    out = torch.zeros(threads, dtype=DTYPES[result])
    lines, names = [], {}
    for i, tensor in enumerate([*sources, out]):
        size = tensor.element_size()
        kind, file = REGISTERS[size]
        name = f"{file}{20 + i}"
        names[i] = name
        lines.append(f"mul.wide.u32 %rd{30 + i}, %r0, {size}; add.s64 %rd{30 + i}, %rd{30 + i}, %rd{i + 1};")
        if i < len(sources):
            lines.append(f"ld.global.{kind} {name}, [%rd{30 + i}];")
    last = len(sources)
    code = code.format(*names.values(), out=names[last])
    kind = REGISTERS[out.element_size()][0]
    run("\n".join([*lines, code, f"st.global.{kind} [%rd{30 + last}], {names[last]};"]), *sources, out, threads=threads)
    return out


def wrap(value: int, bits: int = 32) -> int:
    """As a signed number of so many bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def unsigned(value: int, bits: int = 32) -> int:
    return value & (1 << bits) - 1


def single(value: Fraction | float) -> float:
    """Rounded to float32; an exact fraction once only."""
    if isinstance(value, float):
        return struct.unpack("f", struct.pack("f", value))[0]
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - 23, -149)
    scaled = value / Fraction(2) ** exponent
    return float(round(scaled) * Fraction(2) ** exponent)  # round() takes ties to even


INTEGERS = torch.tensor([0, 1, -1, 5, -7, 31, 32, 33, 255, -256, 2**31 - 1, -(2**31), 123456789, -987654321, 2, 3])
A32 = INTEGERS.repeat(16)[:256].int()
B32 = INTEGERS.repeat_interleave(16).int()

INTEGER_CASES: dict[str, Callable[[int, int], int]] = {
    "add.s32 {out}, {0}, {1};": lambda a, b: a + b,
    "sub.s32 {out}, {0}, {1};": lambda a, b: a - b,
    "mul.lo.s32 {out}, {0}, {1};": lambda a, b: a * b,
    "mul.hi.s32 {out}, {0}, {1};": lambda a, b: a * b >> 32,
    "mul.hi.u32 {out}, {0}, {1};": lambda a, b: unsigned(a) * unsigned(b) >> 32,
    "mad.lo.s32 {out}, {0}, {1}, 7;": lambda a, b: a * b + 7,
    "min.s32 {out}, {0}, {1};": min,
    "max.s32 {out}, {0}, {1}, 5;": lambda a, b: max(a, b, 5),
    "max.u32 {out}, {0}, {1};": lambda a, b: max(unsigned(a), unsigned(b)),
    "min.relu.s32 {out}, {0}, {1};": lambda a, b: max(min(a, b), 0),
    "and.b32 {out}, {0}, {1};": lambda a, b: a & b,
    "or.b32 {out}, {0}, {1};": lambda a, b: a | b,
    "xor.b32 {out}, {0}, {1};": lambda a, b: a ^ b,
    "not.b32 {out}, {0};": lambda a, b: ~a,
    "neg.s32 {out}, {0};": lambda a, b: -a,
    "abs.s32 {out}, {0};": lambda a, b: abs(a),
    "shl.b32 {out}, {0}, {1};": lambda a, b: a << unsigned(b) if unsigned(b) < 32 else 0,
    "shr.u32 {out}, {0}, {1};": lambda a, b: unsigned(a) >> min(unsigned(b), 32),
    "shr.s32 {out}, {0}, {1};": lambda a, b: a >> min(unsigned(b), 31),
    "shl.b32 {out}, {0}, 5;": lambda a, b: a << 5,
    "bfe.u32 {out}, {0}, 3, 7;": lambda a, b: unsigned(a) >> 3 & 127,
    "bfe.s32 {out}, {0}, 3, 7;": lambda a, b: wrap(a >> 3, 7),
    "bfe.u32 {out}, {0}, 0, 32;": lambda a, b: a,
    "bfi.b32 {out}, {0}, {1}, 4, 8;": lambda a, b: b & ~0xFF0 | (a & 0xFF) << 4,
    "prmt.b32 {out}, {0}, {1}, 0x5410;": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 {out}, {0}, {1}, 0x9173;": lambda a, b: (
        a >> 24 & 255 | (b >> 24 & 255) << 8 | (a >> 8 & 255) << 16 | (255 if a >> 15 & 1 else 0) << 24
    ),
    "lop3.b32 {out}, {0}, {1}, 12, 0xCA;": lambda a, b: a & b | ~a & 12,
    "shf.l.wrap.b32 {out}, {0}, {1}, 9;": lambda a, b: b << 9 | unsigned(a) >> 23,
    "popc.b32 {out}, {0};": lambda a, b: bin(unsigned(a)).count("1"),
    "clz.b32 {out}, {0};": lambda a, b: 32 - unsigned(a).bit_length(),
    "setp.lt.s32 %p1, {0}, {1}; selp.b32 {out}, 1, 0, %p1;": lambda a, b: a < b,
    "setp.lt.u32 %p1, {0}, {1}; selp.b32 {out}, 1, 0, %p1;": lambda a, b: unsigned(a) < unsigned(b),
    "setp.ge.s32 %p1, {0}, {1}; setp.ne.and.s32 %p2, {0}, 5, %p1; selp.b32 {out}, {0}, 9, %p2;": lambda a, b: (
        a if a >= b and a != 5 else 9
    ),
    "setp.eq.s32 %p1, {0}, {1}; mov.b32 {out}, 4; @%p1 add.s32 {out}, {0}, 1; @!%p1 add.s32 {out}, {0}, 2;": (
        lambda a, b: a + 1 if a == b else a + 2
    ),
    "setp.eq.s32 %p1, {0}, {1}; not.pred %p2, %p1; selp.b32 {out}, 1, 0, %p2;": lambda a, b: a != b,
    "mov.b64 %rd9, {{{0}, {1}}}; mov.b64 {{%r90, %r91}}, %rd9; sub.s32 {out}, %r91, %r90;": lambda a, b: b - a,
    "mov.b32 {{%rs1, %rs2}}, {0}; mov.b32 {out}, {{%rs2, %rs1}};": lambda a, b: unsigned(a) >> 16 | (a & 0xFFFF) << 16,
    "cvt.u16.u32 %rs1, {0}; cvt.u32.u16 {out}, %rs1;": lambda a, b: a & 0xFFFF,
    "cvt.u16.u32 %rs1, {0}; cvt.s32.s16 {out}, %rs1;": lambda a, b: wrap(a, 16),
}


@pytest.mark.parametrize("code", INTEGER_CASES)
def test_integers(code):
    out = apply(code, "s32", A32, B32)
    expected = [wrap(int(INTEGER_CASES[code](a, b))) for a, b in zip(A32.tolist(), B32.tolist(), strict=True)]
    assert out.tolist() == expected


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("div.s32 {out}, {0}, {1};", truncated),
        ("rem.s32 {out}, {0}, {1};", lambda a, b: a - b * truncated(a, b)),
        ("div.u32 {out}, {0}, {1};", lambda a, b: unsigned(a) // unsigned(b)),
    ],
)
def test_division_goes_towards_zero(code, expected):
    used = B32 != 0
    out = apply(code, "s32", A32, B32)[used].tolist()
    assert out == [wrap(expected(a, b)) for a, b in zip(A32[used].tolist(), B32[used].tolist(), strict=True)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("mul.wide.s32 {out}, {0}, {1};", lambda a, b: a * b),
        ("mul.wide.u32 {out}, {0}, {1};", lambda a, b: unsigned(a) * unsigned(b)),
        ("mad.wide.s32 {out}, {0}, {1}, -3;", lambda a, b: a * b - 3),
        ("cvt.s64.s32 {out}, {0};", lambda a, b: a),
        ("cvt.u64.u32 {out}, {0};", lambda a, b: unsigned(a)),
        ("mul.wide.u32 %rd9, {0}, {1}; cvt.u32.u64 %r99, %rd9; cvt.u64.u32 {out}, %r99;", lambda a, b: unsigned(a * b)),
        (
            "mov.b64 %rd9, {{{0}, {1}}}; mul.hi.u64 {out}, %rd9, %rd9;",
            lambda a, b: (unsigned(a) | unsigned(b) << 32) ** 2 >> 64,
        ),
        ("mov.b64 %rd9, {{{0}, {1}}}; shr.s64 {out}, %rd9, 40;", lambda a, b: (unsigned(a) | b << 32) >> 40),
    ],
)
def test_wide_integers(code, expected):
    out = apply(code, "s64", A32, B32).tolist()
    assert out == [wrap(expected(a, b), 64) for a, b in zip(A32.tolist(), B32.tolist(), strict=True)]


torch.manual_seed(0)
X = torch.cat(
    [torch.randn(240), torch.tensor([0.0, -0.0, 1, -1, 2**-126, 3e38, 1e-40, 0.5, 1.5, 2.5, 1e10, -5, 7, 1 / 3, 8, 9])]
)
Y, Z = X.flip(0).contiguous(), X.roll(77).contiguous()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.f32 {out}, {0}, {1};", lambda a, b, c: a + b),
        ("sub.f32 {out}, {0}, {1};", lambda a, b, c: a - b),
        ("mul.f32 {out}, {0}, {1};", lambda a, b, c: a * b),
        ("fma.rn.f32 {out}, {0}, {1}, {2};", lambda a, b, c: a * b + c),
        ("neg.f32 {out}, {0};", lambda a, b, c: -a),
    ],
)
def test_floats_are_rounded_once(code, expected):
    """Exact fractions rounded once; what overflows is left out."""
    out = apply(code, "f32", X, Y, Z).tolist()
    for got, *values in zip(out, X.tolist(), Y.tolist(), Z.tolist(), strict=True):
        wanted = single(expected(*map(Fraction, values)))
        if abs(wanted) < 3.4e38:
            assert got == pytest.approx(wanted, rel=1e-9 if "fma" in code else 0, abs=0), values


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("ex2.approx.ftz.f32 {out}, {0};", lambda a: 2.0**a),
        ("lg2.approx.f32 {out}, {0};", math.log2),
        ("sqrt.rn.f32 {out}, {0};", math.sqrt),
        ("rsqrt.approx.f32 {out}, {0};", lambda a: a**-0.5),
        ("rcp.rn.f32 {out}, {0};", lambda a: 1 / a),
        ("tanh.approx.f32 {out}, {0};", math.tanh),
    ],
)
def test_functions(code, function):
    x = torch.linspace(0.01, 20, 256)
    assert apply(code, "f32", x).tolist() == pytest.approx([function(a) for a in x.tolist()], rel=3e-7)


def test_the_larger_of_a_number_and_nan_is_the_number():
    x, y = torch.tensor([1.0, math.nan, math.nan]).repeat(32), torch.tensor([math.nan, 2.0, math.nan]).repeat(32)
    assert apply("max.f32 {out}, {0}, {1};", "f32", x, y)[:2].tolist() == [1.0, 2.0]
    assert apply("max.NaN.f32 {out}, {0}, {1};", "f32", x, y)[:3].isnan().all()


@pytest.mark.parametrize(
    ("name", "with_nan"), [("lt", 0), ("ltu", 1), ("ge", 0), ("geu", 1), ("ne", 0), ("neu", 1), ("eq", 0)]
)
def test_comparisons_with_nan(name, with_nan):
    x, y = torch.tensor([1.0, 1.0, 2.0, math.nan]).repeat(8), torch.tensor([1.0, 2.0, 1.0, 1.0]).repeat(8)
    out = apply(f"setp.{name}.f32 %p1, {{0}}, {{1}}; selp.b32 {{out}}, 1, 0, %p1;", "s32", x, y)[:4].tolist()
    plain = {"lt": [0, 1, 0], "ge": [1, 0, 1], "ne": [0, 1, 1], "eq": [1, 0, 0]}[name.removesuffix("u")]
    assert out == [*plain, with_nan]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_comparisons_of_halves(kind):
    x, y = torch.randn(64).to(DTYPES[kind]), torch.randn(64).to(DTYPES[kind])
    out = apply(f"setp.gt.{kind} %p1, {{0}}, {{1}}; selp.b32 {{out}}, 1, 0, %p1;", "s32", x, y)
    assert torch.equal(out.bool(), x > y)
    both = f"setp.gt.{kind}x2 %p1|%p2, {{0}}, {{1}}; selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2;"
    out = apply(f"{both} or.b32 {{out}}, %r1, %r2;", "s32", x.view(torch.int32), y.view(torch.int32))
    assert torch.equal(torch.stack([out & 1, out >> 1], 1).flatten().bool(), x > y)


HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("kind", HALVES)
def test_halves_are_rounded_as_torch_rounds(kind):
    x = torch.cat(
        [torch.randn(500) * 100, torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-6, 65520.0, 3e-8, 1 + 2**-8])]
    )
    x = torch.cat([x, x.to(HALVES[kind]).float() * (1 + 2**-9)])[:992]  # ties
    wanted = x.to(HALVES[kind])
    assert torch.equal(apply(f"cvt.rn.{kind}.f32 {{out}}, {{0}};", kind, x), wanted)
    both = apply(f"cvt.rn.{kind}x2.f32 {{out}}, {{0}}, {{1}};", "b32", x, x.flip(0).contiguous())
    assert torch.equal(both.view(HALVES[kind]).view(-1, 2), torch.stack([wanted.flip(0), wanted], 1))
    assert torch.equal(apply(f"cvt.f32.{kind} {{out}}, {{0}};", "f32", wanted), wanted.float())


def test_nan_stays_nan_in_bf16():
    x = torch.tensor([math.nan] * 32)
    assert apply("cvt.rn.bf16.f32 {out}, {0};", "bf16", x).isnan().all()


@pytest.mark.parametrize("kind", HALVES)
def test_packed_arithmetic(kind):
    x, y, z = (torch.randn(128).to(HALVES[kind]) for _ in range(3))
    a, b, c = (t.view(torch.int32) for t in (x, y, z))
    out = apply(f"fma.rn.{kind}x2 {{out}}, {{0}}, {{1}}, {{2}};", "b32", a, b, c).view(HALVES[kind])
    assert torch.equal(out, (x.double() * y.double() + z.double()).float().to(HALVES[kind]))
    assert torch.equal(apply(f"mul.{kind}x2 {{out}}, {{0}}, {{1}};", "b32", a, b).view(HALVES[kind]), x * y)


@pytest.mark.parametrize("kind", HALVES)
def test_halves_and_a_float(kind):
    x, y, z = torch.randn(128).to(HALVES[kind]), torch.randn(128).to(HALVES[kind]), torch.randn(128)
    out = apply(f"fma.rn.f32.{kind} {{out}}, {{0}}, {{1}}, {{2}};", "f32", x, y, z)
    assert torch.equal(out, (x.double() * y.double() + z.double()).float())
    out = apply(f"sub.rn.f32.{kind} {{out}}, {{0}}, {{1}};", "f32", x, z)
    assert torch.equal(out, (x.double() - z.double()).float())


def test_integers_from_floats():
    x = torch.tensor([1.5, -1.5, 2.5, 1e20, -1e20, math.nan, 0.49, 7.0] * 4)
    assert apply("cvt.rzi.s32.f32 {out}, {0};", "s32", x)[:8].tolist() == [1, -1, 2, 2**31 - 1, -(2**31), 0, 0, 7]
    assert apply("cvt.rni.s32.f32 {out}, {0};", "s32", x)[:3].tolist() == [2, -2, 2]
    assert torch.equal(apply("cvt.rn.f32.s32 {out}, {0};", "f32", A32), A32.float())
