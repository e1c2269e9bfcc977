"""Recordings for a guard to be calibrated on: what the robot saw and did, and what a policy would say to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xr0_engine.guard.calibrate import Recorded, Robot, calibrate
from xr0_engine.guard.looks import GRID
from xr0_engine.guard.profile import RobotProfile, ViewProfile, statistics_digest
from xr0_engine.guard.recording import read_run
from xr0_engine.guard.watch import Eyes, Planned
from xr0_engine.robot.embodiment import View
from xr0_engine.training.data.episode import Episode
from xr0_engine.training.data.parallel import in_parallel
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import Source, checked_instructions, description_of, open_source
from xr0_engine.training.data.windows import Windows
from xr0_engine.types import Observation

if TYPE_CHECKING:
    from xr0_engine.engine import Engine

LOOKS_HZ = 3.0
"""How often a recording is looked at: about as often as policies at work look."""
MOST_EPISODES = 400
"""That are looked at, evenly spread: with more, thresholds change no more."""
CHUNK_LENGTH = 30
"""Of recorded actions, without a checkpoint to say it: the released chunk."""


def calibrate_on(
    paths: Sequence[Path], engine: Engine | None, alarms_per_hour: float, runs: Sequence[Path] = ()
) -> RobotProfile:
    """The profile of one robot's datasets. engine: the policy's, for scores of its chunks and to see the datasets
    through its profile; None: of the recordings alone. runs: of the policy, files of guard/recording.py.

    Raises DataError for a dataset that cannot be read, ValueError for datasets of several robot types, of another robot
    than the policy's, or too few episodes.
    """
    names = sorted({description_of(path).robot_type for path in paths})
    if len(names) != 1:
        raise ValueError(f"datasets: expected one robot type, got {', '.join(names)}: one call for each")
    if engine is not None and names[0] not in engine.robot_types:
        raise ValueError(
            f"datasets: {names[0]!r} is another robot than the checkpoint's, {', '.join(engine.robot_types)}: choose "
            "recordings of the robot that it drives"
        )
    embodiment = None if engine is None else engine.embodiment(names[0])
    sources = [open_source(path, embodiment=embodiment) for path in paths]
    profile = sources[0].description.embodiment
    robot = Robot(
        robot_type=names[0],
        control_rate_hz=float(profile.control_rate_hz),
        action_width=sources[0].description.width,
        layout=profile.layout,
        views=tuple(map(_view, profile.views)),
    )
    if engine is not None:
        statistics = engine.statistics[names[0]]
        robot = replace(robot, statistics=statistics_digest(statistics.mean, statistics.std))
    episodes = []
    for path, source in zip(paths, sources, strict=True):
        usable = [number for number, status in enumerate(source.statuses) if status != "invalid"]
        if not usable:
            raise DataError(f"{path}: nothing to calibrate on: every episode is invalid")
        count = min(len(usable), max(1, MOST_EPISODES // len(sources)))
        chosen = [usable[place] for place in np.linspace(0, len(usable) - 1, count).round().astype(int)]
        read = partial(_recorded, source, engine)
        episodes += list(in_parallel(read, chosen, 1, str(path)))
        # A sentence is known wherever it was said.
        others = sorted(set(usable) - set(chosen))
        wordings = {words for number in others for words in source.load(number).instructions}
        episodes[-1] = replace(episodes[-1], instructions=(*episodes[-1].instructions, *sorted(wordings)))
    episodes += [read_run(run, robot) for run in runs]
    return calibrate(robot, episodes, alarms_per_hour)


def _recorded(source: Source, engine: Engine | None, number: int) -> Recorded:
    episode = checked_instructions(source.load(number))
    motion, rate_hz = episode.motion, episode.rate_hz
    head = None if engine is None else engine.config.head
    length = CHUNK_LENGTH if head is None else head.action_length
    windows = Windows(source, [number], length, state_length=1 if head is None else head.state_length)
    eyes = Eyes(tuple(map(_view, source.description.stored_views)))
    ticks = range(0, len(motion), max(1, round(rate_hz / LOOKS_HZ)))
    seen = [eyes.see(_observation(episode, windows, tick), _time_s(episode, tick)) for tick in ticks]
    chunks = None if engine is None else [_chunk(engine, windows, tick) for tick in ticks]
    states = np.stack([motion.state(tick)[-1] for tick in range(len(motion))]).astype(np.float64)
    times_s = np.array([_time_s(episode, tick) for tick in range(len(motion))])
    fastest = np.zeros(states.shape[1])
    if len(states) > 1:
        fastest = (np.abs(np.diff(states, axis=0)) / np.diff(times_s)[:, None]).max(axis=0)
    targets = [motion.actions(tick, length) for tick in ticks]
    return Recorded(seen, targets, chunks, fastest, episode.instructions)


def _observation(episode: Episode, windows: Windows, tick: int) -> Observation:
    """As a camera would give it: what becomes of its frames is the eyes' part."""
    images = {view.key: episode.image(view.key, tick) for view in windows.source.description.stored_views}
    wording = 0 if episode.instruction_at is None else int(episode.instruction_at[tick])
    return Observation(images, episode.instructions[wording], episode.motion.state(tick))


def _chunk(engine: Engine, windows: Windows, tick: int) -> Planned:
    sample = windows.sample(tick)
    observation = Observation(sample.images, sample.instruction, sample.state, sample.robot_type, prepared=True)
    chunk = engine.infer(observation, seed=tick)
    return Planned(chunk.actions.astype(np.float64), 0, chunk.bend)


def _time_s(episode: Episode, tick: int) -> float:
    return tick / episode.rate_hz if episode.times_s is None else float(episode.times_s[tick])


def _view(view: View) -> ViewProfile:
    """Before anything of it is known."""
    nothing = np.zeros((GRID, GRID, 3), np.float32)
    return ViewProfile(view.key, view.rotate_180, view.center_crop, (0.0, 0.0), (0.0, 0.0), nothing, nothing)
