"""Reading requests that take time, on threads of their own: cheap ones first, and a client gone is a request dropped.

Nobody can interrupt a thread, so what it may take is known before (robot/picture_cost.py), and what a client took is
counted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

LIGHT_PIXELS = 4 << 20
"""A request of at most as many decoded pixels is light: three views of 1280 x 720. One thread takes no other, so that
whoever sends what cameras send never waits for somebody's largest pictures."""

DECODE_SHARE = 0.5
"""Seconds of decoding per second that a client may take on average. A core decodes some 150 Mi pixels a second."""
DECODE_BURST_S = 2.0
DECODED_PIXELS_PER_S = 128 << 20
"""Of one client on average, times scans, and as many at once as a second brings."""

Value = TypeVar("Value")


class Allowance:
    """What a client may still spend: rate per second, and at once as much as `most`, which it starts with."""

    def __init__(self, rate: float, most: float) -> None:
        self._rate = rate
        self._most = most
        self._left = most
        self._at = time.monotonic()

    @property
    def left(self) -> float:
        """Below 0 it is a debt."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) * self._rate, self._most)
        self._at = now
        return self._left

    @property
    def debt_s(self) -> float:
        """Seconds until it has something again; 0 if it has."""
        return max(-self.left, 0.0) / self._rate

    def spend(self, amount: float) -> bool:
        """Whether there was that much left; if not, nothing is taken."""
        if self.left < amount:
            return False
        self._left -= amount
        return True

    def charge(self, amount: float) -> None:
        """Take what was used, even if there was less."""
        self._left = self.left - amount

    def __enter__(self) -> None:
        self._begun = time.thread_time()

    def __exit__(self, *_: object) -> None:
        """Charges the seconds that this thread has computed since it was entered."""
        self.charge(time.thread_time() - self._begun)


class DecodeAllowance:
    """What one client may have decoded."""

    def __init__(self) -> None:
        self._seconds = Allowance(DECODE_SHARE, DECODE_BURST_S)
        self._pixels = Allowance(DECODED_PIXELS_PER_S, DECODED_PIXELS_PER_S)

    def why_not(self, pixels: int) -> str | None:
        """Why these pixels cannot be decoded now; None if they can, and then they are counted."""
        if self._seconds.left <= 0:
            return f"images: expected at most {DECODE_SHARE:g} s of decoding per second: send fewer or smaller ones"
        if self._pixels.left <= 0:
            most = DECODED_PIXELS_PER_S
            return f"images: expected at most {most} decoded pixels per second: send fewer or smaller ones"
        self._pixels.charge(pixels)
        return None

    @property
    def debt_s(self) -> float:
        """Seconds until something can be decoded again; 0: now."""
        return max(self._seconds.debt_s, self._pixels.debt_s)

    def charge(self, seconds: float) -> None:
        self._seconds.charge(seconds)


@dataclass(eq=False)
class _Job(Generic[Value]):
    pixels: int
    work: Callable[[], Value]
    done: Future[Value] = field(default_factory=Future)
    seconds: float = 0.0


class Decoder:
    """Two threads, one of them for light work alone. They end with the process, whatever they are at."""

    def __init__(self) -> None:
        self._waiting: list[_Job[object]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._started = False

    async def run(self, work: Callable[[], Value], pixels: int, allowance: DecodeAllowance) -> Value:
        """What work gives, or what it raises. Cancelled while it waits, it is never begun.

        pixels: what it will decode; the seconds that it took are charged to the allowance.
        """
        job = _Job(pixels, work)
        with self._changed:
            if not self._started:
                self._started = True
                for is_light in (True, False):
                    threading.Thread(target=self._decode, args=(is_light,), name="xr0-decode", daemon=True).start()
            self._waiting.append(job)  # type: ignore[arg-type]
            self._changed.notify_all()
        try:
            return await asyncio.wrap_future(job.done)
        finally:
            allowance.charge(job.seconds)

    def close(self) -> None:
        """Drop what waits, and let the threads end."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.done.cancel()
            self._changed.notify_all()

    def _decode(self, is_light: bool) -> None:
        while (job := self._next(is_light)) is not None:
            if not job.done.set_running_or_notify_cancel():
                continue
            start = time.thread_time()
            try:
                value = job.work()
            except BaseException as error:
                job.seconds = time.thread_time() - start
                job.done.set_exception(error)
            else:
                job.seconds = time.thread_time() - start
                job.done.set_result(value)

    def _next(self, is_light: bool) -> _Job[object] | None:
        """The cheapest that waits, the oldest of several; None once closed."""
        with self._changed:
            while not self._closed:
                self._waiting = [job for job in self._waiting if not job.done.cancelled()]
                job = min(self._waiting, key=lambda job: job.pixels, default=None)
                if job is not None and (job.pixels <= LIGHT_PIXELS or not is_light):
                    self._waiting.remove(job)
                    return job
                self._changed.wait()
        return None
