"""The pictures of one view of an episode: what every kind of them can do, and such as are made when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from xr0_engine.training.data.samples import DataError


class Pictures(Protocol):
    """A view over one episode. video.py: Clip reads them from a video file."""

    @property
    def path(self) -> Path | str:
        """What messages call it."""

    @property
    def crop(self) -> tuple[int, int, int, int] | None:
        """What is cut out of a stored picture, None for all of it."""

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


def nearest_frame(time_s: float, fps: float, frames: int) -> int:
    """Of frames that are fps apart, the one nearest in time to time_s after the first; ties go to the later one."""
    return min(max(math.floor(time_s * fps + 0.5), 0), frames - 1)
