"""A linear layer and a gated one, each with all that surrounds it, as one kernel. product.py has the algorithm.

Shape legend: B batch, M rows of each, K columns in, N or F columns out.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import (
    SHARED_LIMIT,
    STATS_COLUMNS,
    InputNorm,
    Residual,
    StatsOut,
    Tactic,
    Weight,
    Workspace,
)
from xr0_engine.kernels.device import gelu_tanh, paired
from xr0_engine.kernels.launch import PROCESSORS
from xr0_engine.kernels.product import MIN_DOT, check_product, finish, launch_product, multiply, take_tile
from xr0_engine.kernels.shapes import expect, strided
from xr0_engine.kernels.statistics import SLOT, add_slots, store_stats

SKINNY_ROWS = 64
"""Up to so many rows a product is bound by reading its weight."""
HEAD_COLUMNS = 128
READ_COST = 64
"""Reading one factor from the L2 cache takes as long as so many products: about 30 on an RTX 4090, 150 on an H200."""
MAX_SPLIT = 8


def default_tactic(kind: str, rows: int, n: int, k: int, arch: int) -> Tactic:
    """How a product of rows (of all batches) by a weight (n, k) runs on a chip for which nothing was measured.

    Up to SKINNY_ROWS rows the weight decides: one row tile, narrow column tiles, K split as long as there is a
    processor for every program, since two rounds of half the length win nothing and leave twice as much to add up.
    Beyond, the tile whose waves over the chip take the least time, padding included; K is split where tiles alone
    leave processors idle.
    n counts weight rows; a head is taken to have HEAD_COLUMNS. For 16-bit factors. Raises ValueError for a chip that
    is not known.
    """
    if arch not in PROCESSORS:
        raise ValueError(f"arch: expected one of {', '.join(map(str, PROCESSORS))}; got {arch}")
    processors = PROCESSORS[arch]
    stages = 4 if SHARED_LIMIT[arch] >= 160 * 1024 else 3
    if rows <= SKINNY_ROWS:
        block_m = max(MIN_DOT, triton.next_power_of_2(rows))
        width, block_k = (HEAD_COLUMNS, 64) if kind == "qkv" else (64, 128 if k % 128 == 0 else 64)
        tiles, blocks = triton.cdiv(n, width), triton.cdiv(k, block_k)
        split_k = max((split for split in _divisors(blocks) if tiles * split <= processors), default=1)
        return Tactic(block_m, width // 2 if kind == "swiglu" else width, block_k, split_k, warps=4, stages=stages)

    def time(tile: tuple[int, int, int]) -> float:
        block_m, width, split = tile
        tiles = triton.cdiv(rows, block_m) * triton.cdiv(n, width)
        if split > 1 and tiles >= processors:
            return float("inf")
        product = k / split * (block_m * width + READ_COST * (block_m + width))
        # Every program writes a float32 tile, the last of a tile reads all of them: a float32 is two factors.
        summing = 0 if split == 1 else (1 + split) * 2 * READ_COST * block_m * width
        return triton.cdiv(tiles * split, processors) * (product + summing)

    widths = (HEAD_COLUMNS,) if kind == "qkv" else (128, 64)
    splits = [split for split in _divisors(triton.cdiv(k, 64)) if split <= MAX_SPLIT]
    block_m, width, split_k = min(itertools.product((128, 64), widths, splits), key=time)
    warps = 8 if block_m == 128 else 4
    return Tactic(block_m, width // 2 if kind == "swiglu" else width, 64, split_k, warps, stages)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


class LinearEnd(NamedTuple):
    """What a linear layer's epilogue reads and writes, as one argument: as linear, Residual and StatsOut have it."""

    outputs: int
    out: Tensor
    out_b: int
    out_m: int
    residual: Tensor | None
    residual_b: int
    residual_m: int
    gate: Tensor | None
    base_sums: Tensor | None
    base_sums_s: int
    base_sums_b: int
    base_sums_m: int
    base_weight: Tensor | None
    base_eps: float
    extra: Tensor | None
    extra_r: int
    extra_index: Tensor | None
    extra_index_b: int
    stats: Tensor | None
    stats_s: int
    stats_b: int
    stats_m: int
    stats_weight: Tensor | None


@triton.jit
def finish_linear(
    y, tile, end, CENTRED: tl.constexpr, ACTIVATION: tl.constexpr, OUT_SLOTS: tl.constexpr, HOW: tl.constexpr
):
    """Activation, residual, output and its statistics of a tile's y, (BLOCK_M, BLOCK_N) float32."""
    batch, row, outputs = tile.batch, tile.row, end.outputs
    column = tile.column_tile * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N)
    column_inside = column < outputs
    mask = tile.inside[:, None] & column_inside[None, :]
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    if end.residual is not None:
        base_place = end.residual + (batch * end.residual_b + row * end.residual_m)[:, None] + column[None, :]
        base = tl.load(base_place, mask, 0.0).to(tl.float32)
        if end.base_sums is not None:
            sums_place = batch * end.base_sums_b + row * end.base_sums_m
            squares = add_slots(end.base_sums, end.base_sums_s, sums_place, tl.cdiv(outputs, SLOT), OUT_SLOTS)
            base *= tl.rsqrt(squares / outputs + end.base_eps)[:, None]
            base *= tl.load(end.base_weight + column, column_inside, 0.0)[None, :]
        if end.gate is not None:
            y *= tl.load(end.gate + column, column_inside, 0.0)[None, :]
        y += base
        if end.extra is not None:
            index = tl.load(end.extra_index + batch * end.extra_index_b + row)
            extra_mask = mask & (index >= 0)[:, None]
            extra_place = (index.to(tl.int64) * end.extra_r)[:, None] + column[None, :]
            y += tl.load(end.extra + extra_place, extra_mask, 0.0).to(tl.float32)
    written = y.to(end.out.dtype.element_ty)
    tl.store(end.out + (batch * end.out_b + row * end.out_m)[:, None] + column[None, :], written, mask)
    if end.stats is not None:
        place = end.stats + batch * end.stats_b + row * end.stats_m
        store_stats(
            written, outputs, tile.column_tile, column, place, end.stats_s, tile.inside, end.stats_weight, CENTRED, HOW
        )


@triton.jit
def _linear(
    program,
    product,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    HOW: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = take_tile(program, product, HOW)
    n = tl.minimum(tile.column_tile * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N), end.outputs - 1)
    y, complete = multiply(product, tile, n, HOW, PDL)
    if complete:
        finish_linear(finish(y, product, tile, n, HOW), tile, end, CENTRED, ACTIVATION, OUT_SLOTS, HOW)


def linear(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    col_scale: Tensor | None = None,
    norm: InputNorm | None = None,
    activation: Literal["gelu", "gelu_tanh"] | None = None,
    residual: Residual | None = None,
    stats: StatsOut | None = None,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """out = residual(activation(norm(x * col_scale) @ weight^T + bias)), and the statistics of its rows.

    x: (B, M, K) floating point; out: (B, M, N), may be residual.x; bias: (N,), col_scale: (K,), float32 or the
    weight's dtype. The factors of the product are rounded to the weight's dtype (8-bit weights: to x's, bfloat16 if
    that is float32), everything else is float32. "gelu" is the exact one. stats.sums must not be sums that are read.
    With a library tactic the product is rounded too, and block_m, block_n are the tile of what follows it. No float16
    is infinite that is not in PyTorch's order of norm, product, activation and sum.

    Raises ValueError for shapes that do not belong together and for impossible tiles, NotImplementedError for 8-bit
    weights with a library tactic.
    """
    check_product(x, weight, bias, col_scale, norm, tactic)
    batch, rows = x.shape[:2]
    outputs = weight.data.shape[0]
    expect("out", out, (batch, rows, outputs))
    _check_residual(residual, batch, rows, outputs)
    _check_stats(stats, batch, rows, outputs, tactic)
    base = residual or Residual(out)
    launch_product(
        _linear,
        x,
        weight,
        bias,
        col_scale,
        norm,
        triton.cdiv(outputs, tactic.block_n),
        tactic.block_n,
        tactic,
        workspace,
        {
            "end": LinearEnd(
                outputs=outputs,
                **strided("out", out, "bm"),
                **strided("residual", None if residual is None else residual.x, "bm"),
                gate=base.gate,
                **strided("base_sums", base.sums, "sbm"),
                base_weight=base.weight,
                base_eps=base.eps,
                **strided("extra", base.extra, "r"),
                **strided("extra_index", base.extra_index, "b"),
                **strided("stats", None if stats is None else stats.sums, "sbm"),
                stats_weight=None if stats is None else stats.weight,
            ),
            "CENTRED": stats is not None and stats.centred,
            "ACTIVATION": activation,
            "OUT_SLOTS": triton.next_power_of_2(triton.cdiv(outputs, STATS_COLUMNS)),
        },
    )


def _check_residual(residual: Residual | None, batch: int, rows: int, outputs: int) -> None:
    if residual is None:
        return
    expect("residual.x", residual.x, (batch, rows, outputs))
    for name, vector in (("residual.gate", residual.gate), ("residual.weight", residual.weight)):
        if vector is not None:
            expect(name, vector, (outputs,))
    if (residual.sums is None) != (residual.weight is None):
        raise ValueError("residual.sums, residual.weight: expected both or none, got one")
    if residual.sums is not None:
        expect("residual.sums", residual.sums, (triton.cdiv(outputs, STATS_COLUMNS), batch, rows, 2))
    if (residual.extra is None) != (residual.extra_index is None):
        raise ValueError("residual.extra, residual.extra_index: expected both or none, got one")
    if residual.extra is not None and residual.extra_index is not None:
        expect("residual.extra", residual.extra, (residual.extra.shape[0], outputs))
        expect("residual.extra_index", residual.extra_index, (batch, rows))


def _check_stats(stats: StatsOut | None, batch: int, rows: int, outputs: int, tactic: Tactic) -> None:
    if stats is None:
        return
    expect("stats.sums", stats.sums, (triton.cdiv(outputs, STATS_COLUMNS), batch, rows, 2))
    if stats.weight is not None:
        expect("stats.weight", stats.weight, (outputs,))
        if stats.centred:
            raise ValueError("stats.weight: expected None for centred sums, got a weight")
    if tactic.block_n % STATS_COLUMNS:
        raise ValueError(f"tactic.block_n: expected a multiple of {STATS_COLUMNS} with stats, got {tactic.block_n}")


class SwigluEnd(NamedTuple):
    """Where a gated layer's epilogue writes, as one argument. outputs: columns of out."""

    outputs: int
    out: Tensor
    out_b: int
    out_m: int


@triton.jit
def finish_swiglu(y, tile, end, HOW: tl.constexpr):
    """Gate and output of a tile's y, (BLOCK_M, BLOCK_N) float32, whose columns are pairs of gate and up."""
    gate, up = tl.split(tl.reshape(y, (HOW.BLOCK_M, HOW.BLOCK_N // 2, 2)))
    column = tile.column_tile * (HOW.BLOCK_N // 2) + tl.arange(0, HOW.BLOCK_N // 2)
    target = end.out + (tile.batch * end.out_b + tile.row * end.out_m)[:, None] + column[None, :]
    value = gate * tl.sigmoid(gate) * up
    tl.store(target, value.to(end.out.dtype.element_ty), tile.inside[:, None] & (column < end.outputs)[None, :])


@triton.jit
def _swiglu(program, product, end, HOW: tl.constexpr, PDL: tl.constexpr):
    tile = take_tile(program, product, HOW)
    # Behind the last column the pairs run on, within the weight but for the last rows.
    n = paired(tile.column_tile * (HOW.BLOCK_N // 2), end.outputs, HOW.BLOCK_N)
    n = tl.minimum(n, 2 * end.outputs - 1)
    y, complete = multiply(product, tile, n, HOW, PDL)
    if complete:
        finish_swiglu(finish(y, product, tile, n, HOW), tile, end, HOW)


def swiglu(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    col_scale: Tensor | None = None,
    norm: InputNorm | None = None,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """out = silu(gate) * up, with [gate, up] = norm(x * col_scale) @ weight^T + bias.

    x: (B, M, K); weight: (2 F, K), the gate's rows, then up's; out: (B, M, F); bias: (2 F,). tactic.block_n counts
    columns of out: a tile holds that many of gate and of up. Otherwise as linear.
    """
    check_product(x, weight, bias, col_scale, norm, tactic)
    batch, rows = x.shape[:2]
    columns = out.shape[-1]
    expect("out", out, (batch, rows, columns))
    if weight.data.shape[0] != 2 * columns:
        raise ValueError(f"weight.data: expected {2 * columns} rows for out's {columns}, got {weight.data.shape[0]}")
    launch_product(
        _swiglu,
        x,
        weight,
        bias,
        col_scale,
        norm,
        triton.cdiv(columns, tactic.block_n),
        2 * tactic.block_n,
        tactic,
        workspace,
        {"end": SwigluEnd(outputs=columns, **strided("out", out, "bm"))},
    )
