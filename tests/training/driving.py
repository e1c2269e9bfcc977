"""Closed-loop validation that tests name. Each call of follows() is kept, of this process."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import torch

from tests.training.support import robot_sample
from xr0_engine import Engine, Observation
from xr0_engine.training.closed_loop import FOLDER, closed_loop

CALLS: list[dict[str, float]] = []
KEPT: list[Path] = []
"""From where to where kept() copies the policy."""


@closed_loop
def follows(engine: Engine) -> dict[str, float]:
    """How far the line is from the one to follow; and the worst that a function could do to the training around it."""
    sample = robot_sample(10**6)
    observation = Observation(sample.images, sample.instruction, sample.state, prepared=True)
    error = np.abs(engine.infer(observation, seed=0).actions - sample.actions)[sample.mask].mean()
    result = {"error": np.float32(error), "calls": 1 + len(CALLS), "followed": bool(error < 0.1)}
    CALLS.append(result)
    torch.manual_seed(len(CALLS))
    np.random.seed(len(CALLS))
    random.seed(len(CALLS))
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    return result


@closed_loop
def kept(engine: Engine) -> dict[str, float]:
    """Copies what the engine was loaded from: from the first of KEPT, a run's folder, to the second."""
    shutil.rmtree(KEPT[1], ignore_errors=True)
    shutil.copytree(KEPT[0] / FOLDER, KEPT[1])
    return {"kept": 1}


@closed_loop
def moves(engine: Engine) -> dict[str, float]:
    """Of any robot."""
    return {"far": float(np.abs(engine.infer(engine.example(image_size=(32, 32)), seed=0).actions).max())}


@closed_loop
def failing(engine: Engine) -> dict[str, float]:
    raise KeyError("arm")


@closed_loop
def nothing(engine: Engine) -> dict[str, float]:
    return {}


@closed_loop
def not_a_number(engine: Engine) -> dict[str, float]:
    return {"success": float("nan")}


def unmarked(engine: Engine) -> dict[str, float]:
    return {"success": 1.0}
