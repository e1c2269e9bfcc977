"""The CALVIN benchmark against a stand-in for the simulator, which is no CALVIN: see fake_calvin.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.fake_calvin import SUBTASKS, FakeEnv, install
from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.calvin import Calvin, CalvinWorld
from xr0_engine.evaluation.episode import Execution, act
from xr0_engine.types import ActionChunk, FileError, Observation, RobotInfo

WIDTH = 32


class Opened:
    """A benchmark on the stand-in, its world, and the environments that it makes."""

    def __init__(self, benchmark: Calvin, made: list[FakeEnv]) -> None:
        self.benchmark, self.made = benchmark, made
        self.world = benchmark.open()

    def trial(self, number: int = 0, **fields: Any) -> Trial:
        (tasks,) = self.benchmark.suites().values()
        return Trial(tasks[0], number, seed=7, **fields)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opened:
    made = install(monkeypatch, tmp_path)
    return Opened(Calvin(dataset=str(tmp_path / "task_ABC_D"), chains=3), made)


def row(x: float = 0.0, gripper: float = 0.3) -> np.ndarray:
    action = np.zeros(WIDTH)
    action[0], action[6], action[7:] = x, gripper, 99.0
    return action


class Pusher:
    """Moves along x, in chunks of ten; `strength` per chunk, then of no use."""

    def __init__(self, strength: list[float]) -> None:
        self.strength, self.seen = strength, list[Observation]()

    def infer(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> ActionChunk:
        assert prefix is None
        self.seen.append(observation)
        x = self.strength.pop(0) if self.strength else 0.0
        actions = np.stack([row(x) for _ in range(10)]).astype(np.float32)
        return ActionChunk(actions, actions, np.ones(WIDTH, bool), observation.robot_type or "")

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        steps = (0, 1, 2, 3, 4, 5)
        return RobotInfo(10, 30.0, 10, ("base", "left_wrist"), "plain", WIDTH, 6, steps, (6,))


def play(opened: Opened, policy: Pusher, **fields: Any) -> Any:
    benchmark = opened.benchmark
    return act(
        opened.world, lambda world: policy, opened.trial(**fields), Execution(benchmark.rate_hz, benchmark.execute)
    )


def test_observation_is_what_the_released_evaluation_sends(opened: Opened) -> None:
    opened.world.reset(opened.trial())
    observation = opened.world.observe()
    assert observation.robot_type == "calvin_abcd_orig"
    assert {view: image.shape for view, image in observation.images.items()} == {
        "base": (200, 200, 3),
        "left_wrist": (84, 84, 3),
    }
    np.testing.assert_array_equal(observation.state, [0, 1, 2, 3, 4, 5, 6] + [0] * 25)
    assert observation.state.dtype == np.float32
    # str.capitalize: the other letters become small.
    assert observation.instruction == "Open drawer of the led."


def test_cameras_are_drawn_by_observe_alone(opened: Opened) -> None:
    opened.world.reset(opened.trial())
    (env,) = opened.made
    env.drawn.clear()
    for _ in range(3):
        opened.world.step(row())
    assert env.drawn == []
    opened.world.observe()
    assert env.drawn == ["static", "gripper"]
    assert opened.world.picture().shape == (200, 200, 3)
    opened.world.step(row())
    assert env.drawn == ["static", "gripper", "static"]


@pytest.mark.parametrize(("gripper", "told"), [(0.3, 1), (1e-6, 1), (0.0, -1), (-0.2, -1), (7.0, 1)])
def test_gripper_goes_by_its_sign(opened: Opened, gripper: float, told: int) -> None:
    opened.world.reset(opened.trial())
    command = row(0.5, gripper)
    opened.world.step(command)
    np.testing.assert_array_equal(opened.made[0].actions[0], [0.5, 0, 0, 0, 0, 0, told])
    # The environment scales what it is given in place; the executor's row stays as it was.
    assert command[0] == 0.5
    np.testing.assert_array_equal(opened.world.rest(), [0, 0, 0, 0, 0, 0, told])


def test_chain_of_five(opened: Opened) -> None:
    policy = Pusher([1.0] * 5)
    episode = play(opened, policy)
    assert (episode.error, episode.success, episode.solved, episode.rollouts) == (None, True, 5, 5)
    # Three steps of 1 each; the rest of each chunk is not executed, and every subtask begins with a look.
    assert (episode.steps, episode.calls) == (15, 5)
    assert episode.facts == {"chain": list(SUBTASKS)}
    expected = [f"{name.replace('_', ' ')} of the led.".capitalize() for name in SUBTASKS]
    assert [observation.instruction for observation in policy.seen] == expected


def test_chain_stops_at_the_first_failure_after_36_chunks(opened: Opened) -> None:
    policy = Pusher([1.0, 1.0, 0.0])
    episode = play(opened, policy)
    assert (episode.success, episode.solved, episode.rollouts) == (False, 2, 3)
    assert (episode.steps, episode.calls) == (3 + 3 + 360, 1 + 1 + 36)
    assert len(opened.made[0].actions) == 366


def test_delay_in_sync_adds_no_motion(opened: Opened) -> None:
    episode = play(opened, Pusher([1.0] * 5), delay_steps=4)
    assert episode.solved == 5
    moves = [action[0] for action in opened.made[0].actions]
    assert moves == ([0.0] * 4 + [1.0] * 3) * 5
    assert episode.steps == 35


def test_trial_decides_the_chain_and_where_it_begins(opened: Opened) -> None:
    for number in (1, 2, 4):
        opened.world.reset(opened.trial(number))
        # Trial 4 of three chains is chain 1 again.
        np.testing.assert_array_equal(opened.made[-1].resets[0][0], np.full(15, number % 3))
        assert opened.world.facts()["chain"][0] == SUBTASKS[number % 3 % 2]


def test_fresh_environment_for_each_chain(opened: Opened) -> None:
    opened.world.reset(opened.trial(0))
    opened.world.reset(opened.trial(1))
    first, second = opened.made
    assert (first.closed, second.closed) == (1, 0)
    # What closes again when it is collected must not close the next one's client.
    first.close()
    assert first.closed == 1
    opened.world.close()
    assert second.closed == 1


def test_one_environment_for_all_if_asked(opened: Opened) -> None:
    world = CalvinWorld(replace(opened.benchmark, fresh_env=False))
    world.reset(opened.trial(0))
    world.observe()
    world.reset(opened.trial(1))
    world.observe()
    assert len(opened.made) == 1
    assert len(opened.made[0].resets) == 2


def test_sequences_from_a_file(opened: Opened, tmp_path: Path) -> None:
    path = tmp_path / "eval_sequences.json"
    path.write_text(json.dumps([[{"led": 9}, list(reversed(SUBTASKS))]]), encoding="utf-8")
    benchmark = replace(opened.benchmark, sequences=str(path), chains=1)
    world = benchmark.open()
    world.reset(opened.trial())
    assert world.facts() == {"chain": list(reversed(SUBTASKS))}
    assert benchmark.protocol()["sequences"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(benchmark.protocol())


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "expected a list of at least 1 chains, got 0"),
        ({}, "expected a list of at least 1 chains, got dict"),
        ([["a", "b"]], r"sequences\[0\]: expected \[initial state, subtasks\]"),
        ([[{}, 5]], r"sequences\[0\]: expected a list of subtasks, got 5"),
        ([[{}, ["open_drawer"]]], "expected 5 subtasks"),
        ([[{}, ["open_drawer"] * 4 + ["dance"]]], "with annotations"),
    ],
    ids=["empty", "no list", "no state", "no subtasks", "short", "unknown"],
)
def test_refuses_sequences(opened: Opened, tmp_path: Path, sequences: Any, message: str) -> None:
    path = tmp_path / "sequences.json"
    path.write_text(json.dumps(sequences), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        replace(opened.benchmark, sequences=str(path), chains=1).open()


@pytest.mark.parametrize(
    "content", [b"", b"[" * 5000, b"[[{}, [1e999]]]", b"\xff"], ids=["empty", "deep", "inf", "bytes"]
)
def test_sequences_that_are_no_json_are_refused_by_name(opened: Opened, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sequences.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"sequences\.json is not valid JSON"):
        replace(opened.benchmark, sequences=str(path), chains=1).open()


def test_an_initial_state_that_calvin_cannot_use_is_refused_by_name(opened: Opened) -> None:
    world = opened.benchmark.open()

    def condition(initial: Any) -> Any:
        return {"left": 0, "right": 1}[initial["slider"]]

    world._condition = condition
    with pytest.raises(FileError, match=r"sequences\[0\]: initial state: 'slider' is missing"):
        world.reset(opened.trial())


def test_refuses_frames_of_another_size(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    opened.world.reset(opened.trial())
    monkeypatch.setattr(
        opened.made[0], "get_obs", lambda: {"rgb_obs": {"rgb_static": np.zeros((100, 100, 3), np.uint8)},
                                            "robot_obs": np.zeros(15)}
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"rgb_static: expected \(200, 200, 3\) uint8, got \(100, 100, 3\)"):
        opened.world.observe()


def test_splits_have_their_own_robot_types() -> None:
    benchmark = Calvin()
    assert list(benchmark.suites()) == ["ABCD_D"]
    other = benchmark.for_suites(["ABC_D"])
    assert (list(other.suites()), other.robot_type) == (["ABC_D"], "calvin_abc_orig")
    assert benchmark.for_suites([]) is benchmark
    with pytest.raises(ValueError, match="suite: expected one of ABCD_D, ABC_D, got D_D"):
        benchmark.for_suites(["D_D"])
    with pytest.raises(ValueError, match="suite: expected one, since each has a checkpoint"):
        benchmark.for_suites(["ABC_D", "ABCD_D"])
    with pytest.raises(ValueError, match="split"):
        Calvin(split="D_D")


def test_released_numbers() -> None:
    benchmark = Calvin()
    (task,) = benchmark.suites()["ABCD_D"]
    assert (benchmark.trials(task), benchmark.subtask_steps, benchmark.execute, benchmark.rate_hz) == (
        1000,
        360,
        10,
        30,
    )
    with pytest.raises(ValueError, match="chains: expected a whole number"):
        Calvin(chains=0)


def test_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"calvin_env cannot be imported .*797142c of calvin_env"):
        Calvin().versions()
    with pytest.raises(RuntimeError, match="--dataset DIR"):
        Calvin().open()
    with pytest.raises(RuntimeError, match=r"merged_config.yaml is missing.*download_data.sh"):
        Calvin(dataset=str(tmp_path)).open()
    install(monkeypatch, tmp_path)
    other = tmp_path / "A" / "validation" / ".hydra" / "merged_config.yaml"
    other.parent.mkdir(parents=True)
    other.write_text("file: calvin_table_A/urdf/calvin_table_A.urdf", encoding="utf-8")
    with pytest.raises(ValueError, match="dataset: expected scene D, which has a calvin_table_D"):
        Calvin(dataset=str(tmp_path / "A")).open()
    for path in (tmp_path / "calvin_models" / "conf" / "annotations").iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match=r"new_playtable_validation.yaml is missing.*--config DIR"):
        Calvin(dataset=str(tmp_path / "task_ABC_D"), chains=1).open()
