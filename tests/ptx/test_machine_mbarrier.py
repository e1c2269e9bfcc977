"""mbarrier: phases, arrivals, who may know what after a wait; bulk copies that complete at one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.ptx.machine_support import SEEDS, SETTINGS, execute, kinds

ASYNCHRONOUS = ("waited", "at-once", "random")
BAR, BAR2, DATA = 0, 8, 128
"""Places in shared memory."""
HEAD = f"mov.b32 %r10, {BAR}; mov.b32 %r11, {BAR2}; shl.b32 %r12, %r0, 2; setp.eq.u32 %p1, %r0, 0;"
HEAD += "mad.wide.u32 %d10, %r0, 4, %d0;"
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r10], {count}; @%p1 mbarrier.init.shared::cta.b64 [%r11], 1;"
READY = f"{HEAD} {INIT} @%p1 fence.mbarrier_init.release.cluster; bar.sync 0;"


def wait(parity: int | str = 0, barrier: str = "%r10", name: str = "W", kind: str = "try_wait") -> str:
    return f"{name}: mbarrier.{kind}.parity.shared::cta.b64 %p5, [{barrier}], {parity}; @!%p5 bra {name};"


def every_schedule(body: str, **launch: int):
    for seed in SEEDS:
        for asynchronous in ASYNCHRONOUS:
            out = np.arange(512, dtype=np.uint32)
            settings = dataclasses.replace(SETTINGS, seed=seed, asynchronous=asynchronous)
            yield execute(body, out, settings=settings, **{"shared": 1024, **launch}), out


def always(body: str, kind: str | None, **launch: int) -> None:
    for outcome, _ in every_schedule(body, **launch):
        assert kinds(outcome) == ({kind} if kind else set()), outcome
        assert outcome.status == "finished"


HANDED = """
setp.lt.u32 %p2, %r0, 32; @!%p2 bra READER;
st.shared.b32 [%r12+128], %r0; ARRIVE bra END;
READER: WAIT ld.shared.b32 %r20, [%r12]; st.global.b32 [%d10], %r20;
END: mov.b32 %r21, 0;
"""
ARRIVE = "mbarrier.arrive.shared::cta.b64 %d20, [%r10];"
"""Warp 0 writes what warp 1 reads, 128 bytes before its own place."""


def handed(arrive: str = ARRIVE, waiting: str = "", count: int = 32) -> str:
    body = HANDED.replace("ARRIVE", arrive).replace("WAIT", waiting or wait())
    return READY.format(count=count) + body


def test_arrivals_hand_over_what_was_written():
    for outcome, out in every_schedule(handed(), warps=2):
        assert not outcome.reports
        np.testing.assert_array_equal(out[32:64], np.arange(32))


@pytest.mark.parametrize("kind", ["try_wait", "test_wait"])
def test_both_kinds_of_wait(kind):
    always(handed(waiting=wait(kind=kind)), None, warps=2)


def test_one_lane_arrives_for_its_warp_after_a_barrier_of_the_warp():
    always(handed(f"bar.warp.sync -1; @%p1 {ARRIVE}", count=1), None, warps=2)
    for outcome, _ in every_schedule(handed(f"@%p1 {ARRIVE}", count=1), warps=2):
        assert kinds(outcome) == {"shared-race"}


@pytest.mark.parametrize(
    ("arrive", "waiting"),
    [
        (ARRIVE.replace("arrive", "arrive.relaxed.cta"), ""),
        (ARRIVE, wait().replace("parity", "parity.relaxed.cta")),
        (ARRIVE, wait(1)),
    ],
    ids=["relaxed arrival", "relaxed wait", "wrong parity"],
)
def test_what_does_not_hand_over(arrive, waiting):
    for outcome, _ in every_schedule(handed(arrive, waiting), warps=2):
        # The parity of a phase that is over by then is waited for in vain.
        assert kinds(outcome) & {"shared-race", "shared-unwritten", "deadlock"}


def test_phases_follow_each_other():
    """A ring of one place: filled and emptied by turns, each waiting for the other's barrier."""
    body = """
    mov.b32 %r30, 0; setp.lt.u32 %p2, %r0, 32; and.b32 %r31, %r12, 124; add.s32 %r31, %r31, 128;
    LOOP: and.b32 %r32, %r30, 1; @!%p2 bra READER;
    xor.b32 %r33, %r32, 1; EMPTY st.shared.b32 [%r31], %r30; bar.warp.sync -1;
    @%p1 mbarrier.arrive.shared::cta.b64 _, [%r10]; bra NEXT;
    READER: FULL ld.shared.b32 %r20, [%r31]; shl.b32 %r34, %r30, 5; and.b32 %r35, %r0, 31; add.s32 %r34, %r34, %r35;
    mad.wide.u32 %d11, %r34, 4, %d0; st.global.b32 [%d11], %r20; bar.warp.sync -1; setp.eq.u32 %p3, %r35, 0;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [%r11];
    NEXT: add.s32 %r30, %r30, 1; setp.lt.u32 %p4, %r30, 8; @%p4 bra LOOP;
    """
    ring = body.replace("EMPTY", wait("%r33", "%r11", "E")).replace("FULL", wait("%r32", "%r10", "F"))
    for outcome, out in every_schedule(READY.format(count=1) + ring, warps=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[:256], np.repeat(np.arange(8), 32))
    # The writer does not wait until the place is empty.
    careless = body.replace("EMPTY", "").replace("FULL", wait("%r32", "%r10", "F"))
    for outcome, _ in every_schedule(READY.format(count=1) + careless, warps=2):
        assert kinds(outcome) & {"shared-race", "deadlock"}


def test_states_tell_phases_and_missing_arrivals():
    out = np.zeros(4, np.uint32)
    body = (
        READY.format(count=3)
        + f"""
    @!%p1 bra END; {ARRIVE} mbarrier.pending_count.b64 %r20, %d20; st.global.b32 [%d0], %r20;
    mbarrier.arrive.shared::cta.b64 %d21, [%r10], 2; mbarrier.pending_count.b64 %r20, %d21; st.global.b32 [%d0+4], %r20;
    mbarrier.test_wait.shared::cta.b64 %p6, [%r10], %d21; selp.b32 %r20, 1, 0, %p6; st.global.b32 [%d0+8], %r20;
    {ARRIVE} mbarrier.test_wait.shared::cta.b64 %p6, [%r10], %d20; selp.b32 %r20, 1, 0, %p6;
    st.global.b32 [%d0+12], %r20;
    END: mov.b32 %r21, 0;
    """
    )
    assert not execute(body, out, shared=64).reports
    np.testing.assert_array_equal(out, [3, 2, 1, 0])


def test_misuse():
    assert kinds(execute(f"{HEAD} @%p1 {ARRIVE}", np.zeros(64, np.uint32), shared=64)) == {"mbarrier"}
    too_many = f"{READY.format(count=1)} @%p1 mbarrier.arrive.shared::cta.b64 %d20, [%r10], 2;"
    assert kinds(execute(too_many, np.zeros(64, np.uint32), shared=64)) == {"mbarrier"}
    over = f"{READY.format(count=1)} @%p1 {{}} @%p1 st.shared.b32 [%r10], 5;"
    assert kinds(execute(over.format("mov.b32 %r40, 0;"), np.zeros(64, np.uint32), shared=64)) == {"mbarrier"}
    assert not kinds(execute(over.format("mbarrier.inval.shared::cta.b64 [%r10];"), np.zeros(64, np.uint32), shared=64))


def test_its_initialisation_must_be_known():
    body = f"{HEAD} {INIT.format(count=64)} {{}} {ARRIVE}"
    for outcome, _ in every_schedule(body.format("bar.sync 0;"), warps=2):
        assert not outcome.reports
    for outcome, _ in every_schedule(body.format(""), warps=2):
        assert kinds(outcome) & {"shared-race", "lane-race", "mbarrier"}


def test_a_phase_that_never_completes_is_a_deadlock():
    for outcome, _ in every_schedule(READY.format(count=2) + f"@%p1 {ARRIVE} {wait()}"):
        assert outcome.status == "deadlock"


BULK = """
@!%p1 bra ISSUED; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r13], [%d0], 256, [%r10];
ISSUED: WAIT ld.shared.b32 %r20, [%r12+128]; st.global.b32 [%d10+1024], %r20;
"""


def bulk(waiting: str = "", text: str = BULK) -> str:
    return READY.format(count=1) + f"mov.b32 %r13, {DATA};" + text.replace("WAIT", waiting or wait())


def test_bulk_copies_complete_at_their_barrier():
    for outcome, out in every_schedule(bulk(), warps=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[256:320], np.arange(64))


def test_bulk_copies_that_nobody_waited_for():
    for outcome, _ in every_schedule(bulk("mov.b32 %r40, 0;"), warps=2):
        assert kinds(outcome) & {"unwaited-copy", "shared-unwritten", "unfinished-copy", "shared-race"}
    # Another barrier's phase tells nothing of this copy.
    other = f"@%p1 mbarrier.arrive.shared::cta.b64 _, [%r11]; {wait(0, '%r11')}"
    for outcome, _ in every_schedule(bulk(other), warps=2):
        assert kinds(outcome) & {"unwaited-copy", "shared-race", "shared-unwritten"}


THROUGH = """
@!%p1 bra ISSUED; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r13], [%d0], 256, [%r10];
ISSUED: WAIT add.s64 %d11, %d0, 1024; @!%p1 bra END;
cp.async.bulk.global.shared::cta.bulk_group [%d11], [%r13], 256; cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0; END: mov.b32 %r21, 0;
"""


def test_what_all_lanes_have_waited_for_the_warp_may_read():
    for outcome, out in every_schedule(bulk(text=THROUGH), warps=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[256:320], np.arange(64))


def test_a_phase_tells_nothing_of_the_next_one():
    again = f"""
    bar.sync 0; @!%p1 bra AGAIN; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 256; add.s32 %r14, %r13, 512;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r14], [%d0], 256, [%r10];
    AGAIN: WAIT ld.shared.b32 %r20, [%r12+{DATA + 512}];
    """
    waited, careless = (bulk() + again.replace("WAIT", text) for text in (wait(1, name="V"), "bar.sync 0;"))
    for outcome, _ in every_schedule(waited, warps=2):
        assert not outcome.reports, outcome
    for outcome, _ in every_schedule(careless, warps=2):
        assert "unwaited-copy" in kinds(outcome)


@pytest.mark.parametrize(("bytes_expected", "status"), [(256, "finished"), (512, "deadlock")])
def test_bytes_that_are_expected(bytes_expected, status):
    body = bulk(text=BULK.replace("_, [%r10], 256", f"_, [%r10], {bytes_expected}"))
    for outcome, _ in every_schedule(body, warps=2):
        assert outcome.status == status


def test_bulk_copies_count_in_sixteens_and_stay_in_bounds():
    assert kinds(execute(bulk(text=BULK.replace("256", "200")), np.zeros(512, np.uint32), shared=1024)) >= {"copy-size"}
    far = bulk().replace(f"mov.b32 %r13, {DATA}", "mov.b32 %r13, 896")
    assert "shared-bounds" in kinds(execute(far, np.zeros(512, np.uint32), shared=1024))
    short = np.zeros(32, np.uint32)
    assert "global-bounds" in kinds(execute(bulk(), short, shared=1024))


OUT = """
st.shared.b32 [%r12+128], %r0; FENCE bar.sync 0; @!%p1 bra END;
cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r13], 256; cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0; END: bar.sync 0; st.shared.b32 [%r12+128], 99;
"""
PROXY = "fence.proxy.async.shared::cta;"


def stored(text: str) -> str:
    return f"{HEAD} mov.b32 %r13, {DATA}; {text}"


def test_bulk_copies_to_global_memory():
    for outcome, out in every_schedule(stored(OUT.replace("FENCE", PROXY)), warps=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[:64], np.arange(64))


def test_stores_need_a_proxy_fence_and_a_wait():
    always(stored(OUT.replace("FENCE", "")), "proxy-fence", warps=2)
    unread = OUT.replace("FENCE", PROXY).replace(
        "cp.async.bulk.wait_group.read 0; END: bar.sync 0;", "END: bar.sync 0;"
    )
    for outcome, _ in every_schedule(stored(unread), warps=2):
        assert "unfinished-copy" in kinds(outcome)
    early = OUT.replace("FENCE", PROXY).replace("END: bar.sync 0;", "END: mov.b32 %r40, 0;")
    for outcome, _ in every_schedule(stored(early), warps=2):
        assert kinds(outcome) & {"shared-race", "unfinished-copy"}


def test_what_was_copied_out_is_known_after_the_whole_wait():
    back = "ld.global.b32 %r20, [%d10]; st.global.b32 [%d10+1024], %r20;"
    whole = OUT.replace("FENCE", PROXY).replace("wait_group.read", "wait_group") + back
    for outcome, out in every_schedule(stored(whole), warps=2):
        assert not outcome.reports
        np.testing.assert_array_equal(out[256:320], np.arange(64))


def test_cp_async_arrives_at_a_barrier():
    body = (
        READY.format(count=64)
        + f"""
    cp.async.ca.shared.global [%r12+128], [%d10], 4; cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r10];
    {wait()} xor.b32 %r13, %r12, 128; ld.shared.b32 %r20, [%r13+128]; st.global.b32 [%d10+1024], %r20;
    """
    )
    for outcome, out in every_schedule(body, warps=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[256:320], np.arange(64) ^ 32)
    unwaited = body.replace(wait(), "")
    for outcome, _ in every_schedule(unwaited, warps=2):
        assert kinds(outcome) & {"unwaited-copy", "shared-race", "shared-unwritten"}
