"""Post-training losses, in float32 (spec section 4.1).

All tensors are (B, T - P, A): batch, the steps behind the prefix, action columns. mask: 1 = supervised.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_RANGE = (0.5, 5.0)


def error_weights(l1_error: Tensor, mask: Tensor) -> Tensor:
    """Weights from the model's own errors |generated - action|: relative to their mean over the mask, clamped.

    Where the mask is 0 the error itself is clamped, as the released code does: only its unmasked frequency loss sees
    it.
    """
    mean = (l1_error * mask).sum() / mask.sum()
    return torch.where(mask > 0, l1_error / mean, l1_error).clamp(*WEIGHT_RANGE)


def mse_loss(velocity: Tensor, target: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error, mean over the mask. Returns a scalar."""
    return (weights * (velocity.float() - target.float()) ** 2 * mask).sum() / mask.sum()


def frequency_loss(velocity: Tensor, target: Tensor, mask: Tensor, weights: Tensor, masked: bool = True) -> Tensor:
    """Mean magnitude of the error's spectrum over time, each sample times its mean weight. Returns a scalar.

    masked: leave unsupervised elements out; False is the released code's reading, over all columns.
    """
    error = velocity.float() - target.float()
    if not masked:
        return (torch.fft.rfft(error, dim=1).abs().mean((1, 2)) * weights.mean((1, 2))).mean()
    spectrum = torch.fft.rfft(error * mask, dim=1).abs()
    active = mask.amax(1, keepdim=True)
    per_sample = (spectrum * active).sum((1, 2)) / (active.sum((1, 2)) * spectrum.shape[1])
    return (per_sample * (weights * mask).sum((1, 2)) / mask.sum((1, 2))).mean()
