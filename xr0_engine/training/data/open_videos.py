"""The video files that a process keeps open, shared by its threads."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xr0_engine.training.data.decoder import HALF_A_FRAME, Decoder
from xr0_engine.training.data.samples import DataError

# Reading on in an open file is several times cheaper than opening it.
OPEN_FILES = 32


@dataclass(frozen=True, eq=False)
class _Idle:
    identity: tuple[str, int, int, int, int]
    thread: int
    decoder: Decoder


class _Pool:
    """The process's open files. A decoder in use is one thread's alone; idle ones are kept, up to OPEN_FILES in all."""

    def __init__(self) -> None:
        self._parents: list[list[_Idle]] = []
        self._begin()

    def forget(self) -> None:
        """Begin anew: in a forked process the files' positions are shared with the parent."""
        # Closing them would wait for the decoders' threads, which only the parent has.
        self._parents.append(self._idle)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        # The one that was used last stands last.
        self._idle: list[_Idle] = []
        self._in_use = 0

    def frame(self, path: Path, time_s: float, fps: float, until_s: float) -> np.ndarray:
        """What Decoder.at gives, within half a frame, of a file that goes at fps until until_s.

        Raises DataError, without the path.
        """
        identity = _identity(path)
        decoder = self._take(path, identity)
        # One that was interrupted is not used again.
        kept: _Idle | None = None
        try:
            decoder.check_rate(fps, until_s)
            image = decoder.at(time_s, HALF_A_FRAME / fps)
            kept = _Idle(identity, threading.get_ident(), decoder)
            return image
        except DataError:
            kept = _Idle(identity, threading.get_ident(), decoder)
            raise
        finally:
            self._give(kept)

    def _take(self, path: Path, identity: tuple[str, int, int, int, int]) -> Decoder:
        with self._lock:
            # A file that was replaced on the disk is another file.
            stale = [idle for idle in self._idle if idle.identity[0] == identity[0] and idle.identity != identity]
            self._idle = [idle for idle in self._idle if idle not in stale]
            matching = [idle for idle in self._idle if idle.identity == identity]
            own = [idle for idle in matching if idle.thread == threading.get_ident()]
            found = (own or matching)[-1] if matching else None
            if found is not None:
                self._idle.remove(found)
            else:
                surplus = max(len(self._idle) + self._in_use + 1 - OPEN_FILES, 0)
                stale += self._idle[:surplus]
                del self._idle[:surplus]
            self._in_use += 1
        for idle in stale:
            idle.decoder.close()
        if found is not None:
            return found.decoder
        try:
            return Decoder(path)
        except BaseException:
            self._give(None)
            raise

    def _give(self, idle: _Idle | None) -> None:
        with self._lock:
            self._in_use -= 1
            if idle is not None:
                self._idle.append(idle)


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot be opened as a video: {error.strerror}") from None
    return str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


POOL = _Pool()
os.register_at_fork(after_in_child=POOL.forget)
