"""Which pictures belong to an episode's rows: by the file's clock, the ones at from_timestamp + timestamp."""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from xr0_engine.training.data.decoder import VideoFacts
from xr0_engine.training.data.lerobot_meta import INFO_FILE, Span
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip, probe

# Video files whose facts a process keeps.
KNOWN_FILES = 1024
# Of a frame: closer than that, two times are of the same one.
HALF_A_FRAME = 0.5
# Pictures that a video may have behind the last row's: a camera that is stopped late gives one. Were it a row that is
# missing instead, the rows behind it would be one frame off; more would hide what rows were left out.
EXTRA_FRAMES = 1
REMEDY = "cut the video to the rows, or give the rows the frame_index and timestamp of their pictures"

log = logging.getLogger("xr0_engine.data")


def clip_of(span: Span, frames: np.ndarray, fps: float, alone: bool) -> Clip:
    """The clip from the first row's picture to the last one's. frames: (N,) int64, rising, which frame each row is of.

    alone: the file holds no other episode's pictures. Raises DataError that names the file if it, its span and the rows
    are not of one length, give or take EXTRA_FRAMES at the end, or begin at different times: rows were left out then,
    or numbered anew. A file that is missing is told of when it is read.
    """
    first, last = int(frames[0]), int(frames[-1])
    start_s = span.start_s + first / fps
    if span.end_s is not None:
        length = _frames(span.end_s - span.start_s, fps)
        if not 0 <= length - (last + 1) <= EXTRA_FRAMES:
            raise DataError(
                f"{span.path}: from_timestamp {span.start_s:.6g} and to_timestamp {span.end_s:.6g} are {length} frames "
                f"apart at {fps:g} Hz, the rows' last frame is number {last}: {REMEDY}"
            )
        if length > last + 1:
            _tell_of_extra(span.path.parent)
    if span.path.is_file():
        facts = _facts(span.path)
        _check_end(span, facts, last, fps, alone)
        start_s -= facts.start_s
        if start_s < -HALF_A_FRAME / fps:
            raise DataError(
                f"{span.path}: begins at {facts.start_s:.6g} s, the first row is at {start_s + facts.start_s:.6g} s: "
                f"{REMEDY}"
            )
    return Clip(span.path, max(start_s, 0.0), last - first + 1, fps)


def _check_end(span: Span, facts: VideoFacts, last: int, fps: float, alone: bool) -> None:
    if facts.duration_s is None or not facts.frames:
        return
    end = _frames(facts.start_s + facts.duration_s - span.start_s, fps)
    extra = end - (last + 1)
    if extra >= 0 and not (alone and extra > EXTRA_FRAMES):
        if alone and extra:
            _tell_of_extra(span.path.parent)
        return
    file_end_s, rows_end_s = facts.start_s + facts.duration_s, span.start_s + (last + 1) / fps
    raise DataError(
        f"{span.path}: its {facts.frames} frames at {facts.rate_hz:.6g} Hz end at {file_end_s:.6g} s, the rows at "
        f"{rows_end_s:.6g} s (frame {last} at the fps {fps:g} of {INFO_FILE}): {REMEDY}"
    )


@cache
def _tell_of_extra(folder: Path) -> None:
    """Once for each folder of videos."""
    log.warning(
        "%s: has videos that are a frame longer than their rows: taken for a last frame without a row; if a row was "
        "left out instead and the others were numbered anew, the pictures behind it are one frame early",
        folder,
    )


def _frames(time_s: float, fps: float) -> int:
    return int(np.floor(time_s * fps + HALF_A_FRAME))


def _facts(path: Path) -> VideoFacts:
    stat = path.stat()
    return _probe(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=KNOWN_FILES)
def _probe(path: Path, size: int, changed_ns: int) -> VideoFacts:
    """A file that was replaced is another file."""
    return probe(path)
