"""What code weights were made to run in, which no tensor tells: mask, offset, columns, decoding, task text, images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xr0_engine.config import TRAINED_PREFIX
from xr0_engine.robot.layouts import LAYOUTS
from xr0_engine.robot.limits import POST_TRAINING_LIMITS, ImageLimits
from xr0_engine.robot.quantiles import POST_TRAINING_RULE, ROBODOJO_RULE


@dataclass(frozen=True)
class Mode:
    """Spec sections 2.4, 3.3, 4.1; docs/spec.md, Xiaomi-Robotics-1.

    whose: the code, in words. of_runs: runs of training are for it. untold_prefix: the longest that a run is taken to
    have seen where its configuration has no async_train, a key of Xiaomi-Robotics-0; None: as in the checkpoint that
    gives the tokenizer. layout: of actions, whose columns the code uses where the statistics name none; None: those
    that move. limits: of images, where the code states them; None: as in the checkpoint that gives the tokenizer.
    videos: pictures may come as videos. state_rule: how it normalises states, a StateStatistics.rule; None: not at all.
    state_length: states of an observation; None: not the code's to say. action_rule: `rule` of a robot type's
    statistics, beside mean and std.
    """

    whose: str
    of_runs: bool
    local_window: int | None
    position_offset: int
    std_epsilon: float
    normalize_instruction: bool
    untold_prefix: int | None = None
    layout: str | None = None
    limits: ImageLimits | None = None
    videos: bool = False
    state_rule: str | None = None
    state_length: int | None = None
    action_rule: str | None = None

    @property
    def columns(self) -> tuple[int, ...]:
        """Of the layout; none where there is none."""
        return () if self.layout is None else tuple(sorted(column.index for column in LAYOUTS[self.layout].columns))


POST_TRAINING, BENCHMARKS = "post-training code", "released benchmark checkpoints"
MODES: Mapping[str, Mapping[str, Mode]] = {
    "xr0": {
        "post-training": Mode(POST_TRAINING, True, 4, 10, 1e-6, False, untold_prefix=0, layout="bimanual"),
        "benchmark": Mode(BENCHMARKS, False, None, 0, 0.0, True),
    },
    "xr1": {
        "post-training": Mode(
            POST_TRAINING,
            True,
            None,
            10,
            1e-6,
            False,
            untold_prefix=TRAINED_PREFIX,
            layout="mobile",
            limits=POST_TRAINING_LIMITS,
            state_rule=POST_TRAINING_RULE,
            state_length=1,
        ),
        "robodojo": Mode(
            "RoboDojo's training runs and client",
            True,
            None,
            0,
            1e-6,
            False,
            untold_prefix=TRAINED_PREFIX,
            layout="robodojo",
            limits=POST_TRAINING_LIMITS,
            state_rule=ROBODOJO_RULE,
            state_length=1,
            action_rule=ROBODOJO_RULE,
        ),
        "benchmark": Mode(BENCHMARKS, False, None, 0, 0.0, False, videos=True),
    },
}
"""Family -> name on the command line."""


def described(mode: Mode) -> str:
    window = "full causal" if mode.local_window is None else f"window {mode.local_window}"
    return f"{window}, position offset {mode.position_offset}: {mode.whose}"
