"""A process and all that it starts: begun with a log, waited for as long as it may take, and ended for good.

Each is the leader of a group of its own, so that a signal to the run does not reach it by itself, and a signal to it
reaches its children. If the run is killed, the kernel kills the leader; what is left of the group carries the run's
mark in its environment, by which the next run finds and kills it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MARK = "BENCH_MACHINE_RUN"
POLL_S = 0.1
GRACE_S = {signal.SIGINT: 10.0, signal.SIGTERM: 5.0, signal.SIGKILL: 10.0}
"""What a process is ended by, one after the other, and how long it may take. At Ctrl-C's signal, benchmarks leave what
they have measured."""
DEATH_SIGNAL = 1
"""prctl's name for: a signal to me when my parent dies."""

_LIBC = ctypes.CDLL(None)


class Stop:
    """What asked the run to end: the signal, or None; asked again, it is in a hurry."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.hurry = False

    def __call__(self, number: int, frame: object) -> None:
        self.hurry = self.signal is not None
        self.signal = self.signal or signal.Signals(number)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Within, Ctrl-C and SIGTERM are written down instead of taking their course."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(
    command: Sequence[str], environment: Mapping[str, str], mark: str, log: IO[bytes], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Raises OSError if there is no such command."""
    parent = os.getpid()

    def begin() -> None:
        # The signals' handlers are the run's own; what it was started to ignore, its processes shall not.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=log,
        env={**os.environ, **environment, MARK: mark},
        start_new_session=True,
        preexec_fn=begin,
    )


def wait(process: subprocess.Popen[bytes], limit_s: float, stop: Stop) -> tuple[int | None, str | None]:
    """Its exit code, None if nothing ends it; and why it was ended: `time`, `stop` or None. Its group is gone then."""
    end, why = time.monotonic() + limit_s, None
    try:
        while not _has_ended(process):
            if stop.signal or time.monotonic() > end:
                why = "stop" if stop.signal else "time"
                _end(process, stop)
                break
            time.sleep(POLL_S)
    finally:
        # Before it is waited for: until then, no other group can have its number.
        _signal(process, signal.SIGKILL)
    return (process.wait() if _has_ended(process) else None), why


def end_leftovers(mark: str) -> None:
    """Kill what is left of a run that was killed: processes with its mark."""
    told = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if told in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
        except (PermissionError, ProcessLookupError, FileNotFoundError):
            # Somebody else's, or gone meanwhile.
            continue


def _end(process: subprocess.Popen[bytes], stop: Stop) -> None:
    for number, grace in GRACE_S.items():
        _signal(process, number)
        end = time.monotonic() + grace
        while time.monotonic() < end and not (stop.hurry and number != signal.SIGKILL):
            if _has_ended(process):
                return
            time.sleep(POLL_S)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without waiting for it: its number stays its own."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        # All of the group has ended.
        return
