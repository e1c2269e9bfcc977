"""Observations of an export's case, fabricated: to learn its shapes and to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xr0_engine.exported.manifest import ExportCase
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.types import Observation

INSTRUCTION = "Pick up the red cube and place it on the plate."


def observations(preprocess: Preprocessor, case: ExportCase, instructions: Sequence[str]) -> list[Observation]:
    """One per instruction, always the same: random images of the case's size, a random state.

    Raises ValueError for a robot type that the checkpoint has no statistics for.
    """
    robot_type, embodiment = preprocess.resolve(case.robot_type)
    rng = np.random.default_rng(0)
    return [
        Observation(
            images={view.key: rng.integers(0, 256, (*case.image_size, 3), dtype=np.uint8) for view in embodiment.views},
            instruction=instruction,
            state=rng.standard_normal(preprocess.config.head.state_dim).astype(np.float32),
            robot_type=robot_type,
        )
        for instruction in instructions
    ]
