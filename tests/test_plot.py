"""Pictures: what they are made of, and that the files are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xr0_engine.plot import STAGES, plot_chunk, plot_rollout, spread, video_writer
from xr0_engine.robot.embodiment import Embodiment, load_embodiment
from xr0_engine.types import ActionChunk, Observation

pytest.importorskip("matplotlib")

BIMANUAL_ACTIVE = np.array([column not in (13, 27, 28, 29, 30, 31) for column in range(32)])
# H.264 stores colour at half resolution and lossily; a wrong channel order is off by 200.
VIDEO_COLOR_TOLERANCE = 12


def make_chunk(length: int, active: np.ndarray, prefix_length: int = 0) -> ActionChunk:
    actions = np.random.default_rng(0).standard_normal((length, 32)).astype(np.float32)
    timing_ms = dict.fromkeys((*STAGES, "total"), 1.5)
    return ActionChunk(actions, actions, active, "robot", prefix_length, timing_ms=timing_ms)


def make_observation(embodiment: Embodiment, timestamp_s: float | None = None) -> Observation:
    images = {view.key: np.full((48, 64, 3), 90, np.uint8) for view in embodiment.views}
    return Observation(images, "Fold the towel.", np.zeros((1, 32), np.float32), "robot", timestamp_s)


def shades(path: Path) -> int:
    """Number of different colours: a blank picture has one."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize(
    ("name", "length", "active", "prefix_length"),
    [
        ("bimanual", 30, BIMANUAL_ACTIVE, 3),
        ("libero", 10, np.arange(32) < 7, 0),
        ("bridge", 1, np.arange(32) == 4, 0),
    ],
    ids=["bimanual-with-prefix", "libero", "one-column-one-step"],
)
def test_chunk_picture(tmp_path, name, length, active, prefix_length):
    embodiment = load_embodiment(name)
    path = tmp_path / "chunk.png"
    plot_chunk(make_chunk(length, active, prefix_length), make_observation(embodiment), embodiment, path)
    assert shades(path) > 50


def test_chunk_without_active_columns_is_refused(tmp_path):
    embodiment = load_embodiment("libero")
    with pytest.raises(ValueError, match="active columns"):
        plot_chunk(make_chunk(10, np.zeros(32, bool)), make_observation(embodiment), embodiment, tmp_path / "chunk.png")


@pytest.mark.parametrize("inferences", [1, 9])
def test_rollout_picture(tmp_path, inferences):
    embodiment = load_embodiment("bimanual")
    observations = [make_observation(embodiment, index / 3) for index in range(inferences)]
    chunks = [make_chunk(30, BIMANUAL_ACTIVE)] * inferences
    path = tmp_path / "rollout.png"
    planned = [chunk.actions for chunk in chunks]
    plot_rollout(observations, chunks, planned, np.zeros((10 * inferences, 32)), embodiment, path, "a rollout")
    assert shades(path) > 50


def test_rollout_without_timestamps_is_refused(tmp_path):
    embodiment = load_embodiment("bimanual")
    with pytest.raises(ValueError, match="timestamp_s"):
        plot_rollout(
            [make_observation(embodiment)],
            [make_chunk(30, BIMANUAL_ACTIVE)],
            [np.zeros((30, 32))],
            np.zeros((10, 32)),
            embodiment,
            tmp_path / "rollout.png",
            "a rollout",
        )


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])], ids=str
)
def test_spread_keeps_both_ends(count, expected):
    assert spread(count, 4) == expected


def test_video_keeps_every_frame_and_its_colors(tmp_path):
    av = pytest.importorskip("av")
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    path = tmp_path / "film.mp4"
    with video_writer(path, 96, 64, 30) as write:
        for color in colors:
            write(np.full((64, 96, 3), color, np.uint8))
    with av.open(str(path)) as film:
        assert film.streams.video[0].average_rate == 30
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 3
    for frame, color in zip(frames, colors, strict=True):
        np.testing.assert_allclose(frame.reshape(-1, 3).mean(0), color, atol=VIDEO_COLOR_TOLERANCE)
