"""Videos and several states of a sample: what History would have given at that step of the recording."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import yaml

from tests.training import points
from tests.training.data.fixtures import encode_video, frame_number, numbered_frame, write_episode
from tests.training.data.test_lerobot_times import KEPT, PROFILE, ROWS, write
from xr0_engine.robot.embodiment import View, load_embodiment
from xr0_engine.robot.history import FrameHistory, History
from xr0_engine.training.data import augment
from xr0_engine.training.data.decoder import Decoder
from xr0_engine.training.data.kept import KEPT as KEPT_EPISODES
from xr0_engine.training.data.pictures import check_stride, nearest_frame
from xr0_engine.training.data.samples import DataError, UnfitError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.stats import compute
from xr0_engine.training.data.stream import Mixture, Stream
from xr0_engine.training.data.video import Clip
from xr0_engine.training.data.windows import Windows, prepare
from xr0_engine.types import Observation

T = 4
FOUR = FrameHistory(4, 2)
VIDEO = replace(load_embodiment("bimanual"), name="video", history=FOUR)


def numbers(sample, view) -> list[int]:
    return [frame_number(frame) for frame in sample.images[view]]


@pytest.mark.parametrize("length", [20, 3], ids=["long", "shorter than the history"])
@pytest.mark.parametrize("history", [FOUR, FrameHistory(2, 3), None], ids=str)
def test_every_tick_shows_what_the_session_s_history_gives(length, history, tmp_path):
    write_episode(tmp_path, 0, length)
    profile = replace(VIDEO, history=history)
    source = open_source(tmp_path, embodiment=profile)
    states = 4 if history else 1
    episode, windows = source.load(0), Windows(source, [0], T, state_length=states)
    session = History(history or FrameHistory(1, 1), states)
    for tick in range(length):
        images = {view.key: episode.image(view.key, tick) for view in profile.views}
        session.push(Observation(images, "Fold.", episode.motion.state(tick)))
        seen, sample = session.observe(), windows.sample(tick)
        np.testing.assert_array_equal(sample.state, seen.state)
        for view in images:
            np.testing.assert_array_equal(sample.images[view], seen.images[view])
    if history is FOUR and length == 20:
        # The example of the spec, in numbers.
        assert numbers(windows.sample(3), "ego") == [0, 0, 1, 3]
        assert numbers(windows.sample(19), "ego") == [13, 15, 17, 19]


def with_history(folder, history) -> None:
    profile = PROFILE | {"control_rate_hz": 15, "history": history}
    (folder / "one.yaml").write_text(yaml.safe_dump(profile))


def test_lerobot_s_rows_at_another_rate(tmp_path):
    """Rows at 30 Hz of a robot at 15: control steps are two rows apart, frames two steps."""
    with_history(write(tmp_path), {"frames": 4, "stride": 2})
    windows = Windows(open_source(tmp_path), [0], T, state_length=3)
    assert len(windows) == ROWS // 2
    for tick, frames in ((0, [0, 0, 0, 0]), (3, [0, 0, 2, 6]), (14, [16, 20, 24, 28])):
        sample = windows.sample(tick)
        assert numbers(sample, "base") == frames
        assert sample.state[:, 0].tolist() == frames[1:]


def test_a_history_begins_anew_behind_rows_that_were_left_out(tmp_path):
    """Rows 5 to 14 are missing: their states are unknown, so nothing reaches over them."""
    write(tmp_path, KEPT)
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump(PROFILE | {"control_rate_hz": 30, "history": {"frames": 3, "stride": 2}})
    )
    windows = Windows(open_source(tmp_path), [0], T, state_length=3)
    for tick, frames in ((4, [0, 2, 4]), (5, [15, 15, 15]), (8, [15, 16, 18]), (9, [15, 17, 19])):
        sample = windows.sample(tick)
        assert numbers(sample, "base") == frames
        assert sample.state[:, 0].tolist() == frames


def test_a_frame_that_is_missing_is_refused_in_every_video_that_shows_it(tmp_path):
    write_episode(tmp_path, 0, 20)
    shown = [number for number in range(20) if number != 9]
    times_s = [number / 30 for number in shown]
    path = tmp_path / "videos" / "0.ego.mp4"
    encode_video(path, [numbered_frame(number) for number in shown], options={"bf": "0"}, times_s=times_s)
    windows = Windows(open_source(tmp_path, embodiment=VIDEO), [0], T)
    for tick in range(20):
        if tick in (9, 11, 13, 15):
            with pytest.raises(DataError, match=r"0\.ego\.mp4: frame 9 of the clip: has no frame at 0\.300 s"):
                windows.sample(tick)
        else:
            assert numbers(windows.sample(tick), "ego")[-1] == tick


def test_frames_closer_together_than_the_recording_s_are_refused(tmp_path):
    write(tmp_path / "set")
    (tmp_path / "set" / "one.yaml").write_text(
        yaml.safe_dump(PROFILE | {"control_rate_hz": 60, "history": {"frames": 4, "stride": 1}})
    )
    said = r"set#0: recorded at 30 Hz; .*'one' have frames 1 ticks of 60 Hz apart .* a stride of at least 2"
    # The statistics show no videos: only a run may not do so.
    compute([tmp_path / "set"], T, 0.0, 1)
    with pytest.raises(DataError, match=said):
        Windows(open_source(tmp_path / "set"), [0], T)
    path = write_episode(tmp_path / "own", 0, 20)
    path.write_text(path.read_text().replace('"fps": 30.0', '"fps": 10', 1).replace('"end": 20', '"end": 7', 1))
    write_episode(tmp_path / "own", 1, 20)
    said = r"episode_000\.json: recorded at 10 Hz; .*'video' have frames 2 ticks .* stride of at least 3"
    with pytest.raises(DataError, match=said):
        Stream(Mixture((str(tmp_path / "own"),), skip_broken=True, embodiment=VIDEO, validation_fraction=0), 1, 0)
    for history in (FrameHistory(4, 3), FrameHistory(1, 1), None):
        assert len(Windows(open_source(tmp_path / "own", embodiment=replace(VIDEO, history=history)), [0, 1], T)) == 40


@pytest.mark.parametrize(
    ("fps", "complaint"),
    [(5.0, r"points#0: recorded at 5 Hz; .* stride of at least 2"), (None, "points#0: view top: fps: .*got None")],
)
def test_a_function_s_pictures_are_looked_at_when_a_run_starts(fps, complaint, monkeypatch):
    """And others than the first when they are drawn; neither is a broken sample, which a run might skip."""
    profile = replace(points.PROFILE, history=FrameHistory(4, 1))

    def slow(load, slow_ones):
        def changed(self, number):
            episode = load(self, number)
            rate = fps if number in slow_ones else profile.control_rate_hz
            return replace(episode, clips={view: Slow(clip, rate) for view, clip in episode.clips.items()})

        return changed

    data = Mixture(("tests.training.points:points",), skip_broken=True, embodiment=profile, validation_fraction=0)
    whole = points.Points.load
    for slow_ones in (range(points.EPISODES), range(1, points.EPISODES)):
        KEPT_EPISODES.clear()
        monkeypatch.setattr(points.Points, "load", slow(whole, slow_ones))
        with pytest.raises(DataError, match=complaint.replace("#0", "#[0-9]+")):
            # Of one process: a run starts where its stream does.
            list(itertools.islice(Stream(data, 8, 0, chunk_length=T), 20 if 0 not in slow_ones else 0))
    KEPT_EPISODES.clear()


@dataclass(frozen=True)
class Slow:
    """Pictures of a function's at another rate."""

    clip: object
    fps: float | None

    def __getattr__(self, name):
        return getattr(self.clip, name)


@pytest.mark.parametrize(("rate_hz", "fps"), [(30, 15), (30, 10), (50, 25), (20, 10), (60, 30)])
def test_a_frame_is_shown_for_as_many_ticks_as_any_other(rate_hz, fps):
    """Ticks in the middle between two frames take the later one, whatever floats make of their times."""
    each = rate_hz // fps
    shown = [nearest_frame(tick / rate_hz, fps, 10_000) for tick in range(3000)]
    ticks = np.arange(3000)
    np.testing.assert_array_equal(shown, (2 * ticks + each) // (2 * each))
    # A camera's 29.97 for 30 is no recording at another rate; 29 is.
    check_stride(replace(VIDEO, history=FrameHistory(4, 1)), 29.97, "here")
    with pytest.raises(UnfitError, match="here: recorded at 29 Hz"):
        check_stride(replace(VIDEO, history=FrameHistory(4, 1)), 29, "here")


@pytest.mark.parametrize("random_crop", [True, False])
def test_all_frames_of_a_video_are_augmented_alike(random_crop):
    """A video of one picture stays one, and is what the picture alone becomes; whatever is drawn."""
    rng = np.random.default_rng(0)
    frames = {view: rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for view in ("a", "b")}
    views = [View("a", "A", center_crop=0.9), View("b", "B", rotate_180=True, resize=(48, 64))]
    still = {view: np.stack([frame] * 4) for view, frame in frames.items()}
    for seed in range(6):
        alone = prepare(frames, views, np.random.default_rng(seed), random_crop)
        videos = prepare(still, views, np.random.default_rng(seed), random_crop)
        for view, image in alone.items():
            np.testing.assert_array_equal(videos[view], np.stack([image] * 4))
    moving = {"a": rng.integers(0, 256, (4, 60, 80, 3), dtype=np.uint8)}
    changed = augment.recolor_alike(moving, np.random.default_rng(1))["a"]
    factors = augment._factors(np.random.default_rng(1))
    assert factors.count(1.0) < 3
    for before, after in zip(moving["a"], changed, strict=True):
        np.testing.assert_array_equal(after, augment.recolor(before, *factors))


def test_a_video_is_decoded_in_one_go(tmp_path, monkeypatch):
    """One key frame in ten seconds, frames a second apart: each is decoded on from the one before, not from the first
    again."""
    options = {"g": "1000", "sc_threshold": "0"}
    path = encode_video(tmp_path / "v.mp4", [numbered_frame(number) for number in range(300)], options=options)
    decoded = []
    decode = Decoder._decode

    def counted(self, *arguments):
        for frame in decode(self, *arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(Decoder, "_decode", counted)
    clip = Clip(path, 0.0, 300, 30.0)
    shown = [frame_number(clip.read(frame)) for frame in range(30, 300, 30)]
    assert shown == list(range(30, 300, 30))
    assert len(decoded) == shown[-1] + 1
