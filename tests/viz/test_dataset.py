"""`xr0 data view`: a dataset as recordings of rerun, read back."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.training.data.fixtures import damage, frame_number, write_dataset, write_episode
from tests.viz.support import read_all, series, texts
from xr0_engine.cli import app
from xr0_engine.robot.decode import LEFT
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.viz import sink
from xr0_engine.viz.dataset import read_numbers, show_dataset

# States are float32.
CLOSE = 1e-6


@pytest.fixture
def folder(tmp_path):
    """Three whole episodes, one whose video is damaged, and one that is no JSON."""
    path = tmp_path / "set"
    path.mkdir()
    write_dataset(path, (12, 7, 9, 10), {})
    damage(path / "videos" / "3.left_wrist.mp4")
    write_episode(path, 4, 5).write_text('{"num_fr')
    return path


def picture(row):
    return np.asarray(Image.open(io.BytesIO(bytes(row["blob"][0]))))


def test_a_dataset_is_read_back(folder, tmp_path):
    target = tmp_path / "set.rrd"
    shown = show_dataset(folder, target)
    assert (shown.episodes, shown.readable) == (4, 4)
    found = read_all(target)
    names = [f"{number}: episode_{number:03}" for number in range(4)]
    assert sorted(found) == [("xr0 dataset", "set"), *(("xr0 episodes", name) for name in names)]
    source = open_source(folder, skip_broken=True)
    for number, length in enumerate((12, 7, 9, 10)):
        rows, motion = found["xr0 episodes", names[number]], source.load(number).motion
        times, actions = series(rows, "/action/left_joints")
        np.testing.assert_allclose(times, np.arange(length) / 30, atol=1e-9)
        np.testing.assert_allclose(actions, motion.actions(0, length)[:, LEFT.joints])
        states = np.concatenate([motion.state(tick) for tick in range(length)])
        np.testing.assert_allclose(series(rows, "/state/left_joints")[1], states[:, LEFT.joints], atol=CLOSE)
        assert [frame_number(picture(row)) for row in rows["/camera/ego"]] == list(range(length))
        assert f"task: {source.load(number).instructions[0]}" in texts(rows)
    # The frames before the one that is damaged are shown, and then what is wrong with it.
    rows = found["xr0 episodes", names[3]]
    assert len(rows.get("/camera/left_wrist", [])) < 10
    assert "3.left_wrist.mp4" in " ".join(texts(rows))
    assert not list(tmp_path.glob(".xr0-view-*"))


def test_the_overview_says_what_is_wrong(folder, tmp_path):
    show_dataset(folder, tmp_path / "set.rrd", [0])
    rows = read_all(tmp_path / "set.rrd")["xr0 dataset", "set"]
    text = rows["/overview"][0]["text"][0]
    assert "4 episodes that can be read, 38 ticks at 30 Hz" in text
    assert "episode_004.json is not valid JSON" in text
    assert "left_wrist" in text
    assert "| left joint 1 |" in text
    means = [row["scalars"] for row in rows["/mean/left_joints"] if row.get("scalars")]
    assert np.shape(means) == (12, 6)
    assert "/length_s" in rows


def test_chosen_episodes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["data", "view", str(folder), "--episodes", "2,0-1"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("view.rrd: 3 of 4 episodes, ")
    assert len(read_all(tmp_path / "view.rrd")) == 4
    again = CliRunner().invoke(app, ["data", "view", str(folder)])
    assert (again.exit_code, "view.rrd exists" in again.stderr) == (2, True)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,", "-2", "1-2-3"])
def test_numbers_that_are_none(text):
    with pytest.raises(ValueError, match="--episodes: expected numbers such as 0-4,7"):
        read_numbers(text)


def test_numbers():
    assert read_numbers("4, 0-2,1") == [4, 0, 1, 2]


def test_what_cannot_be_shown(folder, tmp_path):
    target = tmp_path / "set.rrd"
    with pytest.raises(ValueError, match="--episodes: expected 0 to 3, of those that can be read, got 4"):
        show_dataset(folder, target, [0, 4])
    lines = tmp_path / "lines.jsonl"
    lines.write_text("{}\n")
    with pytest.raises(ValueError, match="lines of questions and answers have none"):
        show_dataset(lines, target)
    shutil.rmtree(folder / "videos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        show_dataset(tmp_path / "empty", target)
    assert not target.exists()


def test_a_viewer_that_hangs_is_not_waited_for(folder, silent_viewer, monkeypatch):
    monkeypatch.setattr(sink, "STUCK_S", 0.3)
    with pytest.raises(OSError, match="the viewer hangs"):
        show_dataset(folder, silent_viewer)
