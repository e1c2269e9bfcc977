"""What a kernel of many stages is made of: a barrier of the whole grid, and the products, each a stage of its own.

The barrier is a counter that only grows during a launch: stage n begins when n times the number of programs have
arrived. A program asks for its first weight blocks of a product before it waits for the others.

Why it holds:
- What any thread of any program wrote before a stage, all threads of all see in it. A program's threads meet, then one
  of them counts up with a release. Each counts up what the others left, so whoever acquires the last of them acquires
  all; that is one thread of each program, and it meets the others again (device.py: wait_for).
- Every program counts at every stage, whether it has a tile there or not: no stage begins before the slowest program
  has passed the one before.
- Leaving counts as well, but comes after the last wait: then the last stage has begun for all.
- The last program to leave sets the counter back to zero. Nobody reads it any more: the thread that leaves is the one
  that waited. The next launch starts when this one has ended.
- 32 bits do: 5 steps of 16 layers on 170 processors count to 70,000.

Everything is contiguous. TILE: (block_m, weight rows, block_k, split_k). COMPILED: false in the interpreter, which
runs one program and no inline assembly. Shape legend: B batch, M tokens of each.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import STATS_COLUMNS
from xr0_engine.kernels.device import paired, tile_of, wait_for
from xr0_engine.kernels.linear import LinearEnd, SwigluEnd, _linear, _swiglu
from xr0_engine.kernels.product import How, Product, prefetch_weight
from xr0_engine.kernels.qkv import HeadsEnd, _qkv

SLOT = tl.constexpr(STATS_COLUMNS)


class Shared(NamedTuple):
    """What all stages of a kernel have in common. tokens: of each batch, in the streams; eps: of all norms."""

    barrier: Tensor
    partials: Tensor
    counters: Tensor
    batch: int
    tokens: int
    eps: float


@triton.jit
def arrive(barrier):
    """All that this program wrote before is there for those who have waited."""
    # The counter is touched by one thread: every thread's stores must be there before.
    tl.debug_barrier()
    tl.atomic_add(barrier, 1, sem="release", scope="gpu")


@triton.jit
def wait(barrier, stage, COMPILED: tl.constexpr):
    """Until all programs have arrived at the stage."""
    if COMPILED:
        wait_for(barrier, stage * tl.num_programs(0))


@triton.jit
def leave(barrier, stages):
    """Sets the counter back, once nobody waits for it any more."""
    if tl.atomic_add(barrier, 1, sem="acq_rel", scope="gpu") == (stages + 1) * tl.num_programs(0) - 1:
        tl.store(barrier, 0)


@triton.jit
def _begin(
    barrier, stage, product, OUTPUTS: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr, COMPILED: tl.constexpr
):
    """A stage's barrier; meanwhile its weight, of OUTPUTS rows, is on its way. Returns the number of its tiles."""
    tiles = product.row_tiles * triton.cdiv(OUTPUTS, TILE[1]) * TILE[3]
    arrive(barrier)
    if COMPILED and tl.program_id(0) < tiles:
        _, split, column_tile = tile_of(tl.program_id(0), product.row_tiles, TILE[3])
        if GATED:
            n = paired(column_tile * (TILE[1] // 2), OUTPUTS // 2, TILE[1])
        else:
            n = column_tile * TILE[1] + tl.arange(0, TILE[1])
        prefetch_weight(product.w, product.w_n, tl.minimum(n, OUTPUTS - 1), split, product.inputs, TILE[3], TILE[2])
    wait(barrier, stage, COMPILED)
    return tiles


@triton.constexpr_function
def _how(norm, inputs, stream, tile):
    """How a stage's product runs."""
    return How(
        NORM=norm, SLOTS=triton.next_power_of_2(triton.cdiv(inputs, STATS_COLUMNS)), LIBRARY=False, SPLIT_K=tile[3],
        BLOCK_M=tile[0], BLOCK_N=tile[1], BLOCK_K=tile[2], EVEN_K=inputs % tile[2] == 0, STREAM=stream,
    )  # fmt: skip


@triton.jit
def qkv_stage(
    shared, stage, x, sums, w, bias, col_scale, q, k, v, q_norm, k_norm, cos, sin,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, STREAM: tl.constexpr,
    TILE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """x: a stream of COLUMNS; q, k, v: (B, HEADS, M, DIM) each."""
    tokens, rows = shared.tokens, shared.batch * shared.tokens
    product = Product(
        x=x, x_b=tokens * COLUMNS, x_m=COLUMNS, w=w, w_n=COLUMNS, scale=None, bias=bias, col_scale=col_scale,
        sums=sums, sums_s=2 * rows, sums_b=2 * tokens, sums_m=2, column_sums=None, norm_eps=shared.eps,
        partials=shared.partials, counters=shared.counters, rows=rows, batch_rows=tokens, inputs=COLUMNS,
        slots=triton.cdiv(COLUMNS, SLOT), row_tiles=tl.cdiv(rows, TILE[0]),
    )  # fmt: skip
    HOW: tl.constexpr = _how(NORM, COLUMNS, STREAM, TILE)
    tiles = _begin(shared.barrier, stage, product, 3 * HEADS * DIM, False, TILE, COMPILED)
    head_b, head_h, table_b = HEADS * tokens * DIM, tokens * DIM, tokens * (DIM // 2)
    end = HeadsEnd(
        query_heads=HEADS, kv_heads=HEADS, q=q, q_b=head_b, q_h=head_h, q_m=DIM, k=k, k_b=head_b, k_h=head_h, k_m=DIM,
        v=v, v_b=head_b, v_h=head_h, v_m=DIM, q_weight=q_norm, k_weight=k_norm, eps=shared.eps, cos=cos, cos_b=table_b,
        cos_m=DIM // 2, sin=sin, sin_b=table_b, sin_m=DIM // 2,
    )  # fmt: skip
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _qkv(program, product, end, HOW, False)


@triton.jit
def linear_stage(
    shared, stage, x, x_rows, w, out, residual, gate, residual_sums, residual_weight, stats, stats_weight,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """x: (B, x_rows, INPUTS); out: as many of each batch's rows of a stream of OUTPUTS, as is the residual."""
    rows = shared.batch * x_rows
    product = Product(
        x=x, x_b=x_rows * INPUTS, x_m=INPUTS, w=w, w_n=INPUTS, scale=None, bias=None, col_scale=None, sums=None,
        sums_s=0, sums_b=0, sums_m=0, column_sums=None, norm_eps=0.0, partials=shared.partials,
        counters=shared.counters, rows=rows, batch_rows=x_rows, inputs=INPUTS, slots=0,
        row_tiles=tl.cdiv(rows, TILE[0]),
    )  # fmt: skip
    HOW: tl.constexpr = _how(None, INPUTS, STREAM, TILE)
    tiles = _begin(shared.barrier, stage, product, OUTPUTS, False, TILE, COMPILED)
    out_b, sums_s, sums_b = shared.tokens * OUTPUTS, 2 * shared.batch * shared.tokens, 2 * shared.tokens
    end = LinearEnd(
        outputs=OUTPUTS, out=out, out_b=out_b, out_m=OUTPUTS, residual=residual, residual_b=out_b, residual_m=OUTPUTS,
        gate=gate, base_sums=residual_sums, base_sums_s=sums_s, base_sums_b=sums_b, base_sums_m=2,
        base_weight=residual_weight, base_eps=shared.eps, extra=None, extra_r=0, extra_index=None, extra_index_b=0,
        stats=stats, stats_s=sums_s, stats_b=sums_b, stats_m=2, stats_weight=stats_weight,
    )  # fmt: skip
    OUT_SLOTS: tl.constexpr = triton.next_power_of_2(triton.cdiv(OUTPUTS, SLOT))
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _linear(program, product, end, False, None, OUT_SLOTS, HOW, False)


@triton.jit
def swiglu_stage(
    shared, stage, x, sums, w, bias, col_scale, out,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """x: a stream of COLUMNS; out: (B, M, INNER)."""
    tokens, rows = shared.tokens, shared.batch * shared.tokens
    product = Product(
        x=x, x_b=tokens * COLUMNS, x_m=COLUMNS, w=w, w_n=COLUMNS, scale=None, bias=bias, col_scale=col_scale,
        sums=sums, sums_s=2 * rows, sums_b=2 * tokens, sums_m=2, column_sums=None, norm_eps=shared.eps,
        partials=shared.partials, counters=shared.counters, rows=rows, batch_rows=tokens, inputs=COLUMNS,
        slots=triton.cdiv(COLUMNS, SLOT), row_tiles=tl.cdiv(rows, TILE[0]),
    )  # fmt: skip
    HOW: tl.constexpr = _how(NORM, COLUMNS, STREAM, TILE)
    tiles = _begin(shared.barrier, stage, product, 2 * INNER, True, TILE, COMPILED)
    end = SwigluEnd(outputs=INNER, out=out, out_b=tokens * INNER, out_m=INNER)
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _swiglu(program, product, end, HOW, False)
