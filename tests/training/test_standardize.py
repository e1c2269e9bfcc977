"""A vision tower with random weights, started by the pictures of the training data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.support import make_config
from tests.training.support import LENGTH, Numbered, config_for, robot_sample, statistics
from xr0_engine.model.vision import VisionTower
from xr0_engine.training.distributed import world
from xr0_engine.training.standardize import standardize_vision
from xr0_engine.training.trainer import Trainer

# Means and deviations of some thousand numbers in float32.
ROUNDING = 1e-4
GRIDS = ((4, 6), (2, 2))


def picture(number: int):
    """A grey one with a spot: what random weights hardly tell from another."""
    sample = robot_sample(number)
    image = np.full((64, 64, 3), 90, np.uint8)
    row, column = np.random.default_rng(number).integers(0, 56, 2)
    image[row : row + 8, column : column + 8] = (255, 30, 30)
    return replace(sample, images={"base": image})


def made(config) -> tuple[VisionTower, torch.Tensor]:
    torch.manual_seed(0)
    tower = VisionTower(config.vision)
    pixels = torch.randn(sum(height * width for height, width in GRIDS), config.vision.patch_dim) * 0.1 - 0.4
    return tower, pixels


def assert_standard(out: torch.Tensor) -> None:
    torch.testing.assert_close(out.mean(0), torch.zeros(out.shape[1]), atol=ROUNDING, rtol=0)
    assert float(out.std()) == pytest.approx(1, abs=0.05)


def test_what_the_tower_says_has_mean_0_and_deviation_1():
    tower, pixels = made(make_config())
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    changed = standardize_vision(tower, pixels, GRIDS)
    with torch.no_grad():
        assert_standard(tower.patch_embed(pixels))
        tokens = tower(pixels, GRIDS)
    assert len(tokens.deepstack) == len(tower.config.deepstack_layers)
    for out in (tokens.tokens, *tokens.deepstack):
        assert_standard(out)
    differs = {name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])}
    assert differs == set(changed)


@pytest.mark.parametrize(("pixels", "grids", "reason"), [(0, (), "has none"), (4, ((2, 2),), "all alike")])
def test_pictures_that_say_nothing_are_refused(pixels, grids, reason):
    tower, _ = made(make_config())
    with pytest.raises(ValueError, match=f"standardize_vision.*{reason}"):
        standardize_vision(tower, torch.ones(pixels, tower.config.patch_dim), grids)


def full(parameter: torch.Tensor) -> torch.Tensor:
    """Of a parameter that FSDP holds."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def trainer(base, folder, here, source, *more: str) -> Trainer:
    config = config_for("post_train_sync", base, "model.standardize_vision=true", "optim.steps=2", *more)
    return Trainer(config, folder, here, source, None, statistics(LENGTH))


def test_a_run_begins_with_it_and_trains_on_that_batch_too(base, tmp_path):
    with world() as here:
        source = Numbered(picture, 4)
        run = trainer(base, tmp_path, here, source)
        assert source.number == 0
        inputs = run.collate.robot(next(Numbered(picture, 4))).inputs
        tower = VisionTower(run.xr0.vision)
        tower.load_state_dict(
            {name: full(run.policy.get_parameter(f"vlm.model.visual.{name}")) for name in tower.state_dict()}
        )
        with torch.no_grad():
            hidden = tower(inputs.pixel_values, inputs.image_grids).tokens
        assert_standard(hidden)
        run.run()
        # Goes on from the checkpoint: not once more.
        again = trainer(base, tmp_path, here, Numbered(picture, 4))
        assert again.step == 2
        for name, value in again.policy.named_parameters():
            assert torch.equal(full(value), full(run.policy.get_parameter(name))), name


def test_it_is_refused_where_the_vlm_stays_as_it_is(base):
    with pytest.raises(ValueError, match=r"model\.standardize_vision: expected false with model\.train=head"):
        config_for("pretrain_dit", base, "model.standardize_vision=true")
