"""The released way to run XR-0, restated: what the engine is measured against.

transformers' Qwen3-VL runs every layer and keeps the whole cache; the DiT recomputes its time MLP in every step and
concatenates the cached and its own keys and values in every layer of every step. Weights, inputs and arithmetic are the
engine's, so that only the structure differs; `sample` must give the same actions before anything is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from xr0_engine.bench.timing import Stopwatch
from xr0_engine.config import XR0Config
from xr0_engine.embodiment import Embodiment
from xr0_engine.model.dit import ActionHead, DiTLayer, dit_geometry
from xr0_engine.model.weights import read_index
from xr0_engine.normalize import ActionStatistics
from xr0_engine.preprocess import MAX_PIXELS, MIN_PIXELS, orient
from xr0_engine.prompt import build_prompt, normalize_instruction
from xr0_engine.types import Observation

VLM_NAMES = "vlm.model."


class ReleasedModel:
    """One observation at a time, as the released inference code does it."""

    def __init__(
        self, folder: Path, config: XR0Config, head: ActionHead, device: torch.device, dtype: torch.dtype
    ) -> None:
        """head: the engine's, whose weights are shared. The VLM is loaded anew, by transformers."""
        self.config, self.head, self.device, self.dtype = config, head, device, dtype
        # transformers declares what its models and caches hold too loosely to be checked.
        self.vlm: Any = _load_vlm(folder, config, device, dtype)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vision = config.vision
        self.processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )

    @torch.inference_mode()
    def infer(
        self, observation: Observation, embodiment: Embodiment, statistics: ActionStatistics, noise: Tensor
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Normalised actions (T, A) and the milliseconds of each stage. noise: (1, T, A) float32."""
        clock = Stopwatch()
        images = [orient(observation.images[view.key], view) for view in embodiment.views]
        pixels = self.processor(images, return_tensors="pt")
        grids = pixels["image_grid_thw"]
        merge = self.config.vision.spatial_merge_size**2
        prompt = build_prompt(
            [view.title for view in embodiment.views],
            [int(grid.prod()) // merge for grid in grids],
            normalize_instruction(observation.instruction),
        )
        ids = torch.tensor([self.tokenizer.encode(prompt, add_special_tokens=False).ids])
        clock.mark("preprocess")

        cache: Any = DynamicCache(config=self.vlm.config.text_config)
        patches = pixels["pixel_values"].to(self.device, self.dtype)
        # The model encodes the images itself; a hook tells the two stages apart.
        hook = self.vlm.visual.register_forward_hook(lambda *_: self._mark(clock, "vision"))
        self.vlm(
            input_ids=ids.to(self.device),
            attention_mask=torch.ones_like(ids).to(self.device),
            pixel_values=patches,
            image_grid_thw=grids.to(self.device),
            mm_token_type_ids=(ids == self.config.tokens.image).int().to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        hook.remove()
        self._mark(clock, "prefill")

        state = torch.as_tensor(observation.state, dtype=self.dtype, device=self.device).view(
            1, -1, self.config.head.state_dim
        )
        mask = torch.from_numpy(statistics.action_mask).to(self.device)
        positions, _ = self.vlm.get_rope_index(ids, (ids == self.config.tokens.image).int(), image_grid_thw=grids)
        kept = [(layer.keys, layer.values) for layer in cache.layers[-self.config.head.num_layers :]]
        actions = self.sample(kept, positions.amax(-1).to(self.device) + 1, state, noise.to(self.device), mask)
        result = actions[0].cpu().numpy()
        clock.mark("flow")
        return result, clock.times()

    @torch.inference_mode()
    def sample(
        self, cache: list[tuple[Tensor, Tensor]], next_position: Tensor, state: Tensor, noise: Tensor, mask: Tensor
    ) -> Tensor:
        """Five Euler steps without prefix. cache: per layer keys and values (1, G, N, D); noise: (1, T, A)."""
        head, steps = self.head, self.config.head.flow_steps
        tokens = cache[0][0].shape[2]
        visible = torch.ones(1, tokens, dtype=torch.bool, device=self.device)
        nothing = torch.zeros(1, dtype=torch.long, device=self.device)
        z = noise
        for step in range(steps):
            geometry = dit_geometry(head.config, next_position, visible, nothing, noise.shape[1])
            time = head.t_embedder(torch.full((1,), 1000.0 * step / steps, device=self.device))
            shared = head.t_projector(time)
            context = head.context(state)
            x = torch.cat((context, head.action_projector((z * mask).to(self.dtype))), dim=1)
            rope = head.rope(geometry)
            for layer, (keys, values) in zip(head.dit.layers, cache, strict=True):
                assert isinstance(layer, DiTLayer)
                x = _layer(layer, x, shared, rope, keys, values, geometry.mask)
            z = z + head.action_output_layer(x[:, context.shape[1] :]).float() / steps
        return z

    def _mark(self, clock: Stopwatch, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        clock.mark(stage)


def _layer(
    layer: DiTLayer,
    x: Tensor,
    shared: Tensor,
    rope: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (layer.adaln_table + shared).unsqueeze(2).unbind(1)
    attn, mlp = layer.attn, layer.mlp
    h = _norm(x, layer.input_layernorm) * (1 + scale_a) + shift_a
    q, k, v = attn.qkv_proj(h).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = _rotate(_norm(q, attn.q_norm), *rope), _rotate(_norm(k, attn.k_norm), *rope)
    groups = attn.num_heads // keys.shape[1]
    k = torch.cat((keys.repeat_interleave(groups, dim=1), k), dim=2)
    v = torch.cat((values.repeat_interleave(groups, dim=1), v), dim=2)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = _norm(x + gate_a * attn.o_proj(mixed.transpose(1, 2).flatten(2)), layer.middle_layernorm)
    h = _norm(x, layer.post_layernorm) * (1 + scale_m) + shift_m
    h = mlp.down_proj(F.silu(mlp.get_submodule("gate_proj")(h)) * mlp.get_submodule("up_proj")(h))
    return _norm(x + gate_m * h, layer.final_layernorm)


def _norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """RMSNorm as transformers writes it, operator by operator."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return norm.get_parameter("weight") * wide.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def _load_vlm(folder: Path, config: XR0Config, device: torch.device, dtype: torch.dtype) -> Any:
    hf_config = Qwen3VLConfig(**config.hf["vlm_config"])
    hf_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = Qwen3VLModel(hf_config)
    # Buffers that no checkpoint holds (rotary frequencies) would stay without data on the meta device.
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(module.config))
    weights = {}
    for name, place in read_index(folder).items():
        if name.startswith(VLM_NAMES):
            with safe_open(place.file, framework="pt", device=str(device)) as handle:
                weights[name.removeprefix(VLM_NAMES)] = handle.get_tensor(place.key).to(dtype)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)
