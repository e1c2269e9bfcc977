"""Random damage to valid messages, for as long as asked: python -m tests.serve.fuzz SECONDS [SEED].

Every reader of bytes from a network either gives a value or raises ValueError: no other error, no hang, and no memory
that grows. `make fuzz` runs it for FUZZ_SECONDS, test_fuzz.py for a moment.
"""

from __future__ import annotations

import gc
import io
import pickle
import random
import resource
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from tests.serve.support import observation
from xr0_engine.robot.embodiment import embodiment_for
from xr0_engine.robot.picture_cost import decoding_cost
from xr0_engine.serve import npz
from xr0_engine.serve.images import encode_jpeg, read_image
from xr0_engine.serve.legacy import reader
from xr0_engine.serve.protocol import (
    PolicyMetadata,
    Refused,
    Reply,
    Request,
    check_digest,
    decode_metadata,
    decode_reply,
    encode_chunk,
    encode_error,
    encode_metadata,
)
from xr0_engine.serve.released import read_request as read_released
from xr0_engine.serve.requests import decoded_pixels, encode_request, read_fields, read_request
from xr0_engine.serve.unpickle import restricted_loads
from xr0_engine.serve.wire import pack
from xr0_engine.types import ActionChunk, Guide

MAX_PIXELS = 1 << 16
SLOWEST_S = 5.0
"""A message that takes longer is a hang: the slowest valid ones take milliseconds."""

SLOWEST_PICTURE_S = 2.0
"""Processor time to decode what the count of scans lets pass: the largest takes half a second."""

GROWTH_BYTES = 64 << 20
"""Memory that may come after a quarter of the time: the allocator's own ups and downs."""

ROBOT = embodiment_for("libero_all").robot_info(10, 32, 6)
METADATA = PolicyMetadata({"libero_all": ROBOT}, 32, 32, (0, 6), 1 << 20, MAX_PIXELS, 100.0)
OF_VIDEOS = replace(METADATA, robots={"libero_all": replace(ROBOT, history=(2, 2), state_length=4)})
TIMING = {"infer_ms": 1.0, "queue_ms": 1.0, "total_ms": 2.0}
BEFORE = 0x01020304

# Bytes that mean something to msgpack, to pickle, or in a JPEG.

SPICE = bytes(range(0x80, 0xA8)) + bytes(range(0xC0, 0x100)) + b"\0\1\x7f()RbcNrjX."

Target = tuple[Callable[[bytes], object], list[bytes]]


def picture_files(image: np.ndarray) -> list[bytes]:
    """Files of one image, of the kinds that encoders write."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    options: list[dict[str, object]] = [
        {"format": "JPEG"},
        {"format": "JPEG", "progressive": True, "icc_profile": bytes(300), "comment": b"from a camera"},
        {"format": "JPEG", "exif": exif, "subsampling": 0},
        {"format": "MPO", "save_all": True, "append_images": [Image.fromarray(image)]},
        {"format": "PNG"},
        {"format": "PNG", "exif": exif, "optimize": True},
    ]
    files = []
    for option in options:
        file = io.BytesIO()
        Image.fromarray(image).save(file, **option)
        files.append(file.getvalue())
    return files


def decode_picture(data: bytes) -> object:
    """As a request's pictures are: what it costs is counted first, and what was let pass is decoded in good time."""
    decoding_cost(data, MAX_PIXELS)
    start = time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read_image("image", data, MAX_PIXELS)
    finally:
        assert time.thread_time() - start < SLOWEST_PICTURE_S


def read_counted(data: bytes, metadata: PolicyMetadata = METADATA) -> object:
    """A request as the server reads it."""
    fields = read_fields(data)
    decoded_pixels(fields, MAX_PIXELS)
    return read_request(fields, metadata)


def read_archive(data: bytes, metadata: PolicyMetadata) -> object:
    """As the port of the released protocols does."""
    return reader(data, metadata, ("npz",))[0]()


def read_array(data: bytes) -> object:
    """An array's bytes in an archive that is whole, so that no sum of it tells of the damage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.npy", data)
    archive, fields = file.getvalue(), {"a": npz.Field("iufU", (0, 3), 1 << 20)}
    return npz.read(archive, npz.directory(archive, fields, 1 << 20), fields)


def archives(tensors: dict[str, object], videos: bool = False) -> list[bytes]:
    """Requests as archives, of either released server."""
    shared = {name: np.asarray(tensors[name]) for name in ("input_ids", "attention_mask", "state")}
    pixels, grids = ("pixel_values_videos", "video_grid_thw") if videos else ("pixel_values", "image_grid_thw")
    shared |= {pixels: np.zeros((16, 24), np.float32), grids: np.array([[1, 2, 4], [1, 4, 2]])}
    mask = {"action_mask": np.ones((1, 10, 32), np.float32), "task_id": np.array("libero_all"), "seed": np.array(42)}
    requests = [{**shared, **mask}]
    if not videos:
        requests.append({**shared, "action": np.asarray(tensors["action"]), "prefix_length": np.array(3)})
    made = []
    for save in (np.savez, np.savez_compressed):
        for request in requests:
            file = io.BytesIO()
            save(file, **request)
            made.append(file.getvalue())
    return made


def arrays(tensors: dict[str, object]) -> list[bytes]:
    """Files of single arrays."""
    made = []
    for array in (
        *map(np.asarray, (tensors["input_ids"], tensors["action"], "libero_all")),
        np.ones((2, 3), order="F"),
    ):
        file = io.BytesIO()
        np.save(file, array)
        made.append(file.getvalue())
    return made


def read_reply(data: bytes) -> Reply:
    """As a client does."""
    reply = decode_reply(data)
    if reply.digest is not None:
        check_digest(reply, data, BEFORE)
    return reply


def targets() -> dict[str, Target]:
    """Name -> what reads bytes, and valid messages to start from."""
    asked = observation(0.5, size=(16, 24), instruction="Pick up the bowl.", timestamp_s=1.5)
    prefix = np.ones((3, 32), np.float32)
    actions = np.random.default_rng(0).standard_normal((10, 32), dtype=np.float32)
    chunk = ActionChunk(actions, actions, np.ones(32, bool), "libero_all", 2, 1.5, {"flow": 3.0})
    pictures = {view: Image.fromarray(image) for view, image in asked.images.items()}
    released = {
        "task_id": "libero_all",
        "state": asked.state,
        "base": pictures["base"],
        "wrist_left": pictures["left_wrist"],
        "language": "Go.",
        "seed": np.int64(1),
    }
    ids = torch.tensor([[1, 2, 3, 3, 4, 5]])
    tensors = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(16, 24).bfloat16(),
        "image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 2]]),
        "state": torch.from_numpy(asked.state)[None, None],
        "action": torch.from_numpy(np.ones((1, 10, 32), np.float32)),
        "prefix_length": 3,
    }
    files = {view: encode_jpeg(image, 90) for view, image in asked.images.items()}
    with_files = pack({"images": files, "prompt": "Go.", "state": asked.state})
    videos = {view: np.stack([image, image[::-1]]) for view, image in asked.images.items()}
    of_videos = Request(replace(asked, images=videos, state=np.stack([asked.state] * 4)), prefix, 3, 7)
    return {
        "request of videos": (
            partial(read_counted, metadata=OF_VIDEOS),
            [encode_request(of_videos, quality, videos=True) for quality in (None, 90)],
        ),
        "request": (
            read_counted,
            [
                encode_request(Request(asked, prefix, 3, 7)),
                encode_request(Request(replace(asked, prepared=True))),
                encode_request(Request(asked, guide=Guide(prefix, 2))),
                pack(
                    {
                        "observation/image": asked.images["base"],
                        "observation/wrist_image": asked.images["base"],
                        "observation/state": np.zeros(8),
                        "prompt": "Go.",
                    }
                ),
                with_files,
            ],
        ),
        "legacy request": (
            lambda data: read_released(restricted_loads(data, MAX_PIXELS), METADATA),
            [pickle.dumps(request, protocol) for request in (released, tensors) for protocol in (2, 3, 4, 5)],
        ),
        "legacy archive": (partial(read_archive, metadata=METADATA), archives(tensors)),
        "legacy archive of videos": (partial(read_archive, metadata=OF_VIDEOS), archives(tensors, videos=True)),
        "array in an archive": (read_array, arrays(tensors)),
        "reply": (
            read_reply,
            [
                encode_chunk(chunk, 5, TIMING),
                encode_chunk(chunk, 5, TIMING, before=BEFORE),
                encode_error(Refused("no"), 3),
            ],
        ),
        "metadata": (decode_metadata, [encode_metadata(METADATA)]),
        "picture": (decode_picture, picture_files(asked.images["base"])),
    }


def damage(message: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The message with a few bytes changed, cut, doubled, or replaced by a piece of another."""
    data = bytearray(message)
    # Most of a message is pixels: the structure is at its ends, and around short fields.
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else min(rng.randrange(200), len(data) - 1)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] = rng.choice(SPICE)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 1000))]
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice((1, 8, 300))]
        elif kind == 4:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[at : at + 50] = other[start : start + rng.randrange(200)]
        else:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(16)))
            data[at : at + size] = (value % 256**size).to_bytes(size, rng.choice(("big", "little")))
        if not data:
            return b""
    return bytes(data)


def fuzz(seconds: float, seed: int) -> dict[str, int]:
    """Messages read per target. Raises AssertionError that holds the message for whatever must not be."""
    rng = random.Random(seed)
    read = dict.fromkeys(targets(), 0)
    start = time.monotonic()
    settled: int | None = None
    chosen = targets()
    while (elapsed := time.monotonic() - start) < seconds:
        if settled is None and elapsed > seconds / 4:
            settled = peak_bytes()
        for name, (reads, valid) in chosen.items():
            message = damage(rng.choice(valid), valid, rng)
            began = time.monotonic()
            try:
                with suppress(ValueError):
                    reads(message)
            except BaseException as error:
                raise AssertionError(f"{name}, seed {seed}: {error!r} for {message!r}") from error
            assert time.monotonic() - began < SLOWEST_S, f"{name}, seed {seed}: slow for {message!r}"
            read[name] += 1
    gc.collect()
    assert settled is not None
    growth = peak_bytes() - settled
    assert growth < GROWTH_BYTES, f"seed {seed}: memory grew by {growth >> 20} MiB"
    return read


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    print(f"wire: {sys.argv[1]} s, seed {seed}", flush=True)
    print(*(f"{count} of {name}" for name, count in fuzz(float(sys.argv[1]), seed).items()), sep=", ")
