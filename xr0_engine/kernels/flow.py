"""What happens between two runs of the DiT's layers: the output layer, the Euler update, the next step's input.

One kernel does all three. Its programs share out the columns of the input projection; each computes the small output
layer of its rows again rather than wait for another, and the first of them writes z. z is float32 throughout and goes
from one buffer to another, since the others still read it.

Shape legend: B batch, T actions, A action columns, C hidden, Q DiT tokens, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import slot_columns
from xr0_engine.kernels.device import gdc_begin, gelu_tanh, prefetch_l2
from xr0_engine.kernels.embed import ROPE_ROWS, expect_tables, store_rope
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.shapes import expect, strided

HIDDEN_BLOCK, NARROW_BLOCK = 64, 32
"""Columns of the input projection that one program computes: fewer where it has more columns to take in, which would
need more registers than there are."""
FEW_ACTIONS = 32
"""Up to so many columns of an action."""
OUTPUT_BLOCK = 128
"""Columns of the residual stream that the output layer takes at a time."""
MIN_DOT = 16
"""Least rows, columns and depth of a product on tensor cores."""
MAX_ROWS = 32


@triton.jit
def _load_projection(
    in_weight, in_weight_c, column_tile, actions, hidden_columns, ACTIONS: tl.constexpr, HIDDEN: tl.constexpr
):
    """A tile's columns of the input projection: (ACTIONS, HIDDEN)."""
    action, column = tl.arange(0, ACTIONS)[:, None], column_tile * HIDDEN + tl.arange(0, HIDDEN)[None, :]
    return tl.load(in_weight + column * in_weight_c + action, (action < actions) & (column < hidden_columns), 0.0)


@triton.jit
def _project(z, mask, projection, place, column_tile, hidden_columns, in_rows, HIDDEN: tl.constexpr):
    """gelu((z * mask) @ projection) to a tile's columns of the rows at place, (rows, 1) pointers."""
    value = tl.dot((z * mask).to(projection.dtype), projection, input_precision="ieee")
    column = column_tile * HIDDEN + tl.arange(0, HIDDEN)[None, :]
    value = gelu_tanh(value).to(place.dtype.element_ty)
    tl.store(place + column, value, in_rows & (column < hidden_columns))


@triton.jit
def _start_flow(
    noise,
    noise_b,
    noise_t,
    prefix,
    prefix_b,
    prefix_t,
    prefix_length,
    action_mask,
    action_mask_b,
    action_mask_t,
    in_weight,
    in_weight_c,
    z,
    z_b,
    z_t,
    hidden,
    hidden_b,
    hidden_t,
    rows,
    tokens,
    actions,
    hidden_columns,
    ROWS: tl.constexpr,
    ACTIONS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    column_tile = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    batch, token = row // tokens, row % tokens
    action = tl.arange(0, ACTIONS)[None, :]
    in_rows = row < rows
    inside = in_rows & (action < actions)
    projection = _load_projection(in_weight, in_weight_c, column_tile, actions, hidden_columns, ACTIONS, HIDDEN)
    gdc_begin(PDL)
    given = token < tl.load(prefix_length + batch, in_rows, 0)
    value = tl.load(noise + batch * noise_b + token * noise_t + action, inside & ~given, 0.0)
    value += tl.load(prefix + batch * prefix_b + token * prefix_t + action, inside & given, 0.0)
    if column_tile == 0:
        tl.store(z + batch * z_b + token * z_t + action, value, inside)
    mask = tl.load(action_mask + batch * action_mask_b + token * action_mask_t + action, inside, 0.0)
    place = hidden + batch * hidden_b + token * hidden_t
    _project(value, mask, projection, place, column_tile, hidden_columns, in_rows, HIDDEN)


def start_flow(
    noise: Tensor,
    prefix: Tensor,
    prefix_length: Tensor,
    action_mask: Tensor,
    in_weight: Tensor,
    z: Tensor,
    hidden: Tensor,
) -> None:
    """z = the prefix where it is given, noise elsewhere; hidden = gelu((z * action_mask) @ in_weight.T).

    noise, prefix, action_mask, z: (B, T, A) float32; prefix_length: (B,) int32; in_weight: (C, A), the first layer of
    the action projector; hidden: (B, T, C). Raises ValueError for shapes that do not fit.
    """
    batch, tokens, actions = z.shape
    for name, tensor in (("noise", noise), ("prefix", prefix), ("action_mask", action_mask), ("z", z)):
        expect(name, tensor, (batch, tokens, actions))
    expect("prefix_length", prefix_length, (batch,))
    hidden_columns = in_weight.shape[0]
    expect("in_weight", in_weight, (hidden_columns, actions))
    expect("hidden", hidden, (batch, tokens, hidden_columns))
    rows, tiles = batch * tokens, flow_tiles(batch * tokens, actions)
    launch(
        _start_flow,
        (triton.cdiv(rows, tiles["ROWS"]), triton.cdiv(hidden_columns, tiles["HIDDEN"])),
        {
            **strided("noise", noise, "bt"),
            **strided("prefix", prefix, "bt"),
            "prefix_length": prefix_length,
            **strided("action_mask", action_mask, "bt"),
            **strided("in_weight", in_weight, "c"),
            **strided("z", z, "bt"),
            **strided("hidden", hidden, "bt"),
            "rows": rows,
            "tokens": tokens,
            "actions": actions,
            "hidden_columns": hidden_columns,
            **tiles,
        },
    )


@triton.jit
def _euler_step(
    program,
    x,
    x_b,
    x_t,
    sums,
    sums_s,
    sums_b,
    sums_t,
    eps,
    out_weight1,
    out_weight1_a,
    out_weight2,
    out_weight2_a,
    z,
    z_b,
    z_t,
    z_next,
    z_next_b,
    z_next_t,
    prefix_length,
    action_mask,
    action_mask_b,
    action_mask_t,
    dt,
    in_weight,
    in_weight_c,
    hidden,
    hidden_b,
    hidden_t,
    rows,
    tokens,
    actions,
    columns,
    slots,
    hidden_columns,
    column_tiles,
    ROWS: tl.constexpr,
    ACTIONS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if program is None:
        program = tl.program_id(0)
    row_tile, column_tile = program // column_tiles, program % column_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    batch, token = row // tokens, row % tokens
    action = tl.arange(0, ACTIONS)
    in_rows, in_actions = row < rows, action < actions
    inside = in_rows & in_actions[None, :]
    weight1 = out_weight1 + action[None, :] * out_weight1_a
    if PDL:
        LINE: tl.constexpr = 1024 // out_weight1.dtype.element_ty.primitive_bitwidth
        for start in range(column_tile * OUTPUT, columns, column_tiles * OUTPUT):
            line = start + tl.arange(0, OUTPUT // LINE)[:, None] * LINE
            prefetch_l2(tl.where((line < columns) & in_actions[None, :], weight1 + line, out_weight1))
    if out_weight2 is not None:
        weight2_inside = in_actions[:, None] & in_actions[None, :]
        weight2 = tl.load(out_weight2 + action[None, :] * out_weight2_a + action[:, None], weight2_inside, 0.0)
    if hidden is not None:
        projection = _load_projection(in_weight, in_weight_c, column_tile, actions, hidden_columns, ACTIONS, HIDDEN)
    gdc_begin(PDL)

    if sums is not None:
        slot = tl.arange(0, SLOTS)[None, :]
        squares = tl.load(sums + slot * sums_s + batch * sums_b + token * sums_t, in_rows & (slot < slots), 0.0)
        row_scale = tl.rsqrt(tl.sum(squares, 1) / columns + eps)[:, None]
    acc = tl.zeros((ROWS, ACTIONS), tl.float32)
    for start in range(0, columns, OUTPUT):
        column = start + tl.arange(0, OUTPUT)
        left = tl.load(x + batch * x_b + token * x_t + column[None, :], in_rows & (column < columns)[None, :], 0.0)
        right = tl.load(weight1 + column[:, None], (column < columns)[:, None] & in_actions[None, :], 0.0)
        if sums is not None:
            left *= row_scale
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision="ieee")
    velocity = acc
    if out_weight2 is not None:
        velocity = tl.dot(gelu_tanh(acc).to(weight2.dtype), weight2, input_precision="ieee")

    value = tl.load(z + batch * z_b + token * z_t + action[None, :], inside, 0.0)
    given = token < tl.load(prefix_length + batch, in_rows, 0)
    value = tl.where(given, value, value + dt * velocity)
    if column_tile == 0:
        tl.store(z_next + batch * z_next_b + token * z_next_t + action[None, :], value, inside)
    if hidden is not None:
        mask_place = action_mask + batch * action_mask_b + token * action_mask_t
        mask = tl.load(mask_place + action[None, :], inside, 0.0)
        hidden_place = hidden + batch * hidden_b + token * hidden_t
        _project(value, mask, projection, hidden_place, column_tile, hidden_columns, in_rows, HIDDEN)


def euler_step(
    x: Tensor,
    sums: Tensor | None,
    eps: float,
    out_weight1: Tensor,
    out_weight2: Tensor | None,
    z: Tensor,
    z_next: Tensor,
    prefix_length: Tensor,
    action_mask: Tensor,
    dt: float,
    in_weight: Tensor | None,
    hidden: Tensor | None,
) -> None:
    """z_next = z + dt * gelu(rms_norm(x) @ out_weight1.T) @ out_weight2.T, or z where the prefix is given.

    With hidden, also what start_flow computes of the new z: the input of the next step. Without sums x is multiplied as
    it is; without out_weight2 the first product is the velocity: the last of an output layer that is too wide for this
    kernel, whose first was one of its own.
    x: (B, T, C) float32, the residual stream of the action tokens, or (B, T, wide) what that product left; sums:
    (slots, B, T, 2) float32, as StatsOut has it; out_weight1: (A, C), the final norm's weight folded in; out_weight2:
    (A, A); z, z_next (two buffers), action_mask: (B, T, A) float32; prefix_length: (B,) int32; in_weight: (C, A);
    hidden: (B, T, C). in_weight and hidden are None in the last step. Raises ValueError for shapes that do not fit.
    """
    batch, tokens, columns = x.shape
    actions = out_weight1.shape[0]
    slots = 1 if sums is None else sums.shape[0]
    expect("x", x, (batch, tokens, columns))
    if sums is not None:
        expect("sums", sums, (slots, batch, tokens, 2))
        slot_columns("sums", sums, columns)
    expect("out_weight1", out_weight1, (actions, columns))
    if out_weight2 is not None:
        expect("out_weight2", out_weight2, (actions, actions))
    for name, tensor in (("z", z), ("z_next", z_next), ("action_mask", action_mask)):
        expect(name, tensor, (batch, tokens, actions))
    expect("prefix_length", prefix_length, (batch,))
    if (in_weight is None) != (hidden is None):
        raise ValueError("hidden: expected with in_weight, and without it in the last step; got one of the two")
    if z_next is z:
        raise ValueError("z_next: expected another buffer than z, got the same")
    rows, tiles = batch * tokens, flow_tiles(batch * tokens, actions)
    hidden_columns = tiles["HIDDEN"] if in_weight is None else in_weight.shape[0]
    if in_weight is not None and hidden is not None:
        expect("in_weight", in_weight, (hidden_columns, actions))
        expect("hidden", hidden, (batch, tokens, hidden_columns))
    column_tiles = triton.cdiv(hidden_columns, tiles["HIDDEN"])
    launch(
        _euler_step,
        (triton.cdiv(rows, tiles["ROWS"]) * column_tiles,),
        {
            "program": None,
            **strided("x", x, "bt"),
            **strided("sums", sums, "sbt"),
            "eps": eps,
            **strided("out_weight1", out_weight1, "a"),
            **strided("out_weight2", out_weight2, "a"),
            **strided("z", z, "bt"),
            **strided("z_next", z_next, "bt"),
            "prefix_length": prefix_length,
            **strided("action_mask", action_mask, "bt"),
            "dt": dt,
            **strided("in_weight", in_weight, "c"),
            **strided("hidden", hidden, "bt"),
            "rows": rows,
            "tokens": tokens,
            "actions": actions,
            "columns": columns,
            "slots": slots,
            "hidden_columns": hidden_columns,
            "column_tiles": column_tiles,
            "OUTPUT": OUTPUT_BLOCK,
            "SLOTS": triton.next_power_of_2(slots),
            **tiles,
        },
    )


def flow_tiles(rows: int, actions: int) -> dict[str, int]:
    """Compile-time sizes for rows of all batches and so many action columns."""
    return {
        "ROWS": max(MIN_DOT, min(MAX_ROWS, triton.next_power_of_2(rows))),
        "ACTIONS": max(MIN_DOT, triton.next_power_of_2(actions)),
        "HIDDEN": HIDDEN_BLOCK if actions <= FEW_ACTIONS else NARROW_BLOCK,
    }


@triton.jit
def _dit_rope_tables(
    next_position,
    next_position_a,
    prefix_length,
    frequencies,
    axes,
    cos,
    cos_b,
    cos_m,
    sin,
    tokens,
    half,
    context,
    offset,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    batch = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, HALF)[None, :]
    frequency, axis = tl.load(frequencies + j, j < half, 0.0), tl.load(axes + j, j < half, 0)
    gdc_begin(PDL)
    base = tl.load(next_position + axis * next_position_a + batch)
    is_suffix = token >= context + tl.load(prefix_length + batch)
    position = base + token + tl.where(is_suffix, offset, 0)
    inside = (token < tokens) & (j < half)
    store_rope(position, frequency, cos, sin, batch * cos_b + token * cos_m + j, inside)


def dit_rope_tables(
    next_position: Tensor,
    prefix_length: Tensor,
    frequencies: Tensor,
    axes: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    context: int,
    offset: int,
) -> None:
    """Rotary tables of the DiT's tokens (spec section 2.4): position next_position + token, + offset after the prefix.

    next_position: (3, B) int32, first free position per axis; prefix_length: (B,) int32; frequencies: (D / 2,) float32;
    axes: (D / 2,) int32, which axis turns each frequency; cos, sin: (B, Q, D / 2) float32 with the same strides;
    context: tokens before the actions. Raises ValueError for shapes that do not fit.
    """
    batch, tokens, half = cos.shape
    expect("next_position", next_position, (3, batch))
    expect("prefix_length", prefix_length, (batch,))
    expect_tables(batch, tokens, frequencies, axes, cos, sin)
    launch(
        _dit_rope_tables,
        (triton.cdiv(tokens, ROPE_ROWS), batch),
        {
            **strided("next_position", next_position, "a"),
            "prefix_length": prefix_length,
            "frequencies": frequencies,
            "axes": axes,
            **strided("cos", cos, "bm"),
            "sin": sin,
            "tokens": tokens,
            "half": half,
            "context": context,
            "offset": offset,
            "ROWS": ROPE_ROWS,
            "HALF": triton.next_power_of_2(half),
        },
    )
