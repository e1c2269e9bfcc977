"""A stand-in for simpler_env and mani_skill2_real2sim: their interfaces and shapes, no physics at all.

NOT SimplerEnv: what is tested against it says nothing of the simulator. Shapes and names are those of
github.com/allenzren/SimplerEnv, whose observations have the gripper's pose.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# Position, quaternion w, x, y, z (a third of a turn about x + y + z), openness.
EEF = np.array([0.1, 0.2, 0.3, -0.5, -0.5, -0.5, -0.5, 0.25])
CAMERAS = {"widowx": ("3rd_view_camera", (480, 640)), "google_robot_static": ("overhead_camera", (512, 640))}


class FakeEnv:
    """An episode is won by five motions along x."""

    def __init__(self, env_name: str, arguments: dict[str, Any]) -> None:
        self.env_name, self.arguments = env_name, arguments
        self.actions: list[np.ndarray] = []
        self.options: list[dict[str, Any]] = []
        self.closed = False

    @property
    def unwrapped(self) -> FakeEnv:
        return self

    def get_language_instruction(self) -> str:
        return "place apple into Top drawer" if self.actions else "open Top drawer"

    def reset(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        self.options.append(options)
        self.actions = []
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        assert action.shape == (7,)
        self.actions.append(action)
        won = sum(action[0] > 0 for action in self.actions) >= 5
        return self._observation(), 0.0, won, len(self.actions) >= self.arguments["max_episode_steps"], {}

    def close(self) -> None:
        self.closed = True

    def _observation(self) -> dict[str, Any]:
        robot = self.arguments["robot"]
        camera, size = CAMERAS["google_robot_static" if "google" in robot else "widowx"]
        image = np.full((*size, 3), len(self.actions), np.uint8)
        return {"agent": {"qpos": np.zeros(8), "eef_pos": EEF}, "image": {camera: {"rgb": image}}}


def install(patch: pytest.MonkeyPatch, folder: Path) -> list[FakeEnv]:
    """Make the imports work; returns the environments that are made from now on."""
    made: list[FakeEnv] = []

    def build_maniskill2_env(env_name: str, **arguments: Any) -> FakeEnv:
        made.append(FakeEnv(env_name, arguments))
        return made[-1]

    modules: dict[str, dict[str, Any]] = {
        "simpler_env": {"__path__": [str(folder)]},
        "simpler_env.utils": {"__path__": []},
        "simpler_env.utils.env": {"__path__": []},
        "simpler_env.utils.env.env_builder": {"build_maniskill2_env": build_maniskill2_env},
        "mani_skill2_real2sim": {"__path__": [str(folder)], "ASSET_DIR": folder / "data"},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        patch.setitem(sys.modules, name, module)
    return made
