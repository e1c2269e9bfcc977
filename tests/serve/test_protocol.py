"""Requests of our clients and of openpi's, and what is refused in them."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.serve.support import observation
from xr0_engine.serve.protocol import (
    Busy,
    PolicyFailed,
    PolicyMetadata,
    Refused,
    Request,
    RobotInfo,
    Superseded,
    decode_metadata,
    decode_reply,
    encode_chunk,
    encode_error,
    encode_metadata,
)
from xr0_engine.serve.requests import encode_request, read_fields, read_request
from xr0_engine.serve.wire import pack
from xr0_engine.types import ActionChunk, ViewInfo

MAX_PIXELS = 10_000
LIBERO = RobotInfo(10, 20.0, 10, ("base", "left_wrist"), "plain")
BIMANUAL = RobotInfo(30, 30.0, None, ("ego", "left_wrist", "right_wrist"), "bimanual")
METADATA = PolicyMetadata({"libero_all": LIBERO, "bimanual": BIMANUAL}, 32, 32, (0, 6), 1 << 20, MAX_PIXELS, 100.0)
IMAGE = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
OTHER = IMAGE[::-1]
STATE = np.arange(32, dtype=np.float32)
PLAIN = {"base": IMAGE, "left_wrist": OTHER, "state": STATE, "prompt": "Go.", "robot_type": "libero_all"}


def png(width: int, height: int) -> bytes:
    """A file of few bytes that says it has this many pixels, all black."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (1 + 3 * width) * min(height, 100))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b"")


def file(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def test_metadata_survives():
    assert decode_metadata(encode_metadata(METADATA)) == METADATA


def test_metadata_tell_what_is_done_to_a_frame():
    views = (ViewInfo("Base View", rotate_180=True), ViewInfo("Ego View", resize=(256, 320), center_crop=0.95))
    told = replace(METADATA, robots={"libero_all": replace(LIBERO, preparation=views, embodiment="own")})
    read = decode_metadata(encode_metadata(told))
    assert read == told
    assert read.robot().preparation[1].resize == (256, 320)


def test_metadata_of_an_older_server_are_read():
    def older(robot: RobotInfo) -> dict:
        names = ("chunk_length", "control_rate_hz", "replan_every", "views", "layout")
        return {name: getattr(robot, name) for name in names}

    rest = {"action_width": 32, "state_width": 32, "prefix_range": [0, 6], "max_message_bytes": 1 << 20}
    limits = {"max_image_pixels": MAX_PIXELS, "max_requests_per_s": 100.0}
    robots = {name: older(robot) for name, robot in METADATA.robots.items()}
    assert decode_metadata(pack({"protocol": 1, "robots": robots, **rest, **limits})) == METADATA


@pytest.mark.parametrize("views", [3, [3], [{"title": "Base View", "tilt": 1}]], ids=["number", "numbers", "unknown"])
def test_preparation_that_is_none_is_refused(views):
    message = pack({"protocol": 1, "robots": {"libero_all": {**vars(LIBERO), "preparation": views}}})
    with pytest.raises(ValueError, match="server: expected metadata of xr0-engine"):
        decode_metadata(message)


def test_metadata_of_another_server_is_refused():
    with pytest.raises(ValueError, match="expected xr0-engine's protocol 1"):
        decode_metadata(pack({"policy": "pi0"}))


@pytest.mark.parametrize("prepared", [False, True], ids=["raw", "prepared"])
@pytest.mark.parametrize("prefix", [None, np.ones((3, 32), np.float32)], ids=["no prefix", "prefix"])
def test_request_survives(prefix, prepared):
    request = Request(observation(timestamp_s=3.5, prepared=prepared), prefix, 7, 12)
    read = read_request(read_fields(encode_request(request)), METADATA)
    assert (read.id, read.seed, read.observation.prepared) == (12, 7, prepared)
    assert (read.observation.instruction, read.observation.timestamp_s) == ("Warm up.", 3.5)
    np.testing.assert_array_equal(read.observation.state, request.observation.state)
    for view, image in request.observation.images.items():
        np.testing.assert_array_equal(read.observation.images[view], image)
    np.testing.assert_array_equal(read.prefix, prefix)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(PLAIN, id="flat"),
        pytest.param({"observation/" + name: value for name, value in PLAIN.items()}, id="observation/"),
        pytest.param(
            {
                "images": {"base": IMAGE, "left_wrist": OTHER},
                "state": STATE,
                "instruction": "Go.",
                "robot_type": "libero_all",
            },
            id="images in a map",
        ),
        pytest.param(
            {
                "images/base": IMAGE,
                "images/left_wrist": OTHER,
                "state": STATE.tolist(),
                "prompt": "Go.",
                "robot_type": "libero_all",
            },
            id="images/",
        ),
        pytest.param(
            {
                "observation/image": IMAGE,
                "observation/wrist_image": OTHER,
                "observation/state": STATE.astype(np.float64),
                "prompt": "Go.",
                "robot_type": "libero_all",
            },
            id="openpi's LIBERO example",
        ),
        pytest.param(
            {**PLAIN, "base": IMAGE.transpose(2, 0, 1), "left_wrist": OTHER.transpose(2, 0, 1)}, id="colour first"
        ),
        pytest.param({**PLAIN, "base": file(IMAGE, "PNG"), "left_wrist": file(OTHER, "PNG")}, id="PNG"),
    ],
)
def test_every_spelling_of_an_observation_is_the_same(fields):
    read = read_request(read_fields(pack(fields)), METADATA).observation
    np.testing.assert_array_equal(read.images["base"], IMAGE)
    np.testing.assert_array_equal(read.images["left_wrist"], OTHER)
    np.testing.assert_array_equal(read.state, STATE)
    assert read.state.dtype == np.float32
    assert (read.instruction, read.robot_type) == ("Go.", "libero_all")


def test_jpeg_comes_close():
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    request = Request(observation())
    request.observation.images.update(base=smooth, left_wrist=smooth)
    message = encode_request(request, jpeg_quality=90)
    assert len(message) < smooth.nbytes
    read = read_request(read_fields(message), METADATA).observation.images["base"]
    assert np.abs(read.astype(int) - smooth).mean() < 3


FRAMES = {
    "float": IMAGE.astype(np.float32),
    "16 bits": IMAGE.astype(np.uint16),
    "grey": IMAGE[..., 0],
    "one channel": IMAGE[..., :1],
    "alpha": np.concatenate([IMAGE, IMAGE[..., :1]], 2),
    "alpha first": np.concatenate([IMAGE, IMAGE[..., :1]], 2).transpose(2, 0, 1),
    "empty": IMAGE[:0],
    "flat": IMAGE.ravel(),
    "a batch": IMAGE[None],
    "too many pixels": np.zeros((101, 100, 3), np.uint8),
    "list": IMAGE.tolist(),
    "picture": Image.fromarray(IMAGE),
    "nothing": None,
}


@pytest.mark.parametrize("image", FRAMES.values(), ids=FRAMES)
def test_frame_is_refused_alike_raw_and_as_jpeg(image):
    request = Request(replace(observation(), images={"base": image, "left_wrist": OTHER}))
    complaints = []
    for quality in (None, 90):
        with pytest.raises(Refused, match="image 'base': expected") as refused:
            encode_request(request, quality, MAX_PIXELS)
        complaints.append(str(refused.value))
    assert complaints[0] == complaints[1]
    if isinstance(image, np.ndarray):
        # And as the server itself says it.
        with pytest.raises(ValueError, match="image 'base': expected") as told:
            read_request({**PLAIN, "base": image}, METADATA)
        assert str(told.value) == complaints[0]


@pytest.mark.parametrize("quality", [None, 90], ids=["raw", "JPEG"])
def test_frame_with_colours_first_is_taken_alike(quality):
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    images = {"base": smooth.transpose(2, 0, 1), "left_wrist": file(smooth, "PNG")}
    message = encode_request(Request(replace(observation(), images=images)), quality)
    for image in read_request(read_fields(message), METADATA).observation.images.values():
        assert np.abs(image.astype(int) - smooth).mean() < 3


def test_images_that_are_no_map_are_refused():
    with pytest.raises(Refused, match="images: expected an Observation that maps views to images"):
        encode_request(Request(replace(observation(), images=[IMAGE, OTHER])))


UNSENDABLE = {
    "state of objects": ({"state": np.array([None] * 32)}, {}, "state: expected numbers, got object"),
    "state of another library": ({"state": memoryview(STATE)}, {}, "state: expected numbers, got memoryview"),
    "prefix of texts": ({}, {"prefix": [["left"]]}, "prefix: expected numbers, got str"),
    "prepared in words": ({"prepared": "yes"}, {}, "prepared: expected true or false, got 'yes'"),
    "seed of another library": ({}, {"seed": 3j}, "message: expected plain values and arrays, got complex"),
}


@pytest.mark.parametrize(("observed", "asked", "complaint"), UNSENDABLE.values(), ids=UNSENDABLE)
def test_what_no_message_holds_is_refused_before_it_is_sent(observed, asked, complaint):
    with pytest.raises(Refused, match=complaint):
        encode_request(Request(replace(observation(), **observed), **asked))


def test_robot_type_may_be_left_out_where_there_is_one():
    fields = {name: value for name, value in PLAIN.items() if name != "robot_type"}
    with pytest.raises(ValueError, match="robot_type: expected one of libero_all, bimanual; got None"):
        read_request(fields, METADATA)
    only = PolicyMetadata({"libero_all": LIBERO}, 32, 32, (0, 6), 1 << 20, MAX_PIXELS, 100.0)
    assert read_request(fields, only).observation.robot_type == "libero_all"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param({"base": None}, "'base': unknown field", id="image of nothing"),
        pytest.param(
            {"base": IMAGE.astype(np.float32)}, "image 'base': expected a JPEG or PNG file or a uint8", id="float"
        ),
        pytest.param({"base": IMAGE[..., 0]}, r"array \(H, W, 3\), got shape \(8, 16\), a grey image", id="grey"),
        pytest.param({"base": np.zeros((8, 16, 4), np.uint8)}, "image 'base': .*with alpha: lay it on a", id="alpha"),
        pytest.param({"base": file(IMAGE[..., 0], "PNG")}, "image 'base': .*is a grey image", id="grey PNG"),
        pytest.param(
            {"base": file(np.zeros((8, 16, 4), np.uint8), "PNG")},
            "image 'base': .*alpha channel: lay it",
            id="RGBA PNG",
        ),
        pytest.param(
            {"base": np.zeros((0, 4, 3), np.uint8)},
            r"image 'base': .*shape \(0, 4, 3\), an empty image",
            id="no pixels",
        ),
        pytest.param({"base": np.zeros((101, 100, 3), np.uint8)}, "got 100 x 101", id="large array"),
        pytest.param({"base": png(5000, 5000)}, "got 5000 x 5000", id="PNG bomb"),
        pytest.param({"base": png(200_000, 200_000)}, "image 'base': expected", id="PNG bomb that Pillow refuses"),
        pytest.param({"base": png(90, 90)[:60]}, "image 'base': expected a JPEG or PNG file", id="cut off PNG"),
        pytest.param({"base": b"GIF89a" + bytes(50)}, "image 'base': expected a JPEG or PNG file", id="no picture"),
        pytest.param({"base": file(IMAGE, "BMP")}, "image 'base': expected a JPEG or PNG file", id="BMP"),
        pytest.param({"middle": IMAGE}, "images: expected base, left_wrist; got 'middle'", id="unknown view"),
        pytest.param({"image": IMAGE}, "images: expected 'base' once, got it twice", id="view twice"),
        pytest.param({"images": 3}, "'images': unknown field", id="images no map"),
        pytest.param({"prepared": 1}, "prepared: expected true or false, got 1", id="prepared by a number"),
        pytest.param({"prepared": None}, "prepared: expected true or false, got None", id="prepared by nothing"),
        pytest.param({"observation/base": IMAGE}, "'base': expected it once, got it under two", id="image twice"),
        pytest.param({"images": {"base": IMAGE}}, "'base': expected it once, got it under two", id="flat and in a map"),
        pytest.param({"observation/state": STATE}, "'state': expected it once, got it under two", id="state twice"),
        pytest.param({"instruction": "Stop."}, "'prompt': expected it once, got it under two", id="prompt twice"),
        pytest.param({"prefx": [1.0]}, "'prefx': unknown field", id="unknown field"),
        pytest.param({"prompt": 3}, "prompt: expected text, got int", id="prompt"),
        pytest.param({"prompt": None}, "prompt: expected text, got nothing", id="no prompt"),
        pytest.param({"state": None}, "state: expected numbers, got nothing", id="no state"),
        pytest.param({"state": "zero"}, "state: expected numbers, got str", id="state of text"),
        pytest.param({"state": ["zero"]}, "state: expected numbers, got str", id="state with text in it"),
        pytest.param({"state": [[[[[1.0]]]]]}, "state: expected lists of numbers at most 4 deep", id="deep state"),
        pytest.param({"prompt": "Go. " * 2000}, "prompt: expected at most 4096 characters, got 8000", id="long prompt"),
        pytest.param(
            {"state": [[1.0], [1.0, 2.0]]}, "state: expected numbers, got lists of different", id="ragged state"
        ),
        pytest.param({"state": STATE * np.nan}, "state: expected finite", id="NaN state"),
        pytest.param({"state": np.full(32, 1e300)}, "state: expected finite", id="state beyond float32"),
        pytest.param({"state": STATE[:8]}, r"state: expected 32 values, got shape \(8,\)", id="short state"),
        pytest.param({"prefix": np.zeros((7, 32))}, "prefix: expected 0 to 6 actions of 32 columns", id="long prefix"),
        pytest.param({"prefix": np.zeros((3, 7))}, "prefix: expected 0 to 6 actions of 32 columns", id="narrow prefix"),
        pytest.param({"prefix": np.full((3, 32), np.inf)}, "prefix: expected finite", id="infinite prefix"),
        pytest.param(
            {"guide": np.zeros((3, 32))}, "guide: expected a map of actions and frozen", id="guide of numbers"
        ),
        pytest.param({"guide": {"actions": np.zeros((3, 32))}}, "guide: expected a map of", id="guide without frozen"),
        pytest.param(
            {"guide": {"actions": np.zeros((11, 32)), "frozen": 3}},
            r"guide, actions: expected up to 10 actions of 32 columns, got \(11, 32\)",
            id="long guide",
        ),
        pytest.param(
            {"guide": {"actions": np.zeros((3, 7)), "frozen": 3}}, "guide, actions: expected up to", id="narrow guide"
        ),
        pytest.param(
            {"guide": {"actions": np.full((3, 32), np.inf), "frozen": 3}}, "guide, actions: expected finite", id="inf"
        ),
        pytest.param(
            {"guide": {"actions": np.zeros((3, 32)), "frozen": 4}}, "guide, frozen: expected 0 to 3, got 4", id="frozen"
        ),
        pytest.param(
            {"guide": {"actions": np.zeros((3, 32)), "frozen": True}},
            "guide, frozen: expected 0 to 3",
            id="frozen true",
        ),
        pytest.param(
            {"guide": {"actions": np.zeros((3, 32)), "frozen": 1}, "prefix": np.zeros((2, 32))},
            "prefix, guide: expected at most one of them",
            id="prefix and guide",
        ),
        pytest.param({"seed": -1}, "seed: expected a whole number", id="negative seed"),
        pytest.param({"seed": True}, "seed: expected a whole number", id="seed of truth"),
        pytest.param({"seed": 1.0}, "seed: expected a whole number", id="seed with a point"),
        pytest.param({"timestamp_s": float("nan")}, "timestamp_s: expected seconds", id="timestamp"),
        pytest.param(
            {"robot_type": "r2d2"}, "robot_type: expected one of libero_all, bimanual; got 'r2d2'", id="robot"
        ),
        pytest.param({"id": "1"}, "id: expected a whole number", id="id"),
    ],
)
def test_wrong_field_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_request({**PLAIN, **change}, METADATA)


def test_texts_where_numbers_belong_take_no_memory():
    """NumPy would give each of these short texts the room of the long one: 2 GB for half a megabyte."""
    state = [["x" * 65_000] + [""] * 1000] * 8
    message = pack({**PLAIN, "state": state})
    tracemalloc.start()
    with pytest.raises(ValueError, match="state: expected numbers, got str"):
        read_request(read_fields(message), METADATA)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize("message", ["text", pack([1]), pack({b"state": 1})], ids=["text", "list", "bytes as key"])
def test_what_is_no_map_of_fields_is_refused(message):
    with pytest.raises(ValueError, match="message: expected"):
        read_fields(message)


def chunk(actions: np.ndarray) -> ActionChunk:
    return ActionChunk(actions, actions, np.ones(32, bool), "libero_all", 2, 1.5, {"flow": 3.0})


TIMING = {"infer_ms": 1.0, "queue_ms": 2.0, "total_ms": 4.0}


def test_chunk_survives():
    actions = np.random.default_rng(0).standard_normal((10, 32), dtype=np.float32)
    reply = decode_reply(encode_chunk(chunk(actions), 5, TIMING))
    assert reply.id == 5
    np.testing.assert_array_equal(reply.chunk.actions, actions)
    assert (reply.chunk.robot_type, reply.chunk.prefix_length, reply.chunk.timestamp_s) == ("libero_all", 2, 1.5)
    assert reply.chunk.timing_ms == {"flow": 3.0, "queue": 2.0, "server": 4.0}


@pytest.mark.parametrize("number", [3, None], ids=["as map", "as text"])
@pytest.mark.parametrize("kind", [Refused, Superseded, Busy, PolicyFailed])
def test_error_survives(kind, number):
    reply = decode_reply(encode_error(kind("state: no"), number))
    assert (type(reply.error), str(reply.error), reply.id) == (kind, "state: no", number)


@pytest.mark.parametrize(
    "actions",
    [np.full((10, 32), np.nan, np.float32), np.zeros(32, np.float32), np.zeros((10, 32), np.int32)],
    ids=["NaN", "one action", "integers"],
)
def test_client_takes_no_unusable_actions(actions):
    with pytest.raises(ValueError, match="actions: expected"):
        decode_reply(encode_chunk(chunk(actions), 1, TIMING))


def test_client_takes_no_half_reply():
    with pytest.raises(ValueError, match="server: expected a chunk"):
        decode_reply(pack({"id": 1, "actions": np.zeros((1, 32), np.float32)}))
