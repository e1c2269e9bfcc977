"""A guard's files, for tests/fuzz_files.py."""

from __future__ import annotations

from pathlib import Path

from tests.guard.support import ROBOT, drive, profile
from xr0_engine.guard import Guard, read_guard, write_guard
from xr0_engine.guard.recording import RunWriter, read_run


def write_guard_files(folder: Path) -> None:
    write_guard(folder / "guard.json", profile())
    with RunWriter(folder / "run.jsonl", profile()) as writer:
        drive(Guard(profile(), writer.keep))


def read_guard_files(folder: Path) -> None:
    """What is taken has to serve."""
    for robot in read_guard(folder / "guard.json").values():
        if robot.robot_type == "waver":
            drive(Guard(robot))
    read_run(folder / "run.jsonl", ROBOT)
