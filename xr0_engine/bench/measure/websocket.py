"""The engine behind its server, in a process of its own on the same machine: what a robot waits beyond inference.

Rivals: `engine`, the case's engine; `null`, the same server with a policy that answers at once: the server alone.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection

import numpy as np

from xr0_engine.bench.cases import Setup, Subject
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.timing import WARM_UP, StageTimes, peak_memory_bytes, reset_peak_memory, run
from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.serve.client import Client
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.worker import EngineThread
from xr0_engine.types import ActionChunk, Observation

SEED = 0


@dataclass(frozen=True)
class NullPolicy:
    """Answers every observation with one chunk, at once."""

    chunk: ActionChunk
    profile: Embodiment
    observation: Observation

    max_prefix = 0

    @property
    def robot_types(self) -> tuple[str, ...]:
        return (self.chunk.robot_type,)

    def embodiment(self, robot_type: str | None = None) -> Embodiment:
        return self.profile

    def example(self, robot_type: str | None = None, image_size: tuple[int, int] = (0, 0)) -> Observation:
        return self.observation

    def infer(
        self, observation: Observation, prefix: np.ndarray | None = None, *, seed: int | None = None
    ) -> ActionChunk:
        return self.chunk


def measure(setup: Setup, rounds: int, command: str, alone: bool) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did. alone: without the null policy.

    The checkpoint is loaded twice, here to know what is right. Raises ValueError for a case with a batch, RuntimeError
    if the server's actions are not the engine's: nothing is timed then.
    """
    if setup.case.batch != 1:
        raise ValueError(f"case: expected one observation at a time, got {setup.case.name} with {setup.case.batch}")
    subject = Subject.load(setup)
    device = subject.engine.model.device
    reset_peak_memory(device)
    with _rivals(subject, alone) as rivals:
        series, reason = run(rivals, rounds)
    result = Result(
        kind="latency",
        command=command,
        environment=environment(device),
        case=subject.describe(),
        boundary="websocket",
        backend=subject.engine.backend,
        series=series,
        facts={"part": "all", "warm_up": WARM_UP, "peak_memory_bytes": peak_memory_bytes(device)},
        complete=reason is None,
    )
    return result, reason


@contextmanager
def _rivals(subject: Subject, alone: bool) -> Iterator[dict[str, Callable[[], StageTimes]]]:
    """Rival -> one request through its server, as milliseconds: inference, overhead, total. The servers end with it."""
    observation, prefix = subject.observations[0], subject.prefixes[0]
    chunk = subject.engine.infer(observation, prefix, seed=SEED)
    profile = subject.engine.embodiment(chunk.robot_type)
    null = NullPolicy(replace(chunk, timing_ms={"total": 0.0}), profile, observation)
    with ExitStack() as stack:
        urls = stack.enter_context(_served(subject.setup, null))
        clients = {
            name: stack.enter_context(Client(url))
            for name, url in zip(("engine",) if alone else ("engine", "null"), urls, strict=False)
        }
        for name, client in clients.items():
            served = client.infer(observation, prefix, seed=SEED)
            if not np.array_equal(served.actions, chunk.actions):
                raise RuntimeError(f"nothing was timed: {name}'s server gave other actions than the engine")

        def request(client: Client) -> StageTimes:
            timing = client.infer(observation, prefix, seed=SEED).timing_ms
            inference, total = timing["total"], timing["round_trip"]
            return {"inference": inference, "overhead": total - inference, "total": total}

        yield {name: partial(request, client) for name, client in clients.items()}


@contextmanager
def _served(setup: Setup, null: NullPolicy) -> Iterator[tuple[str, str]]:
    """Where a fresh process serves the setup's engine, and where the null policy."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(setup, null, there), daemon=True)
    process.start()
    # Else the death of the process would not show on this end.
    there.close()
    try:
        yield here.recv()
    except EOFError:
        raise RuntimeError("the server's process ended before it served; it says why above") from None
    finally:
        here.close()
        process.join()


def _serve(setup: Setup, null: NullPolicy, pipe: Connection) -> None:
    """In the process of the server, until the other end of the pipe is closed."""
    config = ServerConfig(port=0, max_requests_per_s=1e6, max_prefix=max(setup.case.prefix_length, 1))
    engine = EngineThread(lambda: Subject.load(setup).engine, setup.case.image_size, setup.case.robot_type)
    with BackgroundServer(engine, config) as first, BackgroundServer(EngineThread(lambda: null), config) as second:
        pipe.send((first.url, second.url))
        with suppress(EOFError):
            pipe.recv()
