"""Flow matching: the time convention, the schedule, the Euler loop and the training pair (spec sections 2.3, 2.5, 4.1);
guidance of the loop by the flow's own gradient (Black et al., arXiv 2506.07339).

t = 0 is noise and t = 1 is action; trainer and sampler both take it from here. Shapes: B batch, T actions, A columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Trace: TypeAlias = list[Tensor] | None
"""If a list, it receives z before each step and after the last: (B, T, A) float32 each."""

MAX_GUIDANCE = 5.0
"""The paper's beta: the most that the pull toward a guide counts. With few steps, more would overshoot."""


@dataclass(frozen=True)
class Guidance:
    """What a chunk is drawn toward while it is sampled. target: (B, T, A) float32, the model's units, read where its
    weight is above 0; weights: (B, T) float32, 0 to 1."""

    target: Tensor
    weights: Tensor

    @classmethod
    def of(cls, target: Tensor, length: Tensor, frozen: Tensor) -> Guidance:
        """length, frozen: (B,), how many actions of each row's target there are, and how many of them weigh 1."""
        return cls(target, guide_weights(length, frozen, target.shape[1]))


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


def bend(trace: list[Tensor], is_prefix: Tensor, action_mask: Tensor) -> Tensor:
    """(B,) float32: how far the velocities of a sampled chunk were from one straight line, 0 to 1.

    The root of sum_i |v_i - v|^2 over sum_i |v_i|^2, v_i the velocity of step i, v their mean: 0 where every step went
    the same way, as toward a single answer; near 1 where they cancel each other. trace: as euler_sample leaves it;
    given actions and masked columns count for nothing. 0 for chunks of which nothing was sampled.
    """
    velocities = torch.stack(trace).diff(dim=0) * (action_mask * ~is_prefix[..., None])
    apart = (velocities - velocities.mean(dim=0)).square().sum(dim=(0, 2, 3))
    return (apart / velocities.square().sum(dim=(0, 2, 3)).clamp(min=1e-12)).sqrt()


def guide_weights(length: Tensor, frozen: Tensor, chunk_length: int) -> Tensor:
    """(B,), (B,) -> (B, T) float32, the paper's soft mask: 1 for the frozen actions, then c (e^c - 1) / (e - 1) with c
    falling in equal steps from just below 1, and 0 from `length` on."""
    index = torch.arange(chunk_length, device=length.device)
    length, frozen = length[:, None], frozen[:, None]
    left = (length - index) / (length - frozen + 1)
    weights = torch.where(index < frozen, 1.0, left * torch.expm1(left) / math.expm1(1.0))
    return torch.where(index < length, weights, 0.0).float()


def guidance_scale(t: float, most: float = MAX_GUIDANCE) -> float:
    """How much the pull toward a guide counts at time t: (1 - t) / (t r^2), r^2 = (1 - t)^2 / (t^2 + (1 - t)^2), the
    variance of an action given z_t if actions are standard normal; clipped."""
    return most if t <= 0 else min(most, (t * t + (1 - t) ** 2) / (t * (1 - t)))


def guided_velocity(
    velocity: Callable[[Tensor, int], Tensor], z: Tensor, step: int, steps: int, action_mask: Tensor, guidance: Guidance
) -> Tensor:
    """The velocity, and toward the guide (pseudo-inverse guidance): v + scale J^T W (target - a), (B, T, A) float32.

    a = z + (1 - t) v is where the flow would end from here, J its Jacobian by z, W the guide's weights, 0 in masked
    columns. Arguments as euler_sample's; called where autograd works, not within torch.inference_mode.
    """
    t = step / steps
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity(z * action_mask, step).float()
        end = z + (1 - t) * v
        weights = guidance.weights[..., None] * action_mask
        # Masked, not multiplied: what stands beyond a guide's end may be anything.
        error = torch.where(weights > 0, weights * (guidance.target - end.detach()), 0.0)
        (pull,) = torch.autograd.grad(end, z, error)
    return v.detach() + guidance_scale(t) * pull


def euler_sample(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    prefix: Tensor,
    is_prefix: Tensor,
    action_mask: Tensor,
    steps: int,
    trace: Trace = None,
    guidance: Guidance | None = None,
) -> Tensor:
    """Integrate the flow from noise to actions; prefix positions stay as given, guidance draws on the others.

    velocity(z * action_mask, step) -> (B, T, A); noise, prefix (read where is_prefix), action_mask: (B, T, A);
    is_prefix: (B, T) bool. z stays float32, since rounding it moves the gripper by millimetres. Returns (B, T, A)
    float32; trace, if given, receives z before each step and after the last.
    """
    fixed = is_prefix[..., None]
    z = torch.where(fixed, prefix.float(), noise.float())
    for step in range(steps):
        if trace is not None:
            trace.append(z)
        if guidance is None:
            v = velocity(z * action_mask, step).float()
        else:
            v = guided_velocity(velocity, z, step, steps, action_mask, guidance)
        z = z + (v / steps).masked_fill(fixed, 0.0)
    if trace is not None:
        trace.append(z)
    return z
