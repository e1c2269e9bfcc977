"""A predicted table: the model's best that compiles, or the default; what spills is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.support import ROOT
from xr0_engine.bench.predict import tables
from xr0_engine.bench.predict.code import Code
from xr0_engine.bench.predict.figures import CHIPS
from xr0_engine.bench.predict.step import Op
from xr0_engine.bench.step import candidates
from xr0_engine.fused.ops import Tactic
from xr0_engine.fused.tactics import read_tactics

pytest.importorskip("triton")

SLOW, FAST, SPILLING = (Tactic(64, width, 64, 1, 4, 4) for width in (32, 128, 256))
OP = Op("prefill", "linear", (208, 2560, 9728), SLOW)
CODE = Code("linear", 64 * 1024, 100, 0, 4)


@pytest.fixture
def search(monkeypatch):
    """Of three candidates and no others, whose code has nothing in it; the widest spills."""
    found = tables.Search(CHIPS["h200"])
    monkeypatch.setattr(found._ops, "default", lambda kind, shape, options: SLOW)
    monkeypatch.setattr(candidates, "tiles", lambda *asked: [SLOW, FAST, SPILLING])
    monkeypatch.setattr(candidates, "schedules", lambda *asked: [])
    monkeypatch.setattr(found, "_code", lambda op, tactic: None if tactic == SPILLING else CODE)
    return found


def test_the_fastest_that_compiles_is_chosen_and_the_default_is_told_beside_it(search):
    choice = search.choose(OP, "linear")
    assert (choice.tactic, choice.default) == (FAST, SLOW)
    assert list(choice.microseconds) == [candidates.name(FAST), candidates.name(SLOW)]
    assert choice.microseconds[candidates.name(FAST)] < choice.microseconds[candidates.name(SLOW)]


def test_what_spills_with_something_else_around_it_is_left_out(search, monkeypatch):
    """As a product whose residual has pictures' extra rows in some layers."""
    other = replace(OP, options={"residual": 1})
    monkeypatch.setattr(search, "_code", lambda op, tactic: None if (op, tactic) == (other, FAST) else CODE)
    monkeypatch.setattr(candidates, "tiles", lambda *asked: [SLOW, FAST])
    assert search.choose(OP, "linear").tactic == FAST
    assert search.choose(OP, "linear", [other]).tactic == SLOW


def test_a_little_faster_is_not_enough(search, monkeypatch):
    monkeypatch.setattr(tables, "MATTERS", 0.01)
    assert search.choose(OP, "linear").tactic == SLOW


def test_instructions_that_the_code_has_may_turn_it_round(search, monkeypatch):
    long = replace(CODE, outside=replace(CODE.outside, instructions=1_000_000))
    monkeypatch.setattr(search, "_code", lambda op, tactic: CODE if tactic == SLOW else long)
    assert search.choose(OP, "linear").tactic == SLOW


@pytest.mark.parametrize(("chip", "left"), [("h200", 3), ("rtx4090", 1), ("rtx5090", 2)])
def test_what_a_chip_has_no_instructions_for_is_no_candidate(search, monkeypatch, chip, left):
    schedules = [replace(FAST, schedule=schedule) for schedule in ("swapped", "tma", "warpgroups")]
    monkeypatch.setattr(candidates, "tiles", lambda *asked: schedules)
    search.chip = CHIPS[chip]
    assert len(search._ranked(OP, "linear", SLOW, False)) == left


def test_a_tile_is_compiled_a_few_times_before_others_are(search, monkeypatch):
    tried = []
    deep = [replace(FAST, stages=stages) for stages in (3, 5, 6, 7)]
    monkeypatch.setattr(candidates, "tiles", lambda *asked: [*deep, SPILLING])
    monkeypatch.setattr(search, "_code", lambda op, tactic: tried.append(tactic))
    search.choose(OP, "linear")
    assert len(set(tried) & set(deep)) == tables.MOST_ALIKE
    assert SPILLING in tried


def test_where_nothing_compiles_the_default_stays(search, monkeypatch):
    monkeypatch.setattr(search, "_code", lambda op, tactic: None)
    choice = search.choose(OP, "linear")
    assert (choice.tactic, choice.microseconds) == (SLOW, {})


def test_the_command_writes_a_table_that_says_it_is_predicted(tmp_path):
    """No time for any key: how the flow is to run is told all the same."""
    path = tmp_path / "sm_89.json"
    arguments = ("--predict", "--chip", "rtx4090", "--size", "tiny", "--case", "libero,robodojo", "--minutes", "0")
    inherited = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "XR0_EMULATE")}
    command = [sys.executable, "-m", "xr0_engine", "bench", "tune", *arguments, "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = read_tactics(path)
    assert (table.gpu, table.predicted, table.tactics) == ("sm_89", True, {})
    assert set(table.measured["step libero"]) == {"chained", "layered", "persistent", "streamed"}
    assert table.measured.keys() == {"step libero", "step robodojo"}, "of either family"
    assert table.environment["chip"] == "rtx4090"
    assert "predicted" in done.stdout
