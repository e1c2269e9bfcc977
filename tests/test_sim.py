"""The simulator adapter: columns, timing, limits, rendering."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from xr0_engine import sim
from xr0_engine.robot.decode import BIMANUAL_COLUMNS, LEFT, RIGHT
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.sim import CONTROL_RATE_HZ, JOINT_NAMES, AlohaEnv, choose_renderer, columns_to_joints, joints_to_columns

# Position servos with dry friction in the joints: they stop this close to their target (0.01 rad is 0.6 degrees).
SERVO_TOLERANCE = 0.02
# Half a physics step of 2 ms, and rounding.
TICK_TOLERANCE_S = 1.001e-3


@pytest.fixture(scope="module")
def env() -> Iterator[AlohaEnv]:
    pytest.importorskip("gym_aloha")
    try:
        choose_renderer()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    with AlohaEnv(seed=0, width=64, height=48) as env:
        yield env


@pytest.mark.parametrize("shape", [(), (1,), (5, 3)], ids=["one", "row", "batch"])
def test_joints_and_columns_are_inverse(shape):
    joints = np.random.default_rng(0).standard_normal((*shape, 14)).astype(np.float32)
    columns = joints_to_columns(joints)
    assert columns.shape == (*shape, BIMANUAL_COLUMNS)
    assert columns.dtype == np.float32
    np.testing.assert_array_equal(columns_to_joints(columns), joints)


def test_each_joint_stands_in_its_column():
    columns = joints_to_columns(np.arange(1, 15))
    assert columns[LEFT.joints].tolist() == [1, 2, 3, 4, 5, 6]
    assert columns[LEFT.gripper].tolist() == [7]
    assert columns[RIGHT.joints].tolist() == [8, 9, 10, 11, 12, 13]
    assert columns[RIGHT.gripper].tolist() == [14]
    assert np.count_nonzero(columns) == len(JOINT_NAMES) == 14


def test_observation_fits_the_bimanual_profile(env):
    env.reset(0)
    observation = env.observe("Lift the cube.")
    assert list(observation.images) == [view.key for view in load_embodiment("bimanual").views]
    assert observation.robot_type in load_embodiment("bimanual").robot_types
    assert load_embodiment("bimanual").control_rate_hz == CONTROL_RATE_HZ
    assert (observation.instruction, observation.timestamp_s) == ("Lift the cube.", 0.0)
    assert (observation.state.shape, observation.state.dtype) == ((1, BIMANUAL_COLUMNS), np.float32)
    np.testing.assert_array_equal(columns_to_joints(observation.state[0]), env.joints.astype(np.float32))


def test_views_are_rendered_and_differ(env):
    env.reset(0)
    images = env.observe().images
    assert all((image.shape, image.dtype) == ((48, 64, 3), np.uint8) for image in images.values())
    assert all(image.std() > 0 for image in images.values())
    assert not np.array_equal(images["ego"], images["left_wrist"])
    # Only the cube is red.
    red = images["ego"].astype(int)
    assert (red[..., 0] - red[..., 1]).max() > 100


def test_seed_places_the_cube(env):
    poses = []
    for seed in (1, 1, 2):
        env.reset(seed)
        poses.append(env.physics.named.data.xpos["box"].copy())
    np.testing.assert_array_equal(poses[0], poses[1])
    assert not np.array_equal(poses[0], poses[2])


def test_reset_starts_over(env):
    env.reset(0)
    start = env.joints
    origin = env.observe()
    for _ in range(4):
        env.apply(np.full(BIMANUAL_COLUMNS, 0.3, np.float32), origin)
    env.reset(0)
    assert env.physics.time() == 0
    np.testing.assert_array_equal(env.joints, start)
    env.step(start)
    assert env.physics.time() == pytest.approx(1 / CONTROL_RATE_HZ, abs=TICK_TOLERANCE_S)


def test_every_tick_ends_at_the_nearest_physics_step(env):
    env.reset(0)
    for tick in range(1, 46):
        env.step(env.joints)
        assert env.physics.time() == pytest.approx(tick / CONTROL_RATE_HZ, abs=TICK_TOLERANCE_S)


def test_actions_are_deltas_from_the_observation(env):
    env.reset(0)
    origin = env.observe()
    joints = env.joints
    delta = np.zeros(14)
    delta[[0, 6, 11, 13]] = 0.2, 0.5, -0.3, 0.25
    action = joints_to_columns(delta)
    # End-effector columns are not used by this robot.
    action[LEFT.position] = 5
    for _ in range(30):
        # The origin stays: repeating an action holds the target, it does not add up.
        targets = env.apply(action, origin)
    np.testing.assert_allclose(targets, joints + delta, atol=1e-6)
    np.testing.assert_allclose(env.joints, joints + delta, atol=SERVO_TOLERANCE)


@pytest.mark.parametrize(("sign", "bound"), [(-1, 0), (1, 1)], ids=["low", "high"])
def test_targets_are_clipped_to_the_actuators(env, sign, bound):
    env.reset(0)
    targets = env.apply(np.full(BIMANUAL_COLUMNS, sign * 100.0), env.observe())
    np.testing.assert_array_equal(targets, env.limits[:, bound])
    grippers = targets[[6, 13]]
    assert ((grippers >= 0) & (grippers <= 1)).all()


@pytest.mark.parametrize("size", [(641, 480), (640, 481), (0, 10)], ids=str)
def test_image_size_beyond_the_buffer_is_refused(size):
    with pytest.raises(ValueError, match="640x480"):
        AlohaEnv(0, *size)


def test_missing_simulator_names_the_extra(monkeypatch):
    monkeypatch.setattr(sim, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"xr0-engine\[sim\]"):
        AlohaEnv()


@pytest.mark.skipif(sys.platform != "linux", reason="MuJoCo's default is used elsewhere")
def test_renderer_that_does_not_work_names_the_packages(monkeypatch):
    pytest.importorskip("gym_aloha")
    monkeypatch.setenv("MUJOCO_GL", "disable")
    with pytest.raises(RuntimeError, match=r"libegl1 libgl1.*MUJOCO_GL=disable: .+"):
        choose_renderer()
    assert os.environ["MUJOCO_GL"] == "disable"


@pytest.mark.skipif(sys.platform != "linux", reason="MuJoCo's default is used elsewhere")
@pytest.mark.parametrize(("working", "chosen"), [(("egl", "osmesa"), "egl"), (("osmesa", "glfw"), "osmesa")], ids=str)
def test_first_working_renderer_is_chosen(monkeypatch, working, chosen):
    pytest.importorskip("gym_aloha")
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(sim, "_try_renderer", lambda renderer: None if renderer in working else "no such library")
    choose_renderer()
    assert os.environ["MUJOCO_GL"] == chosen


def test_only_the_views_that_are_asked_for_are_drawn(monkeypatch):
    pytest.importorskip("gym_aloha")
    with AlohaEnv(seed=0, width=64, height=48, views=("ego",), antialias=False) as one:
        assert list(one.observe().images) == ["ego"]
        # Without antialiasing an edge pixel is one thing or the other; most are as they were.
        with AlohaEnv(seed=0, width=64, height=48, views=("ego",)) as smooth:
            apart = np.abs(one.observe().images["ego"].astype(int) - smooth.observe().images["ego"]).max(-1)
    assert 0 < (apart > 8).mean() < 0.3
    with pytest.raises(ValueError, match="views: expected some of ego"):
        AlohaEnv(views=("top",))
