"""What the trainer's tests share: a task small enough to learn in seconds, and sources of its samples."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.support import make_config
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.training.config import TrainConfig, override
from xr0_engine.training.data.samples import LanguageSample, RobotSample
from xr0_engine.training.distributed import world
from xr0_engine.training.recipes import RECIPES, tiny
from xr0_engine.training.trainer import Trainer

FORKED = multiprocessing.get_context("forkserver")
"""Processes that begin with this module imported: importing torch and transformers takes longer than most runs here."""
FORKED.set_forkserver_preload([__name__])

ROBOT_TYPE = "bridge_delta"
"""One view, so little to compute."""
LENGTH, WIDTH, ACTIVE = 6, 32, 3
SIZES = {
    "text": {"num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2},
    "vision": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "deepstack_layers": (0,)},
    "head": {"num_layers": 2, "hidden_size": 64, "num_kv_heads": 2},
}


def tiny_checkpoint(folder: Path) -> Path:
    write_checkpoint(folder, make_config(**SIZES))
    return folder


def statistics(length: int = LENGTH) -> dict[str, ActionStatistics]:
    std = np.zeros((length, WIDTH), np.float32)
    std[:, :ACTIVE] = 0.5
    return {ROBOT_TYPE: ActionStatistics(np.zeros_like(std), std, 0.0)}


def robot_sample(number: int, length: int = LENGTH, two_modes: bool = False) -> RobotSample:
    """Straight lines whose slopes are the state's; with two modes their sign is up to chance, unseen by the model."""
    rng = np.random.default_rng(number)
    slopes = rng.uniform(-1, 1, ACTIVE)
    if two_modes:
        slopes = np.full(ACTIVE, 0.7)
    state = np.zeros((1, WIDTH), np.float32)
    state[0, :ACTIVE] = slopes
    sign = rng.choice([-1, 1]) if two_modes else 1
    actions = np.zeros((length, WIDTH), np.float32)
    actions[:, :ACTIVE] = sign * slopes * np.linspace(0.2, 1, length)[:, None]
    mask = np.zeros((length, WIDTH), bool)
    mask[:, :ACTIVE] = True
    image = np.full((32, 32, 3), 128, np.uint8)
    return RobotSample({"base": image}, "Follow the line.", state, actions, mask, ROBOT_TYPE, f"episode.json:{number}")


def language_sample(number: int) -> LanguageSample:
    words = ("red", "blue", "green", "black")
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., number % 3] = 255 if number % 4 < 3 else 0
    turns = (("user", "What colour is the cube?"), ("assistant", f"The cube is {words[number % 4]}."))
    return LanguageSample((image,), turns, f"questions.jsonl:{number}")


class Numbered:
    """Micro-batch n of process r holds the samples of global micro-batch n * size + r."""

    def __init__(
        self, make: Callable[[int], object], batch: int, rank: int = 0, size: int = 1, language_every: int = 0
    ) -> None:
        self.make, self.batch, self.rank, self.size = make, batch, rank, size
        self.language_every, self.number = language_every, 0

    def __iter__(self):
        return self

    def __next__(self) -> list:
        first = (self.number * self.size + self.rank) * self.batch
        self.number += 1
        is_language = self.language_every and self.number % self.language_every == 0
        make = language_sample if is_language else self.make
        return [make(first + place) for place in range(self.batch)]

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def config_for(recipe: str, base: Path, *assignments: str) -> TrainConfig:
    small = ("data.batch_size=4", f"data.chunk_length={LENGTH}", "run.threads=1", "run.validate_every=1000000")
    return override(tiny(RECIPES[recipe]()), [f"model.checkpoint={base}", *small, *assignments])


def train(
    config: TrainConfig,
    folder: Path,
    make: Callable[[int], RobotSample] = robot_sample,
    source: object | None = None,
    validation: Callable[[], list[RobotSample]] | None = None,
) -> list[dict]:
    """Run to the end in this process. Returns the lines of metrics.jsonl."""
    with world() as here:
        data = config.data
        source = source or Numbered(make, data.batch_size, here.rank, here.size, data.language_every)
        Trainer(config, folder, here, source, validation, statistics(data.chunk_length)).run()
    return metrics(folder)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def values(lines: Sequence[dict], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def without_supervision(sample: RobotSample) -> RobotSample:
    return replace(sample, mask=np.zeros_like(sample.mask))
