"""An episode in rerun, while it happens."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.results import VIEW_FOLDER
from xr0_engine.viz.run import RunView


class EpisodeView(RunView):
    """A RunView of a trial, in a file of the results' folder: a context manager.

    It waits for the disk: time is the world's. keep() gives the file its name; otherwise it is removed. Raises OSError
    where it cannot be written.
    """

    def __init__(self, folder: Path, trial: Trial) -> None:
        suite, task, number, mode, delay = trial.key
        title = f"{suite}-{task}-{number}-{mode}-{delay:g}"
        self.path = folder / VIEW_FOLDER / f"{title}.rrd"
        self._partial = self.path.with_name(f".{title}.partial.rrd")
        self._kept = False
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._partial.unlink(missing_ok=True)
        super().__init__(self._partial, title, patient=True)

    def keep(self) -> None:
        """Once it is left, it has its name."""
        self._kept = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
            if self._kept:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)
