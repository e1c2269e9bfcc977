"""The engine on a thread of its own: whoever serves chunks asks it through a Backend and never waits in its event loop.

An Engine is not shared between threads, so one thread makes it, warms it up and runs every inference.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.serve.protocol import Request
from xr0_engine.types import ActionChunk, Inference, Observation, RobotInfo, TokenizedObservation

log = logging.getLogger("xr0_engine.serve")

CLOSE_S = 0.5
"""How long closing waits for an inference that is still at work; it ends with the process."""
LOOK_S = 0.0002
"""While an inference runs, whether a request has come to run beside it is looked at so often, and whether it has ended.
"""


class ServedEngine(Protocol):
    """What is asked of an engine: xr0_engine.Engine has it, and so may anything else that gives chunks."""

    @property
    def robot_types(self) -> tuple[str, ...]: ...

    @property
    def max_prefix(self) -> int: ...

    def embodiment(self, robot_type: str | None = None) -> Embodiment: ...

    def example(self, robot_type: str | None = None, image_size: tuple[int, int] = ...) -> Observation: ...

    def infer(
        self, observation: Observation, prefix: np.ndarray | None = None, *, seed: int | None = None
    ) -> ActionChunk:
        """Raises ValueError for a wrong input, RuntimeError if the model or its device fails; serves on after both."""
        ...


@runtime_checkable
class TakesTokens(Protocol):
    """An engine that also takes observations as tokens; errors as in ServedEngine.infer."""

    def infer_tokenized(
        self, observation: TokenizedObservation, prefix: np.ndarray | None = None, *, seed: int | None = None
    ) -> ActionChunk: ...


@runtime_checkable
class TakesGuides(Protocol):
    """An engine that, where takes_guides, draws chunks toward a guide. As Engine.infer and infer_tokenized have it."""

    @property
    def takes_guides(self) -> bool: ...


@runtime_checkable
class InfersAhead(Protocol):
    """An engine that, where infers_ahead, begins with the next call while one is at work. As Engine.infer_all."""

    @property
    def infers_ahead(self) -> bool: ...

    def infer_all(self, calls: Iterable[Inference | None]) -> Iterator[ActionChunk | Exception]: ...


@runtime_checkable
class TellsBackend(Protocol):
    """An engine that says what runs its network, and why."""

    backend: str
    backend_reason: str


@dataclass(frozen=True)
class Served:
    """What an engine was found to serve. robots: robot type -> how it is driven; action_width A, state_width S.
    max_prefix: the longest that it was trained with. backend: what runs its network and why, empty if it does not say.
    """

    robots: Mapping[str, RobotInfo]
    action_width: int
    state_width: int
    max_prefix: int
    backend: str = ""


class Backend(Protocol):
    """Where chunks come from. slots: how many requests it works on at once, told when it has started; infer is never
    called for more."""

    slots: int

    async def start(self) -> Served:
        """Load and warm up. Raises what the engine raises."""
        ...

    async def infer(self, request: Request) -> ActionChunk: ...

    def fault(self, longest_s: float) -> str | None:
        """Why no chunks are to be expected: an inference that has taken longer than that, or nobody there to make them.
        None if all is well."""
        ...

    async def close(self) -> None: ...


def describe(engine: ServedEngine, image_size: tuple[int, int], only: str | None = None) -> Served:
    """Infer once per robot type, which also warms up, and tell what came.

    image_size: (height, width) of the images. only: this robot type; None for all that have a profile. Raises
    ValueError if there is none to serve.
    """
    if only is not None and only not in engine.robot_types:
        raise ValueError(f"robot_type: expected one of {', '.join(engine.robot_types)}; got {only!r}")
    robots: dict[str, RobotInfo] = {}
    action_width = state_width = 0
    missing = []
    for robot_type in engine.robot_types if only is None else (only,):
        try:
            profile = engine.embodiment(robot_type)
        except ValueError as error:
            missing.append(str(error))
            continue
        example = engine.example(robot_type, image_size)
        chunk = engine.infer(example, seed=0)
        length, action_width = chunk.actions.shape
        *rows, state_width = example.state.shape
        robots[robot_type] = profile.robot_info(length, action_width, engine.max_prefix, rows[0] if rows else 1)
    if not robots:
        raise ValueError("; ".join(missing) or "engine: expected at least one robot type, got none")
    told = f"{engine.backend}: {engine.backend_reason}" if isinstance(engine, TellsBackend) else ""
    return Served(robots, action_width, state_width, engine.max_prefix, told)


def infer_one(engine: ServedEngine, request: Request) -> ActionChunk:
    """The engine's chunk for a request. Raises what the engine raises."""
    observation = request.observation
    more = guide_of(engine, request)
    if isinstance(observation, Observation):
        return engine.infer(observation, request.prefix, seed=request.seed, **more)
    if not isinstance(engine, TakesTokens):
        raise ValueError("input_ids: this policy takes images and text, not tokens; send an Observation")
    return engine.infer_tokenized(observation, request.prefix, seed=request.seed, **more)


def guide_of(engine: object, request: Request) -> dict[str, Any]:
    """A request's guide as infer takes it by name, if it has one. Raises ValueError where the engine takes none: what
    it would raise counts as its failure."""
    if request.guide is None:
        return {}
    if not isinstance(engine, TakesGuides) or not engine.takes_guides:
        raise ValueError(
            "guide: this policy takes none; execute it in mode sync or naive_async, or in async with prefixes"
        )
    return {"guide": request.guide}


class EngineThread:
    """A Backend: one engine on one thread.

    load: makes the engine, on that thread. image_size: (height, width) to warm up with. robot_type: serve this one
    alone, so that requests need not name it; None serves all. slots: two for an engine that infers ahead.
    """

    def __init__(
        self,
        load: Callable[[], ServedEngine],
        image_size: tuple[int, int] = (480, 640),
        robot_type: str | None = None,
    ) -> None:
        self.slots = 1
        self._load = load
        self._robot_type = robot_type
        self._image_size = image_size
        self._engine: ServedEngine | None = None
        self._ahead: InfersAhead | None = None
        self._waiting: queue.SimpleQueue[tuple[Request, Future[ActionChunk]]] = queue.SimpleQueue()
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._working = AtWork()
        self._ended: str | None = None
        # A daemon: whatever it is at, the process can end.
        self._thread = threading.Thread(target=self._run, name="xr0-engine", daemon=True)

    async def start(self) -> Served:
        self._thread.start()
        served: Served = await asyncio.wrap_future(self._submit(self._start))
        return served

    async def infer(self, request: Request) -> ActionChunk:
        future: Future[ActionChunk] = Future()
        if self._ahead is None:
            future = self._submit(lambda: self._infer(request))
        else:
            self._waiting.put((request, future))
            ahead = self._ahead
            self._submit(lambda: self._infer_waiting(ahead))
        return await asyncio.wrap_future(future)

    def fault(self, longest_s: float) -> str | None:
        return self._ended or self._working.fault(longest_s)

    async def close(self) -> None:
        """Waits CLOSE_S at most for the inference that runs; what waits is cancelled."""
        self._cancel_waiting()
        self._tasks.put(None)
        deadline = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        if self._thread.is_alive():
            log.warning("the engine is still at work: it ends with the process")

    def _submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Raises RuntimeError if the engine's thread has ended."""
        if self._ended:
            raise RuntimeError(self._ended)
        future: Future[Any] = Future()
        self._tasks.put((call, future))
        return future

    def _cancel_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()[1].cancel()

    def _run(self) -> None:
        """The engine's thread, until it is closed, or something ends it that ends threads."""
        try:
            while (task := self._tasks.get()) is not None:
                call, future = task
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    value = call()
                except Exception as error:
                    future.set_exception(error)
                except BaseException as error:
                    # Raised in the event loop, it would end that as well.
                    future.set_exception(RuntimeError(f"the engine's thread has died: {error!r}"))
                    raise
                else:
                    future.set_result(value)
            self._ended = "the engine is closed"
        except BaseException as error:
            self._ended = f"the engine's thread has died: {error!r}"
            log.critical("%s", self._ended)
        finally:
            self._cancel_waiting()
            with suppress(queue.Empty):
                while True:
                    if (task := self._tasks.get_nowait()) is not None:
                        task[1].cancel()

    def _start(self) -> Served:
        self._engine = self._load()
        served = describe(self._engine, self._image_size, self._robot_type)
        if isinstance(self._engine, InfersAhead) and self._engine.infers_ahead:
            self._ahead, self.slots = self._engine, 2
            examples = [self._engine.example(robot_type, self._image_size) for robot_type in served.robots]
            for outcome in self._ahead.infer_all(Inference(example, seed=0) for example in examples):
                if isinstance(outcome, Exception):
                    raise outcome
        return served

    def _infer(self, request: Request) -> ActionChunk:
        assert self._engine is not None
        with self._working:
            return infer_one(self._engine, request)

    def _infer_waiting(self, engine: InfersAhead) -> None:
        """All requests that wait, and those that come while one of them is at work."""
        taken: deque[Future[ActionChunk]] = deque()
        try:
            for outcome in engine.infer_all(self._calls(taken)):
                self._working.ended()
                if isinstance(outcome, Exception):
                    taken.popleft().set_exception(outcome)
                else:
                    taken.popleft().set_result(outcome)
        except BaseException as error:
            # Whoever waits is told what nobody expected.
            is_fault = isinstance(error, Exception)
            for future in taken:
                self._working.ended()
                future.set_exception(error if is_fault else RuntimeError(f"the engine's thread has died: {error!r}"))
            raise

    def _calls(self, taken: deque[Future[ActionChunk]]) -> Iterator[Inference | None]:
        """taken: of those that are at work."""
        while True:
            try:
                request, future = self._waiting.get(timeout=LOOK_S) if taken else self._waiting.get_nowait()
            except queue.Empty:
                if not taken:
                    return
                yield None
            else:
                if future.set_running_or_notify_cancel():
                    taken.append(future)
                    self._working.begun()
                    yield Inference(request.observation, request.prefix, seed=request.seed, guide=request.guide)


class AtWork:
    """Since when inferences have been at work; those that began first end first. Asked from other threads too."""

    def __init__(self) -> None:
        self._since: deque[float] = deque()

    def begun(self) -> None:
        self._since.append(time.monotonic())

    def ended(self) -> None:
        self._since.popleft()

    def fault(self, longest_s: float) -> str | None:
        """What is to be said of one that has taken longer than that; None if none has."""
        try:
            took_s = time.monotonic() - self._since[0]
        except IndexError:
            return None
        if took_s <= longest_s:
            return None
        return f"an inference has taken {took_s:.1f} s so far, expected at most {longest_s:g} s"

    def __enter__(self) -> None:
        self.begun()

    def __exit__(self, *_: object) -> None:
        self.ended()
