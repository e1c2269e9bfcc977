"""The lab's experts: they do the tasks, honour a prefix, and show what a delay costs where the prefix matters."""

from __future__ import annotations

import numpy as np
import pytest

from xr0_engine.lab.benchmark import PointBenchmark
from xr0_engine.lab.experts import PointExpert
from xr0_engine.lab.rollouts import roll_out, trials
from xr0_engine.lab.tasks import CHUNK, TASKS, PointEnv
from xr0_engine.types import Observation

EACH = pytest.mark.parametrize("name", TASKS)


def rate(task, mode, delay_steps, count=8):
    benchmark = PointBenchmark(task)
    done = roll_out(None, benchmark, trials(benchmark, count, mode, delay_steps))
    return np.mean([event.success for rollout in done for event in rollout.events if event.counts])


@EACH
def test_at_rest_every_disc_is_reached(name):
    assert rate(name, "sync", 0) == 1


@EACH
def test_with_a_prefix_a_delay_of_four_costs_little(name):
    assert rate(name, "async", 4) > 0.9


def test_without_a_prefix_two_ways_tear():
    """Half of the chunks that begin while a way is being begun take the other one."""
    assert rate("two-ways", "async", 6) > 0.9 > 0.6 > rate("two-ways", "naive", 6)


@EACH
def test_a_prefix_comes_back_and_is_gone_on_from(name):
    env = PointEnv(TASKS[name])
    env.begin(1)
    for _ in range(env.changes[1].step):
        env.act(env.positions.ravel() if env.task.commands_places else np.zeros(2))
    seen = Observation({}, "", env.state())
    plan = PointExpert(env).infer(seen).actions
    chunk = PointExpert(env, seed=7).infer(seen, plan[:6])
    columns = list(env.task.columns)
    assert np.array_equal(chunk.actions[:6], plan[:6])
    assert chunk.prefix_length == 6
    if env.scene.obstacle is None:
        # The same plan: nothing is random in it, and its first actions lead where it expected.
        assert np.allclose(chunk.actions[:, columns], plan[:, columns], atol=1e-6)


def test_both_ways_are_taken():
    env = PointEnv(TASKS["two-ways"])
    env.begin(0)
    for _ in range(env.changes[1].step):
        env.act(np.zeros(2))
    seen = Observation({}, "", env.state())
    plans = [PointExpert(env, seed).infer(seen).actions[:, :2].sum(0) for seed in range(16)]
    assert len(np.unique(np.round(plans, 3), axis=0)) == 2


def test_a_prefix_that_is_the_whole_chunk_is_refused():
    env = PointEnv(TASKS["chase-four"])
    env.begin(0)
    with pytest.raises(ValueError, match="prefix: expected fewer than 16"):
        PointExpert(env).infer(Observation({}, "", env.state()), np.zeros((CHUNK, 32), np.float32))
