"""The model against what others measured: `xr0 bench predict --validate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from xr0_engine.bench.predict.figures import Chip, find_chip
from xr0_engine.bench.predict.model import Launched, launch_time, spread
from xr0_engine.bench.predict.published import POINTS, Peer, Product, pi0
from xr0_engine.bench.predict.run import told_environment
from xr0_engine.bench.predict.work import Work, fits, op_work
from xr0_engine.bench.results import Result
from xr0_engine.bench.step.candidates import tiles
from xr0_engine.fused.ops import Tactic

TILES = tuple(
    Tactic(m, n, 64, split, 8 if m * n >= 128 * 128 else 4, stages)
    for m in (16, 32, 64, 128)
    for n in (32, 64, 128, 256)
    for split in (1, 2, 4, 8)
    for stages in (2, 3, 4)
)
"""What stands in for a library's choice."""


def _best(works: Iterable[Work], chip: Chip) -> Work:
    """The fastest at the chip's central figures."""
    at = chip.settings()[0]
    fitting = [work for work in works if fits(work, chip.arch)]
    return min(fitting, key=lambda work: launch_time(Launched(work, dependent=False), chip, at).total_s)


def _product(point: Product, chip: Chip) -> tuple[float, float, float]:
    shape = (point.rows, point.copies * point.outputs, point.inputs)
    options: dict[str, Any] = {}

    def work(tactic: Tactic) -> Work:
        found = op_work("linear", shape, tactic, options=options)
        factor = point.bytes / 2
        x_bytes = point.rows * point.inputs * point.bytes * (point.copies if point.cold else point.copies - 1)
        return replace(
            found,
            mma_operations=found.mma_operations * factor,
            l2_bytes=found.l2_bytes * factor,
            block_bytes=found.block_bytes * factor,
            shared=int(found.shared * factor),
            memory_bytes=found.memory_bytes * factor + x_bytes,
        )

    launched = Launched(_best(map(work, TILES), chip), dependent=False)
    return _us(spread([launch_time(launched, chip, at).total_s for at in chip.settings()]))


def _peer(point: Peer, chip: Chip) -> tuple[float, float, float]:
    chain: list[tuple[Launched, int]] = []
    for kind, shape, count in pi0(point.views):
        tried = (
            TILES
            if kind in ("linear", "swiglu", "qkv")
            else tiles(kind, shape, Tactic(block_m=16, block_n=16, stages=2), chip.processors)
        )
        tactics = (replace(t, block_n=max(16, t.block_n // 2)) if kind == "swiglu" else t for t in tried)
        works = (op_work(kind, shape, tactic) for tactic in tactics if not tactic.library)
        chain.append((Launched(_best(works, chip), dependent=False), count))
    totals = [sum(launch_time(each, chip, at).total_s * n for each, n in chain) for at in chip.settings()]
    return _us(spread(totals))


def _us(seconds: tuple[float, float, float]) -> tuple[float, float, float]:
    low, central, high = seconds
    return 1e6 * low, 1e6 * central, 1e6 * high


def measure(command: str) -> Result:
    """A Result of kind predict: every published point, predicted beside published."""
    points: list[dict[str, Any]] = []
    for point in POINTS:
        chip = find_chip(point.chip)
        predicted = _product(point, chip) if isinstance(point, Product) else _peer(point, chip)
        points.append(
            {
                "chip": point.chip,
                "what": point.what,
                "published_us": point.us,
                "predicted_us": list(predicted),
                "used": point.used,
                "source": point.source,
            }
        )
    held = [each for each in points if not each["used"]]
    errors = [abs(each["predicted_us"][1] / each["published_us"] - 1) for each in held]
    inside = [each["predicted_us"][0] <= each["published_us"] <= each["predicted_us"][2] for each in held]
    return Result(
        kind="predict",
        command=command,
        environment=told_environment("published kernels"),
        case={"name": "published"},
        boundary="kernel",
        backend="none",
        series={},
        facts={
            "predicted": True,
            "part": "validation",
            "points": points,
            "held_back": len(held),
            "median_error": median(errors),
            "worst_error": max(errors),
            "inside_range": sum(inside) / len(inside),
        },
    )


def show(result: Result) -> None:
    facts = result.facts
    view = Table("chip", "kernel", "published", "predicted", "from", "to", "error", "source", box=None)
    for each in facts["points"]:
        low, central, high = each["predicted_us"]
        error = f"{central / each['published_us'] - 1:+.0%}" + (" used" if each["used"] else "")
        numbers = (f"{value:.1f}" for value in (each["published_us"], central, low, high))
        view.add_row(each["chip"], each["what"], *numbers, error, each["source"])
    console = Console(width=150)
    console.print(view)
    console.print(
        f"Microseconds. Of {facts['held_back']} points held back: median error {facts['median_error']:.0%}, worst "
        f"{facts['worst_error']:.0%}, {facts['inside_range']:.0%} within the range. Used: the point gave one of the "
        "chip's figures.",
        highlight=False,
    )
