"""Products of nearly as many rows as one that a table of tactics has: prompts have all lengths, a table a few."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from xr0_engine.kernels.arguments import Tactic

PRODUCTS = ("linear", "swiglu", "qkv")
SKINNY_ROWS = 64
"""Up to so many rows a tile has all of them: another number is another tile."""
NEAR_ROWS = 4 / 3
"""A product of so many times as many rows is no neighbour any more."""


class Neighbours:
    """tactics: key (ops.tactic_key) -> tactic; kept: keys whose default was not beaten."""

    def __init__(self, tactics: Mapping[str, Tactic], kept: Collection[str]) -> None:
        self._known: dict[tuple[str, str], dict[int, Tactic | None]] = {}
        for key in (*kept, *tactics):
            if (product := _product_of(key)) is not None:
                rows, others = product
                self._known.setdefault(others, {})[rows] = tactics.get(key)

    def of(self, key: str) -> Tactic | None:
        """The tactic of the same product for as nearly as many rows as there are; None if none is near, or if nothing
        beat the default of that, be it the key itself."""
        if (product := _product_of(key)) is None:
            return None
        rows, others = product
        near = {
            apart: tactic
            for known, tactic in self._known.get(others, {}).items()
            if min(known, rows) > SKINNY_ROWS and (apart := abs(math.log(known / rows))) <= math.log(NEAR_ROWS)
        }
        return near[min(near)] if near else None


def _product_of(key: str) -> tuple[int, tuple[str, str]] | None:
    """(rows, what else tells it) of a product's key, None for what is none."""
    kind, _, rest = key.partition(" ")
    rows, _, others = rest.partition("x")
    return (int(rows), (kind, others)) if kind in PRODUCTS and rows.isdecimal() else None
