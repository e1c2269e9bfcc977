"""The whole of it: load, compare, write. What `xr0 quantize` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from xr0_engine.backend import resolve_dtype
from xr0_engine.config import ModelConfig
from xr0_engine.engine import Engine
from xr0_engine.model.quantization import quantized_layers
from xr0_engine.model.weights import check_model, inference_shapes, read_index, resolve_checkpoint
from xr0_engine.quantize.fidelity import PASSES, as_exported, compare, layers_alone
from xr0_engine.quantize.folder import quantized_sizes, write_quantized
from xr0_engine.quantize.gate import Gate
from xr0_engine.quantize.report import Report
from xr0_engine.quantize.samples import read_moments
from xr0_engine.quantize.search import search
from xr0_engine.robot.embodiment import checkpoint_embodiment
from xr0_engine.whole import refuse_used, whole_folder

AUTO, AUTO_BEGINS = "auto", "int8"


def make(
    checkpoint: str | Path,
    out: Path,
    recipe: str,
    datasets: Sequence[Path] = (),
    count: int = 16,
    gate: Path | None = None,
    device: str = "auto",
    dtype: str = "bfloat16",
) -> Report | None:
    """Write a quantised checkpoint to the folder `out`, which appears whole or not at all; not if a gate is missed.

    recipe: of model/quantization.py: RECIPES, or auto. datasets: recordings to compare on, `count` moments of each;
    without, nothing is compared and None is returned. gate: file of budgets; None has the default ones for auto, and
    none for another recipe. device, dtype: of the comparison. Raises ValueError for a wrong argument or a folder that
    holds something, CheckpointError, DataError, OSError if the disk lacks the room.
    """
    refuse_used(out)
    budgets = None if gate is None else Gate.load(gate)
    folder = resolve_checkpoint(checkpoint)
    # A hub's folder is named as its commit.
    source = folder.resolve().name if Path(checkpoint).expanduser().is_dir() else str(checkpoint)
    config, stored = ModelConfig.load(folder), read_index(folder)
    check_model(config, stored)
    shapes = inference_shapes(config)
    layers = quantized_layers(AUTO_BEGINS if recipe == AUTO else recipe, shapes)
    report, largest = None, dict[str, tuple[float, ...]]()
    if datasets:
        engine = Engine.from_pretrained(folder, device, dtype, "reference")
        moments = read_moments(engine, checkpoint_embodiment(folder), datasets, count)
        with _progress(len(moments), AUTO if recipe == AUTO else "comparing") as done:
            left: dict[str, str] = {}
            if recipe == AUTO:
                found = search(engine, layers, moments, budgets or Gate(), done)
                layers, fidelity, left = found.layers, found.fidelity, found.left
            else:
                fidelity = compare(engine, layers, moments, done)
        alone = layers_alone(engine, layers, moments)
        largest = alone.largest
        exported = as_exported(engine, layers, largest, moments)
        fidelity = replace(fidelity, layers=alone.errors, exported=exported)
        sizes = quantized_sizes(config, stored, layers)
        asked = budgets or (Gate() if recipe == AUTO else None)
        before = sum(stored[name].num_bytes for name in shapes)
        report = Report(
            recipe, source, dtype, layers, before, sum(sizes.values()), [path.name for path in datasets],
            fidelity, asked, left,
        )  # fmt: skip
        if report.missed:
            return report
        del engine
    with whole_folder(out, sum(quantized_sizes(config, stored, layers).values())) as partial:
        compared = resolve_dtype(dtype) if datasets else None
        write_quantized(folder, partial, recipe, layers, largest, source, compared)
        if report is not None:
            report.write(partial)
    return report


@contextmanager
def _progress(moments: int, what: str) -> Iterator[Callable[[], None]]:
    """For a terminal; what is called when a moment is done in one pass."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        # A search does not know how often it will compare.
        total = None if what == AUTO else moments * PASSES
        bar = progress.add_task(what, total=total)
        yield lambda: progress.advance(bar)
