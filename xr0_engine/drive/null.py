"""No robot at all: to see what the executor, a policy and the network do by themselves."""

from __future__ import annotations

import numpy as np

from xr0_engine.executor import BimanualFrame, Frame, PlainFrame, Snapshot
from xr0_engine.robot.decode import ArmPose, BimanualPose, bimanual_state
from xr0_engine.types import Observation


class NullRobot:
    """A Robot that shows noise, stands still and takes every command.

    views: image keys. layout: as in the embodiment profile. The images (image_size = height, width) are made once.
    """

    def __init__(
        self,
        views: tuple[str, ...],
        layout: str,
        robot_type: str,
        action_width: int,
        state_width: int,
        image_size: tuple[int, int] = (256, 256),
    ) -> None:
        rng = np.random.default_rng(0)
        arm = ArmPose(np.zeros(3), np.eye(3), np.zeros(6), np.zeros(1))
        self._origin = BimanualPose(arm, arm) if layout == "bimanual" else None
        self._images = {view: rng.integers(0, 256, (*image_size, 3), dtype=np.uint8) for view in views}
        self._state = np.zeros(state_width, np.float32) if self._origin is None else bimanual_state(self._origin)
        self._robot_type = robot_type
        self.frame: Frame = BimanualFrame() if layout == "bimanual" else PlainFrame(action_width, ())

    def observe(self, now_s: float) -> Snapshot:
        return Snapshot(Observation(self._images, "Do nothing.", self._state, self._robot_type, now_s), self._origin)

    def command(self, row: np.ndarray) -> None: ...

    def stop(self) -> None: ...
