"""Frames out of MP4 files, exactly the one that is asked for, and into them. PyAV."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from xr0_engine.training.data.samples import DataError

# Files that a process keeps open: reading on in one is several times cheaper than opening it.
OPEN_FILES = 32
# Decoding this far ahead costs less than seeking back to a key frame.
READ_ON_S = 0.5
# Frames between key frames when we write: a random frame then takes 8 decoded ones on average.
KEY_FRAME_EVERY = 15


@dataclass(frozen=True)
class Clip:
    """A stretch of a video file that one view of an episode shows.

    path: MP4. start_s: time of its first frame in the file. frames: how many it has, fps apart.
    crop: (left, top, right, bottom) in pixels, right and bottom exclusive; None keeps the whole image.
    """

    path: Path
    start_s: float
    frames: int
    fps: float
    crop: tuple[int, int, int, int] | None = None

    def nearest(self, time_s: float) -> int:
        """The frame nearest in time to time_s after the clip's begin; ties go to the later frame."""
        return min(max(math.floor(time_s * self.fps + 0.5), 0), self.frames - 1)

    def read(self, frame: int) -> np.ndarray:
        """Frame number `frame` of the clip, (height, width, 3) uint8 RGB.

        Raises DataError, with file and frame, if the file lacks it or does not decode.
        """
        if not 0 <= frame < self.frames:
            raise DataError(f"{self.path}: frame {frame}: the clip has frames 0 to {self.frames - 1}")
        try:
            image = _open(self.path).at(self.start_s + frame / self.fps)
        except DataError as error:
            raise DataError(f"{self.path}: frame {frame} of the clip: {error}") from None
        return image if self.crop is None else _crop(image, self.crop, self.path)


class _Video:
    """An open file, and where in it decoding stands."""

    def __init__(self, path: Path) -> None:
        try:
            self._container = av.open(str(path))
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(f"cannot be opened as a video: {error}") from None
        if not self._container.streams.video:
            raise DataError("has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_count = 1
        # A damaged frame is an error, not a picture patched up from its neighbours.
        self._stream.codec_context.options = {"err_detect": "explode"}
        self._time_base = float(self._stream.time_base or 0)
        self._start = self._stream.start_time or 0
        rate = self._stream.average_rate
        if not rate or not self._time_base:
            raise DataError("does not tell its frame rate")
        self._tolerance_s = 0.5 / float(rate)
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._reformatter = VideoReformatter()
        self._last: av.VideoFrame | None = None
        self._image: np.ndarray | None = None

    def at(self, time_s: float) -> np.ndarray:
        """The frame within half a frame of time_s after the first."""
        try:
            frame = self._seek(time_s)
        except (av.error.FFmpegError, EOFError) as error:
            # Where decoding stands is unknown now.
            self._last, self._frames = None, iter(())
            raise DataError(f"does not decode at {time_s:.3f} s: {error}") from None
        if frame is not self._last or self._image is None:
            self._last = frame
            # One reformatter for all frames: setting one up costs more than converting a small frame.
            self._image = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
            # Callers share it.
            self._image.flags.writeable = False
        return self._image

    def _seek(self, time_s: float) -> av.VideoFrame:
        ahead_s = math.inf if self._last is None else time_s - self._time(self._last)
        if abs(ahead_s) <= self._tolerance_s and self._last is not None:
            return self._last
        if not 0 < ahead_s <= READ_ON_S:
            # Seeking lands on the key frame before; by half a frame early, so that rounding cannot pass it.
            target = self._start + int((time_s - self._tolerance_s) / self._time_base)
            self._container.seek(max(target, self._start), stream=self._stream)
            self._frames = self._container.decode(self._stream)
        for frame in self._frames:
            if frame.pts is None or self._time(frame) < time_s - self._tolerance_s:
                continue
            if frame.is_corrupt:
                self._last, self._frames = None, iter(())
                raise DataError(f"the frame at {time_s:.3f} s is damaged")
            if self._time(frame) > time_s + self._tolerance_s:
                self._last = frame
                raise DataError(f"has no frame at {time_s:.3f} s, the next is at {self._time(frame):.3f} s")
            return frame
        self._last, self._frames = None, iter(())
        raise DataError(f"ends before {time_s:.3f} s")

    def _time(self, frame: av.VideoFrame) -> float:
        return ((frame.pts or 0) - self._start) * self._time_base


@lru_cache(maxsize=OPEN_FILES)
def _open(path: Path) -> _Video:
    return _Video(path)


def _crop(image: np.ndarray, crop: tuple[int, int, int, int], path: Path) -> np.ndarray:
    left, top, right, bottom = crop
    height, width = image.shape[:2]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise DataError(f"{path}: crop_bbox {list(crop)} does not lie in the image of {width}x{height}")
    return image[top:bottom, left:right]


@contextmanager
def video_writer(path: Path, width: int, height: int, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an H.264 MP4 frame by frame: the function it gives takes (height, width, 3) uint8 RGB.

    Colour is kept at full resolution (4:4:4): in frames as small as a model's, half of it would blur small objects.
    """
    options = {"crf": "16", "preset": "veryfast", "g": str(KEY_FRAME_EVERY), "bf": "0"}
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.thread_count = 1

        def write(frame: np.ndarray) -> None:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        yield write
        container.mux(stream.encode(None))
