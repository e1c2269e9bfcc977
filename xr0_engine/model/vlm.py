"""Qwen3-VL language model, prefill only: token embeddings in, the KV cache that the DiT reads out (spec section 1).

Shape legend: B batch, N tokens (left padded), M <= N tokens computed now, C hidden, H query heads, G KV heads, D
head_dim. There is no LM head and no final norm, and the last layer computes keys and values only: actions need nothing
else of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xr0_engine.config import ModelConfig, TextConfig
from xr0_engine.kernels import reference
from xr0_engine.model.layers import GatedMLP, PackedLinears, RMSNorm, inverse_frequencies, mrope_tables
from xr0_engine.model.vision import VisionTower


@dataclass(frozen=True)
class Preamble:
    """Keys and values of a prompt's tokens before its first image, for every layer: (layers, G, tokens, D) each.

    They depend on nothing that changes from step to step, so they are computed once per prompt and kept.
    """

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.keys.shape[2]


class TextAttention(PackedLinears):
    def __init__(self, config: TextConfig, kv_only: bool) -> None:
        kv_size, q_size = config.num_kv_heads * config.head_dim, config.num_heads * config.head_dim
        kv = {"k_proj": kv_size, "v_proj": kv_size}
        super().__init__(config.hidden_size, kv if kv_only else {"q_proj": q_size, **kv})
        self.head_dim = config.head_dim
        self.k_norm = RMSNorm(config.head_dim, config.rms_eps)
        if not kv_only:
            self.q_norm = RMSNorm(config.head_dim, config.rms_eps)
            self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, M, C) -> per projection (B, heads, M, D)."""
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.project(x))


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig, kv_only: bool) -> None:
        super().__init__()
        self.kv_only = kv_only
        self.self_attn = TextAttention(config, kv_only)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        if not kv_only:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor) -> Tensor:
        """x: (B, M, C). Returns the same shape, or x itself if kv_only.

        Writes its keys and values to the last M places of keys, values (B, G, N, D), which already hold what comes
        before; mask: (B, 1, M, N) bool, or None = plain causal.
        """
        attn, tokens = self.self_attn, x.shape[1]
        *q, k, v = attn.heads(self.input_layernorm(x))
        keys[:, :, -tokens:] = reference.rotate(attn.k_norm(k), cos, sin)
        values[:, :, -tokens:] = v
        if self.kv_only:
            return x
        query = reference.rotate(attn.q_norm(q[0]), cos, sin)
        mixed = reference.attention(query, keys, values, mask, causal=mask is None)
        x = x + attn.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """complete: hold the whole last layer and the final norm too, to list a checkpoint's tensors; never computed.
    compat_bf16: see ActionHeadConfig.compat_bf16_time."""

    def __init__(self, config: TextConfig, complete: bool = False, compat_bf16: bool = False) -> None:
        super().__init__()
        self.config, self.compat_bf16 = config, compat_bf16
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        last = config.num_layers - 1
        self.layers = nn.ModuleList(
            [TextLayer(config, kv_only=index == last and not complete) for index in range(config.num_layers)]
        )
        if complete:
            self.norm = RMSNorm(config.hidden_size, config.rms_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        keep_layers: int,
        image_index: Tensor | None = None,
        deepstack: tuple[Tensor, ...] = (),
        preamble: Preamble | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Prefill. Returns the keys and values of the last keep_layers layers, (keep_layers, B, G, N, D) each.

        x: (B, M, C), the embeddings of the last M columns; the first N - M come from preamble, shifted by each row's
        padding. positions: (3, B, M); mask: (B, N) bool, False = left padding; image_index: places of image tokens in
        the flattened (B * M); deepstack: (image tokens, C) each, added there after the first layers.
        """
        config, (batch, tokens), total = self.config, x.shape[:2], mask.shape[1]
        cos, sin = mrope_tables(positions, self.frequencies(x.device), config.mrope_section)
        allowed = _prefill_mask(mask, tokens) if preamble is not None or not bool(mask.all()) else None

        # Layers below those kept share one scratch place, the first. Zeroed: padding is masked, but 0 * NaN is NaN.
        shape = (keep_layers + 1, batch, config.num_kv_heads, total, config.head_dim)
        keys, values = x.new_zeros(shape), x.new_zeros(shape)
        padding = (~mask).sum(1).tolist()
        for index, layer in enumerate(self.layers):
            place = max(0, index - len(self.layers) + keep_layers + 1)
            if preamble is not None:
                for row, pad in enumerate(padding):
                    filled = max(0, total - tokens - pad)
                    keys[place, row, :, pad : pad + filled] = preamble.keys[index, :, :filled]
                    values[place, row, :, pad : pad + filled] = preamble.values[index, :, :filled]
            x = layer(x, cos, sin, allowed, keys[place], values[place])
            if index < len(deepstack) and image_index is not None:
                x.view(-1, x.shape[-1]).index_add_(0, image_index, deepstack[index])
        return keys[1:], values[1:]

    def frequencies(self, device: torch.device) -> Tensor:
        """(D / 2,) float32, of the rotary embedding."""
        return inverse_frequencies(self.config.head_dim, self.config.rope_theta, device, self.compat_bf16)


def _prefill_mask(mask: Tensor, tokens: int) -> Tensor:
    """(B, 1, tokens, N): the last `tokens` columns see what is before them and not padding; padding sees itself."""
    total = mask.shape[1]
    column = torch.arange(total, device=mask.device)
    row = column[-tokens:, None]
    return ((column <= row) & mask[:, None, :] | (column == row))[:, None]


class Towers(nn.Module):
    def __init__(self, config: ModelConfig, complete: bool) -> None:
        super().__init__()
        compat_bf16 = config.head.compat_bf16_time
        self.visual = VisionTower(config.vision, compat_bf16)
        self.language_model = LanguageModel(config.text, complete, compat_bf16)


class VLM(nn.Module):
    """Holds the two towers under the checkpoint's names: `vlm.model.visual.*`, `vlm.model.language_model.*`."""

    def __init__(self, config: ModelConfig, complete: bool = False) -> None:
        super().__init__()
        self.model = Towers(config, complete)
