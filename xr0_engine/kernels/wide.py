"""Products of 65 to 1024 rows: the schedule "stream". product.py has the rest of the algorithm.

One program holds all rows of a column tile, or of a group of rows whose groups are alike, in pieces of mixed heights:
194 rows are 16 + 64 + 128. They share each block of the weight, so that it crosses the L2 cache once and few rows are
none.

The blocks of K of all tiles lie behind one another on a line, which is shared out over the programs as evenly as it
goes: each takes one run, in which tiles end and begin, and all end together however many tiles there are. Of a tile
that several programs computed, each leaves its part in float32 in the workspace; the last to arrive adds them up in the
order of K, whoever it is, and goes on to the epilogue: replays are bit-identical.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from xr0_engine.kernels.calls import ProductCall
from xr0_engine.kernels.device import gdc_begin, paired, rows_from, with_last
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.product import (
    Tile,
    add_product,
    finish,
    first_norm,
    load_rows,
    load_weights,
    of_rows,
    prefetch_weight,
    row_pieces,
    sum_type,
)

UPRIGHT = tl.constexpr(64)
"""Pieces of fewer rows are the MMA's columns, and the weight its rows, as warpgroups multiply 64 rows at least. A loop
with products of warpgroups and of single warps is compiled with too few buffers (Triton 3.6 and 3.9)."""
MOST_BLOCKS = 2**31
"""Places on the line, times programs, are counted in 32 bits."""


class Line(NamedTuple):
    """All tiles' blocks of K, and who takes which, as one argument.

    tiles, of blocks each, over programs; column_tiles: those of a group of rows. Groups of the same columns lie beside
    each other. height: of a group, once more: what the epilogue computes of its rows shall not be found to have been
    computed before the product, and kept in registers through it. column_step: weight rows from a tile's first to the
    next one's; distance: between the rows of a pair; weights: rows of the weight.
    """

    tiles: int
    blocks: int
    programs: int
    column_tiles: int
    height: int
    column_step: int
    distance: int
    weights: int


@triton.jit
def _weight_rows(line, column_tile, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr):
    first = column_tile * line.column_step
    n = paired(first, line.distance, BLOCK_N) if PAIRED else first + tl.arange(0, BLOCK_N)
    return tl.minimum(n, line.weights - 1)


@triton.jit
def _tile(product, group, column_tile, row, HOW: tl.constexpr):
    """The Tile of a piece of a group's rows, from row on."""
    batch, index, inside = rows_from(row, product.rows, product.batch_rows, HOW.BLOCK_M)
    return Tile(group, 0, column_tile, batch, index, inside)


@triton.jit
def _zeros(product, ROWS: tl.constexpr, HOW: tl.constexpr):
    """Of a piece's sums, in sum_type: (its rows, BLOCK_N), or transposed where UPRIGHT says so."""
    SUM: tl.constexpr = sum_type(product.x.dtype.element_ty)
    return tl.full((HOW.BLOCK_N, ROWS), 0, SUM) if ROWS < UPRIGHT else tl.full((ROWS, HOW.BLOCK_N), 0, SUM)


@triton.jit
def _multiply(product, group, column_tile, n, begin, end, HEIGHTS: tl.constexpr, HOW: tl.constexpr):
    """Each piece of a group's rows times weight rows n, blocks begin to end of K; sums as _zeros has them."""
    BLOCK_K: tl.constexpr = HOW.BLOCK_K
    step = tl.arange(0, BLOCK_K)
    w_tile = product.w + n[None, :].to(tl.int64) * product.w_n + step[:, None]
    x_tiles, scales, means, totals = (), (), (), ()
    row = group * product.row_tiles
    for i in tl.static_range(len(HEIGHTS)):
        tile = _tile(product, group, column_tile, row, of_rows(HOW, HEIGHTS[i]))
        x_place = (tile.batch * product.x_b + tile.row * product.x_m)[:, None]
        x_tiles = with_last(x_tiles, product.x + x_place + step[None, :])
        row_scale, mean = first_norm(product, tile, of_rows(HOW, HEIGHTS[i]))
        scales, means = with_last(scales, row_scale), with_last(means, mean)
        totals = with_last(totals, _zeros(product, HEIGHTS[i], HOW))
        row += HEIGHTS[i]
    for start in range(begin * BLOCK_K, end * BLOCK_K, BLOCK_K):
        b = load_weights(product, w_tile, start, HOW)
        added = ()
        for i in tl.static_range(len(HEIGHTS)):
            a = load_rows(product, x_tiles[i], start, scales[i], means[i], of_rows(HOW, HEIGHTS[i]))
            if HEIGHTS[i] < UPRIGHT:
                added = with_last(added, add_product(b.T, a.T, totals[i]))
            else:
                added = with_last(added, add_product(a, b, totals[i]))
        totals = added
    return totals


@triton.jit
def _part(product, part, rows_before, HOW: tl.constexpr):
    """Where a piece of a part of a tile lies among the partials, shaped as its sums."""
    ROWS: tl.constexpr = HOW.BLOCK_N if HOW.BLOCK_M < UPRIGHT else HOW.BLOCK_M
    COLUMNS: tl.constexpr = HOW.BLOCK_M if HOW.BLOCK_M < UPRIGHT else HOW.BLOCK_N
    begin = product.partials + (part.to(tl.int64) * product.row_tiles + rows_before) * HOW.BLOCK_N
    return begin + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _deposit(totals, product, part, counter, HEIGHTS: tl.constexpr, HOW: tl.constexpr):
    """Leave a part of a tile in memory. Returns how many of the tile's parts were there before."""
    rows_before = 0
    for i in tl.static_range(len(HEIGHTS)):
        place = _part(product, part, rows_before, of_rows(HOW, HEIGHTS[i]))
        tl.store(place, totals[i].to(tl.float32, bitcast=True))
        rows_before += HEIGHTS[i]
    # The counter is touched by one thread: every thread's part must be there before.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _collect(product, part, parts, HEIGHTS: tl.constexpr, HOW: tl.constexpr):
    """Of each piece of a tile: its parts, added up in the order of K."""
    SUM: tl.constexpr = sum_type(product.x.dtype.element_ty)
    totals = ()
    for i in tl.static_range(len(HEIGHTS)):
        totals = with_last(totals, _zeros(product, HEIGHTS[i], HOW))
    for index in range(parts):
        added = ()
        rows_before = 0
        for i in tl.static_range(len(HEIGHTS)):
            place = _part(product, part + index, rows_before, of_rows(HOW, HEIGHTS[i]))
            more = tl.load(place, cache_modifier=".cg").to(SUM, bitcast=True)
            added = with_last(added, totals[i] + more)
            rows_before += HEIGHTS[i]
        totals = added
    return totals


@triton.jit
def _finish(
    totals,
    product,
    line,
    group,
    column_tile,
    n,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    FINISH: tl.constexpr,
    HEIGHTS: tl.constexpr,
    HOW: tl.constexpr,
):
    """What follows a tile's product, piece by piece."""
    row = group * line.height
    for i in tl.static_range(len(HEIGHTS)):
        tile = _tile(product, group, column_tile, row, of_rows(HOW, HEIGHTS[i]))
        y = totals[i].T if HEIGHTS[i] < UPRIGHT else totals[i]
        y = finish(y, product, tile, n, of_rows(HOW, HEIGHTS[i]))
        if OUT_SLOTS is None:
            FINISH(y, tile, end, of_rows(HOW, HEIGHTS[i]))
        else:
            FINISH(y, tile, end, CENTRED, ACTIVATION, OUT_SLOTS, of_rows(HOW, HEIGHTS[i]))
        row += HEIGHTS[i]


@triton.jit
def _wide(
    product,
    line,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    FINISH: tl.constexpr,
    PAIRED: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    HEIGHTS: tl.constexpr,
    HOW: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = HOW.BLOCK_N
    BLOCK_K: tl.constexpr = HOW.BLOCK_K
    program, blocks = tl.program_id(0), line.blocks
    # Not an argument: where it is 1, what depends on rows alone would be kept in registers from tile to tile.
    groups = line.tiles // line.column_tiles
    places = line.tiles * blocks
    if SHARED:
        first, last = program * places // line.programs, (program + 1) * places // line.programs
    else:
        first, last = program * blocks, (program + 1) * blocks
    if PDL:
        tile = first // blocks
        if tile % groups == 0:
            n = _weight_rows(line, tile // groups, PAIRED, BLOCK_N)
            begin = first % blocks * BLOCK_K
            length = tl.minimum(tl.minimum(last - first, blocks) * BLOCK_K, product.inputs - begin)
            prefetch_weight(product.w + begin, product.w_n, n, 0, length, 1, BLOCK_K)
    gdc_begin(PDL)
    if SHARED:
        # A loop of one round is none.
        rounds = 1 if EVEN else tl.cdiv(last, blocks) - first // blocks
        for index in tl.range(rounds, disable_licm=True):
            tile = first // blocks + index
            group, column_tile = tile % groups, tile // groups
            n = _weight_rows(line, column_tile, PAIRED, BLOCK_N)
            begin, stop = tl.maximum(first - tile * blocks, 0), tl.minimum(last - tile * blocks, blocks)
            totals = _multiply(product, group, column_tile, n, begin, stop, HEIGHTS, HOW)
            # The programs that hold the tile's first block and its last.
            opening = ((tile * blocks + 1) * line.programs - 1) // places
            closing = ((tile + 1) * blocks * line.programs - 1) // places
            parts, complete = closing - opening + 1, True
            if parts > 1:
                # Along the line each new part has a new program or a new tile: the sum of both counts parts.
                arrived = _deposit(totals, product, program + tile, product.counters + tile, HEIGHTS, HOW)
                complete = arrived == parts - 1
            if complete:
                # Inside of the branch above, Triton 3.9 fails on some epilogues of pieces for warpgroups.
                if parts > 1:
                    totals = _collect(product, opening + tile, parts, HEIGHTS, HOW)
                    tl.store(product.counters + tile, 0)
                _finish(
                    totals, product, line, group, column_tile, n, end, CENTRED, ACTIVATION, OUT_SLOTS, FINISH, HEIGHTS,
                    HOW
                )  # fmt: skip
    else:
        group, column_tile = program % groups, program // groups
        n = _weight_rows(line, column_tile, PAIRED, BLOCK_N)
        totals = _multiply(product, group, column_tile, n, 0, blocks, HEIGHTS, HOW)
        _finish(totals, product, line, group, column_tile, n, end, CENTRED, ACTIVATION, OUT_SLOTS, FINISH, HEIGHTS, HOW)


def launch_wide(call: ProductCall) -> None:
    """A product in tiles of mixed heights.

    tactic.block_m: most rows of a program. split_k: how many programs share all tiles out; 1: each tile has its own.

    Of fewer than UPRIGHT weight rows: fewer rows too, so that all pieces are products of warps.

    Raises ValueError for more blocks and programs than are counted in 32 bits.
    """
    tactic, width, workspace = call.tactic, call.tile_weights, call.workspace
    # The largest last: its epilogue has the registers of the others.
    most_rows = tactic.block_m if width >= UPRIGHT.value else min(tactic.block_m, UPRIGHT.value // 2)
    heights = row_pieces(call.rows, most_rows)[::-1]
    height = sum(heights)
    outputs, inputs = call.weight.data.shape
    groups, blocks = triton.cdiv(call.rows, height), triton.cdiv(inputs, tactic.block_k)
    tiles = groups * call.column_tiles
    programs = tiles if tactic.split_k == 1 else min(tactic.split_k, tiles * blocks)
    # Programs that are as many as tiles have a whole one each.
    shared = programs != tiles
    if shared and (tiles * blocks + 1) * programs >= MOST_BLOCKS:
        raise ValueError(
            f"tactic.split_k: expected 1 for {tiles} tiles of {blocks} blocks each, got {tactic.split_k}, whose shares "
            "32 bits do not count"
        )
    partials = workspace.partials((programs + tiles - 1) * height * width) if shared else None
    counters = workspace.counters(tiles) if shared else None
    launch(
        _wide,
        (programs,),
        {
            "product": call.product(height, partials, counters),
            "line": Line(
                tiles=tiles,
                blocks=blocks,
                programs=programs,
                column_tiles=call.column_tiles,
                height=height,
                column_step=call.column_step,
                distance=call.distance or 0,
                weights=outputs,
            ),
            **call.finishing,
            "PAIRED": call.distance is not None,
            "SHARED": shared,
            "EVEN": programs % tiles == 0,
            "HEIGHTS": heights,
            "HOW": call.how(height, groups),
        },
        tactic.warps,
        tactic.stages,
    )
