"""The losses on cases small enough to know (the golden cases compare them on whole chunks)."""

from __future__ import annotations

import torch

from xr0_engine.training.losses import error_weights, frequency_loss, mse_loss


def test_weights_are_relative_to_the_mean_over_the_mask_and_clamped():
    error = torch.tensor([[[1.0, 2.0, 30.0, 100.0], [0.0, 1.0, 2.0, 0.2]]])
    mask = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]])
    # The mean over the mask is 6; where it is 0, the error itself is clamped.
    expected = torch.tensor([[[0.5, 0.5, 5.0, 5.0], [0.5, 0.5, 0.5, 0.5]]])
    torch.testing.assert_close(error_weights(error, mask), expected)


def test_mse_counts_supervised_elements_only():
    velocity, target = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 9.0], [3.0, 9.0]]])
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    weights = torch.tensor([[[1.0, 1.0], [2.0, 1.0]]])
    assert mse_loss(velocity, target, mask, weights).item() == (1 + 2 * 9) / 2


def test_frequency_loss_of_a_constant_error_is_its_mean_bin():
    velocity, target = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    target[..., 1] = 50
    mask = torch.ones(1, 4, 2)
    mask[..., 1] = 0
    ones = torch.ones(1, 4, 2)
    # A constant has the spectrum (4, 0, 0).
    torch.testing.assert_close(frequency_loss(velocity, target, mask, ones), torch.tensor(4 / 3))
    torch.testing.assert_close(frequency_loss(velocity, target, mask, ones, masked=False), torch.tensor(51 * 4 / 6))


def test_frequency_loss_weighs_each_sample_by_its_mean_weight():
    velocity, target, mask = torch.zeros(2, 4, 1), torch.ones(2, 4, 1), torch.ones(2, 4, 1)
    weights = torch.tensor([1.0, 3.0])[:, None, None].expand(2, 4, 1)
    for masked in (True, False):
        torch.testing.assert_close(frequency_loss(velocity, target, mask, weights, masked), torch.tensor(4 / 3 * 2))
