"""Speed and fidelity side by side: what 8 bits gain on a machine, and how far the actions are from those in 16."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from xr0_engine.bench.results import Result, Series
from xr0_engine.bench.tell.charts import milliseconds
from xr0_engine.bench.tell.page import table
from xr0_engine.bench.tell.tables import size
from xr0_engine.bench.timing import ratio_with_spread

HEAD = ["", "precision", "p50, ms", "time / engine", "weights", "cosine", "largest difference"]
OURS, TOTAL = "engine", "total"
RANDOM = (
    "Cosine and largest difference (the model's units) of one chunk of this run and the engine's. Whether a policy is "
    "good enough in 8 bits is told by recordings: xr0 quantize --calibrate."
)


def speed_and_fidelity(result: Result, series: Series) -> str:
    """HTML of a result that has 8 bits in it, else nothing."""
    facts = result.facts
    if "agreement" not in facts and "compared" not in facts:
        return ""
    rows = [_row(name, precision, facts, series) for name, precision in facts["precision"].items() if name in series]
    notes = [RANDOM] if "agreement" in facts else []
    if (compared := facts.get("compared")) is not None:
        notes.append(_told(compared))
    text = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"<h3>Speed and fidelity</h3>{table(HEAD, rows)}{text}"


def _row(name: str, precision: str, facts: Mapping[str, Any], series: Series) -> list[str]:
    samples = np.asarray(series[name][TOTAL])
    ratio = "–"
    if name != OURS and OURS in series:
        middle, low, high = ratio_with_spread(samples, np.asarray(series[OURS][TOTAL]))
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    apart = facts.get("agreement", {}).get(name)
    found = ["–", "–"] if apart is None else [f"{apart['cosine']:.6f}", f"{apart['largest_difference']:.4f}"]
    return [name, precision, milliseconds(float(np.median(samples))), ratio, size(facts["weights_bytes"][name]), *found]


def _told(compared: Mapping[str, Any]) -> str:
    """What the folder's own comparison found, as `compared` in facts holds it."""
    units = "".join(f", {unit} {each['mean']:.3g}, {each['worst']:.3g}" for unit, each in compared["units"].items())
    return (
        f"On {compared['moments']} recorded moments, when it was made, against 16 bits: cosine "
        f"{compared['cosine']['mean']:.6f}, at worst {compared['cosine']['worst']:.6f}; largest difference, mean and "
        f"worst: {compared['error']['mean']:.3g}, {compared['error']['worst']:.3g} of the model's units{units}."
    )
