"""What the grid says, on rows whose answer is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from xr0_engine.lab.analysis import Estimate, Table, at, estimate, over_delays, sensitivity, window_verdict
from xr0_engine.lab.arms import (
    ARMS,
    DECIDING_TASKS,
    DELAYS,
    EXPERT,
    NO_PREFIX,
    RTC,
    WINDOW_4,
    Arm,
    Condition,
    Size,
    conditions,
)
from xr0_engine.lab.figures import draw_all
from xr0_engine.lab.plans import PLANS, find_plan
from xr0_engine.lab.runner import SCHEMA, read_rows
from xr0_engine.lab.tables import tables, write_tables
from xr0_engine.lab.tasks import CHUNK, TASKS
from xr0_engine.types import FileError

SIZE = Size(steps={"chase-eight": 10, "two-ways": 10})


def row(
    task: str, arm: Arm, seed: int, reaction: float = 4.0, success: float = 0.8, late: float = 0.2
) -> dict[str, Any]:
    """As runner.run_cell writes it; its values rise by a hundredth a seed."""
    shift = 0.01 * seed
    free = [late + shift] * (CHUNK - 4)
    entry = {
        "success": success + shift,
        "reaction_steps": reaction + shift,
        "distance": 0.2,
        "floor_steps": 2.0,
        "seam": 0.5,
    }
    inside = {
        "prefix_length": 4,
        "sensitivity": {"prefix": [0.0] * 4 + free, "image": [0.0] * 4 + [2 * value for value in free]},
        "attention": {"prefix": [[0.25] * arm.depth] * 5, "own": [[0.75] * arm.depth] * 5},
    }
    return {
        "schema": SCHEMA,
        "task": task,
        "arm": arm.name,
        "seed": seed,
        "size": {"steps": SIZE.steps, "delays": list(SIZE.delays)},
        "training": {"loss": 0.1, "l1": 0.5, "baseline_l1": 1.0} if arm.recipe else {},
        "conditions": [
            {"mode": condition.mode, "delay_steps": condition.delay_steps, "episodes": 200, "measures": dict(entry)}
            for condition in conditions(arm, SIZE)
        ],
        "inside": inside if arm.has_prefix else None,
        "cpu_s": 120.0,
        "processor": "a processor",
    }


def grid(**of_window: Any) -> Table:
    """Three seeds of the deciding arms, and the expert; of_window: what window 4 has else."""
    rows = [row(task, EXPERT, 0) for task in DECIDING_TASKS]
    rows += [row(task, arm, seed) for task in DECIDING_TASKS for arm in (NO_PREFIX, RTC) for seed in range(3)]
    rows += [row(task, WINDOW_4, seed, **of_window) for task in DECIDING_TASKS for seed in range(3)]
    return Table(rows)


def test_an_interval_is_students() -> None:
    # By hand: mean 2, standard deviation 1, 4.303 / sqrt(3) of it each way.
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.seeds) == (2.0, 3)
    assert (found.low, found.high) == (pytest.approx(2 - 2.4843, abs=1e-3), pytest.approx(2 + 2.4843, abs=1e-3))
    assert not found.is_certain
    assert estimate([5.0]) == Estimate(5.0, None, None, 1)
    assert estimate([]) is None
    with pytest.raises(ValueError, match="seeds"):
        estimate([0.0] * 12)


def test_differences_are_between_the_same_seeds() -> None:
    """The seeds' own shifts, a hundredth each, cancel; a seed that one side lacks is left out."""
    table = grid(reaction=3.0)
    measure = at(Condition("async", 4), "reaction_steps")
    found = table.difference("chase-eight", "window-4", "rtc", measure)
    assert found == Estimate(pytest.approx(-1.0), pytest.approx(-1.0), pytest.approx(-1.0), 3)
    fewer = Table([one for one in table.rows if (one["arm"], one["seed"]) != ("rtc", 2)])
    half = fewer.difference("chase-eight", "window-4", "rtc", measure)
    assert half is not None
    assert half.seeds == 2


def test_two_modes_of_one_policy_are_paired_too() -> None:
    rows = [row("chase-eight", RTC, seed) for seed in range(3)]
    for one in rows:
        for entry in one["conditions"]:
            entry["measures"]["seam"] += entry["mode"] == "naive"
    naive, prefixed = (at(Condition(mode, 4), "seam") for mode in ("naive", "async"))  # type: ignore[arg-type]
    found = Table(rows).difference("chase-eight", "rtc", "rtc", naive, prefixed)
    assert found == Estimate(pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0), 3)
    assert "| +1.000 (+1.000 to +1.000) |" in tables(Table(rows))["modes"]


def test_a_delay_that_is_missing_is_no_mean() -> None:
    one = row("chase-eight", RTC, 0)
    assert over_delays("async", DELAYS, "seam")(one) == pytest.approx(0.5)
    one["conditions"] = [entry for entry in one["conditions"] if entry["delay_steps"] != DELAYS[-1]]
    assert over_delays("async", DELAYS, "seam")(one) is None
    assert at(Condition("guided", 4), "seam")(one) is None


def test_sensitivities_are_of_the_actions_behind_the_prefix() -> None:
    one = row("chase-eight", RTC, 0)
    one["inside"]["sensitivity"]["prefix"] = [9.0] * 4 + [1.0, *[0.0] * 5, *[3.0] * 6]
    assert sensitivity("prefix", late=False)(one) == 1.0
    assert sensitivity("prefix", late=True)(one) == 3.0
    assert sensitivity("state", late=True)(one) is None
    assert sensitivity("prefix", late=True)(row("chase-eight", NO_PREFIX, 0)) is None


@pytest.mark.parametrize(
    ("of_window", "answer"),
    [
        ({}, "nothing"),
        ({"reaction": 4.3}, "nothing"),
        ({"reaction": 3.0}, "shorter"),
        ({"reaction": 5.0}, "longer"),
    ],
)
def test_the_answer_follows_the_rule(of_window: dict[str, Any], answer: str) -> None:
    assert window_verdict(grid(**of_window), DECIDING_TASKS, DELAYS, "window-4", "rtc").answer == answer


def test_tasks_that_disagree_leave_it_open() -> None:
    rows = [one for one in grid().rows if (one["task"], one["arm"]) != ("two-ways", "window-4")]
    rows += [row("two-ways", WINDOW_4, seed, reaction=2.0) for seed in range(3)]
    assert window_verdict(Table(rows), DECIDING_TASKS, DELAYS, "window-4", "rtc").answer == "open"
    single = Table([one for one in grid().rows if one["seed"] == 0])
    assert window_verdict(single, DECIDING_TASKS, DELAYS, "window-4", "rtc").answer == "open"


def test_tables_are_put_between_their_marks(tmp_path: Path) -> None:
    document = tmp_path / "lambda.md"
    document.write_text("Before.\n<!-- table differences -->\nold\n<!-- end -->\nAfter.\n", encoding="utf-8")
    write_tables(grid(late=0.1), document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("Before.\n<!-- table differences -->\n| task |")
    assert text.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in text
    assert "-0.200 (-0.200 to -0.200)" in text
    # Halved, but for the seeds' own shifts: 0.1 / 0.2, 0.11 / 0.21, 0.12 / 0.22.
    assert "| 0.52 (0.47 to 0.58) |" in text
    again = text
    write_tables(grid(late=0.1), document)
    assert document.read_text(encoding="utf-8") == again
    document.write_text("<!-- table nothing -->\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(ValueError, match="table 'nothing'"):
        write_tables(grid(), document)


def test_every_table_has_whole_rows() -> None:
    for name, text in tables(grid()).items():
        rows = [line for line in text.splitlines() if line.startswith("|")]
        # Without obstacles nothing is hit.
        assert len(rows) >= (2 if name == "hit" else 3), name
        assert len({line.count("|") for line in rows}) == 1, name


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = list(grid().rows)
    rows += [row(task, arm, 0) for task in DECIDING_TASKS for arm in ARMS.values() if arm.depth != RTC.depth]
    assert "| chase-eight | 16 | 2 | 1 | +0.00 | +0.0 | 1.00 |" in tables(Table(rows))["window"]
    made = [path.name for path in draw_all(Table(rows), tmp_path)]
    names = ("tasks", "success", "reaction", "seam", "sensitivity", "attention", "depth")
    assert made == [f"lambda-{name}.png" for name in names]
    assert all((tmp_path / name).stat().st_size > 4_000 for name in made)


def test_rows_are_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    one = row("two-ways", RTC, 1)
    (tmp_path / "two-ways" / "rtc").mkdir(parents=True)
    path = tmp_path / "two-ways" / "rtc" / "row.json"
    path.write_text(json.dumps(one), encoding="utf-8")
    assert read_rows(tmp_path) == [one]
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(one) + "\n", encoding="utf-8")
    assert read_rows(lines) == [one]
    path.write_text(json.dumps(one | {"schema": SCHEMA + 1}), encoding="utf-8")
    with pytest.raises(FileError, match=f"{re.escape(str(path))}: schema"):
        read_rows(tmp_path)
    path.write_text(json.dumps(one | {"conditions": 3}), encoding="utf-8")
    with pytest.raises(FileError, match="conditions: expected list"):
        read_rows(tmp_path)
    path.unlink()
    lines.unlink()
    with pytest.raises(ValueError, match="expected cells"):
        read_rows(tmp_path)


def test_plans_name_each_cell_once_and_know_its_steps() -> None:
    for plan in PLANS.values():
        names = [cell.name for cell in plan.cells]
        assert len(set(names)) == len(names)
        assert {cell.task for cell in plan.cells} <= plan.size.steps.keys() <= TASKS.keys()
    with pytest.raises(ValueError, match="quick, committed, whole"):
        find_plan("all")
