"""An episode's video, while it happens: a disk that is full ends the video, not the episode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import numpy as np

from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.results import VIDEO_FOLDER


class Film:
    """Takes pictures, (height, width, 3) uint8, all of one size; a context manager.

    fault: the OSError that ended it, None if it is whole. keep() gives the file its name; otherwise it is removed.
    """

    def __init__(self, folder: Path, trial: Trial, rate_hz: float) -> None:
        suite, task, number, mode, delay = trial.key
        self.name = f"{VIDEO_FOLDER}/{suite}-{task}-{number}-{mode}-{delay:g}.mp4"
        self._path, self._rate_hz = folder / self.name, max(1, round(rate_hz))
        self._partial = self._path.with_name(f".{self._path.stem}.partial.mp4")
        self._stack = ExitStack()
        self._write: Callable[[np.ndarray], None] | None = None
        self.fault: OSError | None = None

    def __call__(self, picture: np.ndarray) -> None:
        if self.fault is not None:
            return
        # What H.264 takes is even.
        picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
        try:
            if self._write is None:
                from xr0_engine.plot import video_writer

                self._partial.parent.mkdir(parents=True, exist_ok=True)
                height, width = picture.shape[:2]
                self._write = self._stack.enter_context(video_writer(self._partial, width, height, self._rate_hz))
            self._write(np.ascontiguousarray(picture))
        except OSError as error:
            self.fault = error

    def keep(self) -> str | None:
        """The video's name within the folder; None if there is nothing to see."""
        self._end()
        if self._write is None or self.fault is not None:
            return None
        try:
            self._partial.replace(self._path)
        except OSError as error:
            self.fault = error
            return None
        return self.name

    def __enter__(self) -> Film:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def _end(self) -> None:
        try:
            self._stack.close()
        except OSError as error:
            self.fault = self.fault or error


def check_films() -> None:
    """Raises RuntimeError, with the remedy, if there is nothing to encode videos with."""
    if find_spec("av") is None:
        raise RuntimeError(
            "--video: PyAV is not installed: pip install 'xr0-engine[sim]', or 'av' alone; or --video none"
        )
