"""Orders of accesses: what synchronises and what does not, under every schedule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.ptx.machine_support import SEEDS, SETTINGS, execute, kinds

PLACES = "mad.wide.u32 %d10, %r0, 4, %d0; shl.b32 %r10, %r0, 2;"
OTHER = "xor.b32 %r12, %r10, 128;"
"""%r12: the word of the same lane of the other of two warps."""


def every_seed(body: str, **launch: int) -> list[set[str]]:
    """What is reported under each schedule, in turn and by seeds."""
    return [
        kinds(execute(body, np.zeros(256, np.uint32), settings=dataclasses.replace(SETTINGS, seed=seed), **launch))
        for seed in SEEDS
    ]


def always(body: str, kind: str | None, **launch: int) -> None:
    for seed, found in enumerate(every_seed(body, **launch)):
        assert found == ({kind} if kind else set()), (seed, found)


WRITE_READ = f"{PLACES} {OTHER} st.shared.b32 [%r10], %r0; bar.sync 0; {{}} ld.shared.b32 %r11, [%r12];"


class TestSharedMemory:
    def test_a_barrier_between(self):
        always(WRITE_READ.format(""), None, warps=2, shared=256)

    def test_read_after_write(self):
        body = f"{PLACES} {OTHER} st.shared.b32 [%r10], 1; bar.sync 0; st.shared.b32 [%r10], %r0;"
        body += "ld.shared.b32 %r11, [%r12];"
        always(body, "shared-race", warps=2, shared=256)

    def test_write_after_read(self):
        body = WRITE_READ.format("") + "{} st.shared.b32 [%r10], 9;"
        always(body.format("bar.sync 0;"), None, warps=2, shared=256)
        always(body.format(""), "shared-race", warps=2, shared=256)

    def test_write_after_write(self):
        body = f"{PLACES} shr.u32 %r13, %r0, 5; and.b32 %r12, %r10, 124; setp.eq.u32 %p1, %r13, 0;"
        body += "@%p1 st.shared.b32 [%r12], 1; {} @!%p1 st.shared.b32 [%r12], 2;"
        always(body.format("bar.sync 0;"), None, warps=2, shared=256)
        always(body.format(""), "shared-race", warps=2, shared=256)

    def test_the_same_value_may_be_written_by_several(self):
        always("mov.b32 %r10, 8; st.shared.b32 [%r10], 5; ld.shared.b32 %r11, [%r10];", None, warps=4, shared=256)

    def test_neighbours_of_one_word(self):
        for size in (1, 2):
            body = f"mul.lo.s32 %r10, %r0, {size}; cvt.u16.u32 %h10, %r0; st.shared.b{8 * size} [%r10], %h10;"
            body += f"ld.shared.b{8 * size} %h11, [%r10];"
            always(body, None, warps=4, shared=256)
            # Each warp every other byte or two, in turns.
            body = "and.b32 %r11, %r0, 31; shr.u32 %r12, %r0, 5; shl.b32 %r11, %r11, 1; add.s32 %r11, %r11, %r12;"
            body += f"mul.lo.s32 %r10, %r11, {size};"
            body += f"cvt.u16.u32 %h10, %r0; st.shared.b{8 * size} [%r10], %h10; ld.shared.b{8 * size} %h11, [%r10];"
            always(body, None, warps=2, shared=256)
            other = f"{body} bar.sync 0; xor.b32 %r10, %r10, {size}; {{}} ld.shared.b{8 * size} %h11, [%r10];"
            always(other.format(""), None, warps=2, shared=256)
            again = f"xor.b32 %r12, %r10, {size}; st.shared.b{8 * size} [%r12], 3;"
            always(other.format(again), "shared-race", warps=2, shared=256)

    def test_readers_of_several_warps_are_all_remembered(self):
        """Each of four warps reads; one of them then writes without a barrier, whoever read last."""
        body = f"{PLACES} st.shared.b32 [%r10], %r0; bar.sync 0; and.b32 %r12, %r10, 124; ld.shared.b32 %r11, [%r12];"
        body += "bar.warp.sync -1; setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.b32 [%r12], 99;"
        always(body, "shared-race", warps=4, shared=512)

    def test_another_barrier_orders_those_who_were_there(self):
        body = f"{PLACES} {OTHER} shr.u32 %r13, %r0, 6; add.s32 %r13, %r13, 1; st.shared.b32 [%r10], 1; bar.sync 0;"
        body += "st.shared.b32 [%r10], %r0; DELAY bar.sync %r13, 64; ld.shared.b32 %r11, [PLACE];"
        launch = {"warps": 4, "shared": 512}
        always(body.replace("PLACE", "%r12").replace("DELAY", ""), None, **launch)
        # However long ago the others wrote.
        for turns in (0, 300):
            delay = f"mov.b32 %r14, 0; D: add.s32 %r14, %r14, 1; setp.lt.u32 %p1, %r14, {turns}; @%p1 bra D;"
            delay += "xor.b32 %r15, %r10, 256;"
            always(body.replace("PLACE", "%r15").replace("DELAY", delay), "shared-race", **launch)

    def test_who_only_arrives_has_published(self):
        body = f"{PLACES} {OTHER} setp.lt.u32 %p1, %r0, 32; @!%p1 bra READER; st.shared.b32 [%r10], %r0;"
        body += "bar.arrive 1, 64; bra END;"
        body += "READER: {} ld.shared.b32 %r11, [%r12]; END: mov.b32 %r11, 0;"
        always(body.format("bar.sync 1, 64;"), None, warps=2, shared=256)
        for found in every_seed(body.replace("bar.arrive 1, 64;", "").format(""), warps=2, shared=256):
            assert found & {"shared-race", "shared-unwritten"}

    def test_who_only_arrives_knows_nothing(self):
        body = f"{PLACES} {OTHER} setp.lt.u32 %p1, %r0, 32; st.shared.b32 [%r10], %r0; @%p1 bra ARRIVE;"
        body += "bar.sync 1, 64; bra END;"
        body += "ARRIVE: bar.arrive 1, 64; ld.shared.b32 %r11, [%r12]; END: mov.b32 %r11, 0;"
        for found in every_seed(body, warps=2, shared=256):
            assert found & {"shared-race", "shared-unwritten"}


class TestLanesOfAWarp:
    """A warp's lanes are ordered by bar.warp.sync and barriers, not by running in step."""

    NEIGHBOUR = f"{PLACES} st.shared.b32 [%r10], %r0; xor.b32 %r12, %r10, 4; {{}} ld.shared.b32 %r11, [%r12];"

    @pytest.mark.parametrize("between", ["bar.warp.sync -1;", "bar.sync 0;"])
    def test_in_order(self, between):
        always(self.NEIGHBOUR.format(between), None, shared=128)

    @pytest.mark.parametrize("between", ["", "shfl.sync.idx.b32 %r13, %r0, 0, 31, -1;"])
    def test_out_of_order(self, between):
        always(self.NEIGHBOUR.format(between), "lane-race", shared=128)

    def test_writing_what_another_lane_read(self):
        body = f"{PLACES} st.shared.b32 [%r10], %r0; bar.sync 0; xor.b32 %r12, %r10, 4;"
        body += "ld.shared.b32 %r11, [%r12]; {} st.shared.b32 [%r10], 77;"
        always(body.format("bar.warp.sync -1;"), None, shared=128)
        always(body.format(""), "lane-race", shared=128)

    def test_own_words_need_nothing(self):
        always(
            f"{PLACES} st.shared.b32 [%r10], %r0; ld.shared.b32 %r11, [%r10]; st.shared.b32 [%r10], 5;",
            None,
            shared=128,
        )

    def test_in_global_memory(self):
        body = "mad.wide.u32 %d10, %r0, 4, %d0; xor.b32 %r11, %r0, 1; mad.wide.u32 %d11, %r11, 4, %d0;"
        body += "st.global.b32 [%d10], %r0;"
        always(f"{body} bar.warp.sync -1; ld.global.b32 %r12, [%d11];", None)
        always(f"{body} ld.global.b32 %r12, [%d11];", "lane-race")


HAND_OVER = """
mad.wide.u32 %d10, %r0, 4, %d0; setp.eq.u32 %p1, %r0, 0; setp.ne.u32 %p2, %r1, 0; @%p2 bra READER;
st.global.b32 [%d10+256], 5; {before} @%p1 {release} bra END;
READER: mov.b32 %r20, 1; @!%p1 bra JOIN;
SPIN: {acquire} setp.eq.u32 %p3, %r20, 0; @%p3 bra SPIN;
JOIN: {after} ld.global.b32 %r21, [%d10+256];
END: mov.b32 %r22, 0;
"""
"""Block 0 writes 64 words and sets a flag, which block 1 waits for."""
RIGHT = {
    "before": "bar.sync 0;",
    "release": "st.global.release.gpu.b32 [%d0], 1;",
    "acquire": "ld.global.acquire.gpu.b32 %r20, [%d0];",
    "after": "bar.sync 0;",
}


class TestBlocks:
    def hand_over(self, kind: str | None, **parts: str) -> None:
        always(HAND_OVER.format(**(RIGHT | parts)), kind, blocks=2, warps=2)

    def test_release_and_acquire(self):
        self.hand_over(None)

    @pytest.mark.parametrize(
        "parts",
        [
            {"before": ""},
            {"after": ""},
            {"release": "st.global.relaxed.gpu.b32 [%d0], 1;"},
            {"acquire": "ld.global.relaxed.gpu.b32 %r20, [%d0];"},
            {"release": "st.global.release.cta.b32 [%d0], 1;"},
            {"acquire": "ld.global.acquire.cta.b32 %r20, [%d0];"},
            {"before": "bar.warp.sync -1;"},
        ],
        ids=lambda parts: " ".join(f"{name} {text or 'nothing'}" for name, text in parts.items()),
    )
    def test_what_breaks_it(self, parts):
        self.hand_over("global-race", **parts)

    def test_what_is_written_after_the_release_is_not_part_of_it(self):
        late = "st.global.release.gpu.b32 [%d0], 1; @%p1 st.global.b32 [%d10+256], 6;"
        self.hand_over("global-race", release=late)

    @pytest.mark.parametrize(
        "parts",
        [
            {"release": "red.global.release.gpu.add.u32 [%d0], 1;"},
            {"release": "atom.global.acq_rel.gpu.exch.b32 %r22, [%d0], 1;"},
            {"acquire": "atom.global.acq_rel.gpu.or.b32 %r20, [%d0], 0;"},
            {"before": "bar.sync 0; fence.acq_rel.gpu;", "release": "st.global.relaxed.gpu.b32 [%d0], 1;"},
            {"acquire": "ld.global.relaxed.gpu.b32 %r20, [%d0];", "after": "fence.acq_rel.gpu; bar.sync 0;"},
            {"before": "bar.sync 0; membar.gl;", "release": "red.global.relaxed.gpu.add.u32 [%d0], 1;",
             "acquire": "ld.volatile.global.b32 %r20, [%d0];", "after": "membar.gl; bar.sync 0;"},
        ],
        ids=lambda parts: " ".join(parts),
    )  # fmt: skip
    def test_other_ways(self, parts):
        self.hand_over(None, **parts)

    def test_write_after_read(self):
        body = "mad.wide.u32 %d10, %r0, 4, %d0; setp.eq.u32 %p1, %r1, 0; @%p1 ld.global.b32 %r20, [%d10];"
        body += "@!%p1 st.global.b32 [%d10], %r0;"
        always(body, "global-race", blocks=2)

    def test_each_in_a_part_of_its_own(self):
        always("mad.wide.u32 %d10, %r3, 4, %d0; st.global.b32 [%d10], %r3; ld.global.b32 %r20, [%d10];", None, blocks=4)

    def test_atomics_race_with_plain_accesses_alone(self):
        always("atom.global.relaxed.gpu.add.u32 %r20, [%d0], 1;", None, blocks=4)
        body = "setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r3, 32; @%p1 atom.global.relaxed.gpu.add.u32 %r20, [%d0], 1;"
        body += "@%p2 ld.global.b32 %r21, [%d0];"
        always(body, "global-race", blocks=2)

    def test_the_last_to_arrive_reads_all(self):
        """As sums of split products are collected, and with each of its parts left out."""
        body = """
        mad.wide.u32 %d10, %r3, 4, %d0; st.global.b32 [%d10+64], %r3; {before} mov.b32 %r20, 0;
        setp.eq.u32 %p1, %r0, 0; @%p1 {count} @%p1 st.shared.b32 [%r15], %r20; bar.sync 0; ld.shared.b32 %r20, [%r15];
        setp.ne.u32 %p2, %r20, 2; @%p2 bra END; mad.wide.u32 %d11, %r0, 4, %d0;
        ld.global.b32 %r21, [%d11+64]; ld.global.b32 %r22, [%d11+192]; ld.global.b32 %r23, [%d11+320];
        @%p1 st.global.b32 [%d0], 0;
        END: mov.b32 %r24, 0;
        """
        body = "mov.b32 %r15, 0;" + body
        right = {"before": "bar.sync 0;", "count": "atom.global.acq_rel.gpu.add.u32 %r20, [%d0], 1;"}
        launch = {"blocks": 3, "shared": 16}
        always(body.format(**right), None, **launch)
        for parts in (
            {"before": ""},
            {"count": right["count"].replace("acq_rel", "relaxed")},
            {"count": right["count"].replace("acq_rel", "acquire")},
            {"count": right["count"].replace("acq_rel", "release")},
        ):
            for found in every_seed(body.format(**(right | parts)), **launch):
                assert found == {"global-race"}, parts

    def test_blocks_that_run_one_by_one_are_not_ordered_by_that(self):
        settings = dataclasses.replace(SETTINGS, resident=1)
        outcome = execute(
            "mad.wide.u32 %d10, %r0, 4, %d0; st.global.b32 [%d10], %r1;",
            np.zeros(64, np.uint32),
            settings=settings,
            blocks=2,
        )
        assert kinds(outcome) == {"global-race"}
        assert "by another block" in outcome.reports[0].text
