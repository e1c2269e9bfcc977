"""The pictures of one view of an episode: what every kind of them can do, and such as are made when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.training.data.samples import DataError, UnfitError

STRIDE_TOLERANCE = 0.002
"""The part of a picture by which a video's frames may come closer together than pictures are: cameras' 29.97 for 30
needs 0.001, and what is recorded at another rate than the robot's is farther off."""
TIE = 1e-6
"""Of a picture: what lies so near the middle between two is a tie, whatever floats make of it."""


class Pictures(Protocol):
    """A view over one episode. video.py: Clip reads them from a video file."""

    @property
    def path(self) -> Path | str:
        """What messages call it."""

    @property
    def crop(self) -> tuple[int, int, int, int] | None:
        """What is cut out of a stored picture, None for all of it."""

    @property
    def fps(self) -> float:
        """Pictures a second."""

    def nearest(self, time_s: float) -> int:
        """The frame nearest in time to time_s after the first."""

    def read(self, frame: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB. Raises DataError."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures that a function makes: for episodes out of a simulation, or out of memory.

    path: what messages call it. frames: how many there are, fps apart. draw: frame -> (height, width, 3) uint8 RGB, the
    same whenever it is asked.
    """

    path: str
    frames: int
    fps: float
    draw: Callable[[int], np.ndarray]

    @property
    def crop(self) -> None:
        return None

    def nearest(self, time_s: float) -> int:
        """The frame nearest in time to time_s after the first; ties go to the later frame."""
        return nearest_frame(time_s, self.fps, self.frames)

    def read(self, frame: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB. Raises DataError for a frame that there is not, and for no such picture."""
        if not 0 <= frame < self.frames:
            raise DataError(f"{self.path}: frame {frame}: there are frames 0 to {self.frames - 1}")
        image = self.draw(frame)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(
                f"{self.path}: frame {frame}: expected (height, width, 3) uint8, got {image.shape} {image.dtype}"
            )
        return image


def check_stride(profile: Embodiment, fps: float, where: str) -> None:
    """Raises UnfitError where a profile shows the model videos whose frames are closer together than what was recorded
    at fps: two of them would be one picture, and the robot's never are. where: what the message begins with."""
    history, rate_hz = profile.history, profile.control_rate_hz
    if history is None or history.frames == 1 or history.stride * fps >= (1 - STRIDE_TOLERANCE) * rate_hz:
        return
    least = math.ceil((1 - STRIDE_TOLERANCE) * rate_hz / fps)
    raise UnfitError(
        f"{where}: recorded at {fps:g} Hz; the videos of embodiment {profile.name!r} have frames {history.stride} "
        f"ticks of {rate_hz:g} Hz apart (`history`), {rate_hz / history.stride:g} a second, of which some would be the "
        f"same picture: record faster, or train through a profile whose history has a stride of at least {least}"
    )


def nearest_frame(time_s: float, fps: float, frames: int) -> int:
    """Of frames that are fps apart, the one nearest in time to time_s after the first; ties go to the later one."""
    return min(max(math.floor(time_s * fps + 0.5 + TIE), 0), frames - 1)
