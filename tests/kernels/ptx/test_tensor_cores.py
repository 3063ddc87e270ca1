"""Matrix instructions by the layouts that PTX documents, against plain products."""

import pytest
import torch

from tests.kernels.ptx.program import Fault
from tests.kernels.ptx.snippets import run

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def store_all(first: int, count: int, pointer: str, threads: int) -> str:
    """Register i of thread t to element i * threads + t."""
    at = f"mul.wide.u32 %rd20, %r0, 4; add.s64 %rd20, %rd20, {pointer};"
    return at + "".join(f"st.global.b32 [%rd20+{4 * threads * i}], %r{first + i};" for i in range(count))


def load_all(first: int, count: int, pointer: str, threads: int) -> str:
    at = f"mul.wide.u32 %rd20, %r0, 4; add.s64 %rd20, %rd20, {pointer};"
    return at + "".join(f"ld.global.b32 %r{first + i}, [%rd20+{4 * threads * i}];" for i in range(count))


def to_shared(size: int, threads: int, pointer: str, offset: int = 0) -> str:
    """``size`` bytes of a tensor to shared memory, 16 bytes a thread at a time."""
    code = [
        f"shl.b32 %r300, %r0, 4; cvt.u64.u32 %rd21, %r300; add.s64 %rd21, %rd21, {pointer};",
        f"mov.b32 %r301, global_smem; add.s32 %r300, %r300, %r301; add.s32 %r300, %r300, {offset};",
    ]
    for at in range(0, size, 16 * threads):
        code.append(f"ld.global.v4.b32 {names(302, 4)}, [%rd21+{at}]; st.shared.v4.b32 [%r300+{at}], {names(302, 4)};")
    return "\n".join(code)


def lane_pairs(matrix: torch.Tensor) -> torch.Tensor:
    """An 8 by 8 matrix of halves as ldmatrix hands it out: lane t has row t / 4, its pair t % 4."""
    return matrix.reshape(32, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    x = torch.arange(256, dtype=torch.int16)  # four matrices of eight rows of 16 bytes, one after the other
    out = torch.zeros(4, 32, dtype=torch.int32)
    form = ".trans" if transposed else ""
    run(
        f"""{to_shared(512, 32, "%rd1")} bar.sync 0;
        shl.b32 %r1, %r0, 4; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2;
        ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {names(10, 4)}, [%r1]; {store_all(10, 4, "%rd2", 32)}""",
        x,
        out,
    )
    for i, matrix in enumerate(x.view(4, 8, 8)):
        expected = lane_pairs(matrix.T.contiguous() if transposed else matrix)
        assert torch.equal(out[i].view(torch.int16).view(32, 2), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_inverse_of_ldmatrix(transposed):
    x, out = torch.arange(256, dtype=torch.int16), torch.zeros(4, 32, dtype=torch.int32)
    form = ".trans" if transposed else ""
    run(
        f"""{to_shared(512, 32, "%rd1")} bar.sync 0;
        shl.b32 %r1, %r0, 4; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2;
        ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {names(10, 4)}, [%r1];
        stmatrix.sync.aligned.m8n8.x4{form}.shared.b16 [%r1+512], {names(10, 4)}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {names(10, 4)}, [%r1+512]; {store_all(10, 4, "%rd2", 32)}""",
        x,
        out,
    )
    for i, matrix in enumerate(x.view(4, 8, 8)):
        assert torch.equal(out[i].view(torch.int16).view(32, 2), lane_pairs(matrix))


@pytest.mark.parametrize("kind", HALVES)
def test_mma(kind):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(HALVES[kind]), torch.randn(16, 8).to(HALVES[kind])
    c = torch.randn(16, 8)
    lane = torch.arange(32)
    row, pair = lane // 4, lane % 4 * 2
    # Registers of A: rows 0 to 7, then 8 to 15, of the left half of columns, then the right.
    a_parts = [torch.stack([a[row + 8 * (i % 2), pair + h + 8 * (i // 2)] for h in (0, 1)], 1) for i in range(4)]
    b_parts = [torch.stack([b[pair + h + 8 * i, row] for h in (0, 1)], 1) for i in range(2)]
    c_parts = [c[row + 8 * (i // 2), pair + i % 2] for i in range(4)]
    out = torch.zeros(4, 32)
    packed = [torch.stack(parts).contiguous() for parts in (a_parts, b_parts, c_parts)]
    run(
        load_all(10, 4, "%rd1", 32)
        + load_all(20, 2, "%rd2", 32)
        + load_all(30, 4, "%rd3", 32)
        + f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {names(40, 4)}, {names(10, 4)}, {names(20, 2)}, "
        + f"{names(30, 4)};"
        + store_all(40, 4, "%rd4", 32),
        *packed,
        out,
    )
    expected = a.double() @ b.double() + c
    for i in range(4):
        torch.testing.assert_close(out[i].double(), expected[row + 8 * (i // 2), pair + i % 2], rtol=1e-5, atol=1e-5)


# --- wgmma ----------------------------------------------------------------------------------------


def swizzle(tile: torch.Tensor) -> torch.Tensor:
    """Rows of 64 halves with the 128-byte swizzle: chunk c of row r stands at c xor r % 8."""
    rows = torch.arange(len(tile))[:, None]
    chunks = tile.view(len(tile), 8, 8)
    return chunks[rows, torch.arange(8)[None] ^ rows % 8].reshape(len(tile), 64).contiguous()


DESCRIPTOR = f"""mov.b32 %r1, global_smem; bfe.u32 %r1, %r1, 4, 14; cvt.u64.u32 %rd30, %r1;
    or.b64 %rd30, %rd30, {1 << 62 | (1024 >> 4) << 32 | 1 << 16};"""  # 128-byte swizzle; 8 rows are 1,024 bytes
FENCE = "fence.proxy.async; bar.sync 0;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


def product(
    n: int, kind: str, transposed: int, *, fence: str = FENCE, after: str = "", wait: str = WAIT, accumulators: str = ""
) -> str:
    """(64, 64) by (64, n): A at the start of shared memory, B 8 KB behind it."""
    code = [to_shared(8192, 128, "%rd1"), to_shared(128 * n, 128, "%rd2", 8192), fence, DESCRIPTOR]
    code.append(f"wgmma.fence.sync.aligned; {accumulators}")
    for k in range(4):  # 16 columns of K are 32 bytes of a row, or 16 rows of 128 bytes
        code.append(f"add.s64 %rd31, %rd30, {2 * k}; add.s64 %rd32, %rd30, {512 + (128 * k if transposed else 2 * k)};")
        code.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {names(100, n // 2)}, %rd31, %rd32, "
            f"{'%p1' if k else 0}, 1, 1, 0, {transposed};"
        )
    code[4] = "mov.pred %p1, -1; " + code[4]
    return "\n".join([*code, "wgmma.commit_group.sync.aligned;", after, wait, store_all(100, n // 2, "%rd3", 128)])


def operands(n: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(n)
    return torch.randn(64, 64).to(HALVES[kind]), torch.randn(n, 64).to(HALVES[kind]), torch.zeros(n // 2, 128)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(("n", "kind"), [(16, "bf16"), (64, "f16"), (64, "bf16")])
def test_wgmma(n, kind, transposed):
    a, b, out = operands(n, kind)
    if transposed and n != 64:
        pytest.skip("a row of 64 columns of N")
    run(
        product(n, kind, transposed),
        swizzle(a),
        swizzle(b.T.contiguous() if transposed else b),
        out,
        threads=128,
        shared=16384,
    )
    expected = a.double() @ b.double().T
    thread, i = torch.arange(128), torch.arange(n // 2)[:, None]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
    column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
    torch.testing.assert_close(out.double(), expected[row, column], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"accumulators": "mov.b32 %r100, 0;"}, "no wgmma.fence since"),
        ({"fence": "bar.sync 0;"}, "without a fence for the asynchronous proxy"),
        ({"fence": "fence.proxy.async;"}, "wgmma races with a write"),
        ({"wait": ""}, "not waited for"),
        ({"after": "add.f32 %r9, %r101, %r101;"}, "not waited for"),
        ({"after": "mov.b32 %r2, global_smem; st.shared.b32 [%r2], 0;"}, "an unfinished wgmma"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "not waited for"),
    ],
)
def test_wgmma_needs_its_fence_and_its_wait(changes, fault):
    a, b, out = operands(16, "bf16")
    with pytest.raises(Fault, match=fault):
        run(product(16, "bf16", 0, **changes), swizzle(a), swizzle(b), out, threads=128, shared=16384)


def test_wgmma_reads_no_further_than_shared_memory():
    a, b, out = operands(16, "bf16")
    code = product(16, "bf16", 0).replace("add.s64 %rd32, %rd30, 512;", "add.s64 %rd32, %rd30, 1000;")
    with pytest.raises(Fault, match="outside of shared memory"):
        run(code, swizzle(a), swizzle(b), out, threads=128, shared=16384)
