"""A run's figures in the columns of published tables, for the published ones to stand below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from xr0_engine.evaluation.benchmark import Run
from xr0_engine.evaluation.intervals import Interval
from xr0_engine.evaluation.published import LIBERO_SUITES, TOTAL, Published, Unit, published
from xr0_engine.evaluation.rates import Condition, Rate, SuiteRate, is_expert, per_cent

MEAN = "mean"
LENGTH = "in a row"


@dataclass(frozen=True)
class Beside:
    """One table. title: of what. columns: their names, the one that sums the others up last. unit: of the last column;
    the others are per cent. ours: the run's figures, None where it has none. rows: published figures and what each has
    in the columns."""

    title: str
    columns: tuple[str, ...]
    unit: Unit
    ours: tuple[Interval | None, ...]
    rows: tuple[tuple[Published, tuple[float | None, ...]], ...]


def beside(run: Run, condition: Condition) -> tuple[Beside, ...]:
    """A condition's figures as papers tabulate them: a table for all suites, or one for each where a suite has columns
    of its own. Nothing stands beside an expert."""
    tables = _tables(run, condition)
    return tuple(replace(shown, rows=()) for shown in tables) if is_expert(run) else tables


def _tables(run: Run, condition: Condition) -> tuple[Beside, ...]:
    of_their_own = [
        _with_columns(run, name, suite) for name, suite in condition.suites.items() if suite.chains or suite.parts
    ]
    if of_their_own:
        return tuple(of_their_own)
    if condition.headline.unit == "pieces/min":
        (name,) = condition.suites
        figures = published(run.benchmark, name)
        rows = tuple((figure, (figure.value,)) for figure in figures)
        return (Beside(name, ("a minute",), "pieces/min", (condition.headline.value,), rows),)
    return (_of_suites(run, condition),)


def _of_suites(run: Run, condition: Condition) -> Beside:
    """A column for each suite, and their mean; published figures of one policy in one row."""
    columns = {name: published(run.benchmark, name) for name in condition.suites}
    ours = [per_cent(suite.mean) for suite in condition.suites.values()]
    if len(columns) > 1:
        columns[MEAN] = published(run.benchmark, TOTAL) if _complete(run, condition) else ()
        ours.append(per_cent(condition.total))
    # In the order of the last column that any has.
    known = [figures for figures in columns.values() if figures]
    leading = known[-1] if known else ()
    policies = dict.fromkeys(figure.policy for figures in (leading, *known) for figure in figures)
    found: dict[str, Mapping[str, Published]] = {
        name: {figure.policy: figure for figure in figures} for name, figures in columns.items()
    }
    rows = []
    for policy in policies:
        each = [found[name].get(policy) for name in columns]
        last = next(figure for figure in reversed(each) if figure is not None)
        rows.append((last, tuple(None if figure is None else figure.value for figure in each)))
    title = next(iter(columns)) if len(columns) == 1 else "suites"
    return Beside(title, tuple(columns), "%", tuple(ours), tuple(rows))


def _with_columns(run: Run, name: str, suite: SuiteRate) -> Beside:
    """A suite whose tasks, or places in a chain, are the columns."""
    figures = published(run.benchmark, name)
    parts: dict[str, Rate] = dict(suite.parts)
    last, value = MEAN, per_cent(suite.mean)
    unit: Unit = "%"
    if suite.chains is not None:
        parts = {str(place): rate for place, rate in enumerate(suite.chains.positions, 1)}
        last, value, unit = LENGTH, suite.chains.mean, "tasks in a row"
    listed = dict.fromkeys(part for figure in figures for part in figure.parts or ())
    columns = [part for part in listed if part in parts] + [part for part in parts if part not in listed]
    return Beside(
        name,
        (*columns, last),
        unit,
        (*(per_cent(parts[part].interval) for part in columns), value),
        tuple(
            (figure, (*((figure.parts or {}).get(part) for part in columns), figure.value))
            for figure in figures
            if figure.unit == unit
        ),
    )


def _complete(run: Run, condition: Condition) -> bool:
    """Whether the suites are those that a published mean is over."""
    names = {name.removeprefix(f"{run.benchmark}_") for name in condition.suites}
    return run.benchmark == "libero" and names == set(LIBERO_SUITES)
