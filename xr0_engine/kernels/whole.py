"""Products of few rows: a program has all of K, shared out over its warps. The schedule "whole" (arguments.py: Tactic).

A program computes BLOCK_M rows by a narrow tile of weight rows. Each warp multiplies a part of every step of K, as one
of a batch of products, and the parts are added up in shared memory in one fixed order: no counter and no trip through
global memory, unless K is split over programs as well.

What depends on no other kernel, the weight above all, is loaded before the wait for what comes ahead: *_ahead. After
it, *_after has one trip through the L2 cache, for the rows, their sums and the residual, then the product and a short
epilogue. A kernel of many stages puts its own barrier between the two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl

from xr0_engine.kernels.arguments import Tactic
from xr0_engine.kernels.calls import ProductCall, launch_tiles
from xr0_engine.kernels.device import gdc_begin, paired, prefetch_l2, with_last
from xr0_engine.kernels.ends import finish_linear, finish_swiglu, load_base, load_vectors, write_linear
from xr0_engine.kernels.launch import PROCESSORS
from xr0_engine.kernels.product import (
    CACHE_LINE_BYTES,
    MIN_DOT,
    compute_type,
    deposit,
    norm_comes_first,
    norm_of,
    take_tile,
)

WHOLE_ROWS, WHOLE_STEP, WHOLE_WARPS = 32, 1024, 8
"""Up to so many rows it is what runs unmeasured; columns of K of a program, and its warps."""
WHOLE_TILE, WHOLE_ROWS_STEP = 512, 8192
"""Numbers of a tile whose program has registers for a whole step of float32 rows, and of the rows of one twice as large
for so many."""
HELD_REGISTERS = 64
"""A thread holds at most so many of the weight, and as many of the rows, while it waits for them."""


class Whole(NamedTuple):
    """How a program goes through its K, as one argument.

    PARTS: of a step of BLOCK_K, one for each warp. STEPS: of a program. HELD: steps whose weights are loaded before the
    wait. AHEAD: steps whose rows are loaded at once.
    """

    PARTS: int
    STEPS: int
    HELD: int
    AHEAD: int


@triton.jit
def _columns(tile, step, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCK_K,): the columns of K of a step."""
    return (tile.split * WHOLE.STEPS + step) * HOW.BLOCK_K + tl.arange(0, HOW.BLOCK_K)


@triton.jit
def _load_weights(product, tile, n, step, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCK_N, BLOCK_K)."""
    policy: tl.constexpr = "evict_first" if HOW.STREAM else ""
    place = product.w + n.to(tl.int64)[:, None] * product.w_n
    return tl.load(place + _columns(tile, step, HOW, WHOLE)[None, :], eviction_policy=policy)


@triton.jit
def _load_col_scale(product, tile, step, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCK_K,) float32."""
    return tl.load(product.col_scale + _columns(tile, step, HOW, WHOLE)).to(tl.float32)


@triton.jit
def _load_rows(product, tile, step, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCK_M, BLOCK_K)."""
    place = product.x + (tile.batch * product.x_b + tile.row * product.x_m)[:, None]
    return tl.load(place + _columns(tile, step, HOW, WHOLE)[None, :])


@triton.jit
def product_ahead(product, tile, n, HOW: tl.constexpr, WHOLE: tl.constexpr, PREFETCH: tl.constexpr):
    """(weights, column scales, scale, bias, column sums) of weight rows n: what multiply_whole starts from."""
    STEPS: tl.constexpr = WHOLE.STEPS
    HELD: tl.constexpr = WHOLE.HELD
    weights = ()
    col_scales = ()
    for step in tl.static_range(HELD):
        weights = with_last(weights, _load_weights(product, tile, n, step, HOW, WHOLE))
    if product.col_scale is not None:
        for step in tl.static_range(HELD):
            col_scales = with_last(col_scales, _load_col_scale(product, tile, step, HOW, WHOLE))
    if PREFETCH:
        LINE: tl.constexpr = CACHE_LINE_BYTES * 8 // product.w.dtype.element_ty.primitive_bitwidth
        for step in tl.static_range(HELD, STEPS):
            lines = (tile.split * STEPS + step) * HOW.BLOCK_K + tl.arange(0, triton.cdiv(HOW.BLOCK_K, LINE)) * LINE
            prefetch_l2(product.w + n.to(tl.int64)[:, None] * product.w_n + lines[None, :])
    # Of what is not there some number: Triton 3.6 returns no None.
    scale, bias, column_sums = 0.0, 0.0, 0.0
    if product.scale is not None:
        scale = tl.load(product.scale + n)
    if product.bias is not None:
        bias = tl.load(product.bias + n).to(tl.float32)
    if product.column_sums is not None:
        column_sums = tl.load(product.column_sums + n)
    return weights, col_scales, scale, bias, column_sums


@triton.jit
def rows_ahead(product, tile, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """The first steps of a tile's rows, once they are there."""
    AHEAD: tl.constexpr = WHOLE.AHEAD
    rows = ()
    for step in tl.static_range(AHEAD):
        rows = with_last(rows, _load_rows(product, tile, step, HOW, WHOLE))
    return rows


@triton.jit
def multiply_whole(product, tile, n, ahead, rows, norm, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """(BLOCK_M, BLOCK_N) float32: a tile's rows times weight rows n, over one split's part of K.

    ahead: of product_ahead; rows: of rows_ahead; norm: of norm_of, if there is one.
    """
    X: tl.constexpr = product.x.dtype.element_ty
    compute: tl.constexpr = compute_type(X, product.w.dtype.element_ty, HOW)
    NORM_FIRST: tl.constexpr = norm_comes_first(X, product.w.dtype.element_ty, product.col_scale is not None, HOW)
    STEPS: tl.constexpr = WHOLE.STEPS
    HELD: tl.constexpr = WHOLE.HELD
    AHEAD: tl.constexpr = WHOLE.AHEAD
    DEPTH: tl.constexpr = HOW.BLOCK_K // WHOLE.PARTS
    weights, col_scales = ahead[0], ahead[1]
    total = tl.full((WHOLE.PARTS, HOW.BLOCK_M, HOW.BLOCK_N), 0.0, tl.float32)
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            rows = with_last(rows, _load_rows(product, tile, step + AHEAD, HOW, WHOLE))
        if step + HELD < STEPS:
            weights = with_last(weights, _load_weights(product, tile, n, step + HELD, HOW, WHOLE))
            if product.col_scale is not None:
                col_scales = with_last(col_scales, _load_col_scale(product, tile, step + HELD, HOW, WHOLE))
        a = rows[step]
        if NORM_FIRST:
            a = (a.to(tl.float32) - norm[1][:, None]) * norm[0][:, None]
        if product.col_scale is not None:
            a = a.to(tl.float32) * col_scales[step][None, :]
        a = tl.reshape(a.to(compute), (HOW.BLOCK_M, WHOLE.PARTS, DEPTH))
        b = tl.reshape(weights[step].to(compute), (HOW.BLOCK_N, WHOLE.PARTS, DEPTH))
        a, b = tl.permute(a, (1, 0, 2)), tl.permute(b, (1, 2, 0))
        total = tl.dot(a, b, total, input_precision="ieee")
    return tl.sum(total, 0)


@triton.jit
def _collect(product, tile, HOW: tl.constexpr):
    """A tile's parts, asked for all at once and added up in the order of K. Puts the counter back."""
    index = tile.column_tile * product.row_tiles + tile.row_tile
    place = tl.arange(0, HOW.BLOCK_M)[:, None] * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N)[None, :]
    first = product.partials + index.to(tl.int64) * (HOW.SPLIT_K * HOW.BLOCK_M * HOW.BLOCK_N) + place
    SPLITS: tl.constexpr = HOW.SPLIT_K
    parts = ()
    for split in tl.static_range(SPLITS):
        parts = with_last(parts, tl.load(first + split * (HOW.BLOCK_M * HOW.BLOCK_N), cache_modifier=".cg"))
    total = tl.full((HOW.BLOCK_M, HOW.BLOCK_N), 0.0, tl.float32)
    for split in tl.static_range(SPLITS):
        total += parts[split]
    tl.store(product.counters + index, 0)
    return total


@triton.jit
def finish_whole(y, product, tile, ahead, norm, HOW: tl.constexpr):
    """What follows multiply_whole, as product.py: finish, of what is loaded already."""
    if HOW.SPLIT_K > 1:
        y = _collect(product, tile, HOW)
    if product.scale is not None:
        y *= ahead[2][None, :]
    NORM_FIRST: tl.constexpr = norm_comes_first(
        product.x.dtype.element_ty, product.w.dtype.element_ty, product.col_scale is not None, HOW
    )
    if HOW.NORM is not None and not NORM_FIRST:
        if HOW.NORM == "layer":
            y -= norm[1][:, None] * ahead[4][None, :]
        y *= norm[0][:, None]
    if product.bias is not None:
        y += ahead[3][None, :]
    return y


@triton.jit
def linear_ahead(product, tile, end, HOW: tl.constexpr, WHOLE: tl.constexpr, PREFETCH: tl.constexpr):
    """What a linear layer's tile loads before the wait: for linear_after. PREFETCH: not in the interpreter."""
    n = tl.minimum(tile.column_tile * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N), end.outputs - 1)
    return n, product_ahead(product, tile, n, HOW, WHOLE, PREFETCH), load_vectors(tile, end, HOW)


@triton.jit
def linear_after(
    ahead,
    product,
    tile,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    HOW: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The rest of a linear layer's tile, once its rows are there."""
    rows = rows_ahead(product, tile, HOW, WHOLE)
    base = load_base(tile, end, ahead[2], OUT_SLOTS, HOW)
    norm = 0.0, 0.0
    if HOW.NORM is not None:
        norm = norm_of(product, tile, HOW)
    y = multiply_whole(product, tile, ahead[0], ahead[1], rows, norm, HOW, WHOLE)
    if HOW.SPLIT_K == 1 or deposit(y, product, tile, HOW) == HOW.SPLIT_K - 1:
        y = finish_whole(y, product, tile, ahead[1], norm, HOW)
        write_linear(y, base, ahead[2], tile, end, CENTRED, ACTIVATION, OUT_SLOTS, HOW)


@triton.jit
def _whole_linear(
    program,
    product,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    HOW: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = take_tile(program, product, HOW)
    ahead = linear_ahead(product, tile, end, HOW, WHOLE, PDL)
    gdc_begin(PDL)
    linear_after(ahead, product, tile, end, CENTRED, ACTIVATION, OUT_SLOTS, HOW, WHOLE)


@triton.jit
def swiglu_ahead(product, tile, end, HOW: tl.constexpr, WHOLE: tl.constexpr, PREFETCH: tl.constexpr):
    """As linear_ahead, of a gated layer's tile, whose weight rows come in pairs of gate and up."""
    n = paired(tile.column_tile * (HOW.BLOCK_N // 2), end.outputs, HOW.BLOCK_N)
    n = tl.minimum(n, 2 * end.outputs - 1)
    return n, product_ahead(product, tile, n, HOW, WHOLE, PREFETCH)


@triton.jit
def swiglu_after(ahead, product, tile, end, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """As linear_after."""
    rows = rows_ahead(product, tile, HOW, WHOLE)
    norm = 0.0, 0.0
    if HOW.NORM is not None:
        norm = norm_of(product, tile, HOW)
    y = multiply_whole(product, tile, ahead[0], ahead[1], rows, norm, HOW, WHOLE)
    if HOW.SPLIT_K == 1 or deposit(y, product, tile, HOW) == HOW.SPLIT_K - 1:
        finish_swiglu(finish_whole(y, product, tile, ahead[1], norm, HOW), tile, end, HOW)


@triton.jit
def _whole_swiglu(program, product, end, HOW: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr):
    tile = take_tile(program, product, HOW)
    ahead = swiglu_ahead(product, tile, end, HOW, WHOLE, PDL)
    gdc_begin(PDL)
    swiglu_after(ahead, product, tile, end, HOW, WHOLE)


def whole_steps(x_bytes: int, weight_bytes: int, inputs: int, tile_weights: int, tactic: Tactic) -> Whole:
    """For so many inputs. x_bytes, weight_bytes: of a number. Raises ValueError for impossible tiles."""
    least = MIN_DOT * tactic.warps
    if tactic.block_k % least:
        raise ValueError(
            f"tactic.block_k: expected a multiple of {least} for {tactic.warps} warps, got {tactic.block_k}"
        )
    step = tactic.block_k * tactic.split_k
    if inputs % step:
        raise ValueError(f"tactic.block_k, split_k: expected a divisor of K = {inputs}, got {step} = block_k * split_k")
    steps = inputs // step

    def held(rows: int, size: int) -> int:
        registers = triton.cdiv(rows * tactic.block_k * size, 4 * 32 * tactic.warps)
        return min(steps, max(1, HELD_REGISTERS // registers))

    return Whole(tactic.warps, steps, held(tile_weights, weight_bytes), held(tactic.block_m, x_bytes))


def whole_tactic(kind: str, rows: int, n: int, k: int, arch: int) -> Tactic | None:
    """How a product of rows by a weight (n, k) runs on a chip for which nothing was measured; None: not by "whole".

    Every program has up to WHOLE_STEP columns of K, and its tile is the narrowest of which the chip runs all at once:
    all its weight is on its way before its rows are there. As default_tactic (linear.py), for up to WHOLE_ROWS rows.
    """
    split_k = triton.cdiv(k, WHOLE_STEP)
    block_m, block_k = max(MIN_DOT, triton.next_power_of_2(rows)), k // split_k
    if kind == "qkv" or rows > WHOLE_ROWS or k % split_k or block_k < MIN_DOT or block_k & (block_k - 1):
        return None
    fitting = [width for width in (16, 32) if triton.cdiv(n, width) * split_k <= PROCESSORS[arch]]
    if not fitting or block_m * fitting[0] > 2 * WHOLE_TILE:
        return None
    width, warps = fitting[0], min(WHOLE_WARPS, block_k // MIN_DOT)
    # Longer rows than a step are hidden ones, of 16 bits.
    if block_m * width > WHOLE_TILE and split_k == 1 and block_k == WHOLE_STEP:
        block_k = WHOLE_ROWS_STEP // block_m
    return Tactic(block_m, width // 2 if kind == "swiglu" else width, block_k, split_k, warps, 2, schedule="whole")


def launch_whole(call: ProductCall) -> None:
    """A product by this schedule, of linear layers or gated ones.

    tactic.block_k counts columns of 16-bit weights; of float32 ones a step has a quarter.

    Raises ValueError for tiles that cannot be, NotImplementedError for tiles that are heads.
    """
    kernel = {finish_linear: _whole_linear, finish_swiglu: _whole_swiglu}.get(call.finish_tile)
    if kernel is None:
        raise NotImplementedError("schedule 'whole': has no tiles of whole heads; 'tiled' has")
    sizes, inputs, tactic = (call.x.element_size(), call.weight.data.element_size()), call.x.shape[2], call.tactic
    whole = whole_steps(*sizes, inputs, call.tile_weights, tactic)
    if call.weight.data.element_size() == 4:
        # Twice as many bytes, and sums without tensor cores: what holds a step of 16 bits holds a quarter of one.
        tactic = replace(tactic, block_k=max(MIN_DOT * tactic.warps, tactic.block_k // 4))
        whole = whole_steps(*sizes, inputs, call.tile_weights, tactic)
    launch_tiles(kernel, replace(call, tactic=tactic), {"WHOLE": whole})
