"""Engines on many GPUs: replicas of a Ray Serve deployment as a Backend, behind the same server.

The server stays one process in front: websockets, keys, limits and the status page are its own. It gives each request
to the replica with the least to do; a replica takes what waits for it as one batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from xr0_engine.serve.protocol import PolicyFailed, Refused, Request
from xr0_engine.serve.worker import Served, ServedEngine, describe, infer_one
from xr0_engine.types import ActionChunk, Observation

APPLICATION = "xr0"

Outcome = ActionChunk | Refused | PolicyFailed


@dataclass(frozen=True)
class RayOptions:
    """min_replicas, max_replicas: autoscaling keeps between them what it takes to have target_waiting requests at each.
    gpus, cpus: of one replica. max_batch: requests inferred together. wait_s: how long a batch waits for more.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    gpus: float = 1.0
    cpus: float = 1.0
    max_batch: int = 4
    wait_s: float = 0.002
    target_waiting: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"replicas: expected at least 1 and no more than the most, got {self.min_replicas} and "
                f"{self.max_replicas}"
            )
        if self.max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, got {self.max_batch}")


class RayReplicas:
    """A Backend. load: makes an engine that also takes lists, in each replica, so Ray must be able to pickle it.

    Joins the Ray that is running (RAY_ADDRESS), else starts one on this machine. image_size, robot_type: as in
    EngineThread.
    """

    def __init__(
        self,
        load: Callable[[], ServedEngine],
        options: RayOptions,
        image_size: tuple[int, int] = (480, 640),
        robot_type: str | None = None,
    ) -> None:
        self.slots = options.max_replicas * options.max_batch
        self._options = options
        self._arguments = (load, image_size, robot_type)
        self._handle: Any = None
        self._is_own_ray = False
        self._since: dict[object, float] = {}

    async def start(self) -> Served:
        self._handle = await asyncio.to_thread(self._deploy)
        return await self._handle.describe.remote()

    async def infer(self, request: Request) -> ActionChunk:
        from ray.exceptions import RayError

        response = self._handle.infer.remote(request)
        self._since[response] = time.monotonic()
        try:
            outcome: Outcome = await response
        except RayError as error:
            # A replica that died; Ray starts another.
            raise PolicyFailed(str(error).strip().partition("\n")[0]) from None
        except asyncio.CancelledError:
            # Whoever asked has gone: what no replica has begun with is dropped.
            response.cancel()
            raise
        finally:
            del self._since[response]
        if isinstance(outcome, ActionChunk):
            return outcome
        raise outcome

    def fault(self, longest_s: float) -> str | None:
        took_s = time.monotonic() - min(self._since.values(), default=time.monotonic())
        if took_s <= longest_s:
            return None
        return f"an inference has taken {took_s:.1f} s so far, expected at most {longest_s:g} s"

    async def close(self) -> None:
        """Ends the replicas; a Ray that was there before stays."""
        if self._handle is not None:
            from ray import serve

            # Its threads would go on reporting to a Ray that may be gone.
            await self._handle.shutdown_async()
            await asyncio.to_thread(serve.delete, APPLICATION)
        if self._is_own_ray:
            import ray

            await asyncio.to_thread(ray.shutdown)

    def _deploy(self) -> Any:
        import ray
        from ray import serve

        options = self._options
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
            self._is_own_ray = True
        # Clients come through our server, not through Ray's.
        serve.start(proxy_location="Disabled")
        deployment: Any = serve.deployment(
            _replica(options),
            name="engine",
            ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
            autoscaling_config={
                "min_replicas": options.min_replicas,
                "initial_replicas": options.min_replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.target_waiting,
            },
            # One batch at work, one waiting.
            max_ongoing_requests=2 * options.max_batch,
        )
        return serve.run(deployment.bind(*self._arguments), name=APPLICATION, route_prefix=None)


def infer_together(engine: Any, requests: list[Request]) -> list[Outcome]:
    """One outcome per request. Those that can be are inferred as one batch; one that is refused harms no other."""
    outcomes: dict[int, Outcome] = {}
    groups: dict[object, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        observation = request.observation
        # What came as tokens or with a guide is inferred alone.
        alone = not isinstance(observation, Observation) or request.guide is not None
        groups[index if alone else observation.robot_type].append(index)
    for group in groups.values():
        outcomes |= zip(group, _infer_group(engine, [requests[index] for index in group]), strict=True)
    return [outcomes[index] for index in range(len(requests))]


def _infer_group(engine: Any, requests: list[Request]) -> list[Outcome]:
    """Requests of one robot type: their chunks have one length."""
    if len(requests) == 1:
        (request,) = requests
        try:
            return [infer_one(engine, request)]
        except ValueError as error:
            return [Refused(str(error))]
        except (RuntimeError, MemoryError) as error:
            return [PolicyFailed(str(error) or type(error).__name__)]
    try:
        return list(
            engine.infer(
                [request.observation for request in requests],
                [request.prefix for request in requests],
                seed=[request.seed for request in requests],
            )
        )
    except (ValueError, RuntimeError, MemoryError):
        # Which of them it was shows when each is alone; memory that was short for all may do for one.
        return [outcome for request in requests for outcome in _infer_group(engine, [request])]


def _replica(options: RayOptions) -> type:
    from ray import serve

    class Replica:
        """One engine, on a thread of its own."""

        def __init__(
            self, load: Callable[[], ServedEngine], image_size: tuple[int, int], robot_type: str | None
        ) -> None:
            self._thread = ThreadPoolExecutor(1)
            self._engine = self._thread.submit(load).result()
            self._served = self._thread.submit(describe, self._engine, image_size, robot_type).result()

        def describe(self) -> Served:
            return self._served

        @serve.batch(max_batch_size=options.max_batch, batch_wait_timeout_s=options.wait_s)
        async def infer(self, requests: list[Request]) -> list[Outcome]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, infer_together, self._engine, requests)

    return Replica
