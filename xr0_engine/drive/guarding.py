"""The guard of a policy: its file found, read, and held against the robot that the policy drives."""

from __future__ import annotations

from pathlib import Path

from xr0_engine.files import GUARD_FILE
from xr0_engine.guard import RobotProfile, read_guard
from xr0_engine.types import FileError, RobotInfo

NONE = "none"
"""In the place of a file: no guard, even where there is one."""


def guard_file(given: str | None, checkpoint: str | None) -> Path | None:
    """The file to go by: the one that is given, or else the checkpoint's if it has one, a folder or hub id. NONE: none.
    Raises FileNotFoundError for a given one that there is not, CheckpointError for a checkpoint that there is not."""
    if given == NONE:
        return None
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"--guard: {given}: there is no such file; `xr0 guard calibrate` makes one")
        return Path(given)
    if checkpoint is None:
        return None
    # Needs torch, which a robot that is driven by a server does without.
    from xr0_engine.model.weights import resolve_checkpoint

    beside = resolve_checkpoint(checkpoint) / GUARD_FILE
    return beside if beside.is_file() else None


def guard_of(path: Path, robot_type: str, info: RobotInfo, statistics: str | None = None) -> RobotProfile:
    """The profile of a robot type. info: the robot as its policy tells it; statistics: digest of the policy's action
    statistics, None where it is not known. Raises FileError for a file without this robot type, or of another robot
    that is called the same; and as read_guard."""
    robots = read_guard(path)
    if robot_type not in robots:
        raise FileError(
            f"{path}: robots: expected {robot_type!r}, which the policy drives, got {', '.join(robots)}: these are "
            "thresholds of another robot; calibrate for this one with `xr0 guard calibrate DATASET --out FILE`"
        )
    robots[robot_type].check(path, info, statistics)
    return robots[robot_type]
