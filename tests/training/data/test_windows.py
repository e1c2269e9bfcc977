"""What a window's pictures are: the frame as the model's processor is given it, at run time and in training."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.training import points
from tests.training.data.fixtures import write_dataset
from xr0_engine.robot.embodiment import View, load_embodiment
from xr0_engine.robot.preprocess import orient
from xr0_engine.training.data import augment
from xr0_engine.training.data import kept as kept_episodes
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.windows import Windows, prepare

# A profile of two arms whose cameras hang upside down, one of them cropped too.
PROFILE = {
    "name": "hanging",
    "robot_types": ["hanging_v1"],
    "layout": "bimanual",
    "control_rate_hz": 30,
    "replan_every": None,
    "views": [
        {"key": "ego", "title": "Ego View", "rotate_180": True, "resize": [40, 48]},
        {"key": "left_wrist", "title": "Left-Wrist View", "rotate_180": True, "center_crop": 0.9},
        {"key": "right_wrist", "title": "Right-Wrist View"},
    ],
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("hanging"), lengths=(5,))
    (folder / "hanging.yaml").write_text(yaml.safe_dump(PROFILE))
    return folder


def describe(folder, **facts):
    (folder / "xr0.yaml").write_text(
        yaml.safe_dump({"robot_type": "hanging_v1", "embodiment": "hanging.yaml", **facts})
    )
    return open_source(folder)


@pytest.mark.parametrize(
    ("facts", "turned"),
    [({}, False), ({"pictures": "upright"}, False), ({"pictures": "camera"}, True)],
    ids=["not said", "upright", "camera"],
)
def test_pictures_are_turned_only_if_they_lie_as_the_camera_gives_them(recorded, facts, turned):
    source = describe(recorded, **facts)
    sample = Windows(source, [0], 4).sample(3)
    for view in source.description.embodiment.views:
        frame = source.load(0).image(view.key, 3)
        expected = orient(frame, view if turned else replace(view, rotate_180=False))
        np.testing.assert_array_equal(sample.images[view.key], expected)
        # Frame 3 shows itself in binary: turned, it is another picture.
        if view.rotate_180:
            assert not np.array_equal(orient(frame, view), orient(frame, replace(view, rotate_180=False)))


def test_what_is_taken_for_granted_is_said_once(recorded, caplog, tmp_path):
    for file in ("a", "b"):
        facts = {"robot_type": "x", "embodiment": str(recorded / "hanging.yaml"), "dataset": str(recorded)}
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(facts))
    with caplog.at_level(logging.WARNING, "xr0_engine.data"):
        for _ in range(3):
            open_source(tmp_path / "a.yaml")
        assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [str(tmp_path / "a.yaml")]
        assert "profile hanging" in caplog.text
        assert "`pictures: camera`" in caplog.text
        open_source(tmp_path / "b.yaml")
        assert len(caplog.records) == 2


def test_nothing_is_said_where_it_is_given_or_makes_no_difference(recorded, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, "xr0_engine.data"):
        describe(recorded, pictures="camera")
        describe(recorded, pictures="upright")
        (tmp_path / "xr0.yaml").write_text(yaml.safe_dump({"robot_type": "bimanual", "dataset": str(recorded)}))
        open_source(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("value", ["turned", True, None, ["upright"]], ids=str)
def test_unknown_word_for_pictures_is_refused(recorded, value):
    with pytest.raises(DataError, match=r"xr0\.yaml: pictures: expected upright or camera, got"):
        describe(recorded, pictures=value)


def test_without_rng_the_preparation_is_the_run_time_one():
    frames = {"base": np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)}
    view = load_embodiment("calvin").views[0]
    np.testing.assert_array_equal(prepare(frames, [view])["base"], orient(frames["base"], view))


@pytest.mark.parametrize("rotate", [False, True], ids=["upright", "turned"])
def test_random_crop_stands_for_the_centre_crop(monkeypatch, rotate):
    """Never both: every picture is one part of 0.95 of each side, at some place, of the turned and resized frame."""
    monkeypatch.setattr(augment, "PROBABILITY", 0.0)
    frame = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    view = View("base", "Base View", rotate, center_crop=0.95, resize=(64, 84))
    whole = Image.fromarray(orient(frame, replace(view, center_crop=1.0)))
    # 0.95 of 64 is 60.8, of 84 is 79.8.
    parts = {
        np.asarray(whole.crop((left, top, left + 79, top + 60)).resize(whole.size, Image.BILINEAR)).tobytes()
        for left in range(6)
        for top in range(5)
    }
    seen = {prepare({"base": frame}, [view], np.random.default_rng(seed))["base"].tobytes() for seed in range(40)}
    assert seen <= parts
    assert len(seen) > 10


def test_episodes_are_kept_by_their_length(monkeypatch):
    """Those that were asked for last; one that is longer than all that may be kept, while it is the last."""
    read, loads = [], points.Points.load
    monkeypatch.setattr(points.Points, "load", lambda self, number: read.append(number) or loads(self, number))
    kept, source = kept_episodes.Kept(), points.Points()
    monkeypatch.setattr(kept_episodes, "KEPT_TICKS", 2 * points.TICKS)
    for number in (0, 1, 0, 1, 2, 1, 0, 0):
        assert kept.get(source, number).name == source.names[number]
    assert read == [0, 1, 2, 0]
    monkeypatch.setattr(kept_episodes, "KEPT_TICKS", 1)
    for number in (3, 3, 0, 3):
        kept.get(source, number)
    assert read == [0, 1, 2, 0, 3, 0, 3]
    # A function's episodes may hold pictures: of short ones not as many as fit by their ticks.
    kept.clear()
    read.clear()
    monkeypatch.setattr(kept_episodes, "KEPT_TICKS", 1000 * points.TICKS)
    monkeypatch.setattr(kept_episodes, "KEPT_EPISODES", 2)
    for number in (0, 1, 0, 2, 0, 1):
        kept.get(source, number)
    assert read == [0, 1, 2, 1]
