"""A step on paper: every launch has its op, and a flow as one kernel has the ops of the chain behind barriers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.support import ROOT
from xr0_engine.bench.predict import streamed
from xr0_engine.bench.predict.code import Code, Counts

pytest.importorskip("triton")

SCRIPT = """
import json, sys, torch
from xr0_engine.bench.cases import Setup, find_case
from xr0_engine.bench.predict.figures import find_chip
from xr0_engine.bench.predict.step import predict_step, record, total_ms
from xr0_engine.bench.step.workload import Workload
from xr0_engine.fused.ops import Tactic

chip = find_chip("h200")
config, work = Workload.of_case(Setup(find_case("libero"), "4b"))
told = {}
for flow in ("chained", "layered", "persistent", "streamed"):
    ops = record(config, work, torch.bfloat16, {}, chip, flow)
    lines = predict_step(ops, chip, {})
    told[flow] = {
        "ops": len(ops),
        "kernels": sum(len(op.launches) for op in ops),
        "launches": sum(line.launches for line in lines if line.stage == "flow"),
        "stages": sum(line.count for line in lines if line.stage == "flow"),
        "layers": sum(line.count for line in lines if "lambda_attention" in line.name),
        "ms": {stage: total_ms(lines, stage) for stage in ("vision", "prefill", "flow", "")},
    }
shape, near = (work.padded_tokens, 2560, 4096), Tactic(64, 64, 64, 1, 4, 3)
key, neighbour = (f"linear {rows}x2560x4096 bfloat16" for rows in (shape[0], shape[0] + 8))
for name, kept in (("neighbour", ()), ("kept", (key,))):
    found = record(config, work, torch.bfloat16, {neighbour: near}, chip, "chained", kept)
    told[name] = {op.tactic for op in found if op.shape == shape} == {near}
json.dump(told, sys.stdout)
"""


@pytest.fixture(scope="module")
def told():
    """In a process of its own: this one may have Triton's interpreter in the compiler's place."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "XR0_EMULATE")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_launch_of_a_chain_is_an_ops(told):
    chained = told["chained"]
    assert chained["ops"] == chained["kernels"]
    assert chained["launches"] == chained["stages"] > 240
    assert chained["layers"] == 80


@pytest.mark.parametrize("flow", ["layered", "persistent"])
def test_a_loop_does_what_the_chain_does_in_fewer_launches(told, flow):
    loop, chained = told[flow], told["chained"]
    assert loop["layers"] == chained["layers"]
    assert loop["launches"] <= (120 if flow == "layered" else 12)
    assert loop["stages"] == chained["stages"]


def test_a_streamed_loop_does_what_the_chain_does_in_one_launch(told):
    streamed, chained = told["streamed"], told["chained"]
    assert streamed["layers"] == chained["layers"]
    assert streamed["launches"] == told["persistent"]["launches"]
    assert streamed["stages"] == chained["stages"] + 1, "what scales the first step's input"


@pytest.mark.parametrize("flow", ["chained", "layered", "persistent", "streamed"])
def test_a_stage_has_a_range_and_the_step_is_their_sum(told, flow):
    ms = told[flow]["ms"]
    assert all(0 < low < central < high for low, central, high in ms.values())
    assert ms[""][1] == pytest.approx(sum(ms[stage][1] for stage in ("vision", "prefill", "flow")))


def test_a_key_whose_default_was_not_beaten_keeps_it(told):
    """As the engine has it: what its neighbour's tactic is for is another number of rows."""
    assert told["neighbour"]
    assert not told["kept"]


@pytest.mark.parametrize("kept", [False, True])
def test_keys_that_the_cache_keeps_come_from_memory_once(kept):
    """Of 400 cached tokens 320 keys and 128 values are there when the wait is over."""
    arguments = {"W": SimpleNamespace(KEPT=kept), "first_step": 0, "last_step": 5}
    launch = SimpleNamespace(arguments=arguments, grid=(128,))
    work = streamed.stage_work("attention", (1, 8, 12, 8, 400, 128), launch)
    assert work.memory_bytes == 2 * 8 * 400 * 128 * 2 / (5 if kept else 1)
    assert work.held_bytes == (320 + 128) * 128 * 2
    assert work.l2_bytes + work.held_bytes == 4 * 128 * (16 + 2 * 12) + 2 * 400 * 128 * 2


@pytest.mark.parametrize("wide", [False, True])
def test_every_stage_of_a_streamed_loop_has_its_own_code(wide):
    """A wide output layer's product is a stage more, in the code as in the step."""
    launch = SimpleNamespace(arguments={"W": SimpleNamespace(WIDE=wide)})
    names = [*streamed.LAYER, *streamed.step_end(launch), streamed.TOKENS]
    assert ("wide" in names) == wide
    stages = tuple((Counts(number), Counts()) for number in range(len(names)))
    code = Code("_streamed_flow", 1, 2, 0, 8, stages=stages)
    found = [streamed.stage_code(name, launch, code) for name in names]
    assert [each.loop.instructions for each in found] == list(range(len(names)))
    assert streamed.stage_code(streamed.BEGIN, launch, code) is None
    with pytest.raises(AssertionError, match=f"expected {len(names)} stages in the code, got {len(names) - 1}"):
        streamed.stage_code("qkv", launch, replace(code, stages=stages[1:]))
