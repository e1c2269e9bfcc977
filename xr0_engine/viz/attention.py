"""Where the actions of each chunk look, over the pictures that it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from xr0_engine.robot.history import newest
from xr0_engine.robot.views import orient
from xr0_engine.types import ActionChunk, Observation, RobotInfo
from xr0_engine.viz.run import RunView

if TYPE_CHECKING:
    from xr0_engine.engine import Engine

HOT = np.array([230, 60, 0], np.float32)
STRONGEST = 0.75
"""Opacity of HOT over the token that is looked at most in any of the views."""


class Attending:
    """An engine as a policy that tells a RunView where each chunk looks: `attention/VIEW`.

    Each chunk is computed a second time, with its weights kept, so this is for simulated time. seed: of the first
    chunk's noise; each further one's is one more. Takes no guides.
    """

    def __init__(self, engine: Engine, view: RunView, seed: int = 0) -> None:
        self._engine, self._view, self._seed = engine, view, seed

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        """As Engine.infer."""
        seed, self._seed = self._seed, self._seed + 1
        chunk = self._engine.infer(observation, prefix, seed=seed)
        self._view.attended(self.pictures(observation, prefix, seed))
        return chunk

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        """As Engine.robot_info."""
        return self._engine.robot_info(robot_type)

    def pictures(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> dict[str, np.ndarray]:
        """View -> (H, W, 3) uint8: the picture as the model sees it, in grey, and over it what the sampled actions look
        at, mean over them, flow steps, layers and heads; empty where all actions were given."""
        attention = self._engine.attention(observation, prefix, seed=seed)
        sampled = attention.where("action", of="queries")
        if not sampled.any():
            return {}
        views = self._engine.embodiment(observation.robot_type).views
        weights = {view.key: attention.picture(view.key, sampled).mean(0) for view in views}
        most = max(float(each.max()) for each in weights.values())
        shown = {}
        for view in views:
            image = newest(observation.images[view.key])
            shown[view.key] = overlaid(
                image if observation.prepared else orient(image, view), weights[view.key] / (most or 1)
            )
        return shown


def overlaid(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """An image, (H, W, 3) uint8, in grey under weights, (rows, columns), 0 to 1, each of which covers its part."""
    height, width = image.shape[:2]
    mask = Image.fromarray(weights.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST)
    opacity = STRONGEST * np.asarray(mask)[..., None]
    grey = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    result: np.ndarray = (grey * (1 - opacity) + HOT * opacity).round().astype(np.uint8)
    return result
