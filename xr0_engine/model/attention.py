"""Where the action head looks: its attention weights while it samples a chunk, with every token named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.kernels import reference
from xr0_engine.model.dit import ActionHead, DiTAttention
from xr0_engine.model.flow import flow_times
from xr0_engine.types import ModelInputs

Kind = Literal["image", "text", "sink", "state", "prefix", "action"]
KINDS: tuple[Kind, ...] = ("image", "text", "sink", "state", "prefix", "action")


@dataclass(frozen=True)
class Token:
    """A token of the VLM's cache (image, text) or of the action head (sink, state; prefix: actions that were given;
    action: those that are sampled).

    index: of a text token, its place in the prompt; of an action, its place in the chunk; of a state, its row; of an
    image token, its number in its picture. view: its key; frame: which of the view's pictures, where it has several,
    oldest first; row, column: its place in the picture's `grid`, (rows, columns) of tokens. id: for the tokenizer.
    """

    kind: Kind
    index: int
    view: str | None = None
    frame: int | None = None
    row: int | None = None
    column: int | None = None
    grid: tuple[int, int] | None = None
    id: int | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """Softmax weights of every layer, head and flow step.

    weights: (steps, L, H, Q, K) float32: how much query q takes of key k; over k they sum to 1. times: (steps,)
    float32, where in the flow, 0 is noise. queries, keys: what stands at each q and k; queries are the last Q keys.
    prefix_length: how many actions were given.
    """

    weights: np.ndarray
    times: np.ndarray
    queries: tuple[Token, ...]
    keys: tuple[Token, ...]
    prefix_length: int

    def where(self, *kinds: Kind, view: str | None = None, of: Literal["keys", "queries"] = "keys") -> np.ndarray:
        """(K,) or (Q,) bool: the tokens of these kinds; view: of this view alone."""
        tokens = self.keys if of == "keys" else self.queries
        return np.array([token.kind in kinds and view in (None, token.view) for token in tokens])

    def mass(self, *kinds: Kind, view: str | None = None) -> np.ndarray:
        """(steps, L, H, Q): what each query takes of all keys of these kinds."""
        mass: np.ndarray = self.weights[..., self.where(*kinds, view=view)].sum(-1)
        return mass

    def picture(self, view: str, queries: np.ndarray) -> np.ndarray:
        """(steps, rows, columns) float32: what the queries take of each token of a view's newest picture, mean over
        them, layers and heads. queries: (Q,) bool. Raises ValueError for an unknown view or no query."""
        own = [token for token in self.keys if token.view == view]
        if not own or not queries.any():
            raise ValueError(f"picture: expected a view with image tokens and at least one query, got {view!r}")
        newest, grid = own[-1].frame, own[-1].grid
        assert grid is not None
        shown = np.array([token.view == view and token.frame == newest for token in self.keys])
        taken: np.ndarray = self.weights[:, :, :, queries][..., shown].mean((1, 2, 3))
        return taken.reshape(-1, *grid)


@contextmanager
def watched(head: ActionHead) -> Iterator[list[Tensor]]:
    """While it samples: the weights of each attention that runs, (B, H, Q, K) float32 on the host, in turn."""
    seen: list[Tensor] = []

    def watch(attention: Any, given: tuple[Tensor, ...]) -> None:
        x, cos, sin, keys, _, mask = given
        q, k, _ = attention.heads(x, cos, sin)
        seen.append(reference.lambda_weights(q, k, keys, mask).cpu())

    modules = (module for module in head.modules() if isinstance(module, DiTAttention))
    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def labelled(
    seen: Sequence[Tensor], inputs: ModelInputs, prefix_length: int, config: ModelConfig, views: Sequence[str]
) -> Attention:
    """What was watched while the chunk of a batch of one was sampled. views: keys, in the prompt's order."""
    head = config.head
    weights = torch.stack([each[0] for each in seen]).unflatten(0, (head.flow_steps, head.num_layers))
    kept = inputs.attention_mask[0]
    queries = _queries(config, prefix_length, inputs.action_mask.shape[1])
    cached = weights.shape[-1] - len(queries)
    # Whoever filled the cache may have padded it on the left.
    shown = torch.ones(weights.shape[-1], dtype=torch.bool)
    shown[: cached - int(kept.sum())] = False
    keys = (*_prompt(inputs.input_ids[0, kept].tolist(), inputs.image_grids, config, views), *queries)
    return Attention(weights[..., shown].numpy(), flow_times(head.flow_steps).numpy(), queries, keys, prefix_length)


def _prompt(
    ids: Sequence[int], grids: Sequence[tuple[int, int]], config: ModelConfig, views: Sequence[str]
) -> Iterator[Token]:
    merge, frames = config.vision.spatial_merge_size, len(grids) // len(views)
    places = iter(
        [
            (number, views[picture // frames], picture % frames, (rows // merge, columns // merge))
            for picture, (rows, columns) in enumerate(grids)
            for number in range(rows * columns // merge**2)
        ]
    )
    for index, token in enumerate(ids):
        if token == config.tokens.image:
            number, view, frame, grid = next(places)
            yield Token("image", number, view, frame, number // grid[1], number % grid[1], grid, token)
        else:
            yield Token("text", index, id=token)


def _queries(config: ModelConfig, prefix_length: int, chunk_length: int) -> tuple[Token, ...]:
    state = (Token("state", row) for row in range(config.head.state_length))
    actions = (Token("prefix" if index < prefix_length else "action", index) for index in range(chunk_length))
    return (Token("sink", 0), *state, *actions)
