"""Inference beside the control loop: the loop hands over a request and looks in later, and never waits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from xr0_engine.executor.clock import Clock
from xr0_engine.executor.interfaces import GuidedPolicy, Policy, Snapshot
from xr0_engine.types import ActionChunk, Guide


@dataclass(frozen=True, eq=False)
class Request:
    """One inference. number: counts them. prefix: (P, A) float32, anchored at the snapshot, or None. guide: the same,
    of mode guided. first_step: the step that the observation belongs to. submitted_s: on the executor's clock. at_rest:
    the robot has not been told anything yet."""

    number: int
    snapshot: Snapshot
    prefix: np.ndarray | None
    first_step: int
    submitted_s: float
    at_rest: bool
    guide: Guide | None = None

    @property
    def prefix_length(self) -> int:
        return 0 if self.prefix is None else len(self.prefix)

    @property
    def committed(self) -> int:
        """How many of its chunk's first actions the chunk before it gives."""
        return self.prefix_length if self.guide is None else self.guide.frozen


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a request: a chunk, or the error that the policy raised."""

    request: Request
    result: ActionChunk | Exception
    finished_s: float


class Worker(Protocol):
    """Works on one request at a time: submit only after the last one's outcome was polled."""

    def submit(self, request: Request) -> None: ...

    def poll(self) -> Outcome | None:
        """The outcome, once, when there is one. Returns at once."""

    def close(self, patience_s: float) -> None:
        """Let a call that is running end, as long as patience lasts."""


def _attempt(policy: Policy, request: Request, clock: Clock) -> Outcome:
    observation = request.snapshot.observation
    try:
        result: ActionChunk | Exception
        if request.guide is None:
            result = policy.infer(observation, request.prefix)
        else:
            result = cast(GuidedPolicy, policy).infer(observation, guide=request.guide)
    # Whatever a policy raises, the robot must not be left without a loop: the executor counts the error and tells it.
    except Exception as error:
        result = error
    return Outcome(request, result, clock.now())


class ThreadWorker:
    """A thread of its own for the policy. A call that hangs keeps the thread, never the loop nor the process's end."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="xr0-policy", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        self._requests.put(request)

    def poll(self) -> Outcome | None:
        try:
            return self._outcomes.get_nowait()
        except queue.Empty:
            return None

    def close(self, patience_s: float) -> None:
        self._requests.put(None)
        self._thread.join(patience_s)

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            self._outcomes.put(_attempt(self._policy, request, self._clock))


class DelayedWorker:
    """For simulated time: infers at once, and shows the outcome delay_s(request number) seconds later."""

    def __init__(self, policy: Policy, clock: Clock, delay_s: Callable[[int], float]) -> None:
        self._policy, self._clock, self._delay_s = policy, clock, delay_s
        self._outcome: Outcome | None = None

    def submit(self, request: Request) -> None:
        outcome = _attempt(self._policy, request, self._clock)
        finished_s = request.submitted_s + self._delay_s(request.number)
        self._outcome = Outcome(request, outcome.result, finished_s)

    def poll(self) -> Outcome | None:
        outcome = self._outcome
        # A nanosecond for the rounding of times: done in exactly 3 periods means done at the third tick.
        if outcome is None or outcome.finished_s > self._clock.now() + 1e-9:
            return None
        self._outcome = None
        return outcome

    def close(self, patience_s: float) -> None: ...
