"""A stand-in for calvin_env, calvin_agent, hydra and omegaconf: their interfaces and shapes, no physics at all.

NOT CALVIN: what is tested against it says nothing of the simulator. Shapes, names and the order of calls are those of
github.com/mees/calvin_env at 797142c and github.com/mees/calvin at fa03f01.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

SUBTASKS = ("open_drawer", "lift_red_block_table", "place_in_slider", "turn_on_led", "move_slider_left")
ANNOTATIONS = {name: [f"{name.replace('_', ' ')} of the LED"] for name in SUBTASKS}


class FakeCamera:
    def __init__(self, name: str, size: tuple[int, int], env: FakeEnv) -> None:
        self.name, self._size, self._env = name, size, env

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        self._env.drawn.append(self.name)
        return np.full((*self._size, 3), len(self._env.actions) % 256, np.uint8), np.zeros(self._size)


class FakeEnv:
    """A subtask is done as soon as the sum of x motions since its begin is over 2.5."""

    def __init__(self) -> None:
        self.cid = 0
        self.drawn: list[str] = []
        self.actions: list[np.ndarray] = []
        self.resets: list[tuple[Any, Any]] = []
        self.closed = 0
        self.cameras: list[FakeCamera] = [
            FakeCamera("static", (200, 200), self),
            FakeCamera("gripper", (84, 84), self),
            FakeCamera("tactile", (120, 160), self),
        ]
        self._x = 0.0

    def reset(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> Mapping[str, Any]:
        self.resets.append((robot_obs, scene_obs))
        self._x, self.actions = 0.0, []
        return self.get_obs()

    def get_camera_obs(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        frames = {camera.name: camera.render() for camera in self.cameras}
        return (
            {f"rgb_{name}": frame[0] for name, frame in frames.items()},
            {f"depth_{name}": frame[1] for name, frame in frames.items()},
        )

    def get_obs(self) -> dict[str, Any]:
        rgb, depth = self.get_camera_obs()
        robot = np.arange(15, dtype=np.float64) + self._x
        return {"rgb_obs": rgb, "depth_obs": depth, "robot_obs": robot, "scene_obs": np.zeros(24)}

    def get_info(self) -> dict[str, Any]:
        return {"robot_info": {}, "scene_info": {"x": self._x}}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], int, bool, dict[str, Any]]:
        assert len(action) == 7
        assert action[6] in (-1, 1)
        self.actions.append(action.copy())
        self._x += float(action[0])
        # As calvin_env's robot, which scales its argument in place.
        action *= 0.02
        return self.get_obs(), 0, False, self.get_info()

    def close(self) -> None:
        if self.cid >= 0:
            self.closed += 1


class FakeOracle:
    def get_task_info_for_set(self, start: Any, end: Any, wanted: set[str]) -> set[str]:
        return wanted if end["scene_info"]["x"] - start["scene_info"]["x"] > 2.5 else set()


def install(patch: pytest.MonkeyPatch, folder: Path, chains: int = 3) -> list[FakeEnv]:
    """Make the imports work; returns the environments that are made from now on. folder: gets `task_ABC_D/validation`
    and the configuration files."""
    made: list[FakeEnv] = []

    def get_env(dataset: Path, show_gui: bool) -> FakeEnv:
        assert (dataset / ".hydra" / "merged_config.yaml").is_file()
        assert not show_gui
        made.append(FakeEnv())
        return made[-1]

    def get_sequences(count: int) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
        return [({"led": number}, SUBTASKS[number % 2 :] + SUBTASKS[: number % 2]) for number in range(count)]

    hydra_folder = folder / "task_ABC_D" / "validation" / ".hydra"
    hydra_folder.mkdir(parents=True)
    (hydra_folder / "merged_config.yaml").write_text(
        "file: calvin_table_D/urdf/calvin_table_D.urdf\n", encoding="utf-8"
    )
    agent = folder / "calvin_models" / "calvin_agent"
    conf = folder / "calvin_models" / "conf"
    for path in (conf / "callbacks/rollout/tasks/new_playtable_tasks.yaml",
                 conf / "annotations/new_playtable_validation.yaml"):  # fmt: skip
        path.parent.mkdir(parents=True)
        path.write_text("{}\n", encoding="utf-8")
    state = {"get_env_state_for_initial_condition": lambda initial: (np.full(15, initial["led"]), np.zeros(24))}
    modules: dict[str, dict[str, Any]] = {
        "calvin_env": {"__path__": [str(folder)]},
        "calvin_env.envs": {"__path__": []},
        "calvin_env.envs.play_table_env": {"get_env": get_env},
        "calvin_agent": {"__path__": [str(agent)]},
        "calvin_agent.evaluation": {"__path__": []},
        "calvin_agent.evaluation.utils": state,
        "calvin_agent.evaluation.multistep_sequences": {"get_sequences": get_sequences},
        "hydra": {"utils": SimpleNamespace(instantiate=lambda loaded: FakeOracle())},
        "omegaconf": {"OmegaConf": SimpleNamespace(load=lambda path: ANNOTATIONS)},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        patch.setitem(sys.modules, name, module)
    return made
