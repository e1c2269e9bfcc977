"""Products of 65 to 1024 rows by TMA, from sm_90 on: the schedule "tma". product.py has the rest of the algorithm.

The chip's copy engine brings whole tiles of x and the weight into shared memory, as tensor descriptors say: no thread
computes an address, none is masked (what lies behind the last row, column or K is zeros), and a deep pipeline costs no
registers. A program holds up to 256 rows of x, in pieces of 128, 64, 32 and 16 of them (row_pieces), by all of which
its tile of the weight is multiplied: 194 rows are one group of 128 + 64 + 16, and the weight crosses the L2 cache once.
The MMA of a warpgroup has 64 rows; where a piece has fewer, the weight takes their place, and the result is transposed.

split_k is how many programs run at once. As long as there is a tile for each of them, a program computes a whole one;
the tiles that are left are shared out among split_k programs more, cut along K into as many parts as there are programs
for each, so that the last wave is as full as the others, and shorter. A tile's last program to come by adds up its
parts in the order of K: replays are bit-identical. No program has more than one tile: in a loop over tiles the compiler
keeps so much of the epilogue in registers from one to the next that accumulators are spilled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from xr0_engine.kernels.arguments import TMA_FROM
from xr0_engine.kernels.calls import ProductCall
from xr0_engine.kernels.device import gdc_begin, paired, rows_from, with_last
from xr0_engine.kernels.launch import INTERPRETED, capability, launch
from xr0_engine.kernels.product import MIN_DOT, Tile, finish, of_rows, prefetch_weight, row_pieces

MOST_ROWS = 256
"""Of a program, and of an MMA's columns."""
UPRIGHT = tl.constexpr(64)
"""Pieces of fewer rows are the MMA's columns, and weights its rows: a warpgroup's MMA has 64 rows or none."""
MOST_PIECE = 128
"""Rows of a piece: what its epilogue holds in registers beside all that was added up."""
PIECES = 4
"""Up to so many make up any multiple of MIN_DOT rows up to MOST_ROWS."""
COUNTED = 1 << 31
"""Programs do not count so far."""
UNIT_BYTES = 16
"""What TMA wants addresses and strides to be multiples of."""


class Walk(NamedTuple):
    """Which program computes what, as one argument.

    full: the first so many programs compute a whole tile each; `sharers` more share `shared` tiles. height: rows of a
    tile. column_step: weight rows from a tile's first to the next one's; distance: of those of a pair; weights: all.
    """

    full: int
    shared: int
    sharers: int
    height: int
    column_step: int
    distance: int
    weights: int


@triton.jit
def _zeros(HEIGHTS: tl.constexpr, WEIGHTS: tl.constexpr):
    totals = ()
    for i in tl.static_range(len(HEIGHTS)):
        if HEIGHTS[i] >= UPRIGHT:
            totals = with_last(totals, tl.full((HEIGHTS[i], WEIGHTS), 0.0, tl.float32))
        else:
            totals = with_last(totals, tl.full((WEIGHTS, HEIGHTS[i]), 0.0, tl.float32))
    return totals


@triton.jit
def _accumulate(weight, x, row, k, totals, HEIGHTS: tl.constexpr):
    """totals, each (rows of its piece, WEIGHTS) or transposed, plus x from row on times a (WEIGHTS, BLOCK_K) tile."""
    added = ()
    for i in tl.static_range(len(HEIGHTS)):
        piece = x[i].load([row, k])
        if HEIGHTS[i] >= UPRIGHT:
            added = with_last(added, tl.dot(piece, weight.T, totals[i]))
        else:
            added = with_last(added, tl.dot(weight, piece.T, totals[i]))
        row += HEIGHTS[i]
    return added


@triton.jit
def _upright(totals, HEIGHTS: tl.constexpr):
    """totals, each (rows of its piece, WEIGHTS)."""
    turned = ()
    for i in tl.static_range(len(HEIGHTS)):
        turned = with_last(turned, totals[i] if HEIGHTS[i] >= UPRIGHT else tl.trans(totals[i]))
    return turned


@triton.jit
def _part_place(part, i, half, HEIGHTS: tl.constexpr, WEIGHTS: tl.constexpr, HALVES: tl.constexpr):
    """Where a piece of a part of a tile lies among the partials, (rows of the piece, WEIGHTS)."""
    before = 0
    rows = 0
    for j in tl.static_range(len(HEIGHTS)):
        if j < i:
            before += HEIGHTS[j]
        rows += HEIGHTS[j]
    begin = (part.to(tl.int64) * rows + before) * (WEIGHTS * HALVES) + half * (WEIGHTS * HEIGHTS[i])
    return begin + tl.arange(0, HEIGHTS[i])[:, None] * WEIGHTS + tl.arange(0, WEIGHTS)[None, :]


@triton.jit
def _deposit(partials, part, first, second, HEIGHTS: tl.constexpr, WEIGHTS: tl.constexpr, HALVES: tl.constexpr):
    """Leave a part of a tile in memory."""
    for i in tl.static_range(len(HEIGHTS)):
        tl.store(partials + _part_place(part, i, 0, HEIGHTS, WEIGHTS, HALVES), first[i])
        if HALVES == 2:
            tl.store(partials + _part_place(part, i, 1, HEIGHTS, WEIGHTS, HALVES), second[i])
    # The counter is touched by one thread: every thread's part must be there before.
    tl.debug_barrier()


@triton.jit
def _collect(partials, part, parts, i, half, HEIGHTS: tl.constexpr, WEIGHTS: tl.constexpr, HALVES: tl.constexpr):
    """A piece of a tile: its parts, from part on, added up in the order of K."""
    total = tl.full((HEIGHTS[i], WEIGHTS), 0.0, tl.float32)
    for index in range(parts):
        place = _part_place(part + index, i, half, HEIGHTS, WEIGHTS, HALVES)
        total += tl.load(partials + place, cache_modifier=".cg")
    return total


@triton.jit
def _end_piece(
    first,
    second,
    product,
    walk,
    column_tile,
    row,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    FINISH: tl.constexpr,
    HOW: tl.constexpr,
):
    """The epilogue of a piece's rows from row on. first: (BLOCK_M, BLOCK_N) float32; of pairs half, and second."""
    n = column_tile * walk.column_step + tl.arange(0, HOW.BLOCK_N)
    if second is not None:
        n = paired(column_tile * walk.column_step, walk.distance, HOW.BLOCK_N)
        first = tl.reshape(tl.join(first, second), (HOW.BLOCK_M, HOW.BLOCK_N))
    n = tl.minimum(n, walk.weights - 1)
    batch, index, inside = rows_from(row, product.rows, product.batch_rows, HOW.BLOCK_M)
    tile = Tile(0, 0, column_tile, batch, index, inside)
    y = finish(first, product, tile, n, HOW)
    if OUT_SLOTS is None:
        FINISH(y, tile, end, HOW)
    else:
        FINISH(y, tile, end, CENTRED, ACTIVATION, OUT_SLOTS, HOW)


@triton.jit
def _bulk_product(
    x_0,
    x_1,
    x_2,
    x_3,
    w,
    product,
    walk,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    FINISH: tl.constexpr,
    SHARED: tl.constexpr,
    PAIRED: tl.constexpr,
    HEIGHTS: tl.constexpr,
    HOW: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = HOW.BLOCK_N
    BLOCK_K: tl.constexpr = HOW.BLOCK_K
    HALVES: tl.constexpr = 2 if PAIRED else 1
    WEIGHTS: tl.constexpr = BLOCK_N // HALVES
    NONE: tl.constexpr = ()
    SECOND: tl.constexpr = HEIGHTS if PAIRED else NONE
    x = (x_0, x_1, x_2, x_3)
    blocks, program = tl.cdiv(product.inputs, BLOCK_K), tl.program_id(0)
    tile, sharer, opening, parts = program, 0, 0, 1
    if SHARED and program >= walk.full:
        sharer = program - walk.full
        index = sharer * walk.shared // walk.sharers
        tile = walk.full + index
        opening = tl.cdiv(index * walk.sharers, walk.shared)
        parts = tl.cdiv((index + 1) * walk.sharers, walk.shared) - opening
    part = sharer - opening
    begin, stop = part * blocks // parts, (part + 1) * blocks // parts
    group, column_tile = tile % product.row_tiles, tile // product.row_tiles
    row, column = group * walk.height, column_tile * walk.column_step
    if PDL and group == 0:
        length = tl.minimum(stop * BLOCK_K, product.inputs) - begin * BLOCK_K
        for half in tl.static_range(HALVES):
            ahead = tl.minimum(column + half * walk.distance + tl.arange(0, WEIGHTS), walk.weights - 1)
            prefetch_weight(product.w + begin * BLOCK_K, product.w_n, ahead, 0, length, 1, BLOCK_K)
    gdc_begin(PDL)
    first = _zeros(HEIGHTS, WEIGHTS)
    second = _zeros(SECOND, WEIGHTS)
    for block in range(begin, stop):
        k = block * BLOCK_K
        first = _accumulate(w.load([column, k]), x, row, k, first, HEIGHTS)
        if PAIRED:
            second = _accumulate(w.load([column + walk.distance, k]), x, row, k, second, SECOND)
    first, second = _upright(first, HEIGHTS), _upright(second, SECOND)
    if SHARED and parts > 1:
        counter = product.counters + tile - walk.full
        _deposit(product.partials, sharer, first, second, HEIGHTS, WEIGHTS, HALVES)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(counter, 0)
            for i in tl.static_range(len(HEIGHTS)):
                lower = _collect(product.partials, opening, parts, i, 0, HEIGHTS, WEIGHTS, HALVES)
                upper = None
                if PAIRED:
                    upper = _collect(product.partials, opening, parts, i, 1, HEIGHTS, WEIGHTS, HALVES)
                _end_piece(
                    lower, upper, product, walk, column_tile, row, end, CENTRED, ACTIVATION, OUT_SLOTS, FINISH,
                    of_rows(HOW, HEIGHTS[i])
                )  # fmt: skip
                row += HEIGHTS[i]
    else:
        for i in tl.static_range(len(HEIGHTS)):
            upper = None
            if PAIRED:
                upper = second[i]
            _end_piece(
                first[i], upper, product, walk, column_tile, row, end, CENTRED, ACTIVATION, OUT_SLOTS, FINISH,
                of_rows(HOW, HEIGHTS[i])
            )  # fmt: skip
            row += HEIGHTS[i]


def launch_bulk(call: ProductCall) -> None:
    """A product by TMA. tactic.block_m: most rows of a program. split_k: how many programs run at once; 1: as many as
    there are tiles.

    Raises NotImplementedError for chips without TMA, for factors that it cannot multiply as they lie in memory (of
    different dtypes, of 8 bits or float32, to be scaled by column; rows that are no multiples of 16 bytes apart, or
    whose batches do not follow each other), ValueError for more than MOST_ROWS.
    """
    check_tma(call)
    check_factors(call)
    x, weight, tactic, rows = call.x, call.weight.data, call.tactic, call.rows
    pieces = tuple(_cut(row_pieces(rows, tactic.block_m)))
    height = sum(pieces)
    groups, inputs = triton.cdiv(rows, height), x.shape[2]
    tiles, blocks = groups * call.column_tiles, triton.cdiv(inputs, tactic.block_k)
    full = tiles if tactic.split_k == 1 else tiles // tactic.split_k * tactic.split_k
    shared = tiles - full
    sharers = min(tactic.split_k, shared * blocks)
    if max(shared, blocks) * (sharers + 1) >= COUNTED:
        raise ValueError(f"tactic.split_k: expected programs that 32 bits count, got {tactic.split_k}")
    halves = 1 if call.distance is None else 2
    described: dict[str, TensorDescriptor | None] = {f"x_{index}": None for index in range(PIECES)}
    described |= {f"x_{index}": _described(call.flat_x, piece, tactic.block_k) for index, piece in enumerate(pieces)}
    partials = call.workspace.partials(sharers * height * call.tile_weights) if shared else None
    counters = call.workspace.counters(shared) if shared else None
    launch(
        _bulk_product,
        (full + sharers,),
        {
            **described,
            "w": _described(weight, call.tile_weights // halves, tactic.block_k),
            "product": call.product(groups, partials, counters),
            "walk": Walk(
                full=full,
                shared=shared,
                sharers=sharers,
                height=height,
                column_step=call.column_step,
                distance=call.distance or 0,
                weights=weight.shape[0],
            ),
            **call.finishing,
            "SHARED": shared > 0,
            "PAIRED": call.distance is not None,
            "HEIGHTS": pieces,
            "HOW": call.how(height, groups),
        },
        tactic.warps,
        tactic.stages,
    )


def _cut(pieces: tuple[int, ...]) -> Iterator[int]:
    """Pieces of at most MOST_PIECE rows."""
    for piece in pieces:
        for first in range(0, piece, MOST_PIECE):
            yield min(piece - first, MOST_PIECE)


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def check_tma(call: ProductCall) -> None:
    """Raises NotImplementedError for a chip without TMA."""
    x, schedule = call.x, call.tactic.schedule
    if x.device.type != "meta" and not INTERPRETED and capability(x.device) < TMA_FROM:
        raise NotImplementedError(
            f"tactic.schedule {schedule!r}: expected a chip from sm_{TMA_FROM} on, got sm_{capability(x.device)}"
        )


def check_factors(call: ProductCall, most_rows: int = MOST_ROWS) -> None:
    """Raises as launch_bulk, for every schedule that multiplies factors as they lie in memory. most_rows: of a
    program."""
    x, weight, tactic = call.x, call.weight.data, call.tactic
    schedule = f"schedule {tactic.schedule!r}"
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(
            f"tactic.{schedule}: expected x and weight both in bfloat16 or float16, got {x.dtype}, {weight.dtype}"
        )
    if call.col_scale is not None:
        raise NotImplementedError(f"tactic.{schedule}: expected no col_scale, got one")
    if x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        raise NotImplementedError(
            f"tactic.{schedule}: expected batches of x that follow each other, got strides {x.stride()}"
        )
    for name, tensor in (("x", x), ("weight", weight)):
        apart = tensor.stride(-2) * tensor.element_size()
        if apart % UNIT_BYTES or tensor.data_ptr() % UNIT_BYTES:
            raise NotImplementedError(
                f"tactic.{schedule}: expected rows of {name} at multiples of {UNIT_BYTES} bytes, got {apart} from row "
                f"to row, the first at {tensor.data_ptr() % UNIT_BYTES}"
            )
    if tactic.block_m > most_rows:
        raise ValueError(f"tactic.block_m: expected at most {most_rows} for {schedule}, got {tactic.block_m}")
    if call.distance is not None and call.tile_weights < 2 * MIN_DOT:
        raise ValueError(f"tactic.block_n: expected pairs of at least {MIN_DOT}, got {call.tile_weights // 2}")
