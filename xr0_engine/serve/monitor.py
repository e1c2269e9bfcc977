"""What the server knows of itself: Prometheus metrics, and the state that the status page draws."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from xr0_engine.robot.history import newest
from xr0_engine.robot.layouts import find_layout
from xr0_engine.serve.guarding import ServerGuard
from xr0_engine.types import ActionChunk, GuardWarning, Observation, RobotInfo, TokenizedObservation

log = logging.getLogger("xr0_engine.serve")

BUCKETS_MS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
"""Upper edges of the latency histogram, on the page and in the metrics."""

RECENT = 2000
"""Requests whose latencies the page shows."""

RECENT_WARNINGS = 20
"""Of a guard's, that the page shows."""

_BUCKETS_S = tuple(edge / 1000 for edge in BUCKETS_MS)


@dataclass
class ClientRecord:
    """What was seen of one client. last_observation, last_chunk: of its newest answered request."""

    address: str
    connected_at: float = field(default_factory=time.time)
    answered: int = 0
    errors: int = 0
    superseded: int = 0
    last_answer_at: float | None = None
    last_total_ms: float | None = None
    rate_hz: float = 0.0
    last_observation: Observation | TokenizedObservation | None = None
    last_chunk: ActionChunk | None = None


class Monitor:
    """Counts requests and remembers the latest; used by the event loop's thread alone. guard: is told of all that is
    answered; guarded: the robot types that it looks at."""

    def __init__(self, guard: ServerGuard | None = None) -> None:
        self._guard = guard
        self.guarded: tuple[str, ...] = ()
        self.warnings: dict[str, int] = {}
        self._recent_warnings: deque[tuple[float, int, GuardWarning]] = deque(maxlen=RECENT_WARNINGS)
        self.started_at = time.time()
        self.clients: dict[int, ClientRecord] = {}
        self.results: dict[str, int] = {}
        # Who was answered last of those that have gone: the page goes on showing what it saw.
        self._gone: tuple[int, ClientRecord] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._numbers = 0
        self._registry = CollectorRegistry()
        self._requests = Counter("xr0_requests", "Requests by result.", ["result"], registry=self._registry)
        self._warnings = Counter("xr0_guard_warnings", "Warnings by check.", ["check"], registry=self._registry)
        self._clients = Gauge("xr0_clients", "Clients connected.", registry=self._registry)
        self._ready = Gauge("xr0_ready", "1 while requests are answered.", registry=self._registry)
        self._total, self._inference, self._queue, self._overhead = (
            Histogram(name, text, buckets=_BUCKETS_S, registry=self._registry)
            for name, text in (
                ("xr0_request_seconds", "Request received to reply encoded."),
                ("xr0_inference_seconds", "In the engine."),
                ("xr0_queue_seconds", "Waiting for its turn."),
                ("xr0_overhead_seconds", "All that is neither engine nor waiting."),
            )
        )
        self._stages = Histogram(
            "xr0_stage_seconds", "Stages of the engine.", ["stage"], buckets=_BUCKETS_S, registry=self._registry
        )

    def set_ready(self, ready: bool) -> None:
        self._ready.set(ready)

    def connected(self, address: str) -> int:
        """A new client; its number."""
        self._numbers += 1
        self.clients[self._numbers] = ClientRecord(address)
        self._clients.set(len(self.clients))
        return self._numbers

    def disconnected(self, number: int) -> None:
        record = self.clients.pop(number)
        if record.last_chunk is not None and (self._gone is None or _answered_at(record) > _answered_at(self._gone[1])):
            self._gone = number, record
        self._clients.set(len(self.clients))
        if self._guard is not None:
            self._guard.disconnected(number)

    def answered(
        self,
        number: int,
        observation: Observation | TokenizedObservation,
        chunk: ActionChunk,
        timing_ms: Mapping[str, float],
    ) -> None:
        """timing_ms: queue_ms, infer_ms, total_ms."""
        total, infer, queue = timing_ms["total_ms"], timing_ms["infer_ms"], timing_ms["queue_ms"]
        self._count("answered")
        self._recent.append((total, infer))
        self._total.observe(total / 1e3)
        self._inference.observe(infer / 1e3)
        self._queue.observe(queue / 1e3)
        self._overhead.observe(max(0.0, total - infer - queue) / 1e3)
        for stage, milliseconds in chunk.timing_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1e3)
        record = self.clients[number]
        now = time.time()
        if record.last_answer_at is not None:
            rate = 1 / max(now - record.last_answer_at, 1e-3)
            record.rate_hz += 0.2 * (rate - record.rate_hz)
        record.answered += 1
        record.last_answer_at, record.last_total_ms = now, total
        record.last_observation, record.last_chunk = observation, chunk
        if self._guard is not None:
            self._guard.answered(number, observation, chunk)

    def warned(self, number: int, warnings: Iterable[GuardWarning]) -> None:
        """What has struck the guard of a client, which may have gone since."""
        for warning in warnings:
            self.warnings[warning.name] = self.warnings.get(warning.name, 0) + 1
            self._warnings.labels(warning.name).inc()
            self._recent_warnings.append((time.time(), number, warning))
            log.warning("client %d: guard, %s: %s", number, warning.name, warning.detail)

    def record(self, number: int) -> ClientRecord | None:
        """Of a client that is connected, or that was answered last of those that were."""
        if self._gone is not None and self._gone[0] == number:
            return self._gone[1]
        return self.clients.get(number)

    def refused(self, number: int, kind: str) -> None:
        """A request that got an error of that kind."""
        self._count(kind)
        record = self.clients[number]
        if kind == "superseded":
            record.superseded += 1
        else:
            record.errors += 1

    def rejected(self, reason: str) -> None:
        """A connection that was not let in."""
        self._count(reason)

    def prometheus(self) -> bytes:
        return generate_latest(self._registry)

    def snapshot(self, robots: Mapping[str, RobotInfo]) -> dict[str, Any]:
        """What the page draws, as JSON's kinds of values."""
        totals = [total for total, _ in self._recent]
        inferences = [infer for _, infer in self._recent]
        return {
            "uptime_s": time.time() - self.started_at,
            "results": self.results,
            "buckets_ms": BUCKETS_MS,
            "latency": {"total": _histogram(totals), "inference": _histogram(inferences)},
            "percentiles_ms": {"total": _percentiles(totals), "inference": _percentiles(inferences)},
            "clients": [_client(number, record) for number, record in self.clients.items()],
            "robots": {name: asdict(robot) for name, robot in robots.items()},
            "latest": self._latest(robots),
            "guard": self._guarding() if self.guarded else None,
        }

    def _guarding(self) -> dict[str, Any]:
        now = time.time()
        recent = [
            {"client": number, "ago_s": now - at, **asdict(warning)} for at, number, warning in self._recent_warnings
        ]
        return {"robots": self.guarded, "counts": self.warnings, "recent": recent[::-1]}

    def _count(self, result: str) -> None:
        self.results[result] = self.results.get(result, 0) + 1
        self._requests.labels(result).inc()

    def _latest(self, robots: Mapping[str, RobotInfo]) -> dict[str, Any] | None:
        answered = [item for item in self.clients.items() if item[1].last_chunk is not None]
        if self._gone is not None:
            answered.append(self._gone)
        if not answered:
            return None
        number, record = max(answered, key=lambda item: _answered_at(item[1]))
        chunk, observation = record.last_chunk, record.last_observation
        assert chunk is not None
        assert observation is not None
        images, instruction = {}, "(sent as tokens)"
        if isinstance(observation, Observation):
            images, instruction = dict(observation.images), observation.instruction
        columns = np.flatnonzero(chunk.active_columns)
        robot = robots[chunk.robot_type]
        layout = find_layout(robot.layout)
        return {
            "client": number,
            "connected": number in self.clients,
            "age_s": max(0.0, time.time() - _answered_at(record)),
            "instruction": instruction,
            "robot_type": chunk.robot_type,
            "views": {view: list(newest(image).shape[1::-1]) for view, image in images.items()},
            "names": [layout.label(column) for column in columns.tolist()],
            "control_rate_hz": robot.control_rate_hz,
            "actions": [[round(float(value), 5) for value in row] for row in chunk.actions[:, columns]],
            "prefix_length": chunk.prefix_length,
            "timing_ms": {stage: round(float(value), 3) for stage, value in chunk.timing_ms.items()},
            "frame": record.answered,
        }


def _answered_at(record: ClientRecord) -> float:
    return record.last_answer_at or 0.0


def _client(number: int, record: ClientRecord) -> dict[str, Any]:
    return {
        "number": number,
        "address": record.address,
        "connected_s": time.time() - record.connected_at,
        "answered": record.answered,
        "errors": record.errors,
        "superseded": record.superseded,
        "rate_hz": record.rate_hz,
        "idle_s": None if record.last_answer_at is None else time.time() - record.last_answer_at,
        "last_total_ms": record.last_total_ms,
    }


def _histogram(values: Iterable[float]) -> list[int]:
    """How many fall under each edge of BUCKETS_MS and over the one before; the last counts those over all."""
    edges = np.array(BUCKETS_MS, dtype=float)
    return np.bincount(np.searchsorted(edges, list(values)), minlength=len(edges) + 1).tolist()


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": max(values)}
