"""The static model gives what was published and what the audit said, and machine code is counted as
it is written.
"""

from benchmarks.lib import calibration, lints, sass
from benchmarks.lib.predict import CONSTANTS, Shape
from motif_kernels.flops import visible_pairs


def test_the_model_gives_published_figures_to_30_and_the_audits_to_10_percent() -> None:
    found = calibration.rows()[1]
    wrong = [row for row in found if abs(row.error) > calibration.BOUNDS.get(row.kind, float("inf"))]
    assert not wrong, calibration.describe(*calibration.rows())
    assert {row.kind for row in found} == {*calibration.BOUNDS, "measured"}


def test_predictions_are_recorded_with_the_constants_that_made_them() -> None:
    recorded, found = calibration.rows()
    message = calibration.describe(recorded, found) + "\npython -m benchmarks.compiled --calibration records them"
    assert recorded == CONSTANTS._asdict(), message
    assert all(abs(row.now / row.recorded - 1) < 0.01 for row in found), message


def test_tiles_of_a_mask_hold_its_pairs() -> None:
    for window in (None, 512, 100):
        shape = Shape(64, 128, 1, 1, 1024, window=window)
        mask = (-1, 0) if window is None else (window - 1, 0)
        assert shape.pairs == visible_pairs(1024, 1024, window_size=mask)
        tiles = shape.tiles(128, 64)
        whole, cut = (sum(t[i] for t in tiles) for i in (0, 1))
        assert whole * 128 * 64 <= shape.pairs <= (whole + cut) * 128 * 64
    assert Shape(64, 128, 1, 1, 1024).tiles(128, 64)[:2] == [(0, 2), (2, 2)]


SASS = """
\t.section\t.text._kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IMAD R2, R2, 0x2, RZ ;
.L_x_1:
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], RZ, !UPT ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR16], R88, gsb0 ;
        /*0060*/                   FMUL R3, R3, R4 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   MUFU.EX2 R3, R3 ;
        /*0090*/               @P1 LDL R9, [R1] ;
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16].tnspB, R24, gsb0 ;
        /*00b0*/                   LDGSTS.E.BYPASS.128 [R247+0xc000], desc[UR26][R232.64], !P2 ;
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/              @!P2 BRA `(.L_x_1) ;
        /*00e0*/              @!P0 BRA `(.L_x_2) ;
        /*00f0*/                   EXIT ;
.L_x_6:
        /*0100*/                   BRA `(.L_x_6);
"""


def test_the_loops_of_machine_code_are_taken_apart() -> None:
    (code,) = sass.parse(SASS.splitlines()).values()
    loops, outer, once = sass.structure(code)
    (loop,) = loops
    assert loop.instructions == 12
    assert loop.mma == {sass.Mma(64, False): 2, sass.Mma(128, True): 1}
    assert (loop["mufu"], loop["ldl"], loop["cp_async"], loop["async_waits"], loop["mma_waits"]) == (1, 1, 1, 1, 1)
    assert loop.under_mma == 6  # FMUL, and from the last product over the loop's end to the wait's two neighbours
    assert (outer[0].instructions, once) == (2, 3)
    assert sass.Loop.parse(loop.as_json()) == loop
    assert lints.lints("", {"loops": [loop.as_json()], "global_scratch": 0}, "") == ["spills in an inner loop"]
