"""Asynchronous copies and mbarriers: what arrives, and what goes wrong when nobody waits."""

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.ptx.program import Fault
from tests.kernels.ptx.snippets import run, run_with_descriptor

PLACE = "shl.b32 %r1, %r0, 4; cvt.u64.u32 %rd10, %r1; mov.b32 %r2, global_smem; add.s32 %r1, %r1, %r2;"
COPY = f"{PLACE} add.s64 %rd11, %rd10, %rd1; cp.async.cg.shared.global [%r1], [%rd11], 16;"
BACK = """ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1]; add.s64 %rd12, %rd10, %rd2;
    st.global.v4.b32 [%rd12], {%r4, %r5, %r6, %r7};"""


def numbers(count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)


def test_cp_async():
    x, out = numbers()
    run(f"{COPY} cp.async.commit_group; cp.async.wait_group 0; {BACK}", x, out, threads=64)
    assert torch.equal(x, out)


def test_cp_async_fills_with_zeros():
    x, out = numbers()
    copy, some = COPY.replace("16;", "16, %r3;"), "setp.lt.u32 %p1, %r0, 40; selp.b32 %r3, 16, 0, %p1;"
    run(
        f"{some} {copy} cp.async.commit_group; cp.async.wait_group 0; {BACK}",
        x[:160],  # what is not copied may lie outside
        out,
        threads=64,
    )
    assert torch.equal(out, torch.where(torch.arange(256) < 160, torch.arange(256), 0).int())


@pytest.mark.parametrize(
    ("wait", "fault"),
    [
        ("", "cp.async was not waited for"),
        ("cp.async.commit_group;", "cp.async was not waited for"),
        ("cp.async.commit_group; cp.async.wait_group 1;", "cp.async was not waited for"),
        ("cp.async.wait_group 0;", "cp.async was not waited for"),  # never committed
    ],
)
def test_cp_async_must_be_waited_for(wait, fault):
    with pytest.raises(Fault, match=fault):
        run(f"{COPY} {wait} {BACK}", *numbers(), threads=64)


def test_others_see_a_copy_behind_a_barrier():
    other = BACK.replace("[%r1]", "[%r8]")
    code = (
        f"xor.b32 %r8, %r0, 63; shl.b32 %r8, %r8, 4; {COPY} add.s32 %r8, %r8, %r2; cp.async.wait_all; BARRIER {other}"
    )
    x, out = numbers()
    run(code.replace("BARRIER", "bar.sync 0;"), x, out, threads=64)
    assert torch.equal(out.view(64, 4), x.view(64, 4).flip(0))
    with pytest.raises(Fault, match="races with a write"):
        run(code.replace("BARRIER", ""), *numbers(), threads=64)


# --- mbarriers ------------------------------------------------------------------------------------


def ring(*, count: int = 32, arrive: str = "mbarrier.arrive.shared::cta.b64 _, [%r20];", waits: bool = True) -> str:
    """Warp 0 hands four numbers a lane to warp 1 through one place, each way by an mbarrier."""
    wait = """{{
        .reg .pred done;
    again:
        mbarrier.try_wait.parity.shared::cta.b64 done, [{0}], {1};
        @!done bra.uni again;
    }}"""
    full, empty = (wait.format(place, "%r31") if waits else "" for place in ("%r20", "%r21"))
    return f"""
        mov.b32 %r2, global_smem; add.s32 %r20, %r2, 512; add.s32 %r21, %r2, 520;
        and.b32 %r3, %r0, 31; shl.b32 %r4, %r3, 2; add.s32 %r5, %r4, %r2;
        mul.wide.u32 %rd10, %r3, 16; add.s64 %rd11, %rd10, %rd1; add.s64 %rd12, %rd10, %rd2;
        setp.eq.u32 %p1, %r0, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%r20], {count};
        @%p1 mbarrier.init.shared::cta.b64 [%r21], 32;
        bar.sync 0;
        mov.b32 %r30, 0;
        setp.ge.u32 %p2, %r0, 32; @%p2 bra CONSUMER;
    PRODUCER:
        not.b32 %r31, %r30; and.b32 %r31, %r31, 1; {empty}
        ld.global.b32 %r6, [%rd11]; st.shared.b32 [%r5], %r6; {arrive}
        add.s64 %rd11, %rd11, 4; add.s32 %r30, %r30, 1; setp.lt.s32 %p3, %r30, 4; @%p3 bra PRODUCER;
        bra.uni END;
    CONSUMER:
        and.b32 %r31, %r30, 1; {full}
        ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd12], %r6; mbarrier.arrive.shared::cta.b64 _, [%r21];
        add.s64 %rd12, %rd12, 4; add.s32 %r30, %r30, 1; setp.lt.s32 %p3, %r30, 4; @%p3 bra CONSUMER;
    END:"""


def test_warps_hand_over_by_mbarriers():
    x, out = numbers(128)
    run(ring(), x, out, threads=64)
    assert torch.equal(x, out)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"waits": False}, "races with a (write|read)|more arrivals"),
        ({"count": 33}, r"deadlock.*33 arrivals 1 are missing"),
        ({"arrive": "mbarrier.arrive.shared::cta.b64 _, [%r20], 40;"}, "more arrivals"),
        ({"arrive": ""}, "deadlock"),
    ],
)
def test_mbarriers_that_do_not_hold(changes, fault):
    with pytest.raises(Fault, match=fault):
        run(ring(**changes), *numbers(128), threads=64)


def test_an_mbarrier_must_be_initialised_for_all():
    with pytest.raises(Fault, match=r"races with a write|no mbarrier"):
        run(ring().replace("bar.sync 0;", ""), *numbers(128), threads=64)


# --- Bulk copies ----------------------------------------------------------------------------------


def descriptor(x: torch.Tensor, rows: int, columns: int, swizzle: int) -> tuple[SimpleNamespace, dict]:
    described = SimpleNamespace(
        base=x, shape=list(x.shape), strides=list(x.stride()), block_shape=[rows, columns], padding="zero"
    )
    return described, {"block_size": [rows, columns], "swizzle": swizzle}


SETUP = """mov.b32 %r2, global_smem; add.s32 %r20, %r2, 8192; setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r20], 1; bar.sync 0;"""
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {};"
LOAD = """@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
    [%r2], [%rd60, {%r21, %r22}], [%r20];"""
WAIT = """{ .reg .pred done;
    again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r20], 0; @!done bra.uni again; }"""
OUT = "shl.b32 %r1, %r0, 4; add.s32 %r1, %r1, %r2; cvt.u64.u32 %rd10, %r1; mul.wide.u32 %rd10, %r0, 16;" + "".join(
    f"ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1+{at}]; add.s64 %rd12, %rd10, %rd1; "
    f"st.global.v4.b32 [%rd12+{at}], {{%r4, %r5, %r6, %r7}};"
    for at in (0, 1024)
)


def load_box(x, columns, swizzle, at, *, expect=EXPECT, load=LOAD, wait=WAIT, after="", bytes=2048, threads=64):
    out = torch.zeros(1024, dtype=torch.int16)
    described, meta = descriptor(x, 1024 // columns, columns, swizzle)
    start = f"mov.b32 %r21, {at[1]}; mov.b32 %r22, {at[0]};"
    code = f"{SETUP} {start} {expect.format(bytes)} {load} {wait} {OUT} {after}"
    run_with_descriptor(code, described, meta, out, threads=threads, shared=8200)
    return out


@pytest.mark.parametrize(("columns", "swizzle"), [(64, 3), (32, 2), (16, 1), (32, 0)])
@pytest.mark.parametrize("at", [(0, 0), (3, 8), (30, 40), (-2, 0)])
def test_a_bulk_copy_brings_a_box(columns, swizzle, at):
    """Outside of the tensor it is 0; 16-byte chunks are exchanged as the swizzle says."""
    x = torch.arange(1, 1 + 40 * 72, dtype=torch.int16).view(40, 72)
    out = load_box(x, columns, swizzle, at)
    rows = 1024 // columns
    expected = torch.zeros(rows, columns, dtype=torch.int16)
    for r in range(rows):
        for c in range(columns):
            if 0 <= at[0] + r < 40 and 0 <= at[1] + c < 72:
                expected[r, c] = x[at[0] + r, at[1] + c]
    place = torch.arange(1024) * 2  # bytes
    bits = {3: 7, 2: 3, 1: 1, 0: 0}[swizzle]
    moved = place ^ (place >> 7 & bits) << 4
    assert torch.equal(out[moved // 2], expected.flatten())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"wait": ""}, "mbarrier was not waited for"),
        ({"bytes": 2032}, "deadlock"),
        ({"bytes": 4096}, "deadlock.*2048 bytes"),
        ({"expect": "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r20];"}, "deadlock|more arrivals|not waited for"),
        ({"load": LOAD + LOAD}, "deadlock|races|not waited for"),
        ({"after": LOAD}, "races with a read"),
        ({"load": LOAD.replace("[%r2]", "[%r8]").replace("@%p1", "add.s32 %r8, %r2, 64; @%p1")}, "not aligned"),
    ],
)
def test_bulk_copies_that_go_wrong(changes, fault):
    x = torch.arange(40 * 72, dtype=torch.int16).view(40, 72)
    with pytest.raises(Fault, match=fault):
        load_box(x, 64, 3, (0, 0), **changes)


FILL = "shl.b32 %r1, %r0, 4; add.s32 %r1, %r1, %r2;" + "".join(
    f"mov.b32 %r4, {0x3F800000}; st.shared.v4.b32 [%r1+{at}], {{%r4, %r4, %r4, %r4}};" for at in (0, 1024)
)
STORE = "@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd60, {%r21, %r22}], [%r2];"
DONE = "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"


def store_box(code: str) -> torch.Tensor:
    x = torch.zeros(40, 24)
    described, meta = descriptor(x, 32, 16, 0)
    start = "mov.b32 %r2, global_smem; setp.eq.u32 %p1, %r0, 0; mov.b32 %r21, 12; mov.b32 %r22, 20;"
    run_with_descriptor(f"{start} {FILL} {code}", described, meta, x, threads=64, shared=2048)
    return x


def test_a_bulk_store_ends_with_the_tensor():
    x = store_box(f"fence.proxy.async; bar.sync 0; {STORE} {DONE}")
    expected = torch.zeros(40, 24)
    expected[20:, 12:] = 1
    assert torch.equal(x, expected)


def test_a_bulk_reduction_adds():
    add = STORE.replace("cp.async.bulk.tensor.2d", "cp.reduce.async.bulk.tensor.2d").replace(
        "bulk_group", "add.bulk_group"
    )
    x = store_box(f"fence.proxy.async; bar.sync 0; {add} {add} {DONE}")
    assert x[20:, 12:].eq(2).all()
    assert x.sum() == 2 * 20 * 12


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (f"bar.sync 0; {STORE} {DONE}", "without a fence"),
        (f"fence.proxy.async; {STORE} {DONE}", "races with a write"),
        (f"fence.proxy.async; bar.sync 0; {STORE}", "before its bulk stores have read"),
        (f"fence.proxy.async; bar.sync 0; {STORE} cp.async.bulk.commit_group; bar.sync 0; {FILL}", "bulk store reads"),
        (
            f"fence.proxy.async; bar.sync 0; {STORE} {DONE} bar.sync 0; ld.global.b32 %r9, [%rd1+2000];",
            "races with a write",
        ),
    ],
)
def test_bulk_stores_that_go_wrong(code, fault):
    with pytest.raises(Fault, match=fault):
        store_box(code)
