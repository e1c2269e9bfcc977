"""Policies of others behind openpi's websocket protocol (π0, π0.5 and whatever else speaks it): asked as openpi's own
simulation examples ask them, their actions widened to the executor's columns.

The protocol: the server greets with a map, then answers each map with one that holds `actions`, (T, columns); an error
comes as text. Sources: openpi's packages/openpi-client, examples/libero/main.py and examples/aloha_sim/env.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import websockets.sync.client
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from xr0_engine.robot.decode import BIMANUAL_COLUMNS
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.serve.openpi import LIBERO_COLUMNS, LIBERO_STATE
from xr0_engine.serve.protocol import PolicyFailed, Refused
from xr0_engine.serve.wire import pack, unpack_map
from xr0_engine.sim import CAMERAS, columns_to_joints, joints_to_columns
from xr0_engine.types import ActionChunk, Observation, RobotInfo

SIDE = 224
"""Pixels of the examples' images, which are padded to a square."""
ALOHA_JOINTS = 14


@dataclass(frozen=True)
class Example:
    """One of openpi's examples: what it sends, and what comes back as columns of ours.

    embodiment: the profile of the robot. columns: of an action. ask: the request of an observation. widen: (T, columns)
    float32 as (T, 32) float32, in the frame of the observation. example: an observation to try a server with.
    """

    embodiment: str
    columns: int
    ask: Callable[[Observation], dict[str, Any]]
    widen: Callable[[np.ndarray, Observation], np.ndarray]

    def example(self) -> Observation:
        views = load_embodiment(self.embodiment).views
        images = {view.key: np.zeros((SIDE, SIDE, 3), np.uint8) for view in views}
        return Observation(images, "Do something.", np.zeros(BIMANUAL_COLUMNS, np.float32))


def _libero_request(observation: Observation) -> dict[str, Any]:
    def picture(view: str) -> np.ndarray:
        image = observation.images[view]
        # The simulator renders upside down; the example's policy saw pictures the right way up.
        return square(image if observation.prepared else image[::-1, ::-1])

    return {
        "observation/image": picture("base"),
        "observation/wrist_image": picture("left_wrist"),
        "observation/state": observation.state.reshape(-1, observation.state.shape[-1])[-1, :LIBERO_STATE],
        "prompt": plain_words(observation.instruction),
    }


def _libero_actions(actions: np.ndarray, observation: Observation) -> np.ndarray:
    return np.pad(actions, ((0, 0), (0, BIMANUAL_COLUMNS - actions.shape[1])))


def _aloha_request(observation: Observation) -> dict[str, Any]:
    view = next(view for view, camera in CAMERAS.items() if camera == "top")
    return {
        "state": _joints(observation),
        "images": {"cam_high": np.ascontiguousarray(square(observation.images[view]).transpose(2, 0, 1))},
        "prompt": plain_words(observation.instruction),
    }


def _aloha_actions(actions: np.ndarray, observation: Observation) -> np.ndarray:
    # Theirs are absolute joints and grippers; ours are anchored at the observation.
    return joints_to_columns(actions - _joints(observation))


def _joints(observation: Observation) -> np.ndarray:
    return columns_to_joints(observation.state.reshape(-1, BIMANUAL_COLUMNS)[-1])


EXAMPLES: Mapping[str, Example] = {
    "libero": Example("libero", LIBERO_COLUMNS, _libero_request, _libero_actions),
    "aloha": Example("bimanual", ALOHA_JOINTS, _aloha_request, _aloha_actions),
}
"""Benchmark -> the example that its policies were made for."""


class OpenpiClient:
    """A connection to an openpi server, as an Actor. It takes no prefix and no seed: its noise is its own.

    Raises ConnectionError if the server does not come or goes, PermissionError if it refuses the key, ValueError for
    what is no such server.
    """

    def __init__(self, url: str, api_key: str | None, example: Example, timeout_s: float) -> None:
        self.url = url if "://" in url else f"ws://{url}"
        if not self.url.startswith(("ws://", "wss://")):
            raise ValueError(f"openpi: expected ws://host:port or wss://host:port, got {url!r}")
        self._example, self._timeout_s = example, timeout_s
        self._info: RobotInfo | None = None
        try:
            self._connection = websockets.sync.client.connect(
                self.url,
                additional_headers={"Authorization": f"Api-Key {api_key}"} if api_key else {},
                compression=None,
                max_size=None,
                proxy=None,
                open_timeout=timeout_s,
                # A server that compiles its model at the first call answers no pings meanwhile.
                ping_interval=None,
            ).__enter__()
            self._connection.recv(timeout_s)
        except InvalidURI as error:
            raise ValueError(f"openpi: expected ws://host:port, got {url!r}: {error}") from None
        except (OSError, InvalidHandshake, ConnectionClosed) as error:
            refused = any(f"HTTP {status}" in str(error) for status in (401, 403))
            kind = PermissionError if refused else ConnectionError
            raise kind(f"{self.url}: cannot connect: {str(error) or type(error).__name__}") from None

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        """Found out by one call on an empty scene: the server does not tell it."""
        if self._info is None:
            chunk = self._actions(self._example.example())
            profile = load_embodiment(self._example.embodiment)
            # It takes no prefix: mode async is refused.
            self._info = profile.robot_info(len(chunk), BIMANUAL_COLUMNS, max_prefix=0)
        return self._info

    def infer(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> ActionChunk:
        """Raises ConnectionError if the connection is lost, PolicyFailed as the server says, Refused for what does not
        fit."""
        if prefix is not None:
            raise Refused("prefix: expected none, openpi's protocol has no prefixes")
        actions = self._example.widen(self._actions(observation), observation)
        active = np.abs(actions).max(0) > 0
        return ActionChunk(actions, actions, active, self._example.embodiment, timestamp_s=observation.timestamp_s)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> OpenpiClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _actions(self, observation: Observation) -> np.ndarray:
        """(T, columns) float32."""
        try:
            self._connection.send(pack(self._example.ask(observation)))
            reply = self._connection.recv(self._timeout_s)
        except (ConnectionClosed, TimeoutError) as error:
            self._connection.close()
            raise ConnectionError(f"{self.url}: connection lost: {str(error) or type(error).__name__}") from None
        if isinstance(reply, str):
            raise PolicyFailed(f"{self.url}: {reply.strip().splitlines()[-1] if reply.strip() else 'an error'}")
        actions = unpack_map(reply).get("actions")
        columns = self._example.columns
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or not len(actions) or actions.shape[1] != columns:
            got = actions.shape if isinstance(actions, np.ndarray) else type(actions).__name__
            raise Refused(f"actions: expected (T, {columns}) of an openpi server for this benchmark, got {got}")
        return actions.astype(np.float32)


def square(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(height, width, 3) uint8 as (side, side, 3): resized with its aspect kept (PIL bilinear), black around it."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return np.ascontiguousarray(image)
    ratio = max(height, width) / side
    inner_height, inner_width = int(height / ratio), int(width / ratio)
    inner = Image.fromarray(np.ascontiguousarray(image)).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
    padded = np.zeros((side, side, 3), np.uint8)
    top, left = (side - inner_height) // 2, (side - inner_width) // 2
    padded[top : top + inner_height, left : left + inner_width] = np.asarray(inner)
    return padded


def plain_words(instruction: str) -> str:
    """As the simulators have it: without the capital and the full stop of XR-0's prompts."""
    return instruction[:1].lower() + instruction[1:].removesuffix(".")


def timed(info: RobotInfo, rate_hz: float) -> RobotInfo:
    """For a benchmark's control rate: a server does not tell its own."""
    return replace(info, control_rate_hz=rate_hz)
