"""The engine's thread with an engine that infers ahead: who is taken when, who is told what."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from tests.serve.support import EchoEngine, backend, observation
from xr0_engine.serve.protocol import Request
from xr0_engine.serve.worker import EngineThread


class AheadEngine(EchoEngine):
    """Ends a call when it has another one, or when `ended` is set. begun: the first values of the states it began with,
    in order."""

    infers_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[float] = []
        self.ended = threading.Event()
        self.ended.set()

    def infer_all(self, calls):
        at_work = None
        for call in calls:
            if call is not None:
                self.begun.append(float(call.observation.state[0]))
            if at_work is not None and (call is not None or self.ended.is_set()):
                yield self._outcome(at_work)
                at_work = None
            at_work = at_work if call is None else call
        if at_work is not None:
            yield self._outcome(at_work)

    def _outcome(self, call):
        try:
            return self.infer(call.observation, call.prefix, seed=call.seed)
        except (ValueError, RuntimeError) as error:
            return error


def request(value: float, instruction: str = "Go.") -> Request:
    return Request(observation(value, instruction=instruction), seed=int(value))


async def started(engine: EchoEngine) -> EngineThread:
    worker = backend(engine)
    await worker.start()
    return worker


async def until_begun(engine: AheadEngine, count: int) -> None:
    while len(engine.begun) < count:
        await asyncio.sleep(0.001)


def test_a_request_that_comes_meanwhile_is_begun_before_the_first_has_ended():
    async def serve() -> None:
        engine = AheadEngine()
        worker = await started(engine)
        assert worker.slots == 2
        assert len(engine.begun) == len(engine.robot_types), "warmed up as it will run"
        engine.begun.clear()
        engine.ended.clear()
        first = asyncio.create_task(worker.infer(request(1)))
        await until_begun(engine, 1)
        second = asyncio.create_task(worker.infer(request(2)))
        await until_begun(engine, 2)
        assert (await first).actions[0, 0] == 1
        assert not second.done()
        engine.ended.set()
        assert (await second).actions[0, 0] == 2
        assert len(engine.threads) == 1
        await worker.close()

    asyncio.run(serve())


def test_each_is_told_what_came_of_its_own():
    async def serve() -> None:
        worker = await started(AheadEngine())
        requests = [request(1), request(2, "Refuse me."), request(3), request(4)]
        found = await asyncio.gather(*map(worker.infer, requests), return_exceptions=True)
        assert isinstance(found[1], ValueError)
        assert [chunk.actions[0, 0] for chunk in (found[0], *found[2:])] == [1, 3, 4]
        await worker.close()

    asyncio.run(serve())


def test_who_is_at_work_is_told_of_a_fault_that_nobody_expects():
    async def serve() -> None:
        engine = AheadEngine()
        worker = await started(engine)
        engine.broken.append(KeyError("a bug"))
        with pytest.raises(KeyError, match="a bug"):
            await worker.infer(request(1))
        assert (await worker.infer(request(2))).actions[0, 0] == 2
        await worker.close()

    asyncio.run(serve())


def test_who_went_away_is_left_out_and_closing_lets_the_rest_go():
    async def serve() -> None:
        engine = AheadEngine()
        worker = await started(engine)
        engine.begun.clear()
        engine.gate = threading.Semaphore(0)
        tasks = [asyncio.create_task(worker.infer(request(value))) for value in (1, 2, 3, 4)]
        await until_begun(engine, 2)
        tasks[2].cancel()
        await asyncio.sleep(0)
        closing = asyncio.create_task(worker.close())
        await asyncio.sleep(0.05)
        engine.gate.release(2)
        await closing
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [chunk.actions[0, 0] for chunk in found[:2]] == [1, 2]
        assert [type(each) for each in found[2:]] == [asyncio.CancelledError] * 2
        assert engine.begun == [1, 2]

    asyncio.run(serve())


def test_an_engine_that_does_not_look_ahead_has_one_slot():
    class Modest(AheadEngine):
        infers_ahead = False

    async def serve() -> None:
        for engine in (EchoEngine(), Modest()):
            worker = await started(engine)
            assert worker.slots == 1
            assert np.all((await worker.infer(request(3))).actions[:, 0] == 3)
            await worker.close()

    asyncio.run(serve())
