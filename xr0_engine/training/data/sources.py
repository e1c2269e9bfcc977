"""Datasets of episodes, whatever their format: opened by one function, read one episode at a time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import numpy as np

from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.robot.prompt import normalize_instruction
from xr0_engine.training.data.description import Description, describe
from xr0_engine.training.data.episode import Episode, Status, check_rate, load_episode
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.lerobot_meta import INFO_FILE
from xr0_engine.training.data.samples import DataError, UnfitError
from xr0_engine.training.named import find, is_function, mark, told

log = logging.getLogger("xr0_engine.data")

# Fields of a profile that say how a robot is looked at and asked, not what its actions are.
_SEEN = ("name", "robot_types", "views", "replan_every", "prompt", "instruction", "history")

# Decimals of the numbers that go into a dataset's digest: beyond them machines calculate otherwise.
DIGEST_DECIMALS = 6


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


Opens = TypeVar("Opens", bound=Callable[[], Source])


def dataset(function: Opens) -> Opens:
    """Marks a function without arguments, which returns a Source, as a dataset that runs may name.

    Its name, `package.module:function`, stands in the place of a path. It is called once in every process that reads:
    whatever is random in it must come from a seed of its own, so that all of them get the same episodes. The folder of
    the description is of no account; views, arms, state and action of it are not used. An attribute `digest` of the
    Source, text, tells one content from another when a run is resumed; without it NamedSource makes one.
    """
    return mark(function, "dataset")


@dataclass(frozen=True, eq=False)
class NamedSource:
    """A dataset by the name of a function. It travels to other processes as that name, and is opened there anew.

    digest: text that tells its content from another.
    """

    name: str
    description: Description
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    statuses: tuple[Status, ...]
    digest: str

    def load(self, number: int) -> Episode:
        """Raises DataError for a process that gets another dataset than the first, and for what is no such episode."""
        opened = open_named(self.name)
        if opened.digest != self.digest:
            raise DataError(
                f"{self.name}: gives another dataset in each process: whatever is random in it needs a seed of its own"
            )
        episode = _call(find_dataset(self.name)).load(number)
        _require_views(episode, self.description)
        _require_fit(episode, self.lengths[number], self.description)
        return episode


class EpisodeFolder:
    """Episode files of the released format in a folder and those below it, ordered by path.

    files: these instead of all. skip_broken: leave out the files that cannot be used, with a warning. Raises DataError
    for an empty folder, for a profile of another rate than the format's TIMELINE_HZ, or that lists every file that
    cannot be used. fps: of each episode, slowest_fps.
    """

    def __init__(
        self, description: Description, files: Sequence[Path] | None = None, skip_broken: bool = False
    ) -> None:
        self.description = description
        candidates = episode_files(description.folder) if files is None else files
        if not candidates:
            raise DataError(f"{description.folder} holds no episode file (*.json) and no {INFO_FILE}")
        check_rate(candidates[0], description.embodiment)
        usable, lengths, statuses, fps, faults = [], [], [], [], []
        for file in candidates:
            try:
                episode = load_episode(file, description.embodiment.action_layout.mobile)
                _require_views(episode, description)
                rate = slowest_fps(episode, description)
            except DataError as error:
                faults.append(str(error))
                continue
            usable.append(file)
            lengths.append(len(episode.motion))
            statuses.append(episode.status)
            fps.append(rate)
        if faults and not (skip_broken and usable):
            raise DataError("; ".join(faults))
        if faults:
            log.warning(
                "%s: left out %d of %d: %s", description.folder, len(faults), len(candidates), "; ".join(faults)
            )
        self.files = tuple(usable)
        self.names = tuple(str(file) for file in usable)
        self.lengths, self.statuses, self.fps = tuple(lengths), tuple(statuses), tuple(fps)

    def load(self, number: int) -> Episode:
        return load_episode(self.files[number], self.description.embodiment.action_layout.mobile)


def open_source(path: Path, skip_broken: bool = False, embodiment: Embodiment | None = None) -> Source:
    """Open a dataset: its folder, the YAML file that describes one, or the name of a function. Raises DataError.

    path: also `package.module:function`, see dataset(); a folder of such a name is opened by its absolute path.
    skip_broken: without the episode files that cannot be used; see EpisodeFolder. embodiment: the profile that the
    dataset is seen through in the place of its own; see seen_through.
    """
    if is_function(path):
        named = open_named(str(path))
        if embodiment is None:
            return named
        return replace(named, description=seen_through(embodiment, named.description, path))
    description = describe(path)
    if embodiment is not None:
        description = seen_through(embodiment, description, path)
    layout = description.embodiment.action_layout
    if is_lerobot(description):
        if layout.mobile:
            raise DataError(
                f"{path}: a LeRobot dataset of layout {layout.name!r} is not read: write episode files (docs/data.md), "
                "or give a profile of layout plain and map the columns"
            )
        return LeRobotDataset(description)
    check_episode_files(path, description)
    return EpisodeFolder(description, skip_broken=skip_broken)


def check_episode_files(path: Path, description: Description) -> None:
    """Raises DataError for a description that episode files do not have. path: the dataset's."""
    if description.views or description.arms or description.state or description.action:
        raise DataError(
            f"{path}: views, arms, state and action are for LeRobot datasets; episode files are self-evident"
        )
    layout = description.embodiment.action_layout
    if layout is not BIMANUAL and not layout.mobile:
        raise DataError(
            f"{path}: episode files hold two arms: expected an embodiment of layout {BIMANUAL.name!r}, or of one with "
            f"waist and base, got {description.embodiment.name!r} of {description.embodiment.layout!r}"
        )


def description_of(path: Path) -> Description:
    """The description alone of what open_source opens. Raises DataError."""
    return open_named(str(path)).description if is_function(path) else describe(path)


def find_dataset(name: str) -> Callable[[], Source]:
    """The function of a name. Raises DataError."""
    try:
        return find(name, "dataset", "xr0_engine.training.data.sources.dataset")
    except ValueError as error:
        raise DataError(str(error)) from error


def open_named(name: str) -> NamedSource:
    """The dataset of `package.module:function`, called once in a process. Raises DataError."""
    return _named(name, find_dataset(name))


@cache
def _named(name: str, function: Callable[[], Source]) -> NamedSource:
    try:
        source = _call(function)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    # Whatever goes wrong in somebody else's function.
    except Exception as error:
        raise DataError(f"{name}: the function failed: {told(error)}") from error
    if fault := _fault(source):
        raise DataError(f"{name}: expected a function that returns a Source (docs/data.md); {fault}")
    description = replace(source.description, folder=Path(name))
    named = NamedSource(
        name, description, tuple(source.names), tuple(map(int, source.lengths)), tuple(source.statuses), ""
    )
    return replace(named, digest=getattr(source, "digest", None) or _digest(named, source))


@cache
def _call(function: Callable[[], Source]) -> Source:
    return function()


def _fault(source: Any) -> str | None:
    """Why something is no Source."""
    missing = [name for name in ("description", "names", "lengths", "statuses", "load") if not hasattr(source, name)]
    if missing:
        return f"what it returned, a {type(source).__name__}, lacks {', '.join(missing)}"
    names, lengths, statuses = list(source.names), list(source.lengths), list(source.statuses)
    known = get_args(Status)
    digest = getattr(source, "digest", None)
    rules = {
        "description: expected a Description": isinstance(source.description, Description),
        "names: expected text, at least one, none twice": names
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names),
        f"lengths: expected {len(names)} whole numbers above 0, one an episode": len(lengths) == len(names)
        and all(isinstance(length, int | np.integer) and length > 0 for length in lengths),
        f"statuses: expected {len(names)} of {', '.join(known)}, one an episode": len(statuses) == len(names)
        and all(status in known for status in statuses),
        "digest: expected text": digest is None or isinstance(digest, str),
    }
    return next((rule for rule, holds in rules.items() if not holds), None)


def _digest(named: NamedSource, source: Source) -> str:
    """Of names, lengths and statuses, and of states and actions of the first, the middle and the last episode."""
    facts = [named.description.robot_type, named.names, named.lengths, named.statuses]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for number in sorted({0, len(named.names) // 2, len(named.names) - 1}):
        try:
            motion = source.load(number).motion
        except DataError:
            continue
        for values in (*map(motion.state, range(len(motion))), motion.actions(0, len(motion))):
            # Of -0 there is 0.
            digest.update((np.asarray(values, np.float64).round(DIGEST_DECIMALS) + 0.0).tobytes())
    return digest.hexdigest()


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


def _require_fit(episode: Episode, length: int, description: Description) -> None:
    """What files are refused for when they are read."""
    motion, rate_hz = episode.motion, description.embodiment.control_rate_hz
    rules = {
        f"motion: expected {length} ticks as lengths says, got {len(motion)}": len(motion) == length,
        f"rate_hz: expected {rate_hz:g} of embodiment {description.embodiment.name!r}, got {episode.rate_hz:g}": (
            episode.rate_hz == rate_hz
        ),
        f"motion.columns: expected ({description.width},) bool": motion.columns.shape == (description.width,),
    }
    for rule, holds in rules.items():
        if not holds:
            raise DataError(f"{episode.name}: {rule}")


def _require_views(episode: Episode, description: Description) -> None:
    missing = [view.key for view in description.embodiment.views if view.key not in episode.clips]
    if missing:
        raise DataError(
            f"{episode.name}: lacks the view {missing[0]!r} of embodiment {description.embodiment.name!r}, it has "
            f"{', '.join(episode.clips)}: choose a profile without that view"
        )


def slowest_fps(episode: Episode, description: Description) -> float:
    """Pictures a second of the view of the profile that has the fewest. Raises UnfitError for pictures of a function's
    that do not tell."""
    rates: dict[str, Any] = {
        view.key: getattr(episode.clips[view.key], "fps", None) for view in description.embodiment.views
    }
    for view, rate in rates.items():
        if not isinstance(rate, int | float) or not rate > 0:
            raise UnfitError(
                f"{episode.name}: view {view}: fps: expected pictures a second, which videos need, got {rate!r:.80}"
            )
    return float(min(rates.values()))
