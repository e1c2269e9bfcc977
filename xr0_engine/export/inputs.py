"""Cases of exports, and their observations, fabricated: to learn shapes and to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from xr0_engine.exported.manifest import ExportCase
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.types import Observation

INSTRUCTION = "Pick up the red cube and place it on the plate."

CASES = {
    case.name: case
    for case in (
        ExportCase("mobile", "mobile", (480, 640)),
        ExportCase("robocasa", "robocasa_mg", (256, 256)),
        ExportCase("vlabench", "vlabench_choice", (480, 480)),
    )
}
"""Of robots that nothing is measured of, with their cameras' sizes; the others are the benchmark's (bench.cases)."""


def observations(preprocess: Preprocessor, case: ExportCase, instructions: Sequence[str]) -> list[Observation]:
    """One per instruction, always the same: random images (videos, where the profile has a history) of the case's size,
    random states.

    Raises ValueError for a robot type that the checkpoint has no statistics for.
    """
    form = preprocess.example(case.robot_type, case.image_size)
    rng = np.random.default_rng(0)
    return [
        replace(
            form,
            images={key: rng.integers(0, 256, image.shape, dtype=np.uint8) for key, image in form.images.items()},
            instruction=instruction,
            state=rng.standard_normal(form.state.shape).astype(np.float32),
        )
        for instruction in instructions
    ]
