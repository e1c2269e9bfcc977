"""CUDA's streams and captures without a GPU: the rules that graphs and sessions rest on, and what breaks them.

Nothing runs here. A stream holds what was queued on it until somebody waits for it; a capture is what torch.cuda.graph
makes of it, with torch's own shortcomings. Only what fused/ calls is there.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from contextlib import contextmanager

import torch

GPU = torch.device("cuda")


class Capture:
    def __init__(self, origin: Stream, mode: str) -> None:
        self.origin, self.mode, self.thread = origin, mode, threading.get_ident()
        self.forked: set[Stream] = set()
        self.broken = False


class Stream:
    """queued: name of a piece of work -> how often it waits to run. capture: that this stream is part of."""

    def __init__(self, device=None) -> None:
        self.queued: Counter[str] = Counter()
        self.capture: Capture | None = None

    def wait_stream(self, other: Stream) -> None:
        """In a capture, who waits for a stream of it joins it, and has to be waited for before the capture ends."""
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
    """faults: what was freed while it was in use."""

    def __init__(self) -> None:
        self.default = Stream()
        self.streams = [self.default]
        self.faults: list[str] = []
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

        def new_stream(device=None) -> Stream:
            self.streams.append(Stream())
            return self.streams[-1]

        monkeypatch.setattr(torch.cuda, "Stream", new_stream)
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
