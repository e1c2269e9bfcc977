"""An engine without a model, and requests to it."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import numpy as np

from xr0_engine.robot.embodiment import Embodiment, embodiment_for
from xr0_engine.serve.worker import EngineThread
from xr0_engine.types import ActionChunk, Observation

LENGTHS = {"libero_all": 10, "bimanual": 30}
WIDTH = 32


class EchoEngine:
    """Answers with what it was asked: every action holds the state's first value, its last column the seed.

    delay_s: how long an inference takes. gate: if given, every inference but the warm-up waits for it. broken: what
    the next inferences do instead, an exception to raise or an array to give.
    """

    robot_types = tuple(LENGTHS)
    max_prefix = 6
    backend, backend_reason = "echo", "it runs no network"

    def __init__(self, delay_s: float = 0.0, gate: threading.Semaphore | None = None) -> None:
        self.delay_s = delay_s
        self.gate = gate
        self.broken: list[BaseException | np.ndarray] = []
        self.seen: list[Observation] = []
        self.threads: set[int] = set()

    def embodiment(self, robot_type: str | None = None) -> Embodiment:
        return embodiment_for(robot_type or "libero_all")

    def example(self, robot_type: str | None = None, image_size: tuple[int, int] = (480, 640)) -> Observation:
        return observation(robot_type=robot_type or "libero_all", size=image_size)

    def infer(self, observation: Observation, prefix: np.ndarray | None = None, *, seed: int | None = None):
        self.threads.add(threading.get_ident())
        if observation.instruction != "Warm up.":
            self.seen.append(observation)
            if self.gate is not None:
                self.gate.acquire()
        time.sleep(self.delay_s)
        if observation.instruction == "Refuse me.":
            raise ValueError("instruction: expected another, got this")
        length = LENGTHS[observation.robot_type]
        actions = np.full((length, WIDTH), observation.state.ravel()[0], np.float32)
        actions[:, -1] = -1 if seed is None else seed
        if prefix is not None:
            actions[: len(prefix)] = prefix
        if self.broken and observation.instruction != "Warm up.":
            broken = self.broken.pop(0)
            if isinstance(broken, BaseException):
                raise broken
            actions = broken
        return ActionChunk(
            actions=actions,
            normalized=actions / 2,
            active_columns=np.arange(WIDTH) < 7,
            robot_type=observation.robot_type,
            prefix_length=0 if prefix is None else len(prefix),
            timestamp_s=observation.timestamp_s,
            timing_ms={"flow": 1.0, "total": 2.0},
        )


def backend(engine: EchoEngine) -> EngineThread:
    return EngineThread(lambda: engine, image_size=(32, 32))


def observation(value: float = 0.5, robot_type: str = "libero_all", size=(64, 48), instruction="Warm up.", **more):
    """libero_all or bimanual, with images that differ."""
    views = [view.key for view in embodiment_for(robot_type).views]
    rng = np.random.default_rng(len(views))
    return Observation(
        images={view: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for view in views},
        instruction=instruction,
        state=np.full(WIDTH, value, np.float32),
        robot_type=robot_type,
        **more,
    )


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for 10 s"
        time.sleep(0.005)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that nobody signed but itself, and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return certificate, key
