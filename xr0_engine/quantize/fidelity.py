"""How far a policy in 8 bits is from the same one in 16, on recorded moments: chunks in robot units, what stands at the
seam behind a prefix, stages, and each layer by itself.

Both are computed by PyTorch's operators on one machine, from the same noise: what differs is the rounding to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xr0_engine.comparison import relative_rms
from xr0_engine.engine import Engine
from xr0_engine.fused.model import reference_of
from xr0_engine.model.quantization import ROW_FORMATS, Format
from xr0_engine.model.quantized import QuantizedLinear, module_path, quantized, round_by
from xr0_engine.quantize.samples import Moment
from xr0_engine.types import ActionChunk

PASSES = 4
"""Of every moment: in 16 bits, in 8, with either part in 8."""
SHOWN_UNITS = {"m": ("mm", 1e3), "rad": ("mrad", 1e3)}
"""Unit of a layout's columns -> what errors are told in, and how many of those it is."""


@dataclass(frozen=True)
class Spread:
    """Of a quantity over the moments."""

    mean: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float], worst: Callable[[Sequence[float]], np.floating] = np.max) -> Spread:
        """What is no number stays so: NumPy's extremes, not Python's."""
        return cls(float(np.mean(values)), float(worst(values)))


@dataclass(frozen=True)
class Fidelity:
    """moments: how many. cosine: between the two chunks' own actions, active columns, the model's units (std of the
    training data); worst is the least. error: the largest difference within a chunk, the same units. units: unit ->
    the same in the robot's, of columns that have it. recorded: `16 bit`, `8 bit` -> how far they are from what was
    recorded: mean absolute difference, the model's units.

    seam: from the last given action to the first own one, mean absolute change, the model's units: `16 bit`, `8 bit`,
    `recorded`; empty if no moment has a prefix. stages: name -> relative error, root mean square, of what comes out of
    it; `chunk, VLM alone in 8 bit` and `chunk, head alone in 8 bit`: of the chunk, if only that part is.
    layers: name -> the same of a layer's output for the input that it has in 16 bits. exported: as cosine, if rows are
    rounded by constants, as an export of it does, those that these very moments gave; None where no row has 8 bits.
    """

    moments: int
    cosine: Spread
    error: Spread
    units: dict[str, Spread]
    recorded: dict[str, Spread]
    seam: dict[str, Spread]
    stages: dict[str, Spread]
    layers: dict[str, Spread] = field(default_factory=dict)
    exported: Spread | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Reading:
    """What an engine makes of a moment: the chunk, and the keys and values that its head reads, layer by layer."""

    chunk: ActionChunk
    stages: dict[str, Tensor]


def compare(
    engine: Engine,
    layers: Mapping[str, Format],
    moments: Sequence[Moment],
    done: Callable[[], None] = lambda: None,
) -> Fidelity:
    """engine: in 16 bits, by PyTorch's operators; it is as it was afterwards. done: called PASSES times for each
    moment. Raises ValueError for no moments."""
    if not moments:
        raise ValueError("moments: expected at least one, got none")
    model = reference_of(engine.model, "fidelity")
    plain = []
    for moment in moments:
        plain.append(_read(engine, moment))
        done()
    found: dict[str, list[float]] = {}
    stages: dict[str, list[float]] = {}
    with quantized(model, layers):
        for moment, before in zip(moments, plain, strict=True):
            eight = _read(engine, moment)
            for name, value in _apart(engine, moment, before.chunk, eight.chunk).items():
                found.setdefault(name, []).append(value)
            for name, expected in before.stages.items():
                stages.setdefault(name, []).append(relative_rms(eight.stages[name], expected))
            done()
    for part, is_there in (("VLM", True), ("head", False)):
        some = {name: each for name, each in layers.items() if name.startswith("vlm.") is is_there}
        with quantized(model, some):
            for moment, before in zip(moments, plain, strict=True):
                pair = (_own(chunk) for chunk in (_infer(engine, moment), before.chunk))
                error = relative_rms(*(torch.from_numpy(rows) for rows in pair))
                stages.setdefault(f"chunk, {part} alone in 8 bit", []).append(error)
                done()

    def spreads(kind: str) -> dict[str, Spread]:
        return {name.removeprefix(kind): Spread.of(each) for name, each in found.items() if name.startswith(kind)}

    return Fidelity(
        moments=len(moments),
        cosine=Spread.of(found["cosine"], np.min),
        error=Spread.of(found["error"]),
        units=spreads("unit "),
        recorded=spreads("recorded "),
        seam=spreads("seam "),
        stages={name: Spread.of(values) for name, values in stages.items()},
    )


@dataclass(frozen=True)
class Alone:
    """Layers by themselves: layer -> relative error of its output, in the format that it shall have, for the input that
    it has while all are in 16 bits; and the largest magnitudes of that input, as Quantization has them."""

    errors: dict[str, Spread]
    largest: dict[str, tuple[float, ...]]


def layers_alone(engine: Engine, layers: Mapping[str, Format], moments: Sequence[Moment]) -> Alone:
    """One layer in 8 bits is in memory at a time."""
    model = reference_of(engine.model, "fidelity")
    errors: dict[str, list[float]] = {layer: [] for layer in layers}
    steps = model.config.head.flow_steps
    largest = {layer: [0.0] * (1 if layer.startswith("vlm.") else steps) for layer in layers}

    def note(layer: str, linear: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(linear, nn.Linear), layer
        stands_in = QuantizedLinear(linear, layers[layer])
        stands_in.take(linear.weight)
        errors[layer].append(relative_rms(stands_in(given[0]), out))
        seen = largest[layer]
        place = 0 if len(seen) == 1 else model.head.step
        seen[place] = max(seen[place], float(given[0].abs().max()))

    # Where layers that share an input are one product, none is called by itself.
    with quantized(model, {}):
        handles = [
            model.get_submodule(module_path(layer)).register_forward_hook(partial(note, layer)) for layer in layers
        ]
        try:
            for moment in moments:
                _infer(engine, moment)
        finally:
            for handle in handles:
                handle.remove()
    return Alone(
        {layer: Spread.of(values) for layer, values in errors.items() if values},
        {layer: tuple(values) for layer, values in largest.items() if min(values) > 0},
    )


def as_exported(
    engine: Engine, layers: Mapping[str, Format], largest: Mapping[str, Sequence[float]], moments: Sequence[Moment]
) -> Spread | None:
    """Fidelity.exported. largest: as Alone has it."""
    if not any(format in ROW_FORMATS for format in layers.values()):
        return None
    model = reference_of(engine.model, "fidelity")
    plain = [_own(_infer(engine, moment)) for moment in moments]
    with quantized(model, layers):
        round_by(model, largest)
        eight = [_own(_infer(engine, moment)) for moment in moments]
    return Spread.of([_cosine(a, b) for a, b in zip(plain, eight, strict=True)], np.min)


def _infer(engine: Engine, moment: Moment) -> ActionChunk:
    return engine.infer(moment.observation, prefix=moment.prefix, seed=moment.seed)


def _read(engine: Engine, moment: Moment) -> _Reading:
    kv, chunk = engine.prefill(moment.observation), _infer(engine, moment)
    stages = {"chunk": torch.from_numpy(_own(chunk))}
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        stages[f"keys for layer {layer} of the head"] = keys.cpu()
        stages[f"values for layer {layer} of the head"] = values.cpu()
    return _Reading(chunk, stages)


def _own(chunk: ActionChunk) -> np.ndarray:
    """Actions that were not given, active columns, float64, the model's units."""
    return chunk.normalized[chunk.prefix_length :, chunk.active_columns].astype(np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def _apart(engine: Engine, moment: Moment, plain: ActionChunk, eight: ActionChunk) -> dict[str, float]:
    """`cosine`, `error`, `unit mm` ..., `recorded 16 bit` ..., `seam 16 bit` ...: each as Fidelity has it."""
    own, columns = plain.prefix_length, plain.active_columns
    a, b = _own(plain), _own(eight)
    found = {
        "cosine": _cosine(a, b),
        "error": float(np.abs(a - b).max()),
    }
    difference = np.abs(plain.actions[own:].astype(np.float64) - eight.actions[own:]).max(0)
    for panel in engine.embodiment(plain.robot_type).action_layout.panels(columns):
        for column in panel:
            unit, times = SHOWN_UNITS.get(column.unit, (column.unit, 1.0))
            name = f"unit {unit}"
            found[name] = max(found.get(name, 0.0), times * float(difference[column.index]))
    recorded = engine.statistics[plain.robot_type].normalize(moment.recorded)[: moment.steps, columns]
    for name, chunk in (("16 bit", plain), ("8 bit", eight)):
        rows = chunk.normalized[: moment.steps, columns]
        found[f"recorded {name}"] = float(np.abs(rows[own:] - recorded[own:]).mean())
        if own:
            found[f"seam {name}"] = float(np.abs(rows[own] - rows[own - 1]).mean())
    if own:
        found["seam recorded"] = float(np.abs(recorded[own] - recorded[own - 1]).mean())
    return found
