"""Steps one behind the other: what may run beside what, by CUDA's rules on paper, and that chunks are those of each
call alone, bit by bit. With a GPU, on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fused.cuda_on_paper import GPU, PaperCuda
from tests.kernels.support import DEVICE
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.engine import Engine
from xr0_engine.fused.lookahead import Lookahead
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.weights import load_model, read_index
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.types import Inference

TOUCHED = {
    "vision": ({"patches"}, {"vision"}),
    "prefill": ({"vision", "staged"}, {"text"}),
    "flow": ({"text", "staged"}, {"chunk"}),
    "step": ({"patches", "staged"}, {"vision", "text", "chunk"}),
    "update_patches": (set(), {"patches"}),
    "update_rest": (set(), {"staged"}),
    "chunk_on_host": ({"chunk"}, set()),
    "making": (set(), {"patches", "vision", "staged", "text", "chunk"}),
}
"""What each part of a session, and what surrounds them, reads and writes of its buffers. Scratch memory is named with
them: the vision's and the prefill's is "vision", the flow's "chunk"."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lookahead") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


def engine_of(folder, device: torch.device, backend: str, ahead: bool) -> Engine:
    model = load_model(ModelConfig.load(folder), read_index(folder), device, torch.float32)
    fused = FusedModel(model, backend, TacticTable("", ahead=ahead), graphs=device.type == "cuda")
    return Engine(fused, Preprocessor.load(folder), backend)


@pytest.fixture
def engine(folder):
    return engine_of(folder, torch.device("cpu"), "reference", False)


class PaperEngine(PaperCuda):
    """Every session tells what it touches. call: the number of the call that is at work, as work is named."""

    call = 0

    def install(self, monkeypatch) -> None:
        super().install(monkeypatch)
        made, replayed, sessions = Session.__init__, Session.replay, []

        def touch(session: Session, work: str) -> None:
            touched = [{f"{sessions.index(session)}: {buffer}" for buffer in buffers} for buffers in TOUCHED[work]]
            self.access(f"{work} of call {self.call}", *touched)

        def make(session, *arguments, **options) -> None:
            made(session, *arguments, **options)
            sessions.append(session)
            touch(session, "making")
            session.vision_free = torch.cuda.Event()
            session._note_vision()

        def replay(session, part="step") -> None:
            touch(session, part)
            replayed(session, part)

        def touching(method: str):
            original = getattr(Session, method)

            def touching_method(session, *arguments):
                touch(session, method)
                return original(session, *arguments)

            return touching_method

        monkeypatch.setattr(Session, "__init__", make)
        monkeypatch.setattr(Session, "replay", replay)
        for method in ("update_patches", "update_rest", "chunk_on_host"):
            monkeypatch.setattr(Session, method, touching(method))

    def numbered(self, calls):
        for self.call, call in enumerate(calls):
            yield call


@pytest.fixture
def cuda(engine, monkeypatch) -> PaperEngine:
    """The engine looks ahead, on paper."""
    cuda = PaperEngine()
    cuda.install(monkeypatch)
    monkeypatch.setattr(engine.model, "lookahead", Lookahead(GPU))
    return cuda


def calls_of(engine: Engine, sizes, instruction="Pick up the red cube.") -> list[Inference]:
    """One per image size; the seeds differ."""
    observations = [replace(engine.example("libero_all", size), instruction=instruction) for size in sizes]
    return [Inference(observation, seed=seed) for seed, observation in enumerate(observations)]


SAME, OTHER = (64, 64), (64, 96)


@pytest.mark.parametrize(
    "sizes", [[SAME] * 4, [SAME, OTHER, SAME, OTHER], [SAME, OTHER, OTHER, SAME]], ids=["one case", "two", "returning"]
)
def test_chunks_are_those_of_each_call_alone(engine, cuda, sizes):
    calls = calls_of(engine, sizes)
    found = list(engine.infer_all(cuda.numbered(calls)))
    assert cuda.faults == []
    expected = [engine.infer(call.observation, seed=call.seed) for call in calls]
    assert cuda.faults == [], "what runs alone afterwards is behind all of it"
    for mine, alone in zip(found, expected, strict=True):
        assert np.array_equal(mine.actions, alone.actions)
        assert set(mine.timing_ms) == {"preprocess", "step", "decode", "total"}


def test_a_vision_runs_beside_the_flow_before_it_and_gives_way(engine, cuda):
    list(engine.infer_all(cuda.numbered(calls_of(engine, [SAME] * 3))))
    for number in (1, 2):
        assert cuda.beside(f"vision of call {number}", f"flow of call {number - 1}")
        assert not cuda.beside(f"vision of call {number}", f"prefill of call {number - 1}")
    main, beside = engine.model.lookahead._main, engine.model.lookahead._beside
    assert main.priority < beside.priority == 0


def test_what_runs_meanwhile_on_the_callers_stream_is_in_order(engine, cuda):
    calls = calls_of(engine, [SAME] * 3)
    expected = [engine.infer(call.observation, seed=call.seed).actions for call in calls]
    outcomes = engine.infer_all(cuda.numbered(calls))
    assert np.array_equal(next(outcomes).actions, expected[0])
    # The second is on its way.
    assert np.array_equal(engine.infer(calls[2].observation, seed=2).actions, expected[2])
    (session,) = engine.model._sessions._values.values()
    session.replay("flow")
    for mine, alone in zip(outcomes, expected[1:], strict=True):
        assert np.array_equal(mine.actions, alone)
    assert cuda.faults == []


@pytest.mark.parametrize("part", ["vision", "prefill"])
def test_a_call_that_fails_leaves_the_others(engine, cuda, monkeypatch, part):
    good = calls_of(engine, [SAME] * 4)
    expected = [engine.infer(call.observation, seed=call.seed).actions for call in good]
    replay = Session.replay

    def fails(session, replayed="step") -> None:
        replay(session, replayed)
        if cuda.call == 2 and replayed == part:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(Session, "replay", fails)
    refused = replace(good[1], seed=-1)
    outcomes = engine.infer_all(cuda.numbered([good[0], refused, good[2], good[3]]))
    assert np.array_equal(next(outcomes).actions, expected[0])
    assert isinstance(next(outcomes), ValueError)
    assert isinstance(next(outcomes), RuntimeError)
    # Behind what the failure left on its streams.
    assert np.array_equal(engine.infer(good[1].observation, seed=1).actions, expected[1])
    (last,) = outcomes
    assert np.array_equal(last.actions, expected[3])
    assert cuda.faults == []


def test_who_comes_later_is_waited_for_until_the_one_at_work_has_ended(engine, cuda, monkeypatch):
    first, second = calls_of(engine, [SAME, SAME])
    events, found, make = [], [], torch.cuda.Event

    def event():
        events.append(make())
        return events[-1]

    def calls():
        yield first
        for _ in range(3):
            yield None
            assert found == []
        for each in events:
            each.synchronize()
        yield None
        assert len(found) == 1
        yield second

    monkeypatch.setattr(torch.cuda, "Event", event)
    for outcome in engine.infer_all(calls()):
        found.append(outcome)
    assert len(found) == 2
    assert cuda.faults == []


def test_without_a_gpu_each_call_ends_before_the_next(engine):
    calls = calls_of(engine, [SAME, OTHER])
    wrong = replace(calls[0], prefix=np.zeros((1, 3)))
    taken = []

    def one_by_one():
        for number, call in enumerate((calls[0], None, wrong, calls[1])):
            taken.append(number)
            yield call

    outcomes = engine.infer_all(one_by_one())
    assert not engine.infers_ahead
    assert np.array_equal(next(outcomes).actions, engine.infer(calls[0].observation, seed=0).actions)
    assert taken == [0]
    refused, last = outcomes
    assert isinstance(refused, ValueError)
    assert np.array_equal(last.actions, engine.infer(calls[1].observation, seed=1).actions)


@pytest.mark.gpu
def test_the_gpu_gives_the_same_chunks(folder):
    engine = engine_of(folder, DEVICE, "triton", True)
    calls = [call for _ in range(50) for call in calls_of(engine, [SAME, OTHER, SAME, SAME])]
    found = list(engine.infer_all(calls))
    alone = {}
    for mine, call in zip(found, calls, strict=True):
        place = call.seed
        if place not in alone:
            alone[place] = engine.infer(call.observation, seed=place)
        assert np.array_equal(mine.actions, alone[place].actions)
