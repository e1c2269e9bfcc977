"""Products of rows with a weight: the part that linear, swiglu and qkv share. Each adds its own epilogue.

One program computes one tile, BLOCK_M of the rows of all batches by BLOCK_N rows of the weight, over one of SPLIT_K
parts of K. Programs of the same weight rows are neighbours, so these come from memory once. A tile's parts are left in
float32 in the workspace; the last program to arrive adds them up in the order of K, whoever it is, and goes on to the
epilogue: replays are bit-identical.

What does not depend on earlier kernels, the weight, is on its way to the L2 cache before a dependent launch waits.
8-bit weights are converted in registers; their scale, like the norm of the input's rows, is applied to the result.
Where the input's rows have 8 bits too, these are multiplied as they are, and both scales are applied to the result: the
sums of int8 are int32's, whose bits lie in the workspace as float32.
Where the input's rows are still to be rounded to float16, which ends at 65504, they are normalised before.

Where a tactic names the library, torch computes the product, and the same kernel reads it and does the epilogue.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import Tactic
from xr0_engine.kernels.device import gdc_begin, prefetch_l2, rows_of, tile_of
from xr0_engine.kernels.statistics import row_norm

PREFETCH_BLOCKS = tl.constexpr(8)
"""A program asks for at most so many blocks of its weight ahead of time; what follows streams behind them."""
CACHE_LINE_BYTES = tl.constexpr(128)
STREAM_ROW_TILES = 2
"""Up to so many row tiles, which run side by side, read a weight block: it need not stay in the cache."""
MIN_DOT = 16
"""Smallest side of a tile that tl.dot takes."""
WARPGROUP_ROWS = 64
"""So many rows at least a warpgroup multiplies."""
MOST_FLOAT8 = 128
"""So many products of float8 are added up with the 14 bits that a warpgroup has for them, as other libraries do."""
FACTORS = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
MOST_WASTE = 0.08
"""Of the rows that pieces of mixed heights hold, at most so many are none, where multiples of MIN_DOT allow it."""
LEAST_PIECE, LEAST_WASTE = 8, 0.02
"""Rows of a piece at least, and how many at most are none, where the weight's rows are the MMA's and warps multiply one
by one: there a row costs its own arithmetic alone, and chips without warpgroups are limited by that."""


class Product(NamedTuple):
    """What a product's kernel reads, as one argument: tensors, each with the strides of its dimensions, and sizes.

    x: (B, M, K); w: (N, K); x_scale: (B, M); scale, bias, column_sums: (N,); col_scale: (K,); sums: (slots, B, M, 2).
    norm_eps, slots: of sums. partials, counters: None where K is whole. rows: of all batches, in row_tiles tiles;
    batch_rows: M; inputs: K.
    """

    x: Tensor
    x_b: int
    x_m: int
    w: Tensor
    w_n: int
    x_scale: Tensor | None
    x_scale_b: int
    scale: Tensor | None
    bias: Tensor | None
    col_scale: Tensor | None
    sums: Tensor | None
    sums_s: int
    sums_b: int
    sums_m: int
    column_sums: Tensor | None
    norm_eps: float
    partials: Tensor | None
    counters: Tensor | None
    rows: int
    batch_rows: int
    inputs: int
    slots: int
    row_tiles: int


class How(NamedTuple):
    """What a product's kernel is compiled for, as one argument.

    SLOTS: a power of two. EVEN_K: K is a multiple of BLOCK_K. STREAM: weight blocks need not stay in the cache. FACTOR:
    of FACTORS, to which float32 rows of an 8-bit weight are rounded.
    """

    NORM: str | None
    SLOTS: int
    LIBRARY: bool
    SPLIT_K: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    EVEN_K: bool
    STREAM: bool
    FACTOR: str


@triton.constexpr_function
def of_rows(how, rows):
    """How, of a piece of a tile that has so many rows."""
    return How(**{name: getattr(how, name) for name in How._fields} | {"BLOCK_M": rows})


class Tile(NamedTuple):
    """A program's share of a product, on the device. batch, row, inside: (BLOCK_M,), as rows_of has them."""

    row_tile: Any
    split: Any
    column_tile: Any
    batch: Any
    row: Any
    inside: Any


@triton.constexpr_function
def compute_type(x, w, how):
    """What factors are rounded to: the weight's dtype, for 8-bit weights the input's, or what that is rounded to."""
    if w.primitive_bitwidth > 8:
        return w
    return FACTORS[how.FACTOR] if x == tl.float32 else x


@triton.constexpr_function
def sum_type(x):
    """What products of such rows are added up in."""
    return tl.int32 if x == tl.int8 else tl.float32


@triton.constexpr_function
def norm_comes_first(x, w, scaled, how):
    """Whether the norm is applied to factors of a product, which are rounded to float16 and were not before."""
    return how.NORM is not None and compute_type(x, w, how) == tl.float16 and (scaled or x != tl.float16)


@triton.jit
def take_tile(program, product, HOW: tl.constexpr):
    """The Tile of a program; None is the one that runs."""
    if program is None:
        program = tl.program_id(0)
    row_tile, split, column_tile = tile_of(program, product.row_tiles, HOW.SPLIT_K)
    batch, row, inside = rows_of(row_tile, product.rows, product.batch_rows, HOW.BLOCK_M)
    return Tile(row_tile, split, column_tile, batch, row, inside)


@triton.jit
def prefetch_weight(w, w_n, n, split, inputs, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Ask for the first blocks of the weight rows n that this split reads."""
    STEP: tl.constexpr = CACHE_LINE_BYTES * 8 // w.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.cdiv(BLOCK_K, STEP)
    blocks = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLIT_K)
    line = w + n[:, None].to(tl.int64) * w_n
    for block in range(tl.minimum(blocks, PREFETCH_BLOCKS)):
        k = (split * blocks + block) * BLOCK_K + tl.arange(0, LINES) * STEP
        prefetch_l2(line + tl.minimum(k, inputs - 1)[None, :])


@triton.jit
def norm_of(product, tile, HOW: tl.constexpr):
    """row_norm of a tile's rows."""
    # A name of its own, since Triton 3.6 passes no text of a named tuple on.
    NORM: tl.constexpr = HOW.NORM
    place = tile.batch * product.sums_b + tile.row * product.sums_m
    return row_norm(
        product.sums, product.sums_s, place, product.slots, product.inputs, product.norm_eps, NORM, HOW.SLOTS
    )


@triton.jit
def first_norm(product, tile, HOW: tl.constexpr):
    """norm_of where it comes before the product, else two numbers that nobody reads."""
    NORM_FIRST: tl.constexpr = norm_comes_first(
        product.x.dtype.element_ty, product.w.dtype.element_ty, product.col_scale is not None, HOW
    )
    row_scale, mean = 0.0, 0.0
    if NORM_FIRST:
        row_scale, mean = norm_of(product, tile, HOW)
    return row_scale, mean


@triton.jit
def load_rows(product, place, start, row_scale, mean, HOW: tl.constexpr):
    """(BLOCK_M, BLOCK_K) of the input's rows from column start on, as a factor. place: of their first columns."""
    NORM_FIRST: tl.constexpr = norm_comes_first(
        product.x.dtype.element_ty, product.w.dtype.element_ty, product.col_scale is not None, HOW
    )
    k = start + tl.arange(0, HOW.BLOCK_K)
    a = tl.load(place + start) if HOW.EVEN_K else tl.load(place + start, (k < product.inputs)[None, :], 0.0)
    if NORM_FIRST:
        a = (a.to(tl.float32) - mean[:, None]) * row_scale[:, None]
    if product.col_scale is not None:
        scale = tl.load(product.col_scale + k, k < product.inputs, 0.0)
        a = a.to(tl.float32) * scale.to(tl.float32)[None, :]
    return a.to(compute_type(product.x.dtype.element_ty, product.w.dtype.element_ty, HOW))


@triton.jit
def load_weights(product, place, start, HOW: tl.constexpr):
    """(BLOCK_K, BLOCK_N) of the weight from column start on, transposed: the other factor."""
    policy: tl.constexpr = "evict_first" if HOW.STREAM else ""
    if HOW.EVEN_K:
        b = tl.load(place + start, eviction_policy=policy)
    else:
        inside = start + tl.arange(0, HOW.BLOCK_K) < product.inputs
        b = tl.load(place + start, inside[:, None], 0.0, eviction_policy=policy)
    return b.to(compute_type(product.x.dtype.element_ty, product.w.dtype.element_ty, HOW))


@triton.jit
def add_product(a, b, total):
    """total + a @ b, of factors as they are and sums in sum_type."""
    if a.dtype.is_fp8():
        # A sum of its own, which a compiler for warpgroups does not join to the total; one that it is asked to cut
        # (max_num_imprecise_acc) it reads before its products are waited for.
        total += tl.dot(a, b)
    else:
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
    return total


@triton.jit
def _multiply(product, tile, n, HOW: tl.constexpr):
    """(BLOCK_M, BLOCK_N), in sum_type: a tile's rows times weight rows n, over one split's part of K."""
    step, inputs, split = tl.arange(0, HOW.BLOCK_K), product.inputs, tile.split
    row_scale, mean = first_norm(product, tile, HOW)
    x_tile = product.x + (tile.batch * product.x_b + tile.row * product.x_m)[:, None] + step[None, :]
    w_tile = product.w + n[None, :].to(tl.int64) * product.w_n + step[:, None]
    part = tl.cdiv(tl.cdiv(inputs, HOW.BLOCK_K), HOW.SPLIT_K) * HOW.BLOCK_K
    SUM: tl.constexpr = sum_type(product.x.dtype.element_ty)
    # Not tl.zeros, which in Triton 3.6 takes no numbers of a named tuple.
    total = tl.full((HOW.BLOCK_M, HOW.BLOCK_N), 0, SUM)
    for start in range(split * part, tl.minimum(split * part + part, inputs), HOW.BLOCK_K):
        a = load_rows(product, x_tile, start, row_scale, mean, HOW)
        b = load_weights(product, w_tile, start, HOW)
        total = add_product(a, b, total)
    return total


@triton.jit
def multiply(product, tile, n, HOW: tl.constexpr, PDL: tl.constexpr):
    """(BLOCK_M, BLOCK_N) in sum_type, a tile's rows times weight rows n, and whether this program is to finish it.

    Where K is split these are one split's; the last of a tile's programs to come by finishes it.
    """
    if PDL and not HOW.LIBRARY and tile.row_tile == 0:
        prefetch_weight(product.w, product.w_n, n, tile.split, product.inputs, HOW.SPLIT_K, HOW.BLOCK_K)
    gdc_begin(PDL)
    if HOW.LIBRARY:
        x_offset = tile.batch * product.x_b + tile.row * product.x_m
        y = tl.load(product.x + x_offset[:, None] + n[None, :]).to(tl.float32)
    else:
        y = _multiply(product, tile, n, HOW)
    complete = HOW.SPLIT_K == 1
    if HOW.SPLIT_K > 1:
        complete = deposit(y, product, tile, HOW) == HOW.SPLIT_K - 1
    return y, complete


@triton.jit
def deposit(total, product, tile, HOW: tl.constexpr):
    """Leave one split's part of a tile in memory. Returns how many of the tile's splits had done so before."""
    index = tile.column_tile * product.row_tiles + tile.row_tile
    place = tl.arange(0, HOW.BLOCK_M)[:, None] * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N)[None, :]
    part = (index * HOW.SPLIT_K + tile.split).to(tl.int64) * (HOW.BLOCK_M * HOW.BLOCK_N)
    tl.store(product.partials + part + place, total.to(tl.float32, bitcast=True))
    # The counter is touched by one thread: every thread's part must be there before.
    tl.debug_barrier()
    return tl.atomic_add(product.counters + index, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _collect(product, tile, HOW: tl.constexpr):
    """A tile's parts, added up in the order of K. Puts the counter back."""
    index = tile.column_tile * product.row_tiles + tile.row_tile
    place = tl.arange(0, HOW.BLOCK_M)[:, None] * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N)[None, :]
    part = product.partials + index.to(tl.int64) * (HOW.SPLIT_K * HOW.BLOCK_M * HOW.BLOCK_N) + place
    SUM: tl.constexpr = sum_type(product.x.dtype.element_ty)
    total = tl.full((HOW.BLOCK_M, HOW.BLOCK_N), 0, SUM)
    for _ in range(HOW.SPLIT_K):
        total += tl.load(part, cache_modifier=".cg").to(SUM, bitcast=True)
        part += HOW.BLOCK_M * HOW.BLOCK_N
    tl.store(product.counters + index, 0)
    return total


@triton.jit
def finish(y, product, tile, n, HOW: tl.constexpr):
    """What follows multiply: all splits' sum, the rows' and the weight's scale, the norm of the input's rows, the bias.

    Returns float32.
    """
    if HOW.SPLIT_K > 1:
        y = _collect(product, tile, HOW)
    if product.x_scale is not None:
        row_place = tile.batch * product.x_scale_b + tile.row
        y = y.to(tl.float32) * tl.load(product.x_scale + row_place)[:, None]
    if product.scale is not None:
        y *= tl.load(product.scale + n)[None, :]
    NORM_FIRST: tl.constexpr = norm_comes_first(
        product.x.dtype.element_ty, product.w.dtype.element_ty, product.col_scale is not None, HOW
    )
    if HOW.NORM is not None and not NORM_FIRST:
        row_scale, mean = norm_of(product, tile, HOW)
        if HOW.NORM == "layer":
            y -= mean[:, None] * tl.load(product.column_sums + n)[None, :]
        y *= row_scale[:, None]
    if product.bias is not None:
        y += tl.load(product.bias + n).to(tl.float32)[None, :]
    return y


def row_pieces(rows: int, block_m: int, least: int = MIN_DOT, waste: float = MOST_WASTE) -> tuple[int, ...]:
    """Heights of the pieces of a group of rows, all of whose groups are alike and hold at most block_m.

    Powers of two of at least `least`, the fewest that keep to that waste, or whose waste is the least if none do.
    """
    groups = triton.cdiv(rows, block_m)
    heights = range(triton.cdiv(triton.cdiv(rows, groups), least) * least, block_m + 1, least)
    within = [height for height in heights if groups * height - rows <= waste * groups * height]
    height = min(within or heights[:1], key=lambda height: (height.bit_count(), height))
    return tuple(1 << bit for bit in reversed(range(height.bit_length())) if height >> bit & 1)


def swapped_pieces(rows: int, tactic: Tactic) -> tuple[int, ...]:
    """As row_pieces, of the schedules "swapped" and "warpgroups" (swapped.py)."""
    waste = MOST_WASTE if tactic.schedule == "warpgroups" else LEAST_WASTE
    return row_pieces(rows, tactic.block_m, LEAST_PIECE, waste)
