"""Whole runs on tasks small enough to learn in seconds: what is learned, resumed, exported, refused."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from tests.training.support import (
    FORKED,
    ROBOT_TYPE,
    Numbered,
    config_for,
    metrics,
    robot_sample,
    statistics,
    train,
    values,
    without_supervision,
)
from xr0_engine import Engine, Observation
from xr0_engine.training.checkpoint import checkpoints
from xr0_engine.training.distributed import world
from xr0_engine.training.trainer import Trainer


class Stopped(Exception):
    pass


class StopsAt(Numbered):
    """A source that fails like a process that is killed: in the middle of a run."""

    last = 10**9

    def __next__(self):
        if self.number >= self.last:
            raise Stopped
        return super().__next__()


def test_a_run_learns_and_the_engine_loads_what_it_made(base, tmp_path):
    config = config_for(
        "pretrain_dit", base, "optim.steps=80", "run.validate_every=40", "data.batch_size=8", "run.checkpoint_every=40"
    )
    held_out = [robot_sample(10**6 + number) for number in range(16)]
    lines = train(config, tmp_path, validation=lambda: held_out)
    losses = values(lines, "loss")
    assert losses[-1] < 0.5 * losses[0]
    assert [line["step"] for line in lines if "validation/l1" in line] == [0, 40, 80]
    assert lines[-1]["validation/l1"] < 0.5 * lines[0]["validation/l1"]
    assert lines[-1]["validation/ratio"] > 1.5
    assert lines[-1]["validation/baseline_l1"] == pytest.approx(
        float(np.mean([np.abs(sample.actions[sample.mask]).mean() for sample in held_out])), rel=1e-5
    )
    assert len(lines[-1]["validation/l1_by_step"]) == 6
    assert len(lines[-1]["loss_by_step"]) == 6
    assert len(lines[-1]["loss_by_time"]) == 5
    assert {"grad_norm", "learning_rate", "steps_per_s", "samples_per_s", "tflops", "memory_gib"} <= lines[-1].keys()
    assert (tmp_path / "curve.png").stat().st_size > 1_000
    assert list((tmp_path / "tensorboard").iterdir())

    engine = Engine.from_pretrained(tmp_path / "model", dtype="float32")
    assert engine.robot_types == (ROBOT_TYPE,)
    assert engine.config.std_epsilon == 1e-6
    errors, baselines = [], []
    for sample in held_out:
        chunk = engine.infer(Observation(sample.images, sample.instruction, sample.state, prepared=True), seed=0)
        errors.append(np.abs(chunk.actions - sample.actions)[sample.mask].mean())
        baselines.append(np.abs(sample.actions)[sample.mask].mean())
    assert sum(errors) < 0.75 * sum(baselines)


@pytest.mark.parametrize(
    "recipe",
    ["post_train_sync", "post_train_async", "released_async", "released_sync", "training_rtc", "finetune_head"],
)
def test_recipe_runs_and_says_what_it_is_in_the_export(recipe, base, tmp_path):
    config = config_for(recipe, base, "optim.steps=2", "optim.warmup_steps=1", "flow.frequency_weight=1")
    lines = train(config, tmp_path)
    assert math.isfinite(lines[-1]["loss"])
    assert lines[-1]["frequency"] > 0
    trained = Engine.from_pretrained(tmp_path / "model").config
    expected = (4, 10) if recipe in ("post_train_async", "released_async", "released_sync") else (None, 0)
    assert (trained.head.local_window, trained.head.position_offset) == expected
    # Of 6 actions, one is left to learn.
    assert trained.head.max_prefix == (5 if recipe in ("post_train_async", "released_async", "training_rtc") else 0)
    assert trained.normalize_instruction == (not recipe.startswith("released"))


def test_bfloat16_keeps_float32_masters(base, tmp_path):
    """The published precision, activations of the vision tower recomputed, two micro-batches a step."""
    config = config_for(
        "post_train_async",
        base,
        *("model.dtype=bfloat16", "model.checkpoint_activations=true", "optim.accumulate=2"),
        *("optim.steps=2", "optim.warmup_steps=0", "optim.peak_lr=1e-4"),
    )
    with world() as here:
        trainer = Trainer(config, tmp_path, here, Numbered(robot_sample, 4), None, statistics())
        before = {name: p.full_tensor().clone() for name, p in trainer.policy.named_parameters() if p.requires_grad}
        trainer.run()
        after = {name: p.full_tensor() for name, p in trainer.policy.named_parameters() if p.requires_grad}
    assert {value.dtype for value in after.values()} == {torch.float32}
    # Steps of 1e-4 would be lost in bfloat16 weights of order 0.1 and more.
    changed = [float((after[name] != before[name]).float().mean()) for name in after]
    assert min(changed) > 0
    assert sum(changed) / len(changed) > 0.8
    assert math.isfinite(metrics(tmp_path)[-1]["loss"])


def test_resumed_after_an_error_the_losses_are_the_same_bit_for_bit(base, tmp_path):
    config = config_for(
        "post_train_async", base, "optim.steps=8", "optim.warmup_steps=2", "run.log_every=1", "run.checkpoint_every=3"
    )
    whole = train(config, tmp_path / "whole")
    source = StopsAt(robot_sample, config.data.batch_size)
    source.last = 7
    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", source=source)
    assert checkpoints(tmp_path / "cut" / "checkpoints")[-1].name == "step-00000006"
    resumed = train(config, tmp_path / "cut")
    assert [line["step"] for line in resumed] == list(range(1, 9))
    exact = ("loss", "grad_norm", "loss_by_step", "loss_by_time")
    assert [{name: line[name] for name in exact} for line in resumed] == [
        {name: line[name] for name in exact} for line in whole
    ]
    first, second = (tmp_path / run / "model" / "model-00001-of-00001.safetensors" for run in ("whole", "cut"))
    assert first.read_bytes() == second.read_bytes()


def test_cut_before_the_first_checkpoint_it_reports_anew(base, tmp_path):
    config = config_for("finetune_head", base, "optim.steps=2", "run.log_every=1")
    held_out = [robot_sample(10**6)]
    source = StopsAt(robot_sample, config.data.batch_size)
    source.last = 1
    with pytest.raises(Stopped):
        train(config, tmp_path, source=source, validation=lambda: held_out)
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]
    assert [line["step"] for line in train(config, tmp_path, validation=lambda: held_out)] == [0, 1, 2]


class Slow(Numbered):
    def __next__(self):
        time.sleep(0.05)
        return super().__next__()


OFTEN = ("optim.steps=100000", "run.log_every=1", "run.checkpoint_every=2")


def endless_run(base, folder):
    train(config_for("pretrain_dit", base, *OFTEN), folder, source=Slow(robot_sample, 4))


def test_killed_at_any_moment_it_keeps_a_whole_checkpoint(base, tmp_path):
    run = FORKED.Process(target=endless_run, args=(base, tmp_path))
    run.start()
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(checkpoints(tmp_path / "checkpoints")) < 2:
            assert run.is_alive()
            time.sleep(0.02)
    finally:
        run.kill()
        run.join()
    last = checkpoints(tmp_path / "checkpoints")[-1]
    step = int(last.name.rpartition("-")[2])
    before = metrics_up_to(tmp_path, step)
    source = StopsAt(robot_sample, 4)
    source.last = step + 2
    with pytest.raises(Stopped):
        train(config_for("pretrain_dit", base, *OFTEN), tmp_path, source=source)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, step + 3))
    assert lines[:step] == before


def metrics_up_to(folder, step):
    whole = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [json.loads(line) for line in whole][:step]


def test_invalid_episodes_teach_nothing(base, tmp_path):
    config = config_for("finetune_head", base, "optim.steps=2", "optim.warmup_steps=0", "optim.weight_decay=0")
    lines = train(config, tmp_path, make=lambda number: without_supervision(robot_sample(number)))
    assert lines[-1]["loss"] == 0
    assert lines[-1]["grad_norm"] == 0
    assert lines[-1]["loss_by_step"] == [None] * 6


def test_nan_stops_the_run_and_tells_the_samples(base, tmp_path):
    def poisoned(number):
        sample = robot_sample(number)
        if number == 13:
            sample.state[0, 0] = 1e38
        return sample

    config = config_for("finetune_head", base, "optim.steps=9", "run.checkpoint_every=2")
    with pytest.raises(RuntimeError, match=r"step 4: .* not finite.*episode.json:12, episode.json:13"):
        train(config, tmp_path, make=poisoned)
    aside = tmp_path / "nan-step-00000004"
    (batch,) = json.loads((aside / "batch.json").read_text())
    assert batch["samples"] == [f"episode.json:{number}" for number in range(12, 16)]
    assert json.loads((aside / "progress.json").read_text())["step"] == 3
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        pytest.param(statistics(7), r"robot type 'bridge_delta' has shape \(7, 32\)", id="length"),
        pytest.param({}, "there are none", id="none"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_before_any_work(tables, complaint, base, tmp_path):
    with world() as here, pytest.raises(ValueError, match=complaint):
        Trainer(config_for("finetune_head", base), tmp_path, here, Numbered(robot_sample, 4), None, tables)
    assert list(tmp_path.iterdir()) == []


def choice_run(base, folder, *assignments, **more):
    config = config_for(
        "pretrain_vlm",
        base,
        "data.batch_size=8",
        "data.language_every=3",
        "run.log_every=15",
        "optim.warmup_steps=5",
        *assignments,
    )
    return train(config, folder, make=lambda number: robot_sample(number, two_modes=True), **more)


@pytest.fixture(scope="module")
def co_trained(base, tmp_path_factory):
    """A run's folder: four candidates, every third micro-batch vision-language data."""
    folder = tmp_path_factory.mktemp("choice") / "run"
    choice_run(base, folder, "optim.steps=75", "choice.candidates=4")
    return folder


def test_choice_policies_learn_both_modes_and_language(base, co_trained, tmp_path):
    many = metrics(co_trained)
    single = choice_run(base, tmp_path / "single", "optim.steps=75", "choice.candidates=1")
    winner, language = values(many, "winner_l1"), values(many, "next_token")
    assert winner[-1] < 0.5 * winner[0]
    assert language[-1] < 0.5 * language[0]
    # Up or down is not in the observation: a single regression cannot do better than their middle.
    assert winner[-1] < 0.5 * values(single, "winner_l1")[-1]


def test_without_language_data_the_next_token_loss_rises(co_trained, tmp_path):
    learned = values(metrics(co_trained), "next_token")[-1]
    # From there, robot data alone; a last micro-batch of language tells what is left.
    alone = choice_run(
        co_trained / "model", tmp_path / "alone", "optim.steps=30", "data.language_every=30", "run.log_every=30"
    )
    assert values(alone, "next_token")[-1] > 2 * learned
    assert torch.isfinite(torch.tensor(values(alone, "winner_l1"))).all()
