"""Chains of a step's calls, in which candidates are timed; and flow loops, whose stages are recorded and tried.

Time is injected; on a CPU the ops are the kernels' oracles, but for the loops, which those lack.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.fused.test_head import SPLIT, make_head, make_inputs
from tests.support import CPU
from xr0_engine.bench.step import candidates
from xr0_engine.bench.step import chain as chains
from xr0_engine.bench.step.chain import chain_of
from xr0_engine.bench.step.kernels import GATE
from xr0_engine.bench.step.race import Trial
from xr0_engine.bench.step.recorder import RecordingOps
from xr0_engine.fused.backends import LOOP, LOOP_STAGES, loop_shapes
from xr0_engine.fused.ops import FusedOps, Residual, StatsOut, Tactic, Weight, tactic_key

LAYERS, ROWS, WIDTH = 6, 12, 64
UP, DOWN = (tactic_key("linear", (ROWS, n, k), torch.float32) for n, k in ((2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)))
FASTER = Tactic(warps=8)


def record() -> tuple[RecordingOps, torch.Tensor]:
    """Layers of two products, the second on a residual stream; their weights differ."""
    recording = RecordingOps("reference", CPU)
    torch.manual_seed(0)
    stream, hidden, sums = torch.randn(1, ROWS, WIDTH), torch.empty(1, ROWS, 2 * WIDTH), torch.zeros(1, 1, ROWS, 2)
    for _ in range(LAYERS):
        recording.linear(stream, Weight(torch.randn(2 * WIDTH, WIDTH) / 8), hidden)
        down = Weight(torch.randn(WIDTH, 2 * WIDTH) / 8)
        recording.linear(hidden, down, stream, residual=Residual(stream), stats=StatsOut(sums))
    return recording, stream


class Clock:
    """Of every call an amount of time: of a key's with the faster tactic less."""

    def __init__(self, monkeypatch) -> None:
        self.ran: list[tuple[tuple[int, ...], Tactic]] = []
        call = FusedOps.call

        def noting(ops, kind, arguments, options, tactic):
            self.ran.append((tuple(arguments[1].data.shape), tactic))
            call(ops, kind, arguments, options, tactic)

        monkeypatch.setattr(FusedOps, "call", noting)

    def __call__(self, run) -> float:
        self.ran.clear()
        run()
        return sum(0.002 if tactic == FASTER else 0.005 for _, tactic in self.ran)


def test_a_key_is_timed_among_its_neighbours_of_several_layers(monkeypatch):
    recording, stream = record()
    before, clock = stream.clone(), Clock(monkeypatch)
    chain = chain_of(recording, DOWN, {}, 7)
    assert (chain.count, len(chain.calls)) == (4, 9)
    weights = [each[DOWN].arguments[1].data.data_ptr() for each in chain.calls if DOWN in each]
    assert len(set(weights)) == chain.count
    assert chain.microseconds(clock, [Tactic(), FASTER], 3) == pytest.approx({Tactic(): 5.0, FASTER: 2.0})
    assert torch.equal(stream, before)


def test_the_other_keys_run_with_their_best(monkeypatch):
    recording, _ = record()
    clock = Clock(monkeypatch)
    chain = chain_of(recording, DOWN, {UP: FASTER}, 7)
    chain.microseconds(clock, [Tactic()], 1)
    assert {tactic for shape, tactic in clock.ran if shape[0] == 2 * WIDTH} == {FASTER}
    assert {tactic for shape, tactic in clock.ran if shape[0] == WIDTH} == {Tactic()}


def test_one_call_is_a_chain_of_its_own():
    chain = chain_of(record()[0], UP, {}, 1)
    assert (chain.count, len(chain.calls)) == (1, 1)


def test_on_a_gpu_a_chain_is_a_graph_with_scratch_memory_of_its_own(monkeypatch):
    recording, _ = record()
    held: list[str] = []

    class Noted:
        def __init__(self, work, device, name) -> None:
            held.append(name)
            self.replay = work

        def close(self) -> None:
            held.append("closed")

    reserved: list[FusedOps] = []
    monkeypatch.setattr(chains, "Graph", Noted)
    monkeypatch.setattr(chains, "reserve", lambda ops, work: reserved.append(ops))
    monkeypatch.setattr(chains, "FusedOps", lambda backend, device, *rest: FusedOps(backend, CPU, *rest))
    chain = chain_of(recording, DOWN, {}, 7)
    recording.workspace.device = torch.device("cuda")
    chain.microseconds(Clock(monkeypatch), [Tactic(), FASTER], 2)
    assert held == [DOWN] * 3 + ["closed"] * 3
    assert len({id(ops.workspace) for ops in reserved}) == 3


def test_stages_of_a_loop_are_recorded_and_tried():
    pytest.importorskip("triton")
    head = make_head()
    inputs, buffers = make_inputs(head, 1), head.buffers(1, 6)
    recording = RecordingOps("triton", inputs.keys.device)
    head.run(recording, inputs, buffers, flow="layered")
    loops = {key: call for key, call in recording.calls.items() if key.startswith(LOOP)}
    layers, steps = head.config.num_layers, head.steps
    counts = {call.kind.removeprefix(LOOP): call.count for call in loops.values()}
    assert counts == dict.fromkeys(loop_shapes(inputs, buffers), layers * steps) | {"tokens": steps - 1}
    tokens = next(key for key in loops if key.startswith(f"{LOOP}tokens"))
    assert loops[tokens].options["places"] == (layers - 1, layers)
    assert chain_of(recording, tokens, {}, 40).count == 1
    call = loops[tokens]
    trial = Trial(recording, call, recording.default(call.kind, call.shape), GATE["float32"])
    assert trial.fault(SPLIT) is None
    assert "expected one of our own kernels" in trial.fault(replace(SPLIT, library=True))


@pytest.mark.parametrize("stage", LOOP_STAGES)
def test_candidates_of_a_loop_are_few_and_told_apart(stage):
    shapes = {"qkv": (32, 3072, 1024, 128), "attention": (1, 8, 32, 8, 320, 128), "gate_up": (32, 8192, 1024)}
    kind, shape = LOOP + stage, shapes.get(stage, (32, 1024, 4096))
    default = Tactic(block_m=32, split_k=8)
    found = candidates.tiles(kind, shape, default, 132)
    assert found[0] == default
    assert len(found) <= 10
    assert candidates.schedules(kind, found[1]) == []
    named = candidates.named(kind, shape, default, 132)
    assert all(candidates.name(tactic) == name for name, tactic in named.items())
    assert set(named.values()) == set(found)
