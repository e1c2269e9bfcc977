"""SimplerEnv as a benchmark: WidowX and Google robot, by the user's own simpler_env and mani_skill2_real2sim.

The protocol is that of the released evaluation (its eval_simplerenv): states, actions and grippers as below, an episode
ends at its first success. What lies where is in simpler_setups.py. docs/evaluation.md says which clone it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.evaluation.benchmark import Task, Trial, World
from xr0_engine.evaluation.installed import check_suites, required, version_of
from xr0_engine.evaluation.simpler_setups import GOOGLE_VA, GOOGLE_VM, WIDOWX, Setup, SetupTask, all_tasks
from xr0_engine.executor import Policy
from xr0_engine.robot.decode import rotation_exp, rotation_log
from xr0_engine.types import Observation

STATE_WIDTH = 32
# The state of the Bridge data is relative to a gripper that points down: bridge_data_robot's default rotation.
BRIDGE_DEFAULT = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
SINE_OF_POLE = 1 - 1e-9

REMEDY = (
    "Clone github.com/allenzren/SimplerEnv with its submodules (upstream's does not give the gripper's pose) and pip "
    "install -e its ManiSkill2_real2sim, then itself: docs/evaluation.md has the commands."
)


@dataclass(frozen=True)
class Robot:
    """What the two robots differ in. camera: of the simulator, seen as view; image_size: (height, width)."""

    robot_type: str
    rate_hz: float
    sim_hz: int
    control_mode: str
    camera: str
    view: str
    image_size: tuple[int, int]
    suites: tuple[str, ...]


ROBOTS = {
    "widowx": Robot(
        "bridge_delta",
        5.0,
        500,
        "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
        "3rd_view_camera",
        "base",
        (480, 640),
        (WIDOWX,),
    ),
    "google": Robot(
        "fractal_delta",
        3.0,
        513,
        "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by_planner",
        "overhead_camera",
        "ego",
        (512, 640),
        (GOOGLE_VM, GOOGLE_VA),
    ),
}


@dataclass(frozen=True)
class Simpler:
    """All fields are part of the protocol.

    robot: widowx or google. widowx_steps: horizon of its four tasks (the released list). pick_steps, near_steps,
    drawer_steps, put_steps: horizons of the Google robot's; the released list of these is not public, so these are
    SimplerEnv's scripts'. repeats: how often each setup counts; the released tables have 144 = 6 x 24 episodes a task
    on WidowX, and each of the Google robot's setups once; None: as released. fresh_env: a new environment for each
    episode, as in the released evaluation; False: only for another scene, where the renderer cannot be opened again
    and again. Raises ValueError that names the field.
    """

    robot: str = "widowx"
    execute: int = 4
    widowx_steps: int = 120
    pick_steps: int = 80
    near_steps: int = 80
    drawer_steps: int = 113
    put_steps: int = 200
    repeats: int | None = None
    fresh_env: bool = True

    name = "simpler"

    def __post_init__(self) -> None:
        if self.robot not in ROBOTS:
            raise ValueError(f"robot: expected one of {', '.join(ROBOTS)}, got {self.robot!r}")
        if self.repeats is None:
            object.__setattr__(self, "repeats", 6 if self.robot == "widowx" else 1)
        for field in ("execute", "widowx_steps", "pick_steps", "near_steps", "drawer_steps", "put_steps", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected a whole number of at least 1, got {getattr(self, field)!r}")

    @property
    def rate_hz(self) -> float:
        return ROBOTS[self.robot].rate_hz

    @property
    def robot_type(self) -> str:
        return ROBOTS[self.robot].robot_type

    def for_suites(self, names: Sequence[str]) -> Simpler:
        """The benchmark for the robot of these suites; none named: as it is. Raises ValueError that lists them."""
        check_suites(names, [suite for robot in ROBOTS.values() for suite in robot.suites])
        owners = {name for name, robot in ROBOTS.items() if set(names) & set(robot.suites)}
        if len(owners) > 1:
            raise ValueError(f"suite: expected suites of one robot, which has a checkpoint, got {', '.join(names)}")
        if not owners or owners == {self.robot}:
            return self
        return replace(self, robot=owners.pop(), repeats=None)

    def suites(self) -> Mapping[str, Sequence[Task]]:
        tasks: dict[str, list[Task]] = {suite: [] for suite in ROBOTS[self.robot].suites}
        for task in _tasks():
            if task.suite in tasks:
                known = tasks[task.suite]
                known.append(Task(task.suite, len(known), task.name, task.instruction))
        return tasks

    def trials(self, task: Task) -> int:
        """How many trials a rate is made of, unless asked otherwise: the released number of episodes."""
        return len(find_task(task).setups) * (self.repeats or 1)

    def protocol(self) -> Mapping[str, Any]:
        return asdict(self)

    def versions(self) -> Mapping[str, str]:
        packages = {"simpler_env": "simpler_env", "mani_skill2_real2sim": "mani_skill2_real2sim", "sapien": "sapien"}
        return {module: version_of(module, package, REMEDY) for module, package in packages.items()}

    def open(self) -> SimplerWorld:
        return SimplerWorld(self)

    def expert(self, world: World) -> Policy | None:
        return None


class SimplerWorld:
    """An episode is a trial. Trial n has setup n; beyond the last it begins again with the first."""

    def __init__(self, benchmark: Simpler) -> None:
        self._benchmark, self._robot = benchmark, ROBOTS[benchmark.robot]
        self._build = required("simpler_env.utils.env.env_builder", REMEDY).build_maniskill2_env
        self._assets = Path(required("mani_skill2_real2sim", REMEDY).ASSET_DIR)
        self._env: Any = None
        self._built: tuple[str, dict[str, Any]] | None = None

    def reset(self, trial: Trial) -> None:
        check_suites([trial.task.suite], self._robot.suites)
        task = find_task(trial.task)
        self._setup = task.setups[trial.number % len(task.setups)]
        self._horizon = int(getattr(self._benchmark, task.steps))
        wanted = self._setup.env, self._arguments(self._setup)
        if self._benchmark.fresh_env or self._built != wanted:
            self.close()
            self._env, self._built = self._build(wanted[0], **wanted[1]), wanted
        self._raw, _ = self._env.reset(options=reset_options(self._setup))
        self._success = False

    @property
    def horizon(self) -> int:
        return self._horizon

    def observe(self) -> Observation:
        words = str(self._env.unwrapped.get_language_instruction())
        agent = self._raw["agent"]
        if "eef_pos" not in agent:
            raise RuntimeError(f"agent: the simulator's observation has no eef_pos, the gripper's pose. {REMEDY}")
        state = np.zeros(STATE_WIDTH, np.float32)
        state[:8] = (bridge_state if self._benchmark.robot == "widowx" else fractal_state)(agent["eef_pos"])
        # Not capitalize(): the released evaluation leaves the other letters as they are.
        instruction = words[:1].upper() + words[1:] + "."
        return Observation({self._robot.view: self._image()}, instruction, state, self._robot.robot_type)

    def pose(self) -> None:
        return None

    def rest(self) -> np.ndarray:
        """No motion, the gripper open as it is at the begin: WidowX is told where it shall be (1 is open), the Google
        robot how far it shall move (0.5 is not at all)."""
        return np.array([0.0] * 6 + [1.0 if self._benchmark.robot == "widowx" else 0.5])

    def step(self, row: np.ndarray) -> None:
        """row: its first 7 columns are position (metres), roll, pitch, yaw (radians), gripper (0 closed to 1 open)."""
        self._raw, _, done, _, _ = self._env.step(environment_action(row[:7], self._benchmark.robot))
        self._success = bool(done)

    @property
    def success(self) -> bool:
        return self._success

    def proceed(self) -> bool:
        return False

    def picture(self) -> np.ndarray:
        return self._image().copy()

    def facts(self) -> Mapping[str, Any]:
        return {"variant": self._setup.variant}

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = self._built = None

    def _image(self) -> np.ndarray:
        image = np.asarray(self._raw["image"][self._robot.camera]["rgb"])
        if image.shape != (*self._robot.image_size, 3) or image.dtype != np.uint8:
            expected = (*self._robot.image_size, 3)
            raise ValueError(f"{self._robot.camera}: expected {expected} uint8, got {image.shape} {image.dtype}")
        return image

    def _arguments(self, setup: Setup) -> dict[str, Any]:
        """Of build_maniskill2_env, as SimplerEnv's evaluator and the released list have them."""
        arguments: dict[str, Any] = {
            **setup.build,
            "obs_mode": "rgbd",
            "robot": setup.robot,
            "sim_freq": self._robot.sim_hz,
            "control_mode": self._robot.control_mode,
            "control_freq": round(self._robot.rate_hz),
            "max_episode_steps": self._horizon,
            "scene_name": setup.scene,
            "camera_cfgs": {"add_segmentation": True},
        }
        if setup.overlay is not None:
            arguments["rgb_overlay_path"] = str(self._assets / "real_inpainting" / setup.overlay)
        return arguments


@cache
def _tasks() -> tuple[SetupTask, ...]:
    return all_tasks()


def find_task(task: Task) -> SetupTask:
    """The setups of a task. Raises ValueError that lists the suite's tasks."""
    known = [candidate for candidate in _tasks() if candidate.suite == task.suite]
    for candidate in known:
        if candidate.name == task.name:
            return candidate
    names = ", ".join(candidate.name for candidate in known) or "none: no such suite"
    raise ValueError(f"task: expected one of {task.suite}: {names}; got {task.name!r}")


def reset_options(setup: Setup) -> dict[str, Any]:
    """Where robot and objects begin, as the environment's reset takes it. Quaternions are w, x, y, z."""
    half = setup.robot_yaw_rad / 2
    # The robot's base is turned by half a turn about z; on top of that, by the yaw.
    quaternion = np.array([-np.sin(half), 0.0, 0.0, np.cos(half)]) + 0.0
    name, place = setup.place
    return {
        "robot_init_options": {"init_xy": np.array(setup.robot_xy), "init_rot_quat": quaternion},
        "obj_init_options": {name: place if name == "episode_id" else np.array(place)},
    }


def environment_action(action: np.ndarray, robot: str) -> np.ndarray:
    """A policy's action (7,) as the environment's, float64: the rotation as axis-angle; the gripper of WidowX open (1)
    or closed (-1), that of the Google robot a relative command from -1 (opens) to 1 (closes), without stickiness."""
    gripper = float(action[6])
    told = 2.0 * (gripper > 0.5) - 1.0 if robot == "widowx" else np.clip(1.0 - 2.0 * gripper, -1.0, 1.0)
    turn = rotation_log(rotation_of(np.asarray(action[3:6], np.float64)))
    return np.concatenate([np.asarray(action[:3], np.float64), turn, [told]])


def bridge_state(eef: np.ndarray) -> np.ndarray:
    """(8,): position, roll, pitch, yaw against a gripper that points down, 0, openness.

    eef: (8,), the simulator's position, quaternion w, x, y, z, openness of the gripper, in the robot's base frame.
    """
    eef = _eef(eef)
    return np.concatenate([eef[:3], angles_of(_matrix(eef[3:7]) @ BRIDGE_DEFAULT.T), [0.0], eef[7:]])


def fractal_state(eef: np.ndarray) -> np.ndarray:
    """(8,): position, quaternion x, y, z, w with w >= 0, closedness. eef: as in bridge_state."""
    eef = _eef(eef)
    quaternion = eef[3:7] / np.linalg.norm(eef[3:7])
    quaternion = -quaternion if quaternion[0] < 0 else quaternion
    return np.concatenate([eef[:3], quaternion[1:], quaternion[:1], 1.0 - eef[7:]])


def rotation_of(angles_rad: np.ndarray) -> np.ndarray:
    """(3, 3) of roll, pitch, yaw (3,) about the fixed axes x, y, z in this order."""
    x, y, z = rotation_exp(np.diag(angles_rad))
    rotation: np.ndarray = z @ y @ x
    return rotation


def angles_of(rotation: np.ndarray) -> np.ndarray:
    """The inverse of rotation_of, pitch within a quarter turn; at a quarter turn yaw is 0."""
    pitch = np.arctan2(-rotation[2, 0], np.hypot(rotation[0, 0], rotation[1, 0]))
    if abs(rotation[2, 0]) > SINE_OF_POLE:
        return np.array([np.arctan2(-rotation[1, 2], rotation[1, 1]), pitch, 0.0])
    roll = np.arctan2(rotation[2, 1], rotation[2, 2])
    return np.array([roll, pitch, np.arctan2(rotation[1, 0], rotation[0, 0])])


def _matrix(quaternion: np.ndarray) -> np.ndarray:
    """(3, 3) of a quaternion w, x, y, z, of any length above 0."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _eef(eef: np.ndarray) -> np.ndarray:
    eef = np.asarray(eef, np.float64)
    if eef.shape != (8,) or not np.isfinite(eef).all() or not np.linalg.norm(eef[3:7]) > 0:
        raise ValueError(f"eef_pos: expected position, quaternion and openness, (8,), finite, got {eef}")
    return eef
