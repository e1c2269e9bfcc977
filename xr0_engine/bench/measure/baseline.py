"""The released way to run XR-0, restated: what the engine is measured against.

transformers' Qwen3-VL runs every layer and keeps the whole cache; the DiT recomputes its time MLP in every step and
concatenates the cached and its own keys and values in every layer of every step. Weights, inputs and arithmetic are the
engine's, so that only the structure differs; it must give the same actions before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
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
from xr0_engine.config import ModelConfig
from xr0_engine.model.dit import ActionHead, DiTLayer, dit_geometry
from xr0_engine.model.weights import read_index
from xr0_engine.robot.decode import decode, encode_prefix
from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.robot.limits import load_limits
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import orient
from xr0_engine.robot.prompt import build_prompt, instruction_rule, prompt_text
from xr0_engine.types import Observation

VLM_NAMES = "vlm.model."

ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
"""Attention of the baseline -> transformers' name for it."""

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v, mask) -> mixed values; q: (B, H, Q, D), k, v: (B, H, N, D), mask: (B, 1, Q, N) bool."""


class ReleasedHead:
    """The DiT as the released code runs it: everything anew in every step."""

    def __init__(self, head: ActionHead, attention: str = "sdpa", compiled: bool = False) -> None:
        """head: the engine's, whose weights are shared. attention: of ATTENTION; compiled: run under torch.compile.

        Raises ValueError for another attention, NotImplementedError for one that this machine or model cannot have.
        """
        self.head = head
        self.attention = _attention(attention, head)
        self._velocity = _compiled(self._step) if compiled else self._step

    @torch.inference_mode()
    def sample(
        self,
        cache: list[tuple[Tensor, Tensor]],
        next_position: Tensor,
        visible: Tensor,
        state: Tensor,
        noise: Tensor,
        mask: Tensor,
        prefix: Tensor,
        prefix_length: Tensor,
    ) -> Tensor:
        """Five Euler steps. Returns (B, T, A) float32, in the model's units.

        cache: per layer keys and values (B, G, N, D); next_position: (3, B); visible: (B, N) bool, False = padding;
        state: (B, state_length, S); noise, prefix: (B, T, A); mask: (B, T, A) or (T, A); prefix_length: (B,).
        """
        steps = self.head.config.flow_steps
        fixed = (torch.arange(noise.shape[1], device=noise.device) < prefix_length[:, None])[..., None]
        z = torch.where(fixed, prefix, noise)
        for step in range(steps):
            time = torch.full((1,), 1000.0 * step / steps, device=noise.device)
            velocity = self._velocity(z * mask, time, cache, next_position, visible, state, prefix_length)
            z = z + torch.where(fixed, 0.0, velocity.float() / steps)
        return z

    def _step(
        self,
        z: Tensor,
        scaled_time: Tensor,
        cache: list[tuple[Tensor, Tensor]],
        next_position: Tensor,
        visible: Tensor,
        state: Tensor,
        prefix_length: Tensor,
    ) -> Tensor:
        head = self.head
        geometry = dit_geometry(head.config, next_position, visible, prefix_length, z.shape[1])
        shared = head.t_projector(head.t_embedder(scaled_time))
        context = head.context(state)
        x = torch.cat((context, head.action_projector(z.to(state.dtype))), dim=1)
        rope = head.rope(geometry)
        for layer, (keys, values) in zip(head.dit.layers, cache, strict=True):
            assert isinstance(layer, DiTLayer)
            x = _layer(layer, x, shared, rope, keys, values, geometry.mask, self.attention)
        return head.action_output_layer(x[:, context.shape[1] :])


@dataclass(frozen=True)
class ReleasedInputs:
    """What a step of the released way takes. ids, grids: always on the host; the rest on the host or on the device.

    ids: (B, N); grids: (images, 3); pixel_values: (P, patch_dim); state: (B, state_length, S); noise, prefix: (B, T,
    A); action_mask: (T, A); prefix_length: (B,).
    """

    ids: Tensor
    grids: Tensor
    pixel_values: Tensor
    state: Tensor
    noise: Tensor
    action_mask: Tensor
    prefix: Tensor
    prefix_length: Tensor

    def on(self, device: torch.device, dtype: torch.dtype) -> ReleasedInputs:
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, dtype),
            state=self.state.to(device, dtype),
            noise=self.noise.to(device),
            action_mask=self.action_mask.to(device),
            prefix=self.prefix.to(device),
            prefix_length=self.prefix_length.to(device),
        )


class ReleasedModel:
    """Camera images to actions, as the released inference code does it."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        head: ActionHead,
        dtype: torch.dtype,
        attention: str = "sdpa",
        compiled: bool = False,
    ) -> None:
        """As ReleasedHead. The VLM is loaded anew, by transformers, onto the head's device."""
        self.released_head = ReleasedHead(head, attention, compiled)
        self.config, self.device, self.dtype, self.compiled = config, head.sink.weight.device, dtype, compiled
        # transformers declares what its models and caches hold too loosely to be checked.
        self.vlm: Any = _load_vlm(folder, config, self.device, dtype, ATTENTION[attention])
        if compiled:
            # The parts, not the whole: the hook between them keeps its place.
            for part in (self.vlm.visual, self.vlm.language_model):
                part.forward = _compiled(part.forward)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vision = config.vision
        self.processor = Qwen2VLImageProcessorPil(
            size=load_limits(folder, vision).to_hf()["size"],
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )

    def infer(
        self,
        observations: Sequence[Observation],
        embodiment: Embodiment,
        statistics: ActionStatistics,
        noise: np.ndarray,
        prefixes: Sequence[np.ndarray | None],
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Actions in the model's units (B, T, A), after they were decoded too, and the milliseconds of each stage.

        As prepare takes them.
        """
        clock = Stopwatch(self.device)
        inputs = self.prepare(observations, embodiment, statistics, noise, prefixes)
        clock.mark("preprocess")
        result = self.step(inputs, clock.mark).cpu().numpy()
        clock.mark("flow")
        for row in result:
            decode(row, statistics)
        clock.mark("decode")
        return result, clock.times()

    def prepare(
        self,
        observations: Sequence[Observation],
        embodiment: Embodiment,
        statistics: ActionStatistics,
        noise: np.ndarray,
        prefixes: Sequence[np.ndarray | None],
    ) -> ReleasedInputs:
        """On the host. observations: of one robot type, prompts of one length; noise: (B, T, A) float32; prefixes: as
        Engine.infer."""
        # A turned image is a view with negative strides, which the processor would be slow to read.
        turned = (orient(each.images[view.key], view) for each in observations for view in embodiment.views)
        images = [np.ascontiguousarray(image) for image in turned]
        pixels = self.processor(images, return_tensors="pt")
        grids = pixels["image_grid_thw"]
        merge, views = self.config.vision.spatial_merge_size**2, len(embodiment.views)
        prompts = [
            build_prompt(
                [view.title for view in embodiment.views],
                [int(grid.prod()) // merge for grid in grids[row * views : (row + 1) * views]],
                prompt_text(each.instruction, instruction_rule(None, self.config.normalize_instruction)),
            )
            for row, each in enumerate(observations)
        ]
        ids = torch.tensor([self.tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts])
        prefix = np.zeros_like(noise)
        for row, given in enumerate(prefixes):
            if given is not None:
                prefix[row, : len(given)] = encode_prefix(given, statistics)
        head = self.config.head
        states = np.stack([each.state for each in observations]).reshape(len(ids), head.state_length, head.state_dim)
        return ReleasedInputs(
            ids=ids,
            grids=grids,
            pixel_values=pixels["pixel_values"],
            state=torch.from_numpy(states),
            noise=torch.from_numpy(noise),
            action_mask=torch.from_numpy(statistics.action_mask),
            prefix=torch.from_numpy(prefix),
            prefix_length=torch.tensor([0 if given is None else len(given) for given in prefixes]),
        )

    @torch.inference_mode()
    def step(self, given: ReleasedInputs, mark: Callable[[str], None] = lambda stage: None) -> Tensor:
        """(B, T, A) float32 on the device, in the model's units. mark: called after `vision` and after `prefill`."""
        if self.compiled:
            # What a graph left before may be overwritten from here on.
            torch.compiler.cudagraph_mark_step_begin()
        inputs = given.on(self.device, self.dtype)
        ids, grids = given.ids, given.grids
        is_image = (ids == self.config.tokens.image).int()
        cache: Any = DynamicCache(config=self.vlm.config.text_config)
        # The model encodes the images itself; a hook tells the two stages apart.
        hook = self.vlm.visual.register_forward_hook(lambda *_: mark("vision"))
        self.vlm(
            input_ids=ids.to(self.device),
            attention_mask=torch.ones_like(ids).to(self.device),
            pixel_values=inputs.pixel_values,
            image_grid_thw=grids.to(self.device),
            mm_token_type_ids=is_image.to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        hook.remove()
        mark("prefill")
        positions, _ = self.vlm.get_rope_index(ids, is_image, image_grid_thw=grids)
        return self.released_head.sample(
            [(layer.keys, layer.values) for layer in cache.layers[-self.config.head.num_layers :]],
            positions.amax(-1).to(self.device) + 1,
            torch.ones_like(ids, dtype=torch.bool, device=self.device),
            inputs.state,
            inputs.noise,
            inputs.action_mask,
            inputs.prefix,
            inputs.prefix_length,
        )


def _layer(
    layer: DiTLayer,
    x: Tensor,
    shared: Tensor,
    rope: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    attention: Attention,
) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (layer.adaln_table + shared).unsqueeze(2).unbind(1)
    attn, mlp = layer.attn, layer.mlp
    h = _norm(x, layer.input_layernorm) * (1 + scale_a) + shift_a
    q, k, v = attn.qkv_proj(h).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = _rotate(_norm(q, attn.q_norm), *rope), _rotate(_norm(k, attn.k_norm), *rope)
    groups = attn.num_heads // keys.shape[1]
    k = torch.cat((keys.repeat_interleave(groups, dim=1), k), dim=2)
    v = torch.cat((values.repeat_interleave(groups, dim=1), v), dim=2)
    mixed = attention(q, k, v, mask)
    x = _norm(x + gate_a * attn.o_proj(mixed.transpose(1, 2).flatten(2)), layer.middle_layernorm)
    h = _norm(x, layer.post_layernorm) * (1 + scale_m) + shift_m
    h = mlp.down_proj(F.silu(mlp.get_submodule("gate_proj")(h)) * mlp.get_submodule("up_proj")(h))
    return _norm(x + gate_m * h, layer.final_layernorm)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # transformers' cache makes every layer compile anew; at the default limit, those from the eighth on would not.
    torch._dynamo.config.recompile_limit = 64
    # On a GPU with CUDA graphs; what cannot be in one runs beside it.
    return torch.compile(function, mode="max-autotune")


def _attention(name: str, head: ActionHead) -> Attention:
    if name not in ATTENTION:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION)}; got {name!r}")
    if name == "flash":
        if find_spec("flash_attn") is None:
            raise NotImplementedError("attention 'flash': flash-attn is not installed; use sdpa or eager")
        if not head.sink.weight.is_cuda or head.sink.weight.dtype == torch.float32:
            raise NotImplementedError("attention 'flash': it needs a CUDA GPU and bfloat16; use sdpa or eager")
        if head.config.local_window is not None:
            raise NotImplementedError("attention 'flash': it has no such window beside a cache; use sdpa or eager")
    return {"sdpa": _sdpa, "eager": _eager, "flash": _flash}[name]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Not yet measured. Causal from the last key backwards: with nothing padded, just what the mask says."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return import_module("flash_attn").flash_attn_func(q, k, v, causal=True).transpose(1, 2)


def _norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """RMSNorm as transformers writes it, operator by operator."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return norm.get_parameter("weight") * wide.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def _load_vlm(folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype, implementation: str) -> Any:
    hf_config = Qwen3VLConfig(**config.hf["vlm_config"])
    hf_config._attn_implementation = implementation
    with torch.device("meta"):
        model: Any = Qwen3VLModel(hf_config)
    # Buffers that no checkpoint holds (rotary frequencies) would stay without data on the meta device.
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            fresh = type(module)(module.config)
            model.set_submodule(name, fresh.to(torch.bfloat16) if config.head.compat_bf16_time else fresh)
    weights = {}
    for name, place in read_index(folder).items():
        if name.startswith(VLM_NAMES):
            with safe_open(place.file, framework="pt", device=str(device)) as handle:
                weights[name.removeprefix(VLM_NAMES)] = handle.get_tensor(place.key).to(dtype)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)
