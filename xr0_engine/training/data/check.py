"""Finds the episodes of a dataset that training would stop at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xr0_engine.training.data.description import Description, describe
from xr0_engine.training.data.language import LanguageLines
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.parallel import in_parallel
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import EpisodeFolder, Source, episode_files, is_lerobot, open_source


@dataclass(frozen=True)
class Finding:
    """faults: what is wrong with an episode or line, empty if nothing. status: of the episode. ticks: its length."""

    name: str
    faults: tuple[str, ...]
    status: str = "success"
    ticks: int = 0


def check(path: Path, fast: bool, processes: int) -> list[Finding]:
    """One finding an episode of a dataset (or a line of a .jsonl file), in order.

    Every frame that training could ask for is decoded; fast decodes only the first and the last of each view. Raises
    DataError if there is no dataset at all.
    """
    if path.suffix == ".jsonl":
        lines = LanguageLines(path)
        return list(in_parallel(partial(_line, lines), range(len(lines)), processes, "checking"))
    description = describe(path)
    if is_lerobot(description):
        dataset = LeRobotDataset(description)
        return list(in_parallel(partial(_episode, dataset, fast), range(len(dataset.names)), processes, "checking"))
    files = episode_files(description.folder)
    if not files:
        open_source(path)
    return list(in_parallel(partial(_file, description, fast), files, processes, "checking"))


def _file(description: Description, fast: bool, file: Path) -> Finding:
    try:
        folder = EpisodeFolder(description, [file])
    except DataError as error:
        return Finding(str(file), (str(error),))
    return _episode(folder, fast, 0)


def _episode(source: Source, fast: bool, number: int) -> Finding:
    name = source.names[number]
    try:
        episode = source.load(number)
    except DataError as error:
        return Finding(name, (str(error),))
    last = len(episode.motion) - 1
    ticks = [0, last] if fast else range(last + 1)
    faults = []
    for view in episode.clips:
        try:
            shapes = {episode.image(view, tick).shape for tick in ticks}
        except DataError as error:
            # The first one of a view: a file that ends early would tell of every frame that it lacks.
            faults.append(str(error))
            continue
        if len(shapes) > 1:
            faults.append(f"{episode.clips[view].path}: frames of several sizes: {sorted(shapes)}")
    return Finding(name, tuple(faults), episode.status, last + 1)


def _line(lines: LanguageLines, index: int) -> Finding:
    try:
        return Finding(lines.sample(index).source, ())
    except DataError as error:
        return Finding(str(lines.path), (str(error),))
