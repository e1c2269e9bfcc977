"""Products by torch, for tactics that name the library; what surrounds them is a kernel of ours (product.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import InputNorm, Workspace
from xr0_engine.kernels.device import gdc_begin, rows_of
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.shapes import strided
from xr0_engine.kernels.statistics import row_norm

COPY_ROWS, COPY_COLUMNS = 8, 256


@triton.jit
def _copy(
    x,
    x_b,
    x_m,
    col_scale,
    sums,
    sums_s,
    sums_b,
    sums_m,
    eps,
    out,
    rows,
    batch_rows,
    inputs,
    slots,
    NORM: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    batch, row, inside = rows_of(tl.program_id(0), rows, batch_rows, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (k < inputs)[None, :]
    gdc_begin(PDL)
    value = tl.load(x + (batch * x_b + row * x_m)[:, None] + k[None, :], mask, 0.0).to(tl.float32)
    if NORM is not None:
        place = batch * sums_b + row * sums_m
        row_scale, mean = row_norm(sums, sums_s, place, slots, inputs, eps, NORM, SLOTS)
        value = (value - mean[:, None]) * row_scale[:, None]
    if col_scale is not None:
        value *= tl.load(col_scale + k, k < inputs, 0.0).to(tl.float32)[None, :]
    place = (batch * batch_rows + row)[:, None] * inputs + k[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask)


def library_product(
    x: Tensor, weight: Tensor, col_scale: Tensor | None, norm: InputNorm | None, workspace: Workspace
) -> tuple[Tensor, InputNorm | None]:
    """(norm(x) * col_scale) @ weight^T by torch, (B, M, N) in the weight's dtype, in the workspace.

    Also returns the norm, if it is still to be applied, to the product's rows. It is applied to x where the product may
    not be rounded without it: float16 need not hold it, and a layer norm's mean contributes more than all the rest.
    """
    left = None if norm is None or norm.kind == "layer" or weight.dtype == torch.float16 else norm
    norm = norm if left is None else None
    batch, batch_rows, inputs = x.shape
    rows, outputs, slots = batch * batch_rows, weight.shape[0], 1 if norm is None else norm.sums.shape[0]
    one_matrix = x.stride(1) >= inputs and (batch == 1 or x.stride(0) == batch_rows * x.stride(1))
    copied = norm is not None or col_scale is not None or x.dtype != weight.dtype or not one_matrix
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
                **strided("sums", None if norm is None else norm.sums, "sbm"),
                "eps": 0.0 if norm is None else norm.eps,
                "out": matrix,
                "rows": rows,
                "batch_rows": batch_rows,
                "inputs": inputs,
                "slots": slots,
                "NORM": None if norm is None else norm.kind,
                "SLOTS": triton.next_power_of_2(slots),
                "BLOCK_M": COPY_ROWS,
                "BLOCK_N": COPY_COLUMNS,
            },
        )
    else:
        matrix = x.as_strided((rows, inputs), (x.stride(1), 1))
    torch.mm(matrix, weight.t(), out=product)
    return product.view(batch, batch_rows, outputs), left
