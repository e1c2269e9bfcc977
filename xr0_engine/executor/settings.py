"""How to execute: modes, trigger, prefix, starvation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from xr0_engine.executor.delay import delay_steps

Mode = Literal["sync", "async", "naive_async", "guided"]
Starvation = Literal["hold", "decelerate", "stop"]

MAX_LOOP_HZ = 1000.0
# What is kept of a motion in a step of `decelerate`: at 30 Hz a tenth is left after a quarter of a second.
DECELERATION_S = 0.11


@dataclass(frozen=True)
class Settings:
    """rate_hz: actions per second, the policy's control rate.

    mode: `async`: the next chunk is inferred while the last one is executed, given the actions that are executed
    meanwhile (its prefix); `guided`: the same for policies that were trained without prefixes, drawn toward what is
    executed and planned; `naive_async`: without either; `sync`: the robot holds still during inference.
    commands_per_action: the loop's rate over rate_hz; the commands between two actions are interpolated.
    trigger: infer when fewer actions than this remain, or `deadline`: as late as the delay allows. async modes.
    execute: how many actions of a chunk are executed; None: all. sync.
    margin: steps added to the delay, for the length of the prefix or of what is frozen in a guide. max_prefix: the
    longest prefix that the policy was trained with; async. expected_delay_s: from observation to chunk, until it is
    measured; None: as long as max_prefix covers, or half a guided chunk.
    starvation: when actions run out: `hold` the last target, `decelerate` to rest, or `stop` the robot and end.
    hang_s: an inference that takes longer is reported as hanging. retry_s: pause after a failed one.
    Raises ValueError that names the field; among others for async without prefixes, or if expected_delay_s takes a
    longer one than max_prefix.
    """

    rate_hz: float
    mode: Mode = "async"
    commands_per_action: int = 1
    trigger: int | Literal["deadline"] = 10
    execute: int | None = None
    margin: int = 1
    max_prefix: int = 6
    expected_delay_s: float | None = None
    starvation: Starvation = "hold"
    hang_s: float = 2.0
    retry_s: float = 0.2

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("mode", self.mode in get_args(Mode), f"one of {', '.join(get_args(Mode))}"),
            ("starvation", self.starvation in get_args(Starvation), f"one of {', '.join(get_args(Starvation))}"),
            ("rate_hz", 0 < self.rate_hz <= MAX_LOOP_HZ, f"above 0, at most {MAX_LOOP_HZ:g}"),
            ("commands_per_action", _is_count(self.commands_per_action, 1), "a whole number of at least 1"),
            ("trigger", self.trigger == "deadline" or _is_count(self.trigger, 1), "a whole number >= 1, or deadline"),
            ("execute", self.execute is None or _is_count(self.execute, 1), "a whole number of at least 1, or None"),
            ("margin", _is_count(self.margin, 0), "a whole number of at least 0"),
            ("max_prefix", _is_count(self.max_prefix, 0), "a whole number of at least 0"),
            (
                "expected_delay_s",
                self.expected_delay_s is None or 0 <= self.expected_delay_s < math.inf,
                "seconds, or None",
            ),
            ("hang_s", self.hang_s > 0, "seconds above 0"),
            ("retry_s", self.retry_s >= 0, "seconds of at least 0"),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if self.loop_hz > MAX_LOOP_HZ:
            raise ValueError(f"commands_per_action: expected at most {MAX_LOOP_HZ:g} commands/s, got {self.loop_hz:g}")
        if self.mode == "async" and self.max_prefix == 0:
            raise ValueError(
                "mode: async needs a policy trained with prefixes (max_prefix above 0), got max_prefix 0; sync, guided "
                "and naive_async do without"
            )
        if self.mode == "async" and self.expected_delay_s is not None:
            needed = delay_steps(self.expected_delay_s, self.rate_hz) + self.margin
            if needed > self.max_prefix:
                raise ValueError(
                    f"expected_delay_s: {self.expected_delay_s:g} s at {self.rate_hz:g} Hz, margin {self.margin}, "
                    f"takes a prefix of {needed} actions; the policy was trained with at most {self.max_prefix}. A "
                    "faster inference, a lower rate, a smaller margin or mode sync would work"
                )

    @property
    def loop_hz(self) -> float:
        """Commands per second."""
        return self.rate_hz * self.commands_per_action

    @property
    def motion_kept(self) -> float:
        """What is left of a motion after one step without an action: see timeline.coast."""
        return math.exp(-1 / (self.rate_hz * DECELERATION_S)) if self.starvation == "decelerate" else 0.0


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
