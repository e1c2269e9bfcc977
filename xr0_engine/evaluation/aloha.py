"""The ALOHA simulation as a benchmark: hand a cube over, once a trial or piece after piece for half an hour.

Suite `transfer` gives success rates. Suite `throughput` is the protocol of a production line: whenever a piece is done,
or has taken too long, the next one lies there; what counts is pieces a minute. Needs the extra `sim`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from xr0_engine.evaluation.aloha_body import BODIES, Body
from xr0_engine.evaluation.benchmark import Task, Trial, World
from xr0_engine.evaluation.installed import check_suites
from xr0_engine.executor import Policy
from xr0_engine.robot.decode import BimanualPose
from xr0_engine.robot.mobile import MobilePose
from xr0_engine.sim import CAMERAS, CONTROL_RATE_HZ, INSTRUCTION, ROBOT_TYPE, AlohaEnv, choose_renderer
from xr0_engine.training.data.expert import transferred
from xr0_engine.types import Observation

TRANSFER, THROUGHPUT = "transfer", "throughput"
TASK_NAME = "transfer_cube"
PACKAGES = ("gym-aloha", "dm-control", "mujoco")


@dataclass(frozen=True)
class Aloha:
    """gym-aloha's AlohaTransferCube at 30 Hz. All fields are part of the protocol.

    width, height: of the images, in pixels. execute: actions of each chunk that mode sync executes; the post-training
    chunk has 30 (spec section 3.3). horizon_steps: of a trial of `transfer`; 8 s, the length of the episodes that ACT
    records in this simulation. minutes: simulated time of a run of `throughput`; piece_timeout_s: what a piece may take
    in it. Raises ValueError that names the field.
    """

    width: int = 320
    height: int = 240
    execute: int = 30
    horizon_steps: int = 240
    minutes: float = 30.0
    piece_timeout_s: float = 20.0

    name = "aloha"
    rate_hz = CONTROL_RATE_HZ
    robot_type = ROBOT_TYPE
    default_suites = (TRANSFER,)

    def __post_init__(self) -> None:
        for field, holds, expected in (
            ("width", 0 < self.width <= 640, "1 to 640 pixels"),
            ("height", 0 < self.height <= 480, "1 to 480 pixels"),
            ("execute", self.execute >= 1, "a whole number of at least 1"),
            ("horizon_steps", self.horizon_steps >= 1, "a whole number of at least 1"),
            ("minutes", self.run_steps >= 1, "a time of at least one control step"),
            ("piece_timeout_s", self.piece_steps >= 1, "seconds, at least one control step"),
        ):
            if not holds:
                raise ValueError(f"{field}: expected {expected}, got {getattr(self, field)!r}")

    @property
    def run_steps(self) -> int:
        """Control steps of a run of `throughput`."""
        return round(self.minutes * 60 * self.rate_hz)

    @property
    def piece_steps(self) -> int:
        """Control steps that a piece of `throughput` may take."""
        return round(self.piece_timeout_s * self.rate_hz)

    def for_suites(self, names: Sequence[str]) -> Aloha:
        """The benchmark for these suites: it is the same for all. Raises ValueError that lists them."""
        check_suites(names, self.suites())
        return self

    def suites(self) -> Mapping[str, Sequence[Task]]:
        return {suite: (Task(suite, 0, TASK_NAME, INSTRUCTION),) for suite in (TRANSFER, THROUGHPUT)}

    def trials(self, task: Task) -> int:
        """How many trials a rate is made of, unless asked otherwise: a run of half an hour is one."""
        return 1 if task.suite == THROUGHPUT else 50

    def protocol(self) -> Mapping[str, Any]:
        return asdict(self)

    def versions(self) -> Mapping[str, str]:
        choose_renderer()
        renderer = {"renderer": os.environ.get("MUJOCO_GL", "default")}
        return {name: version(name) for name in PACKAGES} | renderer

    def open(self) -> AlohaWorld:
        return AlohaWorld(self)

    def expert(self, world: World) -> Policy | None:
        from xr0_engine.evaluation.aloha_expert import TransferExpert

        if not isinstance(world, AlohaWorld):
            raise ValueError(f"world: expected an AlohaWorld, which the expert looks into, got {type(world).__name__}")
        return TransferExpert(world.env)


class AlohaWorld:
    """Both arms and a cube. One simulation for all trials: a reset sets its whole state, and random numbers come from
    the trial alone, so that nothing is left of the trial before. Cameras are drawn in observe and picture. robot_type:
    of aloha_body.BODIES, the benchmark's if not given."""

    def __init__(self, benchmark: Aloha, robot_type: str = ROBOT_TYPE) -> None:
        self._benchmark = benchmark
        self.env = AlohaEnv(0, benchmark.width, benchmark.height)
        self.body: Body = BODIES[robot_type](self.env)
        self._trial: Trial | None = None
        self._success = False
        # Control steps of the trial and of the rollout; pieces begun, given up, and done in so many seconds.
        self._elapsed = self._rollout_steps = 0
        self._begun, self._timeouts, self._cut = 0, 0, False
        self._piece_s: list[float] = []

    def reset(self, trial: Trial) -> None:
        """Arms at rest, the cube where the trial's seed and number put it."""
        check_suites([trial.task.suite], self._benchmark.suites())
        self._trial = trial
        self._elapsed = self._rollout_steps = 0
        self._begun, self._timeouts, self._cut, self._piece_s = 1, 0, False, []
        self._success = False
        self.env.reset(piece_seed(trial, 0))

    @property
    def horizon(self) -> int:
        if not self._is_throughput:
            return self._benchmark.horizon_steps
        begun = self._elapsed - self._rollout_steps
        return min(self._benchmark.piece_steps, self._benchmark.run_steps - begun)

    def show(self, views: Sequence[str]) -> None:
        # What there is not, the policy will miss and say so.
        self.env.views = tuple(view for view in CAMERAS if view in views) or tuple(CAMERAS)

    def observe(self) -> Observation:
        return self.body.observe(INSTRUCTION)

    def pose(self) -> BimanualPose | MobilePose:
        return self.body.pose()

    def rest(self) -> None:
        """Where it is."""

    def step(self, row: np.ndarray) -> None:
        """row: (A,) float64, absolute, as the body takes it."""
        self.env.step(self.body.targets(row))
        self._elapsed += 1
        self._rollout_steps += 1
        self._success = transferred(self.env)

    @property
    def success(self) -> bool:
        return self._success

    def proceed(self) -> bool:
        """`transfer` is over after its one rollout. `throughput` goes on with the next piece as long as there is time:
        the last cube is gone and another lies on the table, while the arms stay as they are."""
        if not self._is_throughput:
            return False
        self._count()
        if self._elapsed >= self._benchmark.run_steps:
            return False
        self._rollout_steps, self._success = 0, False
        self._put_cube(piece_seed(self._running, self._begun))
        self._begun += 1
        return True

    def picture(self) -> np.ndarray:
        image: np.ndarray = self.env.physics.render(
            height=self.env.height, width=self.env.width, camera_id="angle"
        ).copy()
        return image

    def facts(self) -> Mapping[str, Any]:
        """Of a run of `throughput`, after its last piece: pieces, timeouts, duration_s in simulated time, the seconds
        that each piece took, and whether the end of the run cut a piece off (neither done nor timed out)."""
        if not self._is_throughput:
            return {}
        return {
            "pieces": len(self._piece_s),
            "timeouts": self._timeouts,
            "duration_s": self._elapsed / self._benchmark.rate_hz,
            "piece_s": list(self._piece_s),
            "cut": self._cut,
        }

    def close(self) -> None:
        self.env.close()

    @property
    def _running(self) -> Trial:
        if self._trial is None:
            raise RuntimeError("no trial has begun: call reset first")
        return self._trial

    @property
    def _is_throughput(self) -> bool:
        return self._running.task.suite == THROUGHPUT

    def _count(self) -> None:
        """Count the piece that has just ended."""
        if self._success:
            self._piece_s.append(self._rollout_steps / self._benchmark.rate_hz)
        elif self._rollout_steps >= self._benchmark.piece_steps:
            self._timeouts += 1
        else:
            self._cut = True

    def _put_cube(self, seed: int) -> None:
        from gym_aloha.utils import sample_box_pose

        data = self.env.physics.data
        # The cube's free joint is the last one: seven positions, six velocities.
        data.qpos[-7:] = sample_box_pose(seed)
        data.qvel[-6:] = 0
        data.qacc_warmstart[-6:] = 0
        self.env.physics.forward()


def piece_seed(trial: Trial, piece: int) -> int:
    """The seed of where a piece lies: the same in every mode and with every delay."""
    return int(np.random.SeedSequence((trial.seed, trial.number, piece)).generate_state(1)[0])
