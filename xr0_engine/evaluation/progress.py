"""The bar that a run shows: how many of how many, how long it will take, and the success rate so far."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xr0_engine.evaluation.benchmark import Episode

# An episode takes from seconds to minutes: the rate of many is what tells when the run will end.
RATE_OVER_S = 3600.0


class Bar:
    """A context manager. total: episodes of the run; done: those that a run before has ended."""

    def __init__(self, console: Console, total: int, done: int, succeeded: int) -> None:
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=RATE_OVER_S,
        )
        self._done, self._succeeded, self._errors, self._repeats = done, succeeded, 0, 0
        self._task = self._progress.add_task(self._described(), total=total, completed=done)

    def ended(self, episode: Episode) -> None:
        self._done += 1
        self._succeeded += episode.success
        self._errors += episode.error is not None
        self._progress.update(self._task, advance=1, description=self._described())

    def repeated(self, reason: str) -> None:
        self._repeats += 1
        self._progress.console.print(f"repeated: {reason}", markup=False, highlight=False)
        self._progress.update(self._task, description=self._described())

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._progress.stop()

    def _described(self) -> str:
        rate = f"success {100 * self._succeeded / self._done:.1f} %" if self._done else "success -"
        counts = (("raised", self._errors), ("repeated", self._repeats))
        return ", ".join([rate, *(f"{count} {name}" for name, count in counts if count)])
