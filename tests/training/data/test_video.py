"""Exactly the frame that is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.data.fixtures import HEIGHT, WIDTH, damage, frame_number, write_video
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip, video_writer


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", range(100))


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(range(100), id="in order"),
        pytest.param(range(99, -1, -7), id="backwards"),
        pytest.param(np.random.default_rng(0).permutation(100)[:40].tolist(), id="random"),
        pytest.param([50, 50, 51, 50, 66, 64], id="around"),
    ],
)
def test_every_frame_is_found(video, order):
    clip = Clip(video, 0.0, 100, 30.0)
    assert [frame_number(clip.read(frame)) for frame in order] == list(order)


@pytest.mark.parametrize("fps", [30, 29.97, 50, 15, 7.5])
def test_frame_rates(tmp_path, fps):
    clip = Clip(write_video(tmp_path / "v.mp4", range(40), fps), 0.0, 40, fps)
    assert [frame_number(clip.read(frame)) for frame in (39, 0, 17, 18, 3)] == [39, 0, 17, 18, 3]


def test_clip_begins_inside_the_file(video):
    clip = Clip(video, 40 / 30, 20, 30.0)
    assert [frame_number(clip.read(frame)) for frame in (0, 19, 7)] == [40, 59, 47]


@pytest.mark.parametrize(
    ("time_s", "frame"), [(0, 0), (0.049, 0), (0.05, 1), (0.149, 1), (0.15, 2), (99, 9), (-1, 0)], ids=str
)
def test_nearest_in_time(video, time_s, frame):
    assert Clip(video, 0.0, 10, 10.0).nearest(time_s) == frame


def test_crop(video):
    whole, part = Clip(video, 0.0, 100, 30.0), Clip(video, 0.0, 100, 30.0, (8, 4, 40, 30))
    assert part.read(5).shape == (26, 32, 3)
    np.testing.assert_array_equal(part.read(5), whole.read(5)[4:30, 8:40])


def test_crop_beyond_the_image_is_refused(video):
    with pytest.raises(DataError, match=f"v.mp4: crop_bbox .*{WIDTH}x{HEIGHT}"):
        Clip(video, 0.0, 100, 30.0, (0, 0, WIDTH + 1, 8)).read(0)


def test_small_object_keeps_its_place_and_colour(tmp_path):
    frame = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    frame[8:11, 21:24] = 255, 0, 0
    with video_writer(tmp_path / "v.mp4", WIDTH, HEIGHT, 30) as write:
        write(frame)
    read = Clip(tmp_path / "v.mp4", 0.0, 1, 30.0).read(0).astype(int)
    np.testing.assert_array_equal(read[..., 0] - read[..., 1] > 128, frame[..., 0] == 255)


def test_file_that_ends_early_names_file_and_frame(video):
    with pytest.raises(DataError, match=r"v.mp4: frame 100 of the clip: ends before 3.333 s"):
        Clip(video, 0.0, 120, 30.0).read(100)


def test_frame_that_the_clip_lacks(video):
    with pytest.raises(DataError, match=r"v.mp4: frame 30: the clip has frames 0 to 29"):
        Clip(video, 0.0, 30, 30.0).read(30)


def test_damaged_frame_names_file_and_frame_and_the_others_are_read(tmp_path):
    path = write_video(tmp_path / "v.mp4", range(100))
    damage(path)
    clip = Clip(path, 0.0, 100, 30.0)
    right, faults = [], {}
    for frame in range(100):
        try:
            right.append(frame_number(clip.read(frame)) == frame)
        except DataError as error:
            faults[frame] = str(error)
    assert right
    assert all(right)
    assert faults
    assert all(f"v.mp4: frame {frame} of the clip: " in message for frame, message in faults.items())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be opened"),
        (b"no video", "cannot be opened"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ".*git lfs pull"),
    ],
)
def test_no_video(tmp_path, content, complaint):
    (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(DataError, match=rf"v.mp4: frame 0 of the clip: {complaint}"):
        Clip(tmp_path / "v.mp4", 0.0, 1, 30.0).read(0)


def test_missing_video(tmp_path):
    with pytest.raises(DataError, match=r"none\.mp4: frame 0"):
        Clip(tmp_path / "none.mp4", 0.0, 1, 30.0).read(0)
