"""Whatever codec, order of reading or damage: the frame of that time, or none."""

from __future__ import annotations

import av
import numpy as np
import pytest

from tests.training.data.fixtures import HEIGHT, WIDTH, encode_video, frame_number, numbered_frame, write_video
from xr0_engine.training.data import decoder
from xr0_engine.training.data.decoder import READ_ON_S, Decoder, VideoFacts
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip, probe

COUNT = 60
X265 = "log-level=none:keyint=12"
LAYOUTS = {
    "B-frames": {"options": {"bf": "3", "g": "12"}},
    "open groups, H.264": {"options": {"x264-params": "open-gop=1:bframes=3:keyint=12"}},
    "open groups, pyramid": {"options": {"x264-params": "open-gop=1:bframes=8:b-pyramid=normal:keyint=20:b-adapt=0"}},
    "gradual refresh": {"options": {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}},
    "open groups, HEVC": {"codec": "libx265", "options": {"x265-params": X265}},
    "open groups, HEVC of 10 bits": {
        "codec": "libx265",
        "pix_fmt": "yuv420p10le",
        "options": {"x265-params": X265},
    },
    "LeRobot's HEVC": {"codec": "libx265", "options": {"g": "2", "x265-params": "log-level=none"}},
    "LeRobot's AV1": {"codec": "libsvtav1", "options": {"g": "2", "crf": "30"}},
    "one key frame": {"options": {"g": "1000"}},
    "interlaced": {"options": {"x264-params": "tff=1:keyint=12"}},
}


def frames(count=COUNT):
    return [numbered_frame(number) for number in range(count)]


def rewritten(source, path, keep=lambda number: True, shift_s=0.0):
    """The stream of another file, without some of its packets, or shifted: an MP4 then hides what lies before zero."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as part:
        stream = whole.streams.video[0]
        copied = part.add_stream_from_template(stream)
        for number, packet in enumerate(whole.demux(stream)):
            if packet.dts is not None and keep(number):
                packet.pts += round(shift_s / packet.time_base)
                packet.dts += round(shift_s / packet.time_base)
                packet.stream = copied
                part.mux(packet)
    return path


def read(clip, frame):
    """Which frame comes, None if it is refused."""
    try:
        return frame_number(clip.read(frame))
    except DataError:
        return None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_frame_in_any_order(tmp_path, layout):
    path = encode_video(tmp_path / "v.mp4", frames(), **layout)
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = Clip(path, 0.0, COUNT, 30.0)
    for frame in [*np.random.default_rng(0).permutation(COUNT), *range(COUNT), *range(COUNT - 1, -1, -7)]:
        np.testing.assert_array_equal(clip.read(int(frame)), decoded[frame])
        assert frame_number(decoded[frame]) == frame


@pytest.fixture
def decoded(monkeypatch):
    """The frames that are decoded from now on, by number."""
    numbers, decode = [], Decoder._decode

    def counted(self, key, others):
        for frame in decode(self, key, others):
            numbers.append(round(self._time(frame) * 30))
            yield frame

    monkeypatch.setattr(Decoder, "_decode", counted)
    return numbers


KEYS_AT = 20
FAR = 17
"""Frames: more than READ_ON_S of them at 30 Hz, fewer than lie between two key frames."""
assert READ_ON_S * 30 < FAR < KEYS_AT


@pytest.mark.parametrize(
    ("keys", "order", "expected"),
    [
        # Seeking back to the one key frame would decode what is before again, each time more of it.
        ("one", [0, FAR, 2 * FAR, 3 * FAR], [*range(3 * FAR + 1)]),
        ("several", [0, 55], [0, *range(40, 56)]),
        ("several", [0, 20], [0, 20]),
        ("several", [20, 20 + FAR], [*range(20, 21 + FAR)]),
        ("several", [21, 21 + FAR], [*range(20, 22 + FAR)]),
    ],
    ids=["none on the way", "two on the way", "it is one", "begins at one", "behind one"],
)
def test_no_more_is_decoded_than_from_the_nearest_key_frame(keys, order, expected, tmp_path, decoded):
    every = {"one": 1000, "several": KEYS_AT}[keys]
    options = {"bf": "0", "g": str(every), "keyint_min": str(every), "sc_threshold": "0"}
    clip = Clip(encode_video(tmp_path / "v.mp4", frames(), options=options), 0.0, COUNT, 30.0)
    assert [read(clip, frame) for frame in order] == order
    assert decoded == expected


def test_a_key_frame_that_stands_a_little_late_is_one_on_the_way(tmp_path, decoded):
    times_s = [number / 30 + (0.01 if number == KEYS_AT else 0) for number in range(COUNT)]
    options = {"bf": "0", "g": str(KEYS_AT), "keyint_min": str(KEYS_AT), "sc_threshold": "0"}
    clip = Clip(encode_video(tmp_path / "v.mp4", frames(), options=options, times_s=times_s), 0.0, COUNT, 30.0)
    assert [read(clip, frame) for frame in (0, KEYS_AT)] == [0, KEYS_AT]
    assert decoded == [0, KEYS_AT]


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2", "g": "12"}], ids=["plain", "B-frames"])
def test_missing_frames_are_refused_and_the_next_is_right(tmp_path, options):
    shown = [number for number in range(40) if not 10 <= number < 13]
    times_s = [number / 30 for number in shown]
    path = encode_video(tmp_path / "v.mp4", [numbered_frame(n) for n in shown], options=options, times_s=times_s)
    clip = Clip(path, 0.0, 40, 30.0)
    order = [9, 12, 13, 10, 11, 13, 9, 39, 12, 13, 14]
    assert [read(clip, frame) for frame in order] == [9, None, 13, None, None, 13, 9, 39, None, 13, 14]
    with pytest.raises(DataError, match=r"frame 12 of the clip: has no frame at 0.400 s, the next is at 0.433 s"):
        clip.read(12)


def test_time_counts_from_the_first_frame(tmp_path):
    path = encode_video(tmp_path / "v.mp4", frames(), times_s=[3.7 + number / 30 for number in range(COUNT)])
    clip = Clip(path, 0.0, COUNT, 30.0)
    assert [read(clip, frame) for frame in (0, 59, 31)] == [0, 59, 31]


@pytest.mark.parametrize("bf", ["0", "3"])
def test_edit_list_that_hides_the_first_frames(tmp_path, bf):
    whole = encode_video(tmp_path / "whole.mp4", frames(), options={"bf": bf, "g": "30"})
    clip = Clip(rewritten(whole, tmp_path / "v.mp4", shift_s=-10 / 30), 0.0, COUNT - 10, 30.0)
    assert [read(clip, frame) for frame in (25, 0, 1, 49, 12)] == [35, 10, 11, 59, 22]


def test_frames_before_the_first_key_frame_are_refused(tmp_path):
    whole = encode_video(tmp_path / "whole.mp4", frames(), options={"bf": "0", "g": "12", "sc_threshold": "0"})
    clip = Clip(rewritten(whole, tmp_path / "v.mp4", keep=lambda number: number >= 5), 0.0, COUNT - 5, 30.0)
    found = [read(clip, frame) for frame in range(COUNT - 5)]
    late = found.index(12)
    assert found == [None] * late + list(range(12, 12 + len(found) - late))
    with pytest.raises(DataError, match=r"frame 0 of the clip: has no frame at 0.000 s: the first key frame is at 0"):
        clip.read(0)


def test_file_that_begins_with_an_open_group_is_read_from_its_key_frame_on(tmp_path):
    """The pictures before the key frame refer to what was cut off, and do not decode."""
    options = {"x264-params": "open-gop=1:bframes=3:keyint=12:b-adapt=0:scenecut=0"}
    whole = encode_video(tmp_path / "whole.mp4", frames(), options=options)
    with av.open(str(whole)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    begin = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
    key = round(packets[begin].pts * packets[begin].time_base * 30)
    assert any(packet.pts < packets[begin].pts for packet in packets[begin:])
    clip = Clip(rewritten(whole, tmp_path / "v.mp4", keep=lambda number: number >= begin), 0.0, COUNT - key, 30.0)
    assert [read(clip, frame) for frame in range(COUNT - key)] == list(range(key, COUNT))


def test_damage_spoils_only_what_depends_on_it(tmp_path):
    """A packet that HEVC's other frames refer to is lost: from there to the next group none is right."""
    whole = encode_video(tmp_path / "whole.mp4", frames(), "libx265", options={"x265-params": X265})
    clip = Clip(rewritten(whole, tmp_path / "v.mp4", keep=lambda number: number != 25), 0.0, COUNT, 30.0)
    orders = [range(COUNT), np.random.default_rng(1).permutation(COUNT).tolist()]
    found = [{frame: read(clip, frame) for frame in order} for order in orders]
    assert found[0] == found[1]
    assert {number for frame, number in found[0].items() if number is not None and number != frame} == set()
    assert [found[0][frame] for frame in (0, 20, 40, 59)] == [0, 20, 40, 59]
    assert None in found[0].values()


def test_one_wrong_byte_gives_no_wrong_picture(tmp_path):
    path = encode_video(tmp_path / "v.mp4", frames(), options={"bf": "0", "g": "12"})
    right = [Clip(path, 0.0, COUNT, 30.0).read(frame) for frame in range(COUNT)]
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content, refused = path.read_bytes(), 0
    for number, (place, size) in enumerate(packets[5:25]):
        damaged = bytearray(content)
        damaged[place + size // 2] ^= 0x5A
        copy = tmp_path / f"{number}.mp4"
        copy.write_bytes(bytes(damaged))
        for frame in range(5, 36):
            try:
                np.testing.assert_array_equal(Clip(copy, 0.0, COUNT, 30.0).read(frame), right[frame])
            except DataError:
                refused += 1
    assert refused


def test_reading_on_over_damage_finds_the_next_group(tmp_path):
    path = encode_video(tmp_path / "v.mp4", frames(), options={"bf": "0", "g": "12", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        hit = [packet for packet in container.demux(video=0) if packet.size][20]
        place, size = hit.pos, hit.size
    content = bytearray(path.read_bytes())
    content[place + 4 : place + size] = b"\xa5" * (size - 4)
    path.write_bytes(bytes(content))
    clip = Clip(path, 0.0, COUNT, 30.0)
    assert [read(clip, frame) for frame in (19, 20, 19, 22, 19, 24)] == [19, None, 19, None, 19, 24]


@pytest.mark.parametrize(
    "facts",
    [{"options": {"bf": "2", "g": "12"}}, {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime"}}],
    ids=["H.264", "VP9, which decodes parts"],
)
def test_file_that_is_cut_off_has_the_frames_before(tmp_path, facts):
    whole = encode_video(tmp_path / "whole.mp4", frames(), **facts)
    path = tmp_path / "v.mp4"
    with av.open(str(whole)) as container, av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream = container.streams.video[0]
        copied = output.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                output.mux(packet)
    with av.open(str(path)) as container:
        found = [packet for packet in container.demux(video=0) if packet.size]
        packets = [(packet.pos, round(packet.pts * packet.time_base * 30), packet.size) for packet in found]
    place = packets[40][0]
    path.write_bytes(path.read_bytes()[: place + packets[40][2] * 9 // 10])
    before = {number for _, number, _ in packets[:40]}
    clip = Clip(path, 0.0, COUNT, 30.0)
    found = [read(clip, frame) for frame in range(COUNT)]
    assert found == [frame if frame in before else None for frame in range(COUNT)]


@pytest.mark.parametrize(
    ("file_fps", "clip_fps", "frames_read", "agrees"),
    [
        pytest.param(29.97, 30, 400, True, id="apart by less than half a frame"),
        pytest.param(29.97, 30, 620, False, id="apart by more than half a frame"),
        pytest.param(60, 30, 20, False, id="twice as many"),
        pytest.param(15, 30, 20, False, id="half as many"),
        pytest.param(25, 30, 20, False, id="other"),
    ],
)
def test_rate_of_the_file_and_of_the_clip(tmp_path, file_fps, clip_fps, frames_read, agrees):
    path = write_video(tmp_path / "v.mp4", range(700), file_fps)
    clip = Clip(path, 0.0, frames_read, clip_fps)
    if agrees:
        assert [read(clip, frame) for frame in (0, 200, frames_read - 1)] == [0, 200, frames_read - 1]
    else:
        rates = rf"rate is {clip_fps} frames a second, the file's {float(file_fps):g}"
        with pytest.raises(DataError, match=rf"v.mp4: frame 0 of the clip: the clip's {rates}.*give the rate"):
            clip.read(0)


def test_rate_counts_from_the_file_s_first_frame(tmp_path):
    """A clip's start is a frame number, too: short as it is, it begins a frame too early."""
    path = write_video(tmp_path / "v.mp4", range(1000), 29.97)
    with pytest.raises(DataError, match=r"the file's 29.97"):
        Clip(path, 900 / 30, 20, 30.0).read(0)


def test_unsteady_camera_is_read_while_times_and_numbers_agree(tmp_path):
    rng = np.random.default_rng(0)
    steady = np.arange(COUNT) / 30
    times_s = steady + np.r_[0, rng.uniform(-0.3, 0.3, COUNT - 1)] / 30
    clip = Clip(encode_video(tmp_path / "v.mp4", frames(), times_s=times_s), 0.0, COUNT, 30.0)
    assert [read(clip, frame) for frame in range(COUNT)] == list(range(COUNT))
    slower = steady * 1.02
    for name, unsteady_s in (("late", slower + np.eye(COUNT)[3] * 0.3 / 30), ("all", times_s * 1.02)):
        path = encode_video(tmp_path / f"{name}.mp4", frames(), times_s=unsteady_s)
        with pytest.raises(DataError, match="rate is 30 frames a second, the file's 29"):
            Clip(path, 0.0, COUNT, 30.0).read(0)


def test_file_without_an_index_goes_by_its_average_rate(tmp_path):
    path = encode_video(tmp_path / "v.mkv", frames())
    assert [read(Clip(path, 0.0, COUNT, 30.0), frame) for frame in (59, 3)] == [59, 3]
    with pytest.raises(DataError, match=r"rate is 25 frames a second, the file's 30"):
        Clip(path, 0.0, COUNT, 25.0).read(0)


def test_probe(tmp_path):
    path = encode_video(tmp_path / "v.mp4", frames(), times_s=[1.5 + number / 30 for number in range(COUNT)])
    facts = probe(path)
    assert (facts.frames, facts.start_s) == (COUNT, 1.5)
    assert (facts.rate_hz, facts.duration_s) == pytest.approx((30, 2), rel=1e-6)
    gap = [number / 30 for number in range(COUNT + 20) if not 30 <= number < 50]
    assert probe(encode_video(tmp_path / "gap.mp4", frames(), times_s=gap, options={"bf": "0"})) == VideoFacts(
        rate_hz=pytest.approx(59 / (79 / 30)), start_s=0, frames=COUNT, duration_s=pytest.approx(80 / 30)
    )
    with pytest.raises(DataError, match=r"none.mp4: cannot be opened"):
        probe(tmp_path / "none.mp4")


def test_file_of_two_videos_is_refused(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=30) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height = 64, 48
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode(None))
    with pytest.raises(DataError, match="expected one video stream, got 2: keep"):
        Clip(path, 0.0, 1, 30.0).read(0)


def test_size_of_frames_is_limited_before_any_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", range(3))
    monkeypatch.setattr(decoder, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    complaint = f"expected frames of at most {HEIGHT * WIDTH - 1} pixels, got {WIDTH} x {HEIGHT}: scale them down"
    with pytest.raises(DataError, match=complaint):
        Clip(path, 0.0, 3, 30.0).read(0)


@pytest.mark.parametrize("room", [2, 4], ids=["too large", "large enough"])
def test_frames_that_grow_on_the_way_are_limited_too(tmp_path, monkeypatch, room):
    times_s = np.arange(30) / 25
    pieces = [
        encode_video(tmp_path / f"{side}.ts", [np.full((side, side, 3), 200, np.uint8)] * 30, times_s=times_s + begin_s)
        for side, begin_s in ((64, 0.0), (128, 1.2))
    ]
    path = tmp_path / "v.ts"
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    monkeypatch.setattr(decoder, "MAX_PIXELS", room * 64 * 64)
    clip = Clip(path, 0.0, 60, 25.0)
    assert clip.read(0).shape == (64, 64, 3)
    if room == 4:
        assert clip.read(40).shape == (128, 128, 3)
    else:
        with pytest.raises(DataError, match="does not decode at"):
            clip.read(40)
