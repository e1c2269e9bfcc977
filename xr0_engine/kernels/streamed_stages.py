"""The stages of a streamed flow (streamed.py) but its attention: what surrounds the products of ring.py.

As the kernels that are otherwise launched one after the other, rounded where they round. Who writes a row of a stream
also leaves it scaled and rounded as the product that reads it next would: so the readers move half of the bytes.

What a stage needs that was there before its barrier is loaded ahead of it: gates, biases, what is added to.

Shape legend: streamed.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from xr0_engine.kernels.arguments import FlowBuffers
from xr0_engine.kernels.ring import (
    CHUNK_ROWS,
    Stream,
    add_pairs,
    add_tile,
    ask,
    barrier,
    fragment_place,
    gated_layout,
    load_rows,
    multiply,
    norm_of,
    norms_of,
    sigmoid,
    take,
    tile_layout,
    wait,
)


class Loop(NamedTuple):
    """What all stages have in common. rows: of all batches' tokens; tokens, context: of each batch."""

    stream: Stream
    buffers: FlowBuffers
    barrier: Tensor
    partials: Tensor
    counters: Tensor
    rows: int
    tokens: int
    context: int
    eps: float


class End(NamedTuple):
    """What follows a product of a stream: out = base + gate * y, out's sums, and scaled = out * scale, rounded.

    normed: whether the base is normalised first, by base_sums and base_weight. scales: whether there is a scale.
    """

    out: Any
    sums: Any
    sums_weight: Any
    base: Any
    base_sums: Any
    base_weight: Any
    normed: Any
    gate: Any
    scaled: Any
    scales: Any
    scale: Any


@gluon.jit
def tile_rows(W: gl.constexpr):
    ROWS: gl.constexpr = W.ROWS
    return gl.arange(0, ROWS, layout=gl.SliceLayout(1, tile_layout()))


@gluon.jit
def tile_columns(tile):
    return tile * CHUNK_ROWS + gl.arange(0, CHUNK_ROWS, layout=gl.SliceLayout(0, tile_layout()))


@gluon.jit
def scale_stage(loop, x, scale, scaled, W: gl.constexpr):
    """scaled = x * scale, of a stream that somebody else wrote."""
    row = tile_rows(W)[:, None]
    for tile in range(gl.program_id(0), W.COLUMNS // CHUNK_ROWS, gl.num_programs(0)):
        columns = tile_columns(tile)[None, :]
        y = gl.load(x + row * W.COLUMNS + columns, row < loop.rows, 0.0) * gl.load(scale + columns)
        gl.store(scaled + fragment_place(row, columns, W), y.to(gl.bfloat16), row < loop.rows)


@gluon.jit
def qkv_stage(loop, stage, number, last, ring, x, sums, bias, double, W: gl.constexpr):
    """raw = norm(x) @ weight.T + bias, of this program's chunks up to last. double: as norms_of."""
    OUTPUTS: gl.constexpr = 3 * W.COLUMNS
    rows, first = loop.rows, last - OUTPUTS // CHUNK_ROWS
    chunk = gl.program_id(0) + number * gl.num_programs(0)
    columns = tile_columns(gl.minimum(chunk, last - 1) - first)
    added = gl.load(bias + columns)
    wait(loop.barrier, stage)
    if chunk < last:
        factors = load_rows(x, W)
        row_scale = norms_of(sums, rows, loop.eps, double, W)[:, None]
        row = tile_rows(W)[:, None]
        while chunk < last:
            y = add_tile(multiply(factors, take(ring, number, W), W)) * row_scale + added[None, :]
            gl.store(loop.buffers.raw + row * OUTPUTS + columns[None, :], y, row < rows)
            number += 1
            chunk += gl.num_programs(0)
            if chunk < last:
                ask(loop.stream, ring, number - 1 + W.RING, W)
                columns = tile_columns(chunk - first)
                added = gl.load(bias + columns)
    return number


@gluon.jit
def gate_up_stage(loop, stage, number, last, ring, x, sums, bias, out, W: gl.constexpr):
    """out = silu(gate) * up, of norm(x) @ weight.T + bias."""
    HALF: gl.constexpr = CHUNK_ROWS // 2
    GATED: gl.constexpr = gated_layout()
    rows, first = loop.rows, last - W.INNER // HALF
    chunk = gl.program_id(0) + number * gl.num_programs(0)
    column = gl.arange(0, HALF, layout=gl.SliceLayout(0, GATED))
    columns = (gl.minimum(chunk, last - 1) - first) * HALF + column
    gate_bias, up_bias = gl.load(bias + columns), gl.load(bias + W.INNER + columns)
    wait(loop.barrier, stage)
    if chunk < last:
        factors = load_rows(x, W)
        row_scale = norms_of(sums, rows, loop.eps, True, W)
        row_scale = gl.convert_layout(row_scale, gl.SliceLayout(1, GATED))[:, None]
        ROWS: gl.constexpr = W.ROWS
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATED))[:, None]
        while chunk < last:
            gate, up = add_pairs(multiply(factors, take(ring, number, W), W), W)
            gate = gate * row_scale + gate_bias[None, :]
            up = up * row_scale + up_bias[None, :]
            y = gate * sigmoid(gate) * up
            gl.store(out + fragment_place(row, columns[None, :], W), y.to(gl.bfloat16), row < rows)
            number += 1
            chunk += gl.num_programs(0)
            if chunk < last:
                ask(loop.stream, ring, number - 1 + W.RING, W)
                columns = (chunk - first) * HALF + column
                gate_bias, up_bias = gl.load(bias + columns), gl.load(bias + W.INNER + columns)
    return number


@gluon.jit
def _base_scale(end, loop, W: gl.constexpr):
    """(ROWS,) of tile_layout: what the base's norm multiplies its rows by."""
    scale = 1.0
    if end.base_weight is not None:
        scale = gl.where(end.normed, norm_of(end.base_sums, loop.rows, loop.eps, W), 1.0)
    return scale


@gluon.jit
def end_ahead(end, base_scale, tile, rows, W: gl.constexpr):
    """(base, gate, weight of the sums, scale) of a tile, loaded before its product is there."""
    row, columns = tile_rows(W)[:, None], tile_columns(tile)
    base = gl.load(end.base + gl.minimum(row, rows - 1) * W.COLUMNS + columns[None, :])
    if end.base_weight is not None:
        base *= base_scale[:, None]
        base *= gl.where(end.normed, gl.load(end.base_weight + columns), 1.0)[None, :]
    # Of what is not there some number: Triton 3.6 returns no None.
    gate, sums_weight = 0.0, 0.0
    if end.gate is not None:
        gate = gl.load(end.gate + columns)
    if end.sums_weight is not None:
        sums_weight = gl.load(end.sums_weight + columns)
    return base, gate, sums_weight, gl.where(end.scales, gl.load(end.scale + columns), 1.0)


@gluon.jit
def finish(y, end, ahead, tile, rows, W: gl.constexpr):
    """Residual, output, its sums, and what the next product reads of it."""
    base, gate, sums_weight, scale = ahead
    row, columns = tile_rows(W), tile_columns(tile)
    inside, place = row < rows, row[:, None] * W.COLUMNS + columns[None, :]
    if end.gate is not None:
        y = base + y * gate[None, :]
    gl.store(end.out + place, y, inside[:, None])
    scaled = end.scaled + fragment_place(row[:, None], columns[None, :], W)
    gl.store(scaled, (y * scale[None, :]).to(gl.bfloat16), inside[:, None])
    sums = end.sums + tile * (2 * rows) + 2 * row
    gl.store(sums, gl.sum(y * y, 1), inside)
    if end.sums_weight is not None:
        weighted = y * sums_weight[None, :]
        gl.store(sums + 1, gl.sum(weighted * weighted, 1), inside)


@gluon.jit
def out_stage(loop, stage, number, last, ring, x, end, W: gl.constexpr):
    """end of x @ weight.T."""
    rows, first = loop.rows, last - W.COLUMNS // CHUNK_ROWS
    chunk = gl.program_id(0) + number * gl.num_programs(0)
    tile = gl.minimum(chunk, last - 1) - first
    base_scale = _base_scale(end, loop, W)
    ahead = end_ahead(end, base_scale, tile, rows, W)
    wait(loop.barrier, stage)
    if chunk < last:
        factors = load_rows(x, W)
        while chunk < last:
            y = add_tile(multiply(factors, take(ring, number, W), W))
            finish(y, end, ahead, tile, rows, W)
            number += 1
            chunk += gl.num_programs(0)
            if chunk < last:
                ask(loop.stream, ring, number - 1 + W.RING, W)
                tile = chunk - first
                ahead = end_ahead(end, base_scale, tile, rows, W)
    return number


@gluon.jit
def down_stage(loop, stage, number, last, ring, x, end, W: gl.constexpr):
    """end of x @ weight.T, whose K is shared out over programs: each has the same part of it in all its tiles. Who
    comes last adds up the parts in the order of K."""
    SPLITS: gl.constexpr = W.INNER // W.COLUMNS
    rows, first = loop.rows, last - W.COLUMNS // CHUNK_ROWS * SPLITS
    chunk = gl.program_id(0) + number * gl.num_programs(0)
    tile = gl.minimum(chunk, last - 1) - first
    base_scale = _base_scale(end, loop, W)
    ahead = end_ahead(end, base_scale, tile // SPLITS, rows, W)
    wait(loop.barrier, stage)
    if chunk < last:
        split = tile % SPLITS
        factors = load_rows(x + split * (W.COLUMNS * W.ROWS), W)
        place = tile_rows(W)[:, None] * CHUNK_ROWS + tile_columns(0)[None, :]
        while chunk < last:
            y = add_tile(multiply(factors, take(ring, number, W), W))
            done = SPLITS - 1
            parts = loop.partials + tile // SPLITS * (SPLITS * W.ROWS * CHUNK_ROWS) + place
            if SPLITS > 1:
                gl.store(parts + split * (W.ROWS * CHUNK_ROWS), y)
                # The counter is touched by one thread: every thread's part must be there before.
                barrier()
                done = gl.atomic_add(loop.counters + tile // SPLITS, 1, sem="acq_rel", scope="gpu")
            if done == SPLITS - 1:
                if SPLITS > 1:
                    y = gl.load(parts, cache_modifier=".cg")
                    for other in gl.static_range(1, SPLITS):
                        y += gl.load(parts + other * (W.ROWS * CHUNK_ROWS), cache_modifier=".cg")
                    gl.store(loop.counters + tile // SPLITS, 0)
                finish(y, end, ahead, tile // SPLITS, rows, W)
            number += 1
            chunk += gl.num_programs(0)
            if chunk < last:
                ask(loop.stream, ring, number - 1 + W.RING, W)
                tile = chunk - first
                ahead = end_ahead(end, base_scale, tile // SPLITS, rows, W)
    return number
