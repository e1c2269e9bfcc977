"""What the executor stands between: a policy that gives chunks, and a robot that takes actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from xr0_engine.robot.layouts import Pose
from xr0_engine.types import ActionChunk, GuardWarning, Guide, Observation, RobotInfo


class Policy(Protocol):
    """Engine is one, and so is the client of a server."""

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        """The next chunk. prefix: (P, A) float32, robot units, in the frame of this observation: the actions that are
        executed from the observation's time on while this call runs. They come back as the chunk's first P."""


class GuidedPolicy(Protocol):
    """A policy for mode guided. Engine is one, and so is the client of a server."""

    def infer(self, observation: Observation, prefix: np.ndarray | None = None, *, guide: Guide) -> ActionChunk:
        """The next chunk, drawn toward the guide, which is in the frame of this observation; no prefix then. Raises
        whatever it likes if it takes no guides: the first call has one that is empty, before the robot moves."""


@runtime_checkable
class TellingPolicy(Policy, Protocol):
    """A policy that tells how each robot type is driven, as Engine and Client do. What it tells is compared with how it
    is executed; a policy that has `infer` alone is taken as it comes."""

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        """Raises ValueError for a robot type that it does not know."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """An observation, and where the robot was.

    observation.timestamp_s: required, on the executor's clock. origin: the pose that the chunk will be anchored at;
    None for robots whose actions are not anchored.
    """

    observation: Observation
    origin: Pose | None = None


class SensorsNotReady(RuntimeError):
    """No observation can be put together now: the message says which camera or state is missing or too old."""


class Mistimed(SensorsNotReady):
    """What a sensor gave cannot be of the time that it is stamped with: the message gives that time and the clock's."""


class Robot(Protocol):
    """The executor calls all three from its loop, so each has to return at once: within a small part of a period."""

    def observe(self, now_s: float) -> Snapshot:
        """The latest observation; see Synchronizer. Raises SensorsNotReady if there is none that is fresh enough."""

    def command(self, row: np.ndarray) -> None:
        """Send one action: (A,) float64, a row of the robot's Frame: absolute targets for layout `bimanual`."""

    def stop(self) -> None:
        """Come to rest and stay there: called when a run ends, for whatever reason."""


class Watcher(Protocol):
    """Looks at what goes through the executor, beside its loop: every method returns at once. xr0_engine.guard's
    GuardThread is one. stops: whether a warning ends the run. skipped: observations that it had no time for."""

    stops: bool
    skipped: int

    def see(self, observation: Observation, time_s: float) -> None:
        """An observation that an inference starts from, on the executor's clock."""

    def plan(self, chunk: ActionChunk) -> None:
        """The chunk of the last observation, which is about to be executed."""

    def poll(self) -> list[GuardWarning]:
        """What has struck it since the last call."""

    def close(self, patience_s: float) -> None:
        """Look at what is left, as long as patience lasts."""
