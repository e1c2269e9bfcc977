"""The schedule "whole" against the oracle: K shared out over a program's warps."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.kernels import test_linear as linear_tests
from tests.kernels.products import workspace
from tests.kernels.support import ARCHS, DEVICE, DTYPES, Frame, assert_close, randn
from tests.kernels.test_linear import USES, check_swiglu, make_case, run_oracle, textbook
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import StatsOut, Tactic, Weight
from xr0_engine.kernels.launch import PROCESSORS
from xr0_engine.kernels.linear import linear
from xr0_engine.kernels.whole import whole_steps, whole_tactic

WHOLE = Tactic(16, 16, 64, warps=4, schedule="whole")
"""K is two steps."""
SPLIT = replace(WHOLE, warps=2, block_k=32, split_k=2)
TACTICS = [
    pytest.param(SPLIT, id="split K"),
    pytest.param(replace(WHOLE, block_m=32, block_k=128), id="one step"),
    pytest.param(replace(WHOLE, block_n=32, warps=1), id="one warp"),
]
SHAPE = (2, 5, 128, 72)
COLUMNS = 16
"""Of a slot of the statistics: as many as the narrowest tile has."""


def check_linear(shape, dtype, use, tactic, x_dtype=None):
    product, epilogue, stats_options = make_case(shape, dtype, use, x_dtype)
    batch, rows, _, outputs = shape
    out = Frame(batch, rows, outputs, dtype=x_dtype or dtype)
    sums = Frame(-(-outputs // COLUMNS), batch, rows, 2)
    if use.get("stats") == "plain":
        sums.view[..., 1] = 0
    stats = StatsOut(sums.view, **stats_options) if "stats" in use else None
    arguments = {**product.arguments, **epilogue, "stats": stats, "tactic": tactic, "workspace": workspace()}
    linear(product.x, product.weight, out.view, **arguments)
    exact, _ = run_oracle(product, epilogue, stats_options)
    plain = textbook(product, **epilogue, dtype=dtype)
    assert_close(out.result(), exact, None if dtype == torch.float32 else plain)
    if stats is not None:
        written = torch.zeros_like(sums.view)
        fused_reference.write_stats(out.result().float(), StatsOut(written, **stats_options))
        assert_close(sums.result(), written)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use", ["end of a dit layer", "dit input", "merger fc1"])
def test_linear(use, dtype):
    check_linear(SHAPE, dtype, USES[use], WHOLE)


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float16"])
@pytest.mark.parametrize("tactic", TACTICS)
def test_linear_of_other_tiles(tactic, dtype):
    check_linear(SHAPE, dtype, USES["dit input"] | USES["middle of the dit"], tactic)


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float32"])
@pytest.mark.parametrize("use", ["dit input", "end of a dit layer"])
def test_linear_of_a_float32_stream(use, dtype):
    check_linear(SHAPE, dtype, USES[use], WHOLE, x_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    check_swiglu((2, 9, 128, 80), "double_rms", WHOLE, dtype)


@pytest.mark.compiled
def test_replays_are_bit_identical():
    """Whoever is last to come adds up the parts of a split K."""
    torch.manual_seed(0)
    x, weight, scratch = (
        randn(1, 12, 128, dtype=torch.bfloat16),
        Weight(randn(64, 128, dtype=torch.bfloat16)),
        workspace(),
    )
    outs = [torch.empty(1, 12, 64, device=DEVICE) for _ in range(5)]
    for out in outs:
        linear(x, weight, out, tactic=SPLIT, workspace=scratch)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("use", ["patch embedding", "end of a dit layer"])
def test_a_tile_is_as_wide_as_the_slots_that_it_writes(use):
    """Narrow tiles beside slots of 64 columns."""
    linear_tests.check_linear(SHAPE, torch.float32, USES[use], WHOLE)


def test_defaults_run_at_once():
    """What runs unmeasured up to 32 rows: all programs together, K in as few steps as registers hold."""
    for arch, rows in product(ARCHS, (12, 32)):
        for kind, n, k in (("linear", 3072, 1024), ("linear", 1024, 1024), ("linear", 1024, 4096)):
            tactic = whole_tactic(kind, rows, n, k, arch)
            assert -(-n // tactic.block_n) * tactic.split_k <= PROCESSORS[arch]
            assert whole_steps(4, 2, k, tactic.block_n, tactic).STEPS <= 4
    assert whole_tactic("linear", 33, 1024, 1024, 90) is None
    assert whole_tactic("linear", 12, 1024, 1536, 90) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_k": 96}, "power of two"),
        ({"block_k": 32}, "tactic.block_k: expected a multiple of 64 for 4 warps, got 32"),
        ({"split_k": 4}, "expected a divisor of K = 128, got 256"),
    ],
)
def test_impossible_tiles_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_linear(SHAPE, torch.float32, USES["middle of the dit"], replace(WHOLE, **change))
