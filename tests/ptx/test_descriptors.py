"""Tensor descriptors as arguments of kernels: what TMA brings of tiles that stand in them, and what is reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xr0_engine.env import emulated_arch

if emulated_arch() is None:
    pytest.skip("needs XR0_EMULATE=90", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx import EmulationError
from tests.ptx.decoder import decode
from tests.ptx.machine import Grid, LoadedProgram, run
from tests.ptx.machine_support import SETTINGS
from tests.ptx.test_machine_tensors import boxed, numbers, tensor_map
from xr0_engine.kernels.device import gdc_begin
from xr0_engine.kernels.launch import launch

with_tma = pytest.mark.skipif((emulated_arch() or 0) < 90, reason="needs XR0_EMULATE=90: a chip with TMA")
TILE = (16, 64)


@triton.jit
def _copy_tile(scale, x, out, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    gdc_begin(PDL)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + place, x.load([row, column]) * scale)


@triton.jit
def _copy_pairs(scale, x, out, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    gdc_begin(PDL)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile = tl.reshape(x.load([row, 0, column]), (ROWS, COLUMNS))
    tl.store(out + place, tile * scale)


def copied(kernel, descriptor: TensorDescriptor, row: int, column: int, tile: tuple[int, int] = TILE) -> torch.Tensor:
    out = torch.full(tile, torch.nan).to(descriptor.base.dtype)
    # An argument before the descriptor, so that it does not lie where parameters begin.
    sizes = {"row": row, "column": column, "ROWS": tile[0], "COLUMNS": tile[1]}
    launch(kernel, (1,), {"scale": 3, "x": descriptor, "out": out, **sizes}, warps=2)
    return out


@with_tma
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [(8, 32), (20, 96), (-4, -32)], ids=["inside", "behind", "before"])
def test_tiles(dtype, first):
    x = torch.arange(30 * 128).remainder(61).view(30, 128).to(dtype)
    found = copied(_copy_tile, TensorDescriptor(x, [30, 128], [128, 1], list(TILE)), *first)
    box = boxed(x.float().numpy(), first[::-1], TILE[::-1])
    np.testing.assert_array_equal(found.float().numpy(), 3 * box)


@with_tma
def test_rows_in_pairs():
    x = torch.arange(64 * 64).remainder(127).view(64, 64).half()
    pairs = TensorDescriptor(x, [32, 2, 64], [64, 32 * 64, 1], [8, 2, 64])
    expected = torch.stack((x[8:16], x[40:48]), 1).view(16, 64)
    assert torch.equal(copied(_copy_pairs, pairs, 8, 0), 3 * expected)


@with_tma
def test_sizes_beyond_the_memory_are_reported():
    x = torch.zeros(30, 128, dtype=torch.float16)
    with pytest.raises(EmulationError, match="global-bounds"):
        copied(_copy_tile, TensorDescriptor(x, [32, 128], [128, 1], list(TILE)), 16, 0)


@pytest.mark.skipif((emulated_arch() or 0) >= 90, reason="needs XR0_EMULATE=89: a chip without TMA")
def test_without_tma_a_descriptor_is_refused():
    x = torch.zeros(30, 128, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match="_copy_tile: a tensor descriptor without TMA"):
        copied(_copy_tile, TensorDescriptor(x, [30, 128], [128, 1], list(TILE)), 0, 0)


PARAMETER = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u32 first, .param .align 64 .b8 map[128], .param .u64 out)
{{
.reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %d<9>; .shared .align 1024 .b8 memory[2048];
mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0; mov.b32 %r1, memory; add.s32 %r2, %r1, 1024; ld.param.b64 %d2, [out];
{address}
@%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 128;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r2], [%d1, {{8, 1}}], [%r1];
W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra W;
shl.b32 %r3, %r0, 2; mad.wide.u32 %d2, %r0, 4, %d2; add.s32 %r3, %r3, %r2;
ld.shared.b32 %r4, [%r3]; st.global.b32 [%d2], %r4;
ret;
}}
"""


@pytest.mark.parametrize(
    "address",
    ["mov.b64 %d3, map; cvta.param.u64 %d1, %d3;", "mov.b32 %r5, map; cvt.u64.u32 %d3, %r5; cvta.param.u64 %d1, %d3;"],
    ids=["64 bits", "32 bits"],
)
def test_a_parameter_has_an_address(address):
    """As Triton 3.6 and as 3.9 take it."""
    array, out = numbers(4, 64), np.zeros((4, 16), np.uint16)
    parameters = bytes(64) + tensor_map(array, (16, 4)).tobytes() + out.ctypes.data.to_bytes(8, "little")
    grid = Grid(LoadedProgram(decode(PARAMETER.format(address=address))), (1, 1, 1), (1, 1, 1), 1, 2048, parameters)
    ranges = sorted((each.ctypes.data, each.ctypes.data + each.nbytes) for each in (array, out))
    outcome = run([grid], ranges, SETTINGS)
    assert not outcome.reports, outcome
    np.testing.assert_array_equal(out, boxed(array, (8, 1), (16, 4)))
