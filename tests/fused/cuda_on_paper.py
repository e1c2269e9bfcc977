"""CUDA's streams and captures without a GPU: the rules that graphs and sessions rest on, and what breaks them.

Nothing runs here. A stream holds what was queued on it until somebody waits for it; a capture is what torch.cuda.graph
makes of it, with torch's own shortcomings. Work that says what it reads and writes is checked: two that touch the same,
one of them writing, must be ordered by streams, events or the host. Only what fused/ calls is there.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import torch

GPU = torch.device("cuda")


class Event:
    """ended: whether the GPU has come so far; it has, by the time that the host waits."""

    def __init__(self, cuda: PaperCuda) -> None:
        self._cuda = cuda
        self.behind: frozenset[int] = frozenset()
        self.ended = False

    def record(self, stream: Stream) -> None:
        self.behind, self.ended = stream.behind, False

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        self.ended = True
        self._cuda.seen_by_host |= self.behind


class Capture:
    def __init__(self, origin: Stream, mode: str) -> None:
        self.origin, self.mode, self.thread = origin, mode, threading.get_ident()
        self.forked: set[Stream] = set()
        self.broken = False


class Access(NamedTuple):
    """A piece of work that was queued. behind: the numbers of all that had ended when it ran, whatever the GPU did."""

    name: str
    reads: frozenset[str]
    writes: frozenset[str]
    behind: frozenset[int]


class Stream:
    """queued: name of a piece of work -> how often it waits to run. capture: that this stream is part of. behind:
    numbers of the accesses that have ended before what is queued next."""

    def __init__(self, device=None, priority: int = 0) -> None:
        self.queued: Counter[str] = Counter()
        self.capture: Capture | None = None
        self.priority = priority
        self.behind: frozenset[int] = frozenset()

    def wait_event(self, event: Event) -> None:
        self.behind |= event.behind

    def wait_stream(self, other: Stream) -> None:
        """In a capture, who waits for a stream of it joins it, and has to be waited for before the capture ends."""
        self.behind |= other.behind
        if other.capture is None or other is self:
            return
        if self.capture is None:
            self.capture = other.capture
        self.capture.forked.discard(other)
        if self is not self.capture.origin:
            self.capture.forked.add(self)

    def synchronize(self) -> None:
        if self.capture is not None:
            self.capture.broken = True
            raise RuntimeError("a stream that is captured cannot be waited for")
        self.queued.clear()


class PaperCuda:
    """faults: what was freed while it was in use, and what touched the same in no order. accesses: all there were."""

    def __init__(self) -> None:
        self.default = Stream()
        self.streams = [self.default]
        self.faults: list[str] = []
        self.accesses: list[Access] = []
        self.seen_by_host: frozenset[int] = frozenset()
        self._captures: list[Capture] = []
        self._current = threading.local()

    def install(self, monkeypatch) -> None:
        cuda = self

        class CUDAGraph:
            def __init__(self, keep_graph: bool = False) -> None:
                self.name = f"replay of {id(self)}"
                weakref.finalize(self, cuda.freed, "a graph", self.name)

            def instantiate(self) -> None: ...

            def replay(self) -> None:
                cuda.launch(self.name)

        def new_stream(device=None, priority: int = 0) -> Stream:
            self.streams.append(Stream(device, priority))
            return self.streams[-1]

        monkeypatch.setattr(torch.cuda, "Stream", new_stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(torch.cuda, "graph", self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)

    @property
    def current(self) -> Stream:
        """Of this thread."""
        return getattr(self._current, "stream", self.default)

    @property
    def queued(self) -> Counter[str]:
        """On all streams."""
        return sum((stream.queued for stream in self.streams), Counter())

    def launch(self, name: str) -> None:
        """Queue work on the current stream; into a capture where that is captured."""
        if self.current.capture is None:
            self.current.queued[name] += 1

    def access(self, name: str, reads: set[str] = frozenset(), writes: set[str] = frozenset()) -> None:
        """Queue work on the current stream that reads and writes these."""
        stream, number = self.current, len(self.accesses)
        behind = stream.behind | self.seen_by_host
        for index, other in enumerate(self.accesses):
            if index not in behind and (other.writes & (reads | writes) or other.reads & writes):
                self.faults.append(f"{name} may run beside {other.name}")
        self.accesses.append(Access(name, frozenset(reads), frozenset(writes), behind))
        stream.behind |= {number}

    def beside(self, first: str, second: str) -> bool:
        """Whether the last pieces of work of these names may run at once."""
        numbers = {access.name: number for number, access in enumerate(self.accesses)}
        one, other = sorted((numbers[first], numbers[second]))
        return one not in self.accesses[other].behind

    def allocate(self) -> None:
        """A call that could wait for the device, as an allocation: breaks captures of this thread, and global ones."""
        for capture in self._captures:
            if capture.mode == "global" or capture.thread == threading.get_ident():
                capture.broken = True
                raise RuntimeError("operation not permitted when stream is capturing")

    def synchronize(self, device=None) -> None:
        """Wait for the whole device: breaks every capture on it, whatever its mode."""
        for capture in self._captures:
            capture.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")
        for stream in self.streams:
            stream.synchronize()

    def freed(self, what: str, name: str | None = None) -> None:
        """Called when memory goes. name: of the work that uses it, None: any."""
        if self.queued if name is None else self.queued[name]:
            self.faults.append(f"{what} was freed while it was in use")

    @contextmanager
    def using(self, stream: Stream):
        before, self._current.stream = self.current, stream
        try:
            yield
        finally:
            self._current.stream = before

    @contextmanager
    def capturing(self, graph, stream: Stream, capture_error_mode: str = "global"):
        # As torch does: it waits for the device first, and leaves its stream current where the capture cannot end.
        for other in self._captures:
            other.broken = True
        before, self._current.stream = self.current, stream
        stream.capture = capture = Capture(stream, capture_error_mode)
        self._captures.append(capture)
        try:
            yield
        finally:
            self._captures.remove(capture)
            for each in self.streams:
                if each.capture is capture:
                    each.capture = None
            if capture.forked:
                raise RuntimeError("capturing stream has unjoined work")
            if capture.broken:
                raise RuntimeError("operation failed due to a previous error during capture")
            self._current.stream = before
