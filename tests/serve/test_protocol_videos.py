"""Videos and several states in the protocol."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.serve.support import observation
from tests.serve.test_protocol import IMAGE, LIBERO, MAX_PIXELS, METADATA, OTHER, PLAIN
from xr0_engine.serve.protocol import Request, decode_metadata, encode_metadata
from xr0_engine.serve.requests import decoded_pixels, encode_request, read_fields, read_request
from xr0_engine.serve.wire import pack, unpack_map
from xr0_engine.types import ViewInfo

VIDEOS = replace(LIBERO, history=(4, 2), state_length=4)
OF_VIDEOS = replace(METADATA, robots={"libero_all": VIDEOS})
VIDEO = np.stack([IMAGE, OTHER, IMAGE // 2, OTHER // 3])
VIDEO_STATES = np.arange(128, dtype=np.float32).reshape(4, 32)


def test_videos_and_several_states_survive():
    assert decode_metadata(encode_metadata(OF_VIDEOS)) == OF_VIDEOS
    asked = replace(observation(), images={"base": VIDEO, "left_wrist": VIDEO[::-1]}, state=VIDEO_STATES)
    read = read_request(read_fields(encode_request(Request(asked), videos=True)), OF_VIDEOS).observation
    for view, video in asked.images.items():
        np.testing.assert_array_equal(read.images[view], video)
    np.testing.assert_array_equal(read.state, VIDEO_STATES)


def test_videos_go_as_files_frame_by_frame():
    asked = replace(observation(), images={"base": VIDEO, "left_wrist": VIDEO}, state=VIDEO_STATES)
    fields = read_fields(encode_request(Request(asked), jpeg_quality=95, videos=True))
    assert [type(frame) for frame in fields["images"]["base"]] == [bytes] * 4
    assert (
        decoded_pixels(fields, MAX_PIXELS) == 8 * decoded_pixels({"base": fields["images"]["base"][0]}, MAX_PIXELS) > 0
    )
    read = read_request(fields, OF_VIDEOS).observation
    assert read.images["base"].shape == VIDEO.shape
    # Lossy, of noise.
    assert np.abs(read.images["base"].astype(int) - VIDEO).mean() < 20


@pytest.mark.parametrize(
    ("images", "match"),
    [
        ({"base": IMAGE}, "image 'base': expected a video of 4 frames, the oldest first, got one picture"),
        ({"base": VIDEO[1:]}, "image 'base': expected a video of 4 frames.*got 3"),
        ({"base": [IMAGE, IMAGE, IMAGE, IMAGE[:4]]}, "image 'base': expected frames of one size"),
        ({"base": [IMAGE, IMAGE, IMAGE, b"no file"]}, "image 'base', frame 3: expected a JPEG or PNG file"),
        ({"base": VIDEO.astype(np.float32)}, "image 'base', frame 0: .*float32"),
    ],
    ids=["one picture", "short", "sizes", "no file", "numbers"],
)
def test_frames_missing_from_a_video_are_refused(images, match):
    fields = {"images": {"base": VIDEO, "left_wrist": VIDEO} | images, "state": VIDEO_STATES, "prompt": "Go."}
    with pytest.raises(ValueError, match=match):
        read_request(fields, OF_VIDEOS)


def test_other_counts_of_states_are_refused():
    fields = {"images": {"base": VIDEO, "left_wrist": VIDEO}, "state": VIDEO_STATES[:3], "prompt": "Go."}
    with pytest.raises(ValueError, match=r"state: expected \(4, 32\), the oldest first, got shape \(3, 32\)"):
        read_request(fields, OF_VIDEOS)


def test_a_video_of_too_many_files_is_refused_before_they_are_looked_at():
    with pytest.raises(ValueError, match="image 'base': expected a video of at most 64 frames, got 100000"):
        decoded_pixels({"images": {"base": [b""] * 100_000}}, MAX_PIXELS)


def test_a_video_for_a_view_of_pictures_is_refused():
    with pytest.raises(ValueError, match="image 'base': expected a JPEG or PNG file or a uint8 array"):
        read_request(PLAIN | {"base": VIDEO}, METADATA)


def test_older_clients_are_told_nothing_of_videos():
    told = unpack_map(encode_metadata(METADATA))
    assert not {"history", "state_length"} & told["robots"]["libero_all"].keys()
    views = (ViewInfo("Base View"), ViewInfo("Ego View", resize=(256, 320), resize_filter="bilinear"))
    prepared = replace(METADATA, robots={"libero_all": replace(LIBERO, preparation=views)})
    plain, other = unpack_map(encode_metadata(prepared))["robots"]["libero_all"]["preparation"]
    assert "resize_filter" not in plain
    assert other["resize_filter"] == "bilinear"


@pytest.mark.parametrize("history", [[4], [4, 0], "42", [4, 2, 1]])
def test_a_history_that_is_none_is_refused(history):
    robots = {"libero_all": {**vars(LIBERO), "history": history}}
    fields = {**unpack_map(encode_metadata(METADATA)), "robots": robots}
    with pytest.raises(ValueError, match="history of another kind"):
        decode_metadata(pack(fields))
