"""Neighbouring calls of a recorded step, timed as they run: in one CUDA graph, one behind the other.

A kernel of 3 to 5 µs alone is mostly the clock that times it, and neither finds the caches as the step leaves them nor
starts while the kernel ahead of it still runs. In a chain of layers, whose weights differ, it does. What its calls take
there is the difference to the chain without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing

import numpy as np

from xr0_engine.bench.step.recorder import Call, RecordingOps
from xr0_engine.fused.graph import Graph
from xr0_engine.fused.ops import FusedOps, Tactic
from xr0_engine.fused.sizing import reserve

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


class Chain:
    """Some calls, of which those of one key run with the tactics that are tried. count: how many these are.

    calls: as RecordingOps.sequence has them. tactics: of the other keys; those that it lacks run with their default.
    """

    def __init__(
        self, ops: FusedOps, key: str, calls: Sequence[Mapping[str, Call]], tactics: Mapping[str, Tactic]
    ) -> None:
        self.ops, self.key, self.calls, self.tactics = ops, key, calls, tactics
        self.count = sum(key in each for each in calls)
        written = {
            (output.data_ptr(), output.shape): output
            for each in calls
            for call in each.values()
            for output in call.written()
        }
        self._before = [(output, output.clone()) for output in written.values()]

    def microseconds(self, timer: Timer, tactics: Sequence[Tactic], rounds: int) -> dict[Tactic, float]:
        """Of one call of the key with each tactic: medians; the tactics, and no call at all, take turns.

        Leaves all buffers as they were.
        """
        with ExitStack() as graphs:
            runs = {tactic: self._ready(tactic, graphs) for tactic in (None, *tactics)}
            samples: dict[Tactic | None, list[float]] = {tactic: [] for tactic in runs}
            for _ in range(rounds):
                for tactic, run in runs.items():
                    samples[tactic].append(timer(run))
        self.restore()
        medians = {tactic: 1e3 * float(np.median(taken)) for tactic, taken in samples.items()}
        return {tactic: (medians[tactic] - medians[None]) / self.count for tactic in tactics}

    def restore(self) -> None:
        for output, before in self._before:
            output.copy_(before)

    def run(self, ops: FusedOps, tactic: Tactic | None) -> None:
        """All calls, the key's with this tactic, or without these."""
        for each in self.calls:
            key = self.key if self.key in each else next(iter(each))
            call = each[key]
            if key != self.key:
                taken: Tactic | None = self.tactics.get(key) or ops.default(call.kind, call.shape, call.options)
            else:
                taken = tactic
            if taken is not None:
                ops.call(call.kind, call.arguments, call.options, taken)

    def _ready(self, tactic: Tactic | None, graphs: ExitStack) -> Callable[[], None]:
        device = self.ops.workspace.device
        if device.type != "cuda":
            return lambda: self.run(self.ops, tactic)
        # Scratch memory of its own, which a graph may hold.
        ops = FusedOps(self.ops.backend, device, self.tactics, self.ops.arch)
        reserve(ops, lambda twin: self.run(twin, tactic))
        return graphs.enter_context(closing(Graph(lambda: self.run(ops, tactic), device, self.key))).replay


def chain_of(recording: RecordingOps, key: str, tactics: Mapping[str, Tactic], length: int) -> Chain:
    """From the first call of the key on as many of them as `length` calls hold, and a neighbour on either side."""
    sequence = recording.sequence
    first = next(place for place, calls in enumerate(sequence) if key in calls)
    last = max(place for place, calls in enumerate(sequence[: first + length]) if key in calls)
    beside = 1 if length > 1 else 0
    return Chain(recording, key, sequence[max(first - beside, 0) : last + 1 + beside], tactics)
