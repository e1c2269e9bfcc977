"""Open-loop validation: what one chunk, the mean of several and the training data's mean are worth; and its picture."""

from __future__ import annotations

import json
import math
import weakref
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.training.support import ACTIVE, LENGTH, WIDTH, robot_sample, statistics, tiny_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.training.batch import Collator
from xr0_engine.training.distributed import world
from xr0_engine.training.validation import _shares, plot_run, validate

DRAWS = 8
SAMPLES = 400
World = namedtuple("World", "size rank")
# 400 samples of 18 numbers, a sample's being independent: five standard errors of a mean absolute error.
TOLERANCE = 0.03


class Blind(torch.nn.Module):
    """Has learnt how actions are spread, and sees nothing: its chunks are drawn from the training data's spread."""

    def predict(self, batch, noise):
        return noise


@pytest.fixture(scope="module")
def collate(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("base") / "model")
    return Collator(folder, ModelConfig.load(folder), statistics())


def samples():
    for number in range(SAMPLES):
        actions = np.zeros((LENGTH, WIDTH), np.float32)
        actions[:, :ACTIVE] = 0.5 * np.random.default_rng(number).standard_normal((LENGTH, ACTIVE))
        yield replace(robot_sample(number), actions=actions)


def test_the_mean_of_several_chunks_is_compared_with_a_mean(collate):
    with world() as here:
        several, one = (validate(Blind(), collate, samples(), 64, statistics(), here, draws) for draws in (DRAWS, 1))
    # Two draws of a normal distribution are the square root of two further apart than one is from the mean.
    assert several["baseline_l1"] == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=TOLERANCE)
    assert several["ratio"] == pytest.approx(1 / math.sqrt(2), rel=TOLERANCE)
    assert several["ratio_mean"] == pytest.approx(1 / math.sqrt(1 + 1 / DRAWS), rel=TOLERANCE)
    assert several["l1_mean"] * several["ratio_mean"] == pytest.approx(several["baseline_l1"])
    # The chunk that is executed is the same whatever others are drawn.
    assert {key: several[key] for key in one if "mean" not in key} == {
        key: value for key, value in one.items() if "mean" not in key
    }
    assert one["l1_mean"] == one["l1"]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 19, 24, 25])
def test_every_process_has_as_many_batches_of_samples_that_are_dealt_out(count):
    """A process with one batch more than another would wait for it for ever."""
    size, batch_size = 3, 4
    dealt = (
        [list(_shares(range(count), batch_size, World(size, rank))) for rank in range(size)] if count >= size else []
    )
    if not dealt:
        with pytest.raises(ValueError, match="at least one sample for each of 3 processes, got 1"):
            list(_shares(range(count), batch_size, World(size, 0)))
    for rank, batches in enumerate(dealt):
        assert [len(batch) for batch in batches] == [len(batch) for batch in dealt[0]]
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert [sample for batch in batches for sample in batch] == list(range(rank, count - count % size, size))


def test_no_more_samples_are_held_than_two_batches(collate):
    """Of videos a sample is several megabytes, and those of a run hundreds of them."""
    alive = weakref.WeakSet()
    most = 0

    def counted():
        nonlocal most
        for number in range(40):
            sample = robot_sample(number)
            alive.add(sample)
            most = max(most, len(alive))
            yield sample
            del sample

    with world() as here:
        told = validate(Blind(), collate, counted(), 4, statistics(), here)
        assert told == validate(Blind(), collate, [robot_sample(number) for number in range(40)], 4, statistics(), here)
    # The batch that is read, the one before it, and what is dealt to nobody yet.
    assert most <= 2 * 4 + 1


@pytest.mark.parametrize(
    ("more", "panels"),
    [
        ({}, 1),
        ({"closed_loop/success": 0.5}, 2),
        ({"l1_mean": 0.1}, 3),
        ({"closed_loop/success": 0.5, "l1_mean": None}, 4),
    ],
    ids=["loss", "closed loop", "open loop", "both, of a run begun before there was l1_mean"],
)
def test_the_picture_shows_what_the_run_has(more, panels, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    line = {"step": 1, "loss": 0.5}
    if "l1_mean" in more:
        told = {"l1": 0.1, "baseline_l1": 0.3, "ratio": 3.0, "l1_by_step": [0.1], "baseline_by_step": [0.3]}
        told |= {"l1_mean": more["l1_mean"]} if more["l1_mean"] else {}
        line |= {f"validation/{name}": value for name, value in told.items()}
    line |= {name: value for name, value in more.items() if name != "l1_mean"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    made = []
    real = plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    plot_run(tmp_path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1_000
    assert len(made[0][0].axes) == panels
    labels = {text for axes in made[0][0].axes for text in axes.get_legend_handles_labels()[1]}
    assert ("success" in labels) == ("closed_loop/success" in more)
    assert ("mean of the policy's chunks" in labels) == (more.get("l1_mean") is not None)
