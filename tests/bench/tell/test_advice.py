"""What a report says to try next, and the kernels of a step that it knows it from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.bench.results import Result, read, write
from xr0_engine.bench.step import kernels, step_kernels
from xr0_engine.bench.step.ceilings import Ceilings
from xr0_engine.bench.step.recorder import Call
from xr0_engine.bench.step.roofline import Precision, cost, operators
from xr0_engine.bench.step.workload import Workload
from xr0_engine.bench.tell import report
from xr0_engine.bench.tell.advice import advise
from xr0_engine.bench.tell.bounds import Bounds
from xr0_engine.engine import Engine
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.sizes import published_config

ENVIRONMENT = {"device": "toy", "processor": "toy", "threads": 1, "torch": "0"}
CASE = {"name": "libero", "size": "4b", "tokens": 194}
TOY = Ceilings("toy", {"float32": 1e9}, 1e9, "datasheet")
BOUNDS = Bounds("toy", {"vision": 0.9, "prefill": 1.0, "flow": 1.0, "total": 2.9})


def result(kind: str, **changes) -> Result:
    plain = Result(kind, "", ENVIRONMENT, CASE, "replay", "triton", {})
    return replace(plain, **changes)


STEP = result("latency", series={"engine": {"vision": [1.0], "prefill": [4.0], "flow": [3.0], "total": [8.0]}})
OPS = result(
    "kernels",
    case=CASE | {"tokens": 190},
    series={"triton": {"prefill: qkv 192": [0.02], "prefill: swiglu 192": [0.08], "flow: linear 12": [0.01]}},
    facts={
        "bound_ms": {"prefill: qkv 192": 0.01, "prefill: swiglu 192": 0.02, "flow: linear 12": 0.005},
        "counts": {"prefill: qkv 192": 36, "prefill: swiglu 192": 35, "flow: linear 12": 80},
    },
)


def test_each_stage_has_its_bound_time_share_and_next_thing():
    found = {each.stage: each for each in advise(STEP, BOUNDS, [STEP, OPS])}
    assert list(found) == ["vision", "prefill", "flow"]
    assert found["vision"].next == "leave it: it reaches 80%"
    assert found["prefill"].reached == 0.25
    assert found["prefill"].next == "swiglu 192: 35 runs take 2.8 ms, 2.1 ms above their bound (25% of it)"
    assert found["flow"].next == "between its ops: 2.2 ms of launches, small ops and gaps"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(OPS, backend="reference"), id="backend"),
        pytest.param(replace(OPS, case=CASE | {"name": "bimanual"}), id="case"),
        pytest.param(replace(OPS, environment=ENVIRONMENT | {"device": "other"}), id="machine"),
        pytest.param(replace(OPS, facts={"bound_ms": {}}), id="no counts"),
    ],
)
def test_kernels_of_something_else_say_nothing(other):
    found = advise(STEP, BOUNDS, [other])
    assert found[1].next == "time its ops: xr0 bench kernels --case libero --backend triton"


def test_without_a_bound_there_is_no_advice():
    assert advise(STEP, Bounds(), [OPS]) == []
    assert advise(OPS, BOUNDS, [OPS]) == []


def test_report_shows_it():
    bound = result("roofline", facts={"chip": "toy", "bound_ms": dict(BOUNDS.ms), "operators": []})
    html = report.page([("a", STEP), ("b", OPS), ("c", bound)])
    assert "What to try next" in html
    assert "swiglu 192: 35 runs take 2.8 ms" in html


def test_costs_are_those_of_the_roofline():
    config = published_config()
    work = Workload(((16, 16), (16, 16)), 194, 10)
    counted = {f"{op.stage}: {op.name}": op for op in operators(config, work, "bfloat16")}

    def same(name: str, kind: str, shape: tuple[int, ...], **options) -> None:
        stage = name.partition(":")[0]
        found = cost(Call(kind, shape, (), options, 1, stage, name), Precision("bfloat16"))
        expected = counted[name]
        assert (found.operations, found.num_bytes) == (expected.operations, expected.num_bytes), name

    vision, text, head = config.vision, config.text, config.head
    same("vision: MLP in", "linear", (512, vision.intermediate_size, vision.hidden_size))
    same("vision: attention", "attention", (2, 16, 256, 16, 256, vision.hidden_size // 16), causal=False)
    shape = (1, text.num_heads, 194, text.num_kv_heads, 194, text.head_dim)
    same("prefill: attention", "attention", shape, causal=True)
    shape = (1, head.num_heads, 12, head.num_kv_heads, 194, head.head_dim)
    same("flow: attention", "lambda_attention", shape)


def test_the_ops_of_a_step_are_timed_after_their_oracle_agrees(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path))
    monkeypatch.setattr(step_kernels, "measure_ceilings", lambda device, dtype: TOY)
    case = replace(CASES["libero"], image_size=(64, 64))
    plain = Subject.load(Setup(case, "tiny", device="cpu", dtype="float32", threads=1))
    model = FusedModel(plain.engine.model, "reference", TacticTable(""), graphs=False)
    subject = replace(plain, engine=Engine(model, Preprocessor.load(plain.folder), "reference"))
    found, reason = step_kernels.measure_model(model, subject, 1, "typed")
    assert reason is None
    write(found, tmp_path / "kernels.json")
    counts = read(tmp_path / "kernels.json").facts["counts"]
    assert set(counts) == set(found.series["reference"]) == set(found.facts["bound_ms"])
    config = model.config
    flow_runs = config.head.num_layers * config.head.flow_steps
    assert sum(count for name, count in counts.items() if "lambda_attention" in name) == flow_runs
    kernels.show(found)
    assert "flow: lambda_attention" in capsys.readouterr().out
    monkeypatch.setattr(step_kernels, "GATE", {"float32": -1.0})
    with pytest.raises(RuntimeError, match="nothing was timed: vision: linear"):
        step_kernels.measure_model(model, subject, 1, "typed")


def test_a_backend_without_fused_ops_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path))
    setup = Setup(CASES["libero"], "tiny", device="cpu", dtype="float32", threads=torch.get_num_threads())
    with pytest.raises(NotImplementedError, match="backend 'reference' has no fused ops; take --backend triton"):
        step_kernels.measure(setup, 1, "")
