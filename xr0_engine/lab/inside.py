"""Inside a policy: what its noisy actions look at, and what they depend on when only that is exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from xr0_engine.lab.demonstrations import demonstrate
from xr0_engine.lab.drawing import draw
from xr0_engine.lab.experts import actions_of
from xr0_engine.lab.robots import VIEW, states
from xr0_engine.lab.tasks import APART, CHUNK, PointTask, find_task
from xr0_engine.robot.decode import BIMANUAL_COLUMNS
from xr0_engine.types import Observation

if TYPE_CHECKING:
    from xr0_engine.engine import Engine
    from xr0_engine.lab.arms import Cell, Size

PREFIX = 4
"""Actions of a prefix: within what every arm was trained with, and as long as the published window looks back."""
HELD_OUT = 1
"""The seed of demonstrations that no policy was trained on."""
LATEST = 24
"""Ticks of a demonstration at which a window begins, at most: by then the robot is at its disc."""
BATCH = 64
GROUPS = ("prefix", "own", "image", "text", "state", "sink")
"""What noisy actions look at; own: each other and themselves."""


@dataclass(frozen=True, eq=False)
class Window:
    """An observation with its prefix (P, A), robot units, and the noise of its chunk; and what each may be exchanged
    for. other_prefix: (P, A), another window's. other_image, other_state: the observation with another picture, or
    another robot's state, alone."""

    observation: Observation
    prefix: np.ndarray
    seed: int
    other_prefix: np.ndarray
    other_image: Observation
    other_state: Observation


@dataclass(frozen=True)
class Inside:
    """prefix_length: P. sensitivity: `prefix` (unless P is 0), `image` and `state` -> for each place in the chunk, how
    far its action moves if that alone is exchanged: mean over windows and active columns of its absolute change, in the
    model's units (std of the training data). Of the P given ones it is the change of what was given. exchanged: the
    same -> how large the exchange was: mean absolute change of the prefix in the model's units, of the picture's bytes,
    of the state in the robot's.

    attention: group of GROUPS -> by flow step and layer, the share of its attention that a noisy action gives it, mean
    over actions, heads and windows; shares of all groups sum to 1.
    """

    prefix_length: int
    sensitivity: dict[str, list[float]]
    exchanged: dict[str, float]
    attention: dict[str, list[list[float]]]


def look(engine: Engine, cell: Cell, size: Size) -> Inside:
    """A cell's policy, at windows of demonstrations that it was not trained on; without their prefixes, if it was
    trained without."""
    asked = windows(find_task(cell.task), size.windows)
    if not cell.arm.has_prefix:
        asked = [replace(window, prefix=window.prefix[:0], other_prefix=window.prefix[:0]) for window in asked]
    return inside(engine, asked)


def inside(engine: Engine, asked: Sequence[Window]) -> Inside:
    """Both measures. Raises ValueError of no window, or of windows whose prefixes differ in length."""
    lengths = {len(prefix) for window in asked for prefix in (window.prefix, window.other_prefix)}
    if len(lengths) != 1:
        raise ValueError(f"windows: expected at least one, and prefixes of one length, got lengths {sorted(lengths)}")
    sensitivity, exchanged = interventions(engine, asked)
    return Inside(lengths.pop(), sensitivity, exchanged, attention(engine, asked))


def interventions(engine: Engine, asked: Sequence[Window]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Inside.sensitivity and Inside.exchanged: the same noise each time, one thing exchanged."""
    plain = _sampled(engine, [(window.observation, window.prefix, window.seed) for window in asked])
    calls = {
        "image": [(window.other_image, window.prefix, window.seed) for window in asked],
        "state": [(window.other_state, window.prefix, window.seed) for window in asked],
    }
    pictures = [
        np.abs(window.observation.images[view].astype(float) - window.other_image.images[view]).mean()
        for window in asked
        for view in window.observation.images
    ]
    states_ = [np.abs(window.observation.state - window.other_state.state).mean() for window in asked]
    exchanged = {"image": float(np.mean(pictures)), "state": float(np.mean(states_))}
    length = len(asked[0].prefix)
    if length:
        calls["prefix"] = [(window.observation, window.other_prefix, window.seed) for window in asked]
    changes = {name: np.abs(_sampled(engine, some) - plain).mean((0, 2)) for name, some in calls.items()}
    if length:
        exchanged["prefix"] = float(changes["prefix"][:length].mean())
    return {name: change.tolist() for name, change in changes.items()}, exchanged


def attention(engine: Engine, asked: Sequence[Window]) -> dict[str, list[list[float]]]:
    """Inside.attention."""
    sums: dict[str, np.ndarray] = {}
    for window in asked:
        prefix = window.prefix if len(window.prefix) else None
        seen = engine.attention(window.observation, prefix=prefix, seed=window.seed)
        noisy = seen.where("action", of="queries")
        for group in GROUPS:
            # Mean over heads and noisy actions: by flow step and layer.
            mass = seen.mass("action" if group == "own" else group)[..., noisy].mean((2, 3))  # type: ignore[arg-type]
            sums[group] = sums.get(group, 0) + mass.astype(np.float64)
    return {group: (total / len(asked)).tolist() for group, total in sums.items()}


def windows(task: PointTask, count: int, seed: int = HELD_OUT) -> list[Window]:
    """Of `count` demonstrations, one each, at a tick that is drawn. The prefix is what the expert did; the other one,
    and the other state, are the next demonstration's; the other picture shows the same robot, and the disc (and
    obstacle) of the next whose disc is elsewhere. Raises ValueError for fewer than two, or discs that are all in one
    place."""
    if count < 2:
        raise ValueError(f"count: expected at least two windows to exchange between, got {count}")
    paths = demonstrate(task, count, seed)
    rng = np.random.default_rng(seed)
    ticks = rng.integers(0, min(LATEST, paths.positions.shape[1] - CHUNK) + 1, count)
    whole = range(count)
    places = [paths.positions[number, ticks[number]] for number in whole]
    prefixes = [_actions(task, paths.positions[number], paths.wanted[number], int(ticks[number])) for number in whole]
    obstacles = [None if paths.obstacles is None else paths.obstacles[number] for number in whole]
    made = []
    spans = [slice(tick, tick + 1) for tick in ticks.tolist()]
    rows = [
        states(paths.positions[number][span], paths.velocities[number][span])[0] for number, span in enumerate(spans)
    ]
    for number in whole:
        picture = draw(places[number], paths.goals[number], obstacles[number])
        observation = Observation({VIEW: picture}, task.instruction, rows[number], task.robot_type)
        elsewhere = _elsewhere(paths.goals, number)
        other = draw(places[number], paths.goals[elsewhere], obstacles[elsewhere])
        other_image = replace(observation, images={VIEW: other})
        following = (number + 1) % count
        other_state = replace(observation, state=rows[following])
        made.append(Window(observation, prefixes[number], number, prefixes[following], other_image, other_state))
    return made


def _actions(task: PointTask, positions: np.ndarray, wanted: np.ndarray, tick: int) -> np.ndarray:
    """(PREFIX, A) float32: what the expert did from a tick on, as the robot's layout has it in an observation there."""
    rows = np.zeros((PREFIX, BIMANUAL_COLUMNS), np.float32)
    told = slice(tick, tick + PREFIX)
    columns = list(task.columns)
    rows[:, columns] = actions_of(task, positions[told], wanted[told]).reshape(PREFIX, -1)
    if task.commands_places:
        # Anchored where the arms are; they do not turn.
        rows[:, columns] -= positions[tick].reshape(-1)
    return rows


def _elsewhere(goals: np.ndarray, number: int) -> int:
    """The next demonstration after `number` whose discs are not where its own are. goals: (E, R, 2)."""
    for step in range(1, len(goals)):
        other = (number + step) % len(goals)
        if np.linalg.norm(goals[other] - goals[number], axis=-1).min() >= APART:
            return other
    raise ValueError("windows: expected demonstrations whose discs are in at least two places; take more of them")


def _sampled(engine: Engine, calls: Sequence[tuple[Observation, np.ndarray, int]]) -> np.ndarray:
    """(windows, T, active columns) float64, in the model's units."""

    def batches() -> Iterator[np.ndarray]:
        for begin in range(0, len(calls), BATCH):
            observations, prefixes, seeds = zip(*calls[begin : begin + BATCH], strict=True)
            given = [prefix if len(prefix) else None for prefix in prefixes]
            chunks = engine.infer(list(observations), prefix=given, seed=list(seeds))
            yield np.stack([chunk.normalized[:, chunk.active_columns] for chunk in chunks])

    return np.concatenate(list(batches())).astype(np.float64)
