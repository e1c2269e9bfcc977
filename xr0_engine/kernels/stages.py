"""What a kernel of many stages is made of: a barrier of the whole grid, and the products, each a stage of its own.

The barrier is a counter that only grows during a launch: stage n begins when n times the number of programs have
arrived. Before it waits for the others, a program asks for its first weight blocks of a product, or has them already:
the tiles of the schedule "whole" (whole.py) hold them in registers.

Why it holds:
- The first stage of a launch has number 0 and no barrier: it waits for the kernels ahead of it, if they may still run.
  Nobody counts before: the counter is theirs until they have ended.
- What any thread of any program wrote before a stage, all threads of all see in it. A program's threads meet, then one
  of them counts up with a release. Each counts up what the others left, so whoever acquires the last of them acquires
  all; that is one thread of each program, and it meets the others again (device.py: wait_for).
- Every program counts at every later stage, whether it has a tile there or not: no stage begins before the slowest
  program has passed the one before.
- Leaving counts as well, but comes after the last wait: then the last stage has begun for all.
- The last program to leave sets the counter back to zero. Nobody reads it any more: the thread that leaves is the one
  that waited. The next launch starts when this one has ended.
- 32 bits do: 5 steps of 16 layers on 170 processors count to 70,000.

Everything is contiguous. TILE: a Tiling. SLOTS: of a stream's sums. COMPILED: false in the interpreter, which runs one
program and no inline assembly. Shape legend: B batch, M tokens of each.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.device import gdc_begin, paired, tile_of, wait_for
from xr0_engine.kernels.ends import HeadsEnd, LinearEnd, SwigluEnd
from xr0_engine.kernels.linear import _linear, _swiglu
from xr0_engine.kernels.product import How, Product, prefetch_weight, take_tile
from xr0_engine.kernels.qkv import _qkv
from xr0_engine.kernels.whole import Whole, linear_after, linear_ahead, swiglu_after, swiglu_ahead
from xr0_engine.kernels.whole_attention import attention_after, attention_ahead


class Shared(NamedTuple):
    """What all stages of a kernel have in common. tokens: of each batch, in the streams; eps: of all norms."""

    barrier: Tensor
    partials: Tensor
    counters: Tensor
    batch: int
    tokens: int
    eps: float


class Tiling(NamedTuple):
    """How a stage's product is shared out. BLOCK_N: weight rows. PARTS to AHEAD: as Whole has them, 0 for "tiled"."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int
    PARTS: int = 0
    STEPS: int = 0
    HELD: int = 0
    AHEAD: int = 0


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
def _enter(barrier, stage, COMPILED: tl.constexpr, PDL: tl.constexpr):
    """The wait of a stage that a launch may begin with."""
    if stage > 0:
        wait(barrier, stage, COMPILED)
    else:
        gdc_begin(PDL)


@triton.jit
def leave(barrier, stages):
    """Sets the counter back, once nobody waits for it any more."""
    if tl.atomic_add(barrier, 1, sem="acq_rel", scope="gpu") == (stages + 1) * tl.num_programs(0) - 1:
        tl.store(barrier, 0)


@triton.constexpr_function
def _how(norm, inputs, slots, stream, tile):
    """How a stage's product runs."""
    return How(
        NORM=norm, SLOTS=triton.next_power_of_2(slots), LIBRARY=False, SPLIT_K=tile.SPLIT_K, BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, EVEN_K=inputs % tile.BLOCK_K == 0, STREAM=stream,
        FACTOR="bfloat16",
    )  # fmt: skip


@triton.constexpr_function
def _whole(tile):
    return Whole(tile.PARTS, tile.STEPS, tile.HELD, tile.AHEAD)


@triton.jit
def _prefetch(product, tiles, OUTPUTS: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr):
    """Ask for the first weight blocks of this program's first tile."""
    if tl.program_id(0) < tiles:
        _, split, column_tile = tile_of(tl.program_id(0), product.row_tiles, TILE.SPLIT_K)
        if GATED:
            n = paired(column_tile * (TILE.BLOCK_N // 2), OUTPUTS // 2, TILE.BLOCK_N)
        else:
            n = column_tile * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
        n = tl.minimum(n, OUTPUTS - 1)
        prefetch_weight(product.w, product.w_n, n, split, product.inputs, TILE.SPLIT_K, TILE.BLOCK_K)


@triton.jit
def qkv_stage(
    shared, stage, x, sums, w, bias, col_scale, q, k, v, q_norm, k_norm, cos, sin,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    STREAM: tl.constexpr, TILE: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x: a stream of COLUMNS; q, k, v: (B, HEADS, M, DIM) each. A launch may begin with it."""
    tokens, rows = shared.tokens, shared.batch * shared.tokens
    product = Product(
        x=x, x_b=tokens * COLUMNS, x_m=COLUMNS, w=w, w_n=COLUMNS, x_scale=None, x_scale_b=0,
        scale=None, bias=bias, col_scale=col_scale,
        sums=sums, sums_s=2 * rows, sums_b=2 * tokens, sums_m=2, column_sums=None, norm_eps=shared.eps,
        partials=shared.partials, counters=shared.counters, rows=rows, batch_rows=tokens, inputs=COLUMNS,
        slots=SLOTS, row_tiles=tl.cdiv(rows, TILE.BLOCK_M),
    )  # fmt: skip
    HOW: tl.constexpr = _how(NORM, COLUMNS, SLOTS, STREAM, TILE)
    OUTPUTS: tl.constexpr = 3 * HEADS * DIM
    tiles = product.row_tiles * triton.cdiv(OUTPUTS, TILE.BLOCK_N) * TILE.SPLIT_K
    if stage > 0:
        arrive(shared.barrier)
    if COMPILED:
        _prefetch(product, tiles, OUTPUTS, False, TILE)
    _enter(shared.barrier, stage, COMPILED, PDL)
    head_b, head_h, table_b = HEADS * tokens * DIM, tokens * DIM, tokens * (DIM // 2)
    end = HeadsEnd(
        query_heads=HEADS, kv_heads=HEADS, q=q, q_b=head_b, q_h=head_h, q_m=DIM, k=k, k_b=head_b, k_h=head_h, k_m=DIM,
        v=v, v_b=head_b, v_h=head_h, v_m=DIM, q_weight=q_norm, k_weight=k_norm, eps=shared.eps, cos=cos, cos_b=table_b,
        cos_m=DIM // 2, sin=sin, sin_b=table_b, sin_m=DIM // 2,
    )  # fmt: skip
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _qkv(program, product, end, HOW, False)


@triton.jit
def raw_stage(
    shared, stage, x, sums, w, bias, col_scale, out,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, SLOTS: tl.constexpr, STREAM: tl.constexpr,
    TILE: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x: a stream of COLUMNS; out: (B, M, OUTPUTS), as the product leaves it. A launch may begin with it."""
    tokens, rows = shared.tokens, shared.batch * shared.tokens
    product = Product(
        x=x, x_b=tokens * COLUMNS, x_m=COLUMNS, w=w, w_n=COLUMNS, x_scale=None, x_scale_b=0,
        scale=None, bias=bias, col_scale=col_scale,
        sums=sums, sums_s=2 * rows, sums_b=2 * tokens, sums_m=2, column_sums=None, norm_eps=shared.eps,
        partials=shared.partials, counters=shared.counters, rows=rows, batch_rows=tokens, inputs=COLUMNS,
        slots=SLOTS, row_tiles=tl.cdiv(rows, TILE.BLOCK_M),
    )  # fmt: skip
    end = LinearEnd(
        outputs=OUTPUTS, out=out, out_b=tokens * OUTPUTS, out_m=OUTPUTS, residual=None, residual_b=0, residual_m=0,
        gate=None, base_sums=None, base_sums_s=0, base_sums_b=0, base_sums_m=0, base_weight=None, base_eps=0.0,
        extra=None, extra_r=0, extra_index=None, extra_index_b=0, stats=None, stats_s=0, stats_b=0, stats_m=0,
        stats_weight=None,
    )  # fmt: skip
    HOW: tl.constexpr = _how(NORM, COLUMNS, SLOTS, STREAM, TILE)
    WHOLE: tl.constexpr = _whole(TILE)
    NO_SLOTS: tl.constexpr = (1, 1)
    tiles = product.row_tiles * triton.cdiv(OUTPUTS, TILE.BLOCK_N) * TILE.SPLIT_K
    first = tl.program_id(0)
    if stage > 0:
        arrive(shared.barrier)
    if first >= tiles:
        _enter(shared.barrier, stage, COMPILED, PDL)
    for program in tl.range(first, tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
        tile = take_tile(program, product, HOW)
        ahead = linear_ahead(product, tile, end, HOW, WHOLE, COMPILED)
        if program == first:
            _enter(shared.barrier, stage, COMPILED, PDL)
        linear_after(ahead, product, tile, end, False, None, NO_SLOTS, HOW, WHOLE)


@triton.jit
def attention_stage(
    shared, stage, own, cached, out, window, context, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, OWN: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """As whole_attention.py has it; out: (B, M, HEADS * DIM). TILE: of attention_after, rows to parts."""
    tokens, SHARE = shared.tokens, HEADS // GROUPS
    tiles = tl.cdiv(tokens * SHARE, TILE[0])
    programs, first = tiles * GROUPS * shared.batch, tl.program_id(0)
    arrive(shared.barrier)
    if first >= programs:
        wait(shared.barrier, stage, COMPILED)
    for program in tl.range(first, programs, tl.num_programs(0), num_stages=1, disable_licm=True):
        ahead = attention_ahead(program, cached, tiles, GROUPS, DIM, TILE[1], TILE[2], COMPILED)
        if program == first:
            wait(shared.barrier, stage, COMPILED)
        attention_after(
            ahead, program, own, cached, out, tokens * HEADS * DIM, HEADS * DIM, tiles, GROUPS, tokens, window, context,
            scale, SHARE, DIM, TILE[0], TILE[1], TILE[2], TILE[3], OWN, True,
        )  # fmt: skip


@triton.jit
def linear_stage(
    shared, stage, x, x_rows, w, out, residual, gate, residual_sums, residual_weight, stats, stats_weight,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, OUT_SLOTS: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """x: (B, x_rows, INPUTS); out: as many of each batch's rows of a stream of OUTPUTS, as is the residual.

    OUT_SLOTS: as finish_linear has it.
    """
    rows = shared.batch * x_rows
    product = Product(
        x=x, x_b=x_rows * INPUTS, x_m=INPUTS, w=w, w_n=INPUTS, x_scale=None, x_scale_b=0,
        scale=None, bias=None, col_scale=None, sums=None,
        sums_s=0, sums_b=0, sums_m=0, column_sums=None, norm_eps=0.0, partials=shared.partials,
        counters=shared.counters, rows=rows, batch_rows=x_rows, inputs=INPUTS, slots=0,
        row_tiles=tl.cdiv(rows, TILE.BLOCK_M),
    )  # fmt: skip
    HOW: tl.constexpr = _how(None, INPUTS, 1, STREAM, TILE)
    tiles = product.row_tiles * triton.cdiv(OUTPUTS, TILE.BLOCK_N) * TILE.SPLIT_K
    first, count = tl.program_id(0), tl.num_programs(0)
    out_b, sums_s, sums_b = shared.tokens * OUTPUTS, 2 * shared.batch * shared.tokens, 2 * shared.tokens
    end = LinearEnd(
        outputs=OUTPUTS, out=out, out_b=out_b, out_m=OUTPUTS, residual=residual, residual_b=out_b, residual_m=OUTPUTS,
        gate=gate, base_sums=residual_sums, base_sums_s=sums_s, base_sums_b=sums_b, base_sums_m=2,
        base_weight=residual_weight, base_eps=shared.eps, extra=None, extra_r=0, extra_index=None, extra_index_b=0,
        stats=stats, stats_s=sums_s, stats_b=sums_b, stats_m=2, stats_weight=stats_weight,
    )  # fmt: skip
    arrive(shared.barrier)
    if TILE.PARTS == 0:
        if COMPILED:
            _prefetch(product, tiles, OUTPUTS, False, TILE)
        wait(shared.barrier, stage, COMPILED)
        for program in range(first, tiles, count):
            _linear(program, product, end, False, None, OUT_SLOTS, HOW, False)
    else:
        WHOLE: tl.constexpr = _whole(TILE)
        if first >= tiles:
            wait(shared.barrier, stage, COMPILED)
        # In stages the compiler would load the rows of a tile ahead of the barrier.
        for program in tl.range(first, tiles, count, num_stages=1, disable_licm=True):
            tile = take_tile(program, product, HOW)
            ahead = linear_ahead(product, tile, end, HOW, WHOLE, COMPILED)
            if program == first:
                wait(shared.barrier, stage, COMPILED)
            linear_after(ahead, product, tile, end, False, None, OUT_SLOTS, HOW, WHOLE)


@triton.jit
def swiglu_stage(
    shared, stage, x, sums, w, bias, col_scale, out,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, INNER: tl.constexpr, STREAM: tl.constexpr,
    TILE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """x: a stream of COLUMNS; out: (B, M, INNER)."""
    tokens, rows = shared.tokens, shared.batch * shared.tokens
    product = Product(
        x=x, x_b=tokens * COLUMNS, x_m=COLUMNS, w=w, w_n=COLUMNS, x_scale=None, x_scale_b=0,
        scale=None, bias=bias, col_scale=col_scale,
        sums=sums, sums_s=2 * rows, sums_b=2 * tokens, sums_m=2, column_sums=None, norm_eps=shared.eps,
        partials=shared.partials, counters=shared.counters, rows=rows, batch_rows=tokens, inputs=COLUMNS,
        slots=SLOTS, row_tiles=tl.cdiv(rows, TILE.BLOCK_M),
    )  # fmt: skip
    HOW: tl.constexpr = _how(NORM, COLUMNS, SLOTS, STREAM, TILE)
    tiles = product.row_tiles * triton.cdiv(2 * INNER, TILE.BLOCK_N) * TILE.SPLIT_K
    first, count = tl.program_id(0), tl.num_programs(0)
    end = SwigluEnd(outputs=INNER, out=out, out_b=tokens * INNER, out_m=INNER)
    arrive(shared.barrier)
    if TILE.PARTS == 0:
        if COMPILED:
            _prefetch(product, tiles, 2 * INNER, True, TILE)
        wait(shared.barrier, stage, COMPILED)
        for program in range(first, tiles, count):
            _swiglu(program, product, end, HOW, False)
    else:
        WHOLE: tl.constexpr = _whole(TILE)
        if first >= tiles:
            wait(shared.barrier, stage, COMPILED)
        for program in tl.range(first, tiles, count, num_stages=1, disable_licm=True):
            tile = take_tile(program, product, HOW)
            ahead = swiglu_ahead(product, tile, end, HOW, WHOLE, COMPILED)
            if program == first:
                wait(shared.barrier, stage, COMPILED)
            swiglu_after(ahead, product, tile, end, HOW, WHOLE)


@triton.jit
def wide_stage(
    shared, stage, x, sums, w, out, x_rows,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, SLOTS: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """gelu(x @ w.T), the first product of a wide output layer. x: the last x_rows of each batch's rows of a stream of
    COLUMNS, where sums are given their norm; out: (B, x_rows, OUTPUTS)."""
    rows = shared.batch * x_rows
    product = Product(
        x=x, x_b=shared.tokens * COLUMNS, x_m=COLUMNS, w=w, w_n=COLUMNS, x_scale=None, x_scale_b=0,
        scale=None, bias=None, col_scale=None,
        sums=sums, sums_s=2 * shared.batch * shared.tokens, sums_b=2 * shared.tokens, sums_m=2, column_sums=None,
        norm_eps=shared.eps, partials=shared.partials, counters=shared.counters, rows=rows, batch_rows=x_rows,
        inputs=COLUMNS, slots=SLOTS, row_tiles=tl.cdiv(rows, TILE.BLOCK_M),
    )  # fmt: skip
    end = LinearEnd(
        outputs=OUTPUTS, out=out, out_b=x_rows * OUTPUTS, out_m=OUTPUTS, residual=None, residual_b=0, residual_m=0,
        gate=None, base_sums=None, base_sums_s=0, base_sums_b=0, base_sums_m=0, base_weight=None, base_eps=0.0,
        extra=None, extra_r=0, extra_index=None, extra_index_b=0, stats=None, stats_s=0, stats_b=0, stats_m=0,
        stats_weight=None,
    )  # fmt: skip
    NORM: tl.constexpr = None if sums is None else "rms"
    HOW: tl.constexpr = _how(NORM, COLUMNS, SLOTS, STREAM, TILE)
    NO_SLOTS: tl.constexpr = (1, 1)
    tiles = product.row_tiles * triton.cdiv(OUTPUTS, TILE.BLOCK_N) * TILE.SPLIT_K
    first, count = tl.program_id(0), tl.num_programs(0)
    arrive(shared.barrier)
    if TILE.PARTS == 0:
        if COMPILED:
            _prefetch(product, tiles, OUTPUTS, False, TILE)
        wait(shared.barrier, stage, COMPILED)
        for program in tl.range(first, tiles, count, num_stages=1, disable_licm=True):
            _linear(program, product, end, False, "gelu_tanh", NO_SLOTS, HOW, False)
    else:
        WHOLE: tl.constexpr = _whole(TILE)
        if first >= tiles:
            wait(shared.barrier, stage, COMPILED)
        for program in tl.range(first, tiles, count, num_stages=1, disable_licm=True):
            tile = take_tile(program, product, HOW)
            ahead = linear_ahead(product, tile, end, HOW, WHOLE, COMPILED)
            if program == first:
                wait(shared.barrier, stage, COMPILED)
            linear_after(ahead, product, tile, end, False, "gelu_tanh", NO_SLOTS, HOW, WHOLE)
