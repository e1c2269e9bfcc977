"""A fine-tuning step by the trainer itself: the recipe finetune_head on fabricated samples."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xr0_engine.bench.cases import Case, Setup, describe
from xr0_engine.bench.results import Result, environment, summary
from xr0_engine.bench.tell.tables import footer, number
from xr0_engine.bench.timing import WARM_UP
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.training.config import TrainConfig, override
from xr0_engine.training.data.samples import RobotSample
from xr0_engine.training.distributed import world
from xr0_engine.training.recipes import finetune_head
from xr0_engine.training.trainer import Trainer

TOTAL = "total"


def measure(setup: Setup, rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did. Its series is the trainer's, in milliseconds per step.

    The trainer's own loop, in a folder that is thrown away: every step preprocesses its samples, none is read from disk
    or augmented, and nothing is validated or saved. Raises ValueError for a wrong argument, RuntimeError if the loss is
    not finite.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if setup.case.family != "xr0":
        raise ValueError(
            f"case: expected one of Xiaomi-Robotics-0, whose head the recipe trains; got {setup.case.name}"
        )
    device, case = setup.prepare(), setup.case
    preprocess = Preprocessor.load(setup.folder())
    statistics = preprocess.statistics[case.robot_type]
    config = _config(setup, statistics.chunk_length)
    source = _Samples(case, statistics, config, WARM_UP + rounds)
    reason: BaseException | None = None
    with tempfile.TemporaryDirectory() as folder, world() as here:
        if here.device.type != device.type or device.index not in (None, here.device.index):
            raise ValueError(f"device: the trainer takes {here.device} here (CUDA_VISIBLE_DEVICES), got {device}")
        trainer = Trainer(config, Path(folder), here, source, None, {case.robot_type: statistics})
        try:
            trainer.run()
        except _Enough:
            pass
        except KeyboardInterrupt as interrupted:
            reason = interrupted
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]
        samples = [1e3 / line["steps_per_s"] for line in lines[WARM_UP:]]
        if reason is not None and not samples:
            raise reason
        told = lines[-1]
    result = Result(
        kind="finetune",
        command=command,
        environment=environment(device),
        case=describe(setup, case.tokens, statistics.chunk_length),
        boundary="training step",
        backend="trainer",
        series={"trainer": {TOTAL: samples}},
        facts={
            "recipe": config.recipe,
            "samples_per_step": config.data.batch_size * config.optim.accumulate,
            "draws_per_sample": config.flow.repeat,
            "warm_up": WARM_UP,
            "loss": told["loss"],
            "peak_memory_bytes": round(told["memory_gib"] * 2**30),
            **({"utilisation": told["utilisation"]} if "utilisation" in told else {}),
        },
        complete=reason is None,
    )
    return result, reason


class _Enough(Exception):
    """All steps were run."""


class _Samples(Iterator[list[RobotSample]]):
    """Micro-batches of the case, random but always the same, until the steps are done: the next ends the run."""

    def __init__(self, case: Case, statistics: ActionStatistics, config: TrainConfig, steps: int) -> None:
        self._left = steps * config.optim.accumulate
        random = np.random.default_rng(0)
        self._batch = [_sample(case, statistics, random, number) for number in range(config.data.batch_size)]

    def __next__(self) -> list[RobotSample]:
        if self._left == 0:
            raise _Enough
        self._left -= 1
        return self._batch

    def state_dict(self) -> Mapping[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("nothing is saved, so nothing is resumed")


def _sample(case: Case, statistics: ActionStatistics, random: np.random.Generator, number: int) -> RobotSample:
    actions = statistics.denormalize(random.standard_normal(statistics.mean.shape).astype(np.float32))
    mask = np.zeros(actions.shape, bool)
    mask[:, statistics.action_mask.any(0)] = True
    return RobotSample(
        images={
            view.key: random.integers(0, 256, (*case.image_size, 3), dtype=np.uint8) for view in case.embodiment.views
        },
        instruction="Pick up the red cube.",
        state=random.standard_normal((1, actions.shape[1])).astype(np.float32),
        actions=actions,
        mask=mask,
        robot_type=case.robot_type,
        source=f"fabricated:{number}",
    )


def _config(setup: Setup, chunk_length: int) -> TrainConfig:
    """The recipe; every step reports, none validates or saves, and the last never comes. Raises ValueError."""
    never = 10**9
    changes = {
        "model.checkpoint": setup.folder(),
        "model.dtype": setup.dtype,
        "data.chunk_length": chunk_length,
        "data.embodiment": setup.case.profile or "",
        "optim.steps": never,
        "run.log_every": 1,
        "run.validate_every": never,
        "run.checkpoint_every": never,
        "run.threads": setup.threads or 0,
    }
    return override(finetune_head(), [f"{name}={value}" for name, value in changes.items()])


def show(result: Result) -> None:
    facts, samples = result.facts, result.series["trainer"][TOTAL]
    found = summary(samples)
    table = Table(title=f"{facts['recipe']}, {result.case['name']}, {result.case['size']}", box=None)
    for column in ("samples per step", "ms p50", "p90", "max", "samples per second"):
        table.add_column(column, justify="right")
    p50 = found["p50"]
    assert p50 is not None
    rate = f"{1e3 * facts['samples_per_step'] / p50:.2f}"
    table.add_row(str(facts["samples_per_step"]), number(p50), number(found["p90"]), number(found["max"]), rate)
    console = Console()
    console.print(table)
    console.print(footer(result), markup=False, highlight=False)
