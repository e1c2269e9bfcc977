"""Recipe `auto`: which layers may have 8 bits within a gate, and which had to be left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xr0_engine.engine import Engine
from xr0_engine.model.quantization import Format, shared_input
from xr0_engine.quantize.fidelity import Fidelity, compare, layers_alone
from xr0_engine.quantize.gate import Gate
from xr0_engine.quantize.samples import Moment


@dataclass(frozen=True)
class Found:
    """layers: what has 8 bits. left: what the recipe began with and may not have, in words: layer -> why. tried: how
    many groups of layers were given back, and what that missed, in turn."""

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

    First layers whose input has 8 bits too go back to 8-bit weights alone, the one whose output is furthest off first,
    those that read one input together; then to 16 bits, likewise. How many is found by bisection, since the more go
    back the nearer it is. done: called as compare has it, some ten times. Raises ValueError if not even the last of
    them helps.
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
            f"--recipe auto: with {' and '.join(order[-1][0])} alone in 8 bits the gate is missed still: "
            f"{'; '.join(tried[-1][1])}: it asks for more than rounding allows, or the moments are not this robot's"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    left: dict[str, str] = {}
    for together, format, error in order[:high]:
        kept = "8-bit weights, rows in 16" if format else "16 bits"
        left |= dict.fromkeys(together, f"{kept}: by itself {error:.2%} off")
    return Found(_given_back(layers, order[:high]), passing[high], left, tuple(tried))


_Step = tuple[tuple[str, ...], Format | None, float]
"""Layers that read one input, which kernels multiply at once; what they are given back to (None: 16 bits), and how far
off the worst of them was in the mean."""


def _order(engine: Engine, layers: Mapping[str, Format], moments: Sequence[Moment]) -> list[_Step]:
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(shared_input(layer), []).append(layer)

    def worst_first(given: Mapping[str, Format]) -> list[tuple[tuple[str, ...], float]]:
        errors = layers_alone(engine, given, moments).errors
        found = [(tuple(group), max(errors[layer].mean for layer in group)) for group in groups.values()]
        return sorted(found, key=lambda each: -each[1])

    weights: dict[str, Format] = dict.fromkeys(layers, "int8-weights")
    rows = [(group, error) for group, error in worst_first(layers) if layers[group[0]] != "int8-weights"]
    first: list[_Step] = [(group, "int8-weights", error) for group, error in rows]
    return [*first, *((group, None, error) for group, error in worst_first(weights))]


def _given_back(layers: Mapping[str, Format], steps: Sequence[_Step]) -> dict[str, Format]:
    found = dict(layers)
    for together, format, _ in steps:
        for layer in together:
            if format is None:
                del found[layer]
            else:
                found[layer] = format
    return found
