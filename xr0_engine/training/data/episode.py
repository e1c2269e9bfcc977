"""One episode in memory, and the released file format: a JSON file and an MP4 file per view (spec section 4.3)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from xr0_engine.files import FAULTS, number, one_line, read_json, section, table
from xr0_engine.robot.decode import BIMANUAL_COLUMNS, LEFT, RIGHT, ArmPose, BimanualPose
from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.robot.mobile import Columns
from xr0_engine.robot.prompt import prompt_task
from xr0_engine.training.data.mobile_episode import MobileMotion, read_motion, sections
from xr0_engine.training.data.motion import BimanualMotion, Motion
from xr0_engine.training.data.pictures import Pictures
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip
from xr0_engine.whole import write_whole

Status = Literal["success", "ongoing", "invalid"]

# The common timeline of the format: row n of proprios and actions is at n / 30 s.
TIMELINE_HZ = 30.0

EPISODE_BYTES, EPISODE_VALUES = 64 << 20, 1 << 22
"""Of a file: 76 numbers a row in proprios and actions together, half an hour at 30 Hz."""
LARGEST_FRAME = 1 << 32
LOWEST_FPS, HIGHEST_FPS = 0.01, 1e4
# View key of the embodiment -> its key in the file.
VIEW_NAMES = {"ego": "ego", "left_wrist": "wrist_left", "right_wrist": "wrist_right"}
ARMS = {"left": LEFT, "right": RIGHT}
# Part of an arm -> its name in the file, and how many numbers a row has.
PARTS = {
    "position": ("ee_pos", 3),
    "rotation": ("ee_rotm", 9),
    "joints": ("arm_joint", 6),
    "gripper": ("gripper_pos", 1),
}
# Ticks whose times are further apart have others missing between them.
GAP_TICKS = 1.5
# Digits after the point of what we write: micrometres and microradians, ten times over.
DIGITS = 7


@dataclass(frozen=True, eq=False)
class Episode:
    """name: what messages call it. instructions: the task, in one or more wordings. clips: view key -> its frames.

    motion: at rate_hz, the robot's control rate; tick 0 is the clips' first frame.
    instruction_at: (N,) int64, where the task changes within the episode: which of the instructions holds at a tick.
    times_s: (N,) float64, rising, when each tick was, in an episode that lacks some; None: tick n is at n / rate_hz.
    """

    name: str
    status: Status
    instructions: tuple[str, ...]
    clips: Mapping[str, Pictures]
    motion: Motion
    rate_hz: float
    instruction_at: np.ndarray | None = None
    times_s: np.ndarray | None = None

    def image(self, view: str, tick: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB: the frame nearest in time to a tick. Raises DataError."""
        clip = self.clips[view]
        time_s = tick / self.rate_hz if self.times_s is None else float(self.times_s[tick])
        return clip.read(clip.nearest(time_s))

    def end_after(self, tick: int) -> int:
        """The end, exclusive, of the ticks that follow a tick without a gap."""
        if self.times_s is not None:
            gaps = np.flatnonzero(np.diff(self.times_s[tick:]) * self.rate_hz > GAP_TICKS)
            if len(gaps):
                return tick + int(gaps[0]) + 1
        return len(self.motion)

    def begin_before(self, tick: int) -> int:
        """The first of the ticks that lead up to a tick without a gap."""
        if self.times_s is not None:
            gaps = np.flatnonzero(np.diff(self.times_s[: tick + 1]) * self.rate_hz > GAP_TICKS)
            if len(gaps):
                return int(gaps[-1]) + 1
        return 0

    def videos(self) -> dict[str, Clip]:
        """The clips, if all of them are of video files. Raises ValueError for others."""
        videos = {view: clip for view, clip in self.clips.items() if isinstance(clip, Clip)}
        if others := self.clips.keys() - videos.keys():
            raise ValueError(f"{self.name}: expected videos, got other pictures of {', '.join(sorted(others))}")
        return videos


def load_episode(path: Path, mobile: Columns | None = None) -> Episode:
    """Read an episode file. Raises DataError that names the file and what is wrong in it.

    mobile: the layout of a robot with waist and base, in whose 60 columns the actions come; None: two arms, 32.
    A part of an arm that the file lacks altogether is not supervised. Videos must be there, but are not opened; their
    lengths are checked when they are read.
    """
    try:
        raw = read_json(path, DataError, EPISODE_BYTES, EPISODE_VALUES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if not isinstance(raw, Mapping):
            raise ValueError(f"expected an object, got {raw!r:.80}")
        return _read(path, raw, mobile)
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]!r:.80} is missing") from None
    except FAULTS as error:
        raise DataError(f"{path}: {one_line(error)}") from None


def check_rate(path: Path, embodiment: Embodiment) -> None:
    """Raises DataError for the profile of a robot whose ticks are not the format's rows.

    path: an episode file, which does not tell its rate: rows at another would be taken for ticks without a word.
    """
    if embodiment.control_rate_hz != TIMELINE_HZ:
        raise DataError(
            f"{path}: control_rate_hz: expected {TIMELINE_HZ:g}, the rate of an episode file's rows, got "
            f"{embodiment.control_rate_hz:g} of embodiment {embodiment.name!r}: choose a profile of "
            f"{TIMELINE_HZ:g} Hz and write the rows at that rate; two arms of any rate fit a LeRobot dataset "
            "(docs/data.md)"
        )


def save_episode(path: Path, episode: Episode) -> None:
    """Write the JSON of an episode with a BimanualMotion or MobileMotion; its videos must be there. It appears whole or
    not at all.

    Paths of videos are written relative to the JSON's folder. Raises ValueError for another motion or rate, for
    pictures that are no videos, and for a task that would be read back as another one.
    """
    motion = episode.motion
    if not isinstance(motion, BimanualMotion | MobileMotion) or episode.rate_hz != TIMELINE_HZ:
        raise ValueError(f"{path}: the episode format holds two arms at {TIMELINE_HZ:g} Hz, nothing else")
    for text in episode.instructions:
        if _task(text) != text.strip():
            raise ValueError(f"{path}: task: {text!r} would be read back as {_task(text)!r}: take the markup out of it")
    if isinstance(motion, MobileMotion):
        proprios, actions = sections(motion)
    else:
        proprios, actions = (_poses_to_json(poses, motion.columns) for poses in (motion.proprios, motion.targets))
    views = [f"observations.{VIEW_NAMES[view]}" for view in episode.clips]
    raw = {
        "trajectory_type": episode.status,
        "num_frames": len(motion),
        "instruction": {
            "general": [
                {
                    "images": views,
                    "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "<cot></cot>"}],
                }
                for text in episode.instructions
            ]
        },
        "observations": {
            VIEW_NAMES[view]: [_clip_to_json(clip, path.parent)] for view, clip in episode.videos().items()
        },
        "proprios": proprios,
        "actions": actions,
    }
    write_whole(path, json.dumps(raw))


def _read(path: Path, raw: Mapping[str, Any], mobile: Columns | None) -> Episode:
    status, count = raw["trajectory_type"], raw["num_frames"]
    if status not in get_args(Status):
        raise ValueError(f"trajectory_type: expected one of {', '.join(get_args(Status))}, got {status!r:.40}")
    if type(count) is not int or not 1 <= count <= EPISODE_VALUES:
        raise ValueError(f"num_frames: expected a whole number above 0, got {count!r:.40}")
    for name in ("proprios", "actions", "observations", "instruction"):
        section(raw, name)
    return Episode(
        name=str(path),
        status=status,
        instructions=_instructions(raw["instruction"]["general"]),
        clips={
            view: _clip(raw["observations"][name], view, path.parent, count)
            for view, name in VIEW_NAMES.items()
            if name in raw["observations"]
        },
        motion=_motion(raw, count) if mobile is None else read_motion(raw["proprios"], raw["actions"], count, mobile),
        rate_hz=TIMELINE_HZ,
    )


def _motion(raw: Mapping[str, Any], count: int) -> BimanualMotion:
    present = {
        (arm, part): f"{arm}_{name}" in raw["proprios"] and f"{arm}_{name}" in raw["actions"]
        for arm in ARMS
        for part, (name, _) in PARTS.items()
    }
    if not any(present.values()):
        raise ValueError("proprios and actions: expected at least one part of one arm in both")
    return BimanualMotion(
        proprios=_poses(raw["proprios"], "proprios", count, present),
        targets=_poses(raw["actions"], "actions", count, present),
        columns=part_columns(present),
    )


def part_columns(present: Mapping[tuple[str, str], bool]) -> np.ndarray:
    """(32,) bool: the action columns of the parts of arms that are there. present: (arm, part) -> bool."""
    columns = np.zeros(BIMANUAL_COLUMNS, bool)
    for (arm, part), is_there in present.items():
        columns[getattr(ARMS[arm], part)] = is_there
    return columns


def poses_of(parts: Mapping[tuple[str, str], np.ndarray], count: int) -> BimanualPose:
    """A trajectory from its parts: (arm, part) -> (N, width), rotations (N, 9) row by row; absent ones stand still."""

    def part(arm: str, name: str, still: np.ndarray) -> np.ndarray:
        return parts.get((arm, name), np.tile(still, (count, 1)))

    left, right = (
        ArmPose(
            position_m=part(arm, "position", np.zeros(3)),
            rotation=part(arm, "rotation", np.eye(3).ravel()).reshape(-1, 3, 3),
            joints_rad=part(arm, "joints", np.zeros(6)),
            gripper=part(arm, "gripper", np.zeros(1)),
        )
        for arm in ARMS
    )
    return BimanualPose(left, right)


def arm_parts(poses: BimanualPose) -> dict[tuple[str, str], np.ndarray]:
    """The inverse of poses_of: (arm, part) -> (N, width)."""
    parts = {}
    for arm, pose in (("left", poses.left), ("right", poses.right)):
        parts[arm, "position"], parts[arm, "rotation"] = pose.position_m, pose.rotation.reshape(-1, 9)
        parts[arm, "joints"], parts[arm, "gripper"] = pose.joints_rad, pose.gripper
    return parts


def _instructions(general: Any) -> tuple[str, ...]:
    found = []
    if not isinstance(general, list):
        raise ValueError(f"instruction.general: expected a list of conversations, got {general!r:.80}")
    for entry in general:
        turns = entry.get("conversations") if isinstance(entry, Mapping) else None
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise ValueError(f"instruction.general: expected objects with a list `conversations`, got {entry!r:.80}")
        human = [turn.get("value") for turn in turns if turn.get("from") == "human"]
        if not human or not isinstance(human[0], str) or not human[0].strip():
            raise ValueError(
                f"instruction.general: expected a human turn with the task in every conversation, got {human!r:.80}"
            )
        found.append(_task(human[0]))
    if not found:
        raise ValueError("instruction.general: expected at least one conversation, got none")
    return tuple(found)


def _task(turn: str) -> str:
    """A human turn may be the whole prompt."""
    return prompt_task(turn).replace("<image>", "").strip()


def _clip(raw: Any, view: str, folder: Path, count: int) -> Clip:
    where = f"observations.{VIEW_NAMES[view]}"
    if not isinstance(raw, list) or len(raw) != 1:
        raise ValueError(f"{where}: expected a list of one clip, got {raw!r:.80}")
    if not isinstance(raw[0], Mapping):
        raise ValueError(f"{where}: expected an object, got {raw[0]!r:.80}")
    start, end, crop = raw[0]["start"], raw[0]["end"], raw[0].get("crop_bbox")
    if not (type(start) is int and type(end) is int and 0 <= start < end <= LARGEST_FRAME):
        raise ValueError(f"{where}: expected frame numbers 0 <= start < end, got {start!r:.40} and {end!r:.40}")
    try:
        fps = number(raw[0], "fps", least=LOWEST_FPS, most=HIGHEST_FPS)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    # The last tick's frame, give or take half a tick for rounding of the clip's length.
    needed = math.floor((count - 1.5) / TIMELINE_HZ * fps) + 1
    if end - start < needed:
        raise ValueError(
            f"{where}: {end - start} frames at {fps:g} Hz are too short for num_frames {count} at {TIMELINE_HZ:g} Hz"
        )
    if crop is not None and not _is_box(crop):
        raise ValueError(f"{where}: crop_bbox: expected [left, top, right, bottom] in pixels or null, got {crop!r:.80}")
    path = _video_path(raw[0]["path"], where, folder)
    return Clip(path, start / fps, end - start, fps, None if crop is None else tuple(crop))


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(edge) is int for edge in value)


def _video_path(written: Any, where: str, folder: Path) -> Path:
    """Beside the JSON, or from the working directory, as released episode files of either kind are written."""
    if not isinstance(written, str) or not written:
        raise ValueError(f"{where}: path: expected that of a video, got {written!r:.80}")
    # An absolute path is itself in both.
    candidates = list(dict.fromkeys((folder / written, Path.cwd() / written)))
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ValueError(f"{where}: path: expected a video at {' or at '.join(map(str, candidates))}: there is none")
    return found[0]


def _clip_to_json(clip: Clip, folder: Path) -> dict[str, Any]:
    start = round(clip.start_s * clip.fps)
    return {
        "path": os.path.relpath(clip.path, folder),
        "start": start,
        "end": start + clip.frames,
        "fps": clip.fps,
        "crop_bbox": None if clip.crop is None else list(clip.crop),
    }


def _poses(raw: Mapping[str, Any], where: str, count: int, present: Mapping[tuple[str, str], bool]) -> BimanualPose:
    parts = {}
    for (arm, part), is_there in present.items():
        name, width = PARTS[part]
        if not is_there:
            continue
        key = f"{arm}_{name}"
        rows = table(raw[key], f"{where}.{key}")
        if rows.shape != (count, width):
            raise ValueError(f"{where}.{key}: expected shape {(count, width)}, got {rows.shape}")
        parts[arm, part] = rows
    return poses_of(parts, count)


def _poses_to_json(poses: BimanualPose, columns: np.ndarray) -> dict[str, Any]:
    return {
        f"{arm}_{PARTS[part][0]}": rows.round(DIGITS).tolist()
        for (arm, part), rows in arm_parts(poses).items()
        if columns[getattr(ARMS[arm], part)].all()
    }
