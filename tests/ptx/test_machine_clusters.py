"""Clusters: each other's shared memory, barriers, remote arrivals, copies to several blocks at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.ptx.machine_support import SEEDS, SETTINGS, execute, kinds

ARRIVE, WAIT = "barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"
SYNC = ARRIVE + WAIT
HEAD = """
mov.u32 %r10, %cluster_ctarank; shl.b32 %r11, %r0, 2; mad.wide.u32 %d10, %r3, 4, %d0; xor.b32 %r12, %r10, 1;
setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r10, 0;
"""
"""%r10: the block's rank of two; %r11: the thread's word; %r12: the other block's rank."""


def every_schedule(body: str, blocks: int = 4, **launch: int):
    for seed in SEEDS:
        for asynchronous in ("waited", "at-once"):
            out = np.arange(512, dtype=np.uint32)
            settings = dataclasses.replace(SETTINGS, seed=seed, asynchronous=asynchronous)
            yield (
                execute(HEAD + body, out, settings=settings, blocks=blocks, **{"cluster": 2, "shared": 1024, **launch}),
                out,
            )


NEIGHBOUR = """
st.shared.b32 [%r11], %r3; BETWEEN mapa.shared::cluster.u32 %r13, %r11, %r12;
ld.shared::cluster.b32 %r14, [%r13]; st.global.b32 [%d10], %r14; AFTER
"""


def test_each_reads_the_others_memory():
    for outcome, out in every_schedule(NEIGHBOUR.replace("BETWEEN", SYNC).replace("AFTER", SYNC)):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[:128], np.arange(128) ^ 32)


@pytest.mark.parametrize(
    ("between", "told"),
    [
        ("", {"shared-race", "shared-unwritten"}),
        (SYNC.replace("release", "relaxed"), {"shared-race"}),
        ("bar.sync 0;", {"shared-race", "shared-unwritten"}),
    ],
    ids=["nothing", "relaxed", "a barrier of the block"],
)  # fmt: skip
def test_what_does_not_order_blocks(between, told):
    for outcome, _ in every_schedule(NEIGHBOUR.replace("BETWEEN", between).replace("AFTER", SYNC)):
        assert kinds(outcome) & told
        assert kinds(outcome) <= told | {"cluster"}


def test_a_block_must_not_exit_while_others_read_it():
    found = [kinds(outcome) for outcome, _ in every_schedule(NEIGHBOUR.replace("BETWEEN", SYNC).replace("AFTER", ""))]
    assert set().union(*found) == {"cluster"}


def test_stores_to_the_other_block():
    body = "mapa.shared::cluster.u32 %r13, %r11, %r12; {} st.shared::cluster.b32 [%r13], %r3;"
    body += f"{SYNC} ld.shared.b32 %r14, [%r11]; st.global.b32 [%d10], %r14;"
    for outcome, out in every_schedule(body.format("")):
        assert not outcome.reports
        np.testing.assert_array_equal(out[:128], np.arange(128) ^ 32)
    for outcome, _ in every_schedule(body.format("st.shared.b32 [%r11], 5;")):
        assert kinds(outcome) == {"shared-race"}


def test_a_barrier_of_the_block_does_not_order_what_the_other_one_did():
    """However long ago that was."""
    body = "mapa.shared::cluster.u32 %r13, %r11, %r12; st.shared::cluster.b32 [%r13], %r3; mov.b32 %r14, 0;"
    body += "D: add.s32 %r14, %r14, 1; setp.lt.u32 %p3, %r14, 300; @%p3 bra D;"
    body += f"BETWEEN ld.shared.b32 %r14, [%r11]; {SYNC}"
    for outcome, _ in every_schedule(body.replace("BETWEEN", "bar.sync 0;")):
        assert kinds(outcome) & {"shared-race", "shared-unwritten"}
    for outcome, _ in every_schedule(body.replace("BETWEEN", SYNC)):
        assert not outcome.reports


def test_remote_addresses_need_the_cluster_window():
    body = f"mapa.shared::cluster.u32 %r13, %r11, %r12; st.shared.b32 [%r13], %r3; {SYNC}"
    for outcome, _ in every_schedule(body):
        assert kinds(outcome) == {"shared-bounds"}


def test_ranks_and_places():
    names = ["cluster_ctarank", "cluster_nctarank", "clusterid.x", "nclusterid.x", "cluster_ctaid.x"]
    body = "mad.wide.u32 %d11, %r1, 32, %d0;"
    for place, name in enumerate(names):
        body += f"mov.u32 %r20, %{name}; @%p1 st.global.b32 [%d11+{4 * place}], %r20;"
    body += "mapa.shared::cluster.u32 %r13, %r11, %r12; getctarank.shared::cluster.u32 %r20, %r13;"
    body += "@%p1 st.global.b32 [%d11+20], %r20;"
    for outcome, out in every_schedule(body, blocks=6):
        assert not outcome.reports
        block = np.arange(6)
        expected = [block % 2, 0 * block + 2, block // 2, 0 * block + 3, block % 2, 1 - block % 2]
        np.testing.assert_array_equal(out[:48].reshape(6, 8)[:, :6], np.stack(expected, 1))


INIT = "mov.b32 %r15, 512; @%p1 mbarrier.init.shared::cta.b64 [%r15], COUNT;"
INIT += f"@%p1 fence.mbarrier_init.release.cluster; {SYNC}"
TRY = "W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p5, [%r15], 0; @!%p5 bra W;"


def test_remote_arrivals_hand_over():
    """Block 0 writes into block 1's memory and arrives at its barrier."""
    body = (
        INIT.replace("COUNT", "32")
        + f"""
    mapa.shared::cluster.u32 %r13, %r11, %r12; mapa.shared::cluster.u32 %r16, %r15, %r12; @!%p2 bra READER;
    st.shared::cluster.b32 [%r13], %r0; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r16]; bra END;
    READER: WAIT ld.shared.b32 %r14, [%r11]; st.global.b32 [%d10], %r14; END: mov.b32 %r20, 0; {SYNC}
    """
    )
    for outcome, out in every_schedule(body.replace("WAIT", TRY), blocks=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[32:64], np.arange(32))
    for outcome, _ in every_schedule(body.replace("WAIT", ""), blocks=2):
        assert kinds(outcome) & {"shared-race", "shared-unwritten"}


def test_a_copy_to_all_blocks_completes_in_each():
    body = (
        INIT.replace("COUNT", "1")
        + f"""
    mov.b32 %r17, 0; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r15], 128; {SYNC} mov.b16 %h10, MASK;
    and.pred %p3, %p1, %p2;
    @%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
    [%r17], [%d0], 128, [%r15], %h10;
    {TRY} ld.shared.b32 %r14, [%r11]; add.s64 %d10, %d10, 1024; st.global.b32 [%d10], %r14; {SYNC}
    """
    )
    for outcome, out in every_schedule(body.replace("MASK", "3"), blocks=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[256:320], np.tile(np.arange(32), 2))
    for outcome, _ in every_schedule(body.replace("MASK", "1"), blocks=2):
        assert outcome.status == "deadlock"


def test_copies_between_blocks():
    body = (
        INIT.replace("COUNT", "1")
        + f"""
    st.shared.b32 [%r11], %r3; FENCE bar.sync 0; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r15], 128; {SYNC}
    mov.b32 %r18, 128; mov.b32 %r17, 0; mapa.shared::cluster.u32 %r13, %r18, %r12;
    mapa.shared::cluster.u32 %r16, %r15, %r12;
    @%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r13], [%r17], 128, [%r16];
    {TRY} ld.shared.b32 %r14, [%r11+128]; st.global.b32 [%d10], %r14; {SYNC}
    """
    )
    for outcome, out in every_schedule(body.replace("FENCE", "fence.proxy.async.shared::cta;"), blocks=2):
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(out[:64], np.arange(64) ^ 32)
    for outcome, _ in every_schedule(body.replace("FENCE", ""), blocks=2):
        assert kinds(outcome) == {"proxy-fence"}


def test_barriers_of_clusters_are_used_in_turn():
    for body in (ARRIVE + ARRIVE, WAIT):
        outcome = execute(HEAD + body, np.zeros(512, np.uint32), blocks=2, cluster=2, shared=1024)
        assert outcome.status == "fault"
        assert "barrier.cluster" in outcome.reports[-1].text
