"""Episode files to a LeRobot v3.0 dataset, and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from xr0_engine.robot.embodiment import builtin_embodiments, load_embodiment
from xr0_engine.training.data.description import DESCRIPTION_FILE
from xr0_engine.training.data.episode import save_episode
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.lerobot_writer import LeRobotWriter
from xr0_engine.training.data.parallel import progress_bar
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import EpisodeFolder, Source, checked_instructions
from xr0_engine.training.data.video import Clip
from xr0_engine.whole import whole_folder

# The profile of a robot of one's own, in the folder of what was converted.
PROFILE_FILE = "profile.yaml"


def to_lerobot(source: Source, out: Path) -> None:
    """Write episode files as a LeRobot v3.0 dataset with its description. Videos are encoded anew, at 30 Hz.

    Raises ValueError if `out` is there, DataError for an episode that cannot be read or whose views differ in size from
    the first one's. The folder appears whole or not at all.
    """
    if not isinstance(source, EpisodeFolder):
        raise ValueError(f"{source.description.folder}: expected a folder of episode files")
    _refuse_present(out)
    with whole_folder(out) as folder, progress_bar() as progress:
        writer = LeRobotWriter(folder, source)
        task = progress.add_task("to LeRobot", total=len(source.names))
        writer.write_files(lambda: progress.advance(task))
        writer.write_meta()
        _describe(folder, source, writer.mapping())


def from_lerobot(source: Source, out: Path) -> None:
    """Write a LeRobot dataset as episode files. Video files are copied as they are, and episodes are cut out of them.

    Raises ValueError if `out` is there or the robot is not of layout `bimanual` at 30 Hz, which is all that episode
    files hold; DataError for an episode that cannot be read. The folder appears whole or not at all.
    """
    if not isinstance(source, LeRobotDataset):
        raise ValueError(f"{source.description.folder}: expected a LeRobot dataset")
    _refuse_present(out)
    with whole_folder(out) as folder, progress_bar() as progress:
        (folder / "videos").mkdir()
        copied: dict[Path, Path] = {}
        for number in progress.track(range(len(source.names)), description="from LeRobot"):
            episode = checked_instructions(source.load(number))
            if episode.instruction_at is not None:
                raise DataError(f"{episode.name}: its task changes on the way, which episode files cannot tell")
            if episode.times_s is not None:
                raise DataError(f"{episode.name}: rows are missing on the way, which episode files cannot tell")
            clips: dict[str, Clip] = {}
            for view, clip in episode.videos().items():
                if clip.path not in copied:
                    copied[clip.path] = folder / "videos" / "-".join(clip.path.relative_to(source.path).parts[1:])
                    shutil.copyfile(clip.path, copied[clip.path])
                clips[view] = replace(clip, path=copied[clip.path])
            path = folder / f"episode_{source.entries[number].index:06d}.json"
            save_episode(path, replace(episode, clips=clips))
        _describe(folder, source, {})


def _describe(folder: Path, source: Source, mapping: dict[str, Any]) -> None:
    """xr0.yaml, and beside it the profile that it names if that is none of ours."""
    embodiment = source.description.embodiment
    name = embodiment.name
    if name not in builtin_embodiments() or load_embodiment(name) != embodiment:
        name = PROFILE_FILE
        # Tuples are lists in YAML.
        profile = json.loads(json.dumps(asdict(embodiment)))
        (folder / PROFILE_FILE).write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
    facts = {
        "robot_type": source.description.robot_type,
        "embodiment": name,
        "pictures": source.description.pictures,
    }
    text = yaml.safe_dump(facts | mapping, sort_keys=False)
    (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")


def _refuse_present(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is there already: remove it or choose another folder")
