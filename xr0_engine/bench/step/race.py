"""One op's call with every tactic: what differs from the default is out, of the others the fastest wins in a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from xr0_engine.bench.step import candidates
from xr0_engine.bench.step.chain import Chain, Timer
from xr0_engine.bench.step.recorder import Call
from xr0_engine.fused.ops import FusedOps, Tactic
from xr0_engine.fused.paper import compile_beside

FINALISTS = 3
MARGIN = 0.02
"""By how much a candidate must beat the default: less is noise."""


@dataclass(frozen=True)
class Effort:
    """quick: runs of a candidate's chain; long: of a finalist's; rounds: of whole steps; chain: most calls of one."""

    quick: int = 7
    long: int = 30
    rounds: int = 100
    chain: int = 40


FULL = Effort()
ONCE = Effort(1, 1, 1, 1)
"""On the emulator, whose times say nothing: that every candidate computes the right thing is all there is to learn."""


class Trial:
    """One call, tried with one tactic after the other. Leaves its buffers as they were."""

    def __init__(self, ops: FusedOps, call: Call, default: Tactic, gate: float, judge: FusedOps | None = None) -> None:
        """gate: relative RMS between a candidate's outputs and the default's. judge: other ops that say what is
        right."""
        self.ops, self.call, self.gate = ops, call, gate
        self._outputs = call.written()
        self._before = [output.clone() for output in self._outputs]
        self._reset()
        (judge or ops).call(call.kind, call.arguments, call.options, default)
        self._expected = [output.float() for output in map(torch.clone, self._outputs)]

    def fault(self, tactic: Tactic) -> str | None:
        """Why a tactic cannot take part, None if it gives what the default gives."""
        self._reset()
        if reason := self.ops.refusal(self.call.kind, self.call.arguments, self.call.options, tactic):
            return reason
        scratch = self.call.scratch()
        for output, expected in zip(self._outputs, self._expected, strict=True):
            if output.data_ptr() in scratch:
                continue
            error = float((output.float() - expected).norm() / expected.norm().clamp(min=1e-30))
            if not error < self.gate:
                return f"differs from what is right by {error:.1e}"
        return None

    def microseconds(self, timer: Timer, tactics: Sequence[Tactic], launches: int) -> dict[Tactic, float]:
        """Medians; the tactics take turns."""
        samples: dict[Tactic, list[float]] = {tactic: [] for tactic in tactics}
        for _ in range(launches):
            for tactic in tactics:
                samples[tactic].append(1e3 * timer(lambda tactic=tactic: self._run(tactic)))  # type: ignore[misc]
        return {tactic: float(np.median(taken)) for tactic, taken in samples.items()}

    def restore(self) -> None:
        for output, before in zip(self._outputs, self._before, strict=True):
            output.copy_(before)

    def _reset(self) -> None:
        """What is also read gets its value back; what is only written gets NaN, so that a gap shows."""
        both = self.call.read_and_written()
        for output, before in zip(self._outputs, self._before, strict=True):
            if output.data_ptr() in both:
                output.copy_(before)
            else:
                output.fill_(torch.nan)

    def _run(self, tactic: Tactic) -> None:
        self.ops.call(self.call.kind, self.call.arguments, self.call.options, tactic)


@dataclass
class Outcome:
    """Of one key. microseconds: of a call, with every candidate that took part, the winner first; refused: why others
    did not."""

    winner: Tactic
    default: Tactic
    count: int
    microseconds: dict[Tactic, float] = field(default_factory=dict)
    refused: dict[Tactic, str] = field(default_factory=dict)

    @property
    def saved_us(self) -> float:
        """Of a whole step."""
        return self.count * (self.microseconds[self.default] - self.microseconds[self.winner])


def race(
    ops: FusedOps, call: Call, chain: Chain, processors: int, timer: Timer, gate: float, threads: int, effort: Effort
) -> Outcome:
    """Find the fastest tactic of a key. call: its first; chain: where it is timed; threads: that compile."""
    default = ops.default(call.kind, call.shape, call.options)
    outcome, trial = Outcome(default, default, call.count), Trial(ops, call, default, gate)

    def take(entrants: Sequence[Tactic]) -> None:
        _compile(ops, call, entrants, threads)
        for tactic in entrants:
            if reason := trial.fault(tactic):
                outcome.refused[tactic] = reason
            else:
                outcome.microseconds |= chain.microseconds(timer, [tactic], effort.quick)

    def ranked() -> list[Tactic]:
        return sorted(outcome.microseconds, key=outcome.microseconds.__getitem__)

    take(candidates.tiles(call.kind, call.shape, default, processors))
    own = [tactic for tactic in ranked() if not tactic.library]
    take([tactic for tactic in candidates.schedules(call.kind, own[0]) if tactic not in outcome.microseconds])
    finalists = list(dict.fromkeys((default, *ranked()[:FINALISTS])))
    outcome.microseconds |= chain.microseconds(timer, finalists, effort.long)
    trial.restore()
    best = min(finalists, key=outcome.microseconds.__getitem__)
    if outcome.microseconds[best] < (1 - MARGIN) * outcome.microseconds[default]:
        outcome.winner = best
    order = (outcome.winner, *ranked())
    outcome.microseconds = {tactic: outcome.microseconds[tactic] for tactic in dict.fromkeys(order)}
    return outcome


def _compile(ops: FusedOps, call: Call, entrants: Sequence[Tactic], threads: int) -> None:
    """Ahead, several at a time: compiling takes far longer than everything else here."""
    if ops.workspace.device.type != "cuda":
        return

    def launch_all() -> None:
        for tactic in entrants:
            if not tactic.library:
                ops.refusal(call.kind, call.arguments, call.options, tactic)

    compile_beside(launch_all, threads)
