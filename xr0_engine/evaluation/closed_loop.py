"""Benchmarks as closed-loop validation of a training run, in its own process: `run.closed_loop` (docs/training.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xr0_engine.evaluation.aloha import TRANSFER, Aloha
from xr0_engine.evaluation.benchmark import Benchmark, Mode
from xr0_engine.evaluation.episode import Execution, act
from xr0_engine.evaluation.runner import plan
from xr0_engine.training.closed_loop import closed_loop
from xr0_engine.types import ActionChunk, Guide, Observation, RobotInfo

if TYPE_CHECKING:
    from xr0_engine.engine import Engine

SEED = 1_000
"""Of the trials: others than those of `xr0 eval`, whose seed is 0, so that no run is chosen by what it is judged by."""


@closed_loop
def aloha(engine: Engine) -> dict[str, float]:
    """Ten hand-overs in the ALOHA simulation: pictures as `xr0 data record` has them, 10 actions between two looks."""
    return rates(engine, Aloha(width=160, height=120, execute=10), TRANSFER, trials=10)


def rates(
    engine: Engine,
    benchmark: Benchmark,
    suite: str,
    trials: int,
    mode: Mode = "sync",
    delay_steps: float = 0,
    seed: int = SEED,
) -> dict[str, float]:
    """Acts out so many trials of each task of a suite, always the same ones.

    Returns `success`, the share of them that succeeded; `solved`, rollouts in one that reached their goal; `steps`,
    control steps. Raises RuntimeError for a trial that raised, whose failure would not be the policy's, and for a
    simulator that is missing; ValueError for a policy that cannot be executed so.
    """
    benchmark.versions()
    robot_type = benchmark.robot_type if len(engine.robot_types) > 1 else None
    execution, actor = Execution(benchmark.rate_hz, benchmark.execute, seed=seed), _Acting(engine)
    episodes = []
    world = benchmark.open()
    try:
        for trial in plan(benchmark, benchmark.suites()[suite], trials, seed, (mode,), (delay_steps,)):
            episode = act(world, lambda world: actor, trial, execution, robot_type)
            if episode.error is not None:
                raise RuntimeError(f"{benchmark.name}, {suite}, trial {trial.number}: {episode.error}")
            episodes.append(episode)
    finally:
        world.close()
    return {
        "success": float(np.mean([episode.success for episode in episodes])),
        "solved": float(np.mean([episode.solved for episode in episodes])),
        "steps": float(np.mean([episode.steps for episode in episodes])),
    }


@dataclass(frozen=True)
class _Acting:
    """The engine as episodes ask it."""

    engine: Engine

    def infer(
        self, observation: Observation, prefix: np.ndarray | None, seed: int, guide: Guide | None = None
    ) -> ActionChunk:
        return self.engine.infer(observation, prefix, seed=seed, guide=guide)

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self.engine.robot_info(robot_type)
