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
from xr0_engine.bench.step.chain import Chain
from xr0_engine.bench.step.race import FULL, ONCE, Trial, race
from xr0_engine.bench.step.recorder import Call
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
    assert len(set(found)) == len(found) <= 44
    assert len({candidates.name(tactic) for tactic in found}) == len(found)
    assert any(tactic.library for tactic in found) == (kind != "lambda_attention")
    assert len(candidates.schedules(kind, found[1])) <= 8
    assert found[1] not in candidates.schedules(kind, found[1])


def test_splits_share_k_evenly():
    for tactic in candidates.tiles("linear", SHAPES["linear"], Tactic(), 132)[1:]:
        assert (4096 // tactic.block_k) % tactic.split_k == 0
        assert tactic.block_m == 16 or tactic.library


def test_library_has_one_schedule():
    assert candidates.schedules("linear", Tactic(library=True)) == []


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="kind: expected an op that has tactics, got 'embed'"):
        candidates.tiles("embed", (1, 2, 3), Tactic(), 132)


class Chip(FusedOps):
    """The oracle, whose time is a number of the tactic's; some tactics fail, some compute something else."""

    def __init__(self) -> None:
        super().__init__("reference", CPU)
        self.took = 0.0

    def chain(self, call) -> Chain:
        return Chain(self, "key", [{"key": call}], {})

    def call(self, kind, arguments, options, tactic):
        if tactic.block_n == 128:
            raise ValueError("too large")
        super().call(kind, arguments, options, tactic)
        if tactic.library:
            arguments[2].mul_(1.01)
        self.took = 1.0 if tactic == Tactic() else 0.5 + tactic.stages / 100 + tactic.block_n / 1000

    def timer(self, call):
        self.took = 0.0
        call()
        return self.took


def residual_call() -> Call:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 12, 64, generator=random), torch.randn(64, 64, generator=random)
    stream, sums = torch.randn(1, 12, 64, generator=random), torch.zeros(1, 1, 12, 2)
    options = {"residual": Residual(stream), "stats": StatsOut(sums)}
    return Call("linear", (12, 64, 64), (x, Weight(weight), stream), options, count=10)


def test_the_fastest_that_is_right_wins_and_the_residual_stream_is_as_before():
    chip, call = Chip(), residual_call()
    before = call.arguments[2].clone()
    outcome = race(chip, call, chip.chain(call), 4, chip.timer, GATE, 1, FULL)
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
        return {0.0: 0.0, 1.0: 1.0}.get(chip.timer(work), 0.99)

    outcome = race(chip, call, chip.chain(call), 4, nearly_equal, GATE, 1, FULL)
    assert outcome.winner == outcome.default == Tactic()


def test_an_output_left_unwritten_is_noticed(monkeypatch):
    chip, call = Chip(), residual_call()
    trial = Trial(chip, call, Tactic(), GATE)
    assert trial.fault(Tactic(block_n=32)) is None
    monkeypatch.setattr(chip, "refusal", lambda *arguments: None)
    assert "differs from what is right" in trial.fault(Tactic(block_n=32))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(
        candidates, "tiles", lambda kind, shape, default, processors: [default, replace(default, warps=8)]
    )
    monkeypatch.setattr(candidates, "schedules", lambda kind, best: [])


def tuned(model, given, minutes=5.0, **options):
    told = []
    table, outcomes = tune.tune(
        model, {"toy": given}, minutes, 1, lambda *progress: told.append(progress), effort=ONCE, **options
    )
    return table, outcomes, told


def test_a_table_of_a_whole_step(model, given, few):
    before = model.step(given.inputs, given.noise, given.prefix, given.prefix_length).clone()
    table, outcomes, told = tuned(model, given)
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
    table, outcomes, _ = tuned(model, given, minutes=0)
    assert outcomes == {}
    assert dict(table.tactics) == {}


def test_steps_that_disagree_give_no_table(model, given, few, monkeypatch):
    monkeypatch.setattr(tune, "relative_rms", lambda *arrays: 1.0)
    with pytest.raises(tune.Disagreement, match="toy, default: the chunk differs"):
        tuned(model, given, minutes=0)
    assert model.table == TacticTable("toy")


def test_a_flow_that_the_machine_refuses_takes_no_part(model, given, few, monkeypatch):
    rivals = tune._rivals(TacticTable("toy"), model)
    layered = {"tuned, layered flow": TacticTable("toy", flow="layered")}
    monkeypatch.setattr(tune, "_rivals", lambda table, model: {**rivals, **layered})
    table, outcomes, _ = tuned(model, given, minutes=0)
    assert "a flow as one kernel" in table.environment[tune.REFUSED]["tuned, layered flow"]
    assert set(table.measured["step toy"]) == set(rivals)
    assert table.flow == "chained"
    tune.show(table, outcomes)


class Killed(BaseException):
    """Ends a run as a signal would: nothing gets to tidy up."""


@pytest.fixture
def raced(monkeypatch):
    """Shapes of the calls that are raced. The one of `ends_at` ends the run, and a call of the shape of `ends_in`; a
    tactic with eight warps always wins."""

    class Raced(list):
        ends_at, ends_in, reason = None, None, Killed

    shapes, real = Raced(), tune.race

    def race(ops, call, *others):
        shapes.append((call.kind, call.shape))
        if len(shapes) == shapes.ends_at or shapes[-1] == shapes.ends_in:
            raise shapes.reason
        outcome = real(ops, call, *others)
        outcome.winner = next(tactic for tactic in outcome.microseconds if tactic.warps == 8)
        outcome.microseconds = {outcome.winner: 1.0, outcome.default: 2.0}
        return outcome

    monkeypatch.setattr(tune, "race", race)
    return shapes


def on_disk(table, tmp_path):
    tune.write_tactics(table, tmp_path / "table.json")
    return tune.read_tactics(tmp_path / "table.json")


def test_a_run_that_is_killed_leaves_its_table_and_the_next_goes_on_from_it(model, given, few, raced, tmp_path):
    kept = []
    raced.ends_at = 4
    with pytest.raises(Killed):
        tuned(model, given, keep=kept.append)
    left, finished = on_disk(kept[-1], tmp_path), raced[:3]
    assert len(left.tactics) == len(left.measured) == 3
    assert all(tactic.warps == 8 for tactic in left.tactics.values())
    assert list(left.environment[tune.UNFINISHED].values()) == [1]

    raced.clear()
    raced.ends_at = None
    table, outcomes, told = tuned(model, given, known=left, keep=kept.append)
    assert set(raced).isdisjoint(finished)
    assert len(raced) == len(outcomes) - 3
    assert told[0][0] == 3
    assert all(outcome.winner.warps == 8 for outcome in outcomes.values())
    assert tune.UNFINISHED not in table.environment
    assert {key for key in table.measured if not key.startswith("step")} == outcomes.keys()


def test_a_key_that_ended_two_runs_keeps_its_default(model, given, few, raced, tmp_path):
    tuned(model, given)
    faulty, known = raced[0], None
    for _ in range(tune.MOST_TRIES):
        kept = []
        raced.ends_in = faulty
        with pytest.raises(Killed):
            tuned(model, given, known=known, keep=kept.append)
        known = on_disk(kept[-1], tmp_path)
    raced.clear()
    table, outcomes, _ = tuned(model, given, known=known)
    assert faulty not in raced
    assert len(outcomes) > 3
    assert list(table.environment[tune.UNFINISHED].values()) == [tune.MOST_TRIES]


def test_ctrl_c_is_no_fault_of_the_key(model, given, few, raced, tmp_path):
    kept = []
    raced.ends_at, raced.reason = 2, KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tuned(model, given, keep=kept.append)
    left = on_disk(kept[-1], tmp_path)
    assert len(left.measured) == 1
    assert tune.UNFINISHED not in left.environment


def test_what_is_known_of_other_cases_stays(model, given, few):
    other = TacticTable("toy", {"linear 1x2x3": Tactic(warps=8)}, measured={"linear 1x2x3": {"x": 1.0}})
    table, outcomes, _ = tuned(model, given, minutes=0, known=other)
    assert outcomes == {}
    assert table.measured["linear 1x2x3"] == {"x": 1.0}


def test_times_of_candidates_that_are_no_more_are_measured_again(model, given, few, raced):
    table, outcomes, _ = tuned(model, given)
    key = next(iter(outcomes))
    stale = replace(table, measured={**table.measured, key: {"128x7x9 split 3": 1.0}})
    raced.clear()
    _, again, _ = tuned(model, given, known=stale)
    assert len(raced) == 1
    assert again.keys() == outcomes.keys()


TOLD = {"device": "toy", "driver": "1", "torch": "2", "triton": "3", "commit": "4", "clocks_mhz": 5}


@pytest.mark.parametrize(
    ("changed", "is_known"),
    [
        ({}, True),
        ({"clocks_mhz": 6}, True),
        *(({name: "x"}, False) for name in ("device", "driver", "torch", "commit")),
    ],
    ids=str,
)
def test_only_a_table_of_the_same_environment_is_gone_on_from(tmp_path, changed, is_known):
    path = tmp_path / "toy.json"
    assert tune._gone_on_from(path, TOLD) is None
    tune.write_tactics(TacticTable("toy", environment={**TOLD, "size": "4b"}), path)
    assert (tune._gone_on_from(path, {**TOLD, **changed}) is not None) == is_known


COMPILED_AHEAD = """
from contextlib import nullcontext
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from xr0_engine.fused.ops import FusedOps, Tactic, Weight
from xr0_engine.fused.paper import compile_beside
from xr0_engine.kernels import launch, linear

class Absent:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=0: 0

driver.set_active(Absent())
launch.capability = lambda device: 90
torch.cuda.device = lambda device: nullcontext()
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
