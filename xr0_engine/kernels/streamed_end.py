"""What ends a step of a streamed flow (streamed.py): the output layer, the Euler update, the next step's input.

As flow.py's kernel of the same name and the products around it. Shape legend: streamed.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from xr0_engine.kernels.ring import (
    CHUNK_ROWS,
    WARPS,
    add_tile,
    ask,
    barrier,
    fragment_place,
    gelu_tanh,
    load_rows,
    multiply,
    norm_of,
    take,
    wait,
    weights_layout,
)
from xr0_engine.kernels.streamed_stages import end_ahead, finish, tile_columns, tile_rows

HIDDEN = gl.constexpr(64)
"""Columns of the action projector's hidden layer that a program computes."""


@gluon.jit
def tokens_stage(loop, stage, number, last, ring, x, end, W: gl.constexpr):
    """end of x @ weight.T, of the rows that are actions; the context's stay what they are."""
    rows, first = loop.rows, last - W.COLUMNS // CHUNK_ROWS
    chunk = gl.program_id(0) + number * gl.num_programs(0)
    tile = gl.minimum(chunk, last - 1) - first
    ahead = end_ahead(end, 1.0, tile, rows, W)
    wait(loop.barrier, stage)
    if chunk < last:
        factors = load_rows(x, W)
        is_action = (tile_rows(W) % loop.tokens >= loop.context)[:, None]
        while chunk < last:
            y = add_tile(multiply(factors, take(ring, number, W), W))
            finish(gl.where(is_action, y, ahead[0]), end, ahead, tile, rows, W)
            number += 1
            chunk += gl.num_programs(0)
            if chunk < last:
                ask(loop.stream, ring, number - 1 + W.RING, W)
                tile = chunk - first
                ahead = end_ahead(end, 1.0, tile, rows, W)
    return number


@gluon.jit
def wide_stage(loop, stage, number, last, ring, x, out, W: gl.constexpr):
    """out = gelu(norm(x) @ weight.T), the first product of a wide output layer."""
    rows, first = loop.rows, last - W.COLUMNS // CHUNK_ROWS
    chunk = gl.program_id(0) + number * gl.num_programs(0)
    wait(loop.barrier, stage)
    if chunk < last:
        factors = load_rows(x, W)
        row_scale = 1.0
        if W.DOUBLE:
            row_scale = norm_of(loop.buffers.end_sums, rows, loop.eps, W)[:, None]
        row = tile_rows(W)[:, None]
        while chunk < last:
            y = gelu_tanh(add_tile(multiply(factors, take(ring, number, W), W)) * row_scale)
            place = out + fragment_place(row, tile_columns(chunk - first)[None, :], W)
            gl.store(place, y.to(gl.bfloat16), row < rows)
            number += 1
            chunk += gl.num_programs(0)
            if chunk < last:
                ask(loop.stream, ring, number - 1 + W.RING, W)
    return number


class Output(NamedTuple):
    """What ends a step. weight1: (A, C); weight2: (A, A), None of a wide output layer, which gives the velocity itself;
    in_weight: (C, A), A = actions; prefix_length: (B,); action_mask: (B, T, A); z, z_next: the halves of buffers.z; dt:
    of a step."""

    weight1: Any
    weight2: Any
    in_weight: Any
    prefix_length: Any
    action_mask: Any
    z: Any
    z_next: Any
    dt: Any
    actions: Any


@gluon.constexpr_function
def step_layout() -> Any:
    """Of a product of a few rows: (rows, columns), warps beside each other."""
    return gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])


@gluon.jit
def _load_factor(matrix, first, first_k, outputs, inputs, COUNT: gl.constexpr, DEPTH: gl.constexpr):
    """(DEPTH, COUNT) of a matrix (outputs, inputs), from row first and column first_k on, as a product's second
    factor; zeros beyond it."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(1, step_layout(), 2)
    k = first_k + gl.arange(0, DEPTH, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    n = first + gl.arange(0, COUNT, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(matrix + n * inputs + k, (k < inputs) & (n < outputs), 0.0)


@gluon.jit
def _load_output(weight, tile, actions, W: gl.constexpr):
    """A chunk of the output layer's first weight, as take gives one; zeros behind the last action."""
    LAYOUT: gl.constexpr = weights_layout()
    PART: gl.constexpr = W.COLUMNS // WARPS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    k = gl.arange(0, PART, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    action = gl.arange(0, CHUNK_ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    action += tile * CHUNK_ROWS
    k += warp * PART
    return gl.load(weight + action * W.COLUMNS + k, (action < actions) & (k >= 0), 0.0)


@gluon.jit
def euler_stage(loop, stage, x, out, o, W: gl.constexpr):
    """As flow.py: euler_step. x: the end of the last layer, rounded, or what a wide output layer made of it. A program
    has HIDDEN columns of the next step's input."""
    b, rows, tokens, context = loop.buffers, loop.rows, loop.tokens, loop.context
    LAYOUT: gl.constexpr = step_layout()
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    ROWS: gl.constexpr = W.ROWS
    ACTIONS: gl.constexpr = W.ACTIONS
    TILES: gl.constexpr = ACTIONS // CHUNK_ROWS
    wait(loop.barrier, stage)
    for column_tile in tl.range(gl.program_id(0), W.COLUMNS // HIDDEN, gl.num_programs(0), disable_licm=True):
        factors = load_rows(x, W)
        row_scale = 1.0
        if W.DOUBLE and not W.WIDE:
            row_scale = norm_of(b.end_sums, rows, loop.eps, W)[:, None]
        velocity = gl.zeros([ROWS, ACTIONS], gl.float32, LAYOUT)
        tiles = gl.allocate_shared_memory(gl.float32, [ROWS, ACTIONS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        for tile in gl.static_range(TILES):
            y = add_tile(multiply(factors, _load_output(o.weight1, tile, o.actions, W), W)) * row_scale
            if W.WIDE:
                tiles.slice(tile * CHUNK_ROWS, CHUNK_ROWS, dim=1).store(y)
            else:
                second = _load_factor(o.weight2, 0, tile * CHUNK_ROWS, o.actions, o.actions, ACTIONS, CHUNK_ROWS)
                inner = gl.convert_layout(gelu_tanh(y).to(gl.bfloat16), LEFT)
                velocity = mma_v2(inner, second, velocity)
        if W.WIDE:
            barrier()
            velocity = tiles.load(LAYOUT)

        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        action = gl.arange(0, ACTIONS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        batch, token = row // tokens, row % tokens - context
        is_action = (row < rows) & (token >= 0)
        inside = is_action & (action < o.actions)
        place = (batch * (tokens - context) + token) * o.actions + action
        value = gl.load(o.z + place, inside, 0.0)
        given = token < gl.load(o.prefix_length + batch, row < rows, 0)
        value = gl.where(given, value, value + o.dt * velocity)
        if column_tile == 0:
            gl.store(o.z_next + place, value, inside)
        value *= gl.load(o.action_mask + place, inside, 0.0)
        projection = _load_factor(o.in_weight, column_tile * HIDDEN, 0, W.COLUMNS, o.actions, HIDDEN, ACTIONS)
        hidden = gl.zeros([ROWS, HIDDEN], gl.float32, LAYOUT)
        hidden = gelu_tanh(mma_v2(gl.convert_layout(value.to(gl.bfloat16), LEFT), projection, hidden))
        column = column_tile * HIDDEN + gl.arange(0, HIDDEN, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        gl.store(out + fragment_place(row, column, W), hidden.to(gl.bfloat16), is_action)
