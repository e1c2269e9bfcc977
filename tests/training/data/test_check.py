"""`xr0 data check` finds what training would stop at, and says so with its exit code; the other commands' answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.training.data.fixtures import damage, write_dataset, write_episode
from xr0_engine.cli import app
from xr0_engine.training.data.check import check


@pytest.fixture
def folder(tmp_path):
    """Six episodes: 1 has a damaged video, 2 too short ones, 3 is no JSON, 4 is invalid but whole, 5 lacks a video."""
    write_dataset(tmp_path, (10, 10), {})
    damage(tmp_path / "videos" / "1.left_wrist.mp4")
    write_episode(tmp_path, 2, 9, video_length=6)
    write_episode(tmp_path, 3, 5).write_text('{"num_fr')
    write_episode(tmp_path, 4, 5, "invalid")
    write_episode(tmp_path, 5, 5)
    (tmp_path / "videos" / "5.ego.mp4").unlink()
    return tmp_path


def test_every_broken_episode_is_found(folder):
    findings = check(folder, fast=False, processes=1)
    assert [bool(finding.faults) for finding in findings] == [False, True, True, True, False, True]
    assert [finding.status for finding in findings][4] == "invalid"
    messages = [" ".join(finding.faults) for finding in findings]
    assert "1.left_wrist.mp4: frame " in messages[1]
    assert messages[2].count("frame 6 of the clip: ends before") == 3
    assert "not valid JSON" in messages[3]
    assert "5.ego.mp4" in messages[5]


def test_joints_of_episode_files_that_wrap(tmp_path):
    path = write_episode(tmp_path, 0, 12)
    raw = json.loads(path.read_text())
    for tick, row in enumerate(raw["actions"]["left_arm_joint"]):
        row[2] = (0.4 * tick + 1.0 + np.pi) % (2 * np.pi) - np.pi
    path.write_text(json.dumps(raw))
    ((fault,),) = [finding.faults for finding in check(tmp_path, True, 1)]
    assert "action column 9 jumps by a turn" in fault
    # Their columns are not described, so xr0.yaml has no place for a kind.
    assert fault.endswith("write it without the jump")


def test_clips_may_be_cut_out_differently(tmp_path):
    write_dataset(tmp_path, (6, 6, 6))
    path = tmp_path / "episode_001.json"
    raw = json.loads(path.read_text())
    raw["observations"]["ego"][0]["crop_bbox"] = [8, 0, 72, 32]
    path.write_text(json.dumps(raw))
    assert not any(finding.faults for finding in check(tmp_path, True, 1))


def test_nothing_to_train_on(tmp_path):
    write_episode(tmp_path, 0, 5, "invalid")
    (fault,) = check(tmp_path, True, 1)[-1].faults
    assert fault == f"{tmp_path}: nothing to train on: every episode is marked invalid"


def test_fast_finds_what_is_missing_and_too_short(folder):
    findings = check(folder, fast=True, processes=1)
    assert [bool(finding.faults) for finding in findings][2:] == [True, True, False, True]


def test_command_lists_them_and_exits_with_1(folder):
    result = CliRunner().invoke(app, ["data", "check", str(folder)])
    assert result.exit_code == 1
    assert f"{folder}: 6 checked, 4 broken, 1 marked invalid" in result.stdout.replace("\n", " ")
    assert "videos/2.ego.mp4: frame 6 of the clip: ends before" in result.stdout


def test_command_exits_with_0_if_all_is_well(tmp_path):
    write_dataset(tmp_path / "set", (4, 5))
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "set")])
    assert (result.exit_code, "2 checked, 0 broken" in result.stdout) == (0, True)


def test_language_lines(tmp_path):
    turns = [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]
    (tmp_path / "vl.jsonl").write_text(json.dumps({"conversations": turns}) + "\n{}\n")
    findings = check(tmp_path / "vl.jsonl", False, 1)
    assert [bool(finding.faults) for finding in findings] == [False, True]
    assert "vl.jsonl:2" in findings[1].faults[0]


def test_nothing_there(tmp_path):
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 2


def test_stats_and_convert_commands(tmp_path):
    write_dataset(tmp_path / "set", (9, 8))
    run = CliRunner().invoke
    stats = ["data", "stats", str(tmp_path / "set"), "--out", str(tmp_path / "p.json"), "--chunk-length", "5"]
    assert run(app, stats).exit_code == 0
    assert list(json.loads((tmp_path / "p.json").read_text())["action_config"]) == ["bimanual"]
    assert run(app, stats).exit_code == 2
    assert run(app, [*stats, "--replace"]).exit_code == 0
    assert run(app, ["data", "convert", str(tmp_path / "set"), str(tmp_path / "lerobot")]).exit_code == 0
    assert run(app, ["data", "convert", str(tmp_path / "lerobot"), str(tmp_path / "back")]).exit_code == 0
    assert len(list((tmp_path / "back").glob("episode_*.json"))) == 2
