"""What client and server say to each other. docs/serving.md is the contract for those who write their own client.

The server's first message is its PolicyMetadata. Then the client sends requests, one map each, and gets one reply to
each: a map with the chunk, or an error. A request with an `id` gets its error as a map with that id; without one, as a
text frame, which is how openpi's clients expect it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xr0_engine.serve.wire import as_map, pack, unpack_map
from xr0_engine.types import ActionChunk, Guide, Observation, RobotInfo, TokenizedObservation, ViewInfo

PROTOCOL_VERSION = 1
DIGEST = "crc32"
DIGEST_BYTES = 4
DIGESTED_BYTES = 1 << 16
"""Of a request, its end: all but the images, which come first. They would cost a millisecond each way."""
DEFAULT_PORT = 8000


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
    """One observation to infer from.

    id: the client's own number for it, None from clients that count replies. columns: how many of an action's columns
    the client takes, the first ones; None takes all.
    """

    observation: Observation | TokenizedObservation
    prefix: np.ndarray | None = None
    seed: int | None = None
    id: int | None = None
    columns: int | None = None
    guide: Guide | None = None


def encode_metadata(metadata: PolicyMetadata) -> bytes:
    fields = asdict(metadata)
    for robot in fields["robots"].values():
        # What XR-0's clients of before do not know is left out where it says nothing.
        for name in ("history", "state_length"):
            if robot[name] is None:
                del robot[name]
        for view in robot["preparation"] or ():
            if view["resize_filter"] == ViewInfo.resize_filter:
                del view["resize_filter"]
    return pack({"protocol": PROTOCOL_VERSION, **fields})


def decode_metadata(message: bytes) -> PolicyMetadata:
    """Raises ValueError if the server speaks another protocol, or if a field is not what a client may rely on."""
    fields = unpack_map(message)
    if fields.pop("protocol", None) != PROTOCOL_VERSION:
        raise ValueError(f"server: expected xr0-engine's protocol {PROTOCOL_VERSION}, got {list(fields)!r:.200}")
    try:
        robots = {name: _robot_info(robot) for name, robot in fields.pop("robots").items()}
        metadata = PolicyMetadata(robots=robots, prefix_range=tuple(fields.pop("prefix_range")), **fields)
        fault = _metadata_fault(metadata)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"server: expected metadata of xr0-engine, got something else: {error}") from None
    if fault:
        raise ValueError(f"server: expected metadata of xr0-engine, got {fault}")
    return metadata


def _metadata_fault(metadata: PolicyMetadata) -> str | None:
    """The first field that is not of its kind; None if all are. Raises TypeError for what cannot be looked into."""
    robots, prefix_range = metadata.robots, metadata.prefix_range
    whole = {name: getattr(metadata, name) for name in ("action_width", "state_width", "max_message_bytes")}
    checks = {
        "robots": bool(robots) and all(isinstance(name, str) for name in robots),
        **{name: _is_whole(value, 1) for name, value in whole.items()},
        "max_image_pixels": _is_whole(metadata.max_image_pixels, 1),
        "max_requests_per_s": is_real(metadata.max_requests_per_s) and metadata.max_requests_per_s > 0,
        "prefix_range": len(prefix_range) == 2 and all(map(_is_whole, prefix_range)),
    }
    for name, robot in robots.items():
        known = {
            "chunk_length": _is_whole(robot.chunk_length, 1),
            "control_rate_hz": is_real(robot.control_rate_hz) and robot.control_rate_hz > 0,
            "replan_every": robot.replan_every is None or _is_whole(robot.replan_every, 1),
            "views": bool(robot.views) and all(isinstance(view, str) for view in robot.views),
            "layout": isinstance(robot.layout, str),
            "action_width": robot.action_width is None or _is_whole(robot.action_width, 1),
            "max_prefix": robot.max_prefix is None or _is_whole(robot.max_prefix),
            "step_columns": all(map(_is_whole, robot.step_columns or ())),
            "two_valued_columns": all(map(_is_whole, robot.two_valued_columns or ())),
            "preparation": all(isinstance(view.title, str) for view in robot.preparation or ()),
            "embodiment": robot.embodiment is None or isinstance(robot.embodiment, str),
            "history": robot.history is None or _is_pair(robot.history),
            "state_length": robot.state_length is None or _is_whole(robot.state_length, 1),
        }
        checks |= {f"robots, {name!r:.40}, {field}": is_right for field, is_right in known.items()}
    return next((f"{name} of another kind" for name, is_right in checks.items() if not is_right), None)


def is_real(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**62


def _is_pair(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) == 2 and all(_is_whole(value, 1) for value in values)


def _robot_info(fields: Mapping[str, Any]) -> RobotInfo:
    values = _with_tuples(fields)
    if values.get("preparation") is not None:
        values["preparation"] = tuple(ViewInfo(**_with_tuples(view)) for view in values["preparation"])
    return RobotInfo(**values)


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists become the tuples that our nouns hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def request_id(fields: Mapping[str, Any]) -> int | None:
    """Raises ValueError if there is one that is no whole number."""
    number = fields.get("id")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise ValueError(f"id: expected a whole number, got {number!r:.80}")
    return number


def encode_chunk(
    chunk: ActionChunk,
    number: int | None,
    server_timing: Mapping[str, float],
    columns: int | None = None,
    before: int | None = None,
) -> bytes:
    """server_timing: infer_ms (in the engine; openpi's clients know it), queue_ms (waiting), total_ms (both and the
    rest of the server). columns: as in Request. before: as exchanged gives it, for a digest.
    """
    fields = {
        "id": number,
        "actions": chunk.actions if columns is None else chunk.actions[:, :columns],
        "normalized": chunk.normalized,
        "active_columns": chunk.active_columns,
        "robot_type": chunk.robot_type,
        "prefix_length": chunk.prefix_length,
        "timestamp_s": chunk.timestamp_s,
        "policy_timing": dict(chunk.timing_ms),
        "server_timing": dict(server_timing),
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if before is None:
        return pack(fields)
    # Last, so that it covers all before it; of a length that does not depend on it.
    message = pack({**fields, DIGEST: bytes(DIGEST_BYTES)})[:-DIGEST_BYTES]
    return message + zlib.crc32(message, before).to_bytes(DIGEST_BYTES, "big")


def encode_error(error: ServerError, number: int | None) -> bytes | str:
    """A binary frame if the request had a number, else text."""
    if number is None:
        return f"{error.kind}: {error}"
    return pack({"id": number, "error": {"kind": error.kind, "message": str(error)}})


@dataclass(frozen=True)
class Reply:
    """chunk or error, the answer to the request of that number. digest: CRC-32 of greeting, request and a chunk's reply
    up to it, as the server has them; None from servers that send none."""

    id: int | None
    chunk: ActionChunk | None = None
    error: ServerError | None = None
    digest: bytes | None = None


def decode_reply(message: bytes | str) -> Reply:
    """Raises ValueError for what is no reply."""
    if isinstance(message, str):
        kind, _, text = message.partition(": ")
        return Reply(None, error=ERRORS[kind](text) if kind in ERRORS else PolicyFailed(message))
    fields = unpack_map(message)
    number = request_id(fields)
    if "error" in fields:
        error = as_map(fields["error"])
        return Reply(number, error=ERRORS.get(str(error.get("kind")), PolicyFailed)(str(error.get("message", ""))))
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
    active, digest = chunk.active_columns, fields.get(DIGEST)
    is_right = {
        "active_columns": isinstance(active, np.ndarray) and active.dtype == bool and active.ndim == 1,
        "robot_type": isinstance(chunk.robot_type, str),
        "prefix_length": _is_whole(chunk.prefix_length) and chunk.prefix_length <= len(chunk.actions),
        "timestamp_s": chunk.timestamp_s is None or is_real(chunk.timestamp_s),
        DIGEST: digest is None or isinstance(digest, bytes),
        "timing": all(isinstance(stage, str) and is_real(ms) for stage, ms in chunk.timing_ms.items()),
    }
    if wrong := [name for name, right in is_right.items() if not right]:
        raise ValueError(f"server: expected a chunk, got {', '.join(wrong)} of another kind")
    return Reply(number, chunk, digest=digest)


def exchanged(greeting: int, request: bytes) -> int:
    """CRC-32 of greeting, which is given, and request."""
    return zlib.crc32(memoryview(request)[-DIGESTED_BYTES:], greeting)


def check_digest(reply: Reply, message: bytes | str, before: int) -> None:
    """Raises ValueError if greeting, request and reply are not here what they are there. message: the reply's. before:
    as exchanged gives it."""
    expected = zlib.crc32(memoryview(message)[:-DIGEST_BYTES], before) if isinstance(message, bytes) else 0
    if reply.digest != expected.to_bytes(DIGEST_BYTES, "big"):
        raise ValueError(f"reply {reply.id}: expected {DIGEST} {expected:08x}, got another: damaged on its way")


def check_chunk(chunk: ActionChunk) -> None:
    """Both sides ask before they let a chunk pass. Raises ValueError if it holds anything but finite actions."""
    for name, actions in (("actions", chunk.actions), ("normalized", chunk.normalized)):
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f":
            raise ValueError(f"{name}: expected a float array (T, A), got {_describe(actions)}")
        if not np.isfinite(actions).all():
            raise ValueError(f"{name}: expected finite actions, got NaN or inf")


def _describe(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
