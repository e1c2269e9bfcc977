"""`xr0 drive` with a guard: which file it goes by, what it refuses, what it tells."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.guard.support import unheeded, view
from xr0_engine.cli import app
from xr0_engine.drive.guarding import guard_file
from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.guard import RobotProfile, write_guard
from xr0_engine.guard.recording import read_run

ROBOT, VIEWS = "libero_all", ("base", "left_wrist")
SEEN = tuple(view(key, rotate_180=True) for key in VIEWS)
PROFILE = RobotProfile(
    robot_type=ROBOT,
    control_rate_hz=20.0,
    action_width=32,
    layout="plain",
    views=SEEN,
    low=np.zeros(32),
    high=np.zeros(32),
    scale=np.ones(32),
    speed=np.ones(32),
    instructions=("do nothing",),
    following=None,
    # Noise is nothing that a camera shows.
    thresholds=unheeded(SEEN) | {"unlike base": 2.0, "state range": 0.5},
)
ONE_VIEW = replace(PROFILE, views=SEEN[:1], thresholds=unheeded(SEEN[:1]) | {"state range": 0.5})
DRIVE = ("drive", "--env", "null", "--robot-type", ROBOT, "--mode", "sync", "--delay-steps", "2", "--dtype", "float32")


def xr0(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    before = checkpoint_hash(folder)
    write_guard(folder / "guard.json", PROFILE)
    # Exports of it are of the same checkpoint.
    assert checkpoint_hash(folder) == before
    return folder


def test_a_checkpoint_brings_its_guard(checkpoint, tmp_path):
    run, kept = tmp_path / "run.jsonl", tmp_path / "kept.jsonl"
    told = xr0(*DRIVE, "--checkpoint", checkpoint, "--seconds", 2, "--json", "--record", run, "--guard-record", kept)
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report["counts"]["guard unlike base"] == 1
    assert [warning["name"] for warning in report["warnings"]] == ["unlike base"]
    assert '"kind": "warning"' in run.read_text()
    assert len(read_run(kept, PROFILE).seen) == report["counts"]["chunks"]
    told = xr0(*DRIVE, "--checkpoint", checkpoint, "--seconds", 1)
    assert "guard, unlike base: the picture is not laid out as in training" in told.output
    assert "warnings of the guard" in told.output


def test_it_can_be_left_at_home_and_can_stop_the_robot(checkpoint):
    told = xr0(*DRIVE, "--checkpoint", checkpoint, "--seconds", 1, "--guard", "none", "--json")
    assert json.loads(told.stdout)["warnings"] == []
    told = xr0(*DRIVE, "--checkpoint", checkpoint, "--seconds", 9, "--guard-stops", "--json")
    report = json.loads(told.stdout)
    assert report["ended"].startswith("guard, unlike base")
    assert report["counts"]["chunks"] == 0


@pytest.mark.parametrize(
    ("profile", "complaint"),
    [
        pytest.param(replace(PROFILE, robot_type="bimanual"), "thresholds of another robot", id="type"),
        pytest.param(
            replace(PROFILE, views=SEEN[:1], thresholds=unheeded(SEEN[:1]) | {"state range": 0.5}),
            "views: the file has base",
            id="views",
        ),
        pytest.param(replace(PROFILE, statistics="0" * 16), "another checkpoint's action statistics", id="statistics"),
    ],
)
def test_thresholds_of_another_robot_are_refused(tiny_checkpoint, tmp_path, profile, complaint):
    path = tmp_path / "other.json"
    write_guard(path, profile)
    told = xr0(*DRIVE, "--checkpoint", tiny_checkpoint, "--guard", path)
    assert told.exit_code == 2
    assert complaint in told.output
    assert str(path) in told.output
    assert "xr0 guard calibrate" in told.output


def test_what_cannot_be_is_refused(tiny_checkpoint, tmp_path):
    told = xr0(*DRIVE, "--checkpoint", tiny_checkpoint, "--guard-stops")
    assert "--guard-stops, --guard-record: expected with --guard FILE" in told.output
    told = xr0(*DRIVE, "--checkpoint", tiny_checkpoint, "--guard", tmp_path / "absent.json")
    assert "there is no such file" in told.output
    write_guard(tmp_path / "guard.json", PROFILE)
    told = xr0("drive", "--env", "null", "--delay-steps", "2", "--guard", tmp_path / "guard.json")
    assert "the script is no trained policy" in told.output
    assert guard_file(None, None) is None
    assert guard_file(None, str(tiny_checkpoint)) is None
