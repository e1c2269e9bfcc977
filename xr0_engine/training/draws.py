"""What is random in a flow-matching step: noise, time, prefix length, hidden prefix columns (spec section 4.1).

Every draw comes from a generator made from (seed, number of the micro-batch): a resumed run, and one spread over other
processes, sees the same numbers without any generator's state being saved. Drawn on the CPU, so alike on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xr0_engine.training.config import FlowConfig

LATEST_TIME = 0.999
BETA = 1.5
KEPT_PREFIX = 2
"""The last prefix actions, which column dropout never hides."""


@dataclass(frozen=True)
class FlowDraw:
    """One micro-batch's draw. M = repeat * batch rows; row r * batch + b is draw r of sample b.

    noise: (M, T, A) float32. t: (M,) float32. prefix_length: of every row. hidden: (prefix_length,) bool, prefix
    actions that the noisy ones do not see.
    """

    noise: Tensor
    t: Tensor
    prefix_length: int
    hidden: Tensor


def micro_batch_generator(seed: int, number: int) -> torch.Generator:
    """number: of the micro-batch, counted over all processes."""
    # torch's generator reads 32 bits of its seed and does not mix them.
    (mixed,) = np.random.SeedSequence((seed, number)).generate_state(1)
    return torch.Generator().manual_seed(int(mixed))


def draw_flow(config: FlowConfig, generator: torch.Generator, batch: int, length: int, width: int) -> FlowDraw:
    rows = config.repeat * batch
    prefix_length = draw_prefix_length(config, generator, length)
    hidden = torch.rand(prefix_length, generator=generator) < config.column_dropout
    hidden[max(0, prefix_length - KEPT_PREFIX) :] = False
    return FlowDraw(
        noise=torch.randn(rows, length, width, generator=generator),
        t=draw_times(config, generator, rows),
        prefix_length=prefix_length,
        hidden=hidden,
    )


def draw_times(config: FlowConfig, generator: torch.Generator, rows: int) -> Tensor:
    """(rows,) float32, 0 = noise."""
    if config.time == "logistic_normal":
        return torch.randn(rows, generator=generator).sigmoid()
    uniform = torch.rand(rows, generator=generator)
    if config.time == "uniform":
        return uniform
    # Beta(a, 1) has the distribution function u^a.
    return LATEST_TIME * (1 - uniform ** (1 / BETA))


def longest_prefix(config: FlowConfig, length: int) -> int:
    """The longest that is drawn for chunks of so many actions; 0: there are none."""
    # A chunk that is all prefix would leave nothing to learn.
    return 0 if config.prefix == "none" else min(config.max_prefix, length - 1)


def draw_prefix_length(config: FlowConfig, generator: torch.Generator, length: int) -> int:
    longest = longest_prefix(config, length)
    if longest < 1:
        return 0
    if config.prefix == "paper":
        return int(torch.randint(0, longest + 1, (), generator=generator))
    with_prefix = bool(torch.rand((), generator=generator) < 0.5)
    drawn = int(torch.randint(1, longest + 1, (), generator=generator))
    return drawn if with_prefix else 0


def hide_columns(mask: Tensor, hidden: Tensor, prefix_length: int, chunk_length: int) -> Tensor:
    """The DiT's attention mask with the hidden prefix actions invisible to the noisy actions.

    mask: (M, 1, Q, N + Q) bool, as dit_geometry makes it; hidden: (prefix_length,) bool.
    """
    if not bool(hidden.any()):
        return mask
    mask = mask.clone()
    noisy, first = chunk_length - prefix_length, mask.shape[-1] - chunk_length
    mask[:, :, -noisy:, first : first + prefix_length] &= ~hidden.to(mask.device)
    return mask
