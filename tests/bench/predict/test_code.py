"""What is read from a listing of machine code."""

from __future__ import annotations

from xr0_engine.bench.predict.code import Code, Counts, behind, count, stages_of

LISTING = """
        Function : _linear
        /*0000*/                   S2R R0, SR_CTAID.X ;                       /* 0x0000000000007919 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;           /* 0x0000000402047981 */
        /*0020*/                   MUFU.EX2 R5, R5 ;                          /* 0x0000000500057308 */
        /*0030*/              @!P0 BRA 0x20 ;                                 /* 0xfffffffc00f08947 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R6.64], P0 ;   /* 0x0000000006097fae */
        /*0050*/                   LDSM.16.M88.4 R8, [R10] ;                  /* 0x000000000a08783b */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;      /* 0x0000000c0804723c */
        /*0070*/               @P2 BRA 0x40 ;                                 /* 0xfffffffc00c02947 */
        /*0080*/                   STG.E desc[UR4][R2.64], R4 ;               /* 0x0000000402007986 */
        /*0090*/                   EXIT ;                                     /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                                  /* 0xfffffffc00fc7947 */
        /*00b0*/                   NOP ;                                      /* 0x0000000000007918 */
"""


def test_the_main_loop_is_that_of_the_matrix_units():
    loop, outside = count(LISTING)
    assert loop == Counts(3, mma_operations=2 * 16 * 8 * 16, shared_bytes=2 * 512)
    assert outside.mma_operations == 0
    assert outside.special == 1


def test_a_warpgroups_product_is_shared_by_four_warps():
    loop, _ = count(
        LISTING.replace("HMMA.16816.F32.BF16 R4, R8, R12, R4", "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24")
    )
    assert loop.mma_operations == loop.grouped == 2 * 64 * 32 * 16 / 4
    assert loop.paid == 2 * loop.grouped


def test_code_without_a_product_has_no_main_loop():
    loop, outside = count(LISTING.replace("HMMA.16816.F32.BF16", "FFMA"))
    assert loop == Counts()
    assert outside.shared_bytes == 2 * 512


def test_behind_the_main_loop_are_loops_that_have_nothing_of_it():
    """That of a wait which stands at the end, and jumps back into the main loop, is none of them."""
    later = """
        /*0090*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00a0*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*00b0*/               @P1 BRA 0xa0 ;
        /*00c0*/               @P2 BRA 0x90 ;
        /*00d0*/                   SYNCS.PHASECHK.TRYWAIT P0, [R2], R3 ;
        /*00e0*/              @!P0 BRA 0x50 ;
"""
    before = LISTING.index("        /*0090*/")
    assert behind(LISTING) == Counts(1, special=1)
    assert behind(LISTING[:before] + later) == Counts(1 + 2, special=1)


BARRIERS = """
        Function : _streamed_flow
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0020*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0030*/                   LDG.E.STRONG.GPU R6, desc[UR4][R2.64] ;
        /*0040*/                   CCTL.IVALL ;
        /*0050*/               @P1 BRA 0x30 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/               @P2 BRA 0x60 ;
        /*0080*/                   LDG.E.STRONG.GPU R6, desc[UR4][R2.64] ;
        /*0090*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00a0*/               @P0 RED.E.ADD.STRONG.GPU [R2.64], R5 ;
        /*00b0*/                   IADD3 R4, R4, 0x1, RZ ;
        /*00c0*/                   LDG.E.STRONG.GPU R6, [R2.64] ;
        /*00d0*/                   ISETP.GE.AND P0, PT, R6, R5, PT ;
        /*00e0*/                   CCTL.IVALL ;
        /*00f0*/                   MUFU.EX2 R5, R5 ;
        /*0100*/                   EXIT ;
"""


def test_a_stage_is_what_lies_between_a_wait_for_the_grid_and_the_next_arrival():
    """What comes ahead of the wait is hidden by it; a load past the caches alone is no wait."""
    (first_loop, first), (second_loop, second) = stages_of(BARRIERS)
    assert first_loop == Counts(1, mma_operations=2 * 16 * 8 * 16)
    assert first == Counts(4)
    assert (second_loop, second) == (Counts(), Counts(4, special=1))
    code = Code("loop", 1, 2, 0, 8, stages=stages_of(BARRIERS))
    assert code.of_stage(1) == Code("loop", 1, 2, 0, 8, second_loop, second)
    assert stages_of(LISTING) == ()
