"""The losses on cases small enough to know (the golden cases compare them on whole chunks)."""

from __future__ import annotations

import torch

from xr0_engine.training.losses import (
    choice_losses,
    error_weights,
    frequency_loss,
    mse_loss,
    spectrum_loss,
    spectrum_selection,
)


def test_weights_are_relative_to_the_mean_over_the_mask_and_clamped():
    error = torch.tensor([[[1.0, 2.0, 30.0, 100.0], [0.0, 1.0, 2.0, 0.2]]])
    mask = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]])
    # The mean over the mask is 6; where it is 0, the error itself is clamped.
    expected = torch.tensor([[[0.5, 0.5, 5.0, 5.0], [0.5, 0.5, 0.5, 0.5]]])
    torch.testing.assert_close(error_weights(error, mask), expected)


def test_without_any_error_all_weigh_alike():
    error, mask = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    assert (error_weights(error, mask) == 0.5).all()


def test_of_equally_good_candidates_the_first_learns():
    candidates = torch.zeros(1, 3, 2, 1, requires_grad=True)
    winner, _ = choice_losses(candidates, torch.zeros(1, 3), torch.ones(1, 2, 1), torch.ones(1, 2, 1))
    winner.backward()
    assert winner.item() == 1
    assert candidates.grad[0, :, :, 0].tolist() == [[-0.5, -0.5], [0, 0], [0, 0]]


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


def test_a_spectrums_bins_are_selected_by_the_masks_first_rows():
    """As released: what is in use is not asked, but the first F of T time rows."""
    mask = torch.zeros(3, 6, 4)
    mask[0, :, 0] = 1
    mask[0, 2:, 1] = 1  # Rows 0 and 1 are not in use: bins 0 and 1 do not count.
    mask[0, :, 3] = 1  # Excluded.
    mask[1, :5] = 1  # Ends before the last step: out altogether.
    mask[2, 5, 2] = 1  # In use at the last step alone: nothing is selected.
    selected = spectrum_selection(mask, (3, 17))
    assert selected.shape == (3, 4, 4)
    expected = torch.zeros(3, 4, 4)
    expected[0, :, 0] = 1
    expected[0, 2:, 1] = 1
    assert torch.equal(selected, expected)


def test_spectrum_loss_is_the_mean_over_what_is_selected_times_the_samples_weight():
    velocity, target, mask = torch.zeros(2, 4, 2), torch.ones(2, 4, 2), torch.ones(2, 4, 2)
    weights = torch.ones(2, 4, 2)
    weights[1] = 3
    weights[1, :, 1] = 1
    selected = spectrum_selection(mask, (1,))
    # A constant has the spectrum (4, 0, 0); the weights' mean is over both columns, the excluded one too.
    torch.testing.assert_close(spectrum_loss(velocity, target, selected, weights), torch.tensor((4 + 2 * 4) / 6))
    torch.testing.assert_close(spectrum_loss(velocity, target, selected, weights, 3.0), torch.tensor(12 / 3.0))
    assert spectrum_loss(velocity, target, torch.zeros_like(selected), weights).item() == 0
