"""What threads do together: shuffles, votes, barriers, atomics; and what goes wrong without."""

import pytest
import torch

from tests.kernels.ptx.program import Fault
from tests.kernels.ptx.snippets import run

ADDRESS = "mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd10, %rd1;"  # of this thread's number
LOAD = f"{ADDRESS} ld.global.b32 %r1, [%rd11];"
STORE = "st.global.b32 [%rd11], %r2;"
SHARED = "shl.b32 %r10, %r0, 2; mov.b32 %r11, global_smem; add.s32 %r10, %r10, %r11;"


def numbers(count: int = 64) -> torch.Tensor:
    return torch.arange(100, 100 + count, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mode", "operand", "source"),
    [
        ("bfly", 3, lambda lane: lane ^ 3),
        ("idx", 7, lambda lane: 7),
        ("up", 4, lambda lane: lane - 4 if lane >= 4 else lane),
        ("down", 5, lambda lane: lane + 5 if lane < 27 else lane),
    ],
)
def test_shuffles(mode, operand, source):
    x = numbers()
    clamp = 0 if mode == "up" else 31
    run(f"{LOAD} shfl.sync.{mode}.b32 %r2, %r1, {operand}, {clamp}, -1; {STORE}", x, threads=64)
    assert x.tolist() == [100 + t // 32 * 32 + source(t % 32) for t in range(64)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("vote.sync.ballot.b32 %r2, %p1, -1;", [sum(1 << i for i in range(32) if i % 3 == 0)] * 32),
        ("vote.sync.any.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;", [1] * 32),
        ("vote.sync.all.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;", [0] * 32),
        ("redux.sync.add.s32 %r2, %r0, -1;", [496] * 32),
        ("redux.sync.max.u32 %r2, %r0, -1;", [31] * 32),
        ("rem.u32 %r3, %r0, 2; match.any.sync.b32 %r2, %r3, -1;", [0x55555555, 0xAAAAAAAA] * 16),
        ("elect.sync %r3|%p2, -1; selp.b32 %r2, 1, 0, %p2;", [1] + [0] * 31),
    ],
)
def test_votes(code, expected):
    x = numbers(32)
    run(f"{LOAD} rem.u32 %r4, %r0, 3; setp.eq.u32 %p1, %r4, 0; {code} {STORE}", x)
    assert [v & 0xFFFFFFFF for v in x.tolist()] == expected


def exchange(barrier: str) -> str:
    """Each thread of 64 stores its number and loads that of thread 63 - t."""
    return f"""{LOAD} {SHARED} st.shared.b32 [%r10], %r1; {barrier}
        sub.s32 %r12, 63, %r0; shl.b32 %r12, %r12, 2; add.s32 %r12, %r12, %r11; ld.shared.b32 %r2, [%r12]; {STORE}"""


def test_a_barrier_orders_shared_memory():
    x = numbers()
    run(exchange("bar.sync 0;"), x, threads=64)
    assert x.tolist() == list(range(163, 99, -1))


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;", "fence.proxy.async;"])
def test_a_missing_barrier_is_a_race(barrier):
    with pytest.raises(Fault, match="races with a write"):
        run(exchange(barrier), numbers(), threads=64)


def test_within_a_warp_its_own_barrier_is_enough():
    code = f"""{LOAD} {SHARED} st.shared.b32 [%r10], %r1; BARRIER
        xor.b32 %r12, %r0, 1; shl.b32 %r12, %r12, 2; add.s32 %r12, %r12, %r11; ld.shared.b32 %r2, [%r12]; {STORE}"""
    run(code.replace("BARRIER", "bar.warp.sync -1;"), numbers(), threads=64)
    with pytest.raises(Fault, match="races with a write"):
        run(code.replace("BARRIER", ""), numbers(), threads=64)


def test_overwriting_what_another_thread_reads_is_a_race():
    code = exchange("bar.sync 0;") + "BARRIER st.shared.b32 [%r10], %r2;"
    run(code.replace("BARRIER", "bar.sync 0;"), numbers(), threads=64)
    with pytest.raises(Fault, match="races with a read"):
        run(code.replace("BARRIER", ""), numbers(), threads=64)


def test_two_values_in_one_place_at_once():
    code = "mov.b32 %r11, global_smem; st.shared.b32 [%r11], {};"
    run(code.format("7"), numbers(), threads=64)
    with pytest.raises(Fault, match="different values"):
        run(code.format("%r0"), numbers(), threads=64)


@pytest.mark.parametrize("byte", [-4, 1024])
def test_shared_memory_ends(byte):
    with pytest.raises(Fault, match="outside of shared memory"):
        run(f"mov.b32 %r11, global_smem; ld.shared.b32 %r1, [%r11+{byte}];", numbers())


@pytest.mark.parametrize("byte", [-4, 256])
@pytest.mark.parametrize("code", ["ld.global.b32 %r1, [%rd1+{}];", "st.global.b32 [%rd1+{}], %r0;"])
def test_tensors_end(code, byte):
    with pytest.raises(Fault, match="out of bounds"):
        run(code.format(byte), numbers())


def test_alignment():
    with pytest.raises(Fault, match="not aligned"):
        run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+8];", numbers())


def test_masked_threads_touch_nothing():
    x = numbers(8)
    run(f"setp.lt.u32 %p1, %r0, 8; {ADDRESS} @%p1 ld.global.b32 %r1, [%rd11]; add.s32 %r2, %r1, 1; @%p1 {STORE}", x)
    assert x.tolist() == list(range(101, 109))


# --- Warps that part ------------------------------------------------------------------------------


PRODUCER = f"""{LOAD} {SHARED} setp.ge.u32 %p1, %r0, 64; @%p1 bra CONSUMER;
    st.shared.b32 [%r10], %r1; PRODUCED bra.uni END;
CONSUMER:
    CONSUMED ld.shared.b32 %r2, [%r10+-256]; {STORE}
END:"""


def test_warps_part_and_meet_at_named_barriers():
    x = numbers(128)
    produced, consumed = "bar.arrive 1, 128;", "bar.sync 1, 128;"
    run(PRODUCER.replace("PRODUCED", produced).replace("CONSUMED", consumed), x, threads=128)
    assert x.tolist() == [*range(100, 164), *range(100, 164)]


@pytest.mark.parametrize(
    ("produced", "consumed", "fault"),
    [
        ("", "", "races with a write"),
        ("", "bar.sync 1, 128;", "deadlock"),
        ("bar.arrive 2, 128;", "bar.sync 1, 128;", "deadlock"),
        ("bar.arrive 1, 96;", "bar.sync 1, 128;", "is met by"),
        ("bar.sync 1, 64;", "bar.sync 1, 64;", "races with a write"),
    ],
)
def test_warps_that_do_not_meet(produced, consumed, fault):
    with pytest.raises(Fault, match=fault):
        run(PRODUCER.replace("PRODUCED", produced).replace("CONSUMED", consumed), numbers(128), threads=128)


def test_threads_of_a_warp_may_not_part():
    with pytest.raises(Fault, match="one warp part"):
        run("setp.lt.u32 %p1, %r0, 5; @%p1 bra END; mov.b32 %r1, 0;\nEND:", numbers())


# --- Programs -------------------------------------------------------------------------------------


def test_atomics_add_up():
    x = torch.zeros(1)
    run("mov.b32 %r1, 0f3F800000; red.global.add.f32 [%rd1], %r1;", x, threads=64, grid=(3, 1, 1))
    assert x.item() == 192


def test_two_programs_may_not_write_the_same():
    with pytest.raises(Fault, match="races with a write by program 0"):
        run(f"{ADDRESS} st.global.b32 [%rd11], %r0;", numbers(), grid=(2, 1, 1))


def in_turn(wait: str, release: str) -> str:
    """Programs double a number and add theirs, the last one first."""
    return f"""mov.u32 %r5, %ctaid.x; sub.s32 %r6, 3, %r5; {ADDRESS} setp.eq.u32 %p1, %r0, 0;
AGAIN:
    {wait}
    setp.ne.s32 %p2, %r7, %r6; @%p2 bra AGAIN;
    ld.global.b32 %r1, [%rd11]; add.s32 %r2, %r1, %r1; add.s32 %r2, %r2, %r6; st.global.b32 [%rd11], %r2;
    bar.sync 0; {release}"""


WAIT, RELEASE = "ld.acquire.gpu.global.b32 %r7, [%rd2];", "@%p1 red.release.gpu.global.add.s32 [%rd2], 1;"


@pytest.mark.parametrize("fences", [False, True])
def test_programs_take_turns(fences):
    wait, release = WAIT, RELEASE
    if fences:
        wait = WAIT.replace("acquire", "relaxed") + " fence.acq_rel.gpu;"
        release = "fence.acq_rel.gpu; " + RELEASE.replace("release", "relaxed")
    x, turn = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(in_turn(wait, release), x, turn, threads=64, grid=(4, 1, 1))
    assert x.tolist() == [((0 * 2 + 1) * 2 + 2) * 2 + 3] * 64


@pytest.mark.parametrize(
    ("wait", "release", "fault"),
    [
        (WAIT.replace("acquire", "relaxed"), RELEASE, "races with a write by program"),
        (WAIT, RELEASE.replace("release", "relaxed"), "races with a write by program"),
        (WAIT, "", "deadlock"),
    ],
)
def test_programs_that_take_no_turns(wait, release, fault):
    x, turn = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Fault, match=fault):
        run(in_turn(wait, release), x, turn, threads=64, grid=(4, 1, 1))


def test_a_barrier_must_come_before_the_release():
    x, turn = torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Fault, match="races with a write by program"):
        run(in_turn(WAIT, RELEASE).replace("bar.sync 0;", ""), x, turn, threads=64, grid=(4, 1, 1))
