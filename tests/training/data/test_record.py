"""The scripted expert, and recordings of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.sim import CONTROL_RATE_HZ, INSTRUCTION, AlohaEnv, choose_renderer, columns_to_joints, joints_to_columns
from xr0_engine.sizes import tiny_config
from xr0_engine.training.data import record as module
from xr0_engine.training.data.episode import load_episode
from xr0_engine.training.data.expert import HELD_M, plan_transfer, transferred
from xr0_engine.training.data.kinematics import IK_TOLERANCE, GripperPose, Kinematics, Unreachable
from xr0_engine.training.data.record import OVER_TABLE_M, Settings, record, record_episode, vary_start
from xr0_engine.types import CheckpointError
from xr0_engine.whole import only_writer

SETTINGS = Settings(width=32, height=24)
# JSON keeps seven digits of float64; states are float32.
WRITTEN = 1e-6


@pytest.fixture(scope="module")
def env() -> Iterator[AlohaEnv]:
    pytest.importorskip("gym_aloha")
    try:
        choose_renderer()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    with AlohaEnv(0, SETTINGS.width, SETTINGS.height) as env:
        yield env


@pytest.mark.parametrize("seed", range(4))
def test_expert_hands_the_cube_over(env, seed):
    env.reset(seed)
    vary_start(env, np.random.default_rng(seed), SETTINGS.start_spread_rad)
    assert not transferred(env)
    plan = plan_transfer(env)
    arms = np.delete(np.arange(14), [6, 13])
    np.testing.assert_array_equal(plan[:, arms], np.clip(plan[:, arms], *env.limits[arms].T))
    for targets in plan:
        env.step(targets)
    assert env.task.get_reward(env.physics) == env.task.max_reward
    assert transferred(env)


def test_cube_that_both_hold_is_not_transferred_yet(env):
    env.reset(0)
    rewards = []
    for targets in plan_transfer(env):
        env.step(targets)
        rewards.append((env.task.get_reward(env.physics), transferred(env)))
    assert (4, False) in rewards
    assert rewards[-1] == (4, True)


@pytest.mark.parametrize("arm", ["left", "right"])
def test_inverse_kinematics_inverts(env, arm):
    env.reset(0)
    kinematics, rng = Kinematics(env), np.random.default_rng(0)
    rest = env.joints[:6]
    for _ in range(5):
        pose = kinematics.forward(arm, rest + rng.uniform(-0.4, 0.4, 6))
        reached = kinematics.forward(arm, kinematics.inverse(arm, pose, rest))
        np.testing.assert_allclose(reached.position_m, pose.position_m, atol=IK_TOLERANCE)
        np.testing.assert_allclose(reached.rotation, pose.rotation, atol=2 * IK_TOLERANCE)
    with pytest.raises(Unreachable, match=f"{arm} gripper: no joints found"):
        kinematics.inverse(arm, GripperPose(np.array([0, 0.5, 3.0]), np.eye(3)), rest)


def test_recorded_episode_replays(env, tmp_path, monkeypatch):
    """What is in the file, given to the simulation as a policy's actions are, hands the cube over again."""
    # Five hundred pictures would be most of the test's time; tests/test_sim.py looks at them.
    grey = np.full((SETTINGS.height, SETTINGS.width, 3), 99, np.uint8)
    monkeypatch.setattr(env, "_render", lambda camera: grey)
    assert record_episode(env, tmp_path, 7, SETTINGS)
    episode = load_episode(tmp_path / "episode_000007.json")
    assert (episode.status, episode.instructions, episode.rate_hz) == ("success", (INSTRUCTION,), CONTROL_RATE_HZ)
    assert episode.motion.columns.sum() == 26
    last = len(episode.motion) - 1
    assert {episode.image(view, last).shape for view in episode.clips} == {(24, 32, 3)}
    assert not list(tmp_path.rglob(".*"))

    env.reset(7)
    vary_start(env, np.random.default_rng(7), SETTINGS.start_spread_rad)
    np.testing.assert_allclose(columns_to_joints(episode.motion.state(0)[0]), env.joints, atol=WRITTEN)
    for tick in range(0, last + 1, 10):
        observation = env.observe()
        for action in episode.motion.actions(tick, min(10, last + 1 - tick)):
            env.apply(action, observation)
    assert transferred(env)


def test_an_episode_may_begin_over_the_table_and_end_early(env, tmp_path, monkeypatch):
    starts, settings = [], replace(SETTINGS, over_table=1.0, seconds=0.5, views=("ego",))
    monkeypatch.setattr(env, "_render", lambda camera: np.full((24, 32, 3), 99, np.uint8))
    for seed in range(4):
        if not record_episode(env, tmp_path, seed, settings):
            continue
        episode = load_episode(tmp_path / f"episode_{seed:06d}.json")
        assert (len(episode.motion), list(episode.clips)) == (15, ["ego"])
        right = Kinematics(env).forward("right", columns_to_joints(episode.motion.state(0)[0])[7:13])
        starts.append(right.position_m)
    assert len(starts) >= 2
    # The spread of the joints moves the gripper by some centimetres from where it was put.
    low, high = OVER_TABLE_M.T
    assert np.all((np.array(starts) > low - 0.1) & (np.array(starts) < high + 0.1))
    assert np.ptp(np.array(starts)[:, :2], axis=0).max() > 0.03


def test_how_an_episode_from_rest_starts_does_not_depend_on_the_share_of_others(env, tmp_path):
    env.reset(5)
    vary_start(env, np.random.default_rng(5), SETTINGS.start_spread_rad)
    expected = env.joints.copy()
    from_rest = [seed for seed in range(12) if np.random.default_rng((seed, 1)).random() >= 0.5]
    assert 5 in from_rest
    module._start(env, 5, replace(SETTINGS, over_table=0.5))
    np.testing.assert_array_equal(env.joints, expected)


def test_an_episode_may_begin_midway_and_astray(env):
    """What the expert does next it finds in where everything is, a dropped or missed cube too."""
    settings, lengths, held, height_m = replace(SETTINGS, midway=1.0), [], [], []
    env.reset(0)
    whole = len(plan_transfer(env))
    for seed in range(8):
        plan = module._rehearsed(env, seed, settings)
        if plan is None:
            continue
        module._start(env, seed, settings)
        np.testing.assert_array_equal(plan, plan_transfer(env))
        cube_m = env.physics.named.data.xpos["box"]
        grasp_m = Kinematics(env).forward("right", env.joints[7:13]).position_m
        lengths.append(len(plan))
        held.append(np.linalg.norm(cube_m - grasp_m) < HELD_M)
        height_m.append(cube_m[2])
    assert len(lengths) >= 6
    assert min(lengths) < whole / 2 < max(lengths)
    assert any(held)
    assert not all(held)
    assert max(height_m) > 0.1


def test_a_policy_may_lead_an_episode_to_where_it_begins(env, monkeypatch):
    """Replanning as a policy does, up to any moment of the time that the expert would take."""
    seen, moved = [], np.zeros((20, 32), np.float32)
    # The right arm's first joint.
    moved[:, joints_to_columns(np.arange(14) == 7) > 0] = np.linspace(0.01, 0.2, 20)[:, None]

    class Turning:
        def infer(self, observation, seed):
            seen.append((env._tick, seed))
            return SimpleNamespace(actions=moved)

    monkeypatch.setattr(module, "policy_engine", lambda policy: Turning() if policy == "there" else None)
    monkeypatch.setattr(env, "_render", lambda camera: None)
    settings = replace(SETTINGS, midway=1.0, policy="there")
    ticks, turned = [], []
    for seed in range(6):
        env.reset(seed)
        vary_start(env, np.random.default_rng(seed), SETTINGS.start_spread_rad)
        begin = env.joints[7]
        module._start(env, seed, settings)
        ticks.append(env._tick)
        turned.append(env.joints[7] - begin)
    assert 0 <= min(ticks) < 60 < max(ticks) <= 200
    assert np.corrcoef(ticks, turned)[0, 1] > 0.8
    gaps = np.diff([tick for tick, _ in seen])
    assert len({seed for _, seed in seen}) == len(seen)
    assert all(5 <= gap <= 16 for gap in gaps[gaps > 0])


def test_a_policy_is_looked_at_before_anything_is_written(tmp_path, tries, monkeypatch):
    """And is known again by its weights, wherever it lies."""
    settings = Settings(midway=1.0, policy=str(tmp_path / "policy"))
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        record(tmp_path / "out", 1, 0, settings, 1)
    config, profile = tiny_config(), replace(load_embodiment("bimanual"), control_rate_hz=50.0)
    write_checkpoint(tmp_path / "fast", config, 0, embodiment=profile)
    with pytest.raises(ValueError, match="expected layout bimanual at 30 Hz for the simulation, got bimanual at 50 Hz"):
        record(tmp_path / "out", 1, 0, replace(settings, policy=str(tmp_path / "fast")), 1)
    write_checkpoint(tmp_path / "policy", config, 0)
    with pytest.raises(ValueError, match="views: expected left_wrist, right_wrist too"):
        record(tmp_path / "out", 1, 0, replace(settings, views=("ego",)), 1)
    assert not (tmp_path / "out").exists()
    record(tmp_path / "out", 1, 0, settings, 1)
    (tmp_path / "policy").rename(tmp_path / "moved")
    moved = replace(settings, policy=str(tmp_path / "moved"))
    assert record(tmp_path / "out", 2, 0, moved, 1).present == 1
    write_checkpoint(tmp_path / "another", config, 1)
    with pytest.raises(ValueError, match="was recorded with"):
        record(tmp_path / "out", 2, 0, replace(settings, policy=str(tmp_path / "another")), 1)


@pytest.mark.parametrize(
    "wrong",
    [{"over_table": 1.5}, {"midway": -0.1}, {"policy": "here"}, {"seconds": 0.0}, {"views": ("top",)}, {"views": ()}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_failed_try_leaves_nothing(env, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "plan_transfer", lambda env: np.tile(env.joints, (2, 1)))
    assert not record_episode(env, tmp_path, 0, SETTINGS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def tries(monkeypatch) -> list[int]:
    """Threads instead of processes, and tries that take a moment; seeds that end in 3 fail."""
    seen: list[int] = []

    def attempt(folder, seed, settings):
        seen.append(seed)
        time.sleep(0.002 * (seed % 4))
        if seed % 10 == 3:
            return False
        (folder / f"episode_{seed:06d}.json").write_text("{}")
        return True

    monkeypatch.setattr(module, "worker_pool", ThreadPoolExecutor)
    monkeypatch.setattr(module, "_try", attempt)
    monkeypatch.setattr(module, "choose_renderer", lambda: None)
    return seen


def seeds(folder) -> list[int]:
    return sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("episode_*.json"))


@pytest.mark.parametrize("processes", [1, 4])
def test_first_seeds_that_succeed_are_kept(tmp_path, tries, processes):
    result = record(tmp_path, 6, 0, SETTINGS, processes)
    assert seeds(tmp_path) == [0, 1, 2, 4, 5, 6]
    assert (result.recorded, result.failed, result.present) == (6, 1, 0)
    assert json.loads((tmp_path / "recording.json").read_text())["failed_seeds"] == [3]


def test_a_folder_is_recorded_by_one_process_at_a_time(tmp_path, tries):
    with only_writer(tmp_path), pytest.raises(ValueError, match=r"is being written by process \d+ on "):
        record(tmp_path, 2, 0, SETTINGS, 1)
    assert tries == []
    assert record(tmp_path, 2, 0, SETTINGS, 1).recorded == 2


def test_recording_goes_on_where_it_stopped(tmp_path, tries):
    record(tmp_path, 4, 0, SETTINGS, 2)
    (tmp_path / "episode_000001.json").unlink()
    tries.clear()
    result = record(tmp_path, 7, 0, SETTINGS, 2)
    assert sorted(tries) == [1, 5, 6, 7]
    assert seeds(tmp_path) == [0, 1, 2, 4, 5, 6, 7]
    assert (result.recorded, result.failed, result.present) == (4, 0, 3)


def test_other_settings_need_another_folder(tmp_path, tries):
    record(tmp_path, 1, 0, SETTINGS, 1)
    with pytest.raises(ValueError, match="was recorded with"):
        record(tmp_path, 2, 0, Settings(64, 48), 1)


def test_folder_of_another_origin_is_refused(tmp_path, tries):
    (tmp_path / "episode_000001.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no recording\.json"):
        record(tmp_path, 2, 0, SETTINGS, 1)
