"""The ALOHA transfer-cube simulation as a bimanual XR-0 robot (spec section 3.4): two ViperX arms, a cube, MuJoCo.

Units: joints in radians, grippers from 0 (closed) to 1 (open), times in seconds of simulation.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from xr0_engine.robot.decode import BIMANUAL_COLUMNS, LEFT, RIGHT, ArmPose, BimanualPose
from xr0_engine.types import Observation

ROBOT_TYPE = "bimanual"
CONTROL_RATE_HZ = 30.0
INSTRUCTION = "Pick up the red cube with the right arm and hand it over to the left arm."

# View key of the embodiment profile -> camera of the MuJoCo model.
CAMERAS = {"ego": "top", "left_wrist": "left_wrist", "right_wrist": "right_wrist"}

# The simulator's own order of an arm's seven values; left arm first.
ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm roll", "wrist angle", "wrist rotate", "gripper")
JOINT_NAMES = tuple(f"{side} {joint}" for side in ("left", "right") for joint in ARM_JOINTS)

# An arm's end effector is the point between its finger tips, this far along its gripper's x axis.
GRIPPER_BODY = "vx300s_{}/gripper_link"
GRASP_POINT_M = 0.135

_COLUMNS = np.concatenate(
    [np.arange(BIMANUAL_COLUMNS)[part] for arm in (LEFT, RIGHT) for part in (arm.joints, arm.gripper)]
)

_RENDER_A_PIXEL = """
import mujoco
context = mujoco.GLContext(1, 1)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
"""


def joints_to_columns(joints: np.ndarray) -> np.ndarray:
    """The simulator's (..., 14) joints and grippers in the bimanual columns: (..., 32) float32, the rest zero."""
    columns = np.zeros((*joints.shape[:-1], BIMANUAL_COLUMNS), dtype=np.float32)
    columns[..., _COLUMNS] = joints
    return columns


def columns_to_joints(columns: np.ndarray) -> np.ndarray:
    """The inverse of joints_to_columns, for states and for action deltas: (..., 32) -> (..., 14), same dtype."""
    return columns[..., _COLUMNS]


class AlohaEnv:
    """One episode of gym-aloha's AlohaTransferCube at 30 Hz, seen through XR-0's three views.

    seed: where the cube lies. width, height: of the images, in pixels, at most the simulator's buffer of 640x480.
    views: those that observe() renders, keys of CAMERAS. antialias: smooth edges, most of a frame's cost where the CPU
    renders.
    `physics` (dm_control) and `task` (gym-aloha) are open to callers that script the arms or read the cube's pose.
    Use it as a context manager, or call close(). Raises ValueError for an image size that does not fit and for a view
    that there is not, RuntimeError, with the remedy, if the simulator is not installed or nothing here can render.
    """

    def __init__(
        self,
        seed: int = 0,
        width: int = 640,
        height: int = 480,
        views: Sequence[str] = tuple(CAMERAS),
        antialias: bool = True,
    ) -> None:
        if not (0 < width <= 640 and 0 < height <= 480):
            raise ValueError(f"width, height: expected 1x1 to 640x480 pixels, got {width}x{height}")
        if not views or not set(views) <= set(CAMERAS):
            raise ValueError(f"views: expected some of {', '.join(CAMERAS)}, got {', '.join(views) or 'none'}")
        choose_renderer()
        if find_spec("triton") is not None:
            # Triton and Mesa's software renderer each bring an LLVM. Loaded after Mesa's, Triton's ends the process,
            # and torch loads it when it likes.
            import triton  # noqa: F401
        from dm_control import mujoco
        from gym_aloha.constants import ASSETS_DIR, normalize_puppet_gripper_position
        from gym_aloha.tasks.sim import TransferCubeTask

        self.width, self.height, self.views = width, height, tuple(views)
        self.task: Any = TransferCubeTask()
        self.physics: Any = mujoco.Physics.from_xml_path(str(ASSETS_DIR / "bimanual_viperx_transfer_cube.xml"))
        # Two lights' shadow maps are most of a frame's cost in a software renderer, and tell the policy nothing.
        self.physics.model.vis.quality.shadowsize = 0
        if not antialias:
            self.physics.model.vis.quality.offsamples = 0
        # Actuators are six joints and two mirrored fingers an arm; the first finger stands for the gripper.
        limits = np.delete(self.physics.model.actuator_ctrlrange, [7, 15], axis=0)
        grippers = [ARM_JOINTS.index("gripper"), len(ARM_JOINTS) + ARM_JOINTS.index("gripper")]
        limits[grippers] = normalize_puppet_gripper_position(limits[grippers])
        self.limits = limits
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start an episode: time 0, arms at rest, the cube as the seed puts it. Raises ValueError if seed < 0."""
        from gym_aloha.tasks import sim as aloha
        from gym_aloha.utils import sample_box_pose

        # gym-aloha hands the cube's pose to its task through this module variable. Its own reset would also render
        # three images that nobody looks at.
        aloha.BOX_POSE[0] = sample_box_pose(seed)
        self.task.initialize_episode(self.physics)
        self._tick = 0

    @property
    def joints(self) -> np.ndarray:
        """(14,) float64, measured, in the order of JOINT_NAMES."""
        joints: np.ndarray = self.task.get_qpos(self.physics)
        return joints

    @property
    def pose(self) -> BimanualPose:
        """Where both arms are now, as measured: end effectors in the simulator's world, joints and grippers."""
        joints = np.split(self.joints, 2)
        return BimanualPose(*(self._arm_pose(side, arm) for side, arm in zip(("left", "right"), joints, strict=True)))

    def observe(self, instruction: str = INSTRUCTION) -> Observation:
        """What the robot sees and feels now; renders the camera of each of `views` once."""
        return Observation(
            images={view: self._render(CAMERAS[view]) for view in self.views},
            instruction=instruction,
            state=joints_to_columns(self.joints)[None],
            robot_type=ROBOT_TYPE,
            timestamp_s=float(self.physics.time()),
        )

    def apply(self, action: np.ndarray, origin: Observation) -> np.ndarray:
        """Hold one action of a chunk for 1/30 s. action: (32,), anchored at origin, the chunk's observation.

        The simulation drives joints: end-effector columns are not used. Returns the (14,) targets, within `limits`.
        """
        targets = columns_to_joints(origin.state.reshape(-1, BIMANUAL_COLUMNS)[-1] + action)
        return self.step(targets)

    def step(self, targets: np.ndarray) -> np.ndarray:
        """Hold absolute joint and gripper targets (14,) for 1/30 s. Returns them as held, clipped to `limits`."""
        targets = np.clip(targets, *self.limits.T)
        self.task.before_step(targets, self.physics)
        # 1/30 s is no multiple of the 2 ms physics step (nor of gym-aloha's 20 ms control step): each target is held
        # until the physics step nearest to the next tick, so the jitter stays under 1 ms and does not add up.
        begin, end = (round(tick / CONTROL_RATE_HZ / self.physics.timestep()) for tick in (self._tick, self._tick + 1))
        self.physics.step(end - begin)
        self._tick += 1
        return targets

    def close(self) -> None:
        """Release the renderer; a software renderer left open complains when Python exits."""
        self.physics.free()

    def __enter__(self) -> AlohaEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _arm_pose(self, side: str, joints: np.ndarray) -> ArmPose:
        body = GRIPPER_BODY.format(side)
        rotation = self.physics.named.data.xmat[body].reshape(3, 3).copy()
        position_m = self.physics.named.data.xpos[body] + GRASP_POINT_M * rotation[:, 0]
        return ArmPose(position_m, rotation, joints_rad=joints[:6], gripper=joints[6:])

    def _render(self, camera: str) -> np.ndarray:
        image: np.ndarray = self.physics.render(height=self.height, width=self.width, camera_id=camera)
        return image


def choose_renderer() -> None:
    """choose_gl for this simulator. Raises RuntimeError, with the remedy, if it is not installed or cannot render."""
    if find_spec("gym_aloha") is None:
        # dm-control needs labmaze, which has no wheels for later versions.
        if sys.version_info >= (3, 13):
            raise RuntimeError("the simulator needs Python 3.12 or older: make the environment with one")
        raise RuntimeError("the simulator is not installed: pip install 'xr0-engine[sim]'")
    choose_gl()


def choose_gl() -> None:
    """Make MuJoCo render without a window: set MUJOCO_GL to what works here, EGL before OSMesa before GLFW.

    A value that is already set is only tried out. Linux only; elsewhere MuJoCo's default is right. Call it before
    mujoco or dm_control is first imported: they read it then. Raises RuntimeError with what failed, and the remedy.
    """
    if sys.platform != "linux":
        return
    given = os.environ.get("MUJOCO_GL")
    failures = []
    for renderer in (given,) if given else ("egl", "osmesa", "glfw"):
        failure = _try_renderer(renderer)
        if failure is None:
            os.environ["MUJOCO_GL"] = renderer
            return
        failures.append(f"MUJOCO_GL={renderer}: {failure}")
    raise RuntimeError(
        "MuJoCo cannot render on this machine. On Debian and Ubuntu: apt-get install libegl1 libgl1 "
        "(then MUJOCO_GL=egl, chosen if unset), or apt-get install libosmesa6 (then MUJOCO_GL=osmesa). "
        f"Tried: {'; '.join(failures)}"
    )


@cache
def _try_renderer(renderer: str) -> str | None:
    # In a process of its own: an import that failed cannot be repeated with another value, and drivers may abort.
    probe = subprocess.run(
        [sys.executable, "-c", _RENDER_A_PIXEL],
        env={**os.environ, "MUJOCO_GL": renderer},
        capture_output=True,
        text=True,
    )
    if probe.returncode == 0:
        return None
    return (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
