"""A benchmark as closed-loop validation: rates of a policy in this process, always of the same trials."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.fake import GRIPPER, REACH, WIDTH, PointBenchmark, PointWorld
from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.evaluation import closed_loop
from xr0_engine.evaluation.aloha import Aloha
from xr0_engine.evaluation.closed_loop import aloha, rates
from xr0_engine.training.closed_loop import find_closed_loop
from xr0_engine.types import ActionChunk


class Straight:
    """An engine that goes straight to the goal; a lazy one stays where it is on the left of the table."""

    robot_types = ("point",)

    def __init__(self, lazy: bool = False) -> None:
        self.lazy, self.seeds = lazy, []

    def robot_info(self, robot_type=None):
        assert robot_type is None
        return PointBenchmark().info

    def infer(self, observation, prefix=None, noise=None, seed=None, guide=None):
        self.seeds.append(seed)
        actions = np.zeros((8, WIDTH), np.float32)
        point, goal = observation.state[0:2].copy(), observation.state[2:4]
        for action in actions:
            action[:2] = 0 if self.lazy and goal[0] < 0 else np.clip(goal - point, -REACH, REACH)
            action[GRIPPER] = 1
            point += action[:2]
        return ActionChunk(actions, actions, np.arange(WIDTH) < GRIPPER + 1, "point")


class BothArms(PointBenchmark):
    """At the rate of ALOHA's robot."""

    rate_hz = 30.0


def test_rates_are_of_the_suite_s_trials():
    far = PointBenchmark(horizon=12)
    assert rates(Straight(), far, "far", trials=3)["success"] == 1
    lazy = rates(Straight(lazy=True), far, "far", trials=10)
    # Goals lie on either side, and who never gets there uses the whole time.
    assert 0.2 < lazy["success"] < 0.8
    assert lazy["solved"] == lazy["success"]
    assert 4 < lazy["steps"] < 12
    assert rates(Straight(lazy=True), far, "far", trials=10) == lazy
    assert rates(Straight(lazy=True), far, "far", trials=10, seed=0) != lazy


def test_rollouts_of_a_trial_are_counted():
    result = rates(Straight(), PointBenchmark(rollouts=3), "near", trials=1)
    assert (result["success"], result["solved"]) == (1, 3)


def test_the_noise_is_the_same_every_time():
    first, second = Straight(), Straight()
    for engine in (first, second):
        rates(engine, PointBenchmark(), "near", trials=2)
    assert first.seeds == second.seeds
    assert len(set(first.seeds)) == len(first.seeds) > 3


@pytest.mark.parametrize(
    ("point", "complaint"),
    [
        (PointBenchmark(fault="raise"), r"point, near, trial 1: world, rollout 1, step 2: ArithmeticError"),
        (PointBenchmark(missing="no table: buy one"), "no table: buy one"),
    ],
    ids=["world", "missing"],
)
def test_a_failure_that_is_not_the_policy_s_is_none_of_its_failures(point, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        rates(Straight(), point, "near", trials=2)


def test_the_world_is_closed(monkeypatch):
    opened = []
    monkeypatch.setattr(PointBenchmark, "open", lambda self: opened.append(PointWorld(self)) or opened[-1])
    rates(Straight(), PointBenchmark(), "near", trials=1)
    with pytest.raises(RuntimeError):
        rates(Straight(), PointBenchmark(fault="reset"), "near", trials=2)
    assert [world.log[-1][0] for world in opened] == ["close", "close"]


def test_aloha_is_found_by_its_name_and_asks_the_engine(tmp_path, monkeypatch):
    """With an engine of several robot types; a point stands for both arms."""
    init_checkpoint(tmp_path / "tiny")
    engine = Engine.from_pretrained(tmp_path / "tiny", dtype="float32")
    views = tuple(view.key for view in engine.embodiment("bimanual").views)
    stands_for = BothArms(layout="bimanual", horizon=6, views=views, robot="bimanual", names=("transfer",))
    asked = []
    monkeypatch.setattr(closed_loop, "Aloha", lambda **options: asked.append(Aloha(**options)) or stands_for)
    assert find_closed_loop("xr0_engine.evaluation.closed_loop:aloha") is aloha
    assert aloha(engine) == {"success": 0, "solved": 0, "steps": 6}
    assert (asked[0].width, asked[0].height, asked[0].execute) == (160, 120, 10)
