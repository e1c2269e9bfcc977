"""What a quantised checkpoint is compared on: moments of recorded episodes, with and without a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xr0_engine.engine import Engine
from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.windows import Windows
from xr0_engine.types import Observation

PREFIX = 4
"""Actions that are given in every second moment: what is executed while an inference of 130 ms runs at 30 Hz. Fewer of
a policy that takes fewer, none of one that takes none."""


@dataclass(frozen=True, eq=False)
class Moment:
    """An observation, the noise of its chunk, and the actions that were recorded behind it.

    prefix: (P, A) float32, their first ones, given; None without. recorded: (T, A) float32, robot units; steps: how
    many of them there are before the episode's end.
    """

    observation: Observation
    seed: int
    prefix: np.ndarray | None
    recorded: np.ndarray
    steps: int


def read_moments(engine: Engine, profile: Embodiment | None, datasets: Sequence[Path], count: int) -> list[Moment]:
    """Up to `count` of each dataset, spread evenly over its episodes. profile: that the checkpoint names, if it does.

    Raises DataError for data that cannot be read, or not through that profile; ValueError for a robot type that the
    checkpoint has no statistics for."""
    moments: list[Moment] = []
    for path in datasets:
        source = open_source(path, embodiment=profile)
        robot_type = source.description.robot_type
        if robot_type not in engine.robot_types:
            raise ValueError(
                f"{path}: robot_type: the checkpoint has statistics for {', '.join(engine.robot_types)}, not for "
                f"{robot_type!r}: compare on recordings of its own robot"
            )
        info = engine.robot_info(robot_type)
        given = min(PREFIX, engine.max_prefix, info.chunk_length - 1)
        windows = Windows(
            source, range(len(source.lengths)), info.chunk_length, state_length=engine.config.head.state_length
        )
        if not len(windows):
            raise ValueError(f"{path}: expected episodes that may be learnt from, got none")
        for sample in windows.spread(count):
            observation = Observation(sample.images, sample.instruction, sample.state, sample.robot_type, prepared=True)
            number, steps = len(moments), int(sample.mask.any(1).sum())
            prefix = sample.actions[:given] if number % 2 and 0 < given < steps else None
            moments.append(Moment(observation, number, prefix, sample.actions, steps))
    return moments
