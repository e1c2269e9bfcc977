"""One trial of the ALOHA simulation to watch: as `xr0 eval aloha` acts it out, with everything kept for pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from xr0_engine.engine import Engine
from xr0_engine.evaluation.aloha import TRANSFER, Aloha, AlohaWorld
from xr0_engine.evaluation.benchmark import Episode, Trial
from xr0_engine.evaluation.episode import Execution, act
from xr0_engine.robot.history import History
from xr0_engine.robot.views import orient
from xr0_engine.sim import ROBOT_TYPE
from xr0_engine.types import ActionChunk, Observation, RobotInfo

PANEL = (480, 360)
"""Width and height of a picture in the film, in pixels."""
THUMBNAIL, THUMBNAIL_HZ, THUMBNAIL_QUALITY = (320, 240), 10.0, 60
LAST_PICTURE_S = 1.5
"""How long the animation shows its end before it begins again."""


@dataclass(eq=False)
class Watched:
    """What a trial was. observations, chunks, planned: one of each per inference; planned: a chunk's absolute rows
    (T, A). states: the row (A,) at which the robot stood, of each control step."""

    observations: list[Observation] = field(default_factory=list)
    chunks: list[ActionChunk] = field(default_factory=list)
    planned: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    thumbnails: list[np.ndarray] = field(default_factory=list)


def watch(
    engine: Engine,
    benchmark: Aloha,
    trial: Trial,
    execution: Execution,
    instruction: str | None,
    film: Callable[[np.ndarray], None],
    robot_type: str = ROBOT_TYPE,
) -> tuple[Episode, Watched]:
    """Act a trial of suite transfer out. instruction: in the place of the simulator's. robot_type: of
    aloha_body.BODIES.

    film: takes a picture of every control step, PANEL side by side: the robot from outside, then each view as the
    policy sees it. Raises what the policy or the simulator raises.
    """
    if trial.task.suite != TRANSFER:
        raise ValueError(f"trial: expected one of suite {TRANSFER}, got {trial.task.suite}")
    kept = Watched()
    world = _World(benchmark, engine, film, kept, robot_type)
    actor = _Actor(engine, instruction, kept, world)
    try:
        # As the episode's first: of a policy that sees the past, a video of one picture.
        history = History.of(engine.robot_info(robot_type))
        history.push(world.body.observe(instruction or trial.task.instruction))
        engine.warm_up([history.observe()])
        episode = act(world, lambda _: actor, trial, execution)
    finally:
        world.close()
    if actor.error is not None:
        raise actor.error
    if episode.error is not None:
        raise RuntimeError(episode.error)
    return episode, kept


def write_animation(pictures: list[np.ndarray], rate_hz: float, path: Path) -> None:
    """An animated WebP that goes round and round, small enough for a page. pictures: (height, width, 3) uint8."""
    images = [Image.fromarray(picture) for picture in pictures]
    milliseconds = [round(1000 / rate_hz)] * (len(images) - 1) + [round(1000 * LAST_PICTURE_S)]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=milliseconds,
        loop=0,
        quality=THUMBNAIL_QUALITY,
        method=6,
    )


class _Actor:
    """An engine as episodes ask it."""

    def __init__(self, engine: Engine, instruction: str | None, kept: Watched, world: _World) -> None:
        self._engine, self._instruction, self._kept, self._world = engine, instruction, kept, world
        self.error: Exception | None = None

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self._engine.robot_info(self._world.robot_type)

    def infer(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> ActionChunk:
        if self._instruction is not None:
            observation = replace(observation, instruction=self._instruction)
        try:
            chunk = self._engine.infer(observation, prefix, seed=seed)
        except Exception as error:
            self.error = error
            raise
        self._kept.observations.append(observation)
        self._kept.chunks.append(chunk)
        self._kept.planned.append(self._world.frame.absolute(chunk.actions, self._world.seen_at))
        return chunk


class _World(AlohaWorld):
    """seen_at: where the robot stood at the newest observation, which is the one that is inferred from."""

    def __init__(
        self,
        benchmark: Aloha,
        engine: Engine,
        film: Callable[[np.ndarray], None],
        kept: Watched,
        robot_type: str,
    ) -> None:
        super().__init__(benchmark, robot_type)
        self.robot_type, self.frame = robot_type, self.body.layout.frame_of(engine.config.head.action_dim)
        self.seen_at = self.body.pose()
        self._views = engine.embodiment(robot_type).views
        self.show([view.key for view in self._views])
        self._film, self._kept = film, kept
        self._thumbnail_every = round(benchmark.rate_hz / THUMBNAIL_HZ)

    def observe(self) -> Observation:
        self.seen_at = self.body.pose()
        return super().observe()

    def step(self, row: np.ndarray) -> None:
        outside = Image.fromarray(self.picture())
        images = self.env.observe().images
        seen = [Image.fromarray(np.ascontiguousarray(orient(images[view.key], view))) for view in self._views]
        self._film(np.concatenate([np.asarray(picture.resize(PANEL)) for picture in (outside, *seen)], axis=1))
        if len(self._kept.states) % self._thumbnail_every == 0:
            self._kept.thumbnails.append(np.asarray(outside.resize(THUMBNAIL)))
        stands = self.frame.start(self.body.pose())
        assert stands is not None
        self._kept.states.append(stands)
        super().step(row)
