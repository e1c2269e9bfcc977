"""Products whose weight rows are the MMA's, against their oracles: the schedules "swapped" and "warpgroups" of linear,
swiglu and qkv."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.products import Product, workspace
from tests.kernels.support import DEVICE, DTYPES, Frame, assert_close
from tests.kernels.test_bulk import batches
from tests.kernels.test_linear import USES, check_linear, check_swiglu
from tests.kernels.test_qkv import USES as QKV_USES
from tests.kernels.test_qkv import check_qkv
from xr0_engine.env import emulated_arch
from xr0_engine.fused.ops import FusedOps, tactic_key
from xr0_engine.fused.sizing import reserve
from xr0_engine.kernels import fused_reference, swapped
from xr0_engine.kernels.arguments import (
    InputNorm,
    Residual,
    Schedule,
    StatsOut,
    Tactic,
    Weight,
    end_passes,
    heads_of_tile,
    sharers_of,
)
from xr0_engine.kernels.launch import INTERPRETED
from xr0_engine.kernels.linear import linear, swiglu

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no interpreter runs Gluon")
HOPPER = emulated_arch() == 90 if DEVICE.type == "cpu" else torch.cuda.get_device_capability() == (9, 0)
SCHEDULES: list[Schedule] = ["swapped", "warpgroups"] if HOPPER else ["swapped"]
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
HALVES = [case for case in DTYPES if case.id != "float32"]
SWAPPED = Tactic(256, 64, 64, split_k=1, warps=4, stages=3, schedule="swapped")
CUT = replace(SWAPPED, split_k=7)
"""More programs than these shapes have tiles: all are cut along K."""
WAVES = replace(SWAPPED, split_k=5)
"""A wave of whole tiles, and two that are cut."""
UNEVEN = replace(SWAPPED, split_k=4)
"""A wave of whole tiles, and some that two programs each have, or where K is one block a whole tile for some."""
LARGE = Tactic(256, 128, 64, split_k=1, warps=8, stages=2, schedule="swapped")
LINE = replace(SWAPPED, split_k=5)
"""Of three tiles, which five programs share out: where a program's share ends, a tile may go on."""

# Rows that make pieces of 32 + 8; of 64 + 32 + 8; of 128 + 16 + 8; of two groups of 64 + 16; of 256; of
# 256 + 32 + 16. For warpgroups some are wider.
LINEAR = [
    pytest.param("plain", (1, 40, 200, 128), SWAPPED, id="40 rows, K of no whole block"),
    pytest.param("plain", (1, 40, 8, 64), replace(SWAPPED, stages=2), id="K within a block"),
    pytest.param("vision fc2", (1, 100, 200, 192), CUT, id="100 rows, cut"),
    pytest.param("vision fc2", (1, 100, 200, 192), LARGE, id="100 rows, N of no whole tile"),
    pytest.param("deepstack", (1, 100, 640, 128), CUT, id="deepstack, cut"),
    pytest.param("patch embedding", (1, 100, 136, 448), WAVES, id="100 rows, waves"),
    pytest.param("merger fc1", (1, 150, 4160, 64), LARGE, id="slots in parts"),
    pytest.param("vision fc1", (1, 150, 328, 328), WAVES, id="150 rows, waves, N of no whole tile"),
    pytest.param("vision fc1", (1, 150, 328, 448), replace(UNEVEN, block_m=128), id="two groups, waves"),
    pytest.param("vision fc1", (1, 150, 328, 448), replace(UNEVEN, block_m=128, split_k=3), id="two groups by turns"),
    pytest.param("vision fc1", (1, 150, 328, 448), replace(CUT, block_m=128, split_k=17), id="two groups, cut"),
    pytest.param("vision fc1", (1, 300, 72, 128), replace(LARGE, block_m=512, block_k=32), id="a group of 300"),
    pytest.param("vision fc1", (1, 150, 64, 328), UNEVEN, id="a wave for some alone"),
    pytest.param("deepstack", (1, 100, 640, 192), LINE, id="a line"),
    pytest.param("vision fc1", (1, 250, 128, 256), replace(LARGE, stages=4, split_k=6), id="a piece of 256, cut"),
]


@pytest.mark.parametrize("dtype", HALVES)
@schedules
@pytest.mark.parametrize(("use", "shape", "tactic"), LINEAR)
def test_linear(use, shape, tactic, schedule, dtype):
    check_linear(shape, dtype, USES[use], replace(tactic, schedule=schedule))


@pytest.mark.parametrize("dtype", HALVES)
@schedules
@pytest.mark.parametrize(
    ("shape", "tactic"),
    [
        pytest.param((1, 40, 200, 256), replace(CUT, block_n=64, warps=8), id="40 rows, cut"),
        pytest.param((1, 100, 72, 208), replace(WAVES, block_n=32), id="100 rows, waves, F of no whole tile"),
        pytest.param((1, 100, 64, 128), replace(LARGE, block_n=128, warps=16), id="16 warps"),
    ],
)
def test_swiglu(shape, tactic, schedule, dtype):
    check_swiglu(shape, "rms", replace(tactic, schedule=schedule), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@schedules
@pytest.mark.parametrize(
    ("use", "shape", "tactic"),
    [
        pytest.param("vlm", (1, 100, 136, 2, 1, 128), replace(CUT, warps=8), id="heads of 128, cut"),
        pytest.param("vlm", (1, 100, 72, 2, 1, 128), replace(SWAPPED, warps=8), id="heads of 128"),
        pytest.param("vlm, last layer", (1, 40, 72, 2, 1, 64), SWAPPED, id="heads of 64, no queries"),
        pytest.param("vision", (1, 100, 72, 1, 1, 64), UNEVEN, id="heads of 64"),
        pytest.param("vision", (1, 100, 136, 1, 1, 64), replace(LARGE, split_k=5), id="two in a tile, one too many"),
        pytest.param("vision", (1, 100, 72, 2, 2, 64), LARGE, id="two in a tile"),
    ],
)
def test_qkv(use, shape, tactic, schedule, dtype):
    check_qkv(shape, dtype, replace(tactic, schedule=schedule), QKV_USES[use])


@schedules
@pytest.mark.parametrize("tactic", [SWAPPED, CUT], ids=["whole", "cut"])
def test_norms_heads_and_statistics_of_batches(tactic, schedule):
    """As in the vision of two views: rows of both in a group, and in a piece."""
    dtype, tactic = torch.bfloat16, replace(tactic, schedule=schedule)
    check_qkv((2, 50, 136, 2, 1, 64), dtype, tactic, QKV_USES["vision"], adjacent=True)
    check_qkv((2, 50, 136, 2, 1, 128), dtype, replace(tactic, warps=8), QKV_USES["vlm"], adjacent=True)
    for use in ("patch embedding", "vision fc1", "deepstack"):
        check_linear((2, 50, 136, 128), dtype, USES[use], tactic, adjacent=True)


@schedules
@pytest.mark.parametrize("tactic", [SWAPPED, CUT], ids=["whole", "cut"])
def test_replays_are_bit_identical_and_leave_the_counters(tactic, schedule):
    torch.manual_seed(0)
    product = Product.make((1, 40, 200, 64), torch.float16, bias=True)
    scratch, outs = workspace(), []
    for _ in range(2):
        outs.append(torch.empty(1, 40, 64, dtype=torch.float16, device=DEVICE))
        linear(
            product.x,
            product.weight,
            outs[-1],
            **product.arguments,
            tactic=replace(tactic, schedule=schedule),
            workspace=scratch,
        )
    assert torch.equal(*outs)
    assert scratch.counters(1).item() == 0


@schedules
@pytest.mark.parametrize("tactic", [SWAPPED, CUT], ids=["whole", "cut"])
def test_batches_that_follow_each_other_are_rows(tactic, schedule):
    product, base = batches()
    tactic = replace(tactic, schedule=schedule)
    out, exact = Frame(2, 20, 64, dtype=torch.float16), torch.empty(2, 20, 64, device=DEVICE)
    options = {**product.arguments, "residual": Residual(base), "tactic": tactic, "workspace": workspace()}
    linear(product.x, product.weight, out.view, **options)
    fused_reference.linear(product.x, product.weight, exact, **options)
    assert_close(out.result(), exact, product.textbook(torch.float16) + base)


def test_a_neighbours_tile_that_cannot_be_is_the_default_and_ones_own_is_refused():
    """Of 200 rows four warps hold the sums, of 250 not."""
    product, tactic = Product.make((1, 250, 72, 128), torch.float16), replace(LARGE, warps=4)
    out = Frame(1, 250, 128, dtype=torch.float16)
    ops = FusedOps("triton", DEVICE, {tactic_key("linear", (200, 128, 72), torch.float16): tactic})
    ops.linear(product.x, product.weight, out.view)
    assert_close(out.result(), product.x.float() @ product.weight.data.float().T, product.textbook(torch.float16))
    ops = FusedOps("triton", DEVICE, {tactic_key("linear", (250, 128, 72), torch.float16): tactic})
    with pytest.raises(ValueError, match="more sums than 4 warps hold"):
        ops.linear(product.x, product.weight, out.view)


@schedules
def test_what_is_reserved_on_paper_is_enough_for_a_chip_of_fewer_processors(schedule, monkeypatch):
    """Twelve tiles for twelve programs need no scratch memory, for five they do."""
    product = Product.make((1, 40, 200, 12 * 64), torch.float16)
    tactic = replace(SWAPPED, split_k=12, schedule=schedule)
    key = tactic_key("linear", (40, 12 * 64, 200), torch.float16)
    ops, out = FusedOps("triton", DEVICE, {key: tactic}), Frame(1, 40, 12 * 64, dtype=torch.float16)
    arguments = {name: value for name, value in product.arguments.items() if value is not None}
    reserve(ops, lambda ops: ops.linear(product.x, product.weight, out.view, **arguments))
    monkeypatch.setattr(swapped, "processors", lambda device: 5)
    ops.linear(product.x, product.weight, out.view, **arguments)
    assert_close(out.result(), product.x.float() @ product.weight.data.float().T, product.textbook(torch.float16))


@schedules
def test_a_flow_s_product_with_the_key_of_a_vision_s_has_the_default(schedule):
    """Of many observations a layer's down product has as many rows as two views: gates and norms are its own."""
    torch.manual_seed(0)
    product = Product.make((1, 100, 136, 128), torch.bfloat16)
    out, exact = Frame(1, 100, 128), torch.empty(1, 100, 128, device=DEVICE)
    stream, gate = torch.randn(1, 100, 128).to(DEVICE), torch.randn(128).to(DEVICE)
    sums = [torch.zeros(2, 1, 100, 2, device=DEVICE) for _ in range(2)]
    asked = [{"residual": Residual(stream, gate), "stats": StatsOut(each, gate)} for each in sums]
    key = tactic_key("linear", (100, 128, 136), torch.bfloat16)
    ops = FusedOps("triton", DEVICE, {key: replace(SWAPPED, schedule=schedule)})
    ops.linear(product.x, product.weight, out.view, **asked[0])
    run = {"tactic": SWAPPED, "workspace": workspace()}
    fused_reference.linear(product.x, product.weight, exact, **asked[1], **run)
    assert_close(out.result(), exact)
    assert_close(*sums)


@schedules
def test_silu_of_the_largest_numbers(schedule):
    """Its exponential overflows for one sign and is nothing for the other."""
    x = torch.zeros(1, 64, 64).to(DEVICE, torch.bfloat16)
    x[..., 0] = 200
    x[:, ::2, 0] = -200
    data = torch.zeros(128, 64).to(DEVICE, torch.bfloat16)
    data[:, 0] = 1
    out, exact = Frame(1, 64, 64, dtype=torch.bfloat16), torch.empty(1, 64, 64, device=DEVICE)
    tactic = replace(SWAPPED, block_n=64, warps=8, schedule=schedule)
    swiglu(x, Weight(data), out.view, tactic=tactic, workspace=workspace())
    fused_reference.swiglu(x, Weight(data), exact, tactic=tactic, workspace=workspace())
    assert_close(out.result(), exact, exact.bfloat16())


def _sums(slots: int = 1) -> torch.Tensor:
    return torch.ones(slots, 1, 20, 2)


@pytest.mark.parametrize(
    ("changed", "tactic", "error", "message"),
    [
        ({"x": torch.zeros(1, 20, 72)}, SWAPPED, NotImplementedError, "'swapped': expected x and weight both in"),
        ({"norm": InputNorm(_sums(2), 1e-6, "double_rms")}, SWAPPED, NotImplementedError, "got 'double_rms'"),
        (
            {"residual": Residual(torch.zeros(1, 20, 64).half(), torch.ones(64))},
            SWAPPED,
            NotImplementedError,
            "no gate",
        ),
        ({"stats": StatsOut(_sums(), torch.ones(64))}, SWAPPED, NotImplementedError, "no stats_weight"),
        ({}, replace(SWAPPED, warps=8), ValueError, "16 of 64 weight rows, got 8"),
        ({"x": torch.zeros(1, 20, 76).half()[..., :72]}, SWAPPED, NotImplementedError, "of x at multiples of 16 bytes"),
        (
            {"x": torch.zeros(1, 20, 72).half()[..., :68], "weight": Weight(torch.zeros(64, 72).half()[:, :68])},
            SWAPPED,
            NotImplementedError,
            "K in multiples of 8, got 68",
        ),
        ({}, replace(SWAPPED, block_m=1024), ValueError, "block_m: expected at most 512 for schedule 'swapped'"),
    ],
    ids=["float32", "norm", "gate", "weighted", "warps", "stride", "K", "block_m"],
)
def test_what_it_is_not_for_is_refused(changed, tactic, error, message):
    given = {"x": torch.zeros(1, 20, 72).half(), "weight": Weight(torch.zeros(64, 72).half())} | changed
    given = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    out = torch.empty(*given["x"].shape[:2], 64, dtype=torch.float16, device=DEVICE)
    with pytest.raises(error, match=message):
        linear(out=out, **given, tactic=tactic, workspace=workspace())


def test_more_sums_than_registers_are_refused():
    x, weight = torch.zeros(1, 250, 72).half().to(DEVICE), Weight(torch.zeros(128, 72).half().to(DEVICE))
    out = torch.empty(1, 250, 128, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="256 rows by 128 are more sums than 4 warps hold"):
        linear(x, weight, out, tactic=replace(LARGE, warps=4), workspace=workspace())


@pytest.mark.skipif(HOPPER, reason="needs a chip of another kind")
def test_warpgroups_of_other_chips_are_refused():
    x, out = torch.zeros(1, 20, 72).half().to(DEVICE), torch.empty(1, 20, 64).half().to(DEVICE)
    weight, tactic = Weight(torch.zeros(64, 72).half().to(DEVICE)), replace(SWAPPED, schedule="warpgroups")
    with pytest.raises(NotImplementedError, match=r"expected a chip (of sm_90|from sm_90 on), got"):
        linear(x, weight, out, tactic=tactic, workspace=workspace())


@pytest.mark.skipif(not HOPPER, reason="needs a chip whose warpgroups multiply")
def test_warpgroups_are_of_four_warps():
    x, out = torch.zeros(1, 20, 72).half().to(DEVICE), torch.empty(1, 20, 32).half().to(DEVICE)
    tactic = replace(SWAPPED, block_n=32, warps=2, schedule="warpgroups")
    with pytest.raises(ValueError, match="a multiple of 4 of which each has 16 of 32 weight rows, got 2"):
        linear(x, Weight(torch.zeros(32, 72).half().to(DEVICE)), out, tactic=tactic, workspace=workspace())


def test_heads_of_a_tile():
    assert [heads_of_tile(replace(SWAPPED, block_n=width), 64) for width in (32, 64, 128, 256)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("height", "warps", "unit", "parts", "passes"),
    [
        # 13 passes of 16 rows over 6 parts are three for some, two of 32 would be 64 rows for others.
        (208, 8, 128, 6, 1),
        # Four of 32 rows for one of two, or one of 128.
        (208, 8, 64, 2, 4),
        # Eight parts of a pass are all that a thread shall hold.
        (256, 8, 128, 8, 1),
    ],
)
def test_rows_are_finished_together_where_it_costs_nobody_a_row(height, warps, unit, parts, passes):
    assert end_passes(height, warps, unit, parts) == passes


@pytest.mark.parametrize(
    ("shared", "programs", "blocks", "sharers", "parts"),
    [
        (0, 132, 40, 0, 1),
        # Six programs each: twelve of 132 have nothing.
        (20, 132, 64, 120, 6),
        # Two each would leave a third of all without any.
        (48, 128, 80, 128, 4),
        # No more than K has blocks, of which one is not cut.
        (1, 8, 3, 3, 3),
        (2, 4, 1, 0, 1),
    ],
)
def test_how_many_share_out_what_is_cut(shared, programs, blocks, sharers, parts):
    assert sharers_of(shared, programs, blocks) == (sharers, parts)
