"""Xiaomi-Robotics-1's released clients against a real engine: archives of arrays, of both servers' requests.

The clients here are written from its spec alone: prompts byte for byte (3.3), patches (3.1, 3.2), archives (5).
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from tests.serve.test_legacy import free_port
from xr0_engine import AsyncClient, Client, Engine, Observation
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.robot.history import History
from xr0_engine.robot.prompt import TOKENIZER_FILE
from xr0_engine.serve import npz
from xr0_engine.serve.legacy import reader
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.worker import EngineThread

SAME = 1e-6
"""Units of order 1: the same float32 arithmetic on the same inputs, once through a socket."""
SIZE = (64, 96)
TOKENS = SIZE[0] * SIZE[1] // 32**2
TASK = "stack the bowls"
VIEW = "<|vision_start|>" + "<|image_pad|>" * TOKENS + "<|vision_end|>"
VIDEO = "".join(f"<{at} seconds><|vision_start|>{'<|video_pad|>' * TOKENS}<|vision_end|>" for at in ("0.0", "0.1"))
SEEN = "The following observations are captured from multiple views.\n"
ASKED = (
    f"Generate robot actions for the task:\n{TASK} /no_cot<|im_end|>\n<|im_start|>assistant\n<cot></cot><|im_end|>\n"
)
PROMPTS = {
    "mobile": (
        f"<|im_start|>user\n{SEEN}# Ego View\n{VIEW}\n# Left-Wrist View\n{VIEW}\n# Right-Wrist View\n{VIEW}\n{ASKED}"
    ),
    "vlabench_choice": (
        f"<|im_start|>user\n{SEEN}# Ego View\n{VIEW}\n# Base View\n{VIEW}\n# Left-Wrist View\n{VIEW}\n{ASKED}"
    ),
    "robocasa365": f"<|im_start|>user\nLeft camera: {VIDEO}\nRight camera: {VIDEO}\nWrist camera: {VIDEO}\n\n{ASKED}",
}


def patches(video: np.ndarray) -> np.ndarray:
    """(frames, H, W, 3) uint8, a picture as twice the same, as its patches (P, 1536)."""
    times, rows, columns = len(video) // 2, SIZE[0] // 16, SIZE[1] // 16
    scaled = (video / np.float32(127.5) - 1).transpose(0, 3, 1, 2).astype(np.float32)
    split = scaled.reshape(times, 2, 3, rows // 2, 2, 16, columns // 2, 2, 16)
    return split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(times * rows * columns, 1536)


def arrays(folder, seen: Observation) -> dict[str, np.ndarray]:
    """What both clients make of an observation."""
    videos = [video if video.ndim == 4 else np.stack([video] * 2) for video in seen.images.values()]
    kind = ("pixel_values", "image_grid_thw") if len(videos[0]) == 2 else ("pixel_values_videos", "video_grid_thw")
    grids = np.array([[len(video) // 2, SIZE[0] // 16, SIZE[1] // 16] for video in videos])
    ids = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode(PROMPTS[seen.robot_type]).ids
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        kind[0]: np.concatenate([patches(video) for video in videos]),
        kind[1]: grids,
        "state": np.atleast_2d(seen.state)[None],
    }


def asked_of_hugging_face(folder, engine, seen: Observation, seed: int = 3) -> dict[str, np.ndarray]:
    mask = engine.statistics[seen.robot_type].action_mask[None]
    return {**arrays(folder, seen), "action_mask": mask, "task_id": np.array(seen.robot_type), "seed": np.array(seed)}


def archive(fields: dict, save=np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **fields)
    return file.getvalue()


def png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


class ReleasedClient:
    """4 bytes of big-endian length, then the archive, both ways."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)

    def ask(self, payload: bytes) -> dict[str, np.ndarray]:
        """Raises ConnectionError where the server ends the connection, its only way to refuse."""
        self.socket.sendall(struct.pack(">I", len(payload)) + payload)
        with np.load(io.BytesIO(self._exactly(*struct.unpack(">I", self._exactly(4)))), allow_pickle=False) as reply:
            return dict(reply)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the server has ended the connection")
            data += more
        return data


def example(engine: Engine, robot_type: str) -> Observation:
    """As its clients prepare it."""
    return replace(engine.example(robot_type, SIZE), instruction=TASK, prepared=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A checkpoint of robots that see pictures; the state of the post-training one goes by quantiles."""
    folder = tmp_path_factory.mktemp("pictures") / "tiny"
    init_checkpoint(folder, "tiny", family="xr1")
    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_text())
    low = np.linspace(-2, -0.5, 60)
    told["action_config"]["mobile"]["state"] = {
        "rule": "post_training", "q01": low.tolist(), "q99": (low + 2.5).tolist()
    }  # fmt: skip
    file.write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A checkpoint as RoboCasa365's: videos, and four states."""
    folder = tmp_path_factory.mktemp("videos")
    plan = {"state_length": 4, "action_length": 16, "embodiment": "robocasa365"}
    (folder / "sizes.json").write_text(json.dumps(plan))
    init_checkpoint(folder / "tiny", config=folder / "sizes.json", family="xr1")
    return folder / "tiny"


@pytest.fixture(scope="module")
def engine(pictures):
    return Engine.from_pretrained(pictures, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def video_engine(videos):
    return Engine.from_pretrained(videos, device="cpu", dtype="float32")


def serving(engine: Engine, only: str | None = None) -> BackgroundServer:
    config = ServerConfig(port=0, legacy_port=free_port(), legacy_formats=("npz",))
    return BackgroundServer(EngineThread(lambda: engine, SIZE, only), config)


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="module")
def mobile_server(engine):
    with serving(engine, "mobile") as server:
        yield server


@pytest.fixture(scope="module")
def video_server(video_engine):
    with serving(video_engine) as server:
        yield server


def client_of(server) -> ReleasedClient:
    return ReleasedClient(server.server.config.legacy_port)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_give_normalised_chunks(pictures, engine, server, save):
    seen = example(engine, "vlabench_choice")
    client = client_of(server)
    reply = client.ask(archive(asked_of_hugging_face(pictures, engine, seen), save))
    client.socket.close()
    assert {name: (found.shape, found.dtype.name) for name, found in reply.items()} == {
        "actions": ((1, 10, 60), "float32")
    }
    np.testing.assert_allclose(reply["actions"][0], engine.infer(seen, seed=3).normalized, rtol=0, atol=SAME)


def test_videos_and_four_states_give_normalised_chunks(videos, video_engine, video_server):
    seen = example(video_engine, "robocasa365")
    sent = asked_of_hugging_face(videos, video_engine, seen)
    assert (sent["video_grid_thw"].tolist(), sent["state"].shape) == ([[2, 4, 6]] * 3, (1, 4, 60))
    client = client_of(video_server)
    expected = video_engine.infer(seen, seed=3).normalized
    np.testing.assert_allclose(client.ask(archive(sent))["actions"][0], expected, rtol=0, atol=SAME)
    unnamed = {name: value for name, value in sent.items() if name != "task_id"}
    np.testing.assert_allclose(client.ask(archive(unnamed))["actions"][0], expected, rtol=0, atol=SAME)
    client.socket.close()
    metadata = video_server.server.metadata
    with pytest.raises(ValueError, match="task_id: expected one of robocasa365, got 'vlabench_choice'"):
        reader(archive({**sent, "task_id": np.array("vlabench_choice")}), metadata, ("npz",))[0]()
    for name in ("CloseDrawer", ""):
        asked = reader(archive({**sent, "task_id": np.array(name)}), metadata, ("npz",))[0]()[0]
        assert asked.observation.robot_type == "robocasa365"
    uneven = {**sent, "video_grid_thw": np.array([[3, 4, 6], [1, 4, 6], [2, 4, 6]])}
    with pytest.raises(ValueError, match=r"video_grid_thw: expected as many .* for each view, got \[3, 1, 2\]"):
        reader(archive(uneven), metadata, ("npz",))[0]()
    # As many patches and placeholders in all, but not in each.
    moved = {**sent, "video_grid_thw": np.array([[2, 4, 6], [2, 4, 4], [2, 4, 8]])}
    asked = reader(archive(moved), metadata, ("npz",))[0]()[0]
    with pytest.raises(ValueError, match=r"input_ids: expected 4 image tokens in a row for grid \(4, 4\)"):
        video_engine.infer_tokenized(asked.observation)


def test_post_training_requests_take_raw_states_and_prefixes(pictures, engine, mobile_server):
    seen = example(engine, "mobile")
    client = client_of(mobile_server)
    committed = engine.infer(seen, seed=0).actions
    padded = np.zeros((1, 30, 60), np.float32)
    padded[0, :4] = committed[:4]
    sent = {**arrays(pictures, seen), "action": padded, "prefix_length": np.array(4)}
    # As of a processor of today: it tells no client from the other.
    sent["mm_token_type_ids"] = np.zeros_like(sent["input_ids"])
    reply = client.ask(archive(sent))
    assert list(reply) == ["action"]
    assert reply["action"].shape == (1, 30, 60)
    np.testing.assert_array_equal(reply["action"][0, :4], committed[:4])
    # These clients send no seed, and noise is drawn anew: what is sent is compared before it is drawn.
    asked, encode = reader(archive(sent), mobile_server.server.metadata, ("npz",))[0]()
    chunk = engine.infer_tokenized(asked.observation, asked.prefix, seed=3)
    expected = engine.infer(seen, prefix=committed[:4], seed=3)
    np.testing.assert_allclose(chunk.actions, expected.actions, rtol=0, atol=SAME)
    other = replace(seen, state=seen.state + 0.5)
    assert np.abs(engine.infer(other, prefix=committed[:4], seed=3).actions - expected.actions).max() > 1e-5
    np.testing.assert_array_equal(np.load(io.BytesIO(encode(chunk)))["action"][0], chunk.actions)
    none = client.ask(archive({**sent, "prefix_length": np.array(0)}))
    assert np.abs(none["action"][0, :4] - committed[:4]).max() > 1e-3
    client.socket.close()


def test_both_clients_of_ours_carry_videos(video_engine, video_server):
    steps = [replace(example(video_engine, "robocasa365"), prepared=False) for _ in range(5)]
    history = History.of(video_engine.robot_info("robocasa365"))
    for number, step in enumerate(steps):
        images = {view: video[0] + np.uint8(number) for view, video in step.images.items()}
        history.push(replace(step, images=images, state=step.state[0] + np.float32(number)))
    seen = history.observe()
    assert {video.shape for video in seen.images.values()} == {(4, *SIZE, 3)}
    assert seen.state.shape == (4, 60)
    with Client(video_server.url) as client:
        assert client.robot_info().history == (4, 2)
        chunk = client.infer(seen, seed=3)
        with pytest.raises(ValueError, match="expected a video of 4 frames, the oldest first, got one picture"):
            client.infer(replace(seen, images={view: video[-1] for view, video in seen.images.items()}))
        with pytest.raises(ValueError, match=r"state: expected \(4, 60\), the oldest first, got shape \(60,\)"):
            client.infer(replace(seen, state=seen.state[-1]))
        files = {view: [png(frame) for frame in video] for view, video in seen.images.items()}
        of_files = client.infer(replace(seen, images=files), seed=3)

    async def ask():
        async with AsyncClient(video_server.url) as client:
            return await client.infer(seen, seed=3)

    expected = video_engine.infer(seen, seed=3).actions
    for found in (chunk, of_files, asyncio.run(ask())):
        np.testing.assert_allclose(found.actions, expected, rtol=0, atol=SAME)


TEN = np.zeros((1, 10, 60), np.float32)
WRONG = {
    "another robot's mask": ("action_mask", TEN, "action_mask: expected the columns"),
    "another length": ("action_mask", TEN[:, :4], r"action_mask: expected numbers of shape \(10, 60\)"),
    "no mask": ("action_mask", None, "action_mask: expected an array"),
    "prefix": ("prefix_length", np.array(2), "prefix_length: expected no prefix beside action_mask"),
    "too few patches": ("pixel_values", np.zeros((71, 1536), np.float32), r"pixel_values: .*\(72, 1536\)"),
    "fewer grids": ("image_grid_thw", np.array([[1, 4, 6]] * 2), "image_grid_thw: expected a row"),
    "grid of odd sides": ("image_grid_thw", np.array([[1, 3, 8]] * 3), "expected multiples of 2 patches"),
    "grid beyond the limit": ("image_grid_thw", np.array([[1, 400, 600]] * 3), "expected at most .* pixels"),
    "negative grid": ("image_grid_thw", np.array([[1, -4, -6]] * 3), "image_grids: expected multiples"),
    "huge grid": ("image_grid_thw", np.array([[1, 2**62, 4]] * 3), "expected at most .* pixels"),
    "a video": ("image_grid_thw", np.array([[2, 4, 6]] * 3), "image_grid_thw: expected pictures, of time 1"),
    "videos' pixels": (
        "pixel_values_videos",
        np.zeros((72, 1536), np.float32),
        "pixel_values_videos: expected pixel_values and image_grid_thw alone",
    ),
    "placeholders": ("input_ids", np.full((1, 5), 7), "attention_mask: expected the shape of input_ids"),
    "not scaled": ("pixel_values", np.full((72, 1536), 255.0), "expected pixels scaled to"),
    "NaN": ("state", np.full((1, 1, 60), np.nan), "state: expected finite numbers"),
    "narrow state": ("state", np.zeros((1, 1, 32)), "state: expected numbers of shape"),
    "two states": ("state", np.zeros((1, 2, 60)), "state: expected numbers of shape"),
    "batch": ("state", np.zeros((2, 1, 60)), "state: expected a batch of one"),
    "unknown robot": ("task_id", np.array("r2d2"), "task_id: expected one of mobile, .*got 'r2d2'"),
    "seed below 0": ("seed", np.array(-1), "seed: expected a whole number"),
    "objects": ("state", np.array([{}]), "state: expected an array of numbers"),
    "structure": ("state", np.zeros(3, "f4,i4"), "state: expected an array of numbers"),
    "unknown member": ("language", np.array("Go."), "'language.npy': unknown member; expected input_ids"),
    "long text": ("task_id", np.array("x" * 9999), "task_id: expected at most 16384 bytes"),
    "texts": ("task_id", np.array(["a", "b"]), "task_id: expected kind U of 0 to 0 dimensions"),
    "text as state": ("state", np.array("a"), "state: expected kind f of 3 to 3 dimensions"),
}


@pytest.mark.parametrize(("field", "value", "complaint"), WRONG.values(), ids=WRONG)
def test_wrong_arrays_are_refused_by_name(pictures, engine, server, field, value, complaint):
    sent = {**asked_of_hugging_face(pictures, engine, example(engine, "vlabench_choice")), field: value}
    data = archive({name: value for name, value in sent.items() if value is not None})

    def asked():
        read, _ = reader(data, server.server.metadata, ("npz",))
        return engine.infer_tokenized(read()[0].observation)

    with pytest.raises(ValueError, match=complaint):
        asked()


def test_one_placeholder_less_is_refused(videos, video_engine, video_server):
    sent = asked_of_hugging_face(videos, video_engine, example(video_engine, "robocasa365"))
    video = video_engine.config.tokens.video
    at = int(np.flatnonzero(sent["input_ids"][0] == video)[0])
    fewer = {**sent, **{name: np.delete(sent[name], at, axis=1) for name in ("input_ids", "attention_mask")}}
    as_image = {**sent, "input_ids": np.where(sent["input_ids"] == video, video - 1, sent["input_ids"])}
    for wrong_one, complaint in ((fewer, "input_ids: "), (as_image, "input_ids: expected the token of videos")):
        asked = reader(archive(wrong_one), video_server.server.metadata, ("npz",))[0]()[0]
        with pytest.raises(ValueError, match=complaint):
            video_engine.infer_tokenized(asked.observation)


def test_a_refused_request_ends_the_connection_and_no_more(pictures, engine, server, caplog):
    good = asked_of_hugging_face(pictures, engine, example(engine, "vlabench_choice"))
    for payload in (archive({**good, "action_mask": TEN}), b"", b"\x80\x04N.", archive(good)[:-1]):
        client = client_of(server)
        with pytest.raises(ConnectionError):
            client.ask(payload)
        client.socket.close()
    for complaint in ("action_mask: expected", "message: expected npz, got b''", "--legacy-pickle", "npz: expected"):
        assert complaint in caplog.text
    client = client_of(server)
    assert client.ask(archive(good))["actions"].shape == (1, 10, 60)
    client.socket.close()


def test_a_length_beyond_the_limit_is_not_read(server):
    client = client_of(server)
    client.socket.sendall(struct.pack(">I", (1 << 27) + 1))
    with pytest.raises(ConnectionError):
        client._exactly(1)
    client.socket.close()


def test_archives_are_for_those_who_asked_for_them(server):
    with pytest.raises(ValueError, match=r"got an archive \(npz\): `xr0 serve --legacy-npz` takes these"):
        reader(archive({"seed": np.array(1)}), server.server.metadata, ("pickle",))
    with pytest.raises(ValueError, match="legacy_formats: expected pickle and npz"):
        ServerConfig(legacy_formats=("json",))
    read, _ = reader(npz.write(seed=np.array(1)), server.server.metadata, ("pickle", "npz"))
    with pytest.raises(ValueError, match="action_mask: expected an array"):
        read()
