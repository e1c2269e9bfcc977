"""A model server of vla-eval (github.com/allenai/vla-evaluation-harness) before an `xr0 serve`: `python -m
xr0_engine.evaluation.vla_eval --args.server ws://HOST:PORT --address HOST:PORT`.

vla-eval's own code runs the benchmark and keeps score; docs/evaluation.md says with which configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xr0_engine.evaluation.benchmark import Task, Trial
from xr0_engine.evaluation.episode import noise_seed
from xr0_engine.evaluation.harness import find_adapted
from xr0_engine.serve.client import Client

try:
    from vla_eval.model_servers.base import SessionContext
    from vla_eval.model_servers.predict import PredictModelServer
    from vla_eval.specs import (
        GRIPPER_CLOSE_POS,
        IMAGE_RGB,
        LANGUAGE,
        POSITION_DELTA,
        ROTATION_AA,
        STATE_EEF_POS_AA_GRIP,
        DimSpec,
    )
except ModuleNotFoundError as error:
    raise RuntimeError(f"{error.name} is missing: pip install vla-eval==0.8.0") from error


class XR0ModelServer(PredictModelServer):  # type: ignore[misc]
    """vla-eval asks at each control step; a chunk is asked of `xr0 serve` at every `execute`th.

    server: ws://host:port of an `xr0 serve`. benchmark: a key of harness.ADAPTED. execute: actions of each chunk that
    are executed; None: the embodiment's. seed: of the noise; with one, a trial of a task is the same each time, and the
    noise that of `xr0 eval` with that seed. robot_type: None: the only one of the embodiment. api_key,
    timeout_s: as in Client. Raises ValueError for a benchmark or policy that does not fit, ConnectionError without a
    server.
    """

    def __init__(
        self,
        server: str = "ws://127.0.0.1:8000",
        benchmark: str = "libero",
        execute: int | None = None,
        seed: int = 0,
        robot_type: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.adapted = find_adapted(benchmark)
        self.client = Client(server, api_key, timeout_s=timeout_s)
        try:
            metadata = self.client.metadata
            self.robot_type = metadata.resolve(robot_type or self._fitting())
            self.execute = self.adapted.check_policy(metadata.robot(self.robot_type), execute)
        except ValueError:
            self.client.close()
            raise
        self.seed = seed
        self._trials: dict[str, tuple[Trial, int]] = {}
        super().__init__(chunk_size=self.execute)

    def _fitting(self) -> str | None:
        robots = self.client.metadata.robots
        fitting = [name for name, info in robots.items() if info.embodiment == self.adapted.embodiment]
        return fitting[0] if len(fitting) == 1 else None

    def get_observation_params(self) -> dict[str, Any]:
        return dict(self.adapted.params)

    def get_observation_spec(self) -> dict[str, DimSpec]:
        cameras = dict.fromkeys(self.adapted.cameras.values(), IMAGE_RGB)
        return {**cameras, "state": STATE_EEF_POS_AA_GRIP, "language": LANGUAGE}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Raises ValueError for a task that is not known: vla-eval reports it, and its observations are refused."""
        self._trials.pop(ctx.session_id, None)
        self._trials[ctx.session_id] = self._trial(config.get("task")), 0
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        self._trials.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, Any]:
        """{"actions": (execute, columns) float32}. Raises ValueError for an observation that is not as expected,
        ConnectionError if `xr0 serve` is gone, RuntimeError if it failed: vla-eval counts the episode as failed then
        and says so, in `failure_reason`."""
        if ctx.session_id not in self._trials:
            raise ValueError("task: the episode did not begin with a known one")
        trial, call = self._trials[ctx.session_id]
        self._trials[ctx.session_id] = trial, call + 1
        observation = self.adapted.observation(obs, self.client.metadata.state_width, self.robot_type)
        chunk = self.client.infer(observation, seed=noise_seed(trial, call))
        return {"actions": self.adapted.actions(chunk.actions)}

    def _trial(self, task: object) -> Trial:
        if not isinstance(task, Mapping):
            raise ValueError(f"task: expected vla-eval's description of it, got {task!r:.80}")
        index, number = (_count(task, key) for key in ("task_id", "episode_idx"))
        name = str(task.get("name"))
        return Trial(Task(self.adapted.suite(task), index, name, name), number, self.seed)


def _count(task: Mapping[str, Any], key: str) -> int:
    value = task.get(key)
    if type(value) is not int or value < 0:
        raise ValueError(f"task, {key}: expected a number from 0, got {value!r:.80}")
    return value


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(XR0ModelServer)
