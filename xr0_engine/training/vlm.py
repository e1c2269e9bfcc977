"""The VLM with gradients: transformers' Qwen3-VL under the checkpoint's names, and the KV block that the DiT reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLModel

from xr0_engine.config import ModelConfig
from xr0_engine.model.vision import PatchEmbed
from xr0_engine.training.offload import HostWeights
from xr0_engine.types import ModelInputs


@dataclass(frozen=True)
class VLMOutput:
    """hidden: (B, N + M, C) after the final norm. keys, values: (L, B, G, N + M, D) of the last L layers."""

    hidden: Tensor
    keys: Tensor
    values: Tensor


class KeptCache(DynamicCache):
    """The keys and values of one pass. A layer that is computed again for its gradient leaves them as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.kept.setdefault(layer_idx, (key_states, value_states))
        return key_states, value_states


class TrainableVLM(nn.Module):
    """Parameters are named as the engine's: `model.visual.*`, `model.language_model.*`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hf_config = Qwen3VLConfig(**config.to_hf()["vlm_config"])
        hf_config._attn_implementation = "sdpa"
        self.model = Qwen3VLModel(hf_config)
        # The same arithmetic as one matrix product: a convolution's backward pass takes a fifth of a step on a CPU.
        self.model.visual.patch_embed = PatchEmbed(config.vision)
        self.keep_layers = config.head.num_layers
        self.image_token = config.tokens.image
        self.compat_bf16 = config.head.compat_bf16_time
        self.host: HostWeights | None = None

    def forward(self, inputs: ModelInputs, extra: Tensor | None = None) -> VLMOutput:
        """extra: (B, M, C), embeddings of further tokens behind the prompt, at the positions that follow it."""
        language = self.model.language_model
        embeds = language.embed_tokens(inputs.input_ids)
        is_image = inputs.input_ids == self.image_token
        deepstack = None
        if inputs.image_grids:
            grids = torch.tensor([(1, *grid) for grid in inputs.image_grids], device=embeds.device)
            vision = self.model.visual(inputs.pixel_values.to(embeds.dtype), grid_thw=grids, return_dict=True)
            embeds = embeds.masked_scatter(is_image[..., None], vision.pooler_output)
            deepstack = vision.deepstack_features
        mask, positions = inputs.attention_mask, inputs.position_ids
        if extra is not None:
            added = torch.ones(extra.shape[:2], dtype=torch.bool, device=mask.device)
            behind = next_position(inputs)[..., None] + torch.arange(extra.shape[1], device=mask.device)
            embeds = torch.cat((embeds, extra.to(embeds.dtype)), dim=1)
            mask, is_image = torch.cat((mask, added), dim=1), torch.cat((is_image, ~added), dim=1)
            positions = torch.cat((positions, behind), dim=-1)
        cache = KeptCache()
        hidden = language(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            visual_pos_masks=None if deepstack is None else is_image,
            deepstack_visual_embeds=deepstack,
        ).last_hidden_state
        kept = [cache.kept[layer] for layer in sorted(cache.kept)[-self.keep_layers :]]
        keys, values = (torch.stack(parts) for parts in zip(*kept, strict=True))
        return VLMOutput(hidden, keys, values)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., vocabulary), through the LM head, which is the text embeddings."""
        return nn.functional.linear(hidden, self.model.language_model.embed_tokens.weight)

    def recompute_language(self) -> None:
        """Have the language layers' activations computed again in the backward pass instead of kept."""
        for layer in self.model.language_model.layers:
            # transformers' own way drops the cache, which the DiT reads. Hooks of FSDP stay outside.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def offload_frozen(self, policy: nn.Module, dtype: torch.dtype) -> None:
        """Have the layers' frozen weights kept on the host, in dtype. policy: whose part this is, by its names."""
        self.host = HostWeights(policy, [*self.model.visual.blocks, *self.model.language_model.layers], dtype)

    def reset_tables(self) -> None:
        """Fill what no checkpoint holds, on the device of the weights: the rotary frequencies."""
        device = next(self.parameters()).device
        text, vision = self.model.language_model, self.model.visual
        text.rotary_emb = type(text.rotary_emb)(text.config).to(device)
        vision.rotary_pos_emb = type(vision.rotary_pos_emb)(vision.config).to(device)
        if self.compat_bf16:
            # What the engine will run with.
            text.rotary_emb.to(torch.bfloat16)
            vision.rotary_pos_emb.to(torch.bfloat16)

    def behind_the_last_keys(self) -> list[nn.Module]:
        """What only the hidden states need: of no effect on actions, so of no gradient in flow matching."""
        text = self.model.language_model
        last = text.layers[-1]
        attention = last.self_attn
        return [
            text.norm,
            attention.q_proj,
            attention.q_norm,
            attention.o_proj,
            last.post_attention_layernorm,
            last.mlp,
        ]


def next_position(inputs: ModelInputs) -> Tensor:
    """(3, B) int64: the first free position of each row and M-RoPE axis."""
    return inputs.position_ids.masked_fill(~inputs.attention_mask, -1).amax(-1) + 1
