"""Datasets of the Hugging Face hub: the files of a repository that the readers open, fetched once, kept in its cache.

What describes a dataset comes first, the episodes only once it is known which views they are wanted of. They are not
fetched one by one as training draws them: it draws at random from all of them, and a network that fails
later would end it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from xr0_engine.files import read_json, reading, section, text
from xr0_engine.hub import HubId, fetch, hub_id
from xr0_engine.training.data.samples import DataError
from xr0_engine.types import FileError

# Every repository has a README.md, so there is always something to fetch.
DESCRIBING = ("meta/*", "*.yaml", "*.yml", "README.md")
EPISODE_FILES = ("*.json", "*.mp4")
LANGUAGE_FILES = ("*.jsonl", "README.md")
PICTURES = ("*.jpg", "*.jpeg", "*.png", "*.webp", "*.tif", "*.tiff", "*.JPG", "*.JPEG", "*.PNG")
INFO_FILE = Path("meta") / "info.json"
_PLACE = re.compile(r"\{[^{}]*\}")


def find_on_hub(path: Path, beside: Path = Path()) -> HubId | None:
    """The id that a dataset is named by; None where there is a file or folder of that name, which wins, or the name is
    no id. beside: the folder that a relative name is looked for in."""
    found = hub_id(path)
    return None if found is None or (beside / path).exists() else found


def pinned(source: HubId) -> HubId:
    """With the commit that the revision is now, in this process. Raises DataError.

    Processes that train together would each ask by themselves, so there it must be a commit already.
    """
    if source.is_pinned:
        return source
    found = HubId(source.name, _fetch(source, DESCRIBING).name)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise DataError(f"{source}: of several processes all must read the same commit: write {found}")
    return found


def description_folder(source: HubId) -> Path:
    """A folder with all but the episodes of a dataset. Raises DataError."""
    return _fetch(source, DESCRIBING)


def fetch_episodes(source: HubId, folder: Path, views: Iterable[str]) -> None:
    """Add the episodes to what description_folder gave. views: video features of a LeRobot dataset that are wanted.

    Raises DataError.
    """
    patterns: tuple[str, ...] = EPISODE_FILES
    info = folder / INFO_FILE
    if info.is_file():
        content = read_json(info, DataError)
        with reading(info, DataError):
            patterns = _lerobot_files(content, sorted(set(views)))
    _fetch(HubId(source.name, folder.name), (*DESCRIBING, *patterns))


def _lerobot_files(info: object, views: Sequence[str]) -> tuple[str, ...]:
    """Patterns of the tables, and of the videos of these features alone."""
    content = section({"info": info}, "info")
    paths = [text(content, "data_path")]
    if views:
        videos = text(content, "video_path")
        paths += [videos.replace("{video_key}", view) for view in views]
    # What stands around the places, which fnmatch reads otherwise, as it is.
    return tuple("*".join(glob.escape(part) for part in _PLACE.split(path)) for path in paths)


def language_file(source: HubId) -> Path:
    """The JSONL file of a dataset of vision-language lines, its pictures beside it. Raises DataError without one."""
    folder = _fetch(source, LANGUAGE_FILES)
    found = sorted(folder.rglob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise DataError(
            f"{source}: expected one .jsonl file, the repository has {names}: `hf download {source.name} --repo-type "
            "dataset --local-dir DIR`, and name the file there"
        )
    _fetch(HubId(source.name, folder.name), (*LANGUAGE_FILES, *PICTURES))
    return found[0]


@cache
def _fetch(source: HubId, patterns: tuple[str, ...]) -> Path:
    """Once in a process: what a branch is stays the same in all that is read of it."""
    try:
        return fetch("dataset", source, patterns)
    except FileError as error:
        raise DataError(str(error)) from None
