"""What follows a product of the schedule "swapped": the epilogues of ends.py for what has none of a flow's norms, in
Gluon, where a tile's rows are finished some at a time, each thread with eight neighbouring columns.

Shape legend: R rows at a time, W weight rows of a tile, B batch, M rows of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from xr0_engine.kernels.arguments import STATS_COLUMNS
from xr0_engine.kernels.device import with_last
from xr0_engine.kernels.ring import gelu_tanh, sigmoid

WIDE = gl.constexpr(8)
"""Columns of a thread that lie beside each other: 16 bytes of what is written."""
LEAST_ROOM = 128
"""Rows that a group's scales have room for at least."""
SLOT = gl.constexpr(STATS_COLUMNS)


class Sizes(NamedTuple):
    """What the kernel is compiled for, as one argument.

    GROUPED: whether warpgroups multiply what TMA brings. WEIGHTS: weight rows of a tile; UNIT: of these, columns that
    lie beside each other: of pairs half, of heads half of one. HEIGHTS: of the pieces of a group's rows. GROUPS: of
    rows. HEADS: that a tile has. NORM, EVEN_K: as How. TURNS: of all warps, until every slot of a norm's sums had one.
    PARTS: of a tile that is cut along K at most, 1: none is; UNIFORM: of all of them. UNITS: passes of all threads over
    its rows that are one. SINGLE: whether there is one batch alone.
    """

    GROUPED: bool
    WARPS: int
    STAGES: int
    WEIGHTS: int
    UNIT: int
    BLOCK_K: int
    HEIGHTS: tuple[int, ...]
    GROUPS: int
    HEADS: int
    NORM: str | None
    TURNS: int
    PARTS: int
    UNITS: int
    UNIFORM: bool
    EVEN_K: bool
    SINGLE: bool


@gluon.constexpr_function
def height_of(sizes: Any) -> int:
    """Rows of a group."""
    return sum(sizes.HEIGHTS)


@gluon.constexpr_function
def _room_of(sizes: Any) -> int:
    """Rows that a group's scales have room for."""
    return max(LEAST_ROOM, 1 << (sum(sizes.HEIGHTS) - 1).bit_length())


@gluon.constexpr_function
def lanes_of(unit: int) -> int:
    """Threads of a row's unit."""
    # Of a named tuple, Triton 3.6 passes such a function no names on.
    return min(32, unit // WIDE)


@gluon.constexpr_function
def pass_rows(sizes: Any) -> int:
    """Rows that all threads hold once."""
    return sizes.WARPS * 32 // lanes_of(sizes.UNIT)


@gluon.constexpr_function
def row_layout(sizes: Any) -> Any:
    """(R, W), or units of it: all columns of a thread's rows that are a multiple of UNIT apart are its own."""
    lanes = lanes_of(sizes.UNIT)
    return gl.BlockedLayout([1, WIDE], [32 // lanes, lanes], [sizes.WARPS, 1], [1, 0])


@gluon.constexpr_function
def _slots_layout(sizes: Any, width: int) -> Any:
    """(R, slots, width) of a row_layout's columns."""
    lanes, own = lanes_of(sizes.UNIT), width // WIDE
    return gl.BlockedLayout([1, 1, WIDE], [32 // lanes, lanes // own, own], [sizes.WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _sums_layout(sizes: Any) -> Any:
    """(WARPS, rows of a group)."""
    return gl.BlockedLayout([1, 1], [1, 32], [sizes.WARPS, 1], [1, 0])


class Rows(NamedTuple):
    """Of R rows, on the device. place: the first one's number within its group; batch, row, inside: (R,), as rows_of
    has them; scales: of their group, as new_scales has them."""

    place: Any
    batch: Any
    row: Any
    inside: Any
    scales: Any


@gluon.jit
def _in_batch(index, product, S: gl.constexpr):
    """(batch, row) of a row, int64: a place in a batch may be beyond 2^31 elements."""
    batch = gl.full_like(index, 0) if S.SINGLE else index // product.batch_rows
    return batch.to(gl.int64), (index - batch * product.batch_rows).to(gl.int64)


@gluon.jit
def rows_at(product, group, place, scales, R: gl.constexpr, S: gl.constexpr):
    """R Rows of a group, from place on."""
    within = place + gl.arange(0, R, layout=gl.SliceLayout(1, row_layout(S)))
    index = group * height_of(S) + within
    inside = (within < height_of(S)) & (index < product.rows)
    batch, row = _in_batch(gl.minimum(index, product.rows - 1), product, S)
    return Rows(place, batch, row, inside, scales)


@gluon.jit
def new_scales(S: gl.constexpr):
    """Room for what a norm multiplies each row by, and for its mean."""
    SHAPE: gl.constexpr = [2, _room_of(S)]
    return gl.allocate_shared_memory(gl.float32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def fill_scales(scales, group, product, S: gl.constexpr):
    """The norms of a group's rows, as statistics.py has them: row_norm."""
    LAYOUT: gl.constexpr = _sums_layout(S)
    ROOM: gl.constexpr = _room_of(S)
    SHAPE: gl.constexpr = [S.WARPS, ROOM]
    TURNS: gl.constexpr = S.TURNS
    within = gl.arange(0, ROOM, layout=gl.SliceLayout(0, LAYOUT))
    index = group * height_of(S) + within
    batch, row = _in_batch(gl.minimum(index, product.rows - 1), product, S)
    place = product.sums + (batch * product.sums_b + row * product.sums_m)[None, :]
    # A slot of each warp at a time.
    warp = gl.arange(0, S.WARPS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    squares = gl.zeros(SHAPE, gl.float32, LAYOUT)
    totals, total = (), squares
    for turn in gl.static_range(TURNS):
        slot = turn * S.WARPS + warp
        inside = (slot < product.slots) & (within < height_of(S))[None, :]
        squares += gl.load(place + slot * product.sums_s, inside, 0.0)
        if S.NORM == "layer":
            totals = with_last(totals, gl.load(place + slot * product.sums_s + 1, inside, 0.0))
            total += totals[turn]
    if S.NORM == "layer":
        mean = gl.sum(total, 0) / product.inputs
        for turn in gl.static_range(TURNS):
            slot = turn * S.WARPS + warp
            count = gl.maximum(gl.minimum(product.inputs - slot * SLOT, SLOT), 1).to(gl.float32)
            apart = gl.where(slot < product.slots, totals[turn] / count - mean[None, :], 0.0)
            squares += count * apart * apart
        variance = gl.sum(squares, 0) / product.inputs
        scales.index(1).store(mean)
    else:
        variance = gl.sum(squares, 0) * (1.0 / product.inputs)
    scales.index(0).store(gl.rsqrt(variance + product.norm_eps))


@gluon.jit
def _scale_of(scales, number, place, R: gl.constexpr, S: gl.constexpr):
    """number: 0, what a norm multiplies by; 1, the means."""
    ROOM: gl.constexpr = _room_of(S)
    SHAPE: gl.constexpr = [2 * ROOM // R, R]
    view = scales._reinterpret(gl.float32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return view.index(number * (ROOM // R) + place // R).load(gl.SliceLayout(1, row_layout(S)))


@gluon.jit
def finish_rows(y, rows, n, product, R: gl.constexpr, S: gl.constexpr):
    """As product.py: finish, of y (R, W) float32 in row_layout; n: (W,), the weight rows."""
    bias = 0.0
    if product.bias is not None:
        bias = gl.load(product.bias + n).to(gl.float32)[None, :]
    if product.scale is not None:
        y *= gl.load(product.scale + n)[None, :]
    if S.NORM is not None:
        if S.NORM == "layer":
            mean = _scale_of(rows.scales, 1, rows.place, R, S)
            y = gl.fma(-mean[:, None], gl.load(product.column_sums + n)[None, :], y)
        return gl.fma(y, _scale_of(rows.scales, 0, rows.place, R, S)[:, None], bias)
    return y + bias


@gluon.jit
def _columns(S: gl.constexpr):
    return gl.arange(0, S.WEIGHTS, layout=gl.SliceLayout(0, row_layout(S)))


@gluon.jit
def _halves(y, R: gl.constexpr, N: gl.constexpr, S: gl.constexpr):
    """Both halves of y's N columns, (R, N / 2) each in row_layout."""
    SPREAD: gl.constexpr = [R, 2, N // 2]
    first, second = gl.split(gl.permute(gl.reshape(y, SPREAD), (0, 2, 1)))
    first = gl.convert_layout(first, row_layout(S), assert_trivial=True)
    return first, gl.convert_layout(second, row_layout(S), assert_trivial=True)


@gluon.jit
def part_place(product, part, rows_before, layout: gl.constexpr, ROWS: gl.constexpr, S: gl.constexpr):
    """Where a piece of a part lies among the partials, (WEIGHTS, ROWS)."""
    begin = product.partials + (part.to(gl.int64) * height_of(S) + rows_before) * S.WEIGHTS
    weight = gl.arange(0, S.WEIGHTS, layout=gl.SliceLayout(1, layout))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))
    return begin + row[None, :] * S.WEIGHTS + weight[:, None]


@gluon.jit
def added_parts(product, part, parts, place, R: gl.constexpr, S: gl.constexpr):
    """(R, WEIGHTS) float32 of a tile's rows from place on: its parts, from part on, added up in the order of K."""
    LAYOUT: gl.constexpr = row_layout(S)
    HEIGHT: gl.constexpr = height_of(S)
    row = gl.minimum(place + gl.arange(0, R, layout=gl.SliceLayout(1, LAYOUT)), HEIGHT - 1)[:, None]
    column = gl.arange(0, S.WEIGHTS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    begin = product.partials + part.to(gl.int64) * (HEIGHT * S.WEIGHTS) + (row * S.WEIGHTS + column)
    total = gl.load(begin, cache_modifier=".cg")
    PARTS: gl.constexpr = S.PARTS
    for number in gl.static_range(1, PARTS):
        place_of = begin + number * (HEIGHT * S.WEIGHTS)
        if S.UNIFORM:
            total += gl.load(place_of, cache_modifier=".cg")
        else:
            total += gl.load(place_of, (row >= 0) & (column >= 0) & (number < parts), 0.0, cache_modifier=".cg")
    return total


@gluon.jit
def end_linear(
    y, rows, column_tile, product, walk, end, ACTIVATION: gl.constexpr, CENTRED: gl.constexpr, WIDTH: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """As finish_linear, of a residual that is added as it is. WIDTH: columns of a slot of the statistics."""
    column = column_tile * S.WEIGHTS + _columns(S)
    inside = column < end.outputs
    mask = rows.inside[:, None] & inside[None, :]
    base, extra = 0.0, 0.0
    if end.residual is not None:
        place = rows.row * end.residual_m + rows.batch * end.residual_b
        base = gl.load(end.residual + place[:, None] + column[None, :], mask, 0.0).to(gl.float32)
        if end.extra is not None:
            index = gl.load(end.extra_index + rows.batch * end.extra_index_b + rows.row)
            extra_place = (index.to(gl.int64) * end.extra_r)[:, None] + column[None, :]
            extra = gl.load(end.extra + extra_place, mask & (index >= 0)[:, None], 0.0).to(gl.float32)
    y = finish_rows(y, rows, gl.minimum(column, walk.weights - 1), product, R, S)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + gl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    if end.residual is not None:
        y = y + base + extra
    written = y.to(end.out.dtype.element_ty)
    out_place = rows.row * end.out_m + rows.batch * end.out_b
    gl.store(end.out + out_place[:, None] + column[None, :], written, mask)
    if end.stats is not None:
        LAYOUT: gl.constexpr = _slots_layout(S, WIDTH)
        SLOTS: gl.constexpr = S.WEIGHTS // WIDTH
        SPREAD: gl.constexpr = [R, SLOTS, WIDTH]
        x = gl.where(inside[None, :], written.to(gl.float32), 0.0)
        x = gl.convert_layout(gl.reshape(x, SPREAD), LAYOUT, assert_trivial=True)
        slot = column_tile * SLOTS + gl.arange(0, SLOTS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :]
        of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
        stats_row = gl.convert_layout(rows.batch * end.stats_b + rows.row * end.stats_m, of_rows)[:, None]
        stats_inside = gl.convert_layout(rows.inside, of_rows)[:, None] & (slot * WIDTH < end.outputs)
        stats_place = end.stats + stats_row + slot * end.stats_s
        if CENTRED:
            total = gl.sum(x, 2)
            gl.store(stats_place + 1, total, stats_inside)
            x -= gl.expand_dims(total * (1.0 / WIDTH), 2)
        gl.store(stats_place, gl.sum(x * x, 2), stats_inside)


@gluon.jit
def end_swiglu(
    y, rows, column_tile, product, walk, end, ACTIVATION: gl.constexpr, CENTRED: gl.constexpr, WIDTH: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """As finish_swiglu: the first half of a tile's columns are gates."""
    HALF: gl.constexpr = S.WEIGHTS // 2
    place = _columns(S)
    n = column_tile * HALF + place % HALF + place // HALF * walk.distance
    gate, up = _halves(finish_rows(y, rows, gl.minimum(n, walk.weights - 1), product, R, S), R, S.WEIGHTS, S)
    column = column_tile * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, row_layout(S)))
    out_place = rows.row * end.out_m + rows.batch * end.out_b
    value = (gate * sigmoid(gate) * up).to(end.out.dtype.element_ty)
    gl.store(
        end.out + out_place[:, None] + column[None, :], value, rows.inside[:, None] & (column < end.outputs)[None, :]
    )


@gluon.jit
def _end_head(first, second, rows, head, end, S: gl.constexpr):
    """As finish_qkv, of the halves of one head's rows: one way for all heads, of which values keep what they are."""
    values, keys = head - end.query_heads - end.kv_heads, head - end.query_heads
    of_values, of_keys = values >= 0, keys >= 0
    there = head < end.query_heads + 2 * end.kv_heads
    column = gl.arange(0, S.UNIT, layout=gl.SliceLayout(0, row_layout(S)))
    # Bits of an address, since Triton selects no pointers.
    out, out_b, out_h, out_m = end.k.to(gl.int64), end.k_b, end.k_h, end.k_m
    at = gl.where(of_values, values, keys)
    if end.q is not None:
        out, at = gl.where(of_keys, out, end.q.to(gl.int64)), gl.where(of_keys, at, head)
        out_b, out_h = gl.where(of_keys, out_b, end.q_b), gl.where(of_keys, out_h, end.q_h)
        out_m = gl.where(of_keys, out_m, end.q_m)
    out, out_b = gl.where(of_values, end.v.to(gl.int64), out), gl.where(of_values, end.v_b, out_b)
    out_h, out_m = gl.where(of_values, end.v_h, out_h), gl.where(of_values, end.v_m, out_m)
    angle_place = (rows.batch * end.cos_b + rows.row * end.cos_m)[:, None] + column[None, :]
    cos = gl.where(of_values, 1.0, gl.load(end.cos + angle_place))
    angle_place = (rows.batch * end.sin_b + rows.row * end.sin_m)[:, None] + column[None, :]
    sin = gl.where(of_values, 0.0, gl.load(end.sin + angle_place))
    if end.k_weight is not None:
        weight = end.k_weight.to(gl.int64)
        if end.q is not None:
            weight = gl.where(of_keys, weight, end.q_weight.to(gl.int64))
        weight = weight.to(gl.pointer_type(end.k_weight.dtype.element_ty), bitcast=True)
        squares = gl.sum(first * first, 1) + gl.sum(second * second, 1)
        scale = gl.where(of_values, 1.0, gl.rsqrt(squares * (0.5 / S.UNIT) + end.eps))[:, None]
        first *= scale * gl.where(of_values, 1.0, gl.load(weight + column).to(gl.float32))[None, :]
        second *= scale * gl.where(of_values, 1.0, gl.load(weight + S.UNIT + column).to(gl.float32))[None, :]
    pointer = gl.multiple_of(out.to(gl.pointer_type(end.k.dtype.element_ty), bitcast=True), 16)
    place = pointer + (rows.batch * out_b + at.to(gl.int64) * out_h + rows.row * out_m)[:, None] + column[None, :]
    mask = rows.inside[:, None] & there
    gl.store(place, gl.fma(first, cos, -second * sin).to(end.k.dtype.element_ty), mask)
    gl.store(place + S.UNIT, gl.fma(second, cos, first * sin).to(end.k.dtype.element_ty), mask)


@gluon.jit
def end_qkv(
    y, rows, column_tile, product, walk, end, ACTIVATION: gl.constexpr, CENTRED: gl.constexpr, WIDTH: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """As finish_qkv, of the HEADS heads of a tile, each with its halves one behind the other."""
    n = gl.minimum(column_tile * S.WEIGHTS + _columns(S), walk.weights - 1)
    y = finish_rows(y, rows, n, product, R, S)
    head = column_tile * S.HEADS
    if S.HEADS == 1:
        first, second = _halves(y, R, S.WEIGHTS, S)
        _end_head(first, second, rows, head, end, S)
    else:
        left, right = _halves(y, R, S.WEIGHTS, S)
        first, second = _halves(left, R, S.WEIGHTS // 2, S)
        _end_head(first, second, rows, head, end, S)
        first, second = _halves(right, R, S.WEIGHTS // 2, S)
        _end_head(first, second, rows, head + 1, end, S)
