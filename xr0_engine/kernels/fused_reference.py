"""The PyTorch oracle of the fused ops: same signatures as the kernels', float32 inside, results rounded once.

Tactics and workspaces say how a kernel runs, never what it computes: the oracles take and ignore them.
Shape legend: B batch, M rows, Q queries, N keys, H query heads, G KV heads, D head_dim, C columns, T actions, A action
columns.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xr0_engine.kernels import reference
from xr0_engine.kernels.arguments import (
    STATS_COLUMNS,
    Heads,
    InputNorm,
    Residual,
    Segments,
    StatsOut,
    Tactic,
    Weight,
    Workspace,
    slot_columns,
)


def write_stats(x: Tensor, stats: StatsOut) -> None:
    """Fill stats from the rows x, (B, M, N) float32, as StatsOut describes."""
    width = slot_columns("stats.sums", stats.sums, x.shape[-1])
    for slot, part in zip(stats.sums, x.split(width, dim=-1), strict=True):
        centre = part.mean(-1, keepdim=True) if stats.centred else 0.0
        slot[..., 0] = (part - centre).square().sum(-1)
        if stats.centred:
            slot[..., 1] = part.sum(-1)
    if stats.weight is not None:
        for slot, part in zip(stats.sums, (stats.weight * x).split(width, dim=-1), strict=True):
            slot[..., 1] = part.square().sum(-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    causal: bool,
    segments: Segments | None = None,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """As kernels/attention.py: attention."""
    if segments is not None:
        for first, end in segments.spans:
            part = (slice(None), slice(None), slice(first, end))
            attention(q[part], k[part], v[part], out[:, first:end], causal=causal, tactic=tactic, workspace=workspace)
        return
    rows, keys = q.shape[2], k.shape[2]
    mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows) if causal else None
    mixed = reference.attention(q.float(), k.float(), v.float(), mask)
    out.copy_(mixed.transpose(1, 2).flatten(2))


def lambda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_keys: Tensor,
    kv_values: Tensor,
    begin: Tensor,
    end: Tensor,
    out: Tensor,
    *,
    window: int | None,
    context: int,
    heads: Heads | None = None,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """As kernels/lambda_attention.py: lambda_attention."""
    if heads is not None:
        cos, sin = (table.repeat(1, 1, 2)[:, None] for table in (heads.cos, heads.sin))
        q, k = (
            reference.rotate(reference.rms_norm(x.float(), weight, heads.eps), cos, sin)
            for x, weight in ((q, heads.q_weight), (k, heads.k_weight))
        )
        q, k, v = (x.to(kv_keys.dtype) for x in (q, k, v))
    cached = torch.arange(kv_keys.shape[2], device=q.device)
    valid = (cached >= begin[:, None]) & (cached < end[:, None])
    token = torch.arange(q.shape[2], device=q.device)
    distance = token[:, None] - token
    own = distance >= 0
    if window is not None:
        own &= (token < context) | (distance <= window)
    mask = torch.cat((valid[:, None, :].expand(-1, len(token), -1), own.expand(len(q), -1, -1)), dim=-1)[:, None]
    # What lies outside the valid range is never read by the kernel, and need not be finite.
    keys, values = (x.float().masked_fill(~valid[:, None, :, None], 0.0) for x in (kv_keys, kv_values))
    mixed = reference.lambda_attention(q.float(), k.float(), v.float(), keys, values, mask)
    out.copy_(mixed.transpose(1, 2).flatten(2))


def start_flow(
    noise: Tensor,
    prefix: Tensor,
    prefix_length: Tensor,
    action_mask: Tensor,
    in_weight: Tensor,
    z: Tensor,
    hidden: Tensor,
) -> None:
    """As kernels/flow.py: start_flow."""
    token = torch.arange(noise.shape[1], device=noise.device)
    z.copy_(torch.where((token < prefix_length[:, None])[..., None], prefix, noise))
    hidden.copy_(F.gelu((z * action_mask) @ in_weight.float().T, approximate="tanh"))


def euler_step(
    x: Tensor,
    sums: Tensor | None,
    eps: float,
    out_weight1: Tensor,
    out_weight2: Tensor | None,
    z: Tensor,
    z_next: Tensor,
    prefix_length: Tensor,
    action_mask: Tensor,
    dt: float,
    in_weight: Tensor | None,
    hidden: Tensor | None,
) -> None:
    """As kernels/flow.py: euler_step."""
    x = x.float()
    if sums is not None:
        x = x * torch.rsqrt(sums[..., 0].sum(0) / x.shape[-1] + eps)[..., None]
    velocity = x @ out_weight1.float().T
    if out_weight2 is not None:
        velocity = F.gelu(velocity, approximate="tanh") @ out_weight2.float().T
    token = torch.arange(x.shape[1], device=x.device)
    z_next.copy_(torch.where((token < prefix_length[:, None])[..., None], z, z + dt * velocity))
    if hidden is not None and in_weight is not None:
        hidden.copy_(F.gelu((z_next * action_mask) @ in_weight.float().T, approximate="tanh"))


def dit_rope_tables(
    next_position: Tensor,
    prefix_length: Tensor,
    frequencies: Tensor,
    axes: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    context: int,
    offset: int,
) -> None:
    """As kernels/flow.py: dit_rope_tables."""
    token = torch.arange(cos.shape[1], device=cos.device)
    positions = next_position[..., None] + token + offset * (token >= context + prefix_length[:, None])
    rope_tables(positions, frequencies, axes, cos, sin)


def rope_tables(positions: Tensor, frequencies: Tensor, axes: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As kernels/embed.py: rope_tables."""
    angles = positions[axes.long()].permute(1, 2, 0).float() * frequencies
    cos.copy_(angles.cos())
    sin.copy_(angles.sin())


def embed(ids: Tensor, table: Tensor, image_index: Tensor, image_tokens: Tensor, out: Tensor, stats: StatsOut) -> None:
    """As kernels/embed.py: embed."""
    is_image = (image_index >= 0)[..., None]
    x = torch.where(is_image, image_tokens[image_index.clamp(min=0)], table[ids]).float()
    out.copy_(x)
    write_stats(out.float(), stats)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """As kernels/embed.py: layer_norm."""
    out.copy_(F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps))


def quantize(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    *,
    norm: InputNorm | None = None,
    col_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """As kernels/quantize.py: quantize."""
    rows = x.float()
    if norm is not None:
        row_scale, mean = row_norm(norm, x.shape[-1])
        rows = (rows - mean) * row_scale
    if col_scale is not None:
        rows = rows * col_scale.float()
    if bias is not None:
        rows = rows + bias.float()
    quantized, row_scales = reference.quantize_rows(rows, out.dtype)
    out.copy_(quantized)
    scale.copy_(row_scales)


def compute_dtype(x: Tensor, weight: Weight) -> torch.dtype:
    """What a product's factors are rounded to: the weight's dtype, for 8-bit weights the input's, or what that is."""
    if weight.data.element_size() > 1:
        return weight.data.dtype
    return weight.factor if x.dtype == torch.float32 else x.dtype


def product(
    x: Tensor,
    weight: Weight,
    x_scale: Tensor | None,
    bias: Tensor | None,
    col_scale: Tensor | None,
    norm: InputNorm | None,
) -> Tensor:
    """norm(x * col_scale) @ weight^T + bias, (B, M, N) float32: what every product of the model starts with.

    Factors are rounded to compute_dtype, and the norm is applied to the rows of the result or, where float16 would
    overflow without it, of the input (InputNorm).
    """
    if x_scale is not None:
        assert weight.scale is not None, "8-bit weights have a scale"
        y = reference.product_8bit(x.flatten(0, 1), x_scale.flatten(), weight.data, weight.scale)
        y = y.unflatten(0, x.shape[:2])
        return y if bias is None else y + bias.float()
    compute = compute_dtype(x, weight)
    comes_first = compute == torch.float16 and (col_scale is not None or x.dtype != torch.float16)
    scale, mean = (1.0, 0.0) if norm is None else row_norm(norm, x.shape[-1])
    scaled = (x.float() - mean) * scale if comes_first else x.float()
    if col_scale is not None:
        scaled = scaled * col_scale.float()
    result = scaled.to(compute).float() @ weight.data.float().T
    if weight.scale is not None:
        result = result * weight.scale
    if norm is not None and not comes_first:
        if norm.kind == "layer":
            assert norm.column_sums is not None, "layer normalisation needs column_sums"
            result = result - mean * norm.column_sums
        result = result * scale
    return result if bias is None else result + bias.float()


def row_norm(norm: InputNorm, columns: int) -> tuple[Tensor, Tensor]:
    """(scale, mean) of each row of so many columns, (B, M, 1): its norm is (x - mean) * scale."""
    first, second = norm.sums[..., None, :].unbind(-1)
    if norm.kind == "layer":
        starts = torch.arange(0, columns, STATS_COLUMNS, device=first.device)
        counts = (columns - starts).clamp(max=STATS_COLUMNS)[:, None, None, None]
        mean = second.sum(0) / columns
        squares = first + counts * (second / counts - mean).square()
        return torch.rsqrt(squares.sum(0) / columns + norm.eps), mean
    scale = torch.rsqrt(first.sum(0) / columns + norm.eps)
    if norm.kind == "double_rms":
        scale = scale * torch.rsqrt(scale**2 * second.sum(0) / columns + norm.eps)
    return scale, torch.zeros_like(scale)


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
    """As kernels/linear.py: linear."""
    y = product(x, weight, x_scale, bias, col_scale, norm)
    if activation is not None:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual is not None:
        base = residual.x.float()
        if residual.sums is not None:
            assert residual.weight is not None, "a normalised residual needs the norm's weight"
            mean_square = residual.sums[..., :1].sum(0) / y.shape[-1]
            base = base * torch.rsqrt(mean_square + residual.eps) * residual.weight
        y = base + (y if residual.gate is None else residual.gate * y)
        if residual.extra is not None:
            assert residual.extra_index is not None, "extra rows need extra_index"
            rows = residual.extra[residual.extra_index.clamp(min=0).long()].float()
            y = y + torch.where((residual.extra_index >= 0)[..., None], rows, 0.0)
    out.copy_(y)
    if stats is not None:
        write_stats(out.float(), stats)


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
    """As kernels/linear.py: swiglu."""
    gate, up = product(x, weight, x_scale, bias, col_scale, norm).chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


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
    """As kernels/qkv.py: qkv."""
    groups, dim = k.shape[1], k.shape[-1]
    heads = 0 if q is None else q.shape[1]
    y = product(x, weight, x_scale, bias, col_scale, norm).unflatten(-1, (-1, dim)).transpose(1, 2)
    parts = y.split((heads, groups, groups), dim=1)
    cos, sin = (table.repeat(1, 1, 2)[:, None] for table in (cos, sin))
    for part, head_weight, target in ((parts[0], q_weight, q), (parts[1], k_weight, k)):
        if target is not None:
            normed = part if head_weight is None else reference.rms_norm(part, head_weight.float(), eps)
            target.copy_(reference.rotate(normed, cos, sin))
    v.copy_(parts[2])
