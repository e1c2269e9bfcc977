"""Where a run's policy comes from: a checkpoint in this process, a server of ours or openpi's, or a script that looks
into the world. A source is data: it goes to the processes that simulate, and connects them there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from xr0_engine.evaluation.benchmark import Benchmark, World
from xr0_engine.evaluation.episode import Actor, Unfit
from xr0_engine.executor import Policy
from xr0_engine.types import ActionChunk, Observation, RobotInfo

if TYPE_CHECKING:
    from xr0_engine.engine import Engine

Ask = Callable[..., ActionChunk]
"""The engine in the parent's process, as GuidedActor.infer. Raises Refused or PolicyFailed."""
Begin = Callable[[World], Actor]
"""The policy at the beginning of a rollout."""

PAUSE_S = 0.5


class Source(Protocol):
    """told: for Run.policy. robot_type: the policy's name for the benchmark's robot. info: how it is driven; None: an
    expert tells, in its world."""

    @property
    def told(self) -> Mapping[str, Any]: ...

    @property
    def robot_type(self) -> str | None: ...

    @property
    def info(self) -> RobotInfo | None: ...

    def connect(self, benchmark: Benchmark, ask: Ask) -> AbstractContextManager[Begin]:
        """In a process that simulates. Raises ConnectionError if a server does not come, PermissionError if it refuses
        the key, ValueError if it serves another policy than it did."""


@dataclass(frozen=True)
class FromEngine:
    """The engine of the parent's process."""

    told: Mapping[str, Any]
    robot_type: str | None
    info: RobotInfo | None

    @contextmanager
    def connect(self, benchmark: Benchmark, ask: Ask) -> Iterator[Begin]:
        assert self.info is not None
        actor = _Asking(ask, self.info)
        yield lambda world: actor


@dataclass(frozen=True)
class FromServer:
    """An `xr0 serve`. wait_s: for the server to come. reply_s: for a reply."""

    told: Mapping[str, Any]
    robot_type: str | None
    info: RobotInfo | None
    url: str
    api_key: str | None
    ca_file: Path | None
    wait_s: float
    reply_s: float

    @contextmanager
    def connect(self, benchmark: Benchmark, ask: Ask) -> Iterator[Begin]:
        from xr0_engine.serve.client import Client

        with Client(self.url, self.api_key, timeout_s=self.wait_s, ca_file=self.ca_file) as client:
            client.timeout_s = self.reply_s
            if client.robot_info(self.robot_type) != self.info:
                raise ValueError(f"{self.url}: the server came back with another policy")
            yield lambda world: client


@dataclass(frozen=True)
class FromOpenpi:
    """A server that speaks openpi's protocol. wait_s, reply_s: as in FromServer."""

    told: Mapping[str, Any]
    robot_type: str | None
    info: RobotInfo | None
    url: str
    api_key: str | None
    wait_s: float
    reply_s: float

    @contextmanager
    def connect(self, benchmark: Benchmark, ask: Ask) -> Iterator[Begin]:
        assert self.info is not None
        with _openpi_client(self.url, self.api_key, benchmark, self.wait_s, self.reply_s) as client:
            actor = _Asking(client.infer, self.info)
            yield lambda world: actor


@dataclass(frozen=True)
class FromExpert:
    """A benchmark's own scripted policy, made anew for each rollout."""

    told: Mapping[str, Any]
    robot_type: str | None = None
    info: RobotInfo | None = None

    @contextmanager
    def connect(self, benchmark: Benchmark, ask: Ask) -> Iterator[Begin]:
        def begin(world: World) -> Actor:
            expert = benchmark.expert(world)
            if expert is None:
                raise Unfit(f"--expert: {benchmark.name} has none for this task")
            return _Seedless(expert)

        yield begin


def of_engine(
    engine: Engine, checkpoint: str | Path, robot_type: str | None, benchmark: Benchmark, dtype: str
) -> FromEngine:
    """checkpoint: as it was asked for. robot_type: as it was asked for, None: the benchmark's or the only one.

    Raises ValueError for a robot type that the checkpoint does not have."""
    import torch

    from xr0_engine.exported.manifest import checkpoint_hash
    from xr0_engine.model.weights import resolve_checkpoint

    name = choose_robot_type(engine.robot_types, robot_type, benchmark)
    folder, on_cpu = resolve_checkpoint(checkpoint), engine.model.device.type == "cpu"
    told = {
        "kind": "engine",
        "title": folder.resolve().name if Path(checkpoint).is_dir() else str(checkpoint),
        "checkpoint": checkpoint_hash(folder),
        "robot_type": name,
        "dtype": dtype,
        "backend": engine.backend,
        # On a CPU sums are split between threads: their number is part of what an action's last bits are.
        "threads": torch.get_num_threads() if on_cpu else None,
    }
    return FromEngine(told, name, engine.robot_info(name))


def of_server(
    url: str,
    api_key: str | None,
    ca_file: Path | None,
    robot_type: str | None,
    benchmark: Benchmark,
    wait_s: float,
    reply_s: float,
) -> FromServer:
    """Raises ConnectionError if the server does not come within wait_s, PermissionError if it refuses the key,
    ValueError for a robot type that it does not serve."""
    from xr0_engine.serve.client import Client

    with Client(url, api_key, timeout_s=wait_s, ca_file=ca_file) as client:
        name = choose_robot_type(client.metadata.robot_types, robot_type, benchmark)
        info = client.robot_info(name)
    # A server does not tell which checkpoint it serves.
    told = {"kind": "server", "title": f"{name} from {_place(url)}", "checkpoint": None, "robot_type": name}
    return FromServer(told | {"dtype": None, "backend": None}, name, info, url, api_key, ca_file, wait_s, reply_s)


def of_openpi(url: str, api_key: str | None, benchmark: Benchmark, wait_s: float, reply_s: float) -> FromOpenpi:
    """Asks the server once for a chunk, to see what it gives. Errors as of_server's; ValueError for a benchmark without
    an example of openpi's, or a server whose actions do not fit it."""
    from xr0_engine.evaluation.openpi import timed

    with _openpi_client(url, api_key, benchmark, wait_s, reply_s) as client:
        info = timed(client.robot_info(), benchmark.rate_hz)
    told = {"kind": "openpi", "title": f"openpi server {_place(url)}", "checkpoint": None, "robot_type": None}
    return FromOpenpi(told | {"dtype": None, "backend": None}, None, info, url, api_key, wait_s, reply_s)


def of_expert() -> FromExpert:
    told = {"kind": "expert", "title": "scripted expert", "checkpoint": None, "robot_type": None}
    return FromExpert(told | {"dtype": None, "backend": None})


def choose_robot_type(known: Sequence[str], asked: str | None, benchmark: Benchmark) -> str:
    """asked; else the policy's only one; else the benchmark's. Raises ValueError that lists what there is."""
    if asked is None:
        asked = known[0] if len(known) == 1 else benchmark.robot_type
    if asked is None or asked not in known:
        raise ValueError(f"--robot-type: expected one of {', '.join(known)}; got {asked!r}")
    return asked


@dataclass(frozen=True)
class _Asking:
    """Somebody else's inference as an Actor."""

    infer: Ask
    info: RobotInfo

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self.info


class _Seedless:
    """A policy that draws nothing as an Actor."""

    def __init__(self, policy: Policy) -> None:
        self._policy: Any = policy

    def infer(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> ActionChunk:
        return self._policy.infer(observation, prefix)

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self._policy.robot_info(robot_type)


def _openpi_client(url: str, api_key: str | None, benchmark: Benchmark, wait_s: float, reply_s: float) -> Any:
    """Waits for the server."""
    from xr0_engine.evaluation.openpi import EXAMPLES, OpenpiClient

    if benchmark.name not in EXAMPLES:
        raise ValueError(
            f"--openpi: expected a benchmark that openpi has an example of, {', '.join(EXAMPLES)}; got {benchmark.name}"
        )
    end = time.monotonic() + wait_s
    while True:
        try:
            return OpenpiClient(url, api_key, EXAMPLES[benchmark.name], reply_s)
        except ConnectionError:
            if time.monotonic() + PAUSE_S > end:
                raise
            time.sleep(PAUSE_S)


def _place(url: str) -> str:
    """Host and port, without what a URL may hold besides."""
    parts = urlsplit(url if "://" in url else f"ws://{url}")
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
