"""Qwen3-VL vision tower: patches of all images in, merged tokens and DeepStack taps out (spec section 1).

Shape legend: P patches of all images, C hidden, D head_dim. Patches come grouped by merge block, as preprocess.py
orders them, so merging is a reshape.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr0_engine.config import VISION_ROPE_THETA, VisionConfig
from xr0_engine.kernels import reference
from xr0_engine.model.kept import Kept
from xr0_engine.model.layers import inverse_frequencies
from xr0_engine.types import VisionTokens

LAYER_NORM_EPS = 1e-6
MAX_CACHED_GRIDS = 64


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """x: (P, C); cos, sin: (P, 1, D); runs: (images, patches each) of equal neighbours. Returns (P, C)."""
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
        outputs, start = [], 0
        for images, patches in runs:
            part = slice(start, start + images * patches)
            q_, k_, v_ = (t[part].view(images, patches, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
            outputs.append(reference.attention(q_, k_, v_).transpose(1, 2).reshape(images * patches, -1))
            start = part.stop
        return self.proj(torch.cat(outputs))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, runs)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """merge x merge neighbouring patches -> one token of the language model's width."""

    def __init__(self, config: VisionConfig, norm_after_merge: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.merged_size if norm_after_merge else config.hidden_size, eps=LAYER_NORM_EPS)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_after_merge:
            x = self.norm(x.view(-1, self.merged_size))
        else:
            x = self.norm(x).view(-1, self.merged_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class PatchEmbed(nn.Module):
    """The checkpoint's Conv3d with stride equal to its kernel, which is a linear layer on flattened patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTower(nn.Module):
    """compat_bf16: see ActionHeadConfig.compat_bf16_time."""

    def __init__(self, config: VisionConfig, compat_bf16: bool = False) -> None:
        super().__init__()
        self.config, self.compat_bf16 = config, compat_bf16
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            [PatchMerger(config, norm_after_merge=True) for _ in config.deepstack_layers]
        )
        self._grid_tables: Kept[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = Kept(MAX_CACHED_GRIDS)

    def forward(self, patches: Tensor, grids: tuple[tuple[int, int], ...]) -> VisionTokens:
        """patches: (P, patch_dim) in the tower's dtype; grids: (height, width) in patches, per image."""
        positions, cos, sin = self.tables(grids)
        runs = [(len(list(run)), height * width) for (height, width), run in groupby(grids)]
        x = self.patch_embed(patches) + positions
        deepstack = []
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, runs)
            if index in self.config.deepstack_layers:
                deepstack.append(self.deepstack_merger_list[self.config.deepstack_layers.index(index)](x))
        return VisionTokens(self.merger(x), tuple(deepstack))

    def tables(self, grids: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor, Tensor]:
        """All that depends on the images' sizes alone: position embeddings (P, C), rotary cos and sin (P, 1, D)."""
        kept = [self._grid_tables.get(grid, partial(self._make_tables, *grid)) for grid in grids]
        positions, cos, sin = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return positions, cos, sin

    def _make_tables(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Interpolated position embeddings (patches, C) and rotary cos, sin (patches, 1, D) of one image size."""
        device = self.pos_embed.weight.device
        rows, columns = (
            index.flatten()
            for index in torch.meshgrid(
                torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
            )
        )
        merge, side = self.config.spatial_merge_size, self.config.position_grid
        # Row-major patches -> merge-block order: the order in which preprocess.py lays them out.
        order = (
            torch.arange(height * width, device=device)
            .view(height // merge, merge, width // merge, merge)
            .transpose(1, 2)
            .flatten()
        )
        rows, columns = rows[order], columns[order]

        # Bilinear resampling of the learned side x side grid, corners aligned.
        y = torch.linspace(0, side - 1, height, dtype=torch.float32, device=device)[rows]
        x = torch.linspace(0, side - 1, width, dtype=torch.float32, device=device)[columns]
        top, left = y.long(), x.long()
        bottom, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
        dy, dx = (y - top).unsqueeze(1), (x - left).unsqueeze(1)
        table = self.pos_embed.weight.float()
        position = (
            table[top * side + left] * ((1 - dy) * (1 - dx))
            + table[top * side + right] * ((1 - dy) * dx)
            + table[bottom * side + left] * (dy * (1 - dx))
            + table[bottom * side + right] * (dy * dx)
        )

        dtype = self.pos_embed.weight.dtype
        frequencies = inverse_frequencies(
            self.config.hidden_size // self.config.num_heads // 2, VISION_ROPE_THETA, device, self.compat_bf16
        )
        angles = torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), dim=-1)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        if self.compat_bf16 and dtype == torch.bfloat16:
            # transformers 4.57, which the released server runs on, computes the whole table in the frequencies' dtype.
            angles = angles.bfloat16()
        return position.to(dtype), angles.cos().float(), angles.sin().float()
