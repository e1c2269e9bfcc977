"""Rollouts in lockstep: what an engine gives in batches is what it gives alone, and what is told of a trial is true."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from xr0_engine.engine import Engine
from xr0_engine.lab.benchmark import PointBenchmark
from xr0_engine.lab.rollouts import roll_out, trials
from xr0_engine.lab.sizes import WIDTHS, lab_config, write_base
from xr0_engine.lab.tasks import CHUNK, REACHED, TASKS
from xr0_engine.model.weights import checkpoint_shapes
from xr0_engine.robot.normalize import STATISTICS_FILE

SAME = 1e-4
"""Of actions of 0.1: a product of matrices sums in another order in a batch of another size."""
CHASE, TWO = PointBenchmark("chase-four", events=1), PointBenchmark("chase-two", events=1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def an_engine(folder, task):
    write_base(folder, TASKS[task], depth=2)
    path = folder / STATISTICS_FILE
    raw = json.loads(path.read_text())
    std = np.zeros((CHUNK, 32))
    std[:, TASKS[task].columns] = 0.05
    raw["action_config"] = {TASKS[task].robot_type: {"mean": np.zeros_like(std).tolist(), "std": std.tolist()}}
    path.write_text(json.dumps(raw))
    return Engine.from_pretrained(folder, "cpu", "float32", "reference")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return an_engine(tmp_path_factory.mktemp("chase") / "model", "chase-four")


@pytest.mark.parametrize("mode", ["sync", "naive", "async", "guided"])
def test_together_as_alone(engine, mode):
    chosen = trials(CHASE, 3, mode, 3)
    together = roll_out(engine, CHASE, chosen, batch=2)
    (alone,) = roll_out(engine, CHASE, chosen[2:])
    assert np.allclose(alone.actions, together[2].actions, atol=SAME)
    assert np.array_equal(alone.chunks, together[2].chunks)
    assert not np.allclose(together[0].actions[:20], together[1].actions[:20], atol=SAME)


def test_again_is_the_same(engine):
    first, second = (roll_out(engine, CHASE, trials(CHASE, 3, "async", 2), batch=2) for _ in range(2))
    for rollout, other in zip(first, second, strict=True):
        assert np.array_equal(rollout.actions, other.actions)


@pytest.mark.parametrize("mode", ["sync", "naive", "async"])
def test_what_is_told_of_a_trial(engine, mode):
    for rollout in roll_out(engine, CHASE, trials(CHASE, 2, mode, 3)):
        calls = {call.number: call for call in rollout.calls}
        chosen = np.flatnonzero(rollout.chunks)
        assert len(chosen) > 30
        for step in chosen:
            call = calls[rollout.chunks[step]]
            assert np.allclose(call.chunk[rollout.indices[step]], rollout.actions[step])
            if mode != "sync" and call.number > 1:
                assert call.observed_step + rollout.indices[step] == step
                assert step >= call.takeover
        # In mode sync the robot holds still while it waits: chunks do not meet.
        assert len(rollout.seams) == (0 if mode == "sync" else len(set(rollout.chunks[chosen])) - 1)
        assert all(call.prefix_length == (3 if mode == "async" and call.number > 1 else 0) for call in rollout.calls)
        moved = np.linalg.norm(np.diff(rollout.positions, axis=0) - rollout.velocities[1:], axis=-1)
        assert moved.max() < 1e-9
        (counted,) = [event for event in rollout.events if event.counts]
        after = slice(counted.step, counted.end)
        away = np.linalg.norm(rollout.positions - rollout.goals, axis=-1)[after, 0]
        assert (counted.reached is not None) == bool((away < REACHED).any())
        assert rollout.episode.success == counted.success


def test_two_arms_are_told_places(tmp_path):
    engine = an_engine(tmp_path / "model", "chase-two")
    (rollout,) = roll_out(engine, TWO, trials(TWO, 1, "async", 2))
    assert rollout.actions.shape[1] == 4
    # An untrained policy's places: beside where the arms are, not beside the middle of the floor.
    there = rollout.positions[:-1].reshape(-1, 4)
    assert np.abs(rollout.actions - there).max() < 0.8
    assert rollout.episode.error is None


def test_a_twin_is_alike_until_the_event(engine):
    chosen = trials(CHASE, 2, "async", 2)
    own = roll_out(engine, CHASE, chosen)
    twins = roll_out(engine, PointBenchmark("chase-four", events=1, jumps=0), chosen)
    for rollout, twin in zip(own, twins, strict=True):
        event = rollout.events[0].step
        assert np.array_equal(rollout.actions[: event + 1], twin.actions[: event + 1])
        assert not np.array_equal(rollout.actions, twin.actions)
        assert twin.events == ()


def test_what_goes_wrong_is_raised(engine):
    with pytest.raises(ValueError, match="takes a prefix of 40 actions; the policy was trained with at most 6"):
        roll_out(engine, CHASE, trials(CHASE, 1, "async", 40))
    another = trials(PointBenchmark("two-ways"), 1, "sync", 0)
    with pytest.raises(RuntimeError, match="expected one of task 'chase-four'"):
        roll_out(engine, CHASE, another)


@pytest.mark.parametrize("depth", WIDTHS)
def test_models_are_of_a_size(depth):
    parameters = sum(int(np.prod(shape)) for shape in checkpoint_shapes(lab_config(depth)).values())
    assert 0.5e6 < parameters < 3e6
    assert lab_config(depth).head.num_layers == depth


def test_other_depths_are_refused():
    with pytest.raises(ValueError, match="depth: expected one of 2, 4, 8, 16"):
        lab_config(3)
