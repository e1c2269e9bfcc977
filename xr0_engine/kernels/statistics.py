"""Statistics of rows, by which norms go: partial sums of so many columns each, as whoever writes a row leaves them.

StatsOut and InputNorm (arguments.py) say what they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xr0_engine.kernels.arguments import STATS_COLUMNS

SLOT = tl.constexpr(STATS_COLUMNS)
SLOTS_AT_ONCE = tl.constexpr(16)
"""A layer norm's slots, two sums each, that a program holds in registers beside its tile: a block's, not a merger's."""


@triton.jit
def store_stats(
    x,
    outputs,
    column_tile,
    column,
    rows,
    stats_s,
    inside,
    weight,
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    HOW: tl.constexpr,
):
    """Of a tile's rows x, (BLOCK_M, BLOCK_N): these columns of `outputs`. rows: (BLOCK_M,), where slot 0 goes.

    weight: (BLOCK_N,), read where WEIGHTED. WIDTH: columns of a slot; of a centred one SLOT.
    """
    SLOTS: tl.constexpr = HOW.BLOCK_N // WIDTH
    parts: tl.constexpr = (HOW.BLOCK_M, SLOTS, WIDTH)
    column_inside = column < outputs
    x = tl.where(column_inside[None, :], x.to(tl.float32), 0.0)
    slot = column_tile * SLOTS + tl.arange(0, SLOTS)
    place = rows[:, None] + slot[None, :] * stats_s
    mask = inside[:, None] & (slot * WIDTH < outputs)[None, :]
    if CENTRED:
        total = tl.sum(tl.reshape(x, parts), 2)
        tl.store(place + 1, total, mask)
        distance = tl.reshape(x, parts) - (total / columns_of(slot, outputs)[None, :])[:, :, None]
        distance = tl.where(tl.reshape(column_inside, (1, SLOTS, WIDTH)), distance, 0.0)
        tl.store(place, tl.sum(distance * distance, 2), mask)
    else:
        tl.store(place, tl.sum(tl.reshape(x * x, parts), 2), mask)
    if WEIGHTED:
        x *= weight[None, :]
        tl.store(place + 1, tl.sum(tl.reshape(x * x, parts), 2), mask)


@triton.jit
def columns_of(slot, columns):
    """How many columns a slot of such rows covers, float32; at least one, of those behind the last too."""
    return tl.maximum(tl.minimum(columns - slot * SLOT, SLOT), 1).to(tl.float32)


@triton.jit
def add_slots(sums, slots_stride, place, slots, SLOTS: tl.constexpr):
    """Partial sums of some rows, added up: (rows,) float32."""
    slot = tl.arange(0, SLOTS)
    return tl.sum(tl.load(sums + slot[:, None] * slots_stride + place[None, :], (slot < slots)[:, None], 0.0), 0)


@triton.jit
def _row_moments(sums, slots_stride, place, slots, inputs, SLOTS: tl.constexpr):
    """(variance, mean) of rows from centred sums, (rows,) each: a slot's own deviations, and its mean's from the row's.

    All terms are positive: nothing cancels. Many slots are taken part by part, and a part like a slot.
    """
    PART: tl.constexpr = min(SLOTS, SLOTS_AT_ONCE)
    seen, mean, squares = 0.0, tl.zeros_like(place).to(tl.float32), tl.zeros_like(place).to(tl.float32)
    for first in tl.static_range(0, SLOTS, PART):
        slot = first + tl.arange(0, PART)[:, None]
        inside = slot < slots
        target = sums + slot * slots_stride + place[None, :]
        total = tl.load(target + 1, inside, 0.0)
        # A power of two of slots may end with parts that have none.
        columns = tl.maximum(tl.minimum(tl.cast(inputs - first * SLOT, tl.float32), PART * SLOT), 0.0)
        part_mean = tl.sum(total, 0) / tl.maximum(columns, 1.0)
        count = columns_of(slot, inputs)
        distance = tl.where(inside, total / count - part_mean[None, :], 0.0)
        squares += tl.sum(tl.load(target, inside, 0.0) + count * distance * distance, 0)
        apart, share = part_mean - mean, columns / (seen + columns)
        squares += apart * apart * (seen * share)
        mean += apart * share
        seen += columns
    return squares / inputs, mean


@triton.jit
def row_norm(sums, slots_stride, place, slots, inputs, eps, NORM: tl.constexpr, SLOTS: tl.constexpr):
    """(scale, mean) of rows, whose norm is (x - mean) * scale; rms norms leave the mean as it is. (rows,) each."""
    if NORM == "layer":
        variance, mean = _row_moments(sums, slots_stride, place, slots, inputs, SLOTS)
        scale = tl.rsqrt(variance + eps)
    else:
        inverse = 1.0 / inputs
        scale = tl.rsqrt(add_slots(sums, slots_stride, place, slots, SLOTS) * inverse + eps)
        if NORM == "double_rms":
            second = add_slots(sums + 1, slots_stride, place, slots, SLOTS) * inverse
            scale *= tl.rsqrt(scale * scale * second + eps)
        mean = tl.zeros_like(scale)
    return scale, mean
