"""What Xiaomi-Robotics-1's released clients send (docs/serving.md): archives of the model's inputs, made on their
side. Two servers were released, with a request each; the fields tell which one a client expects, and so the reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xr0_engine.robot.embodiment import embodiment_for
from xr0_engine.robot.prompt import MAX_PROMPT_TOKENS
from xr0_engine.serve import npz
from xr0_engine.serve.protocol import PolicyMetadata, Request
from xr0_engine.serve.released import read_tensors
from xr0_engine.types import ActionChunk

MAX_ARCHIVE_BYTES = 1 << 27
"""The released servers' own limit of a message, and ours of what it unpacks to."""

_WHOLE = npz.MAX_HEAD_BYTES + 8
_TOKENS = npz.Field("iub", (2, 2), npz.MAX_HEAD_BYTES + 8 * MAX_PROMPT_TOKENS)
_PIXELS = npz.Field("f", (2, 2), MAX_ARCHIVE_BYTES)
_GRIDS = npz.Field("iu", (2, 2), npz.MAX_HEAD_BYTES + 8 * 3 * 64)
_ACTIONS = npz.Field("fiub", (3, 3), 1 << 20)
_NUMBER = npz.Field("iu", (0, 1), _WHOLE)

_SHARED = {
    "input_ids": _TOKENS,
    "attention_mask": _TOKENS,
    "state": npz.Field("f", (3, 3), 1 << 16),
    # Newer processors add it for either client. It says which tokens are images, as input_ids do.
    "mm_token_type_ids": _TOKENS,
}
_PICTURES = {"pixel_values": _PIXELS, "image_grid_thw": _GRIDS}
_PREFIX = {"action": _ACTIONS, "prefix_length": _NUMBER}
_VIDEOS = {"pixel_values_videos": _PIXELS, "video_grid_thw": _GRIDS}
_HUGGING_FACE = {"action_mask": _ACTIONS, "task_id": npz.Field("U", (0, 0), 1 << 14), "seed": _NUMBER}
FIELDS = {**_SHARED, **_PICTURES, **_PREFIX, **_VIDEOS, **_HUGGING_FACE}
"""Of both requests."""

Reply = Callable[[ActionChunk], bytes]


def read_request(fields: Mapping[str, Any], metadata: PolicyMetadata) -> tuple[Request, Reply]:
    """The request that a client's arrays make, and what its chunk is sent as.

    The Hugging Face server's clients send the chunk's mask and decode what they get; the post-training server's send a
    prefix or neither, and get robot units. A request with something of both, or of the first without its mask, could be
    either's. Raises ValueError that names the field.
    """
    normalized = any(name in fields for name in (*_VIDEOS, *_HUGGING_FACE))
    if normalized and (both := [name for name in _PREFIX if name in fields]):
        raise ValueError(f"{both[0]}: expected no prefix beside {', '.join(_HUGGING_FACE)}, got one")
    if normalized and "action_mask" not in fields:
        raise ValueError("action_mask: expected an array, as the Hugging Face server's clients send, got nothing")
    robot_type = _robot_type(fields.get("task_id"), metadata)
    videos = metadata.robots[robot_type].history is not None
    kind, other = (_VIDEOS, _PICTURES) if videos else (_PICTURES, _VIDEOS)
    if wrong := [name for name in other if name in fields]:
        raise ValueError(
            f"{wrong[0]}: expected {' and '.join(kind)} alone, as the views of robot type {robot_type!r} are "
            f"{'videos' if videos else 'pictures'}"
        )
    return read_tensors(fields, robot_type, metadata, videos), _normalized if normalized else _decoded


def _robot_type(task: object, metadata: PolicyMetadata) -> str:
    if isinstance(task, str) and task in metadata.robots:
        return task
    # The released servers look at no name, and clients send what they like; the name of another robot is a mistake.
    if len(metadata.robots) == 1 and not _is_known(task):
        return metadata.resolve()
    raise ValueError(
        f"task_id: expected one of {', '.join(metadata.robots)}, got {'nothing' if task is None else repr(task):.80}; "
        "clients of other names, or none, take a server of one robot type (--robot-type)"
    )


def _is_known(task: object) -> bool:
    """Whether it names a robot type of a built-in profile."""
    if not isinstance(task, str):
        return False
    try:
        embodiment_for(task)
    except ValueError:
        return False
    return True


def _normalized(chunk: ActionChunk) -> bytes:
    return npz.write(actions=chunk.normalized[None])


def _decoded(chunk: ActionChunk) -> bytes:
    return npz.write(action=chunk.actions[None])
