"""The engine of a run, on a thread of its own: whoever simulates asks it, and what waits is inferred together.

With a batch of 1 each chunk is bit for bit what Engine.infer gives for its observation alone, whoever else asks and
when. With more, matrices of other shapes are multiplied, and sums are rounded otherwise: who happened to wait together
decides the last bits of a chunk, so that two runs are alike only statistically.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xr0_engine.serve.protocol import PolicyFailed, Refused
from xr0_engine.types import ActionChunk, Guide, Observation

if TYPE_CHECKING:
    from xr0_engine.engine import Engine

CLOSE_S = 30.0

Reply = ActionChunk | Refused | PolicyFailed


@dataclass(frozen=True)
class Call:
    """One inference that is waited for. answer: called from the desk's thread."""

    observation: Observation
    prefix: np.ndarray | None
    seed: int
    answer: Callable[[Reply], None]
    guide: Guide | None = None


class Desk:
    """load: makes the engine, in the thread that runs it; what it raises is raised here. batch: observations inferred
    together at most. Close it, or use it as a context manager."""

    def __init__(self, load: Callable[[], Engine], batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self._batch = batch
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        loaded: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._work, args=(load, loaded), name="xr0-engine", daemon=True)
        self._thread.start()
        self.engine = loaded.result()

    def ask(self, call: Call) -> None:
        """Returns at once; the answer comes in its time."""
        self._calls.put(call)

    def close(self) -> None:
        """Let the inference that runs end; those that wait get no answer."""
        self._calls.put(None)
        self._thread.join(CLOSE_S)

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, load: Callable[[], Engine], loaded: Future[Engine]) -> None:
        try:
            engine = load()
        # Whatever it is, it is the caller's to hear.
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(engine)
        while calls := self._next():
            for call, reply in zip(calls, _infer(engine, calls), strict=True):
                call.answer(reply)

    def _next(self) -> list[Call]:
        """What waits, once something does; nothing if the desk is closed."""
        calls: list[Call] = []
        while not calls or (len(calls) < self._batch and not self._calls.empty()):
            call = self._calls.get()
            if call is None:
                return []
            calls.append(call)
        return calls


def _infer(engine: Engine, calls: list[Call]) -> list[Reply]:
    if len(calls) == 1:
        return [_alone(engine, calls[0])]
    try:
        return list(
            engine.infer(
                [call.observation for call in calls],
                prefix=[call.prefix for call in calls],
                seed=[call.seed for call in calls],
                guide=[call.guide for call in calls],
            )
        )
    # One that is refused, or too many at once, must not cost the others their chunks.
    except (ValueError, RuntimeError, MemoryError):
        return [_alone(engine, call) for call in calls]


def _alone(engine: Engine, call: Call) -> Reply:
    try:
        return engine.infer(call.observation, call.prefix, seed=call.seed, guide=call.guide)
    except ValueError as error:
        return Refused(str(error))
    # A fault of the network or of the package: the episode ends with it.
    except Exception as error:
        return PolicyFailed(f"{type(error).__name__}: {error}")
