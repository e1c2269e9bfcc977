"""No robot at all: to see what the executor, a policy and the network do by themselves."""

from __future__ import annotations

import numpy as np

from xr0_engine.executor import Snapshot
from xr0_engine.robot.layouts import Layout
from xr0_engine.types import Observation


class NullRobot:
    """A Robot that shows noise, stands still and takes every command.

    views: image keys. The images (image_size = height, width) are made once. frames: of each view's video, None where
    it is a picture. state_length: states of an observation.
    """

    def __init__(
        self,
        views: tuple[str, ...],
        layout: Layout,
        robot_type: str,
        state_width: int,
        image_size: tuple[int, int] = (256, 256),
        frames: int | None = None,
        state_length: int = 1,
    ) -> None:
        rng = np.random.default_rng(0)
        self._origin = layout.rest
        shape = (*(() if frames is None else (frames,)), *image_size, 3)
        self._images = {view: rng.integers(0, 256, shape, dtype=np.uint8) for view in views}
        self._state = np.zeros(state_width, np.float32) if layout.rest is None else layout.rest.state()
        if state_length > 1:
            self._state = np.repeat(np.atleast_2d(self._state), state_length, axis=0)
        self._robot_type = robot_type

    def observe(self, now_s: float) -> Snapshot:
        return Snapshot(Observation(self._images, "Do nothing.", self._state, self._robot_type, now_s), self._origin)

    def command(self, row: np.ndarray) -> None: ...

    def stop(self) -> None: ...
