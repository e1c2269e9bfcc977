"""Which precision fits which card: the memory of a call (memory.py) in 16 bits and by each recipe. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from xr0_engine.bench.cases import Setup
from xr0_engine.bench.step.memory import memory_need
from xr0_engine.bench.step.workload import Workload
from xr0_engine.model.quantization import RECIPES

CARDS_GB = (8, 12, 16, 24)
"""As cards are sold: each GB of theirs is 2^30 bytes."""
RESERVE = 2**30
"""Left free: for the CUDA context, what libraries take for themselves, and a screen. An assumption, not measured."""


@dataclass(frozen=True)
class Need:
    """One case in one precision, in bytes. recipe: None in 16 bits. beside: what a call holds beside the weights.

    cards: GB of those that have it, RESERVE left free.
    """

    case: str
    recipe: str | None
    weights: int
    beside: int
    cards: tuple[int, ...]


def needs(setups: Sequence[Setup]) -> list[Need]:
    """Of each setup: in its dtype and by every recipe, or as a quantised checkpoint is. Raises ValueError for what is
    wrong in a setup, CheckpointError for a checkpoint that cannot be used."""
    found = []
    for setup in setups:
        config, work = Workload.of_case(setup)
        _, own = setup.layers_in_8bit(config)
        for recipe in (None, *RECIPES) if own is None else (None,):
            layers, named = replace(setup, quantize=recipe).layers_in_8bit(config)
            need = memory_need(config, work, setup.dtype, layers)
            weights = sum(need.weights.values())
            cards = tuple(card for card in CARDS_GB if need.peak + RESERVE <= card * 2**30)
            found.append(Need(setup.case.name, named, weights, need.peak - weights, cards))
    return found


def run(setups: Sequence[Setup], as_json: bool) -> None:
    """`xr0 bench memory`. Raises as needs."""
    found = needs(setups)
    if as_json:
        print(json.dumps({"reserve": RESERVE, "needs": [asdict(need) for need in found]}))
        return
    dtype, console = setups[0].dtype, Console()
    table = Table("case", "precision", box=None, title="memory of a call, GiB, and cards that have it")
    for column in ("weights", "beside", "total", *(f"{card} GB" for card in CARDS_GB)):
        table.add_column(column, justify="right", no_wrap=True)
    for need in found:
        taken = (f"{count / 2**30:.2f}" for count in (need.weights, need.beside, need.weights + need.beside))
        fits = ("yes" if card in need.cards else "-" for card in CARDS_GB)
        table.add_row(need.case, need.recipe or dtype, *taken, *fits)
    console.print(table)
    console.print(
        f"What has no 8 bits is in {dtype}. Beside the weights, estimated: kept tables,\nKV block and activations, as "
        f"PyTorch's operators hold them. A card's GB is a\nGiB; {RESERVE / 2**30:g} GiB is left for the CUDA context, "
        "libraries and a screen: an assumption.",
        highlight=False,
    )
