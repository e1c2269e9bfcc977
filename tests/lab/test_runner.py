"""The grid's runner: a cell from nothing to its row, and what is left when it is ended on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from xr0_engine.lab import runner
from xr0_engine.lab.analysis import Table, at, sensitivity
from xr0_engine.lab.arms import ARMS, EXPERT, NO_PREFIX, RTC, WINDOW_4, Arm, Cell, Condition, Plan, Size, conditions
from xr0_engine.types import FileError

SMALL = Size({"chase-four": 2}, batch_size=2, repeat=1, episodes=3, twins=2, windows=8, delays=(4,))
BROKEN = Arm("broken", "broken", "training_rtc", ("flow.max_prefix=-1",))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[runner.Failed]]:
    """Three cells that work, and one that its arm's settings refuse, in processes of their own."""
    out = tmp_path_factory.mktemp("lab") / "grid"
    cells = tuple(Cell("chase-four", arm, 0) for arm in (EXPERT, NO_PREFIX, WINDOW_4, BROKEN))
    return out, runner.run(out, Plan(cells, SMALL), 1, Console(file=StringIO()))


def test_a_cell_becomes_a_row(grid: tuple[Path, list[runner.Failed]]) -> None:
    out, _ = grid
    rows = {row["arm"]: row for row in runner.read_rows(out)}
    assert rows.keys() == {"expert", "no-prefix", "window-4"}
    assert rows["expert"]["training"] == {}
    assert rows["expert"]["inside"] is None
    for arm in (EXPERT, NO_PREFIX, WINDOW_4):
        row = rows[arm.name]
        asked = [Condition(entry["mode"], entry["delay_steps"]) for entry in row["conditions"]]
        assert asked == list(conditions(arm, SMALL))
        for entry in row["conditions"]:
            assert len(entry["successes"]) == 3
            assert entry["measures"]["success"] == entry["successes"].count("1") / 3
            assert entry["measures"]["reaction_steps"] >= 0
        assert arm is EXPERT or row["training"]["loss"] > 0
    # Nobody knows before the first chunk that is inferred after the jump.
    async_ = Condition("async", 4)
    reacted, floor = (at(async_, name)(rows["expert"]) for name in ("reaction_steps", "floor_steps"))
    assert 4 < floor <= reacted < 16
    assert sensitivity("prefix", late=True)(rows["window-4"]) is not None
    assert sensitivity("prefix", late=True)(rows["no-prefix"]) is None
    assert sensitivity("image", late=True)(rows["no-prefix"]) is not None
    for shares in rows["window-4"]["inside"]["attention"].values():
        assert [len(layers) for layers in shares] == [4] * 5
    assert at(Condition("guided", 4), "seam")(rows["no-prefix"]) is not None
    assert Table(list(rows.values())).mean("chase-four", "window-4", at(Condition("async", 4), "distance")) is not None


def test_a_cell_s_process_knows_what_its_arm_is_tried_at() -> None:
    """Arms come there as copies."""
    for arm in ARMS.values():
        assert conditions(replace(arm), SMALL) == conditions(arm, SMALL)


def test_a_cell_that_fails_is_told_and_the_others_go_on(grid: tuple[Path, list[runner.Failed]]) -> None:
    out, failed = grid
    assert [one.cell.arm for one in failed] == [BROKEN]
    assert "flow.max_prefix" in failed[0].reason
    assert str(out / "chase-four" / "broken" / "seed-0" / "log.txt") in failed[0].reason


def test_what_is_done_is_not_done_again(
    grid: tuple[Path, list[runner.Failed]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = grid
    monkeypatch.setattr(runner, "_work", None)
    plan = Plan((Cell("chase-four", WINDOW_4, 0),), SMALL)
    assert runner.run(out, plan, 1, Console(file=StringIO())) == []
    with pytest.raises(ValueError, match="size: this cell was run with"):
        runner.run(out, Plan(plan.cells, replace(SMALL, episodes=4)), 1, Console(file=StringIO()))


def test_collected_rows_count_as_done(
    grid: tuple[Path, list[runner.Failed]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = grid
    rows, again = tmp_path / "rows.jsonl", tmp_path / "again"
    rows.write_text("".join(json.dumps(row) + "\n" for row in runner.read_rows(out)), encoding="utf-8")
    runner.restore(rows, again)
    assert runner.read_rows(again) == runner.read_rows(out)
    monkeypatch.setattr(runner, "_work", None)
    plan = Plan(tuple(Cell("chase-four", arm, 0) for arm in (EXPERT, WINDOW_4)), SMALL)
    assert runner.run(again, plan, 1, Console(file=StringIO())) == []
    rows.write_text(json.dumps(runner.read_rows(out)[0] | {"arm": "../elsewhere"}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="arm: expected one of"):
        runner.restore(rows, again)


def test_a_cell_goes_on_where_it_was_ended(
    grid: tuple[Path, list[runner.Failed]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended while a condition's line was written: what was whole is kept, the rest done, nothing trained again."""
    out, _ = grid
    cell = Cell("chase-four", WINDOW_4, 0)
    folder = out / cell.name
    row = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    lines = (folder / "conditions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 2
    (folder / "row.json").unlink()
    (folder / "conditions.jsonl").write_text(lines[0] + lines[1][:50], encoding="utf-8")
    before = json.loads((folder / "begun.json").read_text(encoding="utf-8"))["cpu_s"]
    monkeypatch.setattr("xr0_engine.training.start.start_run", None)
    monkeypatch.setattr("xr0_engine.training.start.resume_run", None)
    runner.run_cell(cell, out, SMALL)
    again = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    assert again["conditions"][0] == row["conditions"][0]
    assert again["conditions"][1]["measures"] == row["conditions"][1]["measures"]
    assert again["inside"] == row["inside"]
    assert again["cpu_s"] > before > 0
    with pytest.raises(ValueError, match=r"begun\.json: size: begun with"):
        runner.run_cell(cell, out, replace(SMALL, episodes=4))


def test_arms_of_a_seed_are_trained_alike_but_for_their_changes(tmp_path: Path) -> None:
    one, other = (runner.training(Cell("chase-four", arm, 3), tmp_path, SMALL) for arm in (RTC, WINDOW_4))
    assert (one.model.local_window, other.model.local_window) == (None, 4)
    assert replace(other, model=replace(other.model, local_window=None)) == one
    assert one.run.seed == 3
    assert one.flow.prefix == "code"


def test_a_row_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "row.json").write_text('{"schema": 1}', encoding="utf-8")
    with pytest.raises(FileError, match=r"row\.json: task: expected str"):
        runner.read_rows(tmp_path)
