"""Products by TMA against their oracles: the schedule "tma" of linear, swiglu and qkv."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.products import META_WORKSPACE, Product, meta, workspace
from tests.kernels.support import DEVICE, DTYPES, Frame, assert_close
from tests.kernels.test_linear import USES, check_linear, check_swiglu
from tests.kernels.test_qkv import USES as QKV_USES
from tests.kernels.test_qkv import check_qkv
from xr0_engine.env import emulated_arch
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import Residual, Tactic, Weight
from xr0_engine.kernels.linear import linear
from xr0_engine.kernels.product import row_pieces

by_tma = pytest.mark.skipif(
    (emulated_arch() or 90) < 90 or (DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0)),
    reason="needs a chip with TMA",
)
HALVES = [case for case in DTYPES if case.id != "float32"]
TMA = Tactic(128, 64, 64, split_k=1, warps=4, stages=3, schedule="tma")
SHARED = replace(TMA, split_k=5)
"""More programs than these shapes have tiles: all of them are shared."""
WAVES = replace(TMA, split_k=2)
"""A full wave, and a tile that is shared."""
LARGE = Tactic(256, 128, 64, split_k=1, warps=8, stages=2, schedule="tma")

# Rows that make pieces of 32 + 16; of 64 + 32 + 16; of 128 + 32, and of two groups of 64 + 16.
LINEAR = [
    pytest.param("plain", (1, 40, 72, 128), TMA, id="40 rows, K of more than a block"),
    pytest.param("vision fc2", (1, 100, 200, 136), WAVES, id="100 rows, waves, N of no whole tile"),
    pytest.param("deepstack", (1, 100, 136, 128), SHARED, id="100 rows, shared"),
    pytest.param("merger fc1", (1, 150, 64, 128), LARGE, id="150 rows"),
    pytest.param("vision fc1", (1, 150, 328, 64), SHARED, id="150 rows in two groups, shared"),
]


@by_tma
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("use", "shape", "tactic"), LINEAR)
def test_linear(use, shape, tactic, dtype):
    check_linear(shape, dtype, USES[use], tactic)


@by_tma
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("shape", "tactic"),
    [
        pytest.param((1, 40, 200, 256), replace(SHARED, block_n=64), id="40 rows, shared"),
        pytest.param((1, 100, 72, 208), replace(WAVES, block_n=32), id="100 rows, waves, F of no whole tile"),
    ],
)
def test_swiglu(shape, tactic, dtype):
    check_swiglu(shape, "rms", tactic, dtype)


@by_tma
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("use", "shape", "tactic"),
    [
        pytest.param("vlm", (1, 100, 136, 2, 1, 128), replace(SHARED, warps=8), id="heads of 128, shared"),
        pytest.param("vlm, last layer", (1, 40, 72, 2, 1, 64), TMA, id="heads of 64, no queries"),
        pytest.param("vision", (1, 100, 72, 1, 1, 64), WAVES, id="heads of 64, waves"),
    ],
)
def test_qkv(use, shape, tactic, dtype):
    check_qkv(shape, dtype, tactic, QKV_USES[use])


def batches(apart: int = 0) -> tuple[Product, torch.Tensor]:
    """Two of 20 rows, so many rows between them, and what is added to their product."""
    torch.manual_seed(0)
    product = Product.make((2, 20, 72, 64), torch.float16, bias=True)
    room = torch.full((2, 20 + apart, 72), torch.nan, dtype=torch.float16, device=DEVICE)
    room[:, :20] = product.x
    return replace(product, x=room[:, :20]), torch.randn(2, 20, 64).to(DEVICE, torch.float16)


@by_tma
def test_batches_that_follow_each_other_are_rows():
    product, base = batches()
    out, exact = Frame(2, 20, 64, dtype=torch.float16), torch.empty(2, 20, 64, device=DEVICE)
    options = {**product.arguments, "residual": Residual(base), "tactic": TMA, "workspace": workspace()}
    linear(product.x, product.weight, out.view, **options)
    fused_reference.linear(product.x, product.weight, exact, **options)
    assert_close(out.result(), exact, product.textbook(torch.float16) + base)


@by_tma
def test_replays_are_bit_identical_and_leave_the_counters():
    product, _ = batches()
    scratch, outs = workspace(), []
    for _ in range(2):
        outs.append(torch.empty(2, 20, 64, dtype=torch.float16, device=DEVICE))
        linear(product.x, product.weight, outs[-1], **product.arguments, tactic=SHARED, workspace=scratch)
    assert torch.equal(*outs)
    assert scratch.counters(1).item() == 0


@by_tma
@pytest.mark.parametrize(
    ("changed", "tactic", "error", "message"),
    [
        ({"x": torch.zeros(1, 20, 72)}, TMA, NotImplementedError, "got torch.float32, torch.float16"),
        ({"weight": Weight(torch.zeros(64, 72, dtype=torch.int8), torch.ones(64))}, TMA, NotImplementedError, "int8"),
        ({"col_scale": torch.ones(72)}, TMA, NotImplementedError, "expected no col_scale"),
        ({"x": torch.zeros(1, 20, 76).half()[..., :72]}, TMA, NotImplementedError, "of x at multiples of 16 bytes"),
        ({"x": torch.zeros(1, 20, 80).half()[..., 4:76]}, TMA, NotImplementedError, "the first at 8"),
        ({"x": batches(apart=1)[0].x}, TMA, NotImplementedError, "batches of x that follow each other"),
        ({}, replace(TMA, block_m=512), ValueError, "block_m: expected at most 256"),
    ],
    ids=["float32", "int8", "col_scale", "stride", "address", "batches", "block_m"],
)
def test_what_tma_cannot_do_is_refused(changed, tactic, error, message):
    given = {"x": torch.zeros(1, 20, 72).half(), "weight": Weight(torch.zeros(64, 72).half())} | changed
    given = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    out = torch.empty(*given["x"].shape[:2], 64, dtype=torch.float16, device=DEVICE)
    with pytest.raises(error, match=message):
        linear(out=out, **given, tactic=tactic, workspace=workspace())


def test_more_parts_than_are_counted_are_refused():
    x, weight, out = meta(1, 1 << 20, 4096), Weight(meta(1 << 15, 4096)), meta(1, 1 << 20, 1 << 15)
    with pytest.raises(ValueError, match="expected programs that 32 bits count, got 1073741824"):
        linear(x, weight, out, tactic=replace(TMA, split_k=1 << 30), workspace=META_WORKSPACE)


@pytest.mark.skipif((emulated_arch() or 90) >= 90, reason="needs XR0_EMULATE=89: a chip without TMA")
def test_a_chip_without_it_is_refused():
    x, out = torch.zeros(1, 20, 72).half(), torch.empty(1, 20, 64).half()
    with pytest.raises(NotImplementedError, match=f"expected a chip from sm_90 on, got sm_{emulated_arch()}"):
        linear(x, Weight(torch.zeros(64, 72).half()), out, tactic=TMA, workspace=workspace())


@pytest.mark.parametrize("rows", [194, 315, 512, 960])
def test_few_rows_are_none(rows):
    height = sum(row_pieces(rows, 256))
    assert -(-rows // height) * height <= 1.08 * rows
