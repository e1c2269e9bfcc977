"""Datasets of episodes, whatever their format: opened by one function, read one episode at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.training.data.description import Description, describe
from xr0_engine.training.data.episode import Episode, Status, load_episode
from xr0_engine.training.data.lerobot import INFO_FILE, LeRobotDataset
from xr0_engine.training.data.samples import DataError

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

    files: these instead of all. Raises DataError for an empty folder, or that lists every file that cannot be used.
    """

    def __init__(self, description: Description, files: Sequence[Path] | None = None) -> None:
        self.description = description
        self.files = tuple(episode_files(description.folder) if files is None else files)
        if not self.files:
            raise DataError(f"{description.folder} holds no episode file (*.json) and no {INFO_FILE}")
        self.names = tuple(str(file) for file in self.files)
        lengths, statuses, faults = [], [], []
        for file in self.files:
            try:
                episode = load_episode(file)
                _require_views(episode, description)
            except DataError as error:
                faults.append(str(error))
                continue
            lengths.append(len(episode.motion))
            statuses.append(episode.status)
        if faults:
            raise DataError("; ".join(faults))
        self.lengths, self.statuses = tuple(lengths), tuple(statuses)

    def load(self, number: int) -> Episode:
        return load_episode(self.files[number])


def open_source(path: Path) -> Source:
    """Open a dataset's folder, or the YAML file that describes one. Raises DataError."""
    description = describe(path)
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
    return EpisodeFolder(description)


def is_lerobot(description: Description) -> bool:
    return (description.folder / INFO_FILE).is_file()


def episode_files(folder: Path) -> list[Path]:
    """Every JSON file that looks like an episode: neither hidden nor another file of a recording."""
    return sorted(path for path in folder.rglob("*.json") if path.name[0] != "." and path.name != "recording.json")


@lru_cache(maxsize=KEPT_EPISODES)
def load(source: Source, number: int) -> Episode:
    """source.load, the last ones kept."""
    return source.load(number)


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
        raise DataError(f"{episode.name}: lacks the view {missing[0]!r} of embodiment {description.embodiment.name!r}")
