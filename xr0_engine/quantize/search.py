"""Recipe `auto`: which layers may have 8 bits within a gate, and which had to be left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xr0_engine.engine import Engine
from xr0_engine.model.quantization import Format
from xr0_engine.quantize.fidelity import Fidelity, Spread, compare, layers_alone
from xr0_engine.quantize.gate import Gate
from xr0_engine.quantize.samples import Moment


@dataclass(frozen=True)
class Found:
    """layers: what has 8 bits. left: what the recipe began with and may not have, in words: layer -> why. tried: how
    many layers were given back, and what that missed, in turn."""

    layers: dict[str, Format]
    fidelity: Fidelity
    left: dict[str, str]
    tried: tuple[tuple[int, tuple[str, ...]], ...]


def search(
    engine: Engine,
    layers: Mapping[str, Format],
    moments: Sequence[Moment],
    gate: Gate,
    done: Callable[[], None] = lambda: None,
) -> Found:
    """The most of `layers` that keeps to the gate, as far as the order by their own errors tells.

    First layers whose input has 8 bits too go back to 8-bit weights alone, the one whose output is furthest off first;
    then to 16 bits, likewise. How many is found by bisection, since the more go back the nearer it is. done: called as
    compare has it, some ten times. Raises ValueError if not even the last of them helps.
    """
    order = _order(engine, layers, moments)
    tried: list[tuple[int, tuple[str, ...]]] = []
    passing: dict[int, Fidelity] = {}

    def passes(count: int) -> bool:
        fidelity = compare(engine, _given_back(layers, order[:count]), moments, done)
        missed = gate.missed(fidelity)
        tried.append((count, tuple(missed)))
        if not missed:
            passing[count] = fidelity
        return not missed

    low, high = 0, len(order) - 1
    if passes(0):
        high = 0
    elif not passes(high):
        raise ValueError(
            f"--recipe auto: with one layer in 8 bits the gate is missed still: {'; '.join(tried[-1][1])}: it asks for "
            "more than rounding allows, or the moments are not this robot's"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    left: dict[str, str] = {}
    for layer, format, error in order[:high]:
        kept = "8-bit weights, rows in 16" if format else "16 bits"
        left[layer] = f"{kept}: by itself {error.mean:.2%} off"
    return Found(_given_back(layers, order[:high]), passing[high], left, tuple(tried))


_Step = tuple[str, Format | None, Spread]
"""A layer, what it is given back to (None: 16 bits), and how far off it was."""


def _order(engine: Engine, layers: Mapping[str, Format], moments: Sequence[Moment]) -> list[_Step]:
    def worst_first(errors: Mapping[str, Spread]) -> list[str]:
        return sorted(errors, key=lambda layer: -errors[layer].mean)

    first = layers_alone(engine, layers, moments).errors
    weights: dict[str, Format] = dict.fromkeys(layers, "int8-weights")
    second = layers_alone(engine, weights, moments).errors
    steps: list[_Step] = [
        (layer, "int8-weights", first[layer]) for layer in worst_first(first) if layers[layer] != "int8-weights"
    ]
    return [*steps, *((layer, None, second[layer]) for layer in worst_first(second))]


def _given_back(layers: Mapping[str, Format], steps: Sequence[_Step]) -> dict[str, Format]:
    found = dict(layers)
    for layer, format, _ in steps:
        if format is None:
            del found[layer]
        else:
            found[layer] = format
    return found
