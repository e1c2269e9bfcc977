"""Replicas of a Ray Serve deployment behind the server, on a Ray of this machine."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import numpy as np
import pytest

from tests.serve.support import EchoEngine, observation
from tests.support import ROOT
from xr0_engine import AsyncClient
from xr0_engine.serve.protocol import PolicyFailed, Refused, Request
from xr0_engine.serve.replicas import RayOptions, RayReplicas, infer_together
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.types import ActionChunk, TokenizedObservation

GO = observation(0.25, size=(32, 32), instruction="Go.")
BIMANUAL = observation(0.5, "bimanual", size=(32, 32), instruction="Go.")
OBJECT_STORE_BYTES = 80 << 20


class BatchEngine(EchoEngine):
    """Takes lists too, and tells in timing_ms how many came together, and in which process."""

    def infer(self, observation, prefix=None, *, seed=None):
        if not isinstance(observation, list):
            return self.told(super().infer(observation, prefix, seed=seed), 1)
        if any(one.instruction == "Too much." for one in observation):
            raise RuntimeError("out of memory")
        rows = zip(observation, prefix, seed, strict=True)
        chunks = [super(BatchEngine, self).infer(one, given, seed=own) for one, given, own in rows]
        return [self.told(chunk, len(chunks)) for chunk in chunks]

    def told(self, chunk: ActionChunk, size: int) -> ActionChunk:
        return replace(chunk, timing_ms={**chunk.timing_ms, "batch": size, "process": os.getpid()})


def test_outcomes_keep_their_order_and_their_faults():
    requests = [
        Request(GO, seed=4),
        Request(BIMANUAL),
        Request(replace(GO, instruction="Refuse me.")),
        Request(GO, np.ones((2, 32), np.float32), seed=5),
        Request(replace(BIMANUAL, instruction="Too much.")),
    ]
    outcomes = infer_together(BatchEngine(), requests)
    assert [type(outcome) for outcome in outcomes] == [ActionChunk, ActionChunk, Refused, ActionChunk, ActionChunk]
    assert [outcomes[index].actions[5, -1] for index in (0, 3)] == [4, 5]
    assert outcomes[3].actions[:3, 0].tolist() == [1, 1, 0.25]
    assert outcomes[1].robot_type == "bimanual"


def test_what_can_be_is_one_batch():
    outcomes = infer_together(BatchEngine(), [Request(GO, seed=seed) for seed in range(3)] + [Request(BIMANUAL)])
    assert [outcome.timing_ms["batch"] for outcome in outcomes] == [3, 3, 3, 1]


def test_prepared_and_raw_images_stay_what_they_are():
    engine = BatchEngine()
    infer_together(engine, [Request(GO), Request(replace(GO, prepared=True))])
    assert [seen.prepared for seen in engine.seen] == [False, True]


def test_tokens_are_inferred_alone():
    class TokenEngine(BatchEngine):
        def infer_tokenized(self, observation, prefix=None, *, seed=None):
            return self.infer(GO, prefix, seed=seed)

    tokens = TokenizedObservation(
        np.zeros(3, np.int64), np.zeros((4, 6), np.float32), ((2, 2),), GO.state, "libero_all"
    )
    requests = [Request(GO, seed=1), Request(tokens, seed=2), Request(GO, seed=3)]
    outcomes = infer_together(TokenEngine(), requests)
    assert [(outcome.actions[0, -1], outcome.timing_ms["batch"]) for outcome in outcomes] == [(1, 2), (2, 1), (3, 2)]
    (refused,) = infer_together(BatchEngine(), [Request(tokens)])
    assert (type(refused), str(refused)) == (
        Refused,
        "input_ids: this policy takes images and text, not tokens; send an Observation",
    )


def test_failure_of_one_alone_is_told():
    engine = BatchEngine()
    engine.broken = [RuntimeError("device lost"), MemoryError()]
    assert [str(one) for one in infer_together(engine, [Request(GO)])] == ["device lost"]
    (failed,) = infer_together(engine, [Request(GO)])
    assert (type(failed), str(failed)) == (PolicyFailed, "MemoryError")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 2)])
def test_replicas_that_cannot_be(low, high):
    with pytest.raises(ValueError, match="replicas: expected at least 1"):
        RayOptions(min_replicas=low, max_replicas=high)


@pytest.fixture
def local_ray():
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'xr0-engine[ray]'")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.serve.shutdown()
    ray.shutdown()


# Ray's own, of the pydantic that it uses.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_replicas_share_the_work_in_batches(local_ray):
    async def ask(url: str) -> list[ActionChunk]:
        async def one(number: int) -> list[ActionChunk]:
            async with AsyncClient(url, timeout_s=60) as client:
                asked = observation(float(number), size=(32, 32), instruction="Go.")
                return [await client.infer(asked, seed=number) for _ in range(10)]

        chunks = await asyncio.gather(*(one(number) for number in range(6)))
        async with AsyncClient(url) as client:
            with pytest.raises(Refused, match="instruction: expected another"):
                await client.infer(replace(GO, instruction="Refuse me."))
        return chunks

    options = RayOptions(min_replicas=2, max_replicas=2, gpus=0, cpus=0.5, max_batch=3, wait_s=0.02)
    replicas = RayReplicas(lambda: BatchEngine(delay_s=0.01), options, image_size=(32, 32))
    with BackgroundServer(replicas, ServerConfig(port=0)) as server:
        assert server.server.metadata.robot_types == ("libero_all", "bimanual")
        answered = asyncio.run(ask(server.url))
    for number, chunks in enumerate(answered):
        assert [(chunk.actions[0, 0], chunk.actions[0, -1]) for chunk in chunks] == [(number, number)] * 10
    told = [chunk.timing_ms for chunks in answered for chunk in chunks]
    assert len({timing["process"] for timing in told}) == 2
    assert max(timing["batch"] for timing in told) > 1
