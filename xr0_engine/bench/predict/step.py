"""A whole step on a chip: its launches written down on paper, each with the op that it is of, compiled and timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from xr0_engine.backend import resolve_dtype
from xr0_engine.bench.cases import Setup
from xr0_engine.bench.predict import streamed
from xr0_engine.bench.predict.code import Code, compiled_code
from xr0_engine.bench.predict.figures import Chip
from xr0_engine.bench.predict.model import Launched, chain_seconds, spread, stream_share
from xr0_engine.bench.predict.work import Work, glue_work, op_work
from xr0_engine.bench.step.recorder import META, StagedOps, parts_on_meta, step_on_meta
from xr0_engine.bench.step.workload import Workload
from xr0_engine.config import ModelConfig
from xr0_engine.fused.backends import LOOP, LOOP_STAGES, loop_shapes
from xr0_engine.fused.ops import Flow, FusedOps, Shape, Tactic, tactic_key
from xr0_engine.fused.paper import recording, variant
from xr0_engine.fused.tactics import TacticTable

Done = Callable[[int, int], None]
Spread = tuple[float, float, float]
"""low, central, high."""


@dataclass
class Op:
    """An op as it was called. launches: what it launched, in order. phases: of a kernel that does several ops' work,
    each behind a barrier: what each would be as a kernel of its own. part: of a streamed loop, the stage (streamed.py)
    that it is."""

    stage: str
    kind: str
    shape: Shape
    tactic: Tactic | None
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    launches: list[Any] = field(default_factory=list)
    phases: tuple[Op, ...] = ()
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))}".strip()

    @cached_property
    def variant(self) -> Hashable:
        """Of its last launch: another before it is a library's, which nobody can compile here."""
        return variant(self.launches[-1])


class LaunchOps(StagedOps):
    """Fused ops of the kernels, on paper: keeps what each op launches. recorded: what recording() yields."""

    def __init__(
        self, recorded: list[Any], tactics: Mapping[str, Tactic], arch: int, kept: Collection[str] = ()
    ) -> None:
        super().__init__("triton", META, tactics, arch, kept=kept)
        self.recorded = recorded
        self.ops: list[Op] = []
        self._taken = 0

    def run(
        self, kind: str, shape: Shape, dtype: torch.dtype, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        self.take_glue()
        tactic = self.call_tuned(kind, shape, dtype, arguments, options)
        self.ops.append(Op(self.stage, kind, shape, tactic, arguments, options, self._rest()))

    def flow_loop(self, *arguments: Any, **options: Any) -> None:
        self.take_glue()
        super().flow_loop(*arguments, **options)
        self.ops.append(Op(self.stage, "flow_loop", (), None, arguments, options, self._rest()))

    def streamed_loop(self, *arguments: Any, **options: Any) -> None:
        self.take_glue()
        super().streamed_loop(*arguments, **options)
        self.ops.append(Op(self.stage, "streamed_loop", (), None, arguments, options, self._rest()))

    def take_glue(self) -> None:
        """What was launched by ops without tactics."""
        for launch in self._rest():
            self.ops.append(Op(self.stage, launch.name.strip("_"), (), None, launches=[launch]))

    def _rest(self) -> list[Any]:
        found = self.recorded[self._taken :]
        self._taken = len(self.recorded)
        return found


def record(
    config: ModelConfig,
    work: Workload,
    dtype: torch.dtype,
    tactics: Mapping[str, Tactic],
    chip: Chip,
    flow: Flow,
    kept: Collection[str] = (),
) -> list[Op]:
    """The ops of a step with these tactics, elsewhere defaults, in order. kept: keys that stay with their default,
    whatever their neighbours have."""
    parts = parts_on_meta(config, dtype)

    def written(flow: Flow, tactics: Mapping[str, Tactic]) -> list[Op]:
        with recording() as recorded:
            ops = LaunchOps(recorded, tactics, chip.arch, kept)
            step_on_meta(parts, work, ops, work.padded_tokens, config.vision.frame_dim, flow)
            ops.take_glue()
        return ops.ops

    ops = written(flow, tactics)
    if loops := [op for op in ops if op.kind == "flow_loop"]:
        chained = written("chained", {**tactics, **loop_tactics(loops[0], tactics, chip)})
        for op in loops:
            op.phases = _phases(op, chained)
    for op in ops:
        if op.kind == "streamed_loop":
            op.phases = _streamed_phases(op)
    return ops


def _streamed_phases(loop: Op) -> tuple[Op, ...]:
    weights, inputs, buffers = loop.arguments
    shapes = {**loop_shapes(inputs, buffers), **streamed.shapes(buffers)}
    first, last = loop.options["steps"]
    layers = weights.attention.scale.shape[1]
    names = [streamed.BEGIN]
    for step in range(first, last):
        names += [
            *streamed.LAYER * layers,
            *streamed.step_end(loop.launches[-1]),
            *((streamed.TOKENS,) if step + 1 < last else ()),
        ]
    parts = {
        name: Op(loop.stage, LOOP_STAGES.get(name, name), shapes[name], None, (), {}, loop.launches, part=name)
        for name in dict.fromkeys(names)
    }
    return tuple(parts[name] for name in names)


def loop_tactics(loop: Op, tactics: Mapping[str, Tactic], chip: Chip) -> dict[str, Tactic]:
    """Those of a flow loop's stages, by the keys of the ops that they are."""
    ops, (inputs, buffers) = FusedOps("triton", META, tactics, chip.arch), loop.arguments[1:3]
    dtype = buffers.q.dtype
    return {
        tactic_key(LOOP_STAGES[stage], shape, dtype): ops.tactic(LOOP + stage, shape, dtype)
        for stage, shape in loop_shapes(inputs, buffers).items()
    }


def _phases(loop: Op, chained: Sequence[Op]) -> tuple[Op, ...]:
    """Of the places that a launch takes: a chained flow's ops of these layers, and the ends of their steps."""
    flow = [op for op in chained if op.stage == "flow"]
    # A layer begins with what its attention takes; what ends a step follows its last layer.
    starts = [index - 1 for index, op in enumerate(flow) if op.kind == "lambda_attention"]
    first, last = loop.options["places"]
    return tuple(flow[starts[first] : [*starts, len(flow)][last]])


def work_of(op: Op, chip: Chip) -> Work:
    """Of an op's last launch."""
    if op.part:
        return streamed.stage_work(op.part, op.shape, op.launches[-1])
    if op.tactic is not None:
        return op_work(op.kind, op.shape, op.tactic, op.arguments, op.options)
    launch = op.launches[-1]
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    # A table is read by the row: the median is nearer to what glue moves than the sum.
    sizes = sorted(tensor.numel() * tensor.element_size() for tensor in tensors)
    return glue_work(math.prod(launch.grid), launch.warps, 2.0 * sizes[len(sizes) // 2])


@dataclass(frozen=True)
class Line:
    """Launches, or stages of launches, of one kind and shape in a step, and what they take of a chip. count: of them;
    launches: how many of these are launches. busy: processors that have some of it. seconds: at each of the chip's
    settings, of all of them."""

    stage: str
    name: str
    tactic: Tactic | None
    count: int
    launches: int
    work: Work
    code: Code | None
    limit: str
    busy: int
    seconds: tuple[float, ...]

    @property
    def ms(self) -> Spread:
        return _scaled(self.seconds, 1e3)


def compile_ops(
    ops: Sequence[Op], arch: int, done: Done, known: Mapping[Hashable, Code] | None = None
) -> dict[Hashable, Code]:
    """Each variant's code, with what is known already. Raises what compile_launch raises for what cannot be
    compiled."""
    codes = dict(known or {})
    calls = {body.variant: body.launches[-1] for op in ops for body in op.phases or (op,)}
    calls = {key: call for key, call in calls.items() if key not in codes}
    for number, (key, call) in enumerate(calls.items(), 1):
        codes[key] = compiled_code(call, arch)
        done(number, len(calls))
    return codes


def _bodies(ops: Sequence[Op]) -> Iterator[tuple[Op, bool, bool]]:
    """Every launch and stage of one, in order: whether it is in a loop, and behind a barrier."""
    for op in ops:
        for number, body in enumerate(op.phases or (op,)):
            yield body, bool(op.phases), number > 0


def predict_step(ops: Sequence[Op], chip: Chip, codes: Mapping[Hashable, Code]) -> list[Line]:
    """Every kind of launch of a step, in the order of first appearance. Times are those in the chain of the step."""
    made: dict[Hashable, Launched] = {}
    places: dict[Hashable, list[int]] = {}
    chain: list[Launched] = []
    kinds: list[Op] = []
    for body, looped, behind in _bodies(ops):
        group = (body.stage, body.name, (body.variant, body.part), looped, behind)
        if group not in made:
            code = codes.get(body.variant)
            if body.part and code:
                code = streamed.stage_code(body.part, body.launches[-1], code)
            made[group] = Launched(work_of(body, chip), code, barrier=behind, streamed=bool(body.part))
        places.setdefault(group, []).append(len(chain))
        chain.append(made[group])
        kinds.append(body)
    times = [chain_seconds(chain, chip, at) for at in chip.settings()]
    shares = [
        stream_share([pair for pair in zip(chain, time, strict=True) if pair[0].streamed], at)
        for time, at in zip(times, chip.settings(), strict=True)
    ]
    lines = []
    for (_, _, _, looped, behind), found in places.items():  # type: ignore[misc]
        op, launched = kinds[found[0]], chain[found[0]]
        lines.append(
            Line(
                op.stage,
                f"loop: {op.name}" if looped else op.name,
                op.tactic,
                count=len(found),
                launches=0 if behind else len(found),
                work=launched.work,
                code=launched.code,
                limit=(launched.streamed and shares[0][1]) or times[0][found[len(found) // 2]].limit,
                busy=min(launched.work.programs, chip.processors),
                seconds=tuple(
                    sum(at[place].total_s for place in found) * (share if launched.streamed else 1.0)
                    for at, (share, _) in zip(times, shares, strict=True)
                ),
            )
        )
    return lines


def predict_case(setup: Setup, chip: Chip, table: TacticTable, flow: Flow, done: Done) -> list[Line]:
    """Raises ValueError for what is wrong in setup."""
    config, work = Workload.of_case(setup, kept=True)
    ops = record(config, work, resolve_dtype(setup.dtype), table.tactics, chip, flow, table.kept)
    return predict_step(ops, chip, compile_ops(ops, chip.arch, done))


def total_ms(lines: Sequence[Line], stage: str = "") -> Spread:
    """Of a stage, or of all."""
    part = [line.seconds for line in lines if stage in ("", line.stage)]
    return _scaled([sum(column) for column in zip(*part, strict=True)], 1e3)


def predict_launch(
    kind: str, shape: Sequence[int], tactic: Tactic, chip: Chip, code: Code | None = None, **work: Any
) -> Spread:
    """Microseconds of an op in a chain of its own kind, without its compiled code if there is none.

    shape: as tactic_key has it. work: of the op's Work, to be replaced: what would my tile cost.
    """
    launched = Launched(replace(op_work(kind, shape, tactic), **work), code)
    return _scaled([chain_seconds([launched] * 3, chip, at)[-1].total_s for at in chip.settings()], 1e6)


def _scaled(seconds: Sequence[float], factor: float) -> Spread:
    low, central, high = spread(seconds)
    return factor * low, factor * central, factor * high
