"""Closed-loop validation: training is the same with it and without; what it says is kept, also by a run cut short."""

from __future__ import annotations

import filecmp
import random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.training import driving
from tests.training.driving import CALLS, KEPT
from tests.training.support import Numbered, config_for, metrics, robot_sample, train
from xr0_engine.cli import app
from xr0_engine.training.checkpoint import checkpoints
from xr0_engine.training.closed_loop import find_closed_loop, undisturbed
from xr0_engine.training.config import override

HERE = "tests.training.driving"
SHORT = ("optim.steps=4", "optim.warmup_steps=2", "run.log_every=1", "run.checkpoint_every=2")
EXACT = ("step", "loss", "grad_norm", "loss_by_step", "loss_by_time")


def config(base, name=None, recipe="finetune_head"):
    driven = [f"run.closed_loop={HERE}:{name}", "run.closed_loop_every=3"] if name else []
    return config_for(recipe, base, *SHORT, *driven)


def losses(lines):
    return [{name: line[name] for name in EXACT} for line in lines if "loss" in line]


class Cut(Numbered):
    """Ends as a killed process does, at the fourth micro-batch."""

    def __next__(self):
        if self.number >= 3:
            raise InterruptedError
        return super().__next__()


@pytest.fixture(scope="module")
def without(base, tmp_path_factory):
    return losses(train(config(base), tmp_path_factory.mktemp("without")))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The folder of a run that drives."""
    CALLS.clear()
    folder = tmp_path_factory.mktemp("whole")
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    train(config(base, "follows"), folder)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    return folder


def test_training_is_the_same_bit_for_bit_and_what_it_says_is_kept(whole, without):
    lines = metrics(whole)
    assert losses(lines) == without
    said = {line["step"]: line["closed_loop/error"] for line in lines if "closed_loop/error" in line}
    # Before the first step, every third one, after the last.
    assert list(said) == [0, 3, 4]
    assert len(set(said.values())) == 3
    assert lines[0] == {
        "step": 0,
        "closed_loop/error": said[0],
        "closed_loop/calls": 1.0,
        "closed_loop/followed": 0.0,
    }
    assert (whole / "curve.png").stat().st_size > 1_000
    assert sorted(path.name for path in whole.iterdir()) == [
        *("checkpoints", "curve.png", "metrics.jsonl", "model", "tensorboard")
    ]


def test_a_run_that_is_cut_short_says_and_learns_the_same(base, whole, without, tmp_path):
    driven = config(base, "follows")
    with pytest.raises(InterruptedError):
        train(driven, tmp_path, source=Cut(robot_sample, driven.data.batch_size))
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000002"
    assert metrics(tmp_path)[-1]["step"] == 3
    resumed = train(driven, tmp_path)
    assert losses(resumed) == without
    errors = [[line.get("closed_loop/error") for line in lines] for lines in (resumed, metrics(whole))]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("recipe", ["post_train_sync", "pretrain_dit"])
def test_the_engine_has_the_weights_that_are_exported(recipe, base, tmp_path):
    KEPT[:] = [tmp_path / "run", tmp_path / "kept"]
    train(config(base, "kept", recipe), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "model").iterdir())
    assert filecmp.cmpfiles(tmp_path / "run" / "model", tmp_path / "kept", names, shallow=False) == (names, [], [])


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        ("failing", RuntimeError, r"run.closed_loop: .*:failing failed: KeyError: 'arm' \(.*driving.py, line \d+\)"),
        ("nothing", ValueError, r":nothing returned \{\}: expected numbers by name"),
        ("not_a_number", ValueError, "returned success = nan: expected a finite number"),
        ("unmarked", ValueError, "not marked as a closed-loop validation: write @closed_loop above it"),
        ("gone", ValueError, "has no function 'gone'; marked as closed-loop validation: follows, kept, moves, failing"),
    ],
)
def test_what_is_wrong_with_it_is_told_before_the_first_step(name, error, complaint, base, tmp_path):
    with pytest.raises(error, match=complaint):
        train(config(base, name), tmp_path)
    assert not (tmp_path / "closed-loop").exists()
    assert not (tmp_path / "metrics.jsonl").exists() or metrics(tmp_path) == []


def test_it_is_looked_for_before_anything_is_read(tmp_path):
    arguments = ["model.checkpoint=c", "data.robot=d", "data.statistics=s", "run.closed_loop=nowhere:drive"]
    result = CliRunner().invoke(app, ["train", "finetune_head", *arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "run.closed_loop: nowhere:drive: there is no module nowhere" in result.output


def test_a_vlm_alone_does_not_drive(base):
    with pytest.raises(ValueError, match=r"run\.closed_loop: expected none with objective choice"):
        override(config_for("pretrain_vlm", base), [f"run.closed_loop={HERE}:follows"])


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()

    with undisturbed(torch.device("cpu")):
        expected = draw()
    with undisturbed(torch.device("cpu")):
        assert draw() == expected
    assert draw() == expected


def test_found_by_name():
    assert find_closed_loop(f"{HERE}:follows") is driving.follows
