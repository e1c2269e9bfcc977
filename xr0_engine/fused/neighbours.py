"""Ops of nearly as many rows or keys as one that a table of tactics has: prompts have all lengths, a table a few."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from xr0_engine.kernels.arguments import Tactic

LENGTHS = {"linear": (0,), "swiglu": (0,), "qkv": (0,), "attention": (2, 4)}
"""Kind -> where in its shape (ops.tactic_key) stands what the length of a prompt decides: a product's rows; queries and
keys. Not of lambda_attention, whose default holds as many keys as registers do."""
PRODUCTS = ("linear", "swiglu", "qkv")
SKINNY_ROWS = 64
"""Up to so many rows a product's tile has all of them: another number is another tile."""
NEAR = 4 / 3
"""What is so many times as long is no neighbour any more."""


class Neighbours:
    """tactics: key (ops.tactic_key) -> tactic; kept: keys whose default was not beaten."""

    def __init__(self, tactics: Mapping[str, Tactic], kept: Collection[str]) -> None:
        self._known: dict[tuple[str, ...], dict[tuple[int, ...], Tactic | None]] = {}
        for key in (*kept, *tactics):
            if (parted := _parted(key)) is not None:
                lengths, others = parted
                self._known.setdefault(others, {})[lengths] = tactics.get(key)

    def of(self, key: str) -> Tactic | None:
        """The tactic of the same op for as nearly as many rows and keys as there are; None if none is near, or if
        nothing beat the default of that, be it the key itself."""
        if (parted := _parted(key)) is None:
            return None
        lengths, others = parted
        near = {
            apart: tactic
            for known, tactic in self._known.get(others, {}).items()
            if (apart := _apart(known, lengths)) <= math.log(NEAR)
        }
        return near[min(near)] if near else None


def _apart(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    return max(abs(math.log(first / second)) for first, second in zip(one, other, strict=True))


def _parted(key: str) -> tuple[tuple[int, ...], tuple[str, ...]] | None:
    """(lengths, what else tells the op) of a key, None for one that has no neighbours."""
    kind, _, rest = key.partition(" ")
    sizes, _, dtype = rest.partition(" ")
    shape = sizes.split("x")
    places = LENGTHS.get(kind, ())
    if not places or len(shape) <= max(places) or not all(size.isdecimal() and int(size) for size in shape):
        return None
    lengths = tuple(int(shape[place]) for place in places)
    if kind in PRODUCTS and lengths[0] <= SKINNY_ROWS:
        return None
    others = (size for place, size in enumerate(shape) if place not in places)
    return lengths, (kind, *others, dtype)
