"""Every variant is the engine's step with one thing otherwise, and gives the engine's chunk."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.support import CPU, make_config
from xr0_engine.bench.cases import CASES, Setup, StepInputs, Subject
from xr0_engine.bench.measure import ablate
from xr0_engine.bench.measure.ablate import ENGINE, GATE, TOTAL, Variant, features, measure_model, rival_of, variants
from xr0_engine.bench.results import Result, environment, read, write
from xr0_engine.bench.tell import report
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.fused import session as session_module
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import Tactic, without_dependent_launch
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable

pytest.importorskip("triton")

OTHER_TILES = Tactic(block_m=16, block_n=64, block_k=64)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """The smallest model that has every part."""
    folder = tmp_path_factory.mktemp("ablate") / "least"
    config = make_config(
        text={"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96},
        vision={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "deepstack_layers": (0, 1)},
        head={"num_layers": 2, "hidden_size": 128, "num_kv_heads": 2, "flow_steps": 2},
    )
    write_checkpoint(folder, config)
    case = replace(CASES["libero"], image_size=(32, 32))
    return Subject.load(Setup(case, checkpoint=str(folder), device="cpu", dtype="float32", backend="reference"))


def tuned_key(model: FusedModel, given: StepInputs) -> str:
    """The key of one product of the step."""
    keys = []
    session, _ = rival_of(model, given, Variant("", model.table, False))
    run = session.ops.run
    session.ops.run = lambda kind, shape, *rest: (keys.append((kind, shape)), run(kind, shape, *rest))
    session.encode()
    kind, shape = next(key for key in keys if key[0] == "linear")
    return f"{kind} {'x'.join(map(str, shape))} float32"


@pytest.fixture(scope="module")
def tuned(subject):
    """The kernels in Triton's interpreter, or on the GPU, with a table that names one tactic."""
    model, given = FusedModel(subject.plain_model(), "reference", TacticTable(""), graphs=False), subject.step_inputs()
    model.table, model.backend = TacticTable("", {tuned_key(model, given): OTHER_TILES}), "triton"
    return model, given


def on_oracles(tuned, graphs: bool = False) -> FusedModel:
    """The same model, its ops computed by the oracles."""
    model = copy.copy(tuned[0])
    model.backend, model.graphs = "reference", graphs
    return model


def test_variants_of_a_machine_without_a_gpu(tuned):
    model, _ = tuned
    found = variants(model)
    assert list(found) == ["measured tactics", "chained flow"]
    assert not found["measured tactics"].table.tactics
    assert found["chained flow"].table == replace(model.table, flow="persistent")


def test_predicted_tactics_are_not_called_measured(tuned, monkeypatch):
    model, _ = tuned
    monkeypatch.setattr(model, "table", replace(model.table, predicted=True))
    assert "predicted tactics" in variants(model)
    assert features(model)["predicted tactics"] == 1
    assert "measured tactics" not in {**variants(model), **features(model)}


AFTER, BESIDE, ONE = (False, "chained"), (True, "chained"), (False, "persistent")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        pytest.param(AFTER, {"flow after prefill": BESIDE, "chained flow": ONE}, id="chained"),
        pytest.param(ONE, {"flow after prefill": (True, "persistent"), "persistent flow": AFTER}, id="persistent"),
        pytest.param(BESIDE, {"overlap": AFTER, "chained flow": ONE}, id="overlap"),
        # Beside the VLM the flow is chained, whatever the table says.
        pytest.param((True, "persistent"), {"overlap": AFTER, "chained flow": ONE}, id="overlap and persistent"),
    ],
)
def test_variants_of_a_gpu_flip_what_the_engine_has(tuned, monkeypatch, table, expected):
    overlap, flow = table
    monkeypatch.setattr(FusedModel, "device", torch.device("cuda"))
    monkeypatch.setattr(ablate, "has_dependent_launch", lambda _: True)
    model = copy.copy(tuned[0])
    model.table, model.graphs = replace(model.table, overlap=overlap, flow=flow), True
    found = variants(model)
    assert list(found) == ["CUDA graph", "measured tactics", "dependent launch", *expected]
    assert {name: (found[name].table.overlap, found[name].table.flow) for name in expected} == expected
    others = [variant for name, variant in found.items() if name not in expected]
    assert {(other.table.overlap, other.table.flow) for other in others} == {(overlap, flow)}
    assert [name for name, variant in found.items() if not variant.graphs] == ["CUDA graph"]
    assert [name for name, v in found.items() if v.scope is without_dependent_launch] == ["dependent launch"]
    assert [name for name, v in found.items() if not v.table.tactics] == ["measured tactics"]
    assert features(model) == {
        "CUDA graph": True,
        "measured tactics": 1,
        "dependent launch": True,
        "overlap": overlap,
        "flow": "chained" if overlap else flow,
    }


def test_tactics_and_flow_switch(tuned, monkeypatch):
    model, given = tuned
    sessions = {name: rival_of(model, given, variant)[0] for name, variant in variants(model).items()}
    assert sessions["measured tactics"].ops.tactics == {}
    assert list(sessions["chained flow"].ops.tactics.values()) == [OTHER_TILES]
    session = sessions["chained flow"]
    loops, loop = [], session.flow_ops.flow_loop
    monkeypatch.setattr(
        session.flow_ops, "flow_loop", lambda *given, **more: (loops.append(given), loop(*given, **more))
    )
    session.replay("flow")
    assert len(loops) == 1


def test_graph_switches_and_is_captured_within_the_scope(tuned, monkeypatch):
    captured, within = [], []

    class Graph:
        def __init__(self, work, device, name):
            self.replay = work
            captured.append((name.partition(" ")[0], bool(within)))

        def close(self):
            pass

    @contextmanager
    def scope():
        within.append(1)
        yield
        within.pop()

    monkeypatch.setattr(session_module, "Graph", Graph)
    model, given = on_oracles(tuned, graphs=True), tuned[1]
    _, (timed, chunk) = rival_of(model, given, Variant("", model.table, True, scope=scope))
    chunk()
    timed()
    assert captured == [("step", True), ("vision", True), ("prefill", True), ("flow", True)]
    captured.clear()
    _, (timed, chunk) = rival_of(model, given, variants(model)["CUDA graph"])
    chunk()
    timed()
    assert captured == []


@pytest.mark.parametrize(
    ("overlap", "expected"), [(True, ["encode", "beside"]), (False, ["encode", "prefill", "sample"])]
)
def test_overlap_switches(overlap, expected):
    done = []
    parts = {"encode": "encode", "prefill": "prefill", "sample": "sample", "_prefill_beside_flow": "beside"}
    calls = {part: partial(lambda name, *layers: done.append(name), name) for part, name in parts.items()}
    head = SimpleNamespace(config=SimpleNamespace(num_layers=2))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), head=head)
    session = SimpleNamespace(model=on_gpu, table=TacticTable("", overlap=overlap), **calls)
    session.overlapped = Session.overlapped.fget(session)
    Session.run(session)
    assert done == expected


def test_dependent_launch_switches(monkeypatch):
    from xr0_engine.kernels import launch

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((arguments["PDL"], arguments.get("launch_pdl", False)))

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "capability", lambda _: 90)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    launch.launch(Kernel(), (1,), {"x": torch.ones(1)})
    with without_dependent_launch():
        launch.launch(Kernel(), (1,), {"x": torch.ones(1)})
    launch.launch(Kernel(), (1,), {"x": torch.ones(1)})
    assert launched == [(True, True), (False, False), (True, True)]


def test_series_of_the_engine_and_of_every_variant(tuned):
    series, errors, reason = measure_model(on_oracles(tuned), tuned[1], "float32", 3)
    assert (list(series), reason) == ([ENGINE, "measured tactics"], None)
    assert all(list(stages) == ["vision", "prefill", "flow", TOTAL] for stages in series.values())
    assert all(len(samples) == 3 for stages in series.values() for samples in stages.values())
    assert 0 <= errors["measured tactics"] < GATE["float32"]


def test_another_chunk_is_caught_before_anything_is_timed(tuned, monkeypatch):
    monkeypatch.setitem(ablate.GATE, "float32", -1.0)
    monkeypatch.setattr(ablate, "run", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="nothing was timed: without 'measured tactics' the chunk differs by"):
        measure_model(on_oracles(tuned), tuned[1], "float32", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can")
def test_without_a_gpu_it_says_what_would_run(monkeypatch):
    monkeypatch.setattr(Setup, "folder", lambda _: pytest.fail("made a checkpoint first"))
    with pytest.raises(NotImplementedError, match="on a CUDA GPU, and the device is cpu; `xr0 bench latency` compares"):
        ablate.measure(Setup(CASES["libero"], size="tiny", device="cpu", dtype="float32"), 1, "xr0 bench ablate")


def test_table_and_report(capsys, tmp_path):
    instead = {"overlap": "the flow waits", "persistent flow": "a chain"}
    result = Result(
        kind="ablate",
        command="xr0 bench ablate",
        environment=environment(CPU),
        case={"name": "libero", "size": "4b", "batch": 1, "dtype": "bfloat16"},
        boundary="replay",
        backend="triton",
        series={
            ENGINE: {"flow": [0.5, 0.5], TOTAL: [1.0, 1.0]},
            "overlap": {"flow": [0.5, 0.5], TOTAL: [1.5, 1.5]},
            "persistent flow": {"flow": [0.9, 0.9], TOTAL: [1.25, 1.25]},
        },
        facts={
            "engine": {"CUDA graph": True, "measured tactics": 7},
            "stages": {"overlap": TOTAL, "persistent flow": "flow"},
            "instead": instead,
            "error_against_engine": {"overlap": 0.0, "persistent flow": 0.0},
        },
    )
    write(result, tmp_path / "ablate.json")
    ablate.show(read(tmp_path / "ablate.json"))
    shown = capsys.readouterr().out
    assert [word for word in ("+0.500", "1.50", "+0.400", "1.80", "+0.250", "1.25") if word not in shown] == []
    assert "without overlap: the flow waits" in shown
    assert "The engine has: CUDA graph True, measured tactics 7." in shown
    assert max(map(len, shown.splitlines())) <= 80
    page = report.page([("ablate.json", result)])
    assert "persistent flow (flow)" in page
    assert "without it, a chain" in page


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path))
    setup = Setup(CASES["libero"], size="tiny", device="cuda", dtype="bfloat16")
    result, reason = ablate.measure(setup, 2, "xr0 bench ablate")
    assert reason is None
    assert {"CUDA graph", "flow after prefill", "chained flow"} <= result.series.keys()
