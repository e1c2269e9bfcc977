"""The engine on the fused path: sessions, graphs, replays. What needs no kernel runs on a CPU too, on their oracles."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.kernels.support import DEVICE, LOW_PRECISION_FACTOR
from tests.support import GOLDEN
from xr0_engine.backend import triton_fault
from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.bench.measure.latency import relative_rms
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.engine import Engine
from xr0_engine.fused import session as sessions
from xr0_engine.fused.graph import Graph
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.golden.verify import verify_folder
from xr0_engine.model.weights import load_model, read_index
from xr0_engine.robot.preprocess import Preprocessor

CASE = CASES["libero"]
SAME = 1e-4
"""Relative RMS in float32: a batch has other tiles, so other sums, than a single observation."""
ENOUGH_BYTES = 48 * 2**30
"""GPU memory for the published sizes in float32, some graphs and what torch keeps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("reference", "cpu"), id="oracles"),
        pytest.param(("triton", DEVICE.type), id="kernels", marks=pytest.mark.compiled),
    ],
)
def engine(request, folder):
    """A new model each time would be the same: what a test changes (tables), it puts back."""
    return fused_engine(folder, *request.param)


def fused_engine(folder, backend: str, device: str) -> Engine:
    model = load_model(ModelConfig.load(folder), read_index(folder), torch.device(device), torch.float32)
    fused_model = FusedModel(model, backend, TacticTable(""), graphs=device == "cuda")
    return Engine(fused_model, Preprocessor.load(folder), backend)


@pytest.fixture
def captures(monkeypatch):
    """The names of the graphs captured from here on."""
    names = []

    class Counted(Graph):
        def __init__(self, work, device, name="graph"):
            names.append(name)
            super().__init__(work, device, name)

    monkeypatch.setattr(sessions, "Graph", Counted)
    return names


def new_session(engine: Engine, folder, case=CASE) -> Session:
    """With its inputs uploaded."""
    observations, prefixes, noise = case.observations(engine), case.prefixes(engine), case.noise(engine)
    setup = Setup(case, device=str(engine.model.device), dtype="float32")
    given = Subject(setup, folder, engine, observations, prefixes, noise).step_inputs()
    session = Session(engine.model, session_key(given.inputs), given.inputs)
    session.update(given.inputs, given.noise, given.prefix, given.prefix_length)
    return session


def chunk_after(session: Session, *parts: str) -> torch.Tensor:
    for part in parts:
        session.replay(part)
    return session.chunk.clone()


def test_same_seed_same_chunk_whatever_came_between(engine):
    first, other = engine.example(CASE.robot_type, CASE.image_size), engine.example("bimanual", (64, 64))
    chunk = engine.infer(first, seed=3)
    engine.infer(other, seed=1)
    assert np.array_equal(engine.infer(first, seed=3).actions, chunk.actions)
    assert not np.array_equal(engine.infer(first, seed=4).actions, chunk.actions)


def test_what_changes_within_a_bucket_captures_nothing_and_reaches_the_chunk(engine, captures):
    observation = engine.example(CASE.robot_type, (64, 64))
    chunk = engine.infer(observation, seed=0)
    held, captured = dict(engine.model._sessions._values), list(captures)
    assert len(captured) == int(engine.model.graphs)
    images = {key: 255 - image for key, image in observation.images.items()}
    changed = [
        engine.infer(replace(observation, instruction=observation.instruction.replace("red", "wet")), seed=0),
        engine.infer(replace(observation, state=observation.state + 1), seed=0),
        engine.infer(replace(observation, images=images), seed=0),
        engine.infer(observation, seed=1),
        engine.infer(observation, prefix=chunk.actions[:1] + 1, seed=0),
        engine.infer(observation, prefix=chunk.actions[:4] + 1, seed=0),
    ]
    assert captures == captured
    assert engine.model._sessions._values == held
    assert all(not np.array_equal(other.actions, chunk.actions) for other in changed)
    assert np.array_equal(engine.infer(observation, seed=0).actions, chunk.actions)


def test_graph_equals_the_ops_one_by_one(engine, folder):
    session = new_session(engine, folder)
    session.run()
    expected = session.chunk.clone()
    session.chunk.fill_(torch.nan)
    assert torch.equal(chunk_after(session, "step"), expected)
    session.chunk.fill_(torch.nan)
    assert torch.equal(chunk_after(session, "vision", "prefill", "flow"), expected)
    session.close()


def test_flow_again_gives_another_chunk_of_the_same_observation(engine, folder):
    session = new_session(engine, folder)
    first = chunk_after(session, "step")
    session.staging.host["noise"].neg_()
    session.staging.upload()
    second = chunk_after(session, "flow")
    assert not torch.equal(second, first)
    assert torch.equal(chunk_after(session, "step"), second)
    session.close()


def test_replays_do_not_drift_and_keep_no_memory(engine, folder):
    session = new_session(engine, folder)
    on_gpu = engine.model.device.type == "cuda"
    expected, different = chunk_after(session, "step", "step"), torch.zeros((), device=engine.model.device)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
        return tensors, torch.cuda.memory_allocated() if on_gpu else 0

    session.replay()
    different += (session.chunk != expected).sum()
    before = held()
    for _ in range(10_000 if on_gpu else 3):
        session.replay()
        different += (session.chunk != expected).sum()
    assert held() == before
    assert int(different) == 0
    session.close()


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 16, 32])
def test_batch_equals_one_by_one(engine, batch):
    if engine.model.device.type == "cpu" and batch > 3:
        pytest.skip("a larger batch tells nothing more about the oracles")
    case = replace(CASE, batch=batch, image_size=(64, 64))
    together = engine.infer(case.observations(engine), noise=case.noise(engine))
    for row, observation in enumerate(case.observations(engine)):
        alone = engine.infer(observation, noise=case.noise(engine)[row])
        assert relative_rms(together[row].normalized, alone.normalized) < SAME


def test_views_of_different_sizes_are_encoded_together(engine, folder):
    observation = engine.example(CASE.robot_type, (64, 64))
    images = {key: image[:, : 64 - 32 * index] for index, (key, image) in enumerate(observation.images.items())}
    observation = replace(observation, images=images)
    plain = Engine.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")
    expected = plain.infer(observation, seed=0).normalized
    assert relative_rms(engine.infer(observation, seed=0).normalized, expected) < SAME


def test_a_closed_session_captures_anew(engine, folder):
    session = new_session(engine, folder)
    expected = chunk_after(session, "step")
    session.close()
    assert torch.equal(chunk_after(session, "step"), expected)
    session.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_a_gpu_the_backend_is_refused_with_what_works(folder, monkeypatch):
    for name in ("TRITON_INTERPRET", "XR0_EMULATE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotImplementedError, match=r"backend 'triton': .*; use backend='reference'"):
        Engine.from_pretrained(folder, device="cpu", backend="triton")
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor"])
    line = next(line for line in told.output.splitlines() if "backend triton" in line)
    assert "torch finds no CUDA GPU" in line or "triton is not installed" in line


@pytest.mark.parametrize(
    ("triton", "numpy", "works"), [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.0+cu", "2.4.6", True)]
)
def test_the_interpreter_is_refused_where_it_fails(triton, numpy, works, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    for name, release in (("triton", triton), ("numpy", numpy)):
        installed = tmp_path / f"{name}-{release}.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fault = triton_fault()
    assert fault is None if works else "numpy<2.4" in fault


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden cases are not at {GOLDEN}")
@pytest.mark.gpu
@pytest.mark.parametrize("folder", [GOLDEN, GOLDEN.parent / "golden_xr1"], ids=lambda folder: folder.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_golden_case_passes(dtype, folder):
    comparisons = list(verify_folder(folder, "triton", "cuda", dtype))
    assert comparisons
    assert [each for each in comparisons if not each.passed] == []


@pytest.fixture
def gpu_session(folder):
    session = new_session(fused_engine(folder, "triton", "cuda"), folder)
    yield session
    session.close()


@pytest.mark.gpu
def test_graph_holds_our_kernels_and_nothing_else(gpu_session):
    pytest.importorskip("cuda.bindings")
    import triton

    from xr0_engine.kernels import attention, embed, flow, linear, product, qkv

    modules = (attention, embed, flow, linear, product, qkv)
    ours = {name for each in modules for name, value in vars(each).items() if isinstance(value, triton.JITFunction)}
    for part in sessions.PARTS:
        contents = gpu_session.graph(part).contents()
        assert set(contents.nodes) == {"kernel"}, part
        assert sum(contents.kernels.values()) == contents.nodes["kernel"]
        assert set(contents.kernels) <= ours, part


@pytest.mark.gpu
@pytest.mark.parametrize("first", sessions.PARTS)
def test_parts_captured_in_any_order_give_the_same_chunk(gpu_session, folder, first):
    expected = chunk_after(gpu_session, "step")
    session = new_session(fused_engine(folder, "triton", "cuda"), folder)
    for part in sorted(sessions.PARTS, key=lambda part: part != first):
        session.graph(part)
        # Over what was freed meanwhile.
        torch.full((2**24,), torch.nan, device="cuda")
    for parts in (("step",), ("vision", "prefill", "flow")):
        assert torch.equal(chunk_after(session, *parts), expected)
    session.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one_gives_the_same_chunk(folder):
    # Op by op, and as a graph.
    for graphs in (False, True):
        engines = [fused_engine(folder, "triton", device) for device in ("cuda:0", "cuda:1")]
        for engine in engines:
            engine.model.graphs = graphs
        observation = engines[0].example(CASE.robot_type, CASE.image_size)
        first, second = (engine.infer(observation, seed=0).normalized for engine in engines)
        assert np.array_equal(first, second)


@pytest.mark.gpu
def test_overlap_changes_nothing(folder):
    engine = fused_engine(folder, "triton", "cuda")
    plain = new_session(engine, folder)
    expected = chunk_after(plain, "step")
    engine.model.table = TacticTable("", overlap=True)
    beside = new_session(engine, folder)
    for _ in range(100):
        assert torch.equal(chunk_after(beside, "step"), expected)
    beside.close()
    plain.close()


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["libero", "bimanual"])
def test_published_sizes_are_as_near_as_pytorch(case):
    if torch.cuda.get_device_properties(0).total_memory < ENOUGH_BYTES:
        pytest.skip(f"needs a GPU with {ENOUGH_BYTES / 2**30:.0f} GiB")
    chunks = {}
    for backend, dtype in (("reference", "float32"), ("reference", "bfloat16"), ("triton", "bfloat16")):
        subject = Subject.load(Setup(CASES[case], "4b", device="cuda", dtype=dtype, backend=backend))
        chunks[backend, dtype] = subject.infer()[0].normalized
        del subject
        gc.collect()
        torch.cuda.empty_cache()
    exact = chunks["reference", "float32"]
    plain, ours = (relative_rms(chunks[backend, "bfloat16"], exact) for backend in ("reference", "triton"))
    assert ours < LOW_PRECISION_FACTOR * plain
