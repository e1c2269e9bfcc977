"""What the data side hands to the trainer: one frozen dataclass a kind of sample.

Shape legend as in types.py: T chunk length, A action columns, S state columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from xr0_engine.types import FileError


@dataclass(frozen=True, eq=False)
class RobotSample:
    """One observation and the actions that follow it.

    images: view key of the embodiment -> (height, width, 3) uint8 RGB, as the model's processor is given them: turned,
    resized and cropped; where the profile has a history, a video, (frames, height, width, 3), the oldest first.
    instruction: the task in plain words.
    state: (state_length, S) float32, proprio states, the oldest first, never normalised.
    actions: (T, A) float32, robot units, anchored at the observation where the layout is; not normalised.
    mask: (T, A) bool, what may be supervised: the robot's columns, at steps inside the episode, unless it is `invalid`.
    robot_type: key of the action statistics. source: `file:frame`, for messages and NaN reports.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray
    actions: np.ndarray
    mask: np.ndarray
    robot_type: str
    source: str


@dataclass(frozen=True, eq=False)
class LanguageSample:
    """One conversation about images.

    images: (height, width, 3) uint8 RGB each, in the order in which the text refers to them.
    conversations: (role, text) in turn, role `user` or `assistant`. source: `file:line`.
    """

    images: tuple[np.ndarray, ...]
    conversations: tuple[tuple[str, str], ...]
    source: str


class DataError(FileError):
    """A dataset, or a place in one, that cannot be used: the message names the file, and the frame or line."""


class UnfitError(DataError):
    """Data that are whole and do not fit the run: no sample of them can be had, so none is skipped."""
