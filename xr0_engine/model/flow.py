"""Flow matching: the time convention, the schedule, the Euler loop and the training pair (spec sections 2.3, 2.5, 4.1).

t = 0 is noise and t = 1 is action; trainer and sampler both take it from here. Shapes: B batch, T actions, A columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Trace: TypeAlias = list[Tensor] | None
"""If a list, it receives z before each step and after the last: (B, T, A) float32 each."""


def flow_times(steps: int) -> Tensor:
    """(steps,) float32: where the velocity is evaluated, 0, 1/steps, ..., 1 - 1/steps."""
    return torch.arange(steps, dtype=torch.float32, device="cpu") / steps


def training_pair(noise: Tensor, action: Tensor, t: Tensor, is_prefix: Tensor) -> tuple[Tensor, Tensor]:
    """The point z_t = (1 - t) noise + t action, clean where is_prefix, and its target velocity action - noise.

    noise, action: (B, T, A); t: broadcastable to them; is_prefix: (B, T) bool.
    """
    z = torch.where(is_prefix[..., None], action, (1 - t) * noise + t * action)
    return z, action - noise


def prefix_positions(prefix_length: Tensor, chunk_length: int) -> Tensor:
    """(B,) -> (B, T) bool: which actions of the chunk are given."""
    return torch.arange(chunk_length, device=prefix_length.device) < prefix_length[:, None]


def euler_sample(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    prefix: Tensor,
    is_prefix: Tensor,
    action_mask: Tensor,
    steps: int,
    trace: Trace = None,
) -> Tensor:
    """Integrate the flow from noise to actions; prefix positions stay as given.

    velocity(z * action_mask, step) -> (B, T, A); noise, prefix (read where is_prefix), action_mask: (B, T, A);
    is_prefix: (B, T) bool. z stays float32, since rounding it moves the gripper by millimetres. Returns (B, T, A)
    float32; trace, if given, receives z before each step and after the last.
    """
    fixed = is_prefix[..., None]
    z = torch.where(fixed, prefix.float(), noise.float())
    for step in range(steps):
        if trace is not None:
            trace.append(z)
        z = z + (velocity(z * action_mask, step).float() / steps).masked_fill(fixed, 0.0)
    if trace is not None:
        trace.append(z)
    return z
