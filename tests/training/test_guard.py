"""A guard's thresholds from a dataset, as `xr0 guard calibrate` makes them."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.training.data.fixtures import INSTRUCTION, write_dataset, write_episode
from xr0_engine.cli import app
from xr0_engine.drive.policies import TRAINED
from xr0_engine.engine import Engine
from xr0_engine.guard import Guard, read_guard, statistics_digest
from xr0_engine.model.xr0 import tell_bend
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.windows import Windows
from xr0_engine.training.guard import _observation, calibrate_on

EPISODES, TICKS = 8, 31


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_dataset(tmp_path_factory.mktemp("guard"), (TICKS,) * EPISODES)
    write_episode(path, EPISODES, TICKS, "invalid", instructions=("Never.",))
    return path


def test_what_was_recorded_is_known(folder):
    profile = calibrate_on([folder], None, 1.0)
    assert (profile.robot_type, profile.action_width, profile.layout) == ("bimanual", 32, "bimanual")
    assert [view.key for view in profile.views] == ["ego", "left_wrist", "right_wrist"]
    assert profile.instructions == ("fold the towel",)
    assert profile.facts["episodes"] == EPISODES
    # Recorded joints and targets are random there, each for itself.
    assert profile.following is None
    assert {"unlike ego", "frozen left_wrist", "swapped right_wrist", "state range"} <= profile.thresholds.keys()
    assert "bend" not in profile.thresholds
    source = open_source(folder)
    windows = Windows(source, [0], 30)
    guard = Guard(profile)
    for tick in range(0, TICKS, 10):
        assert guard.see(_observation(source.load(0), windows, tick), tick / 30) == []


def test_a_policy_is_scored_too(folder):
    engine = Engine.from_pretrained(TRAINED, "cpu", "float32", "reference")
    tell_bend(engine.model)
    profile = calibrate_on([folder], engine, 1.0)
    # Seen through the policy's profile: its one view, its crop.
    assert [(view.key, view.center_crop) for view in profile.views] == [("ego", 0.4)]
    assert 0 < profile.thresholds["bend"] < 1
    statistics = engine.statistics["bimanual"]
    assert profile.statistics == statistics_digest(statistics.mean, statistics.std)


def test_recordings_of_another_robot_are_refused(folder, tmp_path):
    class Other:
        robot_types = ("libero_all",)

    with pytest.raises(ValueError, match=r"'bimanual' is another robot than the checkpoint's, libero_all"):
        calibrate_on([folder], Other(), 1.0)


def command(*arguments):
    return CliRunner().invoke(app, ["guard", "calibrate", *map(str, arguments)])


def test_the_command_adds_to_a_file(folder, tmp_path):
    out = tmp_path / "guard.json"
    done = command(folder, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"{out}: bimanual, {EPISODES} episodes and 0 runs" in done.output
    assert INSTRUCTION.rstrip(".").casefold() in read_guard(out)["bimanual"].instructions
    assert np.isfinite(list(read_guard(out)["bimanual"].thresholds.values())).all()
    refused = command(folder, "--runs", tmp_path, "--out", out)
    assert refused.exit_code == 2
    assert "got no *.jsonl there" in refused.output
    assert "--out: expected a file" in command(folder).output
    out.write_text("{}")
    assert f"{out}: 'version' is missing: remove it, and make it anew" in command(folder, "--out", out).output
