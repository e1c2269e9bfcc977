"""Grids of a stream, dependent launch, blocks that wait for each other, schedules."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.ptx import machine
from tests.ptx.machine_support import SEEDS, SETTINGS, execute, grid, kinds, run

WAIT, SIGNAL = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
WORD = "mad.wide.u32 %d10, %r3, 4, %d0; mad.wide.u32 %d11, %r3, 4, %d1;"
SPIN = "mov.b32 %r30, 0; {name}: add.s32 %r30, %r30, 1; setp.lt.u32 %p9, %r30, 40; @%p9 bra {name};"
BLOCKS = 3


def settings(seed: int = 1, **changes: object) -> machine.Settings:
    return dataclasses.replace(SETTINGS, seed=seed, **changes)


def chain(writer: str, reader: str, seed: int, early: bool = True) -> tuple[machine.Outcome, np.ndarray]:
    """Two grids: one makes y from nothing, one makes z from y."""
    y, z = np.zeros((2, 32 * BLOCKS), np.uint32)
    grids = [grid(writer, y, z, blocks=BLOCKS), grid(reader, y, z, blocks=BLOCKS, early=early)]
    return run(grids, [y, z], settings(seed)), z


WRITE = f"{WORD} {SIGNAL} {SPIN.format(name='A')} st.global.b32 [%d10], 7;"
READ = f"{WORD} {SPIN.format(name='B')} BEFORE ld.global.b32 %r20, [%d10]; st.global.b32 [%d11], %r20;"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dependent_grid_waits(seed):
    outcome, z = chain(WRITE, READ.replace("BEFORE", WAIT), seed)
    assert not outcome.reports
    np.testing.assert_array_equal(z, np.full(32 * BLOCKS, 7))


@pytest.mark.parametrize("seed", SEEDS)
def test_reading_before_the_wait_is_told_whatever_came_first(seed):
    outcome, _ = chain(WRITE, READ.replace("BEFORE", "") + WAIT, seed)
    assert kinds(outcome) == {"dependency-race"}
    assert {report.grids for report in outcome.reports} <= {(1, 0), (0, 1)}


def test_grids_overlap_where_they_may():
    """The second grid writes before the first one reads, under some schedule."""
    overlapped = set()
    for seed in range(12):
        out = np.zeros(32 * BLOCKS, np.uint32)
        first = f"{WORD} {SIGNAL} {SPIN.format(name='A')} ld.global.b32 %r20, [%d10]; st.global.b32 [%d11], %r20;"
        second = f"{WORD} st.global.b32 [%d10], 9;"
        y = np.zeros(32 * BLOCKS, np.uint32)
        grids = [grid(first, y, out, blocks=BLOCKS), grid(second, y, out, blocks=BLOCKS, early=True)]
        outcome = run(grids, [y, out], settings(seed))
        assert kinds(outcome) == {"dependency-race"}
        overlapped.add(bool((out == 9).any()))
    assert overlapped == {False, True}


@pytest.mark.parametrize("seed", SEEDS)
def test_writing_what_the_grid_ahead_still_reads(seed):
    """Write after read, with the wait and without."""
    y, z = np.zeros((2, 32), np.uint32)
    first = f"{WORD} {SIGNAL} {SPIN.format(name='A')} ld.global.b32 %r20, [%d10]; st.global.b32 [%d11], %r20;"
    for wait, expected in ((WAIT, set()), ("", {"dependency-race"})):
        second = f"{WORD} {wait} st.global.b32 [%d10], 9;"
        outcome = run([grid(first, y, z), grid(second, y, z, early=True)], [y, z], settings(seed))
        assert kinds(outcome) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_grid_that_may_not_start_early_needs_no_wait(seed):
    outcome, z = chain(WRITE, READ.replace("BEFORE", ""), seed, early=False)
    assert not outcome.reports
    np.testing.assert_array_equal(z, np.full(32 * BLOCKS, 7))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_wait_is_for_all_grids_ahead(seed):
    """The one in between signals at once and has nothing to do with the first one's output."""
    y, z, other = np.zeros((3, 32), np.uint32)
    first = f"{WORD} {SIGNAL} {SPIN.format(name='A')} st.global.b32 [%d10], 7;"
    between = f"{SIGNAL} {WAIT} mov.b32 %r20, 0;"
    last = f"{WORD} {{}} ld.global.b32 %r20, [%d10]; st.global.b32 [%d11], %r20;"
    for wait, expected in ((WAIT, set()), ("", {"dependency-race"})):
        grids = [grid(first, y, z), grid(between, other, early=True), grid(last.format(wait), y, z, early=True)]
        assert kinds(run(grids, [y, z, other], settings(seed))) == expected
        if wait:
            np.testing.assert_array_equal(z, np.full(32, 7))
        y[:], z[:] = 0, 0


def test_without_a_signal_a_dependent_grid_starts_when_the_other_ends():
    outcome, z = chain(WRITE.replace(SIGNAL, ""), READ.replace("BEFORE", ""), 1)
    # It has the right values, and no right to them.
    assert kinds(outcome) == {"dependency-race"}
    np.testing.assert_array_equal(z, np.full(32 * BLOCKS, 7))


BARRIER = """
bar.sync 0; setp.eq.u32 %p1, %r0, 0; @!%p1 bra PASSED{n};
red.global.release.gpu.add.u32 [%d1], 1;
SPIN{n}: ld.global.acquire.gpu.b32 %r20, [%d1]; setp.lt.u32 %p2, %r20, {target}; @%p2 bra SPIN{n};
PASSED{n}: bar.sync 0;
"""


def phases(blocks: int) -> str:
    """Each block reads what its neighbour wrote before the barrier, twice."""
    step = "ld.global.b32 %r21, [%d12]; add.s32 %r21, %r21, 1; "
    body = f"mad.wide.u32 %d10, %r3, 4, %d0; add.s32 %r22, %r3, 64; rem.u32 %r22, %r22, {64 * blocks};"
    body += "mad.wide.u32 %d12, %r22, 4, %d0;"
    body += "st.global.b32 [%d10], %r3;" + BARRIER.format(n=0, target=blocks) + step
    return body + BARRIER.format(n=1, target=2 * blocks) + "st.global.b32 [%d10], %r21;"


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_wait_for_each_other(seed):
    blocks = 4
    words, counter = np.zeros(64 * blocks, np.uint32), np.zeros(1, np.uint32)
    outcome = run(
        [grid(phases(blocks), words, counter, blocks=blocks, warps=2, cooperative=True)],
        [words, counter],
        settings(seed),
    )
    assert not outcome.reports
    np.testing.assert_array_equal(words, (np.arange(64 * blocks) + 64) % (64 * blocks) + 1)


def test_a_cooperative_grid_must_be_resident():
    words, counter = np.zeros(256, np.uint32), np.zeros(1, np.uint32)
    for cooperative, told in ((True, "fault"), (False, "budget")):
        launch = grid(phases(4), words, counter, blocks=4, warps=2, cooperative=cooperative)
        outcome = run([launch], [words, counter], settings(resident=2, budget=20000))
        assert outcome.status == told
        assert told in kinds(outcome)


def sums(seed: int, resident: int = 16) -> tuple[machine.Outcome, np.ndarray]:
    """Which block comes last to a counter, and in which order they come, is up to the schedule."""
    counter, out = np.zeros(1, np.uint32), np.zeros(32 * 8, np.uint32)
    body = "mad.wide.u32 %d11, %r3, 4, %d1; atom.global.relaxed.gpu.add.u32 %r20, [%d0], 1; st.global.b32 [%d11], %r20;"
    return execute(body, counter, out, blocks=8, settings=settings(seed, resident=resident)), out


def test_schedules_repeat_and_differ_by_seed():
    orders = [sums(seed)[1].tolist() for seed in range(8)]
    assert orders == [sums(seed)[1].tolist() for seed in range(8)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert sums(3, resident=2)[1].tolist() != orders[3]
    assert sums(3)[0].executed == sums(4)[0].executed


def test_what_is_executed_is_counted():
    outcome = execute("mov.b32 %r20, 1;", np.zeros(1, np.uint32), blocks=3, warps=2)
    # The array's address, five instructions that say which thread this is, the body, ret.
    assert outcome.executed == 3 * 2 * 8


@pytest.mark.parametrize("blocks", [0, 3])
def test_launches_that_cannot_be(blocks):
    outcome = execute("mov.b32 %r20, 1;", np.zeros(1, np.uint32), blocks=blocks, cluster=2)
    assert outcome.status == "fault"
    assert f"{blocks} blocks in clusters of 2" in outcome.reports[0].text
