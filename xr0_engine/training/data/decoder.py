"""An open video file, and exactly the frame at a time in it, whatever was read before. PyAV."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from xr0_engine.files import pointer_fault
from xr0_engine.training.data.frames import to_rgb
from xr0_engine.training.data.samples import DataError

# Pixels of a frame, 4096 x 4096: a decoder keeps up to 16 of them.
MAX_PIXELS = 1 << 24
# Decoding this far ahead costs less than seeking back to a key frame.
READ_ON_S = 0.5
# A frame is taken for a number if it is no farther than this from where the number lies, in frames.
HALF_A_FRAME = 0.5
# Frames over which a file's rate is measured: few, so that most spans are free of gaps. As far off it is another rate.
RATE_SPAN, RATE_TOLERANCE = 4, 0.1
# Steps between frames that are this near to whole numbers leave no doubt how many frames are missing.
STEADY_STEP = 0.25
# Of how far a frame is off, this much is taken for drift: enough to follow any rate within RATE_TOLERANCE.
DRIFT_GAIN = 0.5


@dataclass(frozen=True)
class VideoFacts:
    """What a file tells of its frames without decoding.

    rate_hz: frames a second, on average. start_s: time of the first frame by the file's own clock; clips count from it.
    frames: how many, None where only decoding would tell (fragmented MP4, files that are no MP4). duration_s: from the
    first frame to the end of the last; None where the file does not tell.
    """

    rate_hz: float
    start_s: float
    frames: int | None
    duration_s: float | None


class _Fault(Exception):
    """Decoding stops: at which time stamp, None if that is unknown."""

    def __init__(self, pts: int | None, reason: str) -> None:
        super().__init__(reason)
        self.pts = pts


class Decoder:
    """An open file, and where in it decoding stands. For one thread at a time. Raises DataError without the path."""

    def __init__(self, path: Path) -> None:
        try:
            self._container = av.open(str(path), metadata_errors="replace")
        except (av.error.FFmpegError, OSError) as error:
            reason = pointer_fault(path) if path.is_file() else None
            raise DataError(reason or f"cannot be opened as a video: {error}") from None
        # The picture of a cover is a stream too.
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise DataError("has no video stream")
        if len(streams) > 1:
            raise DataError(f"expected one video stream, got {len(streams)}: keep the one that is meant")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            raise DataError("has a video stream that PyAV has no decoder for: encode it as H.264")
        self._stream.thread_count = 1
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise DataError(f"expected frames of at most {MAX_PIXELS} pixels, got {width} x {height}: scale them down")
        # A damaged frame is an error, not a picture patched up from its neighbours; frames may grow on the way.
        self._stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
        self._time_base = float(self._stream.time_base or 0)
        self._start = self._stream.start_time or 0
        if not self._time_base or not self._stream.average_rate:
            raise DataError("does not tell its frame rate")
        self._times_s: np.ndarray | None
        self._keys_s: np.ndarray | None
        self._times_s, self._keys_s = self._indexed_times()
        self._numbered_until: dict[float, float] = {}
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._last: av.VideoFrame | None = None
        self._reformatter = VideoReformatter()
        self._shown: tuple[av.VideoFrame, np.ndarray] | None = None

    def close(self) -> None:
        self._frames, self._last, self._shown = iter(()), None, None
        self._container.close()

    def facts(self) -> VideoFacts:
        start_s = self._start * self._time_base
        if self._times_s is None or len(self._times_s) < 2:
            count = None if self._times_s is None else len(self._times_s)
            duration = self._stream.duration
            duration_s = None if duration is None else duration * self._time_base
            return VideoFacts(float(self._stream.average_rate or 0), start_s, count, duration_s)
        count, span_s = len(self._times_s), float(self._times_s[-1])
        # The last frame is shown as long as most are.
        duration_s = span_s + float(np.median(np.diff(self._times_s)))
        return VideoFacts((count - 1) / span_s if span_s else math.inf, start_s, count, duration_s)

    def check_rate(self, fps: float, until_s: float) -> None:
        """Raises DataError unless the file's frames come at fps, so that numbers and times name the same frames.

        until_s: how far from the file's first frame on. Frames may be missing.
        """
        if fps not in self._numbered_until:
            self._numbered_until[fps] = self._numbers_hold_until(fps)
        agreed_s = self._numbered_until[fps]
        if until_s > agreed_s:
            raise DataError(
                f"the clip's rate is {fps:g} frames a second, the file's {self.facts().rate_hz:.6g} on average: after "
                f"{agreed_s:.2f} s a frame's time and its number are more than half a frame apart: give the rate that "
                f"the file has, or encode it again at a constant {fps:g}"
            )

    def at(self, time_s: float, tolerance_s: float) -> np.ndarray:
        """The frame within the tolerance of a time after the first frame, as to_rgb gives it. Raises DataError."""
        try:
            frame = self._find(time_s, tolerance_s)
        except (av.error.FFmpegError, EOFError, _Fault) as error:
            # Where decoding stands is unknown now.
            self._last, self._frames = None, iter(())
            raise DataError(f"does not decode at {time_s:.3f} s: {error}") from None
        if self._shown is None or self._shown[0] is not frame:
            self._shown = frame, to_rgb(frame, self._reformatter)
        return self._shown[1]

    def _find(self, time_s: float, tolerance_s: float) -> av.VideoFrame:
        if self._last is not None:
            ahead_s = time_s - self._time(self._last)
            if abs(ahead_s) <= tolerance_s:
                return self._last
            # The frame itself may be a key frame, and stand a little late.
            latest_s = time_s + tolerance_s
            if ahead_s > 0 and (ahead_s <= READ_ON_S or not self._key_after(self._time(self._last), latest_s)):
                try:
                    return self._read_on(time_s, tolerance_s, passed=True)
                except _Fault:
                    # The damage may be another group's.
                    self._last = None
        return self._read_from_key_frame(time_s, tolerance_s)

    def _key_after(self, begin_s: float, end_s: float) -> bool:
        """Whether seeking to end_s may spare decoding, from begin_s on, what lies between: not without a key frame
        there, when each frame of a video in turn would be decoded from the one before them all."""
        return self._keys_s is None or bool(((self._keys_s > begin_s) & (self._keys_s <= end_s)).any())

    def _read_from_key_frame(self, time_s: float, tolerance_s: float) -> av.VideoFrame:
        """The frame, by decoding from the nearest key frame from which it comes out rightly.

        Frames that are shown before the key frame that they are stored behind, as in open groups of pictures, need the
        group before too; a gradual refresh shows nothing until it is through.
        """
        # The frame itself may be a key frame, and stand a little late.
        target = max(self._start + math.floor((time_s + tolerance_s) / self._time_base), self._start)
        second = round(1 / self._time_base)
        # Frames are decoded before they are shown, but not by as much as this.
        lowest = self._start - second
        step, reached, first_s = 1, math.inf, math.inf
        fault: _Fault | None = None
        while True:
            key = self._begin(target)
            order = math.inf if key is None else self._order(key)
            if key is not None and order < reached:
                first_s = self._seconds(key.pts)
            if key is not None and order < reached and first_s <= time_s + tolerance_s:
                try:
                    return self._read_on(time_s, tolerance_s, passed=False)
                except _TooLate:
                    pass
                except _Fault as error:
                    # Decoded from farther back as well, it is damage.
                    if fault is not None and fault.pts == error.pts:
                        raise
                    fault = error
            if target < lowest:
                break
            reached = min(order, reached)
            target = int(min(target, reached)) - step
            step = max(2 * step, second // 4)
        if fault is not None:
            raise fault
        raise DataError(f"has no frame at {time_s:.3f} s: the first key frame is at {first_s:.3f} s")

    def _read_on(self, time_s: float, tolerance_s: float, passed: bool) -> av.VideoFrame:
        """passed: whether a frame before the wanted one was decoded, without which nothing tells that it is missing."""
        for frame in self._frames:
            self._last = frame
            if self._time(frame) < time_s - tolerance_s:
                passed = True
            elif self._time(frame) <= time_s + tolerance_s:
                return frame
            elif passed:
                raise DataError(f"has no frame at {time_s:.3f} s, the next is at {self._time(frame):.3f} s")
            else:
                raise _TooLate
        if passed:
            raise DataError(f"ends before {time_s:.3f} s")
        raise _TooLate

    def _begin(self, target: int) -> av.Packet[av.VideoStream] | None:
        """Stand at the last key frame at or before a time stamp, and return its packet; None if there is none."""
        self._last = None
        try:
            self._container.seek(target, stream=self._stream)
        except av.error.FFmpegError:
            return None
        packets = self._container.demux(self._stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts is not None:
                self._frames = self._decode(packet, packets)
                return packet
        return None

    def _decode(
        self, key: av.Packet[av.VideoStream], others: Iterable[av.Packet[av.VideoStream]]
    ) -> Iterator[av.VideoFrame]:
        """Whole frames from a key frame on, in order of time. Raises _Fault at the first damage."""
        assert key.pts is not None
        decoded = False
        for packet in chain([key], others):
            fault: _Fault | None = None
            try:
                if packet.is_corrupt:
                    raise _Fault(packet.pts, "the file is cut off or damaged there")
                frames = packet.decode()
            except (av.error.FFmpegError, EOFError, _Fault) as error:
                if packet.pts is not None and packet.pts < key.pts:
                    # It refers to pictures before the key frame; nothing behind the key frame refers to it.
                    continue
                fault = _Fault(packet.pts, str(error))
                frames = self._undecoded(packet)
            for frame in frames:
                if frame.pts is None or frame.pts < key.pts:
                    continue
                if not frame.is_corrupt:
                    decoded = True
                    yield frame
                elif decoded:
                    raise _Fault(frame.pts, "the frame is damaged")
            if fault is not None:
                raise fault

    def _undecoded(self, damaged: av.Packet[av.VideoStream]) -> list[av.VideoFrame]:
        """The whole frames that the decoder still held when it came to a damaged one."""
        try:
            frames = self._stream.codec_context.decode(None)
        except (av.error.FFmpegError, EOFError):
            return []
        return [frame for frame in frames if frame.pts != damaged.pts and not frame.is_corrupt]

    def _indexed_times(self) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """(N,) s after the first, when each frame is decoded, which is when frames are shown up to a constant; the same
        of the key frames alone.

        None where the file's header does not list all of its frames.
        """
        if "mp4" not in self._container.format.name or not self._stream.frames:
            return None, None
        entries = [entry for entry in self._stream.index_entries if not entry.is_discard]
        if not entries:
            return None, None
        stamps = np.array([entry.timestamp for entry in entries], np.float64)
        times_s = (stamps - stamps[0]) * self._time_base
        return times_s, times_s[[entry.is_keyframe for entry in entries]]

    def _numbers_hold_until(self, fps: float) -> float:
        """Up to what time, in s after the first frame, number n is of the frame nearest to n / fps. Gaps count too."""
        if self._times_s is None:
            # base_rate: without the gaps.
            rates = [float(rate) for rate in (self._stream.average_rate, self._stream.base_rate) if rate]
            apart = min(abs(rate - fps) for rate in rates)
            return HALF_A_FRAME / apart if apart else math.inf
        places = self._times_s * fps
        span = min(RATE_SPAN, len(places) - 1)
        if span and abs(np.median(places[span:] - places[:-span]) / span - 1) > RATE_TOLERANCE:
            return 0.0
        apart_at = np.flatnonzero(np.abs(places - _numbers(places)) > HALF_A_FRAME)
        return float(self._times_s[apart_at[0]]) if len(apart_at) else math.inf

    def _time(self, frame: av.VideoFrame) -> float:
        return self._seconds(frame.pts)

    def _seconds(self, pts: int | None) -> float:
        return ((pts or 0) - self._start) * self._time_base

    @staticmethod
    def _order(packet: av.Packet[av.VideoStream]) -> float:
        """Where a packet is stored among the others."""
        stamp = packet.pts if packet.dts is None else packet.dts
        return math.inf if stamp is None else stamp


class _TooLate(Exception):
    """Decoding began behind the wanted frame, or too near before it to know."""


def _numbers(places: np.ndarray) -> np.ndarray:
    """(N,) the number of each frame, those counted that are missing. places: (N,) time times rate, 0 at the first."""
    steps = np.diff(places)
    if len(steps) == 0 or np.abs(steps - np.rint(steps)).max() < STEADY_STEP:
        return np.r_[0, np.cumsum(np.maximum(np.rint(steps), 1))]
    # The next number is counted from where the last frames should have been: one early frame is no gap behind it.
    numbers, number, drift = [0.0], 0.0, 0.0
    for place in places[1:].tolist():
        number += max(round(place - number - drift), 1)
        drift += DRIFT_GAIN * (place - number - drift)
        numbers.append(number)
    return np.array(numbers)
