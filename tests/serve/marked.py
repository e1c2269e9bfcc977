"""Actions that tell what they answer, so that a robot notices one that its policy never meant for it."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections import deque
from typing import Any

import numpy as np

from tests.serve.support import WIDTH, EchoEngine
from xr0_engine.executor import Snapshot
from xr0_engine.robot.embodiment import Embodiment, View
from xr0_engine.types import ActionChunk, Observation

ROBOT_TYPE = "marked"
MARKED = Embodiment(ROBOT_TYPE, (ROBOT_TYPE,), (View("base", "Base View"),), "plain", 30.0, None)
LENGTH = 30
NUMBER, INDEX = 0, 1
"""Columns that say which observation an action answers, and its place in the chunk; the others follow from these and
from all that the policy saw."""
REMEMBERED = 256
"""Observations that a chunk may still answer: twenty a second while there is no server, 10 s of patience."""


def seen(observation: Observation) -> int:
    """CRC-32 of what a policy may go by."""
    parts = [image.tobytes() for _, image in sorted(observation.images.items())]
    parts += [observation.instruction.encode(), np.asarray(observation.state, np.float32).tobytes()]
    return zlib.crc32(b"".join(parts))


def mark(number: int, index: int, what: int) -> np.ndarray:
    """The action (WIDTH,) float32: whole numbers below 2**16, which nothing rounds."""
    digest = hashlib.blake2b(f"{number} {index} {what}".encode(), digest_size=2 * (WIDTH - 2)).digest()
    return np.concatenate([[number, index], np.frombuffer(digest, "<u2")]).astype(np.float32)


class MarkedEngine(EchoEngine):
    """Its actions are marked; the state's first value is the observation's number."""

    robot_types = (ROBOT_TYPE,)

    def embodiment(self, robot_type: str | None = None) -> Embodiment:
        return MARKED

    def example(self, robot_type: str | None = None, image_size: tuple[int, int] = (32, 32)) -> Observation:
        return MarkedRobot(image_size).observe(0.0).observation

    def infer(self, observation: Observation, prefix: np.ndarray | None = None, **more: Any) -> ActionChunk:
        number, what = int(observation.state.ravel()[NUMBER]), seen(observation)
        actions = np.stack([mark(number, index, what) for index in range(LENGTH)])
        if prefix is not None:
            actions[: len(prefix)] = prefix
        time.sleep(self.delay_s)
        return ActionChunk(
            actions=actions,
            normalized=actions,
            active_columns=np.ones(WIDTH, bool),
            robot_type=ROBOT_TYPE,
            prefix_length=0 if prefix is None else len(prefix),
            timestamp_s=observation.timestamp_s,
            timing_ms={"total": 1.0},
        )


class MarkedRobot:
    """Numbers its observations, and knows of every command which one it answers.

    commands, wrong: how many there were; of these, those that no policy meant for what this robot had shown.
    """

    def __init__(self, image_size: tuple[int, int] = (32, 32)) -> None:
        rng = np.random.default_rng(1)
        self._images = {"base": rng.integers(0, 256, (*image_size, 3), dtype=np.uint8)}
        self._shown: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._number = 0
        self._last: np.ndarray | None = None
        self.commands = self.wrong = 0

    def observe(self, now_s: float) -> Snapshot:
        self._number += 1
        state = np.zeros(WIDTH, np.float32)
        state[NUMBER], state[-1] = self._number, self._number % 7
        observation = Observation(self._images, "Go.", state, ROBOT_TYPE, now_s)
        self._shown.append((self._number, seen(observation)))
        return Snapshot(observation)

    def command(self, row: np.ndarray) -> None:
        self.commands += 1
        # Where there is no next one, the last one is held.
        is_held = self._last is not None and np.array_equal(row, self._last)
        if not is_held and not self._answers(row):
            self.wrong += 1
        self._last = row.copy()

    def stop(self) -> None: ...

    def _answers(self, row: np.ndarray) -> bool:
        shown = dict(self._shown).get(int(row[NUMBER]))
        return shown is not None and np.array_equal(row, mark(int(row[NUMBER]), int(row[INDEX]), shown))
