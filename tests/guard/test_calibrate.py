"""Thresholds from recordings, and their file."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.guard.support import INFO, ROBOT, chunk, drive, profile, recorded, targets
from xr0_engine.guard import Guard, read_guard, statistics_digest, write_guard
from xr0_engine.guard.calibrate import calibrate, threshold
from xr0_engine.guard.recording import RunWriter, read_run
from xr0_engine.types import FileError, ViewInfo


@pytest.mark.parametrize("count", [8, 40, 136])
def test_a_threshold_is_passed_as_seldom_as_was_asked(count):
    """In the mean of many calibrations, of a tail that falls as it should: no oftener, and not for nothing."""
    rng = np.random.default_rng(0)
    chance = 1e-3
    found = np.array([threshold("bend", rng.exponential(0.5, count), chance) for _ in range(2_000)])
    passed = np.exp(-found / 0.5).mean()
    assert chance / 3 < passed < 1.2 * chance


def test_a_threshold_is_never_below_what_was_seen_or_the_least():
    assert threshold("turned front", np.full(9, 0.2), 1e-3) == pytest.approx(1.0, rel=1e-4)
    assert threshold("bend", np.array([*np.full(30, 0.1), 0.9]), 0.5) >= 0.9


def test_which_columns_follow_is_found():
    following = profile().following
    assert following.columns.tolist() == [0, 1]
    assert following.relative.tolist() == [True, False]


def test_runs_of_the_policy_say_the_thresholds_where_there_are_enough():
    episodes = [recorded(seed, bend=0.2) for seed in range(20)]
    runs = [recorded(seed, bend=0.4, is_run=True) for seed in range(20, 30)]
    without = calibrate(ROBOT, episodes, 1.0).thresholds["bend"]
    assert calibrate(ROBOT, [*episodes, *runs], 1.0).thresholds["bend"] > max(0.4, without)
    assert calibrate(ROBOT, [*episodes, *runs], 1.0).facts["thresholds_of"] == 10
    assert calibrate(ROBOT, [*episodes, *runs[:7]], 1.0).facts["thresholds_of"] == 27


@pytest.mark.parametrize(
    ("episodes", "alarms", "complaint"),
    [
        pytest.param(7, 1.0, "at least 8 episodes", id="few"),
        pytest.param(8, 0.0, "alarms_per_hour", id="none"),
        pytest.param(8, math.nan, "alarms_per_hour", id="nan"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(episodes, alarms, complaint):
    with pytest.raises(ValueError, match=complaint):
        calibrate(ROBOT, [recorded(seed) for seed in range(episodes)], alarms)


def test_runs_of_other_states_and_recordings_of_a_moment_are_refused():
    wide = replace(recorded(3), seen=[replace(seen, state=np.zeros(5)) for seen in recorded(3).seen])
    with pytest.raises(ValueError, match="as many columns in all, got 3, 5"):
        calibrate(ROBOT, [*(recorded(seed) for seed in range(8)), wide], 1.0)
    moments = [replace(recorded(seed), seen=recorded(seed).seen[:1]) for seed in range(8)]
    with pytest.raises(ValueError, match="looked at more than once"):
        calibrate(ROBOT, moments, 1.0)


def test_the_file_gives_the_same_guard(tmp_path):
    path = tmp_path / "guard.json"
    write_guard(path, profile())
    write_guard(path, replace(profile(), robot_type="another"))
    assert sorted(read_guard(path)) == ["another", "waver"]
    read = read_guard(path)["waver"]
    assert read.thresholds == profile().thresholds
    assert drive(Guard(read)) == {}
    bad = lambda tick, path: chunk(targets(path, tick), 0.9)  # noqa: E731
    assert drive(Guard(read), plan=bad) == drive(Guard(profile()), plan=bad) != {}


def set_(*place, value):
    def change(raw):
        *way, last = ("robots", "waver", *place)
        for key in way:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda raw: raw.update(version=2), "version: expected 1", id="version"),
        pytest.param(lambda raw: raw.update(robots={}), "at least one robot type", id="none"),
        pytest.param(set_("thresholds", "brightnes front", value=1.0), "got brightnes front", id="unknown check"),
        pytest.param(
            lambda raw: raw["robots"]["waver"]["thresholds"].pop("turned wrist"), "turned wrist: missing", id="no check"
        ),
        pytest.param(set_("thresholds", "bend", value="high"), "bend is 'high', not a number", id="threshold"),
        pytest.param(set_("state", "low", value=[1.0]), "expected 1 numbers, got 3", id="lengths"),
        pytest.param(set_("state", "scale", 1, value=0), "scale: expected numbers above 0", id="scale"),
        pytest.param(set_("state", "low", 0, value=9.0), "low: expected at most high", id="order"),
        pytest.param(set_("views", 0, "mean", value=[0.0]), "mean: expected 192 numbers", id="thumbnail"),
        pytest.param(set_("views", 1, "key", value="front"), "each key once", id="views"),
        pytest.param(set_("views", 0, "aspects", value=[0.0]), "aspects: expected numbers above 0", id="aspects"),
        pytest.param(set_("following", "columns", value=[0, 99]), "columns", id="columns"),
        pytest.param(set_("following", "relative", value=[1, 0]), "relative", id="relative"),
        pytest.param(set_("instructions", value="Wave."), "neither a list of text nor null", id="instructions"),
        pytest.param(lambda raw: raw["robots"]["waver"].pop("layout"), "'layout' is missing", id="missing"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, change, complaint):
    path = tmp_path / "guard.json"
    write_guard(path, profile())
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(FileError, match=complaint) as told:
        read_guard(path)
    assert str(path) in str(told.value)
    assert "xr0 guard calibrate" in str(told.value)


@pytest.mark.parametrize(
    ("info", "complaint"),
    [
        pytest.param(replace(INFO, views=("wrist", "front")), "views: the file has front, wrist", id="views"),
        pytest.param(replace(INFO, control_rate_hz=20.0), "control_rate_hz: the file has 30, the policy 20", id="rate"),
        pytest.param(replace(INFO, layout="bimanual"), "layout", id="layout"),
        pytest.param(replace(INFO, action_width=7), "action_width: the file has 4, the policy 7", id="width"),
    ],
)
def test_thresholds_of_another_robot_are_refused(tmp_path, info, complaint):
    profile().check(tmp_path / "guard.json", INFO)
    with pytest.raises(FileError, match=complaint):
        profile().check(tmp_path / "guard.json", info)


def test_views_that_are_made_otherwise_are_refused(tmp_path):
    same = (ViewInfo("Front", False, 1.0), ViewInfo("Wrist", False, 1.0))
    profile().check(tmp_path, replace(INFO, preparation=same))
    other = (same[0], replace(same[1], rotate_180=True, center_crop=0.9))
    with pytest.raises(FileError, match="views: wrist: the file has rotate_180 False and center_crop 1, the policy T"):
        profile().check(tmp_path, replace(INFO, preparation=other))


def test_thresholds_of_another_checkpoint_are_refused(tmp_path):
    one, two = (statistics_digest(np.full((20, 4), value), np.ones((20, 4))) for value in (0.0, 0.1))
    own = replace(profile(), statistics=one)
    own.check(tmp_path, INFO, one)
    own.check(tmp_path, INFO, None)
    with pytest.raises(FileError, match="another checkpoint's action statistics"):
        own.check(tmp_path, INFO, two)


def test_a_run_is_kept_and_read(tmp_path):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, profile()) as writer:
        drive(Guard(profile(), writer.keep))
    run = read_run(path, ROBOT)
    kept = recorded(1000)
    assert run.is_run
    assert len(run.seen) == len(run.targets) == len(kept.seen)
    np.testing.assert_allclose(run.seen[3].state, kept.seen[3].state, atol=1e-6)
    np.testing.assert_allclose(run.seen[3].looks["front"].thumbnail, kept.seen[3].looks["front"].thumbnail, atol=1e-4)
    assert run.chunks[0].bend == 0.2
    with pytest.raises(FileExistsError):
        RunWriter(path, profile())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda lines: lines[0].update(robot_type="crane"), "robot_type: the run has 'crane'", id="robot"),
        pytest.param(lambda lines: lines[0].update(action_width=7), "line 1: action_width: the run has 7", id="width"),
        pytest.param(lambda lines: lines[0].update(views=["front"]), r"views: the run has \['front'\]", id="views"),
        pytest.param(lambda lines: lines[0].update(version=9), "line 1: expected a run of version 2", id="version"),
        pytest.param(lambda lines: lines[3].update(state=[1.0]), "line 4: state: expected 3 numbers", id="state"),
        pytest.param(lambda lines: lines[2].update(actions=[[1.0]]), "line 5: actions", id="actions"),
        pytest.param(lambda lines: lines.pop(1), "line 2: kind: expected seen", id="order"),
        pytest.param(lambda lines: lines.__delitem__(slice(3, None)), "at least two chunks", id="short"),
        pytest.param(lambda lines: lines[3].update(time_s=-1.0), "times that rise", id="time"),
    ],
)
def test_a_broken_run_is_refused_by_name(tmp_path, change, complaint):
    path = tmp_path / "run.jsonl"
    with RunWriter(path, profile()) as writer:
        drive(Guard(profile(), writer.keep))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FileError, match=complaint) as told:
        read_run(path, ROBOT)
    assert str(path) in str(told.value)
