"""The experiment, as data: how policies are trained, what each is tried at, and which of them are compared.

A *cell* is one policy: a task, an arm (how it is trained) and a seed. A *condition* is how it is executed: a mode and a
delay. docs/lambda.md says why these; what was predicted of them stood there before the first one was run.
"""

from __future__ import annotations

from dataclasses import dataclass

from xr0_engine.evaluation.benchmark import Mode

DEPTH = 4
"""Layers of the action head if an arm says nothing else. Window times depth is then the chunk at a window of 4."""
DELAYS = (2, 4, 6)
"""Control steps. The executor looks when it has given a step's command, so 0 and 1 are alike beside execution."""
LONGER_DELAY = 8
"""Of arms with longer prefixes, besides: half a chunk, more than which cannot be bridged."""
DECIDING_TASKS = ("chase-eight", "two-ways")
"""What the answer rests on."""


@dataclass(frozen=True)
class Arm:
    """How a policy is trained. recipe: of the trainer; None of the expert, which is not trained. changes: KEY=VALUE, as
    `xr0 train` takes them. depth: layers of the action head. title: in figures."""

    name: str
    title: str
    recipe: str | None
    changes: tuple[str, ...] = ()
    depth: int = DEPTH

    @property
    def has_prefix(self) -> bool:
        return self.recipe not in (None, "post_train_sync")


@dataclass(frozen=True)
class Condition:
    """How a policy is executed. delay_steps: control steps that an inference takes."""

    mode: Mode
    delay_steps: int


@dataclass(frozen=True)
class Cell:
    task: str
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Its folder, under the run's."""
        return f"{self.task}/{self.arm.name}/seed-{self.seed}"


def _window(size: int | None) -> str:
    return f"model.local_window={'none' if size is None else size}"


def _prefixed(name: str, title: str, *changes: str, depth: int = DEPTH) -> Arm:
    return Arm(name, title, "training_rtc", changes, depth)


OFFSET, DROPOUT, WEIGHTS = "model.position_offset=10", "flow.column_dropout=0.5", "flow.reweight_errors=true"

EXPERT = Arm("expert", "expert", None)
"""Looks into the task, reacts at once: the most that a condition lets anyone reach."""
NO_PREFIX = Arm("no-prefix", "no prefix", "post_train_sync")
RTC = _prefixed("rtc", "prefix")
WINDOWS = tuple(_prefixed(f"window-{size}", f"prefix, window {size}", _window(size)) for size in (1, 2, 4, 8))
WINDOW_4 = WINDOWS[2]
OFFSET_10 = _prefixed("offset", "window 4, offset", _window(4), OFFSET)
COLUMNS = _prefixed("columns", "window 4, offset, dropout", _window(4), OFFSET, DROPOUT)
RELEASED = _prefixed("released", "window 4, offset, dropout, error weights", _window(4), OFFSET, DROPOUT, WEIGHTS)
DROPOUT_ALONE = _prefixed("dropout", "prefix, dropout", DROPOUT)
LONG = _prefixed("rtc-12", "prefix to 12", "flow.max_prefix=12")
LONG_WINDOW = _prefixed("window-4-12", "prefix to 12, window 4", "flow.max_prefix=12", _window(4))
DEPTHS = tuple(
    _prefixed(f"{arm.name}-depth-{depth}", f"{arm.title}, {depth} layers", *arm.changes, depth=depth)
    for depth in (2, 8, 16)
    for arm in (RTC, WINDOW_4)
)
WINDOW_PAIRS = tuple(
    sorted(((RTC, WINDOW_4), *zip(DEPTHS[::2], DEPTHS[1::2], strict=True)), key=lambda pair: pair[0].depth)
)
"""Arms that differ by the window alone: (without, with), by depth."""

DECIDING = (NO_PREFIX, RTC, WINDOW_4, RELEASED)
"""These get the most seeds: what the answer rests on."""
ARMS = {
    arm.name: arm
    for arm in (EXPERT, *DECIDING, *WINDOWS, OFFSET_10, COLUMNS, DROPOUT_ALONE, LONG, LONG_WINDOW, *DEPTHS)
}


@dataclass(frozen=True)
class Size:
    """How much work a cell is. steps: of training, by task. batch_size, repeat, peak_lr: as the trainer has them.
    episodes, twins: rollouts of a condition, and how many of them have a twin without events. windows: held-out
    observations that are looked into, and as many for validation. delays: control steps. trial_seed: of rollouts."""

    steps: dict[str, int]
    batch_size: int = 64
    repeat: int = 1
    peak_lr: float = 1.5e-3
    episodes: int = 200
    twins: int = 100
    windows: int = 128
    delays: tuple[int, ...] = DELAYS
    trial_seed: int = 1_000


@dataclass(frozen=True)
class Plan:
    """cells: in the order in which they are run: what decides comes first."""

    cells: tuple[Cell, ...]
    size: Size


def conditions(arm: Arm, size: Size) -> tuple[Condition, ...]:
    """What an arm's policies are tried at."""
    at_rest = Condition("sync", 0)
    delays = (*size.delays, LONGER_DELAY) if arm in (LONG, LONG_WINDOW) else size.delays
    delayed = [Condition("async", delay) for delay in delays]
    if arm == EXPERT:
        delayed += [Condition("naive", delay) for delay in delays]
    elif not arm.has_prefix:
        modes: tuple[Mode, ...] = ("sync", "naive", "guided")
        delayed = [Condition(mode, delay) for mode in modes for delay in size.delays]
    elif arm == RTC:
        # The same policy without its prefix: what the execution does is then told from what the training does.
        delayed += [Condition("naive", delay) for delay in size.delays]
    return (at_rest, *delayed)
