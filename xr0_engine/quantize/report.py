"""What is told of a quantised checkpoint: fidelity.json and fidelity.html in its folder, and lines for a terminal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from xr0_engine.bench.tell.page import document, folded, table
from xr0_engine.model.quantization import Format
from xr0_engine.quantize.fidelity import Fidelity, Spread
from xr0_engine.quantize.gate import Gate

JSON_FILE, PAGE_FILE = "fidelity.json", "fidelity.html"
WORST_LAYERS = 12


@dataclass(frozen=True)
class Report:
    """bytes_before, bytes_after: of what inference reads. dtype: of the 16 bits. moments_of: names of the recordings.
    gate: None asks for nothing. left: see search.Found."""

    recipe: str
    source: str
    dtype: str
    layers: Mapping[str, Format]
    bytes_before: int
    bytes_after: int
    moments_of: Sequence[str]
    fidelity: Fidelity
    gate: Gate | None
    left: Mapping[str, str]

    @property
    def missed(self) -> list[str]:
        return [] if self.gate is None else self.gate.missed(self.fidelity)

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "recipe": self.recipe,
            "source": self.source,
            "dtype": self.dtype,
            "formats": dict(Counter(self.layers.values())),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "moments_of": list(self.moments_of),
            "gate": None if self.gate is None else asdict(self.gate),
            "missed": self.missed,
            "left": dict(self.left),
            **self.fidelity.as_json(),
        }

    def write(self, folder: Path) -> None:
        (folder / JSON_FILE).write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        (folder / PAGE_FILE).write_text(self.page(), encoding="utf-8")

    def rows(self) -> list[tuple[str, str, str]]:
        """What, mean, worst."""
        found = self.fidelity
        rows = [
            ("cosine of the chunks", f"{found.cosine.mean:.6f}", f"{found.cosine.worst:.6f}"),
            ("largest difference, model's units", *_two(found.error)),
        ]
        if found.exported is not None:
            rows.insert(1, ("cosine of the chunks, rows by constants, as exported", *_two(found.exported, ".6f")))
        rows += [(f"largest difference, {unit}", *_two(spread)) for unit, spread in found.units.items()]
        rows += [(f"from the recording, {name}", *_two(spread)) for name, spread in found.recorded.items()]
        rows += [(f"change at the seam, {name}", *_two(spread)) for name, spread in found.seam.items()]
        for name in ("VLM", "head"):
            rows.append((f"chunk, {name} alone in 8 bit", *_two(found.stages[f"chunk, {name} alone in 8 bit"], ".2%")))
        return rows

    def page(self) -> str:
        found = self.fidelity
        verdict = "".join(f'<p class="warning">{escape(each)}</p>' for each in self.missed)
        kept = f"{self.bytes_before / 2**20:.0f} MiB to {self.bytes_after / 2**20:.0f} MiB"
        header = (
            f"<h1>{escape(self.source)} in 8 bits</h1><p>Recipe {escape(self.recipe)}: {kept}, "
            f"{escape(_formats(self.layers))}. Compared with {escape(self.dtype)} on {found.moments} moments of "
            f"{escape(', '.join(self.moments_of))}, from the same noise.</p>{verdict}"
        )
        first = table(("", "mean", "worst"), [list(row) for row in self.rows()])
        stages = [
            (name, *_two(spread, ".2%")) for name, spread in found.stages.items() if not name.startswith("chunk, ")
        ]
        ordered = sorted(found.layers.items(), key=lambda each: -each[1].mean)
        layers = [(name, self.layers.get(name, "16 bit"), *_two(spread, ".2%")) for name, spread in ordered]
        parts = [
            f"<section><h2>Actions</h2>{first}<p class='note'>The seam is the change from the last action of a prefix "
            "of given ones to the first of the policy's own, in units of the training data's standard deviation.</p>"
            "</section>",
            "<section><h2>What the head reads</h2><p class='note'>Relative error, root mean square.</p>"
            + table(("", "mean", "worst"), stages)
            + "</section>",
            f"<section><h2>Layers by themselves</h2><p class='note'>For the input that each has in 16 bits; the "
            f"{min(WORST_LAYERS, len(layers))} furthest off.</p>"
            + table(("layer", "format", "mean", "worst"), layers[:WORST_LAYERS])
            + folded("all", table(("layer", "format", "mean", "worst"), layers))
            + "</section>",
        ]
        if self.left:
            rows = list(self.left.items())
            parts.insert(1, f"<section><h2>Left in 16 bits</h2>{table(('layer', 'why'), rows)}</section>")
        return document(f"{self.source} in 8 bits", header, "\n".join(parts))


def _two(spread: Spread, form: str = ".4g") -> tuple[str, str]:
    return format(spread.mean, form), format(spread.worst, form)


def _formats(layers: Mapping[str, Format]) -> str:
    return ", ".join(f"{count} layers {name}" for name, count in Counter(layers.values()).items()) or "no layer"
