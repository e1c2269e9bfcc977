"""CALVIN as a benchmark: chains of five subtasks in scene D, by the user's own calvin_env and calvin_agent.

The protocol is that of the released evaluation (its eval_calvin): what CALVIN gives, a centre crop that the embodiment
profile does, and a gripper that is open or closed by its action's sign. docs/evaluation.md says what to install.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.evaluation.benchmark import Task, Trial, World
from xr0_engine.evaluation.installed import check_suites, required, version_of
from xr0_engine.executor import Policy
from xr0_engine.files import YAML_BYTES, read_bytes, read_json, reading
from xr0_engine.types import FileError, Observation

# Suite -> robot type of the checkpoint that was trained on it; the scene is D in both.
ROBOT_TYPES = {"ABCD_D": "calvin_abcd_orig", "ABC_D": "calvin_abc_orig"}
CHAIN = 5
STATE_WIDTH, STATE_USED = 32, 7
# Camera of the simulator -> key of the embodiment profile, and (height, width).
VIEWS = {"rgb_static": ("base", (200, 200)), "rgb_gripper": ("left_wrist", (84, 84))}
OPEN, CLOSED = 1.0, -1.0
# What the description of scene D names, and those of the other scenes do not.
SCENE = "calvin_table_D"
TASKS_FILE, ANNOTATIONS_FILE = "new_playtable_tasks.yaml", "new_playtable_validation.yaml"

REMEDY = (
    "Clone github.com/mees/calvin with its submodules, check out commit 797142c of calvin_env, and pip install -e "
    "calvin_env/tacto, calvin_env and calvin_models: docs/evaluation.md has the commands."
)


@dataclass(frozen=True)
class Calvin:
    """All fields are part of the protocol, except where files lie.

    split: ABCD_D or ABC_D, what the checkpoint was trained on. dataset: a folder whose validation/.hydra describes
    scene D, such as task_ABC_D. sequences: a JSON file of [initial state, subtasks] pairs, as the released evaluation
    has one; None: what calvin_agent's get_sequences gives for so many chains. config: a folder that holds
    new_playtable_tasks.yaml and new_playtable_validation.yaml; None: calvin_models/conf beside calvin_agent. chains:
    how many there are. subtask_steps: 36 chunks of 10. fresh_env: a new environment for each chain, as in the released
    evaluation; CALVIN's own has one for all. Raises ValueError that names the field.
    """

    split: str = "ABCD_D"
    dataset: str | None = None
    sequences: str | None = None
    config: str | None = None
    chains: int = 1000
    subtask_steps: int = 360
    execute: int = 10
    fresh_env: bool = True

    name = "calvin"
    rate_hz = 30.0

    def __post_init__(self) -> None:
        if self.split not in ROBOT_TYPES:
            raise ValueError(f"split: expected one of {', '.join(ROBOT_TYPES)}, got {self.split!r}")
        for field in ("chains", "subtask_steps", "execute"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected a whole number of at least 1, got {getattr(self, field)!r}")

    @property
    def robot_type(self) -> str:
        return ROBOT_TYPES[self.split]

    def for_suites(self, names: Sequence[str]) -> Calvin:
        """The benchmark for the split that is named; none: as it is. Raises ValueError that lists them."""
        check_suites(names, ROBOT_TYPES)
        if len(names) > 1:
            raise ValueError(f"suite: expected one, since each has a checkpoint of its own, got {', '.join(names)}")
        return replace(self, split=names[0]) if names else self

    def suites(self) -> Mapping[str, Sequence[Task]]:
        return {self.split: (Task(self.split, 0, "chain", "Five subtasks, one after the other."),)}

    def trials(self, task: Task) -> int:
        """How many trials a rate is made of, unless asked otherwise: every chain once."""
        return self.chains

    def protocol(self) -> Mapping[str, Any]:
        fields = asdict(self)
        # Where files lie on this machine decides nothing; which chains they hold does.
        given = {name: fields.pop(name) for name in ("dataset", "sequences", "config")}
        return fields | {"sequences": "get_sequences" if given["sequences"] is None else _digest(given["sequences"])}

    def versions(self) -> Mapping[str, str]:
        packages = {"calvin_env": "calvin_env", "calvin_agent": "calvin", "pybullet_utils": "pybullet"}
        return {module: version_of(module, package, REMEDY) for module, package in packages.items()}

    def open(self) -> CalvinWorld:
        return CalvinWorld(self)

    def expert(self, world: World) -> Policy | None:
        return None


class CalvinWorld:
    """A chain is a trial, a subtask a rollout: after the first that fails there is no next one. Only the two cameras
    that the policy sees are drawn, and only when it looks."""

    def __init__(self, benchmark: Calvin) -> None:
        if benchmark.dataset is None:
            raise RuntimeError(f"CALVIN needs its dataset's description of scene D: --dataset DIR. {DATASET_REMEDY}")
        self._validation = Path(benchmark.dataset) / "validation"
        scene = self._validation / ".hydra" / "merged_config.yaml"
        if not scene.is_file():
            raise RuntimeError(f"{scene} is missing: dataset has to be a CALVIN dataset. {DATASET_REMEDY}")
        if SCENE.encode() not in read_bytes(scene, FileError, YAML_BYTES):
            raise ValueError(f"dataset: expected scene D, which has a {SCENE}, and {scene} names none")
        self._benchmark = benchmark
        # The tactile sensor's renderer asks for a display otherwise.
        os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")
        self._play_table = required("calvin_env.envs.play_table_env", REMEDY)
        self._condition = required("calvin_agent.evaluation.utils", REMEDY).get_env_state_for_initial_condition
        self._oracle, self._annotations = _oracle_and_annotations(benchmark)
        self._chains = _chains(benchmark, self._annotations)
        self._env: Any = None
        self._cameras: list[Any] = []
        self._chain: tuple[str, ...] = ()
        # What the simulator told at the current subtask's begin.
        self._start: Mapping[str, Any] = {}
        self._index, self._subtask, self._success, self._gripper = 0, "", False, OPEN

    def reset(self, trial: Trial) -> None:
        initial, self._chain = self._chains[trial.number % len(self._chains)]
        if self._benchmark.fresh_env:
            self._close_env()
        if self._env is None:
            self._env = self._play_table.get_env(self._validation, show_gui=False)
            self._cameras = [camera for camera in self._env.cameras if f"rgb_{camera.name}" in VIEWS]
            if len(self._cameras) != len(VIEWS):
                raise ValueError(f"cameras: expected {', '.join(VIEWS)} in the dataset's description of the scene")
            # Its step draws whatever cameras it has.
            self._env.cameras = []
        with reading(f"sequences[{trial.number % len(self._chains)}]: initial state", FileError):
            robot_obs, scene_obs = self._condition(initial)
        self._env.reset(robot_obs=robot_obs, scene_obs=scene_obs)
        self._gripper = OPEN
        self._begin(0)

    @property
    def horizon(self) -> int:
        return self._benchmark.subtask_steps

    def observe(self) -> Observation:
        self._env.cameras = self._cameras
        try:
            raw = self._env.get_obs()
        finally:
            self._env.cameras = []
        robot = np.asarray(raw["robot_obs"], np.float32)
        if robot.ndim != 1 or len(robot) < STATE_USED:
            raise ValueError(f"robot_obs: expected shape (15,), got {robot.shape}")
        state = np.zeros(STATE_WIDTH, np.float32)
        state[:STATE_USED] = robot[:STATE_USED]
        instruction = str(self._annotations[self._subtask][0]).capitalize() + "."
        return Observation(_images(raw["rgb_obs"]), instruction, state, self._benchmark.robot_type)

    def pose(self) -> None:
        return None

    def rest(self) -> np.ndarray:
        """No motion, the gripper as it was told last: it may hold what the subtask before has lifted."""
        return np.array([0.0] * 6 + [self._gripper])

    def step(self, row: np.ndarray) -> None:
        """row: its first 7 columns are CALVIN's relative action."""
        action = np.array(row[:7], np.float64)
        self._gripper = action[6] = OPEN if action[6] > 0 else CLOSED
        # The environment scales the action in place.
        _, _, _, info = self._env.step(action)
        self._success = len(self._oracle.get_task_info_for_set(self._start, info, {self._subtask})) > 0

    @property
    def success(self) -> bool:
        return self._success

    def proceed(self) -> bool:
        """The next subtask, from where everything is now; only after a success."""
        if not self._success or self._index + 1 == len(self._chain):
            return False
        self._begin(self._index + 1)
        return True

    def picture(self) -> np.ndarray:
        self._env.cameras = [camera for camera in self._cameras if camera.name == "static"]
        try:
            image: np.ndarray = self._env.get_camera_obs()[0]["rgb_static"].copy()
        finally:
            self._env.cameras = []
        return image

    def facts(self) -> Mapping[str, Any]:
        return {"chain": list(self._chain)}

    def close(self) -> None:
        self._close_env()

    def _begin(self, index: int) -> None:
        self._index, self._subtask, self._success = index, self._chain[index], False
        self._start = self._env.get_info()

    def _close_env(self) -> None:
        if self._env is not None:
            self._env.close()
            # It closes once more when it is collected, by the client's number, which the next environment may have.
            self._env.cid = -1
            self._env = None


DATASET_REMEDY = (
    "Only validation/.hydra of it is read. In the clone of calvin, sh dataset/download_data.sh fetches one: debug (1.3 "
    "GB), or D, ABC, ABCD."
)


def _oracle_and_annotations(benchmark: Calvin) -> tuple[Any, Mapping[str, Sequence[str]]]:
    """What says whether a subtask is done, and subtask -> sentences."""
    hydra, omegaconf = required("hydra", REMEDY), required("omegaconf", REMEDY)
    if benchmark.config is not None:
        tasks, annotations = (Path(benchmark.config) / name for name in (TASKS_FILE, ANNOTATIONS_FILE))
    else:
        conf = Path(next(iter(required("calvin_agent", REMEDY).__path__))).parent / "conf"
        tasks = conf / "callbacks" / "rollout" / "tasks" / TASKS_FILE
        annotations = conf / "annotations" / ANNOTATIONS_FILE
    for path in (tasks, annotations):
        if not path.is_file():
            raise RuntimeError(
                f"{path} is missing: install calvin_agent with pip install -e from its clone, or name a folder that "
                f"holds {TASKS_FILE} and {ANNOTATIONS_FILE}: --config DIR"
            )
    return hydra.utils.instantiate(omegaconf.OmegaConf.load(tasks)), omegaconf.OmegaConf.load(annotations)


def _chains(benchmark: Calvin, annotations: Mapping[str, Sequence[str]]) -> list[tuple[Any, tuple[str, ...]]]:
    """(initial state, subtasks) of every chain, checked."""
    if benchmark.sequences is None:
        raw = required("calvin_agent.evaluation.multistep_sequences", REMEDY).get_sequences(benchmark.chains)
    else:
        raw = read_json(Path(benchmark.sequences), FileError)
    if not isinstance(raw, list) or len(raw) < benchmark.chains:
        count = len(raw) if isinstance(raw, list) else type(raw).__name__
        raise ValueError(f"sequences: expected a list of at least {benchmark.chains} chains, got {count}")
    chains = []
    for number, pair in enumerate(raw[: benchmark.chains]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], Mapping):
            raise ValueError(f"sequences[{number}]: expected [initial state, subtasks], got {pair!r:.80}")
        if not isinstance(pair[1], (list, tuple)):
            raise ValueError(f"sequences[{number}]: expected a list of subtasks, got {pair[1]!r:.80}")
        subtasks = tuple(map(str, pair[1]))
        unknown = [subtask for subtask in subtasks if subtask not in annotations]
        if len(subtasks) != CHAIN or unknown:
            raise ValueError(f"sequences[{number}]: expected {CHAIN} subtasks with annotations, got {subtasks}")
        chains.append((pair[0], subtasks))
    return chains


def _images(raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    images = {}
    for camera, (view, size) in VIEWS.items():
        image = np.asarray(raw[camera])
        if image.shape != (*size, 3) or image.dtype != np.uint8:
            raise ValueError(f"{camera}: expected {(*size, 3)} uint8, got {image.shape} {image.dtype}")
        images[view] = image
    return images


def _digest(path: str) -> str:
    """What a file holds, in short."""
    from hashlib import sha256

    return "sha256:" + sha256(read_bytes(Path(path), FileError)).hexdigest()
