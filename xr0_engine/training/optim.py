"""AdamW and its schedule (spec section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from xr0_engine.training.config import OptimConfig
from xr0_engine.training.moments import AdamW8bit


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, norms and adaLN tables."""
    return parameter.ndim > 1 and not name.endswith("adaln_table")


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW | AdamW8bit:
    """Over the parameters that learn, whose names must be final."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in learning if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in learning if not decays(name, p)], "weight_decay": 0.0},
    ]
    if config.moments == "8bit":
        return AdamW8bit(groups, config.peak_lr, config.betas)
    # One call for all tensors: one after the other, shards cost more in dispatch than in arithmetic.
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True)


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What make_optimizer's keeps of a parameter, by name; made as it is at the start, if it is not there yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if isinstance(optimizer, AdamW8bit):
        optimizer.begin(parameter)
    elif not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state


class Average:
    """The moving average of the weights that learn, float32, which begins as they are. decay 0: nothing is kept."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.weights: dict[str, Tensor] = {}
        if decay:
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """After a step."""
        for name, parameter in named:
            if name in self.weights:
                self.weights[name].lerp_(parameter.detach(), 1 - self._decay)

    @torch.no_grad()
    def begin(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Anew, with the weights as they are."""
        for name, parameter in named:
            if name in self.weights:
                self.weights[name].copy_(parameter.detach())


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of step 0 .. steps - 1: from start_lr straight up over the warm-up, then down along a cosine to min_lr."""
    start = config.min_lr if config.start_lr is None else config.start_lr
    if step < config.warmup_steps:
        return start + (config.peak_lr - start) * (step + 1) / config.warmup_steps
    span = config.peak_lr - config.min_lr
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
