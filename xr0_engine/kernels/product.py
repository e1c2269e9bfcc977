"""Products of rows with a weight: the part that linear, swiglu and qkv share. Each adds its own epilogue.

One program computes one tile, BLOCK_M of the rows of all batches by BLOCK_N rows of the weight, over one of SPLIT_K
parts of K. Programs of the same weight rows are neighbours, so these come from memory once. A tile's parts are left in
float32 in the workspace; the last program to arrive adds them up in the order of K, whoever it is, and goes on to the
epilogue: replays are bit-identical.

What does not depend on earlier kernels, the weight, is on its way to the L2 cache before a dependent launch waits.
8-bit weights are converted in registers; their scale, like the norm of the input's rows, is applied to the result.

Where a tactic names the library, torch computes the product, and the same kernel reads it and does the epilogue.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import STATS_COLUMNS, InputNorm, Tactic, Weight, Workspace
from xr0_engine.kernels.device import gdc_begin, prefetch_l2
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.shapes import expect, strided

PREFETCH_BLOCKS = tl.constexpr(8)
"""A program asks for at most so many blocks of its weight ahead of time; what follows streams behind them."""
CACHE_LINE_BYTES = tl.constexpr(128)
STREAM_ROW_TILES = 2
"""Up to so many row tiles, which run side by side, read a weight block: it need not stay in the cache."""
COPY_ROWS, COPY_COLUMNS = 8, 256
MIN_DOT = 16
"""Smallest side of a tile that tl.dot takes."""


@triton.constexpr_function
def compute_type(x, w):
    """What factors are rounded to: the weight's dtype, for 8-bit weights the input's, at most 16 bits."""
    if w.primitive_bitwidth > 8:
        return w
    return tl.bfloat16 if x == tl.float32 else x


@triton.jit
def tile_of(program, row_tiles, SPLIT_K: tl.constexpr):
    """(row tile, split, column tile) of a program."""
    rest = program // row_tiles
    return program % row_tiles, rest % SPLIT_K, rest // SPLIT_K


@triton.jit
def paired(first, distance, N: tl.constexpr):
    """N / 2 pairs (first + i, first + i + distance), flattened: tl.split then parts them within each thread."""
    column = tl.arange(0, N)
    return first + column // 2 + (column % 2) * distance


@triton.jit
def rows_of(row_tile, rows, batch_rows, BLOCK_M: tl.constexpr):
    """(batch, row, is it one) of a tile's rows; those behind the last are the last again."""
    index = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = index < rows
    index = tl.minimum(index, rows - 1)
    batch = index // batch_rows
    return batch.to(tl.int64), index - batch * batch_rows, inside


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
def multiply(
    x,
    x_offset,
    w,
    w_n,
    n,
    col_scale,
    split,
    inputs,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STREAM: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32: rows at x_offset times weight rows n, over one split's part of K."""
    compute: tl.constexpr = compute_type(x.dtype.element_ty, w.dtype.element_ty)
    policy: tl.constexpr = "evict_first" if STREAM else ""
    step = tl.arange(0, BLOCK_K)
    x_tile = x + x_offset[:, None] + step[None, :]
    w_tile = w + n[None, :].to(tl.int64) * w_n + step[:, None]
    part = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLIT_K) * BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * part, tl.minimum(split * part + part, inputs), BLOCK_K):
        if EVEN_K:
            a = tl.load(x_tile + start)
            b = tl.load(w_tile + start, eviction_policy=policy)
        else:
            inside = start + step < inputs
            a = tl.load(x_tile + start, inside[None, :], 0.0)
            b = tl.load(w_tile + start, inside[:, None], 0.0, eviction_policy=policy)
        if col_scale is not None:
            scale = tl.load(col_scale + start + step, start + step < inputs, 0.0)
            a = a.to(tl.float32) * scale.to(tl.float32)[None, :]
        total = tl.dot(a.to(compute), b.to(compute), total, input_precision="ieee")
    return total


@triton.jit
def deposit(
    total,
    partials,
    counters,
    tile,
    split,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Leave one split's part of a tile in memory. Returns how many of the tile's splits had done so before."""
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partials + (tile * SPLIT_K + split).to(tl.int64) * (BLOCK_M * BLOCK_N) + place, total)
    # The counter is touched by one thread: every thread's part must be there before.
    tl.debug_barrier()
    return tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")


@triton.jit
def collect(
    partials,
    counters,
    tile,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile's parts, added up in the order of K. Puts the counter back."""
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    part = partials + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N) + place
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(SPLIT_K):
        total += tl.load(part, cache_modifier=".cg")
        part += BLOCK_M * BLOCK_N
    tl.store(counters + tile, 0)
    return total


@triton.jit
def add_slots(sums, slots_stride, place, slots, SLOTS: tl.constexpr):
    """Partial sums of some rows, added up: (rows,) float32."""
    slot = tl.arange(0, SLOTS)
    return tl.sum(tl.load(sums + slot[:, None] * slots_stride + place[None, :], (slot < slots)[:, None], 0.0), 0)


@triton.jit
def finish(
    total,
    n,
    scale,
    bias,
    sums,
    sums_s,
    place,
    column_sums,
    eps,
    slots,
    inputs,
    NORM: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """What follows every product: the weight's scale, the norm of the input's rows (sums at place), the bias."""
    if scale is not None:
        total *= tl.load(scale + n)[None, :]
    if NORM is not None:
        inverse = 1.0 / inputs
        first = add_slots(sums, sums_s, place, slots, SLOTS) * inverse
        if NORM == "rms":
            row_scale = tl.rsqrt(first + eps)
        else:
            second = add_slots(sums + 1, sums_s, place, slots, SLOTS) * inverse
            if NORM == "layer":
                total -= second[:, None] * tl.load(column_sums + n)[None, :]
                row_scale = tl.rsqrt(first - second * second + eps)
            else:
                row_scale = tl.rsqrt(first + eps)
                row_scale *= tl.rsqrt(row_scale * row_scale * second + eps)
        total *= row_scale[:, None]
    if bias is not None:
        total += tl.load(bias + n).to(tl.float32)[None, :]
    return total


@triton.jit
def _copy(
    x,
    x_b,
    x_m,
    col_scale,
    out,
    rows,
    batch_rows,
    inputs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    batch, row, inside = rows_of(tl.program_id(0), rows, batch_rows, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (k < inputs)[None, :]
    gdc_begin(PDL)
    value = tl.load(x + (batch * x_b + row * x_m)[:, None] + k[None, :], mask, 0.0).to(tl.float32)
    if col_scale is not None:
        value *= tl.load(col_scale + k, k < inputs, 0.0).to(tl.float32)[None, :]
    place = (batch * batch_rows + row)[:, None] * inputs + k[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask)


def check_product(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    col_scale: Tensor | None,
    norm: InputNorm | None,
    tactic: Tactic,
) -> None:
    """Raises ValueError for shapes that do not belong together and for tiles that cannot be."""
    batch, rows, inputs = x.shape
    outputs = weight.data.shape[0]
    expect("x", x, (batch, rows, inputs))
    expect("weight.data", weight.data, (outputs, inputs))
    for name, tensor, size in (
        ("weight.scale", weight.scale, outputs),
        ("bias", bias, outputs),
        ("col_scale", col_scale, inputs),
        ("norm.column_sums", None if norm is None else norm.column_sums, outputs),
    ):
        if tensor is not None:
            expect(name, tensor, (size,))
    if norm is not None:
        expect("norm.sums", norm.sums, (triton.cdiv(inputs, STATS_COLUMNS), batch, rows, 2))
        if (norm.kind == "layer") != (norm.column_sums is not None):
            raise ValueError(f"norm.column_sums: expected for kind 'layer' alone, got kind {norm.kind!r}")
    if weight.data.element_size() == 1 and weight.scale is None:
        raise ValueError(f"weight.scale: expected for {weight.data.dtype}, got None")
    for name in ("block_m", "block_n", "block_k"):
        size = getattr(tactic, name)
        if size < MIN_DOT or size & (size - 1):
            raise ValueError(f"tactic.{name}: expected a power of two of at least {MIN_DOT}, got {size}")
    if tactic.split_k < 1:
        raise ValueError(f"tactic.split_k: expected at least 1, got {tactic.split_k}")
    if tactic.library and weight.data.element_size() == 1:
        raise NotImplementedError(f"library: {weight.data.dtype} weights; a tactic without library takes them")


def launch_product(
    kernel: Any,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    col_scale: Tensor | None,
    norm: InputNorm | None,
    column_tiles: int,
    tile_weights: int,
    tactic: Tactic,
    workspace: Workspace,
    epilogue: dict[str, Any],
) -> None:
    """Launch a kernel of column_tiles tiles of tile_weights weight rows; epilogue: its further arguments."""
    batch, batch_rows, inputs = x.shape
    rows = batch * batch_rows
    row_tiles = triton.cdiv(rows, tactic.block_m)
    tiles, split_k = row_tiles * column_tiles, 1 if tactic.library else tactic.split_k
    if tactic.library:
        x, col_scale = _library_product(x, weight.data, col_scale, workspace), None
    split = split_k > 1
    launch(
        kernel,
        (tiles * split_k,),
        {
            "program": None,
            **strided("x", x, "bm"),
            **strided("w", weight.data, "n"),
            "scale": weight.scale,
            "bias": bias,
            "col_scale": col_scale,
            **strided("sums", None if norm is None else norm.sums, "sbm"),
            "column_sums": None if norm is None else norm.column_sums,
            "norm_eps": 0.0 if norm is None else norm.eps,
            "partials": workspace.partials(tiles * split_k * tactic.block_m * tile_weights) if split else None,
            "counters": workspace.counters(tiles) if split else None,
            "rows": rows,
            "batch_rows": batch_rows,
            "inputs": inputs,
            "slots": triton.cdiv(inputs, STATS_COLUMNS),
            "row_tiles": row_tiles,
            **epilogue,
            "NORM": None if norm is None else norm.kind,
            "SLOTS": triton.next_power_of_2(triton.cdiv(inputs, STATS_COLUMNS)),
            "LIBRARY": tactic.library,
            "SPLIT_K": split_k,
            "BLOCK_M": tactic.block_m,
            "BLOCK_N": tile_weights,
            "BLOCK_K": tactic.block_k,
            "EVEN_K": inputs % tactic.block_k == 0,
            "STREAM": row_tiles <= STREAM_ROW_TILES,
        },
        tactic.warps,
        tactic.stages,
    )


def _library_product(x: Tensor, weight: Tensor, col_scale: Tensor | None, workspace: Workspace) -> Tensor:
    """(x * col_scale) @ weight^T by torch, (B, M, N) in the weight's dtype, in the workspace."""
    batch, batch_rows, inputs = x.shape
    rows, outputs = batch * batch_rows, weight.shape[0]
    one_matrix = x.stride(1) >= inputs and (batch == 1 or x.stride(0) == batch_rows * x.stride(1))
    copied = col_scale is not None or x.dtype != weight.dtype or not one_matrix
    # Whole rows of 16 bytes keep the second part aligned.
    elements = -(-rows * outputs // 8) * 8
    scratch = workspace.partials(
        triton.cdiv((elements + copied * rows * inputs) * weight.element_size(), torch.float32.itemsize)
    ).view(weight.dtype)
    product = scratch[: rows * outputs].view(rows, outputs)
    if copied:
        matrix = scratch[elements : elements + rows * inputs].view(rows, inputs)
        launch(
            _copy,
            (triton.cdiv(rows, COPY_ROWS), triton.cdiv(inputs, COPY_COLUMNS)),
            {
                **strided("x", x, "bm"),
                "col_scale": col_scale,
                "out": matrix,
                "rows": rows,
                "batch_rows": batch_rows,
                "inputs": inputs,
                "BLOCK_M": COPY_ROWS,
                "BLOCK_N": COPY_COLUMNS,
            },
        )
    else:
        matrix = x.as_strided((rows, inputs), (x.stride(1), 1))
    torch.mm(matrix, weight.t(), out=product)
    return product.view(batch, batch_rows, outputs)
