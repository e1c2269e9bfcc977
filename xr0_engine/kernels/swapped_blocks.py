"""Blocks of K on their way through shared memory and into the MMA: what swapped.py multiplies.

A slot of the ring holds a block of a tile's weight rows and of all rows of x. TMA fills it, and a barrier in shared
memory tells when; or threads copy it, and wait for their groups of copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from xr0_engine.kernels.device import with_last
from xr0_engine.kernels.swapped_ends import WIDE, height_of

GROUPED_ROWS = 64
"""An MMA of a warpgroup takes as long for fewer columns: warps multiply these in less."""


class Walk(NamedTuple):
    """Which program computes what, as one argument.

    full: tiles that one program has alone, as many behind another as there are programs; shared: those that are cut,
    for sharers programs; blocks: of K. groups: of rows, neighbours. distance: between the rows of a pair; weights: rows
    of the weight; column_step: of them from a tile's first to the next one's.
    """

    full: int
    shared: int
    sharers: int
    blocks: int
    groups: int
    distance: int
    weights: int
    column_step: int


@gluon.constexpr_function
def grouped_pieces(sizes: Any) -> int:
    """How many of the pieces, the first ones, warpgroups multiply."""
    return sum(rows >= GROUPED_ROWS for rows in sizes.HEIGHTS) if sizes.GROUPED else 0


@gluon.constexpr_function
def sums_layout(sizes: Any, rows: int) -> Any:
    """(WEIGHTS, rows) of an MMA."""
    if not sizes.GROUPED or rows < GROUPED_ROWS:
        return gl.NVMMADistributedLayout([2, 0], [sizes.WARPS, 1], [16, 8])
    return gl.NVMMADistributedLayout([3, 0], [sizes.WARPS, 1], [16, rows, 16])


@gluon.constexpr_function
def block_bytes(sizes: Any) -> int:
    return 2 * int(sizes.BLOCK_K) * (sizes.WEIGHTS + sum(sizes.HEIGHTS))


@gluon.constexpr_function
def tile_layout(block_k: int) -> Any:
    """Of a block in shared memory that TMA brings."""
    return gl.NVMMASharedLayout(min(128, 2 * int(block_k)), 16, 2)


@gluon.constexpr_function
def slot_layout(sizes: Any) -> Any:
    """Of a block in shared memory: eight rows that are read at once lie in other banks."""
    if sizes.GROUPED:
        return tile_layout(sizes.BLOCK_K)
    rows = max(1, 64 // int(sizes.BLOCK_K))
    return gl.SwizzledSharedLayout(WIDE, rows, 8 // rows, [1, 0])


@gluon.constexpr_function
def _copy_layout(sizes: Any) -> Any:
    """(rows, BLOCK_K) of a block, as threads copy it."""
    lanes = min(32, int(sizes.BLOCK_K) // WIDE)
    return gl.BlockedLayout([1, WIDE], [32 // lanes, lanes], [sizes.WARPS, 1], [1, 0])


@gluon.jit
def new_slots(ROWS: gl.constexpr, product, S: gl.constexpr):
    SHAPE: gl.constexpr = [S.STAGES, ROWS, S.BLOCK_K]
    return gl.allocate_shared_memory(product.w.dtype.element_ty, SHAPE, slot_layout(S))


@gluon.jit
def zeros(ROWS: gl.constexpr, S: gl.constexpr):
    SHAPE: gl.constexpr = [S.WEIGHTS, ROWS]
    return gl.zeros(SHAPE, gl.float32, sums_layout(S, ROWS))


@gluon.jit
def _copy(slots, slot, row, stride, begin, k, product, S: gl.constexpr):
    """Rows of a factor, from block k of their K, into a slot: WIDE numbers at a time, as stride is a multiple of."""
    number = gl.arange(0, S.BLOCK_K, layout=gl.SliceLayout(0, _copy_layout(S)))
    place = begin + row.to(gl.int64)[:, None] * (stride // WIDE * WIDE) + (k * S.BLOCK_K + number)[None, :]
    if S.EVEN_K:
        async_copy.async_copy_global_to_shared(slots.index(slot), place)
    else:
        inside = (k * (S.BLOCK_K // WIDE) + number // WIDE < product.inputs // WIDE)[None, :] & (row >= 0)[:, None]
        async_copy.async_copy_global_to_shared(slots.index(slot), place, inside)


@gluon.jit
def ask_weights(w, weights, full, slot, tile, k, product, walk, there, PAIRED: gl.constexpr, S: gl.constexpr):
    """A block of a tile's weight rows on its way into a slot."""
    column = tile // walk.groups * walk.column_step
    HALVES: gl.constexpr = 2 if PAIRED else 1
    HALF: gl.constexpr = S.WEIGHTS // HALVES
    if S.GROUPED:
        SHAPE: gl.constexpr = [S.STAGES * HALVES, HALF, S.BLOCK_K]
        halves = weights._reinterpret(product.w.dtype.element_ty, SHAPE, slot_layout(S))
        for half in gl.static_range(HALVES):
            place = [column + half * walk.distance, k * S.BLOCK_K]
            tma.async_copy_global_to_shared(w, place, full.index(slot), halves.index(slot * HALVES + half), there)
    elif there:
        row = gl.arange(0, S.WEIGHTS, layout=gl.SliceLayout(1, _copy_layout(S)))
        row = column + row % HALF + row // HALF * walk.distance if PAIRED else column + row
        _copy(weights, slot, gl.minimum(row, walk.weights - 1), product.w_n, product.w, k, product, S)


@gluon.jit
def ask_rows(x, pieces, full, slot, tile, k, product, walk, there, S: gl.constexpr):
    """The same block of all rows of the tile's group."""
    first = tile % walk.groups * height_of(S)
    if S.GROUPED:
        for i in gl.static_range(len(S.HEIGHTS)):
            tma.async_copy_global_to_shared(
                x[i], [first, k * S.BLOCK_K], full.index(slot), pieces[i].index(slot), there
            )
            first += S.HEIGHTS[i]
    else:
        if there:
            for i in gl.static_range(len(S.HEIGHTS)):
                row = first + gl.arange(0, S.HEIGHTS[i], layout=gl.SliceLayout(1, _copy_layout(S)))
                _copy(pieces[i], slot, gl.minimum(row, product.rows - 1), product.x_m, product.x, k, product, S)
                first += S.HEIGHTS[i]
        async_copy.commit_group()


@gluon.jit
def next_block(tile, k, rest_tile, rest_k, walk):
    """(tile, block of K) that follows in a program's run."""
    ends = k + 1 == walk.blocks
    turns = ends & (tile < walk.full) & (tile + gl.num_programs(0) >= walk.full)
    step = gl.where(tile < walk.full, gl.num_programs(0), 1)
    return (
        gl.where(turns, rest_tile, gl.where(ends, tile + step, tile)),
        gl.where(turns, rest_k, gl.where(ends, 0, k + 1)),
    )


@gluon.jit
def waited(sums, UNDER_WAY: gl.constexpr, S: gl.constexpr):
    """The sums, once of the products of warpgroups no more are under way."""
    GROUPED: gl.constexpr = grouped_pieces(S)
    grouped = ()
    for i in gl.static_range(GROUPED):
        grouped = with_last(grouped, sums[i])
    found = grouped
    # Of one, Triton returns no tuple.
    if GROUPED == 1:
        found = with_last((), warpgroup_mma_wait(UNDER_WAY * GROUPED, grouped))
    elif GROUPED > 1:
        found = warpgroup_mma_wait(UNDER_WAY * GROUPED, grouped)
    for i in gl.static_range(GROUPED, len(S.HEIGHTS)):
        found = with_last(found, sums[i])
    return found


@gluon.jit
def _multiply_of_warps(weights, pieces, slot, sums, added, FIRST: gl.constexpr, S: gl.constexpr):
    """added, and behind it the sums and products of the pieces from FIRST on."""
    LAYOUT: gl.constexpr = sums_layout(S, 8)
    left = weights.index(slot).load(gl.DotOperandLayout(0, LAYOUT, 2))
    for i in gl.static_range(FIRST, len(S.HEIGHTS)):
        right = pieces[i].index(slot).permute((1, 0)).load(gl.DotOperandLayout(1, LAYOUT, 2))
        added = with_last(added, mma_v2(left, right, sums[i]))
    return added


@gluon.jit
def multiply_of_warps(weights, pieces, slot, sums, S: gl.constexpr):
    """sums and the products of a slot's block: weight rows times each piece's rows."""
    return _multiply_of_warps(weights, pieces, slot, sums, (), 0, S)


@gluon.jit
def multiply_of_warpgroups(weights, pieces, slot, sums, S: gl.constexpr):
    """The same, of few rows by warps, of others under way; of the block before, nobody reads any more."""
    GROUPED: gl.constexpr = grouped_pieces(S)
    added = ()
    for i in gl.static_range(GROUPED):
        factor = pieces[i].index(slot).permute((1, 0))
        added = with_last(added, warpgroup_mma(weights.index(slot), factor, sums[i], is_async=True))
    if len(S.HEIGHTS) > GROUPED:
        added = _multiply_of_warps(weights, pieces, slot, sums, added, GROUPED, S)
    return waited(added, 1, S)
