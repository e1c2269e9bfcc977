"""Requests as bytes, and back: what a client may send, checked before anything is computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from xr0_engine.robot.history import MOST_FRAMES
from xr0_engine.robot.picture_cost import PictureError, decoding_cost
from xr0_engine.serve import openpi
from xr0_engine.serve.images import encode_jpeg, read_image
from xr0_engine.serve.protocol import PolicyMetadata, Refused, Request, request_id
from xr0_engine.serve.wire import MAX_DIMENSIONS, pack, unpack_map
from xr0_engine.types import Guide, Observation, RobotInfo

MAX_INSTRUCTION_LENGTH = 4096
"""Characters. The model's time and memory grow with them, whoever waits behind."""

_KNOWN = ("prompt", "instruction", "state", "robot_type", "timestamp_s", "prepared", "prefix", "guide", "seed", "id")


def encode_request(
    request: Request, jpeg_quality: int | None = None, max_pixels: int = sys.maxsize, videos: bool = False
) -> bytes:
    """jpeg_quality: 1 to 95 sends images as JPEG, None as they are; files go as they are. max_pixels: of an image.
    videos: whether the server has a robot type whose views are videos.

    Raises Refused for an image that a server would refuse, whichever way it is to be sent, for numbers that are none,
    and for what no message can hold.
    """
    observation = request.observation
    if not isinstance(observation, Observation) or not isinstance(observation.images, Mapping):
        raise Refused("images: expected an Observation that maps views to images")
    images = {
        view: (_encode_view if videos else _encode_image)(f"image {view!r:.80}", image, jpeg_quality, max_pixels)
        for view, image in observation.images.items()
    }
    try:
        return pack(_fields(request, observation, images))
    except (TypeError, ValueError) as error:
        raise Refused(str(error)) from None


def _fields(request: Request, observation: Observation, images: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        "images": images,
        "prompt": observation.instruction,
        "state": read_numbers("state", observation.state),
        "robot_type": observation.robot_type,
        "timestamp_s": observation.timestamp_s,
        # Left out where it is false: servers that do not know it refuse it.
        "prepared": _truth("prepared", observation.prepared) or None,
        "prefix": None if request.prefix is None else read_numbers("prefix", request.prefix),
        # Left out where there is none, as `prepared`.
        "guide": None if request.guide is None else _guide_fields(request.guide),
        "seed": request.seed,
        "id": request.id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def read_fields(message: bytes | str) -> dict[str, Any]:
    """A request's fields, unchecked but for their names' kind. Raises ValueError for what is no map in msgpack."""
    if isinstance(message, str):
        raise ValueError("message: expected a binary frame, got text")
    fields = unpack_map(message)
    if not all(isinstance(name, str) for name in fields):
        raise ValueError("message: expected a map with text as its keys")
    return fields


def decoded_pixels(fields: Mapping[str, Any], max_pixels: int) -> int:
    """What decoding the files among a request's images takes, as decoding_cost counts; 0 without files.

    Raises ValueError for a file that takes more than its size lets expect.
    """
    nested = fields.get("images")
    named = [*fields.items(), *(nested.items() if isinstance(nested, dict) else ())]
    files = [(name, value) for name, value in named if isinstance(value, bytes)]
    for name, value in named:
        if isinstance(value, list) and any(isinstance(frame, bytes) for frame in value):
            if len(value) > MOST_FRAMES:
                raise ValueError(
                    f"image {name!r:.80}: expected a video of at most {MOST_FRAMES} frames, got {len(value)}"
                )
            files += [(name, frame) for frame in value if isinstance(frame, bytes)]
    pixels = 0
    for name, value in files:
        try:
            # One at least: what is no picture is refused where it does not matter how long that takes.
            pixels += max(decoding_cost(value, max_pixels), 1)
        except PictureError as error:
            raise ValueError(f"image {name!r:.80}: {error}") from None
    return pixels


def read_request(fields: Mapping[str, Any], metadata: PolicyMetadata) -> Request:
    """The request that a client's fields make, ours or openpi's (docs/serving.md).

    Raises ValueError that names the field, what was expected and what came.
    """
    images, rest = _sort(fields)
    robot_type = metadata.resolve(_text(rest, "robot_type", optional=True))
    robot = metadata.robots[robot_type]
    read = _read_images(images, robot, metadata.max_image_pixels)
    state, columns = read_numbers("state", rest.get("state")), None
    if "prepared" not in rest:
        read = openpi.turned_back(read, fields, robot)
        if openpi.sends_libero(fields, state, robot):
            state = np.pad(state, (0, max(0, metadata.state_width - len(state))))
            columns = openpi.LIBERO_COLUMNS
    if state.ndim not in (1, 2) or state.shape[-1] != metadata.state_width:
        raise ValueError(f"state: expected {metadata.state_width} values, got shape {state.shape}")
    if robot.state_length is not None and state.shape != (robot.state_length, metadata.state_width):
        expected = (robot.state_length, metadata.state_width)
        raise ValueError(f"state: expected {expected}, the oldest first, got shape {state.shape}")
    instruction = _text(rest, "prompt") or ""
    if len(instruction) > MAX_INSTRUCTION_LENGTH:
        raise ValueError(f"prompt: expected at most {MAX_INSTRUCTION_LENGTH} characters, got {len(instruction)}")
    observation = Observation(
        images=read,
        instruction=instruction,
        state=state,
        robot_type=robot_type,
        timestamp_s=_timestamp(rest.get("timestamp_s")),
        prepared=_truth("prepared", rest.get("prepared", False)),
    )
    prefix = None if rest.get("prefix") is None else read_prefix("prefix", rest["prefix"], metadata)
    guide = None if rest.get("guide") is None else read_guide(rest["guide"], robot, metadata)
    if prefix is not None and guide is not None:
        raise ValueError("prefix, guide: expected at most one of them, got both")
    return Request(observation, prefix, read_seed(rest.get("seed")), request_id(rest), columns, guide)


def read_numbers(name: str, value: object) -> np.ndarray:
    """float32, finite. Raises ValueError for anything else."""
    _check_numbers(name, value, MAX_DIMENSIONS)
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected numbers, got lists of different lengths") from None
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: expected numbers, got {array.dtype}")
    # A double beyond float32 becomes infinite here, and is then refused; no warning besides.
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or inf")
    return array


def read_prefix(name: str, value: object, metadata: PolicyMetadata) -> np.ndarray:
    """(P, A) float32. Raises ValueError for anything else, and for another P than the server takes."""
    prefix = read_numbers(name, value)
    low, high = metadata.prefix_range
    if prefix.ndim != 2 or prefix.shape[1] != metadata.action_width or not low <= len(prefix) <= high:
        raise ValueError(
            f"{name}: expected {low} to {high} actions of {metadata.action_width} columns, got {prefix.shape}"
        )
    return prefix


def read_guide(value: object, robot: RobotInfo, metadata: PolicyMetadata) -> Guide:
    """Raises ValueError for anything but a map of `actions`, (G, A) with G at most the robot's chunk, and `frozen`, how
    many of these are executed meanwhile."""
    if not isinstance(value, Mapping) or value.keys() != {"actions", "frozen"}:
        raise ValueError(f"guide: expected a map of actions and frozen, got {value!r:.80}")
    actions, most = read_numbers("guide, actions", value["actions"]), robot.chunk_length
    if actions.ndim != 2 or actions.shape[1] != metadata.action_width or len(actions) > most:
        raise ValueError(
            f"guide, actions: expected up to {most} actions of {metadata.action_width} columns, got {actions.shape}"
        )
    frozen = value["frozen"]
    if not isinstance(frozen, int) or isinstance(frozen, bool) or not 0 <= frozen <= len(actions):
        raise ValueError(f"guide, frozen: expected 0 to {len(actions)}, got {frozen!r:.80}")
    return Guide(actions, frozen)


def _guide_fields(guide: Guide) -> dict[str, Any]:
    if not isinstance(guide, Guide):
        raise ValueError(f"guide: expected a Guide, got {type(guide).__name__}")
    return {"actions": read_numbers("guide, actions", guide.actions), "frozen": guide.frozen}


def read_seed(value: object) -> int | None:
    """Raises ValueError for what is neither None nor a whole number from 0."""
    if value is None:
        return None
    number = value.item() if isinstance(value, np.integer) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**62:
        raise ValueError(f"seed: expected a whole number from 0 below 2**62, got {value!r:.80}")
    return number


def _encode_view(name: str, image: Any, jpeg_quality: int | None, max_pixels: int) -> Any:
    """A picture; of a video, its frames one by one."""
    if isinstance(image, list | tuple) or (isinstance(image, np.ndarray) and image.ndim == 4):
        return [_encode_image(f"{name}, frame {at}", one, jpeg_quality, max_pixels) for at, one in enumerate(image)]
    return _encode_image(name, image, jpeg_quality, max_pixels)


def _encode_image(name: str, image: Any, jpeg_quality: int | None, max_pixels: int) -> Any:
    try:
        if isinstance(image, bytes):
            return image
        frame = read_image(name, image, max_pixels)
        return image if jpeg_quality is None else encode_jpeg(frame, jpeg_quality)
    except ValueError as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{name}: expected an image that JPEG can hold, got shape {image.shape}: {error}") from None


def _sort(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The images by their names, and all else by its names."""
    images: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in fields.items():
        name = key.removeprefix("observation/")
        if name == "images" and isinstance(value, dict):
            for inner, image in value.items():
                _put(images, inner, image)
        elif name.startswith("images/"):
            _put(images, name.removeprefix("images/"), value)
        elif name in _KNOWN:
            _put(rest, "prompt" if name == "instruction" else name, value)
        elif isinstance(value, np.ndarray | bytes):
            _put(images, name, value)
        else:
            raise ValueError(f"{key!r:.80}: unknown field; expected images and {', '.join(_KNOWN)}")
    return images, rest


def _put(place: dict[str, Any], name: str, value: object) -> None:
    if name in place:
        raise ValueError(f"{name!r:.80}: expected it once, got it under two names")
    place[name] = value


def _read_images(images: Mapping[str, Any], robot: RobotInfo, max_pixels: int) -> dict[str, np.ndarray]:
    views = robot.views
    read: dict[str, np.ndarray] = {}
    for name, image in images.items():
        view = openpi.view_of(name, views)
        if view not in views:
            raise ValueError(f"images: expected {', '.join(views)}; got {name!r:.80}")
        if view in read:
            raise ValueError(f"images: expected {view!r} once, got it twice")
        if robot.history is None:
            read[view] = read_image(f"image {name!r:.80}", image, max_pixels)
        else:
            read[view] = _read_video(f"image {name!r:.80}", image, max_pixels, robot.history[0])
    missing = [view for view in views if view not in read]
    if missing:
        raise ValueError(f"images: expected {', '.join(views)}; {', '.join(missing)} missing")
    return read


def _read_video(name: str, video: Any, max_pixels: int, frames: int) -> np.ndarray:
    """(frames, H, W, 3) of as many pictures, or of one array. Raises ValueError that names frames of other sizes."""
    is_video = isinstance(video, list | tuple) or (isinstance(video, np.ndarray) and video.ndim == 4)
    if not is_video or len(video) != frames:
        got = f"{len(video)}" if is_video else "one picture"
        raise ValueError(
            f"{name}: expected a video of {frames} frames, the oldest first, got {got}; where the past is shorter its "
            "oldest frame is repeated (xr0_engine.robot.history.History)"
        )
    read = [read_image(f"{name}, frame {at}", frame, max_pixels) for at, frame in enumerate(video)]
    if len({frame.shape for frame in read}) > 1:
        raise ValueError(f"{name}: expected frames of one size, got {[frame.shape[:2] for frame in read]}")
    return video if isinstance(video, np.ndarray) and video.shape[1:] == read[0].shape else np.stack(read)


def _text(fields: Mapping[str, Any], name: str, optional: bool = False) -> str | None:
    value = fields.get(name)
    if not isinstance(value, str) and not (optional and value is None):
        raise ValueError(f"{name}: expected text, got {'nothing' if value is None else type(value).__name__}")
    return value


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected true or false, got {value!r:.80}")
    return bool(value)


def _check_numbers(name: str, value: object, dimensions: int) -> None:
    """Before NumPy looks at lists: of one long text and many short ones it makes an array of long ones."""
    if isinstance(value, list | tuple):
        if not dimensions:
            raise ValueError(f"{name}: expected lists of numbers at most {MAX_DIMENSIONS} deep, got deeper ones")
        for item in value:
            _check_numbers(name, item, dimensions - 1)
    elif not isinstance(value, int | float | np.number | np.ndarray):
        raise ValueError(f"{name}: expected numbers, got {'nothing' if value is None else type(value).__name__}")


def _timestamp(value: object) -> float | None:
    if value is None:
        return None
    number = value.item() if isinstance(value, np.generic) else value
    if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"timestamp_s: expected seconds, got {value!r:.80}")
    return float(number)
