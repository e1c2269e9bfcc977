"""AdamW with moments of a byte each: what it keeps, what it learns beside torch's, and that a run goes on exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.training.support import Numbered, config_for, metrics, robot_sample, statistics, train
from tests.training.test_average import Stopped, StopsAtThree
from xr0_engine.training.checkpoint import checkpoints
from xr0_engine.training.distributed import world
from xr0_engine.training.moments import AdamW8bit, blocks_in_row, levels, moment_bytes
from xr0_engine.training.trainer import Trainer

CPU = torch.device("cpu")
BETAS = (0.9, 0.95)
SIZES = [(256, 512), (512, 256), (256, 64)]
SAME_STEP = 1e-6
"""Of a weight's size 1: the first step divides nothing that was rounded, but in another order."""
AS_GOOD = 0.02
"""Of the loss with float32 moments. Seen: below 0.001."""


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes) for sizes in SIZES]
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])


def groups_of(model):
    return [{"params": list(model.parameters()), "weight_decay": 0.1}]


def fitted(make, steps):
    """The mean loss of the last steps of learning what another network says, and the optimiser."""
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 64)).requires_grad_(False)
    model = network()
    optimizer, losses = make(groups_of(model)), []
    for _ in range(steps):
        inputs = torch.randn(32, 256)
        loss = (model(inputs) - teacher(inputs)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20, optimizer, model


@pytest.mark.parametrize("is_signed", [True, False])
def test_levels_are_256_that_reach_over_decades(is_signed):
    values, borders = levels(is_signed, CPU)
    assert len(values.unique()) == 256 == len(borders) + 1
    assert bool((values.diff() > 0).all())
    assert values[-1] == 1
    assert 0 in values
    assert bool((torch.bucketize(values, borders) == torch.arange(256)).all())
    assert values[values > 0].min() < 1e-6
    # Of the uppermost decade.
    share = torch.rand(4096) * 0.9 + 0.1
    rounded = values[torch.bucketize(share, borders)]
    assert bool(((rounded - share).abs() < 0.08 * share).all())


def test_what_divides_is_never_rounded_to_zero():
    values, borders = levels(False, CPU)
    assert values[torch.bucketize(torch.tensor([1e-20]), borders)] > 0
    assert values[torch.bucketize(torch.tensor([0.0]), borders)] == 0


def test_the_first_step_is_that_of_torch():
    model = network()
    other = copy.deepcopy(model)
    model(torch.randn(8, 256)).square().sum().backward()
    for theirs, mine in zip(other.parameters(), model.parameters(), strict=True):
        theirs.grad = mine.grad
    torch.optim.AdamW(groups_of(other), lr=1e-2, betas=BETAS).step()
    AdamW8bit(groups_of(model), 1e-2, BETAS).step()
    for theirs, mine in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=SAME_STEP)


def test_it_learns_as_torch_does_in_a_quarter_of_the_memory():
    theirs, _, _ = fitted(lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=BETAS), 200)
    mine, optimizer, model = fitted(lambda groups: AdamW8bit(groups, 1e-3, BETAS), 200)
    assert abs(mine / theirs - 1) < AS_GOOD
    held = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    took = sum(value.numel() * value.element_size() for value in held)
    assert took == sum(moment_bytes(parameter.shape) for parameter in model.parameters())
    assert took < 0.27 * 2 * sum(parameter.numel() * 4 for parameter in model.parameters())


def test_pieces_of_a_weight_are_stepped_as_the_whole(monkeypatch):
    whole, _, _ = fitted(lambda groups: AdamW8bit(groups, 1e-3, BETAS), 3)
    monkeypatch.setattr("xr0_engine.training.moments.PIECE", 1000)
    assert fitted(lambda groups: AdamW8bit(groups, 1e-3, BETAS), 3)[0] == whole


@pytest.mark.parametrize(
    ("shape", "blocks"), [((8, 512), 2), ((8, 300), 1), ((8, 16, 16), 1), ((8, 16), 0), ((512,), 0)]
)
def test_blocks_stay_in_their_rows(shape, blocks):
    assert blocks_in_row(torch.Size(shape)) == blocks


SHORT = ("optim.steps=4", "optim.warmup_steps=0", "run.log_every=1", "run.checkpoint_every=2", "optim.moments=8bit")


def test_a_run_resumes_bit_for_bit(base, tmp_path):
    config = config_for("post_train_sync", base, *SHORT, "data.batch_size=2", "flow.repeat=1")
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", source=StopsAtThree(robot_sample, 2))
    resumed = train(config, tmp_path / "cut")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    states = []
    for name in ("whole", "cut"):
        assert len(checkpoints(tmp_path / name / "checkpoints")) > 1
        with world() as here:
            source = Numbered(robot_sample, 2, here.rank, here.size)
            states.append(Trainer(config, tmp_path / name, here, source, None, statistics()).checkpointer._state())
            states[-1] = {key: whole_of(value) for key, value in states[-1].items()}
    codes = [key for key in states[0] if key.endswith(".codes")]
    assert any(bool(states[0][key].any()) for key in codes)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def whole_of(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def test_losses_are_close_to_those_of_float32(base, tmp_path):
    short = (*SHORT[:4], "data.batch_size=2", "flow.repeat=1")
    exact = train(config_for("post_train_sync", base, *short), tmp_path / "exact")
    rounded = train(config_for("post_train_sync", base, *short, SHORT[4]), tmp_path / "rounded")
    pairs = list(zip([line["loss"] for line in exact], [line["loss"] for line in rounded], strict=True))
    assert pairs[0][0] == pairs[0][1]
    assert all(abs(mine / theirs - 1) < AS_GOOD for theirs, mine in pairs)
    assert metrics(tmp_path / "exact") != metrics(tmp_path / "rounded")
