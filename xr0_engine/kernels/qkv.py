"""Queries, keys and values of an attention, ready to use, as one kernel: product, head norms, rotary embedding.

A tile is one head. Its weight rows come in pairs (d, d + D / 2), so that the two numbers that are rotated together lie
in one thread. product.py has the rest of the algorithm.

Shape legend: B batch, M rows of each, K columns in, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import InputNorm, Tactic, Weight, Workspace
from xr0_engine.kernels.calls import ProductCall, check_product
from xr0_engine.kernels.device import paired
from xr0_engine.kernels.ends import HeadsEnd, finish_qkv
from xr0_engine.kernels.product import finish, multiply, take_tile
from xr0_engine.kernels.schedules import launch_scheduled
from xr0_engine.kernels.shapes import expect, expect_head_dim, strided


@triton.jit
def _qkv(program, product, end, HOW: tl.constexpr, PDL: tl.constexpr):
    tile = take_tile(program, product, HOW)
    n = paired(tile.column_tile * HOW.BLOCK_N, HOW.BLOCK_N // 2, HOW.BLOCK_N)
    y, complete = multiply(product, tile, n, HOW, PDL)
    if complete:
        finish_qkv(finish(y, product, tile, n, HOW), tile, end, HOW)


def qkv(
    x: Tensor,
    weight: Weight,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    col_scale: Tensor | None = None,
    norm: InputNorm | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor,
    sin: Tensor,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """q, k, v = heads of norm(x * col_scale) @ weight^T + bias; q and k after the head norm and the rotation.

    x: (B, M, K); weight: ((H + 2 G) D, K), the rows of all q heads, then of k's, then of v's; q: (B, H, M, D), or
    None for a weight of keys and values alone; k, v: (B, G, M, D); q_weight, k_weight: (D,) of a head's RMSNorm with
    eps, or None for none; cos, sin: (B, M, D / 2) float32, halves convention. tactic.block_n is not read: a tile is
    one head. Otherwise as linear.
    """
    check_product(x, weight, x_scale, bias, col_scale, norm, tactic)
    batch, rows = x.shape[:2]
    groups, dim = k.shape[1], k.shape[-1]
    heads = 0 if q is None else q.shape[1]
    expect_head_dim(dim)
    for name, tensor, count in (("q", q, heads), ("k", k, groups), ("v", v, groups)):
        if tensor is not None:
            expect(name, tensor, (batch, count, rows, dim))
    for name, vector in (("q_weight", q_weight), ("k_weight", k_weight)):
        if vector is not None:
            expect(name, vector, (dim,))
    expect("cos", cos, (batch, rows, dim // 2))
    expect("sin", sin, (batch, rows, dim // 2))
    tiles = heads + 2 * groups
    if weight.data.shape[0] != tiles * dim:
        raise ValueError(f"weight.data: expected {tiles} heads of {dim} rows, got {weight.data.shape[0]} rows")
    launch_scheduled(
        _qkv,
        ProductCall(
            x=x,
            weight=weight,
            x_scale=x_scale,
            bias=bias,
            col_scale=col_scale,
            norm=norm,
            column_tiles=tiles,
            tile_weights=dim,
            distance=dim // 2,
            finish_tile=finish_qkv,
            tactic=tactic,
            workspace=workspace,
            epilogue={
                "end": HeadsEnd(
                    query_heads=heads,
                    kv_heads=groups,
                    **strided("q", q, "bhm"),
                    **strided("k", k, "bhm"),
                    **strided("v", v, "bhm"),
                    q_weight=q_weight,
                    k_weight=k_weight,
                    eps=eps,
                    **strided("cos", cos, "bm"),
                    **strided("sin", sin, "bm"),
                )
            },
        ),
    )
