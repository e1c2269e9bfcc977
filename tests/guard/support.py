"""A robot of three joints before two cameras, and episodes of it."""

from __future__ import annotations

from functools import cache

import numpy as np

from xr0_engine.guard.calibrate import Recorded, Robot, calibrate
from xr0_engine.guard.looks import GRID
from xr0_engine.guard.profile import ALWAYS_OF_VIEWS, RobotProfile, ViewProfile
from xr0_engine.guard.watch import Eyes, Planned
from xr0_engine.types import ActionChunk, Observation, RobotInfo

RATE_HZ = 30.0
LENGTH, EVERY = 20, 10
INSTRUCTION = "Wave."
INFO = RobotInfo(LENGTH, RATE_HZ, None, ("front", "wrist"), "plain", 4)


def view(key, rotate_180=False, center_crop=1.0):
    nothing = np.zeros((GRID, GRID, 3), np.float32)
    return ViewProfile(key, rotate_180, center_crop, (0.0, 0.0), (0.0, 0.0), nothing, nothing)


def unheeded(views):
    """Thresholds of pictures that are noise."""
    return {f"{check} {view.key}": 1e9 for check in ALWAYS_OF_VIEWS for view in views}


ROBOT = Robot("waver", RATE_HZ, 4, "plain", (view("front"), view("wrist")))


def picture(key, state):
    """(48, 64, 3): front is bright at its top, with a floor of another colour; wrist is bright at its left; a blob goes
    where the first joint does, and both joints cast a shadow."""
    rows, columns = np.mgrid[0:48, 0:64]
    image = np.empty((48, 64, 3))
    image[..., 0] = 60 + (2 * rows if key == "front" else 120 - 1.5 * columns)
    image[..., 1] = 200 - (3 * rows if key == "front" else 2 * columns)
    image[..., 2] = np.where(columns > 40, 90, 30) + 10 * state[0] + 6 * state[1]
    at = round(32 + 20 * state[0])
    image[20:28, max(at - 4, 0) : at + 4] = 255
    return image.astype(np.uint8)


def observation(state, instruction=INSTRUCTION, **images):
    seen = {key: picture(key, state) for key in ("front", "wrist")}
    return Observation(seen | images, instruction, np.asarray(state, np.float32)[None], "waver")


def states(seed, ticks=150):
    """(ticks, 3): two joints that wave, one that stays."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(ticks) / RATE_HZ
    phase, size = rng.uniform(0, 0.5), rng.uniform(0.9, 1.0)
    first, second = (size * np.sin(rate * time_s + phase) for rate in (1.0, 1.7))
    return np.stack([first, second, np.full(ticks, 0.3)], axis=1)


def targets(path, tick):
    """(LENGTH, 4): the states to come, the first relative to now, the second absolute, the others none of the state's;
    the arm is a little late."""
    to_come = path[np.minimum(np.arange(tick + 1, tick + 1 + LENGTH), len(path) - 1)]
    return np.stack([to_come[:, 0] - path[tick, 0], to_come[:, 1], *np.zeros((2, LENGTH))], axis=1)


def chunk(actions, bend=None, given=0):
    actions = np.asarray(actions, np.float32)
    return ActionChunk(actions, actions, np.ones(4, bool), "waver", given, bend=bend)


def recorded(seed, bend=None, is_run=False):
    path, eyes, rng = states(seed), Eyes(ROBOT.views), np.random.default_rng(seed)
    ticks = range(0, len(path), EVERY)
    seen = [eyes.see(observation(path[tick]), tick / RATE_HZ) for tick in ticks]
    planned = [targets(path, tick) + rng.normal(0, 0.01, (LENGTH, 4)) for tick in ticks]
    chunks = None if bend is None else [Planned(actions, 0, bend + rng.normal(0, 0.01)) for actions in planned]
    fastest = np.abs(np.diff(path, axis=0)).max(axis=0) * RATE_HZ
    return Recorded(seen, planned, chunks, fastest, (INSTRUCTION,), is_run)


@cache
def profile() -> RobotProfile:
    return calibrate(ROBOT, [recorded(seed, bend=0.2) for seed in range(20)], 1.0)


def drive(guard, seed=1000, change=lambda tick, seen: seen, plan=lambda tick, path: chunk(targets(path, tick), 0.2)):
    """Names of a run's warnings by the tick of the observation."""
    path, found = states(seed), {}
    for tick in range(0, len(path), EVERY):
        warnings = guard.see(change(tick, observation(path[tick])), tick / RATE_HZ) + guard.plan(plan(tick, path))
        if warnings:
            found[tick] = [warning.name for warning in warnings]
    return found
