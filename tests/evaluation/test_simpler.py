"""The SimplerEnv benchmark against a stand-in for the simulator, which is no SimplerEnv: see fake_simpler.py."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluation.fake_simpler import EEF, FakeEnv, install
from xr0_engine.evaluation.benchmark import Task, Trial
from xr0_engine.evaluation.episode import Execution, act
from xr0_engine.evaluation.simpler import (
    BRIDGE_DEFAULT,
    Simpler,
    angles_of,
    bridge_state,
    environment_action,
    find_task,
    fractal_state,
    reset_options,
    rotation_of,
)
from xr0_engine.types import ActionChunk, Observation, RobotInfo

WIDTH = 32
WIDOWX, GOOGLE = Simpler(), Simpler(robot="google")
# Float64 through a few sines.
ROUNDING = 1e-12

# Episodes of the released tables (eval_simplerenv/README.md), task by task.
RELEASED = {
    "widowx": {
        "put_carrot_on_plate": 144,
        "put_eggplant_in_basket": 144,
        "put_spoon_on_table_cloth": 144,
        "stack_green_cube_on_yellow_cube": 144,
    },
    "google_vm": {
        "pick_coke_can": 300,
        "move_near": 240,
        "open_drawer": 108,
        "close_drawer": 108,
        "put_in_drawer": 108,
    },
    "google_va": {
        "pick_coke_can": 825,
        "move_near": 600,
        "open_drawer": 189,
        "close_drawer": 189,
        "put_in_drawer": 189,
    },
}


@pytest.fixture(scope="module")
def rotation() -> Any:
    """SciPy's, as the reference."""
    return pytest.importorskip("scipy.spatial.transform", reason="SciPy comes with the extra `sim`").Rotation


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FakeEnv]:
    return install(monkeypatch, tmp_path)


def trial(benchmark: Simpler, suite: str, task: int = 0, number: int = 0) -> Trial:
    return Trial(benchmark.suites()[suite][task], number, seed=7)


def row(x: float = 0.0, turn: tuple[float, ...] = (0.0, 0.0, 0.0), gripper: float = 0.7) -> np.ndarray:
    action = np.full(WIDTH, 99.0)
    action[:7] = [x, 0.0, 0.0, *turn, gripper]
    return action


class Pusher:
    """Moves along x, in chunks of four."""

    def __init__(self, x: float) -> None:
        self.x, self.seen = x, list[Observation]()

    def infer(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> ActionChunk:
        self.seen.append(observation)
        actions = np.stack([row(self.x)] * 4).astype(np.float32)
        return ActionChunk(actions, actions, np.ones(WIDTH, bool), observation.robot_type or "")

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        rate_hz = {"bridge_delta": 5.0, "fractal_delta": 3.0}[robot_type or ""]
        return RobotInfo(4, rate_hz, 4, ("base",), "plain", WIDTH, 3, (0, 1, 2, 3, 4, 5))


def play(benchmark: Simpler, policy: Pusher, case: Trial) -> Any:
    world, execution = benchmark.open(), Execution(benchmark.rate_hz, benchmark.execute)
    return act(world, lambda world: policy, case, execution, benchmark.robot_type)


def test_episodes_are_as_many_as_in_the_released_tables() -> None:
    counted = {
        suite: {task.name: benchmark.trials(task) for task in tasks}
        for benchmark in (WIDOWX, GOOGLE)
        for suite, tasks in benchmark.suites().items()
    }
    assert counted == RELEASED


@pytest.mark.parametrize("simpler", [WIDOWX, GOOGLE], ids=["widowx", "google"])
def test_no_two_setups_are_the_same(simpler: Simpler) -> None:
    for tasks in simpler.suites().values():
        for task in tasks:
            setups = [repr(setup) for setup in find_task(task).setups]
            assert len(set(setups)) == len(setups)


def test_variants_of_aggregation() -> None:
    cans, near, drawers, _, put = (find_task(task).setups for task in GOOGLE.suites()["google_va"])
    assert set(Counter(setup.variant for setup in cans).values()) == {25}
    assert len({setup.variant.split("/")[0] for setup in cans}) == 11
    assert set(Counter(setup.variant for setup in near).values()) == {60}
    assert Counter(setup.variant for setup in drawers) == Counter(setup.variant for setup in put)
    assert all(setup.overlay is None for setup in cans + near + drawers + put)
    matched = [setup for task in GOOGLE.suites()["google_vm"] for setup in find_task(task).setups]
    assert all(setup.overlay is not None and "urdf_version" in setup.build for setup in matched)


def test_environment_is_built_as_in_the_released_list(made: list[FakeEnv], tmp_path: Path) -> None:
    world = WIDOWX.open()
    world.reset(trial(WIDOWX, "widowx", 3, number=24 + 5))
    (env,) = made
    assert env.env_name == "StackGreenCubeOnYellowCubeBakedTexInScene-v0"
    assert env.arguments == {
        "obs_mode": "rgbd",
        "robot": "widowx",
        "sim_freq": 500,
        "control_mode": "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
        "control_freq": 5,
        "max_episode_steps": 120,
        "scene_name": "bridge_table_1_v1",
        "camera_cfgs": {"add_segmentation": True},
        "rgb_overlay_path": str(tmp_path / "data" / "real_inpainting" / "bridge_real_eval_1.png"),
    }
    (options,) = env.options
    assert options["obj_init_options"] == {"episode_id": 5}
    np.testing.assert_array_equal(options["robot_init_options"]["init_xy"], [0.147, 0.028])
    np.testing.assert_array_equal(options["robot_init_options"]["init_rot_quat"], [0, 0, 0, 1])
    world.reset(trial(WIDOWX, "widowx", 1))
    assert (made[1].arguments["robot"], made[1].arguments["scene_name"]) == (
        "widowx_sink_camera_setup",
        "bridge_table_1_v2",
    )


def test_drawers_are_ray_traced_and_photographs_fit_where_the_robot_stands(made: list[FakeEnv]) -> None:
    world = GOOGLE.open()
    world.reset(trial(GOOGLE, "google_vm", 2, number=2))
    arguments = made[0].arguments
    assert made[0].env_name == "OpenTopDrawerCustomInScene-v0"
    assert {name: arguments[name] for name in ("shader_dir", "station_name", "light_mode", "urdf_version")} == {
        "shader_dir": "rt",
        "station_name": "mk_station_recolor",
        "light_mode": "simple",
        "urdf_version": None,
    }
    assert arguments["rgb_overlay_path"].endswith("open_drawer_a2.png")
    assert (arguments["max_episode_steps"], arguments["sim_freq"], arguments["control_freq"]) == (113, 513, 3)
    np.testing.assert_array_equal(made[0].options[0]["robot_init_options"]["init_xy"], [0.889, -0.203])
    np.testing.assert_array_equal(made[0].options[0]["obj_init_options"]["init_xy"], [0, 0])


def test_robot_is_turned_by_its_yaw(rotation: Any) -> None:
    setup = find_task(GOOGLE.suites()["google_vm"][1]).setups[0]
    w, x, y, z = reset_options(setup)["robot_init_options"]["init_rot_quat"]
    expected = rotation.from_euler("z", -0.09) * rotation.from_quat([0, 0, 1, 0])
    np.testing.assert_allclose(rotation.from_quat([x, y, z, w]).as_matrix(), expected.as_matrix(), atol=ROUNDING)


def test_bridge_state_is_relative_to_a_gripper_that_points_down(made: list[FakeEnv], rotation: Any) -> None:
    turned = rotation.from_quat(np.roll(EEF[3:7], -1)).as_matrix() @ BRIDGE_DEFAULT.T
    angles = rotation.from_matrix(turned).as_euler("xyz")
    np.testing.assert_allclose(bridge_state(EEF), [0.1, 0.2, 0.3, *angles, 0.0, 0.25], atol=ROUNDING)
    # At the default rotation the angles are 0.
    x, y, z, w = rotation.from_matrix(BRIDGE_DEFAULT).as_quat()
    np.testing.assert_allclose(bridge_state(np.array([0, 0, 0, w, x, y, z, 1])), [0] * 7 + [1], atol=ROUNDING)
    world = WIDOWX.open()
    world.reset(trial(WIDOWX, "widowx"))
    observation = world.observe()
    assert (observation.robot_type, observation.state.shape) == ("bridge_delta", (WIDTH,))
    np.testing.assert_allclose(observation.state, [*bridge_state(EEF), *[0] * 24], rtol=1e-6)
    assert {view: image.shape for view, image in observation.images.items()} == {"base": (480, 640, 3)}


def test_fractal_state_has_w_last_and_closedness(made: list[FakeEnv]) -> None:
    # Of the two quaternions of a rotation, the one with w >= 0.
    np.testing.assert_allclose(fractal_state(EEF), [0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 0.5, 0.75], atol=ROUNDING)
    world = GOOGLE.open()
    world.reset(trial(GOOGLE, "google_va"))
    observation = world.observe()
    assert observation.robot_type == "fractal_delta"
    assert {view: image.shape for view, image in observation.images.items()} == {"ego": (512, 640, 3)}


@pytest.mark.parametrize(
    ("robot", "gripper", "told"),
    [
        ("widowx", 0.51, 1),
        ("widowx", 0.5, -1),
        ("widowx", -3.0, -1),
        ("google", 0.0, 1),
        ("google", 1.0, -1),
        ("google", 0.5, 0),
        ("google", 0.7, -0.4),
        ("google", 2.0, -1),
    ],
)
def test_gripper_conventions(robot: str, gripper: float, told: float) -> None:
    assert environment_action(row(gripper=gripper)[:7], robot)[6] == pytest.approx(told)


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (0.3, -0.2, 0.9), (1.5, 1.2, -3.0), (0.0, 0.0, 3.1)])
def test_rotations_are_fixed_axis_angles_made_axis_angle(angles: tuple[float, ...], rotation: Any) -> None:
    reference = rotation.from_euler("xyz", angles)
    np.testing.assert_allclose(rotation_of(np.array(angles)), reference.as_matrix(), atol=ROUNDING)
    action = environment_action(row(0.1, angles)[:7], "widowx")
    np.testing.assert_allclose(action[3:6], reference.as_rotvec(), atol=1e-9)
    assert action[0] == 0.1
    np.testing.assert_allclose(angles_of(rotation_of(np.array(angles))), reference.as_euler("xyz"), atol=1e-9)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2], ids=["up", "down"])
def test_angles_at_the_pole_give_the_rotation_back(pitch: float) -> None:
    rotation = rotation_of(np.array([0.4, pitch, 0.0]))
    np.testing.assert_allclose(rotation_of(angles_of(rotation)), rotation, atol=1e-9)


def test_episode_ends_at_its_first_success(made: list[FakeEnv]) -> None:
    policy = Pusher(1.0)
    episode = play(WIDOWX, policy, trial(WIDOWX, "widowx"))
    assert (episode.error, episode.success, episode.steps, episode.calls) == (None, True, 5, 2)
    assert episode.facts == {"variant": "base"}
    # The simulator's words may change on the way; only their first letter and the full stop are ours.
    assert [observation.instruction for observation in policy.seen] == [
        "Open Top drawer.",
        "Place apple into Top drawer.",
    ]


def test_episode_fails_at_its_horizon(made: list[FakeEnv]) -> None:
    case = trial(GOOGLE, "google_va", 0, number=26)
    episode = play(GOOGLE, Pusher(0.0), case)
    assert (episode.error, episode.success, episode.steps, episode.calls) == (None, False, 80, 20)
    assert episode.facts == {"variant": "base/upright"}


def test_cameras_and_grippers_at_rest(made: list[FakeEnv]) -> None:
    assert environment_action(WIDOWX.open().rest(), "widowx").tolist() == [0] * 6 + [1]
    assert environment_action(GOOGLE.open().rest(), "google").tolist() == [0] * 7


@pytest.mark.parametrize(("fresh", "environments"), [(True, 3), (False, 2)], ids=["fresh", "kept"])
def test_environments(made: list[FakeEnv], fresh: bool, environments: int) -> None:
    world = replace(WIDOWX, fresh_env=fresh).open()
    for task, number in ((0, 0), (0, 1), (1, 0)):
        world.reset(trial(WIDOWX, "widowx", task, number))
    assert len(made) == environments
    assert [env.closed for env in made] == [True] * (environments - 1) + [False]
    world.close()
    assert made[-1].closed


def test_refuses_what_the_simulator_should_not_give(made: list[FakeEnv], monkeypatch: pytest.MonkeyPatch) -> None:
    world = WIDOWX.open()
    world.reset(trial(WIDOWX, "widowx"))
    raw = made[0]._observation()
    monkeypatch.setattr(world, "_raw", raw | {"agent": {"qpos": np.zeros(8)}})
    with pytest.raises(RuntimeError, match=r"no eef_pos.*allenzren/SimplerEnv"):
        world.observe()
    monkeypatch.setattr(world, "_raw", raw | {"agent": {"eef_pos": np.zeros(8)}})
    with pytest.raises(ValueError, match="eef_pos: expected position, quaternion and openness"):
        world.observe()
    small = {"3rd_view_camera": {"rgb": np.zeros((256, 256, 3), np.uint8)}}
    monkeypatch.setattr(world, "_raw", raw | {"image": small})
    with pytest.raises(ValueError, match=r"3rd_view_camera: expected \(480, 640, 3\) uint8, got \(256, 256, 3\)"):
        world.observe()


def test_lists_suites_and_tasks_for_wrong_ones() -> None:
    assert WIDOWX.for_suites([]) is WIDOWX
    google = WIDOWX.for_suites(["google_vm", "google_va"])
    assert (google.robot, google.rate_hz, google.robot_type, google.repeats) == ("google", 3.0, "fractal_delta", 1)
    with pytest.raises(ValueError, match="suite: expected one of widowx, google_vm, google_va, got bridge"):
        WIDOWX.for_suites(["bridge"])
    with pytest.raises(ValueError, match="suites of one robot"):
        WIDOWX.for_suites(["widowx", "google_vm"])
    with pytest.raises(ValueError, match=r"task: expected one of widowx: put_carrot_on_plate, .*; got 'fly'"):
        find_task(Task("widowx", 0, "fly", ""))
    with pytest.raises(ValueError, match="robot: expected one of widowx, google"):
        Simpler(robot="franka")
    with pytest.raises(ValueError, match="pick_steps"):
        Simpler(pick_steps=0)


def test_tells_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"simpler_env cannot be imported .*allenzren/SimplerEnv"):
        WIDOWX.versions()
    with pytest.raises(RuntimeError, match="simpler_env"):
        WIDOWX.open()


def test_protocol_is_json() -> None:
    assert json.loads(json.dumps(GOOGLE.protocol())) == GOOGLE.protocol()
    assert GOOGLE.protocol()["drawer_steps"] == 113
