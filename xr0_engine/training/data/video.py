"""Frames out of MP4 files, exactly the one that is asked for, and into them. PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from xr0_engine.training.data.decoder import Decoder, VideoFacts
from xr0_engine.training.data.open_videos import POOL
from xr0_engine.training.data.pictures import nearest_frame
from xr0_engine.training.data.samples import DataError

# Frames between key frames when we write: a random frame then takes 8 decoded ones on average.
KEY_FRAME_EVERY = 15


@dataclass(frozen=True)
class Clip:
    """A stretch of a video file that one view of an episode shows.

    path: MP4. start_s: time of its first frame after the file's first. frames: how many it has, fps apart.
    crop: (left, top, right, bottom) in pixels of the displayed picture, right and bottom exclusive; None keeps all.
    """

    path: Path
    start_s: float
    frames: int
    fps: float
    crop: tuple[int, int, int, int] | None = None

    def nearest(self, time_s: float) -> int:
        """The frame nearest in time to time_s after the clip's begin; ties go to the later frame."""
        return nearest_frame(time_s, self.fps, self.frames)

    def read(self, frame: int) -> np.ndarray:
        """Frame number `frame` of the clip, (height, width, 3) uint8 RGB.

        Raises DataError, with file and frame, if the file lacks it, does not decode, or does not go at the clip's fps
        from its first frame to the clip's end: numbers and times then name different frames.
        """
        if not 0 <= frame < self.frames:
            raise DataError(f"{self.path}: frame {frame}: the clip has frames 0 to {self.frames - 1}")
        try:
            image = POOL.frame(
                self.path, self.start_s + frame / self.fps, self.fps, self.start_s + (self.frames - 1) / self.fps
            )
        except DataError as error:
            raise DataError(f"{self.path}: frame {frame} of the clip: {error}") from None
        return image if self.crop is None else _crop(image, self.crop, self.path)


def probe(path: Path) -> VideoFacts:
    """What a video file tells of its rate and length without decoding a frame. Raises DataError."""
    try:
        decoder = Decoder(path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    try:
        return decoder.facts()
    finally:
        decoder.close()


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
