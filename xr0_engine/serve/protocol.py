"""What client and server say to each other. docs/serving.md is the contract for those who write their own client.

The server's first message is its PolicyMetadata. Then the client sends requests, one map each, and gets one reply to
each: a map with the chunk, or an error. A request with an `id` gets its error as a map with that id; without one, as a
text frame, which is how openpi's clients expect it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xr0_engine.serve.images import encode_jpeg, read_image
from xr0_engine.serve.wire import MAX_DIMENSIONS, pack, unpack
from xr0_engine.types import ActionChunk, Observation

PROTOCOL_VERSION = 1
DEFAULT_PORT = 8000
MAX_INSTRUCTION_LENGTH = 4096
"""Characters. The model's time and memory grow with them, whoever waits behind."""


class Refused(ValueError):
    """The request was wrong: name, expected, got. Nothing was computed."""

    kind = "refused"


class Superseded(RuntimeError):
    """A newer observation of the same client took this one's place before its turn came."""

    kind = "superseded"


class Busy(RuntimeError):
    """The server would not take the request now: too many per second, or it is shutting down."""

    kind = "busy"


class PolicyFailed(RuntimeError):
    """The model gave no usable actions (not finite, out of memory, ...); the next request may succeed."""

    kind = "failed"


ServerError = Refused | Superseded | Busy | PolicyFailed
ERRORS: dict[str, type[ServerError]] = {error.kind: error for error in (Refused, Superseded, Busy, PolicyFailed)}


@dataclass(frozen=True)
class RobotInfo:
    """How one robot type is driven.

    chunk_length: T, actions in a chunk. control_rate_hz: actions executed per second. replan_every: actions executed
    before the next inference starts, None where inference runs beside execution. views: image keys, in the prompt's
    order. layout: `plain` or `bimanual`, columns and anchoring of the actions.
    """

    chunk_length: int
    control_rate_hz: float
    replan_every: int | None
    views: tuple[str, ...]
    layout: str


@dataclass(frozen=True)
class PolicyMetadata:
    """What a server serves.

    robots: robot type -> how it is driven. action_width: A, columns of an action. state_width: S, columns of the state.
    prefix_range: fewest and most prefix actions that a request may carry. max_message_bytes, max_image_pixels,
    max_requests_per_s: what one client may send.
    """

    robots: Mapping[str, RobotInfo]
    action_width: int
    state_width: int
    prefix_range: tuple[int, int]
    max_message_bytes: int
    max_image_pixels: int
    max_requests_per_s: float

    @property
    def robot_types(self) -> tuple[str, ...]:
        return tuple(self.robots)

    def resolve(self, robot_type: str | None = None) -> str:
        """The robot type that is meant; None: the only one. Raises ValueError that lists the known ones."""
        if robot_type is None and len(self.robots) == 1:
            return next(iter(self.robots))
        if robot_type is None or robot_type not in self.robots:
            raise ValueError(f"robot_type: expected one of {', '.join(self.robots)}; got {robot_type!r:.80}")
        return robot_type

    def robot(self, robot_type: str | None = None) -> RobotInfo:
        """How a robot type is driven; None and errors as in resolve."""
        return self.robots[self.resolve(robot_type)]


@dataclass(frozen=True)
class Request:
    """One observation to infer from. id: the client's own number for it, None from clients that count replies."""

    observation: Observation
    prefix: np.ndarray | None = None
    seed: int | None = None
    id: int | None = None


# Names under which openpi's examples send their cameras -> the view, where the robot has no view of that very name.
# None: the robot's first view.
_OPENPI_VIEWS = {
    "image": None,
    "cam_high": None,
    "wrist_image": "left_wrist",
    "cam_left_wrist": "left_wrist",
    "cam_right_wrist": "right_wrist",
}


def encode_metadata(metadata: PolicyMetadata) -> bytes:
    return pack({"protocol": PROTOCOL_VERSION, **asdict(metadata)})


def decode_metadata(message: bytes) -> PolicyMetadata:
    """Raises ValueError if the server speaks another protocol."""
    fields = _mapping(unpack(message))
    if fields.pop("protocol", None) != PROTOCOL_VERSION:
        raise ValueError(f"server: expected xr0-engine's protocol {PROTOCOL_VERSION}, got {list(fields)!r:.200}")
    try:
        robots = {
            name: RobotInfo(**{**robot, "views": tuple(robot["views"])}) for name, robot in fields.pop("robots").items()
        }
        return PolicyMetadata(robots=robots, prefix_range=tuple(fields.pop("prefix_range")), **fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"server: expected metadata of xr0-engine, got something else: {error}") from None


def encode_request(request: Request, jpeg_quality: int | None = None) -> bytes:
    """jpeg_quality: 1 to 95 sends images as JPEG, None as they are."""
    observation = request.observation
    fields = {
        "images": {
            view: image if jpeg_quality is None else encode_jpeg(image, jpeg_quality)
            for view, image in observation.images.items()
        },
        "prompt": observation.instruction,
        "state": observation.state,
        "robot_type": observation.robot_type,
        "timestamp_s": observation.timestamp_s,
        "prefix": request.prefix,
        "seed": request.seed,
        "id": request.id,
    }
    return pack({name: value for name, value in fields.items() if value is not None})


def read_fields(message: bytes | str) -> dict[str, Any]:
    """A request's fields, unchecked but for their names' kind. Raises ValueError for what is no map in msgpack."""
    if isinstance(message, str):
        raise ValueError("message: expected a binary frame, got text")
    fields = _mapping(unpack(message))
    if not all(isinstance(name, str) for name in fields):
        raise ValueError("message: expected a map with text as its keys")
    return fields


def request_id(fields: Mapping[str, Any]) -> int | None:
    """Raises ValueError if there is one that is no whole number."""
    number = fields.get("id")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise ValueError(f"id: expected a whole number, got {number!r:.80}")
    return number


def has_files(fields: Mapping[str, Any]) -> bool:
    """Whether some image is a file that takes time to decode."""
    nested = fields.get("images")
    values = [*fields.values(), *(nested.values() if isinstance(nested, dict) else ())]
    return any(isinstance(value, bytes) for value in values)


def read_request(fields: Mapping[str, Any], metadata: PolicyMetadata) -> Request:
    """The request that a client's fields make, ours or openpi's (docs/serving.md).

    Raises ValueError that names the field, what was expected and what came.
    """
    images: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in fields.items():
        name = key.removeprefix("observation/")
        if name == "images" and isinstance(value, dict):
            images.update(value)
        elif name.startswith("images/"):
            images[name.removeprefix("images/")] = value
        elif name in _KNOWN:
            rest["prompt" if name == "instruction" else name] = value
        elif isinstance(value, np.ndarray | bytes):
            images[name] = value
        else:
            raise ValueError(f"{key!r:.80}: unknown field; expected images and {', '.join(_KNOWN)}")
    robot_type = metadata.resolve(_text(rest, "robot_type", optional=True))
    robot = metadata.robots[robot_type]
    state = _numbers("state", rest.get("state"))
    if state.ndim not in (1, 2) or state.shape[-1] != metadata.state_width:
        raise ValueError(f"state: expected {metadata.state_width} values, got shape {state.shape}")
    instruction = _text(rest, "prompt") or ""
    if len(instruction) > MAX_INSTRUCTION_LENGTH:
        raise ValueError(f"prompt: expected at most {MAX_INSTRUCTION_LENGTH} characters, got {len(instruction)}")
    observation = Observation(
        images=_read_images(images, robot.views, metadata.max_image_pixels),
        instruction=instruction,
        state=state,
        robot_type=robot_type,
        timestamp_s=_timestamp(rest.get("timestamp_s")),
    )
    prefix = None if rest.get("prefix") is None else _numbers("prefix", rest["prefix"])
    if prefix is not None:
        _check_prefix(prefix, metadata)
    return Request(observation, prefix, _seed(rest.get("seed")), request_id(rest))


_KNOWN = ("prompt", "instruction", "state", "robot_type", "timestamp_s", "prefix", "seed", "id")


def encode_chunk(chunk: ActionChunk, number: int | None, server_timing: Mapping[str, float]) -> bytes:
    """server_timing: infer_ms (in the engine; openpi's clients know it), queue_ms (waiting), total_ms (both and the
    rest of the server).
    """
    fields = {
        "id": number,
        "actions": chunk.actions,
        "normalized": chunk.normalized,
        "active_columns": chunk.active_columns,
        "robot_type": chunk.robot_type,
        "prefix_length": chunk.prefix_length,
        "timestamp_s": chunk.timestamp_s,
        "policy_timing": dict(chunk.timing_ms),
        "server_timing": dict(server_timing),
    }
    return pack({name: value for name, value in fields.items() if value is not None})


def encode_error(error: ServerError, number: int | None) -> bytes | str:
    """A binary frame if the request had a number, else text."""
    if number is None:
        return f"{error.kind}: {error}"
    return pack({"id": number, "error": {"kind": error.kind, "message": str(error)}})


@dataclass(frozen=True)
class Reply:
    """chunk or error, the answer to the request of that number."""

    id: int | None
    chunk: ActionChunk | None = None
    error: ServerError | None = None


def decode_reply(message: bytes | str) -> Reply:
    """Raises ValueError for what is no reply."""
    if isinstance(message, str):
        kind, _, text = message.partition(": ")
        return Reply(None, error=ERRORS[kind](text) if kind in ERRORS else PolicyFailed(message))
    fields = _mapping(unpack(message))
    number = request_id(fields)
    if "error" in fields:
        error = _mapping(fields["error"])
        return Reply(number, error=ERRORS.get(str(error.get("kind")), PolicyFailed)(error.get("message", "")))
    try:
        chunk = ActionChunk(
            actions=fields["actions"],
            normalized=fields["normalized"],
            active_columns=fields["active_columns"],
            robot_type=fields["robot_type"],
            prefix_length=fields["prefix_length"],
            timestamp_s=fields.get("timestamp_s"),
            timing_ms={
                **fields["policy_timing"],
                "queue": fields["server_timing"]["queue_ms"],
                "server": fields["server_timing"]["total_ms"],
            },
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"server: expected a chunk, got {list(fields)!r:.200}: {error!r}") from None
    check_chunk(chunk)
    return Reply(number, chunk)


def check_chunk(chunk: ActionChunk) -> None:
    """Both sides ask before they let a chunk pass. Raises ValueError if it holds anything but finite actions."""
    for name, actions in (("actions", chunk.actions), ("normalized", chunk.normalized)):
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
            raise ValueError(f"{name}: expected a float array (T, A), got {_describe(actions)}")
        if not np.isfinite(actions).all():
            raise ValueError(f"{name}: expected finite actions, got NaN or inf")


def _describe(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _read_images(images: Mapping[str, Any], views: tuple[str, ...], max_pixels: int) -> dict[str, np.ndarray]:
    read = {}
    for name, image in images.items():
        view = name
        if name not in views and name in _OPENPI_VIEWS:
            view = _OPENPI_VIEWS[name] or views[0]
        if view not in views:
            raise ValueError(f"images: expected {', '.join(views)}; got {name!r:.80}")
        if view in read:
            raise ValueError(f"images: expected {view!r} once, got it twice")
        read[view] = read_image(f"image {name!r:.80}", image, max_pixels)
    missing = [view for view in views if view not in read]
    if missing:
        raise ValueError(f"images: expected {', '.join(views)}; {', '.join(missing)} missing")
    return read


def _check_prefix(prefix: np.ndarray, metadata: PolicyMetadata) -> None:
    low, high = metadata.prefix_range
    if prefix.ndim != 2 or prefix.shape[1] != metadata.action_width or not low <= len(prefix) <= high:
        raise ValueError(
            f"prefix: expected {low} to {high} actions of {metadata.action_width} columns, got {prefix.shape}"
        )


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"message: expected a map, got {type(value).__name__}")
    return value


def _text(fields: Mapping[str, Any], name: str, optional: bool = False) -> str | None:
    value = fields.get(name)
    if not isinstance(value, str) and not (optional and value is None):
        raise ValueError(f"{name}: expected text, got {'nothing' if value is None else type(value).__name__}")
    return value


def _numbers(name: str, value: object) -> np.ndarray:
    """float32, finite."""
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


def _check_numbers(name: str, value: object, dimensions: int) -> None:
    """Before NumPy looks at lists: of one long text and many short ones it makes an array of long ones."""
    if isinstance(value, list | tuple):
        if not dimensions:
            raise ValueError(f"{name}: expected lists of numbers at most {MAX_DIMENSIONS} deep, got deeper ones")
        for item in value:
            _check_numbers(name, item, dimensions - 1)
    elif not isinstance(value, int | float | np.number | np.ndarray):
        raise ValueError(f"{name}: expected numbers, got {'nothing' if value is None else type(value).__name__}")


def _seed(value: object) -> int | None:
    if value is None:
        return None
    number = value.item() if isinstance(value, np.integer) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**62:
        raise ValueError(f"seed: expected a whole number from 0 below 2**62, got {value!r:.80}")
    return number


def _timestamp(value: object) -> float | None:
    if value is None:
        return None
    number = value.item() if isinstance(value, np.generic) else value
    if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"timestamp_s: expected seconds, got {value!r:.80}")
    return float(number)
