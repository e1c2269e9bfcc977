"""The table of docs/benchmarks.md: what the committed predictions of before and after say, nothing else."""

from __future__ import annotations

from itertools import product

import pytest

from tests.support import ROOT
from xr0_engine.bench import results
from xr0_engine.bench.cases import find_case
from xr0_engine.bench.predict.figures import find_chip
from xr0_engine.bench.tell.predicted import CELLS, Row, stages

FOLDER = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
CHIPS, CASES = ("h200", "rtx4090", "rtx5090"), ("libero", "bimanual")
DAY = "2026-11-29"


def rows(chip: str, case: str) -> list[str]:
    before, after = (
        results.read(FOLDER / f"predicted-{DAY}-{when}-{chip}-{case}.json") for when in ("before", "after")
    )
    assert before.case == after.case
    assert before.facts["chip"] == after.facts["chip"] == chip
    assert before.facts["table"] is after.facts["table"] is None, "of the stated defaults"
    pairs = zip(stages(before.facts).items(), stages(after.facts).values(), strict=True)
    return [line(f"{chip}, {case}, {stage}", first, second) for (stage, first), second in pairs]


def line(name: str, before: Row, after: Row) -> str:
    """Columns as the document's: both, where they differ, as they are shown."""
    cells = []
    for column, (first, second) in zip(CELLS, zip(before.cells(), after.cells(), strict=True), strict=True):
        if column not in ("from", "to"):
            cells.append(first if first == second else f"{first} → {second}")
    return f"| {name} | {' | '.join(cells)} | {after.ms[0]:.2f} to {after.ms[2]:.2f} |"


@pytest.mark.parametrize(("chip", "case"), list(product(CHIPS, CASES)))
def test_the_document_says_what_the_predictions_say(chip, case):
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(f"| {chip}, {case}, ")] == rows(chip, case)


STREAMED_DAY = "2026-12-01"


def streamed_line(chip: str, case: str) -> str:
    """The flow alone, chained and streamed, and the whole step with either."""
    chained = results.read(FOLDER / f"predicted-{DAY}-after-{chip}-{case}.json").facts
    streamed = results.read(FOLDER / f"predicted-{STREAMED_DAY}-streamed-{chip}-{case}.json").facts
    assert (chained["part"], streamed["part"]) == ("chained", "streamed")
    assert streamed["table"] is None, "of the stated defaults"
    launches = [stages(facts)["flow"].launches for facts in (chained, streamed)]
    cells = [f"{launches[0]} → {launches[1]}"]
    for part in ("flow", "total"):
        low, central, high = streamed["ms"][part]
        cells += [f"{chained['ms'][part][1]:.2f} → {central:.2f}", f"{low:.2f} to {high:.2f}"]
        cells.append(f"{streamed['bound_ms'][part]:.2f}")
    return f"| {chip}, {case} | {' | '.join(cells)} |"


@pytest.mark.parametrize(("chip", "case"), list(product(CHIPS, CASES)))
def test_the_document_says_what_a_streamed_flow_is_predicted_to_take(chip, case):
    assert streamed_line(chip, case) in DOCUMENT.read_text(encoding="utf-8").splitlines()


def table_line(chip: str, case: str) -> str:
    """Vision and prefill by stated defaults and by the table, the flow, and the whole step: by defaults with a chained
    and with a streamed flow, and by the table."""
    chained = results.read(FOLDER / f"predicted-{DAY}-after-{chip}-{case}.json").facts
    streamed, table = (
        results.read(FOLDER / f"predicted-{STREAMED_DAY}-{way}-{chip}-{case}.json").facts
        for way in ("streamed", "tables")
    )
    assert (table["part"], table["table"]) == ("streamed", f"sm_{find_chip(chip).arch}.json")
    cells = [f"{streamed['ms'][stage][1]:.2f} → {table['ms'][stage][1]:.2f}" for stage in ("vision", "prefill")]
    low, _, high = table["ms"]["total"]
    steps = (facts["ms"]["total"][1] for facts in (chained, streamed, table))
    cells += [f"{table['ms']['flow'][1]:.2f}", " → ".join(f"{step:.2f}" for step in steps), f"{low:.2f} to {high:.2f}"]
    return f"| {chip}, {case} | {' | '.join(cells)} | {table['bound_ms']['total']:.2f} |"


def kept_line(chip: str, case: str) -> str:
    """By a table, of a first call, and by today's of a later one, whose prompt's head is kept."""
    first, later = (
        results.read(FOLDER / f"predicted-{STREAMED_DAY}-{way}-{chip}-{case}.json").facts for way in ("tables", "kept")
    )
    assert (later["part"], later["table"]) == ("streamed", first["table"])
    assert later["kept_tokens"] == find_case(case).preamble_tokens
    parts = ("vision", "prefill", "flow", "total")
    cells = [f"{first['ms'][part][1]:.2f} → {later['ms'][part][1]:.2f}" for part in parts]
    low, _, high = later["ms"]["total"]
    bounds = [f"{facts['bound_ms']['total']:.2f}" for facts in (first, later)]
    return f"| {chip}, {case} | {' | '.join(cells)} | {low:.2f} to {high:.2f} | {' → '.join(dict.fromkeys(bounds))} |"


@pytest.mark.parametrize(("chip", "case"), list(product(CHIPS, CASES)))
def test_the_document_says_what_a_later_call_is_predicted_to_take(chip, case):
    assert kept_line(chip, case) in DOCUMENT.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("chip", "case"), list(product(CHIPS, CASES)))
def test_the_document_says_what_the_tables_are_predicted_to_take(chip, case):
    assert table_line(chip, case) in DOCUMENT.read_text(encoding="utf-8").splitlines()
