"""Losses, in float32: post-training (spec section 4.1) and Choice Policies (section 4.2).

mask: 1 = supervised. In the post-training losses all tensors are (B, T - P, A): batch, the steps behind the prefix,
action columns. A batch without anything supervised has loss 0. count: what a mean divides by, that of the whole step
where the batch is a part of one (counts.py); None = of this batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_RANGE = (0.5, 5.0)


def error_weights(l1_error: Tensor, mask: Tensor) -> Tensor:
    """Weights from the model's own errors |generated - action|: relative to their mean over the mask, clamped.

    Where the mask is 0 the error itself is clamped, as the released code does: only its unmasked frequency loss sees
    it.
    """
    mean = (l1_error * mask).sum() / _count(mask)
    # Without any error all weigh alike, the least.
    relative = l1_error / torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(mask > 0, relative, l1_error).clamp(*WEIGHT_RANGE)


def mse_loss(velocity: Tensor, target: Tensor, mask: Tensor, weights: Tensor, count: float | None = None) -> Tensor:
    """Weighted squared error, mean over the mask. count: supervised elements. Returns a scalar."""
    total = (weights * (velocity.float() - target.float()) ** 2 * mask).sum()
    return total / (_count(mask) if count is None else count)


def frequency_loss(
    velocity: Tensor,
    target: Tensor,
    mask: Tensor,
    weights: Tensor,
    masked: bool = True,
    count: float | None = None,
) -> Tensor:
    """Mean magnitude of the error's spectrum over time, each row times its mean weight. Returns a scalar.

    masked: leave unsupervised elements out; False is the released code's reading, over all columns. count: rows, which
    weigh alike.
    """
    error = velocity.float() - target.float()
    rows = len(error) if count is None else count
    if not masked:
        return (torch.fft.rfft(error, dim=1).abs().mean((1, 2)) * weights.mean((1, 2))).sum() / rows
    spectrum = torch.fft.rfft(error * mask, dim=1).abs()
    active = mask.amax(1, keepdim=True)
    per_row = (spectrum * active).sum((1, 2)) / (_count(active, (1, 2)) * spectrum.shape[1])
    return (per_row * (weights * mask).sum((1, 2)) / _count(mask, (1, 2))).sum() / rows


def spectrum_selection(mask: Tensor, excluded: Sequence[int]) -> Tensor:
    """Where XR-1's spectrum term looks: (B, T - P, A) -> (B, F, A), 1 = this bin of this column counts.

    Of samples whose last step is supervised, the mask's first F time rows stand for the F bins, as in the released
    code (spec section 8): what a column does there, not whether it is supervised at all, decides. excluded:
    columns that never count.
    """
    bins = mask.shape[1] // 2 + 1
    selected = mask[:, :bins] * (mask[:, -1:].amax(2, keepdim=True) > 0)
    selected[:, :, [column for column in excluded if column < mask.shape[2]]] = 0
    return selected


def spectrum_loss(
    velocity: Tensor, target: Tensor, selected: Tensor, weights: Tensor, count: float | None = None
) -> Tensor:
    """XR-1's spectrum term: mean magnitude of the error's spectrum over what is selected, samples weighed by their mean
    weight. selected: of spectrum_selection; count: how much of that. Returns a scalar."""
    spectrum = torch.fft.rfft(velocity.float() - target.float(), dim=1).abs()
    total = (spectrum * selected * weights.mean((1, 2), keepdim=True)).sum()
    return total / (_count(selected) if count is None else count)


def candidate_errors(candidates: Tensor, action: Tensor, mask: Tensor) -> Tensor:
    """L1 of every candidate chunk, mean over the mask: (B, N, T, A), (B, T, A), (B, T, A) -> (B, N)."""
    error = (candidates.float() - action[:, None]).abs() * mask[:, None]
    return error.sum((2, 3)) / _count(mask, (1, 2))[:, None]


def choice_losses(
    candidates: Tensor, scores: Tensor, action: Tensor, mask: Tensor, count: float | None = None
) -> tuple[Tensor, Tensor]:
    """Winner-takes-all L1, and the scores' regression to the candidates' L1 (spec section 4.2). Returns two scalars.

    candidates: (B, N, T, A); scores: (B, N), the predicted L1 of each. The first has a gradient in the candidate
    closest to the action alone, the second in the scores alone. Samples without anything supervised do not count;
    count: those that do.
    """
    errors = candidate_errors(candidates, action, mask)
    counts = (mask.sum((1, 2)) > 0).float()
    samples = _count(counts) if count is None else count
    # amin would share its gradient out among equals; the first of them has it.
    least = errors.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)
    winner = (least * counts).sum() / samples
    regression = (((scores.float() - errors.detach()) ** 2).mean(1) * counts).sum() / samples
    return winner, regression


def next_token_loss(logits: Tensor, labels: Tensor, count: float | None = None) -> Tensor:
    """Cross entropy, mean over the tokens: (N, vocabulary), (N,) int64. count: tokens. Returns a scalar."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / (max(1, len(labels)) if count is None else count)


def _count(mask: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    return mask.sum(dim).clamp(min=1)
