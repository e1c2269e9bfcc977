"""Small datasets made on the spot. Every frame shows its own number, so that a test can tell which one it got."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from xr0_engine.robot.decode import rotation_exp
from xr0_engine.training.data.episode import PARTS, VIEW_NAMES, Episode, part_columns, poses_of, save_episode
from xr0_engine.training.data.motion import BimanualMotion
from xr0_engine.training.data.video import Clip, video_writer

HEIGHT, WIDTH, BITS = 32, 80, 10
ALL_PARTS = {(arm, part): True for arm in ("left", "right") for part in PARTS}
INSTRUCTION = "Fold the towel."
TIME_BASE = Fraction(1, 15360)


def numbered_frame(number: int) -> np.ndarray:
    """Ten stripes, black or white: the number in binary."""
    bits = (number >> np.arange(BITS)) & 1
    stripes = np.repeat(bits, WIDTH // BITS).astype(np.uint8) * 255
    return np.broadcast_to(stripes[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def frame_number(image: np.ndarray) -> int:
    middles = image[HEIGHT // 2, WIDTH // BITS // 2 :: WIDTH // BITS, 0] > 127
    return int((middles << np.arange(BITS)).sum())


def write_video(path: Path, numbers: range, fps: float = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with video_writer(path, WIDTH, HEIGHT, fps) as write:
        for number in numbers:
            write(numbered_frame(number))
    return path


def encode_video(path, frames, codec="libx264", pix_fmt="yuv420p", options=None, times_s=None, fps=30) -> Path:
    """As other programs write videos. frames: (height, width, 3) each. times_s: when each is shown, n / fps if None."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times_s is not None:
            stream.codec_context.time_base = TIME_BASE
        for number, frame in enumerate(frames):
            encoded = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times_s is not None:
                encoded.pts, encoded.time_base = round(times_s[number] / TIME_BASE), TIME_BASE
            container.mux(stream.encode(encoded))
        container.mux(stream.encode(None))
    return path


def random_parts(count: int, rng: np.random.Generator) -> dict[tuple[str, str], np.ndarray]:
    parts = {}
    for arm in ("left", "right"):
        parts[arm, "position"] = np.cumsum(rng.normal(0, 0.01, (count, 3)), axis=0)
        parts[arm, "rotation"] = rotation_exp(np.cumsum(rng.normal(0, 0.05, (count, 3)), axis=0)).reshape(-1, 9)
        parts[arm, "joints"] = np.cumsum(rng.normal(0, 0.05, (count, 6)), axis=0)
        parts[arm, "gripper"] = rng.uniform(0, 1, (count, 1))
    return parts


def write_episode(
    folder: Path, number: int, length: int, status: str = "success", instructions=(INSTRUCTION,), video_length=None
) -> Path:
    """episode_<number>.json with three views, all showing frame numbers from 0."""
    rng = np.random.default_rng(number)
    clips = {}
    for view in VIEW_NAMES:
        path = write_video(folder / "videos" / f"{number}.{view}.mp4", range(video_length or length))
        clips[view] = Clip(path, 0.0, length, 30.0)
    proprios, targets = (poses_of(random_parts(length, rng), length) for _ in range(2))
    motion = BimanualMotion(proprios, targets, part_columns(ALL_PARTS))
    path = folder / f"episode_{number:03d}.json"
    save_episode(path, Episode(str(path), status, tuple(instructions), clips, motion, 30.0))
    return path


def write_dataset(folder: Path, lengths=(12, 7, 9), statuses=None) -> Path:
    for number, length in enumerate(lengths):
        write_episode(folder, number, length, (statuses or {}).get(number, "success"))
    return folder


def damage(path: Path) -> None:
    """Overwrite the middle of a video's pictures."""
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 8
    middle = begin + (len(content) - begin) // 3
    content[middle : middle + 400] = b"\xa5" * 400
    path.write_bytes(bytes(content))
