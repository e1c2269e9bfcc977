"""What code weights were made to run in, which no tensor tells: mask, offset, decoding, task text, image limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xr0_engine.robot.layouts import LAYOUTS
from xr0_engine.robot.limits import POST_TRAINING_LIMITS, ImageLimits


@dataclass(frozen=True)
class Mode:
    """Spec sections 2.4, 3.3, 4.1; docs/spec.md, Xiaomi-Robotics-1.

    columns: those that the code uses whatever the statistics; none: those that move. limits: of images, where the code
    states them; None: as in the checkpoint that gives the tokenizer. has_quantiles: it normalises states by them.
    """

    local_window: int | None
    position_offset: int
    std_epsilon: float
    normalize_instruction: bool
    columns: tuple[int, ...] = ()
    limits: ImageLimits | None = None
    has_quantiles: bool = False


def _columns(layout: str) -> tuple[int, ...]:
    return tuple(sorted(column.index for column in LAYOUTS[layout].columns))


MODES: Mapping[str, Mapping[str, Mode]] = {
    "xr0": {
        "post-training": Mode(4, 10, 1e-6, False, _columns("bimanual")),
        "benchmark": Mode(None, 0, 0.0, True),
    },
    "xr1": {
        "post-training": Mode(
            None, 10, 1e-6, False, _columns("mobile"), limits=POST_TRAINING_LIMITS, has_quantiles=True
        ),
        "benchmark": Mode(None, 0, 0.0, False),
    },
}
"""Family -> name on the command line."""


def described(mode: Mode) -> str:
    window = "full causal" if mode.local_window is None else f"window {mode.local_window}"
    return f"{window}, position offset {mode.position_offset}"
