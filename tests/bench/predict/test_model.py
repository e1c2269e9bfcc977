"""The time of a launch, and of a chain: what it grows with, and what it cannot be below."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xr0_engine.bench.predict.code import Code, Counts
from xr0_engine.bench.predict.figures import CHIPS
from xr0_engine.bench.predict.model import (
    Launched,
    chain_seconds,
    launch_time,
    resident,
    share_beside,
    spread,
    stream_share,
)
from xr0_engine.bench.predict.step import predict_launch
from xr0_engine.bench.predict.work import Work, op_work
from xr0_engine.fused.ops import Tactic

H200, ADA = CHIPS["h200"], CHIPS["rtx4090"]
PRODUCT = op_work("swiglu", (208, 19456, 2560), Tactic(128, 64, 64, 1, 8, 4))
SKINNY = op_work("linear", (32, 1024, 4096), Tactic(32, 64, 128, 8, 4, 4))
CODE = Code("linear", 64 * 1024, 128, 0, 4, Counts(90, 131072.0, 131072.0, 131072.0, 5000), Counts(1000))


def seconds(work: Work, chip=H200, code=None, **changed: float) -> float:
    at = chip.settings()[0]
    return launch_time(Launched(work, code), chip, at | {name: at[name] * by for name, by in changed.items()}).total_s


@pytest.mark.parametrize("figure", ["clock_hz", "memory_bytes_s", "l2_bytes_cycle", "mma_share"])
def test_a_better_chip_takes_less(figure):
    assert seconds(PRODUCT, **{figure: 1.2}) < seconds(PRODUCT)


@pytest.mark.parametrize("figure", ["dependent_s", "l2_cycles", "memory_cycles", "atomic_trips"])
def test_longer_ways_take_more(figure):
    assert seconds(SKINNY, **{figure: 1.2}) > seconds(SKINNY)


@pytest.mark.parametrize("chip", [H200, ADA], ids=lambda chip: chip.name)
@pytest.mark.parametrize("work", [PRODUCT, SKINNY], ids=["wide", "skinny"])
def test_no_launch_beats_its_bound(work, chip):
    figures = chip.figures
    arithmetic = work.useful / (chip.mma_cycle * chip.processors * figures.clock_hz.central)
    assert seconds(work, chip) > max(arithmetic, work.memory_bytes / figures.memory_bytes_s.central)


def test_code_adds_instructions_and_takes_registers():
    assert seconds(PRODUCT, code=replace(CODE, warps=8)) > seconds(PRODUCT)
    assert resident(Launched(PRODUCT, CODE), H200) == 3
    assert resident(Launched(PRODUCT, replace(CODE, registers=255)), H200) == 2
    assert resident(Launched(PRODUCT, CODE, barrier=True), H200) == 1


def test_a_loop_has_what_is_not_multiplied_outside_of_it():
    """As in whole_attention, whose loop is for own keys beyond those that stand before it."""
    dozen = replace(CODE, loop=replace(CODE.loop, instructions=10_000))
    all_outside = Counts(1000, PRODUCT.mma_operations / CODE.warps)
    half_outside = replace(all_outside, mma_operations=all_outside.mma_operations / 2)
    none, half, full = (
        seconds(PRODUCT, code=replace(dozen, outside=outside)) for outside in (all_outside, half_outside, CODE.outside)
    )
    assert none < half < full
    assert none == seconds(PRODUCT, code=replace(CODE, outside=all_outside, loop=replace(CODE.loop, instructions=0)))


def test_a_loop_beside_the_main_one_runs_as_often_as_the_work_says():
    loops = replace(CODE, behind=Counts(400))
    once, thrice = (seconds(replace(PRODUCT, units=units), code=loops) for units in (1, 3))
    more = seconds(replace(PRODUCT, units=1), code=replace(loops, outside=Counts(CODE.outside.instructions + 800)))
    assert once == seconds(PRODUCT, code=CODE)
    assert thrice == pytest.approx(more)
    assert seconds(replace(PRODUCT, units=1, stores=800.0), code=loops) == pytest.approx(more)


def test_what_comes_during_a_barriers_wait_takes_the_rest_alone():
    def at_a_barrier(held: float) -> float:
        launched = Launched(replace(SKINNY, trips=1.0, l2_bytes=1e4, held_bytes=held), None, barrier=True)
        return launch_time(launched, H200, H200.settings()[0]).total_s

    at = H200.settings()[0]
    wait = at["barrier_trips"] * at["l2_cycles"] * at["processor_bytes_cycle"]
    assert at_a_barrier(0) == at_a_barrier(0.9 * wait) < at_a_barrier(3 * wait)


def test_parts_of_ones_rows_alone_are_moved():
    split = replace(PRODUCT, combines=8, parts=6, part_bytes=1e5)
    assert seconds(replace(split, moved_parts=2.0)) < seconds(replace(split, moved_parts=7.0)) == seconds(split)
    assert seconds(replace(split, gathers=1.0)) < seconds(replace(split, gathers=3.0))


def test_products_of_single_warps_and_narrow_ones_of_warpgroups_take_longer():
    """On Hopper, whose mma.sync reaches a part of the rate, as does a wgmma of few columns."""
    single = replace(CODE, loop=replace(CODE.loop, grouped=0.0, paid=0.0))
    narrow = replace(CODE, loop=replace(CODE.loop, paid=2 * CODE.loop.paid))
    whole = seconds(PRODUCT, code=CODE)
    assert seconds(PRODUCT, code=single) > whole
    assert seconds(PRODUCT, code=narrow) > whole


def test_blocks_fit_beside_others_where_they_leave_room():
    work = replace(PRODUCT, programs=H200.processors)
    small, large = Launched(work, CODE), Launched(work, replace(CODE, shared=200 * 1024))
    assert share_beside(large, large, H200) == share_beside(large, small, H200) == 0
    assert share_beside(small, small, H200) == 1
    assert share_beside(Launched(replace(work, programs=66), large.code), large, H200) == 0.5


def test_what_is_fetched_ahead_is_not_waited_for():
    one = Launched(SKINNY, CODE)
    chained, apart = (chain_seconds([replace(one, work=work)] * 3, H200, H200.settings()[0])[-1].total_s for work in (
        SKINNY, replace(SKINNY, ahead_bytes=0.0)
    ))  # fmt: skip
    assert chained < apart
    ada = [chain_seconds([one] * 3, ADA, ADA.settings()[0])[index].total_s for index in (0, 2)]
    assert ada[0] == ada[1]


def test_a_barrier_costs_less_than_a_launch_on_ada():
    at = ADA.settings()[0]
    launched, behind = (launch_time(Launched(SKINNY, barrier=barrier), ADA, at) for barrier in (False, True))
    assert behind.start_s < launched.start_s


def test_a_range_is_each_figures_own_in_quadrature():
    assert spread([10.0, 7.0, 13.0, 14.0, 6.0]) == pytest.approx((5.0, 10.0, 15.0))
    assert spread([10.0, 10.0, 10.0]) == (10.0, 10.0, 10.0)


def test_a_tile_of_ones_own_can_be_asked_for():
    low, central, high = predict_launch("linear", (32, 1024, 4096), Tactic(32, 64, 128, 8), H200)
    assert 0 < low < central < high
    assert predict_launch("linear", (32, 1024, 4096), Tactic(32, 64, 128, 8), H200, combines=0)[1] < central


def test_streamed_stages_wait_for_nothing_but_for_all_their_weights_together():
    """Their own times do not know of memory; all of them together take at least as long as it and L2 need."""
    at = H200.settings()[0]
    work = replace(SKINNY, ahead_bytes=SKINNY.memory_bytes, streamed_bytes=SKINNY.memory_bytes)
    stage = Launched(work, None, barrier=True, streamed=True)
    times = chain_seconds([stage] * 3, H200, at)
    assert times[1] == launch_time(stage, H200, at, 1.0)
    assert times[1].total_s < chain_seconds([replace(stage, streamed=False)] * 3, H200, at)[1].total_s
    pairs = [(stage, time) for time in times]
    alone = sum(time.total_s for time in times)
    assert alone * stream_share(pairs, at)[0] > max(alone, 3 * work.memory_bytes / at["memory_bytes_s"])
    slow = {**at, "memory_bytes_s": at["memory_bytes_s"] / 1000}
    bound = 3 * work.memory_bytes / slow["memory_bytes_s"]
    share, limit = stream_share(pairs, slow)
    assert alone * share == pytest.approx(bound, rel=1e-3)
    assert limit == "memory"
    assert stream_share(pairs, {**at, "memory_bytes_s": 1e18, "l2_bytes_cycle": 1e18}) == (pytest.approx(1.0), "")
    assert stream_share([], at) == (1.0, "")
