"""What the machine reports of one block: each fault by a program that has just that, beside one that has not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.ptx.machine_support import LANES, SETTINGS, execute, kinds

WORDS = np.arange(64, dtype=np.uint32)
PLACES = "mad.wide.u32 %d10, %r0, 4, %d0; shl.b32 %r10, %r0, 2;"
"""%d10, %r10: this thread's word of the array and of shared memory."""


def found(body: str, shared: int = 256, warps: int = 1, asynchronous: str = "waited", **launch: int):
    settings = dataclasses.replace(SETTINGS, asynchronous=asynchronous)
    return execute(body, WORDS.copy(), shared=shared, warps=warps, settings=settings, **launch)


def test_what_is_right_is_not_reported():
    assert (
        found(f"{PLACES} ld.global.b32 %r11, [%d10]; st.shared.b32 [%r10], %r11; ld.shared.b32 %r12, [%r10];").reports
        == []
    )


@pytest.mark.parametrize("access", ["ld.global.b32 %r11, [%d10+{at}];", "st.global.b32 [%d10+{at}], %r0;"])
def test_global_bounds(access):
    assert not kinds(found(PLACES + access.format(at=128)))
    outcome = found(PLACES + access.format(at=136))
    assert kinds(outcome) == {"global-bounds"}
    (report,) = outcome.reports
    assert report.count == 2
    assert report.text.endswith("out of bounds: 4 bytes behind the end of a tensor of 256 bytes")
    before = found(PLACES + access.format(at=-8))
    assert before.reports[0].text.endswith("out of bounds: 8 bytes before a tensor of 256 bytes")


def test_nothing_is_written_out_of_bounds_and_ones_are_read():
    memory = np.zeros(96, np.uint32)
    inner, out = memory[:32], memory[64:]
    body = "mad.wide.u32 %d10, %r0, 4, %d0; mad.wide.u32 %d11, %r0, 4, %d1; st.global.b32 [%d10+128], %r0;"
    execute(f"{body} ld.global.b32 %r11, [%d10+128]; st.global.b32 [%d11], %r11;", inner, out)
    np.testing.assert_array_equal(memory[32:64], np.zeros(32))
    np.testing.assert_array_equal(out, np.full(32, 0xFFFFFFFF))


def test_alignment():
    assert kinds(found("ld.global.b32 %r11, [%d0+2];")) == {"global-alignment"}
    assert kinds(found("ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%d0+8];")) == {"global-alignment"}
    assert not kinds(found("ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%d0+16];"))
    assert kinds(found(f"{PLACES} st.shared.b32 [%r10+1], %r0;")) == {"shared-alignment"}


@pytest.mark.parametrize("access", ["ld.shared.b32 %r11, [%r10+{at}];", "st.shared.b32 [%r10+{at}], %r0;"])
def test_shared_bounds(access):
    fill = f"{PLACES} st.shared.b32 [%r10], %r0; st.shared.b32 [%r10+128], %r0; bar.sync 0;"
    assert not kinds(found(fill + access.format(at=128)))
    outcome = found(fill + access.format(at=132))
    assert kinds(outcome) == {"shared-bounds"}
    assert outcome.reports[0].count == 1


def test_shared_memory_that_nobody_wrote():
    assert kinds(found(f"{PLACES} ld.shared.b32 %r11, [%r10];")) == {"shared-unwritten"}
    half = f"{PLACES} st.shared.b16 [%r10], 7;"
    assert kinds(found(f"{half} ld.shared.b32 %r11, [%r10];")) == {"shared-unwritten"}
    assert not kinds(found(f"{half} ld.shared.b16 %h11, [%r10];"))
    matrices = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r11}, [%r10];"
    assert kinds(found(f"shl.b32 %r10, %r0, 4; {matrices}", shared=512)) == {"shared-unwritten"}


COPY = f"{PLACES} cp.async.ca.shared.global [%r10], [%d10], 4; cp.async.commit_group;"


@pytest.mark.parametrize("asynchronous", ["waited", "at-once", "random"])
def test_copies_that_nobody_waited_for(asynchronous):
    read = "ld.shared.b32 %r11, [%r10];"
    assert kinds(found(f"{COPY} {read} cp.async.wait_group 0;", asynchronous=asynchronous)) == {"unwaited-copy"}
    assert not kinds(found(f"{COPY} cp.async.wait_group 0; {read}", asynchronous=asynchronous))
    # The wait leaves the newest group open.
    late = f"{COPY} cp.async.ca.shared.global [%r10+128], [%d10], 4; cp.async.commit_group; cp.async.wait_group 1;"
    assert not kinds(found(f"{late} {read}", asynchronous=asynchronous))
    assert kinds(found(f"{late} ld.shared.b32 %r11, [%r10+128];", asynchronous=asynchronous)) == {"unwaited-copy"}


def test_a_copy_waited_for_by_its_own_warp_alone():
    """Other warps need a barrier behind the wait; one ahead of it orders nothing."""
    read = "xor.b32 %r12, %r10, 128; ld.shared.b32 %r11, [%r12];"
    wait = "cp.async.wait_group 0;"
    for seed in range(6):
        settings = dataclasses.replace(SETTINGS, seed=seed)

        def run(body, settings=settings):
            return kinds(execute(body, WORDS.copy(), shared=256, warps=2, settings=settings))

        assert not run(f"{COPY} {wait} bar.sync 0; {read}")
        # Whoever comes first, the copy or the read, has the other not ordered behind it.
        assert run(f"{COPY} {wait} {read}") & {"unwaited-copy", "shared-race"}
        assert run(f"{COPY} bar.sync 0; {wait} {read}") == {"unwaited-copy"}


def test_writing_over_a_copy_on_its_way():
    over = "st.shared.b32 [%r10], %r0;"
    assert kinds(found(f"{COPY} {over} cp.async.wait_group 0;")) == {"unwaited-copy"}
    assert not kinds(found(f"{COPY} cp.async.wait_group 0; {over}"))


def test_copies_of_too_many_bytes():
    body = f"{PLACES} mov.b32 %r11, {{}}; cp.async.ca.shared.global [%r10], [%d10], 4, %r11; cp.async.wait_all;"
    assert not kinds(found(body.format(4)))
    assert kinds(found(body.format(5))) == {"copy-size"}


def test_lanes_that_store_different_values_at_one_address():
    for store in ("st.shared.b32 [%r11], {}", "st.global.b32 [%d0], {}"):
        assert not kinds(found(f"mov.b32 %r11, 4; {store.format('7')};"))
        assert kinds(found(f"mov.b32 %r11, 4; shr.u32 %r12, %r0, 4; {store.format('%r12')};")) == {"lane-conflict"}


def test_the_last_lane_of_a_conflict_stays():
    out = np.zeros(1, np.uint32)
    execute("st.global.b32 [%d0], %r0;", out)
    assert out[0] == LANES - 1


@pytest.mark.parametrize("instruction", ["bar.sync 0;", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r11}, [%r10];"])
def test_divergent_code_where_a_warp_must_be_whole(instruction):
    fill = f"{PLACES} st.shared.b32 [%r10], %r0; bar.sync 0; and.b32 %r10, %r10, 48; setp.lt.u32 %p1, %r0, 16;"
    assert found(f"{fill} {instruction}").status == "finished"
    outcome = found(f"{fill} @%p1 bra SKIP; {instruction} SKIP: mov.b32 %r12, 0;")
    assert outcome.status == "fault"
    assert kinds(outcome) == {"fault"}
    assert "divergent" in outcome.reports[-1].text


def test_lanes_may_meet_before_the_branch_that_parted_them():
    """A compiler may put the end of a loop's body, where all its lanes meet, above it."""
    body = """
    setp.lt.u32 %p1, %r0, 16; bra.uni START;
    JOIN: bar.sync 0; bra.uni END;
    START: @%p1 bra JOIN; {others} bra.uni JOIN;
    END: st.global.b32 [%d0+128], %r0;
    """
    assert found(body.format(others="mov.b32 %r11, 0;"), asynchronous="waited").status == "finished"
    apart = found(body.format(others="bar.sync 0;"))
    assert apart.status == "fault"
    assert "divergent" in apart.reports[-1].text


def test_barriers_of_some_warps():
    """Two and two of four warps meet at barriers of their own; a wrong count is told."""
    body = "shr.u32 %r11, %r0, 6; add.s32 %r11, %r11, 1; bar.sync %r11, {};"
    assert found(body.format(64), warps=4).reports == []
    outcome = found("setp.lt.u32 %p1, %r0, 32; selp.b32 %r11, 64, 96, %p1; bar.sync 1, %r11;", warps=3)
    assert "barrier-count" in kinds(outcome)


def test_barriers_count_votes():
    out = np.zeros((64, 3), np.uint32)
    body = """
    setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r10, 0, %p1; bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, %p1;
    selp.b32 %r11, 1, 0, %p2; selp.b32 %r12, 1, 0, %p3; mad.wide.u32 %d10, %r0, 12, %d0;
    st.global.b32 [%d10], %r10; st.global.b32 [%d10+4], %r11; st.global.b32 [%d10+8], %r12;
    """
    for seed in range(4):
        assert not execute(body, out, warps=2, settings=dataclasses.replace(SETTINGS, seed=seed)).reports
        np.testing.assert_array_equal(out, np.tile([40, 0, 1], (64, 1)))


def test_deadlock_tells_who_waits():
    outcome = found("setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64;", warps=2)
    assert outcome.status == "deadlock"
    assert kinds(outcome) == {"deadlock"}
    assert "block 0 warp 0" in outcome.reports[0].text
    assert "warp 1" not in outcome.reports[0].text


def test_loops_that_never_end():
    outcome = execute("LOOP: bra LOOP;", settings=dataclasses.replace(SETTINGS, budget=5000))
    assert outcome.status == "budget"
    assert kinds(outcome) == {"budget"}


def test_programs_that_stop_themselves():
    outcome = found("setp.eq.u32 %p1, %r0, 3; @%p1 trap;")
    assert outcome.status == "fault"
    assert "trap" in outcome.reports[0].text


def test_registers_are_given_in_eights():
    assert not kinds(found("setmaxnreg.inc.sync.aligned.u32 232;"))
    assert kinds(found("setmaxnreg.dec.sync.aligned.u32 20;")) == {"register-count"}


def test_reports_are_told_once_with_their_line_and_count():
    loop = "AGAIN: ld.shared.b32 %r11, [%r10]; add.s32 %r12, %r12, 1; setp.lt.u32 %p1, %r12, 5; @%p1 bra AGAIN;"
    outcome = found(f"mov.b32 %r12, 0; {PLACES} {loop}")
    (report,) = outcome.reports
    assert report.kind == "shared-unwritten"
    assert report.count == 5
    assert report.lines[0] > 0
    assert report.lines[1] == 0
    assert report.grids == (0, -1)


def test_without_checks_only_bounds_are_kept():
    settings = dataclasses.replace(SETTINGS, check="none")
    body = f"{PLACES} ld.shared.b32 %r11, [%r10]; ld.global.b32 %r12, [%d10+136];"
    assert kinds(execute(body, WORDS.copy(), shared=256, settings=settings)) == {"global-bounds"}
