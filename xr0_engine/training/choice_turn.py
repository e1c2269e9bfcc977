"""The turn behind a prompt in which XR-1's language model proposes chunks, in training alone (spec section 8).

`<|im_start|>user\\nRobot state: <state><|im_end|>\\n<|im_start|>assistant\\n<a_0><a_1>...<score><|im_end|>\\n`, with as
many <a_i> as the sample has steps. Of a model of several states the newest has the <state>, or each has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.family import FAMILIES
from xr0_engine.model.choice import ChoiceHeads

BEFORE_STATE = "<|im_start|>user\nRobot state: "
BEFORE_ACTIONS = "<|im_end|>\n<|im_start|>assistant\n"
BEHIND_SCORE = "<|im_end|>\n"


@dataclass(frozen=True)
class ChoiceTurn:
    """Of a batch. ids: (B, M) int64, of the tokens that the vocabulary embeds; <state>, <a_i> and <score>, which have
    embeddings of their own, are anything, and so is what is behind a row's end: the VLM is causal, nothing that is
    read sees it. state, first_action: where the first <state> and <a_0> stand, in all rows. steps: (B,) int64, how many
    <a_i> there are; <score> follows them. states: how many <state> there are, of the newest states, the oldest first.
    """

    ids: Tensor
    state: int
    first_action: int
    steps: Tensor
    states: int = 1

    def to(self, device: torch.device) -> ChoiceTurn:
        return replace(self, ids=self.ids.to(device), steps=self.steps.to(device))


def choice_turn(
    encode: Callable[[str], Sequence[int]], steps: Sequence[int], length: int, filler: int, states: int = 1
) -> ChoiceTurn:
    """encode: of the checkpoint's tokenizer; it need not know the tokens that have embeddings of their own. steps: of
    each sample, at most length. length: T. filler: an id of the vocabulary. states: as in ChoiceTurn."""
    before, between, behind = (list(encode(text)) for text in (BEFORE_STATE, BEFORE_ACTIONS, BEHIND_SCORE))
    first_action = len(before) + states + len(between)
    ids = np.full((len(steps), first_action + length + 1 + len(behind)), filler, dtype=np.int64)
    for row, count in enumerate(steps):
        tokens = [*before, *[filler] * states, *between, *[filler] * (count + 1), *behind]
        ids[row, : len(tokens)] = tokens
    return ChoiceTurn(torch.from_numpy(ids), len(before), first_action, torch.tensor(steps, dtype=torch.long), states)


class TurnHeads(ChoiceHeads):
    """Shape legend: B batch, M tokens of the turn, T steps, K candidates, A columns, C hidden."""

    def embed(self, embeds: Tensor, turn: ChoiceTurn, state: Tensor) -> Tensor:
        """embeds: (B, M, C), as the vocabulary has turn.ids; state: (B, state_length, S), whose last turn.states rows
        stand in the turn. Returns (B, M, C)."""
        states = self.state_projector_choice(state[:, -turn.states :].to(embeds.dtype))
        steps = torch.arange(embeds.shape[1], device=embeds.device) - turn.first_action
        places, score = steps[None, :, None], turn.steps[:, None, None]
        rows = self.action_embed(steps.clamp(0, self.action_embed.num_embeddings - 1))
        embeds = torch.where((places >= 0) & (places < score), rows, embeds)
        embeds = torch.where(places == score, self.score_embed.weight, embeds)
        return torch.cat((embeds[:, : turn.state], states, embeds[:, turn.state + turn.states :]), dim=1)

    def read(self, hidden: Tensor, turn: ChoiceTurn, length: int) -> tuple[Tensor, Tensor]:
        """hidden: (B, M, C), behind the final norm. length: T. Returns candidates (B, K, T, A), which mean nothing
        behind a sample's steps, and scores (B, K), float32."""
        rows = torch.arange(len(hidden), device=hidden.device)
        actions = hidden[:, turn.first_action : turn.first_action + length]
        chunks = self.candidates(actions).transpose(1, 2).float()
        return chunks, self.scores(hidden[rows, turn.first_action + turn.steps]).float()


def fresh_turn_heads(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """New weights of TurnHeads by parameter name, float32, the same for a seed (Family.fresh_std)."""
    std = FAMILIES[config.family].fresh_std
    assert std is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        heads = TurnHeads(config)
    return {name: torch.empty(p.shape).normal_(std=std, generator=generator) for name, p in heads.named_parameters()}
