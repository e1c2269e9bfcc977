"""Products whose programs hold rows in pieces of mixed heights and share out the tiles: the schedule "stream"."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.products import META_WORKSPACE, STREAM, meta, workspace
from tests.kernels.support import DEVICE, DTYPES, Frame, assert_close, randn
from tests.kernels.test_linear import USES, check_linear, check_swiglu, make_case, run_oracle
from tests.kernels.test_qkv import USES as QKV_USES
from tests.kernels.test_qkv import check_qkv
from xr0_engine.kernels.arguments import Residual, StatsOut, Tactic, Weight
from xr0_engine.kernels.launch import recording
from xr0_engine.kernels.linear import linear
from xr0_engine.kernels.product import row_pieces

TACTIC = STREAM.values[0]
WARPGROUPS = Tactic(128, 64, 64, 3, stages=3, schedule="stream")
MIXED = (2, 20, 72, 72)
"""40 rows, in pieces of 16 and 32, each with rows of both batches; three blocks of K, the last of which is not full."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use", USES)
def test_linear(use, dtype):
    check_linear(MIXED, dtype, USES[use], TACTIC)


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float32"])
def test_warpgroups_have_a_tail(dtype):
    """Pieces of 64 rows and of 16, and blocks of K enough to come back to the first one's place."""
    check_linear((1, 80, 320, 72), dtype, USES["vision fc2"], WARPGROUPS)


@pytest.mark.compiled
def test_shared_pieces_of_warpgroups_may_have_every_part_of_an_epilogue():
    """Norm, bias, a float32 stream and its statistics: Triton 3.9 is particular about where such parts are added up."""
    use = {"kind": "rms", "bias": True, "stats": "plain"}
    product, epilogue, stats_options = make_case((1, 80, 320, 128), torch.bfloat16, use)
    epilogue["residual"] = Residual(randn(1, 80, 128))
    out, sums = Frame(1, 80, 128), torch.zeros(2, 1, 80, 2, device=DEVICE)
    stats = StatsOut(sums, **stats_options)
    arguments = {**product.arguments, **epilogue, "stats": stats, "tactic": WARPGROUPS, "workspace": workspace()}
    linear(product.x, product.weight, out.view, **arguments)
    assert_close(out.result(), run_oracle(product, epilogue, stats_options)[0])


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float32"])
def test_linear_of_a_float32_stream(dtype):
    check_linear(MIXED, dtype, USES["dit input"], TACTIC, x_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "double_rms"])
def test_swiglu(kind, dtype):
    check_swiglu(MIXED, kind, TACTIC, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use", ["vision", "vlm, last layer", "dit"])
def test_qkv(use, dtype):
    check_qkv((2, 20, 72, 2, 1, 32), dtype, TACTIC, QKV_USES[use])


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float16"])
@pytest.mark.parametrize(
    "programs",
    [
        pytest.param(1, id="a tile each"),
        pytest.param(2, id="whole tiles, several each"),
        pytest.param(4, id="one and a half tiles each"),
        pytest.param(12, id="half a tile each"),
        pytest.param(13, id="up to four of a tile"),
        pytest.param(1000, id="more than there are blocks"),
    ],
)
def test_tiles_are_shared_out(programs, dtype):
    """Two groups of rows, the last of which is not full, by three tiles of columns, of five blocks each."""
    use = USES["rms norm"] | USES["end of a dit layer"]
    check_linear((1, 90, 136, 136), dtype, use, Tactic(64, 64, 32, programs, schedule="stream"))


def test_shared_tiles_repeat_bit_for_bit_and_leave_counters_zero():
    torch.manual_seed(0)
    x, weight, scratch = randn(1, 40, 80), Weight(randn(136, 80)), workspace()
    outs = [torch.empty(1, 40, 136, device=DEVICE) for _ in range(2)]
    for out in outs:
        linear(x, weight, out, tactic=Tactic(64, 64, 16, 8, schedule="stream"), workspace=scratch)
    assert torch.equal(*outs)
    assert not scratch.counters(3).any()


@pytest.mark.parametrize(
    ("rows", "most", "pieces"),
    [
        (194, 256, (128, 64, 16)),
        (208, 128, (64, 32, 16)),
        (315, 512, (256, 64)),
        (315, 256, (128, 32)),
        (512, 256, (256,)),
        (960, 256, (256,)),
        (12, 256, (16,)),
        (65, 256, (64, 16)),
    ],
)
def test_pieces_of_rows(rows, most, pieces):
    assert row_pieces(rows, most) == pieces


def test_what_cannot_be():
    x, weight, out = torch.empty(1, 2, 32), Weight(torch.empty(64, 32)), torch.empty(1, 2, 64)
    both = Tactic(16, 64, 32, library=True, schedule="stream")
    with pytest.raises(ValueError, match="schedule: expected 'tiled' with library, got 'stream'"):
        linear(x, weight, out, tactic=both, workspace=workspace())
    wide = (meta(1, 1 << 20, 4096), Weight(meta(4096, 4096)), meta(1, 1 << 20, 4096))
    many = Tactic(128, 64, 32, 132, schedule="stream")
    with recording(), pytest.raises(ValueError, match="split_k: expected 1 for 524288 tiles of 128 blocks each"):
        linear(*wide, tactic=many, workspace=META_WORKSPACE)
