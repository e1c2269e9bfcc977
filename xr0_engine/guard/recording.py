"""Runs of a policy as a guard saw them, in a file each: what `xr0 guard calibrate --runs` goes by.

A line of JSON each: `run` (the first: whose), then `seen` and `planned` in turn. Of pictures only thumbnails are in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from xr0_engine.files import json_lines, number, reading, section, table, text, whole
from xr0_engine.guard.calibrate import Recorded, Robot
from xr0_engine.guard.looks import GRID, Look
from xr0_engine.guard.profile import WIDEST, RobotProfile, numbers
from xr0_engine.guard.watch import Planned, Seen
from xr0_engine.types import FileError

VERSION = 2
DECIMALS = 4
"""Of a thumbnail's cells, which are a few standard deviations."""


class RunWriter:
    """Writes what a guard hands it, a line at once. Raises FileExistsError if there is such a file, OSError."""

    def __init__(self, path: Path, robot: RobotProfile) -> None:
        self._file = path.open("x", encoding="utf-8")
        self._write("run", version=VERSION, **_whose(robot))

    def keep(self, item: Seen | Planned) -> None:
        if isinstance(item, Planned):
            self._write("planned", actions=item.actions.tolist(), given=item.given, bend=item.bend)
            return
        looks = {
            view: {
                "brightness": look.brightness,
                "contrast": look.contrast,
                "thumbnail": look.thumbnail.round(DECIMALS).ravel().tolist(),
                "change": look.change,
                "aspect": look.aspect,
            }
            for view, look in item.looks.items()
        }
        self._write("seen", time_s=item.time_s, looks=looks, state=item.state.tolist(), instruction=item.instruction)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _write(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()


def read_run(path: Path, robot: Robot | RobotProfile) -> Recorded:
    """A run of that robot and policy. Raises FileError that names the file, and the line or field at fault, for a run
    of another and for one without two chunks; OSError."""
    views = tuple(view.key for view in robot.views)
    seen: list[Seen] = []
    chunks: list[Planned] = []
    kinds: list[str] = []
    for place, line in json_lines(path, FileError):
        with reading(f"{path}, line {place}", FileError):
            kind = text(line, "kind")
            if not kinds:
                _check_header(line, kind, robot)
            elif kind == "seen":
                # What led to no chunk is replaced by the next.
                if kinds[-1] == "seen":
                    seen.pop()
                seen.append(_seen(line, views, None if not seen else len(seen[0].state)))
            elif kind == "planned" and kinds[-1] == "seen":
                chunks.append(_planned(line, None if not chunks else chunks[0].actions.shape))
            else:
                raise ValueError(f"kind: expected seen, or planned after it, got {kind!r:.40}")
            kinds.append(kind)
    seen = seen[: len(chunks)]
    if len(seen) < 2:
        raise FileError(f"{path}: expected a run of at least two chunks, got {len(seen)}: drive for longer")
    states, times_s = np.stack([one.state for one in seen]), np.array([one.time_s for one in seen])
    if (np.diff(times_s) <= 0).any():
        raise FileError(f"{path}: time_s: expected times that rise from line to line")
    fastest = (np.abs(np.diff(states, axis=0)) / np.diff(times_s)[:, None]).max(axis=0)
    words = tuple(dict.fromkeys(one.instruction for one in seen if one.instruction is not None))
    return Recorded(seen, [chunk.actions for chunk in chunks], chunks, fastest, words, is_run=True)


def _whose(robot: Robot | RobotProfile) -> dict[str, Any]:
    """What a run and the thresholds that are made of it must have in common."""
    return {
        "robot_type": robot.robot_type,
        "views": [view.key for view in robot.views],
        "control_rate_hz": robot.control_rate_hz,
        "action_width": robot.action_width,
        "statistics": robot.statistics,
    }


def _check_header(line: Mapping[str, Any], kind: str, robot: Robot | RobotProfile) -> None:
    if kind != "run" or whole(line, "version") != VERSION:
        raise ValueError(f"expected a run of version {VERSION}, which `xr0 drive --guard-record` writes")
    for name, wanted in _whose(robot).items():
        # Of recordings alone nobody knows whose statistics they are.
        if line[name] != wanted and not (name == "statistics" and None in (wanted, line[name])):
            raise ValueError(f"{name}: the run has {line[name]!r:.80}, what is calibrated {wanted!r:.80}: another's")


def _seen(line: Mapping[str, Any], views: tuple[str, ...], width: int | None) -> Seen:
    looks = {}
    for view in views:
        raw = section(section(line, "looks"), view)
        looks[view] = Look(
            brightness=number(raw, "brightness", least=0, most=255),
            contrast=number(raw, "contrast", least=0, most=255),
            thumbnail=numbers(raw, "thumbnail", GRID * GRID * 3).reshape(GRID, GRID, 3).astype(np.float32),
            change=None if raw["change"] is None else number(raw, "change", least=0, most=255),
            aspect=None if raw["aspect"] is None else number(raw, "aspect", least=1e-3, most=1e3),
        )
    instruction = line["instruction"]
    if instruction is not None and not isinstance(instruction, str):
        raise TypeError(f"instruction is {instruction!r:.80}, neither text nor null")
    return Seen(number(line, "time_s"), looks, numbers(line, "state", width), instruction)


def _planned(line: Mapping[str, Any], shape: tuple[int, ...] | None) -> Planned:
    actions = table(line["actions"], "actions")
    if not 0 < actions.size <= WIDEST * WIDEST or shape not in (None, actions.shape):
        raise ValueError(f"actions: expected a chunk of the shape of the others, got {actions.shape}")
    bend = None if line["bend"] is None else number(line, "bend", least=0, most=1)
    return Planned(actions, whole(line, "given", least=0, most=len(actions)), bend)
