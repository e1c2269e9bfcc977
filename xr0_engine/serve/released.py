"""What the released clients send (spec section 6), as requests: pictures and text, or tensors made on their side.

Their images come prepared: turned, resized and cropped as the model saw them in training, so no profile does it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xr0_engine.robot.history import MOST_FRAMES
from xr0_engine.robot.prompt import task_of
from xr0_engine.serve.protocol import PolicyMetadata, Request
from xr0_engine.serve.requests import read_numbers, read_prefix, read_seed
from xr0_engine.serve.requests import read_request as read_named
from xr0_engine.types import RobotInfo, TokenizedObservation

_PICTURES = ("task_id", "state", "base", "wrist_left", "language", "seed")
# mm_token_type_ids: newer processors add it. It says which tokens are images, as input_ids do.
_TENSORS = (
    *("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "state", "action", "prefix_length"),
    *("mm_token_type_ids", "task_id", "seed"),
)


def read_request(fields: object, metadata: PolicyMetadata) -> Request:
    """The request that a released client's dictionary makes. Raises ValueError that names the field."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"request: expected a dictionary, got {type(fields).__name__}")
    known = _TENSORS if "input_ids" in fields else _PICTURES
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r:.80}: unknown field; expected {', '.join(known)}")
    present = {name: value for name, value in fields.items() if value is not None}
    robot_type = _robot_type(present.get("task_id"), metadata)
    if "input_ids" in present:
        return read_tensors(present, robot_type, metadata)
    if "state" in present:
        present["state"] = _state(present["state"])
    if "seed" in present:
        present["seed"] = _single(present["seed"])
    return _of_pictures(present, robot_type, metadata)


def _robot_type(task: object, metadata: PolicyMetadata) -> str:
    if isinstance(task, str) and task in metadata.robots:
        return task
    # Some clients number their tasks, and the bimanual one names none; a name that is not served is another robot.
    if not isinstance(task, str) and len(metadata.robots) == 1:
        return metadata.resolve()
    raise ValueError(
        f"task_id: expected one of {', '.join(metadata.robots)}, got {task!r:.80}; clients that name none take "
        "a server of one robot type (--robot-type)"
    )


def _of_pictures(fields: Mapping[str, Any], robot_type: str, metadata: PolicyMetadata) -> Request:
    robot = metadata.robots[robot_type]
    named = {
        "robot_type": robot_type,
        "state": fields.get("state"),
        "prompt": _task(fields.get("language"), robot_type, robot),
        "seed": fields.get("seed"),
        "images": _images(fields, robot_type, robot),
        "prepared": True,
    }
    return read_named({name: value for name, value in named.items() if value is not None}, metadata)


def _task(language: object, robot_type: str, robot: RobotInfo) -> str:
    if not isinstance(language, str):
        raise ValueError(f"language: expected text, got {'nothing' if language is None else type(language).__name__}")
    try:
        return task_of(language, [view.title for view in robot.preparation or ()])
    except ValueError as error:
        raise ValueError(f"language: robot type {robot_type!r}: {error}") from None


def _images(fields: Mapping[str, Any], robot_type: str, robot: RobotInfo) -> dict[str, Any]:
    """View -> image. The clients of robots with one view call it `base`, whatever its name is."""
    views = robot.views
    names = {"base": views[0] if len(views) == 1 else "base", "wrist_left": "left_wrist"}
    has = f"robot type {robot_type!r} has {', '.join(views)}"
    unknown = [name for name, view in names.items() if name in fields and view not in views]
    if unknown:
        raise ValueError(f"{unknown[0]}: expected no image of that name, got one: {has}")
    images = {view: fields[name] for name, view in names.items() if name in fields}
    for view in views:
        if view not in images:
            name = next((name for name, meant in names.items() if meant == view), None)
            remedy = "" if name else ", which this protocol has no name for: send tensors, or use the websocket"
            raise ValueError(f"{name or view}: expected an image, got nothing: {has}{remedy}")
    return images


def read_tensors(fields: Mapping[str, Any], robot_type: str, metadata: PolicyMetadata, videos: bool = False) -> Request:
    """The request that a batch of one of the model's inputs makes, as transformers names them. videos: its pixels are
    videos'. Raises ValueError that names the field."""
    pixels, grids = ("pixel_values_videos", "video_grid_thw") if videos else ("pixel_values", "image_grid_thw")
    ids = _first("input_ids", fields["input_ids"])
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in fields and _array(name, fields[name]).shape != (1, *ids.shape):
            raise ValueError(f"{name}: expected the shape of input_ids, got {fields[name].shape}")
    # Padding changes nothing: positions count the tokens that are left.
    mask = _first("attention_mask", fields.get("attention_mask")) != 0
    observation = TokenizedObservation(
        input_ids=ids[mask],
        pixel_values=_array(pixels, fields.get(pixels)),
        image_grids=_grids(grids, _array(grids, fields.get(grids)), metadata.robots[robot_type].views, videos),
        state=_state(fields.get("state")),
        robot_type=robot_type,
        action_mask=_first("action_mask", fields["action_mask"]) if "action_mask" in fields else None,
    )
    return Request(observation, _prefix(fields, metadata), read_seed(_single(fields.get("seed"))))


def _state(value: object) -> np.ndarray:
    """Also as a batch of one, (1, state length, S), and as lists."""
    state = read_numbers("state", value)
    return _first("state", state) if state.ndim == 3 else state


def _prefix(fields: Mapping[str, Any], metadata: PolicyMetadata) -> np.ndarray | None:
    """The first prefix_length rows of action, in robot units: the released server normalises them itself."""
    if "action" not in fields and "prefix_length" not in fields:
        return None
    length = _single(fields.get("prefix_length"))
    if isinstance(length, int) and length == 0:
        return None
    action = _first("action", fields.get("action"))
    if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= len(action):
        raise ValueError(
            f"prefix_length: expected how many of action's {len(action)} rows are committed, 0 for none, got "
            f"{length!r:.80}"
        )
    return read_prefix("action, prefix_length", action[:length], metadata)


def _single(value: object) -> object:
    """The number in an array of one; all else as it is."""
    return value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value


def _grids(name: str, thw: np.ndarray, views: Sequence[str], videos: bool) -> tuple[tuple[int, int], ...]:
    """(height, width) of each view's picture, of a video once for each of its temporal patches."""
    if thw.shape != (len(views), 3) or thw.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected a row (time, height, width) for each view ({', '.join(views)}), got {thw.dtype} of "
            f"shape {thw.shape}"
        )
    most = MOST_FRAMES if videos else 1
    if not ((thw[:, 0] >= 1) & (thw[:, 0] <= most)).all():
        times = f"1 to {most} temporal patches" if videos else "pictures, of time 1"
        raise ValueError(f"{name}: expected {times}, got {thw.tolist()!r:.80}")
    # What becomes of them is a list of pictures, of which the engine sees no more than how many there are.
    if len(set(thw[:, 0].tolist())) > 1:
        raise ValueError(f"{name}: expected as many temporal patches for each view, got {thw[:, 0].tolist()!r:.80}")
    return tuple((height, width) for times, height, width in thw.tolist() for _ in range(times))


def _first(name: str, value: object) -> np.ndarray:
    """The only element of a batch of one."""
    array = _array(name, value)
    if array.ndim < 2 or len(array) != 1:
        raise ValueError(f"{name}: expected a batch of one, got shape {array.shape}")
    first: np.ndarray = array[0]
    return first


def _array(name: str, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name}: expected a tensor, got {'nothing' if value is None else type(value).__name__}")
    return value
