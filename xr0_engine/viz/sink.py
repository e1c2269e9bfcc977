"""A recording of rerun, and the thread that fills it: who hands something over does not wait."""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from rerun import RecordingStream

SUFFIX = ".rrd"
SCHEMES = ("rerun+http", "rerun+https", "rerun")
VIEWER_PORT = 9876
REACH_S = 3.0
"""For a viewer to answer before the run begins."""
MOST_ENTRIES = 4096
"""That wait to be written: two minutes of a loop at 30 Hz."""
MOST_PICTURES = 8
"""Observations among them, which are as large as their pictures."""
STUCK_S = 10.0
"""For a viewer to take what it was sent: over a slow network tens of megabytes. A disk has as long as it likes."""
LOOK_S = 0.05
"""How often it is looked at while what is left is written."""

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def check_installed() -> None:
    """Raises RuntimeError, with the remedy, if rerun is not there."""
    if find_spec("rerun") is None:
        raise RuntimeError(
            "--rerun: rerun is not installed: pip install 'xr0-engine[viz]' (Python 3.11 or newer), "
            "about 170 MB to download"
        )


def check_target(target: str | Path) -> str:
    """What --rerun says, as a file's path or a viewer's address.

    Raises RuntimeError, with the remedy, if rerun is not installed; ValueError for neither a new .rrd file in an
    existing folder nor such an address; ConnectionError if no viewer listens there.
    """
    check_installed()
    text = str(target)
    if "://" not in text:
        check_file(Path(text))
        return text
    host, port = _address(text)
    try:
        with socket.create_connection((host, port), REACH_S):
            return text
    except OSError as error:
        raise ConnectionError(
            f"--rerun {text}: no viewer answers ({error}): start `rerun` on that machine first, or write a file"
        ) from None


def _address(url: str) -> tuple[str, int]:
    """A viewer's host and port. Raises ValueError."""
    parts = urlsplit(url)
    try:
        port = parts.port or VIEWER_PORT
    except ValueError:
        port = None
    if parts.scheme not in SCHEMES or not parts.hostname or port is None or parts.path != "/proxy":
        raise ValueError(f"--rerun: expected FILE{SUFFIX} or rerun+http://HOST:{VIEWER_PORT}/proxy, got {url!r}")
    return parts.hostname, port


def check_file(path: Path) -> None:
    """Raises ValueError for another suffix, no folder or a file that exists."""
    if path.suffix.lower() != SUFFIX or not path.parent.is_dir():
        raise ValueError(
            f"--rerun: expected a new {SUFFIX} file in an existing folder, or a viewer's address such as "
            f"rerun+http://127.0.0.1:{VIEWER_PORT}/proxy, got {path}"
        )
    if path.exists():
        raise ValueError(f"--rerun: expected a new file, and {path} exists")


def open_stream(target: str, kind: str, title: str) -> RecordingStream:
    """A recording of its own at a target that was checked. kind: those of one kind are arranged alike in the viewer,
    and listed together. title: for people. Raises OSError if it cannot be written."""
    import rerun

    # Without an id of its own, all recordings of a process are one.
    stream = rerun.RecordingStream(kind, recording_id=uuid.uuid4())
    # The times are those that were handed over, not those of writing.
    stream.set_log_time_enabled(False)
    stream.set_log_tick_enabled(False)
    try:
        if "://" in target:
            stream.connect_grpc(target)
        else:
            stream.save(target)
    except RuntimeError as error:
        raise OSError(f"--rerun {target}: {error}") from None
    stream.send_recording_name(title)
    return stream


def end_stream(stream: RecordingStream, target: str) -> None:
    """Write what is left of a recording, and let it go. Raises OSError if not all could be written, in STUCK_S where it
    goes to a viewer."""
    if (failure := _ended(stream, _patience_s(target))) is not None:
        raise OSError(f"--rerun {target}: {failure}") from failure


def _ended(stream: RecordingStream, longest_s: float | None) -> Exception | None:
    """Writes what is left and lets it go, waiting so long; what went wrong, None if nothing did.

    What hangs goes on beside: the thread keeps the stream, which would wait without a limit where it is forgotten.
    """
    failures: list[Exception] = []

    def end() -> None:
        # Flushing alone can be told when to give up, and of a viewer that never spoke it says that it is done.
        flush: Callable[[], None] = stream.flush
        if longest_s is not None:
            flush = partial(stream.flush, timeout_sec=longest_s)
        for step in (flush, stream.disconnect):
            try:
                step()
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=end, name="xr0-rerun-end", daemon=True)
    thread.start()
    thread.join(longest_s)
    if thread.is_alive():
        return _given_up()
    return failures[0] if failures else None


def _patience_s(target: str) -> float | None:
    """How long a target is waited for; None: as long as it likes."""
    return STUCK_S if "://" in target else None


def _given_up() -> TimeoutError:
    """What is to be said of a viewer that hangs. The end of the process does not wait for it either."""
    import rerun

    # It waits for all streams without a limit. Ours have been ended before that, but for this one.
    rerun.unregister_shutdown()
    return TimeoutError(f"the viewer hangs: it has not taken what it was sent in {STUCK_S:g} s")


class Sink(Generic[Item]):
    """Writes what is handed over in the order in which it comes. A context manager.

    target: of check_target, whose errors it raises. kind, title: as of open_stream. write: draws one item on the
    stream, called from the sink's thread alone. patient: whoever hands something over waits while too much waits to be
    written, for times that are simulated; otherwise it is dropped and counted, and nobody waits ever.

    A disk or a viewer that fails or hangs later ends the recording alone: closing then raises the OSError.
    """

    def __init__(
        self,
        target: str | Path,
        kind: str,
        title: str,
        write: Callable[[RecordingStream, Item], None],
        patient: bool = False,
    ) -> None:
        self.target = check_target(target)
        self.dropped = 0
        self._stream = open_stream(self.target, kind, title)
        self._write, self._patient, self._longest_s = write, patient, _patience_s(self.target)
        self._items: SimpleQueue[tuple[Item, bool] | None] = SimpleQueue()
        self._room = threading.Semaphore(MOST_ENTRIES)
        self._room_for_pictures = threading.Semaphore(MOST_PICTURES)
        self._failure: Exception | None = None
        self._hangs = False
        # When the thread has last written something.
        self._moved_s = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="xr0-rerun", daemon=True)
        self._thread.start()

    def put(self, item: Item, has_pictures: bool = False) -> None:
        """Hand an item over, which is not changed afterwards."""
        if self._failure is not None:
            return
        room = self._room_for_pictures if has_pictures else self._room
        if room.acquire(timeout=self._longest_s) if self._patient else room.acquire(blocking=False):
            self._items.put((item, has_pictures))
        elif self._patient:
            self._give_up()
        else:
            self.dropped += 1

    def close(self) -> None:
        """Write what is left. Raises OSError if not all could be written."""
        self._items.put(None)
        asked_s = time.monotonic()
        while self._thread.is_alive() and not self._hangs:
            self._thread.join(LOOK_S)
            if self._longest_s is not None and time.monotonic() > max(asked_s, self._moved_s) + self._longest_s:
                self._give_up()
        failure = _ended(self._stream, 0.0 if self._hangs else self._longest_s)
        self._failure = self._failure or failure
        if self.dropped:
            log.warning("--rerun %s: %d entries dropped, which came too fast", self.target, self.dropped)
        if self._failure is not None:
            raise OSError(f"--rerun {self.target}: {self._failure}") from self._failure

    def __enter__(self) -> Sink[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        while (entry := self._items.get()) is not None:
            item, has_pictures = entry
            if self._failure is None:
                self._attempt(lambda item=item: self._write(self._stream, item))  # type: ignore[misc]
            self._moved_s = time.monotonic()
            (self._room_for_pictures if has_pictures else self._room).release()

    def _attempt(self, step: Callable[[], None]) -> None:
        """Whatever goes wrong here, the run goes on: it is told when the recording is closed."""
        try:
            step()
        except Exception as error:
            self._failure = self._failure or error

    def _give_up(self) -> None:
        self._hangs = True
        self._failure = self._failure or _given_up()
