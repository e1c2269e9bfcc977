"""The fine-tuning step: the trainer's own, so many times, and nothing of it left behind."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import pytest

from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.measure import finetune
from xr0_engine.bench.results import read, write
from xr0_engine.training import recipes
from xr0_engine.training.trainer import Trainer

BATCH = 2
SETUP = Setup(CASES["libero"], "tiny", device="cpu", dtype="float32", threads=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The recipe's own step has 4 micro-batches of 4 samples."""
    recipe = recipes.finetune_head()
    few = replace(recipe, data=replace(recipe.data, batch_size=BATCH), optim=replace(recipe.optim, accumulate=1))
    monkeypatch.setattr(finetune, "finetune_head", lambda: few)


def test_so_many_steps_are_trained_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    steps = []
    train_step = Trainer._train_step

    def counted(self, *arguments):
        steps.append(self.optimizer.param_groups[0]["lr"])
        return train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    result, reason = finetune.measure(SETUP, 2, "xr0 bench finetune")
    assert reason is None
    assert len(steps) == finetune.WARM_UP + 2
    assert len(result.series["trainer"]["total"]) == 2
    assert result.facts["samples_per_step"] == BATCH
    assert 0 < result.facts["loss"] < 10
    assert result.facts["peak_memory_bytes"] > 2**20
    assert list(tmp_path.iterdir()) == []
    write(result, tmp_path / "it.json")
    assert read(tmp_path / "it.json") == result
    finetune.show(result)
    assert "finetune_head, libero, tiny" in capsys.readouterr().out


def test_what_interrupts_it_leaves_the_finished_steps(monkeypatch):
    take, batches = finetune._Samples.__next__, []

    def interrupted(self):
        batches.append(1)
        if len(batches) > finetune.WARM_UP + 1:
            raise KeyboardInterrupt
        return take(self)

    monkeypatch.setattr(finetune._Samples, "__next__", interrupted)
    result, reason = finetune.measure(SETUP, 9, "xr0 bench finetune")
    assert isinstance(reason, KeyboardInterrupt)
    assert not result.complete
    assert len(result.series["trainer"]["total"]) == 1


@pytest.mark.parametrize(
    ("setup", "rounds", "message"),
    [
        (SETUP, 0, "rounds: expected at least 1, got 0"),
        (Setup(CASES["libero"], "tiny", device="cpu", dtype="float16"), 1, "model.dtype"),
    ],
    ids=["rounds", "dtype"],
)
def test_wrong_arguments_are_refused(setup, rounds, message):
    with pytest.raises(ValueError, match=message):
        finetune.measure(setup, rounds, "")
