"""Tuning: what is tried, what takes part, what wins; and that it leaves the step's buffers as they were.

On a CPU the ops are the kernels' oracles, which take any tactic; time is injected.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.support import CPU, ROOT, make_config, random_inputs
from xr0_engine.bench.cases import StepInputs
from xr0_engine.bench.step import candidates, tune
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import FusedOps, Residual, StatsOut, Tactic, Weight
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.weights import load_model, read_index

GATE = 1e-5
SHAPES = {
    "linear": (12, 1024, 4096),
    "swiglu": (192, 19456, 2560),
    "qkv": (32, 3072, 1024, 128),
    "attention": (2, 16, 256, 16, 256, 64),
    "lambda_attention": (1, 8, 12, 8, 224, 128),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = make_config(
        text={"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96},
        vision={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "deepstack_layers": (0, 1)},
        head={"num_layers": 2, "hidden_size": 128, "num_kv_heads": 2, "flow_steps": 2, "action_length": 5},
    )
    folder = tmp_path_factory.mktemp("tune") / "least"
    write_checkpoint(folder, config)
    loaded = load_model(config, read_index(folder), CPU, torch.float32)
    return FusedModel(loaded, "reference", TacticTable("toy"), graphs=False)


@pytest.fixture
def given(model):
    inputs = random_inputs(model.config, [[(2, 4)]], [[3, 7]], 4)
    noise = torch.randn(1, 5, model.config.head.action_dim, generator=torch.Generator().manual_seed(0))
    return StepInputs(inputs, noise, torch.zeros_like(noise), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("kind", SHAPES)
def test_candidates_are_bounded_different_and_begin_with_the_default(kind):
    default = Tactic(split_k=7)
    found = candidates.tiles(kind, SHAPES[kind], default, 132)
    assert found[0] == default
    assert len(set(found)) == len(found) <= 32
    assert len({candidates.name(tactic) for tactic in found}) == len(found)
    assert any(tactic.library for tactic in found) == (kind != "lambda_attention")
    assert len(candidates.schedules(found[1])) <= 8
    assert found[1] not in candidates.schedules(found[1])


def test_splits_share_k_evenly():
    for tactic in candidates.tiles("linear", SHAPES["linear"], Tactic(), 132)[1:]:
        assert (4096 // tactic.block_k) % tactic.split_k == 0
        assert tactic.block_m == 16 or tactic.library


def test_library_has_one_schedule():
    assert candidates.schedules(Tactic(library=True)) == []


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="kind: expected an op that has tactics, got 'embed'"):
        candidates.tiles("embed", (1, 2, 3), Tactic(), 132)


class Chip(FusedOps):
    """The oracle, whose time is a number of the tactic's; some tactics fail, some compute something else."""

    def __init__(self) -> None:
        super().__init__("reference", CPU)
        self.took = 0.0

    def call(self, kind, arguments, options, tactic):
        if tactic.block_n == 128:
            raise ValueError("too large")
        super().call(kind, arguments, options, tactic)
        if tactic.library:
            arguments[2].mul_(1.01)
        self.took = 1.0 if tactic == Tactic() else 0.5 + tactic.stages / 100 + tactic.block_n / 1000

    def timer(self, call):
        call()
        return self.took


def residual_call() -> tune.Call:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 12, 64, generator=random), torch.randn(64, 64, generator=random)
    stream, sums = torch.randn(1, 12, 64, generator=random), torch.zeros(1, 1, 12, 2)
    options = {"residual": Residual(stream), "stats": StatsOut(sums)}
    return tune.Call("linear", (12, 64, 64), (x, Weight(weight), stream), options, count=10)


def test_the_fastest_that_is_right_wins_and_the_residual_stream_is_as_before():
    chip, call = Chip(), residual_call()
    before = call.arguments[2].clone()
    outcome = tune.race(chip, call, 4, chip.timer, GATE, threads=1)
    assert outcome.winner.block_n == 32
    assert outcome.winner.stages == 2
    assert next(iter(outcome.microseconds)) == outcome.winner
    assert outcome.saved_us == pytest.approx(10 * (1000 - 1000 * (0.5 + 0.02 + 0.032)))
    reasons = {reason.partition(" by")[0] for reason in outcome.refused.values()}
    assert reasons == {"too large", "differs from what is right"}
    assert torch.equal(call.arguments[2], before)


def test_a_gain_within_the_noise_keeps_the_default():
    chip, call = Chip(), residual_call()

    def nearly_equal(work):
        work()
        return 1.0 if chip.took == 1 else 0.99

    outcome = tune.race(chip, call, 4, nearly_equal, GATE, threads=1)
    assert outcome.winner == outcome.default == Tactic()


def test_an_output_left_unwritten_is_noticed(monkeypatch):
    chip, call = Chip(), residual_call()
    trial = tune.Trial(chip, call, Tactic(), GATE)
    assert trial.fault(Tactic(block_n=32)) is None
    monkeypatch.setattr(chip, "refusal", lambda *arguments: None)
    assert "differs from what is right" in trial.fault(Tactic(block_n=32))


@pytest.fixture
def few(monkeypatch):
    for name, value in {"QUICK": 1, "LONG": 1, "STEP_ROUNDS": 1}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(
        candidates, "tiles", lambda kind, shape, default, processors: [default, replace(default, warps=8)]
    )
    monkeypatch.setattr(candidates, "schedules", lambda best: [])


def test_a_table_of_a_whole_step(model, given, few):
    told = []
    before = model.step(given.inputs, given.noise, given.prefix, given.prefix_length).clone()
    table, outcomes = tune.tune(model, {"toy": given}, 5, 1, lambda *progress: told.append(progress))
    kinds = {key.split()[0] for key in outcomes}
    assert kinds == set(SHAPES)
    assert set(table.tactics) <= set(outcomes)
    assert set(table.measured["step toy"]) == {"default", "tuned", "tuned, overlap"}
    assert table.measured.keys() == {"step toy", *outcomes}
    assert told[-1][:2] == (len(outcomes), len(outcomes))
    assert model.table == TacticTable("toy")
    after = model.step(given.inputs, given.noise, given.prefix, given.prefix_length)
    assert torch.equal(after, before)
    tune.show(table, outcomes)


def test_when_the_time_is_up_the_rest_keeps_defaults(model, given, few):
    table, outcomes = tune.tune(model, {"toy": given}, 0, 1, lambda *progress: None)
    assert outcomes == {}
    assert dict(table.tactics) == {}


def test_steps_that_disagree_give_no_table(model, given, few, monkeypatch):
    monkeypatch.setattr(tune, "relative_rms", lambda *arrays: 1.0)
    with pytest.raises(RuntimeError, match="toy, default: the chunk differs"):
        tune.tune(model, {"toy": given}, 0, 1, lambda *progress: None)
    assert model.table == TacticTable("toy")


COMPILED_AHEAD = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from xr0_engine.fused.ops import FusedOps, Tactic, Weight, compile_beside
from xr0_engine.kernels import launch, linear

class Absent:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=0: 0

driver.set_active(Absent())
launch.capability = lambda device: 90
ops = FusedOps("triton", torch.device("cpu"), arch=90)
x, out = torch.zeros(1, 12, 64).bfloat16(), torch.ones(1, 12, 64).bfloat16()
tactics = Tactic(16, 64), Tactic(16, 64, stages=2), Tactic(16, 24)
told = []

def work():
    weight = Weight(torch.zeros(64, 64).bfloat16())
    told.extend(ops.refusal("linear", (x, weight, out), {}, tactic) for tactic in tactics)

compile_beside(work, 2)
kernels = list(linear._linear.device_caches[0][0].values())
assert [type(kernel).__name__ for kernel in kernels] == ["CompiledKernel"] * 2, kernels
assert told[:2] == [None, None] and "power of two" in told[2], told
assert bool((out == 1).all())
"""


def test_candidates_are_compiled_side_by_side_and_run_nothing(tmp_path):
    """For a chip that is not here, through the path that a launch takes; without the interpreter."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILED_AHEAD]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
