"""Low-rank adapters in the trainer: layers keep their weights and learn a product of two thin matrices (LoRA).

Parameters keep their names; an adapted layer's pair stands beside its weight (model/adapter.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xr0_engine.model.adapter import DOWN, UP
from xr0_engine.training.config import LoraConfig, Target

TEXT, VISION = r"vlm\.model\.language_model\.layers\.\d+\.", r"vlm\.model\.visual\."
LAYERS: Mapping[Target, re.Pattern[str]] = {
    "vlm_attention": re.compile(TEXT + r"self_attn\.[qkvo]_proj"),
    "vlm_mlp": re.compile(TEXT + r"mlp\.(gate|up|down)_proj"),
    "vision": re.compile(VISION + r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"),
    "projector": re.compile(VISION + r"(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"),
    "dit": re.compile(r"head\.dit\.layers\.\d+\.(attn\.(qkv|o)_proj|mlp\.(gate|up|down)_proj)"),
}
"""Target -> names of its linear layers in a policy."""


class AdaptedLinear(nn.Linear):
    """A linear layer whose own parameters are frozen. Until loaded, the pair has no values."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device=layer.weight.device)
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.requires_grad_(False)
        like = layer.weight
        self.lora_down = nn.Parameter(torch.empty(rank, layer.in_features, dtype=like.dtype, device=like.device))
        self.lora_up = nn.Parameter(torch.empty(layer.out_features, rank, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        adapted = nn.functional.linear(nn.functional.linear(x, self.lora_down), self.lora_up)
        return torch.add(super().forward(x), adapted, alpha=self.scale)


def put_adapters(policy: nn.Module, config: LoraConfig) -> None:
    """Adapt the targets' layers, of those that learn, and freeze the VLM's rest; in place.

    policy: with a part `vlm`, what shall not learn frozen. Raises ValueError for a target without such layers, and for
    a rank that is no less than a layer's.
    """
    chosen: dict[str, nn.Linear] = {}
    for target in config.targets:
        found = {
            name: module
            for name, module in policy.named_modules()
            if isinstance(module, nn.Linear) and LAYERS[target].fullmatch(name) and module.weight.requires_grad
        }
        if not found:
            raise ValueError(f"config: lora.targets: {target}: this model has no layers of it that learn; leave it out")
        chosen |= found
    for name, layer in chosen.items():
        if (least := min(layer.weight.shape)) <= config.rank:
            raise ValueError(
                f"config: lora.rank: expected less than {least}, the narrow side of {name}, got {config.rank}"
            )
    policy.get_submodule("vlm").requires_grad_(False)
    for name, layer in chosen.items():
        parent, _, last = name.rpartition(".")
        setattr(policy.get_submodule(parent), last, AdaptedLinear(layer, config.rank, config.alpha / config.rank))


def has_adapters(policy: nn.Module) -> bool:
    return any(isinstance(module, AdaptedLinear) for module in policy.modules())


def fresh_adapters(policy: nn.Module, seed: int) -> dict[str, Tensor]:
    """Parameter's name -> its value at the start, float32, the same for a seed: the pairs' products are zero."""
    fresh: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in policy.named_modules():
            if isinstance(module, AdaptedLinear):
                down = torch.empty(module.lora_down.shape)
                nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                fresh |= {f"{name}.{DOWN}": down, f"{name}.{UP}": torch.zeros(module.lora_up.shape)}
    return fresh
