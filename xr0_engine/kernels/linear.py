"""A linear layer and a gated one, each with all that surrounds it, as one kernel. product.py has the algorithm.

Shape legend: B batch, M rows of each, K columns in, N or F columns out.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

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
    slot_columns,
)
from xr0_engine.kernels.calls import ProductCall, check_product
from xr0_engine.kernels.device import paired
from xr0_engine.kernels.ends import LinearEnd, SwigluEnd, finish_linear, finish_swiglu
from xr0_engine.kernels.launch import PROCESSORS
from xr0_engine.kernels.product import MIN_DOT, MOST_FLOAT8, WARPGROUP_ROWS, finish, multiply, row_pieces, take_tile
from xr0_engine.kernels.schedules import launch_scheduled
from xr0_engine.kernels.shapes import expect, strided

SKINNY_ROWS = 64
"""Up to so many rows a product is bound by reading its weight."""
HEAD_COLUMNS = 128
READ_COST = {80: 45, 86: 20, 89: 30, 90: 150, 100: 200, 120: 30}
"""Compute capability -> reading a factor from the L2 cache takes a processor as long as so many products in bfloat16.
Estimates: peak rate of products over that of reads, neither measured here."""
MAX_SPLIT = 8
WARPGROUPS = (90, 100)
"""Compute capabilities of chips whose warps multiply in groups."""
MOST_SUMS, MOST_SUMS_OF_WARPS = 208 * 128, 160 * 128
"""Of a program of 8 warps: more leave its epilogue too few registers, or the factors of products of warps."""


def default_tactic(kind: str, rows: int, n: int, k: int, arch: int, factor_bytes: int = 2) -> Tactic:
    """How a product of rows (of all batches) by a weight (n, k) runs on a chip for which nothing was measured.

    Up to SKINNY_ROWS rows the weight decides: one row tile, narrow column tiles, K split as long as there is a
    processor for every program, since two rounds of half the length win nothing and leave twice as much to add up.
    Beyond, pieces of mixed heights (schedule "stream"): those rows of a program, columns, and programs for which the
    longest takes the least time, padding included: its products, its reads, and the sums of parts. As many programs as
    tiles, a multiple that leaves no processor two, or one for each processor.
    n counts weight rows; a head is taken to have HEAD_COLUMNS. factor_bytes: 2, or 1 where both factors have 8 bits,
    of which a block of K has twice as many and products and reads take half as long. Raises ValueError for a chip that
    is not known.
    """
    if arch not in PROCESSORS:
        raise ValueError(f"arch: expected one of {', '.join(map(str, PROCESSORS))}; got {arch}")
    processors, roomy = PROCESSORS[arch], SHARED_LIMIT[arch] >= 160 * 1024
    if rows <= SKINNY_ROWS:
        block_m = max(MIN_DOT, triton.next_power_of_2(rows))
        width = HEAD_COLUMNS if kind == "qkv" else 64
        most = (64 if kind == "qkv" else 128) * 2 // factor_bytes
        if factor_bytes == 1 and block_m >= WARPGROUP_ROWS:
            most = min(most, MOST_FLOAT8)
        block_k = most if k % most == 0 else 64
        tiles, blocks = triton.cdiv(n, width), triton.cdiv(k, block_k)
        split_k = max((split for split in _divisors(blocks) if tiles * split <= processors), default=1)
        return Tactic(
            block_m, width // 2 if kind == "swiglu" else width, block_k, split_k, warps=4, stages=4 if roomy else 3
        )

    # Of stages, products of warps hold one less in shared memory.
    block_k, stages = (128 // factor_bytes, 4) if roomy else (64 // factor_bytes, 5)
    blocks, warpgroups = triton.cdiv(k, block_k), arch in WARPGROUPS

    def time(tile: tuple[int, int, int]) -> float:
        block_m, width, programs = tile
        pieces, tiles = row_pieces(rows, block_m), tiles_of(block_m, width)
        height = sum(pieces)
        if height * width > (MOST_SUMS if warpgroups else MOST_SUMS_OF_WARPS):
            return float("inf")
        # What has fewer rows than a warpgroup multiplies takes it as long as twice as many: an estimate.
        slow = sum(piece for piece in pieces if piece < WARPGROUP_ROWS) if warpgroups else 0
        step = block_k * ((height + slow) * width + READ_COST[arch] * (height + width))
        if programs == 1:
            return triton.cdiv(tiles, processors) * blocks * step
        # Every program writes what it began or ended of tiles, the last of a tile reads all of it: float32 is two
        # factors of 16 bits.
        parts = 1 + programs // tiles if programs % tiles == 0 else 2 + 1 + triton.cdiv(programs, tiles)
        part = 4 // factor_bytes * READ_COST[arch] * height * width
        return triton.cdiv(tiles * blocks, programs) * step + parts * part

    def tiles_of(block_m: int, width: int) -> int:
        return triton.cdiv(rows, sum(row_pieces(rows, block_m))) * triton.cdiv(n, width)

    found = []
    for block_m, width in itertools.product((128, 256, 512), (HEAD_COLUMNS,) if kind == "qkv" else (128, 64)):
        tiles = tiles_of(block_m, width)
        splits = [
            tiles * split for split in range(2, MAX_SPLIT + 1) if tiles * split <= min(processors, tiles * blocks)
        ]
        found += [(block_m, width, programs) for programs in (1, *splits, min(processors, tiles * blocks))]
    block_m, width, programs = min(found, key=time)
    return Tactic(
        block_m, width // 2 if kind == "swiglu" else width, block_k, programs, warps=8, stages=stages, schedule="stream"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


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
    x_scale: Tensor | None = None,
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
    weight's dtype. The factors of the product are rounded to the weight's dtype (8-bit weights: to x's, weight.factor
    if that is float32), everything else is float32. "gelu" is the exact one. stats.sums must not be sums that are read.
    With a library tactic the product is rounded too, and block_m, block_n are the tile of what follows it. No float16
    is infinite that is not in PyTorch's order of norm, product, activation and sum.
    x_scale: (B, M) float32, of x and a weight both in int8 or both in float8_e4m3fn, as quantize leaves x; it has
    applied norm and col_scale, which are None then. Sums of int8 are exact.

    Raises ValueError for shapes that do not belong together and for impossible tiles, NotImplementedError for 8-bit
    weights with a library tactic, and for 8-bit x with other schedules than "tiled" and "stream".
    """
    check_product(x, weight, x_scale, bias, col_scale, norm, tactic)
    batch, rows = x.shape[:2]
    outputs = weight.data.shape[0]
    expect("out", out, (batch, rows, outputs))
    _check_residual(residual, batch, rows, outputs)
    if stats is not None and tactic.schedule == "whole":
        # Its narrow tiles are made for narrow slots; where slots are wider, so is a tile.
        width = slot_columns("stats.sums", stats.sums, outputs)
        tactic = replace(tactic, block_n=max(tactic.block_n, width))
    _check_stats(stats, batch, rows, outputs, tactic)
    base = residual or Residual(out)
    launch_scheduled(
        _linear,
        ProductCall(
            x=x,
            weight=weight,
            x_scale=x_scale,
            bias=bias,
            col_scale=col_scale,
            norm=norm,
            column_tiles=triton.cdiv(outputs, tactic.block_n),
            tile_weights=tactic.block_n,
            distance=None,
            finish_tile=finish_linear,
            tactic=tactic,
            workspace=workspace,
            epilogue={
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
                "OUT_SLOTS": _out_slots(base, stats, outputs),
            },
        ),
    )


def _out_slots(residual: Residual, stats: StatsOut | None, outputs: int) -> tuple[int, int]:
    """As finish_linear has it."""
    width = STATS_COLUMNS if stats is None else slot_columns("stats.sums", stats.sums, outputs)
    return 1 if residual.sums is None else residual.sums.shape[0], width


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
        expect("residual.sums", residual.sums, (residual.sums.shape[0], batch, rows, 2))
        slot_columns("residual.sums", residual.sums, outputs)
    if (residual.extra is None) != (residual.extra_index is None):
        raise ValueError("residual.extra, residual.extra_index: expected both or none, got one")
    if residual.extra is not None and residual.extra_index is not None:
        expect("residual.extra", residual.extra, (residual.extra.shape[0], outputs))
        expect("residual.extra_index", residual.extra_index, (batch, rows))


def _check_stats(stats: StatsOut | None, batch: int, rows: int, outputs: int, tactic: Tactic) -> None:
    if stats is None:
        return
    expect("stats.sums", stats.sums, (stats.sums.shape[0], batch, rows, 2))
    width = slot_columns("stats.sums", stats.sums, outputs)
    if stats.weight is not None:
        expect("stats.weight", stats.weight, (outputs,))
        if stats.centred:
            raise ValueError("stats.weight: expected None for centred sums, got a weight")
    if stats.centred and width != STATS_COLUMNS:
        raise ValueError(f"stats.sums: expected slots of {STATS_COLUMNS} columns for centred sums, got {width}")
    if tactic.block_n % width:
        raise ValueError(f"tactic.block_n: expected a multiple of {width} with stats, got {tactic.block_n}")


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
    x_scale: Tensor | None = None,
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
    check_product(x, weight, x_scale, bias, col_scale, norm, tactic)
    batch, rows = x.shape[:2]
    columns = out.shape[-1]
    expect("out", out, (batch, rows, columns))
    if weight.data.shape[0] != 2 * columns:
        raise ValueError(f"weight.data: expected {2 * columns} rows for out's {columns}, got {weight.data.shape[0]}")
    launch_scheduled(
        _swiglu,
        ProductCall(
            x=x,
            weight=weight,
            x_scale=x_scale,
            bias=bias,
            col_scale=col_scale,
            norm=norm,
            column_tiles=triton.cdiv(columns, tactic.block_n),
            tile_weights=2 * tactic.block_n,
            distance=columns,
            finish_tile=finish_swiglu,
            tactic=tactic,
            workspace=workspace,
            epilogue={"end": SwigluEnd(outputs=columns, **strided("out", out, "bm"))},
        ),
    )
