"""LeRobot datasets, v2.0 and v2.1 (a file per episode) and v3.0 (files of many episodes): parquet and MP4."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from xr0_engine.files import FAULTS, is_number, one_line, section
from xr0_engine.training.data.columns import Timing, motion_of
from xr0_engine.training.data.description import KINDS, PART_WIDTHS, ROTATIONS, Description, Selector
from xr0_engine.training.data.episode import Episode, Status
from xr0_engine.training.data.lerobot_meta import (
    INFO_FILE,
    LONGEST_EPISODE,
    entries_v2,
    entries_v3,
    json_object,
    tasks_v2,
    tasks_v3,
)
from xr0_engine.training.data.lerobot_rows import Rows, read_rows
from xr0_engine.training.data.lerobot_videos import clip_of
from xr0_engine.training.data.motion import resampled_ticks
from xr0_engine.training.data.samples import DataError

LOWEST_HZ, HIGHEST_HZ = 0.01, 1e4
"""Of rows."""


def _rate(fps: Any) -> float:
    if not is_number(fps) or not LOWEST_HZ <= fps <= HIGHEST_HZ:
        raise DataError(f"{INFO_FILE}: fps: expected a number from {LOWEST_HZ:g} to {HIGHEST_HZ:g}, got {fps!r:.40}")
    return float(fps)


class LeRobotDataset:
    """The episodes of a LeRobot dataset, as its description maps them. Raises DataError for a wrong file or mapping."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.path = description.folder
        info = json_object(self.path / INFO_FILE)
        try:
            self._version = str(info["codebase_version"])
            features = section(info, "features")
            self._features: Mapping[str, Any] = {name: section(features, name) for name in features}
            self._fps = _rate(info["fps"])
            if not self._version.startswith(("v2.", "v3.")):
                raise DataError(f"codebase_version {self._version!r}: expected v2.0, v2.1 or v3.0")
            self._check_mapping()
            entries = entries_v3 if self._version.startswith("v3.") else entries_v2
            self.entries = tuple(entries(self.path, info, sorted(set(description.views.values()))))
        except KeyError as error:
            raise DataError(f"{self.path}: its meta data lack {error.args[0]!r:.80}") from None
        except FAULTS as error:
            raise DataError(f"{self.path}: {one_line(error)}") from None
        self.rate_hz = description.embodiment.control_rate_hz
        for entry in self.entries:
            if entry.length / self._fps * self.rate_hz > LONGEST_EPISODE:
                raise DataError(
                    f"{self.path}: episode {entry.index}: expected at most {LONGEST_EPISODE} ticks at "
                    f"{self.rate_hz:g} Hz, got {entry.length} rows at {self._fps:g} Hz"
                )

    @property
    def fps(self) -> list[float]:
        """As EpisodeFolder's."""
        return [self._fps] * len(self.entries)

    @property
    def names(self) -> list[str]:
        return [f"{self.path}#{entry.index}" for entry in self.entries]

    @property
    def lengths(self) -> list[int]:
        return [len(resampled_ticks(entry.length, self._fps, self.rate_hz)) for entry in self.entries]

    @property
    def statuses(self) -> list[Status]:
        return [entry.status for entry in self.entries]

    def load(self, number: int) -> Episode:
        """The episode at a place in `entries`. Raises DataError that names it, and file and row."""
        try:
            return self._load(number)
        except KeyError as error:
            raise DataError(f"{self.names[number]}: {error.args[0]!r:.80} is missing") from None
        except FAULTS as error:
            raise DataError(f"{self.names[number]}: {one_line(error)}") from None

    def _load(self, number: int) -> Episode:
        entry = self.entries[number]
        if entry.fault is not None:
            raise DataError(entry.fault)
        rows = read_rows(entry, self._mapped_features(), self._fps)
        times_s = (rows.frames - rows.frames[0]) / self._fps
        if len(rows.gaps) and self._fps != self.rate_hz:
            row = rows.gaps[0]
            raise DataError(
                f"{entry.data}: rows are missing between frames {rows.frames[row]} and {rows.frames[row + 1]}, and "
                f"ticks at {self.rate_hz:g} Hz out of rows at {self._fps:g} Hz would run over the gap: make the parts "
                "episodes of their own"
            )
        ticks = resampled_ticks(entry.length, self._fps, self.rate_hz)
        timing = Timing(ticks, times_s, self._fps, self.rate_hz)
        motion = motion_of(self.description, lambda selector: self._pick(selector, rows), timing)
        known, tasks_at = np.unique(rows.tasks[ticks], return_inverse=True)
        instructions = tuple(self._words(int(task)) for task in known)
        if len(known) == 1 and instructions[0] in entry.wordings:
            instructions = entry.wordings
        return Episode(
            name=self.names[number],
            status=entry.status,
            instructions=instructions,
            clips={
                view: clip_of(entry.spans[feature], rows.frames, self._fps, entry.alone)
                for view, feature in self.description.views.items()
            },
            motion=motion,
            rate_hz=self.rate_hz,
            instruction_at=None if len(known) == 1 else tasks_at,
            times_s=times_s if len(rows.gaps) else None,
        )

    def _check_mapping(self) -> None:
        mapped = self.description
        for view, feature in mapped.views.items():
            kind = self._features.get(feature, {}).get("dtype")
            if kind == "image":
                raise DataError(
                    f"views.{view}: {feature!r} holds images in parquet; only videos are read: encode them, as "
                    "LeRobot's lerobot-edit-dataset does"
                )
            if kind != "video":
                videos = [name for name, it in self._features.items() if it["dtype"] == "video"]
                raise DataError(f"views.{view}: expected one of {', '.join(videos)}, got {feature!r}")
        unmapped = [view.key for view in mapped.embodiment.views if view.key not in mapped.views]
        if unmapped:
            raise DataError(
                f"views: the profile {mapped.embodiment.name!r} has the view {unmapped[0]!r}, xr0.yaml maps "
                f"{', '.join(mapped.views) or 'none'}: map it, or name a profile without it"
            )
        for (arm, part), mapping in mapped.arms.items():
            width = ROTATIONS[mapping.rotation] if part == "rotation" else PART_WIDTHS[part]
            self._columns(mapping.state, width, f"arms.{arm}.{part}.state")
            self._columns(mapping.action, width, f"arms.{arm}.{part}.action")
        for kind, entries in (("state", mapped.state), ("action", mapped.action)):
            for number, entry in enumerate(entries):
                width = entry.columns.stop - entry.columns.start
                self._columns(entry.source, width, f"{kind}[{number}].from")
                if entry.minus:
                    self._columns(entry.minus, width, f"{kind}[{number}].minus")
        self._check_kinds()
        if not mapped.arms and not (mapped.state and mapped.action):
            wanted = " and ".join(mapped.embodiment.action_layout.described_by)
            features = ", ".join(f"{name} {self._names(name)}" for name in self._features if "image" not in name)
            raise DataError(f"the description lacks {wanted}; the dataset has {features}")

    def _check_kinds(self) -> None:
        """At another rate than the robot's, it must be known which columns are steps."""
        mapped, rate_hz = self.description, self.description.embodiment.control_rate_hz
        for number, entry in enumerate(mapped.action if self._fps != rate_hz else ()):
            unknown = [column for column in entry.numbers if mapped.kind(entry, column) is None]
            if unknown:
                raise DataError(
                    f"action[{number}]: recorded at {self._fps:g} Hz, and embodiment {mapped.embodiment.name!r} acts "
                    f"at {rate_hz:g} Hz: column {unknown[0]} needs a `kind`, one of {', '.join(KINDS)}: steps are "
                    "added up or divided, all else is taken nearest in time"
                )

    def _columns(self, selector: Selector, width: int, where: str) -> list[int]:
        feature = self._features.get(selector.feature)
        if feature is None or len(feature["shape"]) != 1:
            raise DataError(f"{where}: {selector.feature!r} is no feature of numbers of this dataset")
        columns = selector.columns(self._names(selector.feature), int(feature["shape"][0]))
        if len(columns) != width:
            raise DataError(f"{where}: expected {width} columns, got {len(columns)}")
        return columns

    def _names(self, feature: str) -> list[str]:
        return column_names(self._features[feature].get("names"))

    def _pick(self, selector: Selector, rows: Rows) -> np.ndarray:
        values = rows.values[selector.feature]
        expected = int(self._features[selector.feature]["shape"][0])
        if values.shape[1] != expected:
            raise DataError(f"{selector.feature}: expected {expected} columns as in {INFO_FILE}, got {values.shape[1]}")
        picked = values[:, selector.columns(self._names(selector.feature), expected)].astype(np.float64)
        wrong = np.flatnonzero(~np.isfinite(picked).all(axis=1))
        if len(wrong):
            raise DataError(f"frame {wrong[0]}: {selector.feature}: expected finite numbers, got NaN or infinity")
        return picked

    def _mapped_features(self) -> set[str]:
        mapped = self.description
        selectors = [s for part in mapped.arms.values() for s in (part.state, part.action)]
        for column in (*mapped.state, *mapped.action):
            selectors += [column.source, *([column.minus] if column.minus else [])]
        return {selector.feature for selector in selectors}

    def _words(self, task: int) -> str:
        """LeRobot gives a frame the task of its task_index, whatever the meta data say of its episode."""
        if task not in self._tasks:
            raise DataError(f"task_index {task}: {self.path / 'meta'} has the tasks {', '.join(map(str, self._tasks))}")
        return self._tasks[task]

    @cached_property
    def _tasks(self) -> dict[int, str]:
        return (tasks_v3 if self._version.startswith("v3.") else tasks_v2)(self.path)


def column_names(names: Any) -> list[str]:
    """The columns' names, in order. They are listed, within groups or not, or each says its position."""
    if isinstance(names, Mapping):
        if sorted(map(str, names.values())) == sorted(map(str, range(len(names)))):
            return sorted(map(str, names), key=lambda name: int(names[name]))
        names = [group for group in names.values() if isinstance(group, list | Mapping)]
    if not isinstance(names, list):
        return []
    return [name for it in names for name in (column_names(it) if isinstance(it, list | Mapping) else [str(it)])]
