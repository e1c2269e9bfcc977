"""What XR-1's language model proposes in training: candidates for a chunk, and a score of each (docs/spec.md,
Xiaomi-Robotics-1). Inference needs none of it; the base checkpoint has these tensors, fine-tunes need not.

Shape legend: B batch, n action tokens, K candidates, A action columns, H the language model's width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from xr0_engine.config import ModelConfig
from xr0_engine.family import ACTION_TOKENS, FAMILIES
from xr0_engine.model.dit import Projector

HIDDEN_PRODUCTS = 4
EMBEDDINGS = ("action_embed", "score_embed")
"""Of the modules, those that the checkpoint has within its VLM."""


class Products(nn.Module):
    """Linear layers without biases, GELU(tanh) between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, behind in pairwise(widths):
            parts += [*([nn.GELU(approximate="tanh")] if parts else []), nn.Linear(before, behind, bias=False)]
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ChoiceHeads(nn.Module):
    """Embeddings of the tokens <state>, <a_i> and <score>, in place of the vocabulary's, and what is read at the last
    two of the language model's final hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, head = config.text.hidden_size, config.head
        self.choices, self.action_dim = FAMILIES[config.family].choices, head.action_dim
        self.state_projector_choice = Projector(head.state_dim, hidden, hidden)
        self.action_projector_choice = _projector(hidden, self.choices * head.action_dim)
        self.score_projector_choice = _projector(hidden, self.choices)
        self.action_embed = nn.Embedding(ACTION_TOKENS, hidden)
        self.score_embed = nn.Embedding(1, hidden)

    def candidates(self, hidden: Tensor) -> Tensor:
        """(..., n, H) at the action tokens -> (..., n, K, A), the model's units."""
        return self.action_projector_choice(hidden).unflatten(-1, (self.choices, self.action_dim))

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., H) at the score token -> (..., K); the lower the better."""
        return self.score_projector_choice(hidden)


def _projector(hidden: int, out: int) -> nn.Sequential:
    """No activation between its two parts."""
    return nn.Sequential(Products(*(hidden for _ in range(HIDDEN_PRODUCTS + 1))), Products(hidden, out))


def choice_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name in a checkpoint -> shape; nothing for a family that proposes no chunks."""
    if not FAMILIES[config.family].choices:
        return {}
    with torch.device("meta"):
        heads = ChoiceHeads(config)
    return {checkpoint_name(name): tuple(parameter.shape) for name, parameter in heads.named_parameters()}


def checkpoint_name(name: str) -> str:
    """Of a parameter of ChoiceHeads."""
    return f"vlm.model.{name}" if name.startswith(EMBEDDINGS) else name
