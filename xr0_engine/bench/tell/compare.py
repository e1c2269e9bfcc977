"""A regression gate: is B slower than A, beyond what the machine's own noise explains?

Best is A, B and A again in one run: only what is slower than both A's, beyond their own disagreement, is B's doing.
With A and B alone, the disagreement is that of each run's two halves.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.bench import results
from xr0_engine.bench.results import Result, Series

ROLES = ("A", "B", "A2")
OURS = "engine"
"""The series that is gated where a result has several: a rival that got slower is no regression of ours."""

SAME_MACHINE = ("device", "processor", "cores", "threads", "emulated")
FALSE_ALARMS = 0.01
"""Share of comparisons of equal builds with independent noise that may call anything slower, all rows together."""
FEWEST_ROUNDS = 6
"""Two equal builds of so many rounds each fall wholly apart once in 924 times; with fewer, chance would alarm."""
RESAMPLES = 10_000
SEED = 0

# Not resolved: bench/ is a link in a checkout, and a folder of the package elsewhere.
HERE = Path(__file__).parents[3]

# The engine's command of another checkout, whatever is installed: the checkout comes first on the path.
_CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from xr0_engine.cli import main; main()"


@dataclass(frozen=True)
class Row:
    """One stage of one series.

    a_ms: medians of A, and of A again if there is one. b_ms: median of B. ratio: b_ms over the nearest A's median: the
    slower A, or the faster one if B is faster than both. low, high: its confidence interval. noise: how far the A's (or
    a run's halves) lie apart, as a ratio of at least 1. verdict: slower, faster, same, or unclear: beyond the limit,
    but chance alone would explain it.
    """

    series: str
    stage: str
    a_ms: tuple[float, ...]
    b_ms: float
    ratio: float
    low: float
    high: float
    noise: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """threshold: 0.05 for 5 %. against: where the noise was estimated from. commits: of A, B and A again.

    notes: what differs between the runs, or was left out, and does not forbid the comparison.
    """

    threshold: float
    against: str
    commits: tuple[str | None, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def slower(self) -> bool:
        return any(row.verdict == "slower" for row in self.rows)


def run(
    arguments: Sequence[str],
    threshold: str = "5%",
    series: str | None = None,
    run_against: Path | None = None,
    repeats: int = 2,
    json_file: Path | None = None,
) -> int:
    """`xr0 bench compare`: prints the table; returns the exit code, 1 if B is slower past the threshold.

    arguments: result files; with run_against, options of `xr0 bench latency`. Raises ValueError for files that cannot
    be compared, OSError, RuntimeError if a measurement fails.
    """
    limit = parse_threshold(threshold)
    if run_against is not None:
        runs = measure_against(run_against, arguments, repeats)
    else:
        runs = [results.read(Path(file)) for file in arguments]
    comparison = compare(runs, limit, series)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(comparison) | {"slower": comparison.slower}, indent=1) + "\n")
    _print(comparison)
    return int(comparison.slower)


def parse_threshold(text: str) -> float:
    """ "5%" or "0.05" -> 0.05. Raises ValueError."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise ValueError(f"--threshold: expected a share such as 5% or 0.05, got {text!r}")
    return value


def compare(runs: Sequence[Result], threshold: float = 0.05, series: str | None = None) -> Comparison:
    """runs: A and B; A, B and A again; or one result whose series are named A, B and, if it has one, A2.

    series: which of the files' series; None for the engine's, or for all if that is not among them.
    Raises ValueError, naming what differs, for runs that cannot be compared.
    """
    if not 1 <= len(runs) <= 3:
        raise ValueError(f"results: expected A B, A B A, or one file with series A, B and A2; got {len(runs)} files")
    notes = _check_comparable(runs)
    if len(runs) == 1:
        taken: list[Series] = [{"": runs[0].series[role]} for role in ROLES if role in runs[0].series]
        if not {"A", "B"} <= runs[0].series.keys():
            raise ValueError(f"a single result needs series named A, B and A2, got {', '.join(runs[0].series)}")
    else:
        taken = [_chosen(role, result, series) for role, result in zip(ROLES, runs, strict=False)]
    pairs, left_out = _common(taken)
    rows = tuple(
        _row(name, stage, [np.asarray(one[name][stage], np.float64) for one in taken], threshold, len(pairs))
        for name, stage in pairs
    )
    return Comparison(
        threshold,
        "A, B and A again" if len(taken) == 3 else "the halves of each run",
        tuple(result.commit for result in runs),
        (*notes, *left_out),
        rows,
    )


def measure_against(checkout: Path, options: Sequence[str], repeats: int) -> list[Result]:
    """A (the checkout), B (this one) and A again, each measured by `xr0 bench latency` in processes that take turns.

    Raises ValueError for a folder that is no checkout or was built otherwise, RuntimeError if a measurement fails.
    """
    folders = {"A": checkout.resolve(), "B": HERE, "A2": checkout.resolve()}
    if not (folders["A"] / "xr0_engine" / "bench" / "results.py").is_file():
        raise ValueError(f"--run-against: expected a checkout of xr0-engine that has `xr0 bench`, got {checkout}")
    if _has_native(folders["A"]) != _has_native(HERE):
        lacking = HERE if _has_native(folders["A"]) else folders["A"]
        raise ValueError(
            f"--run-against: one checkout has the native module, {lacking} has not: "
            f"run `python setup.py build_ext --inplace` there"
        )
    measured: dict[str, list[Result]] = {role: [] for role in ROLES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            for role in ROLES[:: 1 if number % 2 == 0 else -1]:
                file = Path(folder) / f"{role}-{number}.json"
                command = [sys.executable, "-c", _CHILD, str(folders[role]), "bench", "latency", *options]
                done = subprocess.run([*command, "--json", str(file)], stdout=subprocess.DEVNULL)
                if done.returncode:
                    raise RuntimeError(f"`xr0 bench latency` failed in {folders[role]} with code {done.returncode}")
                measured[role].append(results.read(file))
    return [_joined(measured[role]) for role in ROLES]


def _has_native(checkout: Path) -> bool:
    return any((checkout / "xr0_engine").glob("_C*.so"))


def _joined(parts: Sequence[Result]) -> Result:
    """The rounds of several processes as one result."""
    series = {
        name: {stage: [value for part in parts for value in part.series[name][stage]] for stage in stages}
        for name, stages in parts[0].series.items()
    }
    return replace(parts[0], series=series, complete=all(part.complete for part in parts))


def _check_comparable(runs: Sequence[Result]) -> list[str]:
    """Raises ValueError with every reason not to compare; returns what merely differs."""
    first, faults, notes = runs[0], [], []
    for role, result in zip(ROLES, runs, strict=False):
        if not result.complete:
            faults.append(f"{role} is incomplete: the run was interrupted")
    for role, other in zip(ROLES[1:], runs[1:], strict=False):
        for name in ("schema", "kind", "boundary", "backend"):
            faults += _difference(role, name, getattr(first, name), getattr(other, name))
        for name in sorted(first.case.keys() | other.case.keys()):
            faults += _difference(role, f"case: {name}", first.case.get(name), other.case.get(name))
        for name in sorted(first.environment.keys() | other.environment.keys()):
            difference = _difference(role, name, first.environment.get(name), other.environment.get(name))
            if name in SAME_MACHINE:
                faults += difference
            elif name != "clocks_mhz":
                notes += difference
    if faults:
        raise ValueError("these results cannot be compared: " + "; ".join(faults))
    return notes


def _difference(role: str, name: str, a: Any, b: Any) -> list[str]:
    return [] if a == b else [f"{name} is {a!r} in A, {b!r} in {role}"]


def _chosen(role: str, result: Result, series: str | None) -> Series:
    if series is not None and series not in result.series:
        raise ValueError(f"--series: {role} has {', '.join(result.series) or 'none'}; got {series!r}")
    wanted = series if series is not None else OURS if OURS in result.series else None
    return result.series if wanted is None else {wanted: result.series[wanted]}


def _common(taken: Sequence[Series]) -> tuple[list[tuple[str, str]], list[str]]:
    """(series, stage) that every run has, and notes of the others."""
    names = [[(name, stage) for name, stages in one.items() for stage in stages] for one in taken]
    common = [pair for pair in names[0] if all(pair in other for other in names)]
    if not common:
        raise ValueError("these results cannot be compared: they have no stage in common")
    others = dict.fromkeys(pair for one in names for pair in one if pair not in common)
    return common, [f"{_label(name, stage)} is not in every run: left out" for name, stage in others]


def _row(name: str, stage: str, runs: Sequence[np.ndarray], threshold: float, rows: int) -> Row:
    for role, samples in zip(ROLES, runs, strict=False):
        if len(samples) < FEWEST_ROUNDS:
            raise ValueError(
                f"{_label(name, stage)}: expected at least {FEWEST_ROUNDS} rounds to tell a change from noise, "
                f"{role} has {len(samples)}"
            )
        if not (samples > 0).all():
            raise ValueError(f"{_label(name, stage)}: {role} has rounds of no duration: nothing to compare")
    b = runs[1]
    references = sorted((runs[0], *runs[2:]), key=np.median)
    middles = [float(np.median(samples)) for samples in references]
    faster = bool(np.median(b) < middles[0])
    nearest = references[0 if faster else -1]
    noise = middles[-1] / middles[0] if len(runs) == 3 else max(_halves_apart(samples) for samples in runs)
    ratio = float(np.median(b) / np.median(nearest))
    generator = np.random.default_rng(SEED)
    spread = _resampled_medians(b, generator) / _resampled_medians(nearest, generator)
    low, high = np.quantile(spread, [FALSE_ALARMS / rows, 1 - FALSE_ALARMS / rows])
    certain = high < 1 if faster else low > 1
    beyond = max(ratio, 1 / ratio) > (1 + threshold) * noise
    verdict = "same" if not beyond else "unclear" if not certain else "faster" if faster else "slower"
    a_ms = tuple(float(np.median(samples)) for samples in (runs[0], *runs[2:]))
    return Row(name, stage, a_ms, float(np.median(b)), ratio, float(low), float(high), noise, verdict)


def _halves_apart(samples: np.ndarray) -> float:
    early, late = np.array_split(samples, 2)
    return float(np.exp(abs(np.log(np.median(early) / np.median(late)))))


def _resampled_medians(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(RESAMPLES,) medians of samples drawn anew from the samples: the bootstrap.

    The median of n places drawn evenly from 0 to 1 follows Beta((n + 1) / 2, (n + 1) / 2): it is drawn at once.
    """
    count = len(samples)
    places = generator.beta((count + 1) / 2, (count + 1) / 2, RESAMPLES)
    return np.sort(samples)[np.minimum((places * count).astype(int), count - 1)]


def _label(name: str, stage: str) -> str:
    return f"{name} {stage}".strip()


def _print(comparison: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours: Mapping[str, str] = {"slower": "red", "faster": "green", "unclear": "yellow", "same": "default"}
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage")
    for column in ("A ms", "B ms", "B / A", "interval", "noise", ""):
        table.add_column(column, justify="right", no_wrap=True)
    alone = len({row.series for row in comparison.rows}) == 1
    for row in comparison.rows:
        table.add_row(
            escape(_label("" if alone else row.series, row.stage)),
            ", ".join(f"{value:.4g}" for value in row.a_ms),
            f"{row.b_ms:.4g}",
            f"{row.ratio:.3f}",
            f"{row.low:.3f} to {row.high:.3f}",
            f"{row.noise - 1:.1%}",
            f"[{colours[row.verdict]}]{row.verdict}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"medians; intervals: {1 - FALSE_ALARMS:.0%}, all rows together; noise from {comparison.against}; "
        f"slower: beyond noise and {100 * comparison.threshold:.3g} %",
        highlight=False,
    )
    for note in comparison.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    if any(row.verdict == "unclear" for row in comparison.rows):
        console.print("unclear: past the limit, but within chance; measure more rounds")
    console.print("B is slower than A" if comparison.slower else "B is not slower than A")
