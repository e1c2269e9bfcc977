"""Faults on the simulated robot, the trial of a guard, and what is told of it."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support import ROOT
from xr0_engine.cli import app
from xr0_engine.drive.aloha import SimulatedAloha
from xr0_engine.drive.faults import FAULTS, OFFSET_RAD, RIGHT_WAIST, FaultyRobot
from xr0_engine.drive.guard_trial import Run, _most, alarms, read_results, table
from xr0_engine.drive.policies import TRAINED
from xr0_engine.executor import VirtualClock
from xr0_engine.guard import read_guard
from xr0_engine.guard.recording import read_run
from xr0_engine.sim import CONTROL_RATE_HZ, AlohaEnv, columns_to_joints

RESULTS = ROOT / "xr0_engine" / "drive" / "results" / "guard-aloha.json"
PICTURES = (
    "camera frozen",
    "camera black",
    "camera overexposed",
    "camera turned by 180 degrees",
    "camera mirrored",
    "red and blue exchanged",
    "camera knocked, 10 % of its width",
    "another camera in its place",
    "cube taken away",
)


def xr0(*arguments):
    return CliRunner().invoke(app, ["guard", *map(str, arguments)])


@pytest.fixture(scope="module")
def env(renderer):
    with AlohaEnv(width=64, height=48, views=("ego",)) as env:
        yield env


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_what_it_names_from_its_moment_on(env, name):
    """Beside the same robot without it: pictures alone, state and pose alike, or the words."""
    env.reset(0)
    clock = VirtualClock()
    well = SimulatedAloha(env, clock, "Go.")
    ill = FaultyRobot(well, env, FAULTS[name], 0.5)
    targets = env.joints + 0.3
    changed = {"images": [], "state": [], "instruction": []}
    for step in range(0, 40, 5):
        clock.sleep_until(step / CONTROL_RATE_HZ)
        told, true = ill.observe(clock.now()), well.observe(clock.now())
        np.testing.assert_allclose(
            columns_to_joints(told.observation.state[-1])[[0, RIGHT_WAIST]],
            [told.origin.left.joints_rad[0], told.origin.right.joints_rad[0]],
            atol=1e-6,
        )
        for part, places in changed.items():
            one, other = (getattr(each.observation, part) for each in (told, true))
            one, other = (each["ego"] if part == "images" else each for each in (one, other))
            if not np.array_equal(one, other):
                places.append(step)
        well.command(_row(targets))
    part = "images" if name in PICTURES else "instruction" if "instruction" in name else "state"
    assert {other for other, places in changed.items() if places} == {part}
    expected = [15] if "spike" in name else [15, 20, 25, 30, 35]
    assert changed[part] == (expected[1:] if "frozen" in name else expected)


def _row(joints):
    from xr0_engine.sim import joints_to_columns

    return joints_to_columns(joints).astype(np.float64)


def test_an_offset_is_one_of_state_and_pose(env):
    env.reset(0)
    robot = SimulatedAloha(env, VirtualClock(), "Go.")
    true, told = robot.observe(0.0), FaultyRobot(robot, env, FAULTS["right waist off by 0.2 rad"], 0.0).observe(0.0)
    assert told.origin.right.joints_rad[0] - true.origin.right.joints_rad[0] == pytest.approx(OFFSET_RAD)
    assert env.joints[RIGHT_WAIST] == pytest.approx(true.origin.right.joints_rad[0])


def test_a_guard_is_tried_and_its_runs_are_kept(renderer, tmp_path):
    out, keep = tmp_path / "results.json", tmp_path / "runs"
    told = xr0("try", TRAINED, "--runs", 1, "--clean", 1, "--fault", "camera black", "--out", out, "--keep", keep)
    assert told.exit_code == 0, told.output
    black, clean = (Run(**run) for run in read_results(out)["runs"])
    assert (black.fault, clean.fault, clean.caught) == ("camera black", None, None)
    assert "brightness ego" in black.names
    # It is looked at when the next inference starts, a chunk of 20 actions later at the most.
    assert 0 <= black.late_steps <= 20
    kept = [read_run(path, read_guard(TRAINED / "guard.json")["bimanual"]) for path in keep.glob("*.jsonl")]
    assert len(kept) == clean.done
    assert not list(keep.glob("*.partial"))
    (keep / "run_000000.jsonl").touch()
    again = xr0("try", TRAINED, "--runs", 0, "--clean", 1, "--keep", keep)
    assert (again.exit_code, "holds runs already" in again.output) == (2, True)
    again = xr0("table", out)
    assert again.exit_code == 0
    assert "| camera black | 1 of 1 |" in again.output


def test_what_is_told_of_runs():
    runs = [
        Run("x", 1, 30, 240, 1.0, (), "bend", 5, ("bend",), False),
        Run("x", 2, 30, 240, 1.0, ("unlike ego",), "bend", 15, ("bend",), False),
        Run("x", 3, 30, 240, 1.0, (), None, None, (), True),
        # It was over before the fault began.
        Run("x", 4, 50, 40, 1.3, (), None, None, (), True),
        Run(None, 5, None, 240, 3600.0, ("bend", "bend"), None, None, (), False),
    ]
    text = table({"runs": [asdict(run) for run in runs]})
    assert "| x | 2 of 3 | 10 (15) | `bend` 2 |" in text
    told = alarms([*runs, Run(None, 6, None, 200, 1800.0, (), None, None, (), True)])
    assert "3 alarms in 1.50 h (`bend` 2, `unlike ego` 1), 2.0 an hour (95 %: at most 5.2)" in told
    assert "changed hands in 1 of these runs, 0 of which had an alarm: 0 alarms in 0.50 h, 0.0 an hour" in told
    assert told.endswith("Of the 1 in which it did not, 1 had one.")


def test_the_upper_end_is_exact():
    """Of no event in a time the mean number is at most 3, as the rule of three says: -log 0.05."""
    assert _most(0) == pytest.approx(-np.log(0.05))
    assert [round(_most(number), 2) for number in (1, 3, 10)] == [4.74, 7.75, 16.96]


def test_what_cannot_be_tried_is_refused(tmp_path, tiny_checkpoint):
    assert "has no guard.json" in xr0("try", tiny_checkpoint).output
    told = xr0("try", TRAINED, "--fault", "earthquake", "--clean", 0)
    assert told.exit_code == 2
    assert "faults: expected some of camera frozen" in told.output
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"kind": "other"}))
    assert "expected results of `xr0 guard try --out`" in xr0("table", path).output


def test_the_page_shows_the_results():
    page = (ROOT / "docs" / "guard.md").read_text(encoding="utf-8")
    for line in table(read_results(RESULTS)).splitlines():
        assert line in page
