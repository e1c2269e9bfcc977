"""Datasets of episodes, whatever their format: opened by one function, read one episode at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.robot.prompt import normalize_instruction
from xr0_engine.training.data.description import Description, describe
from xr0_engine.training.data.episode import Episode, Status, load_episode
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.lerobot_meta import INFO_FILE
from xr0_engine.training.data.samples import DataError

log = logging.getLogger("xr0_engine.data")

# Fields of a profile that say how a robot is looked at and asked, not what its actions are.
_SEEN = ("name", "robot_types", "views", "replan_every")

# Episodes that a process keeps in memory, without their frames: about 100 kB each.
KEPT_EPISODES = 256


class Source(Protocol):
    """A dataset: episodes by number, in a fixed order. lengths in ticks of the control rate."""

    def __hash__(self) -> int: ...

    @property
    def description(self) -> Description: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def statuses(self) -> Sequence[Status]: ...

    def load(self, number: int) -> Episode:
        """Raises DataError."""


class EpisodeFolder:
    """Episode files of the released format in a folder and those below it, ordered by path.

    files: these instead of all. skip_broken: leave out the files that cannot be used, with a warning. Raises DataError
    for an empty folder, or that lists every file that cannot be used.
    """

    def __init__(
        self, description: Description, files: Sequence[Path] | None = None, skip_broken: bool = False
    ) -> None:
        self.description = description
        candidates = episode_files(description.folder) if files is None else files
        if not candidates:
            raise DataError(f"{description.folder} holds no episode file (*.json) and no {INFO_FILE}")
        usable, lengths, statuses, faults = [], [], [], []
        for file in candidates:
            try:
                episode = load_episode(file)
                _require_views(episode, description)
            except DataError as error:
                faults.append(str(error))
                continue
            usable.append(file)
            lengths.append(len(episode.motion))
            statuses.append(episode.status)
        if faults and not (skip_broken and usable):
            raise DataError("; ".join(faults))
        if faults:
            log.warning(
                "%s: left out %d of %d: %s", description.folder, len(faults), len(candidates), "; ".join(faults)
            )
        self.files = tuple(usable)
        self.names = tuple(str(file) for file in usable)
        self.lengths, self.statuses = tuple(lengths), tuple(statuses)

    def load(self, number: int) -> Episode:
        return load_episode(self.files[number])


def open_source(path: Path, skip_broken: bool = False, embodiment: Embodiment | None = None) -> Source:
    """Open a dataset's folder, or the YAML file that describes one. Raises DataError.

    skip_broken: open it without the episode files that cannot be used; see EpisodeFolder. embodiment: the profile that
    it is seen through in the place of its own; see seen_through.
    """
    description = describe(path)
    if embodiment is not None:
        description = seen_through(embodiment, description, path)
    if is_lerobot(description):
        return LeRobotDataset(description)
    if description.views or description.arms or description.state or description.action:
        raise DataError(
            f"{path}: views, arms, state and action are for LeRobot datasets; episode files are self-evident"
        )
    if description.embodiment.action_layout is not BIMANUAL:
        raise DataError(
            f"{path}: episode files hold two arms: expected an embodiment of layout {BIMANUAL.name!r}, "
            f"got {description.embodiment.name!r} of {description.embodiment.layout!r}"
        )
    return EpisodeFolder(description, skip_broken=skip_broken)


def seen_through(embodiment: Embodiment, description: Description, path: Path) -> Description:
    """The description of the dataset at path with a run's profile in the place of its own: of its views, the profile's.

    Raises DataError for a profile that differs in what makes actions and their statistics (layout, rate, kinds of
    columns), and for a view that the description of a LeRobot dataset does not map.
    """
    own = description.embodiment
    for name in [item.name for item in fields(Embodiment) if item.name not in _SEEN]:
        wanted, found = getattr(embodiment, name), getattr(own, name)
        if wanted != found:
            raise DataError(
                f"{path}: embodiment {own.name!r} has {name} {found!r}, the run's profile {embodiment.name!r} has "
                f"{wanted!r}: choose another data.embodiment, or name the profile in the dataset's xr0.yaml and make "
                "its statistics anew"
            )
    if not is_lerobot(description):
        return replace(description, embodiment=embodiment)
    keys = [view.key for view in embodiment.views]
    missing = [key for key in keys if key not in description.views]
    if missing:
        raise DataError(
            f"{path}: views: the profile {embodiment.name!r} has the view {missing[0]!r}, the dataset maps "
            f"{', '.join(description.views) or 'none'}: map it in xr0.yaml, or choose a profile without it "
            "(data.embodiment)"
        )
    return replace(description, embodiment=embodiment, views={key: description.views[key] for key in keys})


def is_lerobot(description: Description) -> bool:
    return (description.folder / INFO_FILE).is_file()


def episode_files(folder: Path) -> list[Path]:
    """Every JSON file that looks like an episode: neither hidden nor another file of a recording."""
    return sorted(path for path in folder.rglob("*.json") if path.name[0] != "." and path.name != "recording.json")


@lru_cache(maxsize=KEPT_EPISODES)
def load(source: Source, number: int) -> Episode:
    """source.load for training, which needs words too; the last ones kept. Raises DataError."""
    return checked_instructions(source.load(number))


def checked_instructions(episode: Episode) -> Episode:
    """The episode. Raises DataError that names it if a prompt cannot be made of one of its instructions."""
    if not episode.instructions:
        raise DataError(f"{episode.name}: task: expected words, the episode has none")
    for place, text in enumerate(episode.instructions):
        try:
            normalize_instruction(text)
        except ValueError as error:
            tick = ""
            if episode.instruction_at is not None:
                tick = f"tick {int(np.argmax(episode.instruction_at == place))}: "
            raise DataError(f"{episode.name}: {tick}task: {error}") from None
    return episode


def split(source: Source, validation_fraction: float) -> tuple[list[int], list[int]]:
    """Numbers of the episodes to train on, and of those held out: the same ones whenever and wherever this is asked.

    Whole episodes are held out, at least one of two or more; `invalid` ones are in neither part. Which ones follows
    from the names' last parts alone, so a moved dataset keeps its split.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: expected a number from 0 below 1, got {validation_fraction}")
    usable = [number for number, status in enumerate(source.statuses) if status != "invalid"]
    held_out = 0
    if validation_fraction > 0 and len(usable) > 1:
        held_out = max(1, round(validation_fraction * len(usable)))
    names = source.names
    by_hash = sorted(usable, key=lambda number: hashlib.sha256(Path(names[number]).name.encode()).digest())
    return sorted(by_hash[held_out:]), sorted(by_hash[:held_out])


def _require_views(episode: Episode, description: Description) -> None:
    missing = [view.key for view in description.embodiment.views if view.key not in episode.clips]
    if missing:
        raise DataError(
            f"{episode.name}: lacks the view {missing[0]!r} of embodiment {description.embodiment.name!r}, it has "
            f"{', '.join(episode.clips)}: choose a profile without that view"
        )
