"""Graphs: what is captured, what failures leave behind, what is freed when.

Where there is no GPU, by CUDA's rules on paper; with one, by CUDA.
"""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial

import pytest
import torch

from tests.fused.cuda_on_paper import GPU, PaperCuda
from tests.fused.test_model import TWO_VIEWS, chunk_inputs, fused_of
from tests.support import load, random_inputs
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.fused import session as sessions
from xr0_engine.fused.graph import Graph, wait_for_stream
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.staging import Staging
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.network import StageClock

LONG = 200_000_000
"""Cycles that a GPU sleeps, some 0.1 s: far longer than what the host does meanwhile."""
STALL_S = 0.2
"""How long a thread is given to do what it must not."""


@pytest.fixture
def cuda(monkeypatch) -> PaperCuda:
    cuda = PaperCuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph") / "tiny"
    init_checkpoint(folder, "tiny")
    return load(folder)


def when_captured(action):
    """Work that does it the second time: the first is the warm-up."""
    calls = []

    def work() -> None:
        calls.append(None)
        if len(calls) == 2:
            action()

    return work


def in_a_thread(action) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_what_other_threads_allocate_breaks_no_capture(cuda):
    Graph(when_captured(lambda: in_a_thread(cuda.allocate).join()), GPU)


def test_an_engine_in_another_thread_breaks_no_capture(cuda):
    """Each has a model of its own; its clock waits for its own work."""
    Graph(when_captured(lambda: in_a_thread(lambda: StageClock(partial(wait_for_stream, GPU))).join()), GPU)


def test_what_cannot_be_captured_is_refused_to_the_capturing_thread(cuda):
    with pytest.raises(RuntimeError, match="capture"):
        Graph(when_captured(cuda.allocate), GPU)


def test_what_is_garbage_breaks_no_capture(cuda):
    class Kernel:
        """Held by itself alone; frees something on the GPU when it goes."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            if cuda.current.capture is not None:
                cuda.current.capture.broken = True

    def leave_garbage() -> None:
        for _ in range(3):
            Kernel()

    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        Graph(when_captured(leave_garbage), GPU)
        assert gc.isenabled()
        with pytest.raises(KeyError):
            Graph(when_captured(fail), GPU)
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)


def test_captures_take_turns(cuda):
    threads, made = [], []

    def start_another() -> None:
        threads.append(in_a_thread(lambda: made.append(Graph(lambda: None, GPU))))
        threads[0].join(STALL_S)
        assert made == [], "captured beside another capture"

    Graph(when_captured(start_another), GPU)
    threads[0].join()
    assert len(made) == 1


def fail() -> None:
    raise KeyError("the work failed")


def leave_a_fork() -> None:
    torch.cuda.Stream().wait_stream(torch.cuda.current_stream())


@pytest.mark.parametrize(
    ("failing", "error"),
    [(fail, KeyError), (when_captured(fail), KeyError), (when_captured(leave_a_fork), RuntimeError)],
    ids=["in the warm-up", "in the capture", "at its end"],
)
def test_a_failure_leaves_no_stream_behind(cuda, failing, error):
    def work() -> None:
        cuda.launch("a kernel")
        failing()

    with pytest.raises(error):
        Graph(work, GPU)
    assert cuda.current is cuda.default
    assert not cuda.queued, "its buffers may be freed now"
    Graph(lambda: None, GPU).replay()
    assert cuda.default.queued


def session_of(plain, **options) -> Session:
    fused, model = fused_of(plain)
    inputs = random_inputs(model.config, [TWO_VIEWS], [[3, 2, 5]], 0)
    session = Session(fused, session_key(inputs), inputs, **options)
    session.update(inputs, *chunk_inputs(inputs, model.config, 1))
    return session


@pytest.mark.parametrize("layer", [0, 1], ids=["before any join", "between two"])
def test_a_flow_that_fails_beside_the_prefill_says_why(plain, cuda, monkeypatch, layer):
    session, whole = session_of(plain), FusedHead.layer
    session.run()
    expected = session.chunk.clone()
    beside = partial(session._prefill_beside_flow, plain.config.head.num_layers)

    def fails_when_captured(self, ops, inputs, b, step, index) -> None:
        if torch.cuda.current_stream().capture is not None and index == layer:
            fail()
        whole(self, ops, inputs, b, step, index)

    with monkeypatch.context() as patch:
        patch.setattr(FusedHead, "layer", fails_when_captured)
        with pytest.raises(KeyError):
            Graph(beside, GPU)
    session.chunk.zero_()
    Graph(beside, GPU)
    assert torch.equal(session.chunk, expected)


def test_the_flow_begins_beside_as_many_of_the_last_layers_as_the_table_says(plain, cuda, monkeypatch):
    session, whole, count = session_of(plain), FusedHead.layer, plain.config.head.num_layers
    session.run()
    expected, prefill = session.chunk.clone(), session.model.text.run
    reached, first = [], []

    def watched(*arguments) -> None:
        *given, layer_done = arguments
        prefill(*given, lambda index: (reached.append(index), layer_done(index)))

    def layer(self, ops, inputs, b, step, index) -> None:
        first.append((step, index, reached[-1]))
        whole(self, ops, inputs, b, step, index)

    monkeypatch.setattr(FusedHead, "layer", layer)
    monkeypatch.setattr(session.model.text, "run", watched)
    before = plain.config.text.num_layers - count
    for layers in (1, count - 1, count):
        session.chunk.zero_()
        first.clear()
        session._prefill_beside_flow(layers)
        assert torch.equal(session.chunk, expected)
        beside = [(index, at) for step, index, at in first if step == 0]
        assert [index for index, _ in beside] == list(range(count))
        assert [at for _, at in beside] == [before + max(index, count - layers) for index in range(count)]


def test_overlap_is_a_number_of_layers_or_all_of_them(plain, monkeypatch):
    session, count = session_of(plain), plain.config.head.num_layers
    assert count > 1
    for overlap, layers in ((False, 0), (0, 0), (1, 1), (count - 1, count - 1), (count + 3, count), (True, count)):
        session.table = TacticTable("", overlap=overlap)
        assert session.overlapped == 0, "streams are a GPU's"
        with monkeypatch.context() as patch:
            patch.setattr(type(session.model), "device", GPU)
            assert session.overlapped == layers


def test_a_graph_is_freed_when_its_last_replay_has_ended(cuda):
    graph = Graph(lambda: None, GPU)
    graph.replay()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.replay()
    cuda.default.synchronize()
    graph.close()
    assert cuda.faults == []
    with pytest.raises(RuntimeError, match="closed"):
        graph.replay()


@pytest.mark.parametrize("way", ["step", "sample"])
def test_what_goes_for_another_case_has_ended(plain, cuda, monkeypatch, way):
    monkeypatch.setattr("xr0_engine.fused.model.MAX_SESSIONS", 1)
    monkeypatch.setattr(sessions, "Graph", lambda work, device, name: Graph(work, GPU, name))
    monkeypatch.setattr(sessions, "wait_for_stream", lambda device: wait_for_stream(GPU))
    fused, model = fused_of(plain)
    fused.graphs = True

    def call(words: int) -> torch.Tensor:
        inputs = random_inputs(model.config, [TWO_VIEWS], [[3, 2, words]], 0)
        chunk = chunk_inputs(inputs, model.config, 1)
        if way == "step":
            return fused.step(inputs, *chunk)
        return fused.sample(model.prefill(inputs, model.encode_images(inputs)), inputs.state, *chunk)

    held = call(5)
    expected = held.clone()
    kept = next(iter((fused._sessions if way == "step" else fused._flows)._values.values()))
    weakref.finalize(kept, cuda.freed, "a session")
    del kept
    assert cuda.queued
    call(60)
    assert cuda.faults == []
    assert torch.equal(held, expected), "who holds a chunk keeps it"


def test_a_session_that_ran_op_by_op_is_waited_for(plain, cuda, monkeypatch):
    monkeypatch.setattr(sessions, "wait_for_stream", lambda device: wait_for_stream(GPU))
    session = session_of(plain, graphs=False)
    session.replay()
    cuda.launch("its kernels")
    session.close()
    assert not cuda.queued


@pytest.mark.gpu
def test_a_thread_may_use_the_gpu_while_another_captures():
    device, buffer = torch.device("cuda"), torch.zeros(8, device="cuda")
    errors = []

    def others_work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                # Sizes that no allocator has at hand.
                torch.empty(3 * 2**20 + 17, pin_memory=True).to(device, non_blocking=True)
                torch.cuda.current_stream().synchronize()
                event = torch.cuda.Event()
                event.record()
                event.query()
        except RuntimeError as error:
            errors.append(error)

    def between() -> None:
        buffer.add_(1)
        in_a_thread(others_work).join()
        buffer.add_(1)

    graph = Graph(between, device)
    before = buffer.clone()
    graph.replay()
    assert errors == []
    assert torch.equal(buffer, before + 2)
    graph.close()


@pytest.mark.gpu
def test_the_gpu_captures_again_after_a_failure():
    buffer = torch.zeros(8, device="cuda")

    def work() -> None:
        buffer.add_(1)
        fail_once()

    fail_once = when_captured(fail)
    with pytest.raises(KeyError):
        Graph(work, buffer.device)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    before = buffer.clone()
    Graph(lambda: buffer.add_(1), buffer.device).replay()
    # Once to warm up, once replayed.
    assert torch.equal(buffer, before + 2)


@pytest.mark.gpu
def test_the_gpu_has_ended_when_a_graph_is_freed():
    stream, graph = torch.cuda.Stream(), Graph(lambda: torch.cuda._sleep(LONG), torch.device("cuda"))
    with torch.cuda.stream(stream):
        graph.replay()
    assert not stream.query()
    graph.close()
    assert stream.query()


@pytest.mark.gpu
def test_what_is_staged_is_not_overwritten_before_it_was_read():
    staging = Staging({"number": ((4 * 2**20,), torch.float32)}, torch.device("cuda"))
    found = []
    for number in range(20):
        torch.cuda._sleep(LONG // 10)
        staging.wait()
        staging.host["number"].fill_(number)
        staging.upload()
        found.append(staging.device["number"].aminmax())
    assert [(int(low), int(high)) for low, high in found] == [(number, number) for number in range(20)]
