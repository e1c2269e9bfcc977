"""How schedules share work out: nothing is lost, padding and parts are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xr0_engine.bench.predict.work import attention_work, lambda_work, op_work
from xr0_engine.fused.ops import Tactic

GATE_UP = (208, 19456, 2560)
DOWN = (208, 2560, 9728)


@pytest.mark.parametrize(
    ("kind", "shape", "tactic"),
    [
        ("linear", DOWN, Tactic(128, 128, 64, 2, 8, 4)),
        ("swiglu", GATE_UP, Tactic(128, 64, 64, 1, 8, 4)),
        ("linear", DOWN, Tactic(256, 64, 64, 1, 8, 4, schedule="stream")),
        ("linear", DOWN, Tactic(256, 64, 64, 132, 8, 4, schedule="stream")),
        ("linear", DOWN, Tactic(256, 128, 64, 132, 8, 4, schedule="tma")),
        ("linear", DOWN, Tactic(256, 128, 64, 132, 8, 4, schedule="swapped")),
        ("swiglu", GATE_UP, Tactic(256, 64, 64, 132, 8, 4, schedule="warpgroups")),
        ("linear", (512, 1024, 1024), Tactic(256, 128, 64, 12, 8, 4, schedule="warpgroups")),
        ("qkv", (208, 6144, 2560, 128), Tactic(128, 128, 64, 1, 8, 4)),
        ("qkv", (208, 6144, 2560, 128), Tactic(256, 128, 64, 132, 8, 4, schedule="swapped")),
        ("qkv", (512, 3072, 1024, 64), Tactic(128, 128, 64, 1, 8, 4, schedule="swapped")),
        ("linear", (32, 1024, 4096), Tactic(32, 16, 1024, 1, 8, 2, schedule="whole")),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "schedule", value),
)
def test_programs_do_all_of_a_product(kind, shape, tactic):
    work = op_work(kind, shape, tactic)
    done = work.programs * work.busy * work.mma_operations
    assert done * (1 - work.wasted) == pytest.approx(work.useful, rel=0.03)
    assert work.memory_bytes == 2 * shape[1] * shape[2]
    assert work.ahead_bytes <= work.memory_bytes


def test_rows_of_tiles_are_padding_and_mixed_heights_have_less():
    assert op_work("linear", (194, 2560, 9728), Tactic(128, 128)).wasted == pytest.approx(1 - 194 / 256)
    assert op_work("linear", (194, 2560, 9728), Tactic(256, 128, schedule="stream")).wasted <= 0.08


@pytest.mark.parametrize(
    ("rows", "warps", "warpgroups"),
    [(183, 184, 192), (208, 208, 208), (302, 2 * 152, 2 * 160), (960, 4 * 240, 4 * 256)],
)
def test_what_warps_multiply_alone_has_hardly_a_row_too_many(rows, warps, warpgroups):
    """Fewer and wider pieces where warpgroups multiply, which are fast with those."""
    for schedule, computed in (("swapped", warps), ("warpgroups", warpgroups)):
        work = op_work("linear", (rows, 2560, 9728), Tactic(256, 128, 64, 1, 8, schedule=schedule))
        assert work.wasted == pytest.approx(1 - rows / computed)


def test_a_split_tile_is_combined_and_moved_through_memory():
    whole, split = (op_work("linear", (12, 1024, 4096), Tactic(16, 64, 128, parts)) for parts in (1, 8))
    assert (whole.combines, split.combines, split.parts) == (0, 16, 8)
    assert split.programs == 8 * whole.programs
    assert split.all_end_bytes - whole.all_end_bytes == 2 * 16 * 8 * (16 * 64 * 4)


def test_a_line_of_tiles_is_cut_between_programs():
    # 20 tiles of 152 blocks over 132 programs: only a cut between tiles leaves them whole.
    work = op_work("linear", DOWN, Tactic(256, 128, 64, 132, schedule="stream"))
    assert (work.programs, work.combines) == (132, 20)
    assert op_work("linear", DOWN, Tactic(256, 128, 64, 20, schedule="stream")).combines == 0
    assert op_work("linear", DOWN, Tactic(256, 128, 64, 10, schedule="stream")).combines == 0


def test_who_has_a_part_of_a_tile_ends_some_of_its_rows():
    # 20 tiles for 120 of 132 programs; 13 passes over the rows of each are three for some of six.
    even = op_work("linear", DOWN, Tactic(256, 128, 64, 132, schedule="swapped", warps=8))
    assert (even.programs, even.combines, even.parts, even.gathers) == (132, 20, 6, 3)
    assert even.moved_parts == pytest.approx(1 + 3 * 6 * 16 / 208)
    # 48 heads: on a line, each of 132 programs has up to two.
    line = op_work("qkv", (208, 6144, 2560, 128), Tactic(256, 128, 64, 132, 8, schedule="swapped"))
    assert (line.combines, line.parts, line.runs) == (48, 4, 2)
    whole = op_work("qkv", (208, 6144, 2560, 128), Tactic(256, 128, 64, 1, 8, schedule="swapped"))
    assert (whole.programs, whole.combines, whole.moved_parts) == (48, 0, 0)


def test_a_wave_of_whole_tiles_comes_before_parts_and_two_heads_fit_a_tile():
    work = op_work("swiglu", GATE_UP, Tactic(256, 64, 64, 132, 8, schedule="swapped"))
    assert (work.programs, work.tiles, work.combines, work.trips) == (132, 152, 20, 40 + 7)
    assert op_work("qkv", (512, 3072, 1024, 64), Tactic(256, 128, 64, 1, 8, schedule="swapped")).tiles == 2 * 24


def test_a_warp_wide_split_of_k_needs_no_combine_and_has_its_weight_ahead():
    work = op_work("linear", (12, 1024, 1024), Tactic(16, 16, 1024, 1, 8, schedule="whole"))
    assert work.combines == 0
    assert work.ahead_bytes == work.memory_bytes


def test_causal_attention_is_half_of_it_and_segments_are_not_the_longests():
    shape = (1, 32, 256, 8, 256, 128)
    causal, full = (attention_work(shape, Tactic(64, 64), causal) for causal in (True, False))
    assert causal.useful == pytest.approx(full.useful / 2, rel=0.01)
    assert causal.busy < full.busy == 1
    uneven = attention_work((2, 16, 320, 16, 320, 64), Tactic(64, 64), lengths=(320, 256))
    assert uneven.useful == 4 * (320**2 + 256**2) * 16 * 64
    assert uneven.busy < 1


def test_cached_keys_are_shared_out():
    shape = (1, 8, 12, 8, 224, 128)
    whole, split = (lambda_work(shape, Tactic(16, 32, split_k=parts)) for parts in (1, 7))
    assert (split.programs, split.combines) == (56, 8)
    assert split.trips < whole.trips
    assert lambda_work(shape, replace(Tactic(16, 32, warps=8), schedule="whole")).combines == 0


@pytest.mark.parametrize(
    ("kind", "tactic", "complaint"),
    [
        ("convolution", Tactic(), "kind: expected an op that has tactics, got 'convolution'"),
        ("linear", replace(Tactic(), schedule="woven"), "tactic.schedule: expected tiled, .*; got 'woven'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(kind, tactic, complaint):
    with pytest.raises(ValueError, match=complaint):
        op_work(kind, (32, 1024, 1024), tactic)
