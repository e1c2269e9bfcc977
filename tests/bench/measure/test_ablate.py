"""Every variant is the engine's step with one thing otherwise, and gives the engine's chunk."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.support import CPU, make_config
from xr0_engine.bench.cases import CASES, Setup, StepInputs, Subject
from xr0_engine.bench.measure import ablate
from xr0_engine.bench.measure.ablate import ENGINE, GATE, TOTAL, Variant, measure_model, step_of, variants
from xr0_engine.bench.results import Result, environment, read, write
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import Tactic, without_dependent_launch
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.kernels.arguments import FlowWeights

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
    session, _ = step_of(model, given, Variant("", model.table, False))
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


def test_variants_of_a_machine_without_a_gpu(tuned):
    model, _ = tuned
    found = variants(model)
    assert list(found) == ["measured tactics", "chained flow"]
    assert not found["measured tactics"].table.tactics
    assert found["chained flow"].table == replace(model.table, flow="persistent")


def test_a_variant_says_what_the_engine_has(tuned):
    model, _ = tuned
    other = FusedModel.__new__(FusedModel)
    other.reference, other.backend, other.graphs = model.reference, "triton", True
    other.table = TacticTable("", flow="persistent")
    found = variants(other)
    assert list(found) == ["CUDA graph", "persistent flow"]
    assert (found["CUDA graph"].graphs, found["persistent flow"].table.flow) == (False, "chained")


def test_each_switch_switches(tuned, monkeypatch):
    model, given = tuned
    found = variants(model)
    sessions = {name: step_of(model, given, variant)[0] for name, variant in found.items()}
    assert sessions["measured tactics"].ops.tactics == {}
    assert list(sessions["chained flow"].ops.tactics.values()) == [OTHER_TILES]
    loops = []
    session = sessions["chained flow"]
    loop = session.flow_ops.flow_loop
    monkeypatch.setattr(
        session.flow_ops,
        "flow_loop",
        lambda weights, *rest, **more: (loops.append(weights), loop(weights, *rest, **more)),
    )
    session.replay()
    assert len(loops) == 1
    assert isinstance(loops[0], FlowWeights)


def test_dependent_launch_is_off_within_and_on_again_after():
    from xr0_engine.kernels import launch

    with without_dependent_launch():
        assert not launch._dependent
    assert launch._dependent


def on_oracles(tuned) -> FusedModel:
    """The same model, its ops computed by the oracles."""
    model = copy.copy(tuned[0])
    model.backend = "reference"
    return model


def test_series_of_the_engine_and_of_every_variant(tuned):
    model = on_oracles(tuned)
    series, errors, reason = measure_model(model, tuned[1], "float32", 3)
    assert (list(series), reason) == ([ENGINE, "measured tactics"], None)
    assert all(len(samples[TOTAL]) == 3 for samples in series.values())
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


def test_table(capsys, tmp_path):
    instead = {"overlap": "the flow starts when the prefill has ended"}
    result = Result(
        kind="ablate",
        command="xr0 bench ablate",
        environment=environment(CPU),
        case={"name": "libero", "size": "4b", "batch": 1, "dtype": "bfloat16"},
        boundary="replay",
        backend="triton",
        series={ENGINE: {TOTAL: [1.0, 1.0]}, "overlap": {TOTAL: [1.5, 1.5]}},
        facts={"stages": {"overlap": TOTAL}, "instead": instead, "error_against_engine": {"overlap": 0.0}},
        complete=True,
    )
    write(result, tmp_path / "ablate.json")
    ablate.show(read(tmp_path / "ablate.json"))
    shown = capsys.readouterr().out
    assert [word in shown for word in ("overlap", "+0.500", "1.50")] == [True] * 3
    assert f"without overlap: {instead['overlap']}" in shown


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path))
    setup = Setup(CASES["libero"], size="tiny", device="cuda", dtype="bfloat16")
    result, reason = ablate.measure(setup, 2, "xr0 bench ablate")
    assert reason is None
    assert {"CUDA graph", "flow after prefill", "chained flow"} <= result.series.keys()
