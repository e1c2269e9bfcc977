"""Windows and the stream over them: deterministic, sharded, resumable, by weight."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.training.data.fixtures import INSTRUCTION, damage, frame_number, write_dataset, write_episode, write_video
from xr0_engine.training.data.episode import load_episode, save_episode
from xr0_engine.training.data.order import CYCLE, shuffled
from xr0_engine.training.data.samples import DataError, LanguageSample, RobotSample
from xr0_engine.training.data.sources import open_source, split
from xr0_engine.training.data.stream import Mixture, Stream, training_windows, validation_samples
from xr0_engine.training.data.video import Clip, video_writer
from xr0_engine.training.data.windows import Windows

T = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("robot"), (12, 7, 9, 4), {1: "invalid"})


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    Image.new("RGB", (9, 7), (1, 2, 3)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}]
    lines = [json.dumps({"images": ["a.png"], "conversations": turns}) for _ in range(5)]
    (folder / "vl.jsonl").write_text("\n".join(lines))
    return folder / "vl.jsonl"


def everything(folder, **settings) -> Mixture:
    return Mixture((str(folder),), **{"validation_fraction": 0.0, **settings})


def fingerprint(batch) -> list[tuple]:
    return [
        (sample.source, sample.instruction, sample.actions.tobytes(), *(i.tobytes() for i in sample.images.values()))
        for sample in batch
    ]


def take(stream, count) -> list[list[tuple]]:
    return [fingerprint(batch) for batch in itertools.islice(stream, count)]


def test_window_is_an_observation_and_what_follows(folder):
    windows = Windows(open_source(folder), [0, 2], T)
    assert len(windows) == 12 + 9
    sample = windows.sample(12 + 6)
    episode = windows.source.load(2)
    assert sample.source.endswith("episode_002.json:6")
    assert (sample.robot_type, sample.instruction) == ("bimanual", INSTRUCTION)
    assert {view: frame_number(image) for view, image in sample.images.items()} == {
        "ego": 6,
        "left_wrist": 6,
        "right_wrist": 6,
    }
    np.testing.assert_array_equal(sample.state, episode.motion.state(6))
    # Three of nine steps are left.
    assert sample.mask.sum(axis=1).tolist() == [26, 26, 26, 0, 0]
    np.testing.assert_array_equal(sample.actions[:3], episode.motion.actions(6, 3).astype(np.float32))
    assert not sample.actions[~sample.mask].any()


def test_every_window_is_there_once(folder):
    windows = Windows(open_source(folder), range(4), T)
    sources = [windows.sample(index).source.rpartition("/")[2] for index in range(len(windows))]
    assert sources == [f"episode_{n:03d}.json:{t}" for n, ticks in ((0, 12), (2, 9), (3, 4)) for t in range(ticks)]


def test_invalid_episode_is_never_supervised(folder):
    windows = training_windows(everything(folder), T)[0]
    assert windows.episodes == (0, 2, 3)
    batches = itertools.islice(Stream(everything(folder), 5, 0, chunk_length=T, augment=False), 10)
    assert not [sample.source for batch in batches for sample in batch if "episode_001" in sample.source]


def test_same_arguments_same_batches(folder):
    first, second = (Stream(everything(folder), 4, seed=3, chunk_length=T) for _ in range(2))
    assert take(first, 8) == take(second, 8)


def test_seed_changes_order_and_augmentation(folder):
    first, second = (Stream(everything(folder), 25, seed, chunk_length=T) for seed in (0, 1))
    a, b = take(first, 1)[0], take(second, 1)[0]
    assert [row[0] for row in a] != [row[0] for row in b]
    assert sorted(a) != sorted(b)


def test_an_epoch_has_every_window_once(folder):
    stream = Stream(everything(folder), 25, seed=0, chunk_length=T, augment=False)
    epochs = [[sample.source for sample in batch] for batch in itertools.islice(stream, 3)]
    assert [len(set(epoch)) for epoch in epochs] == [25, 25, 25]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_single_process_s_samples(folder, world_size):
    alone = Stream(everything(folder), 6 * world_size, 0, chunk_length=T)
    shares = [Stream(everything(folder), 6, 0, rank, world_size, chunk_length=T) for rank in range(world_size)]
    for _ in range(3):
        assert [row for share in shares for row in take(share, 1)[0]] == take(alone, 1)[0]


def test_resumes_exactly_with_any_number_of_workers(folder):
    whole = take(Stream(everything(folder), 4, 0, chunk_length=T), 9)
    stream = Stream(everything(folder), 4, 0, workers=1, chunk_length=T)
    assert take(stream, 4) == whole[:4]
    # Workers have read ahead; what counts is what was handed over.
    state = json.loads(json.dumps(stream.state_dict()))
    stream.close()
    resumed = Stream(everything(folder), 4, 0, workers=0, chunk_length=T)
    resumed.load_state_dict(state)
    assert take(resumed, 5) == whole[4:]


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 5}, {"chunk_length": 6}], ids=str)
def test_state_of_another_stream_is_refused(folder, change):
    arguments = {"mixture": everything(folder), "batch_size": 4, "seed": 0, "chunk_length": T}
    state = Stream(**arguments).state_dict()
    with pytest.raises(ValueError, match="the state is of other datasets"):
        Stream(**(arguments | change)).load_state_dict(state)


def test_mixture_by_weight(folder, tmp_path):
    other = write_dataset(tmp_path / "other", (30,))
    mixture = Mixture((f"{folder}=3", str(other)), validation_fraction=0.0)
    stream = Stream(mixture, 1, 0, chunk_length=T)
    turns = Counter(stream._reader.robot._turns.tolist())
    assert turns == {0: CYCLE * 3 // 4, 1: CYCLE // 4}
    counts = Counter(str(other) in sample.source for batch in itertools.islice(stream, 80) for sample in batch)
    # 20 are expected; five standard deviations of 80 draws are 19.
    assert 1 <= counts[True] <= 39


def test_language_takes_every_seventh_batch(folder, language):
    mixture = everything(folder, language=(str(language),), language_every=7)
    kinds = [{type(sample) for sample in batch} for batch in itertools.islice(Stream(mixture, 2, 0), 21)]
    assert kinds == ([{RobotSample}] * 6 + [{LanguageSample}]) * 3
    alone = take(Stream(everything(folder), 2, 0, chunk_length=T), 12)
    stream = Stream(mixture, 2, 0, chunk_length=T)
    robot = [fingerprint(batch) for batch in itertools.islice(stream, 14) if isinstance(batch[0], RobotSample)]
    # Co-training leaves the robot's own order as it is.
    assert robot == alone


@pytest.fixture
def broken(tmp_path):
    write_dataset(tmp_path, (10, 10))
    damage(tmp_path / "videos" / "1.left_wrist.mp4")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_frame_stops_the_stream_and_names_itself(broken, workers):
    stream = Stream(everything(broken), 20, 0, workers=workers, chunk_length=T)
    with pytest.raises(DataError, match=r"1.left_wrist.mp4: frame \d of the clip"):
        next(stream)
    # Its place is still before the batch that failed.
    assert stream.state_dict()["batches"] == 0
    stream.close()


def test_corrupt_frames_are_skipped_and_counted_if_told(broken):
    first, second = (Stream(everything(broken, skip_broken=True), 20, 0, chunk_length=T) for _ in range(2))
    batches = take(first, 2)
    assert first.skipped > 0
    assert [len(batch) for batch in batches] == [20, 20]
    assert take(second, 2) == batches
    resumed = Stream(everything(broken, skip_broken=True), 20, 0, chunk_length=T)
    resumed.load_state_dict(first.state_dict())
    assert resumed.skipped == first.skipped


@pytest.fixture
def mixed(tmp_path):
    """Whole episodes beside one that is no JSON, one without a task, and one whose video is gone."""
    write_dataset(tmp_path, (9, 8, 7, 9, 8))
    (tmp_path / "episode_001.json").write_text("{")
    no_task = tmp_path / "episode_002.json"
    no_task.write_text(no_task.read_text().replace(INSTRUCTION, " <image> "))
    (tmp_path / "videos" / "3.ego.mp4").unlink()
    return tmp_path


def test_whatever_is_broken_in_a_dataset_is_done_without_if_told(mixed, caplog):
    stream = Stream(everything(mixed, skip_broken=True), 20, 0, chunk_length=T)
    sources = {sample.source.split(":")[0] for batch in (next(stream) for _ in range(3)) for sample in batch}
    assert {source.rpartition("/")[2] for source in sources} == {"episode_000.json", "episode_004.json"}
    assert "episode_001.json" in caplog.text


def test_validation_does_without_what_is_broken_if_told(mixed):
    for_validation = Mixture((str(mixed),), validation=(str(mixed),), skip_broken=True)
    assert {sample.source.split("episode_")[1][:3] for sample in validation_samples(for_validation, T, 50)} == {
        "000",
        "004",
    }
    with pytest.raises(DataError, match=r"episode_001\.json"):
        list(validation_samples(Mixture((str(mixed),), validation=(str(mixed),)), T, 50))


@pytest.mark.parametrize("text", ["", "Pick <|object_ref_start|>cup<|object_ref_end|>."])
def test_an_episode_without_plain_words_stops_the_stream_and_names_itself(tmp_path, text):
    path = write_episode(tmp_path, 0, 9)
    path.write_text(path.read_text().replace(INSTRUCTION, text))
    with pytest.raises(DataError, match=r"episode_000\.json: .*(task|instruction)"):
        next(Stream(everything(tmp_path), 9, 0, chunk_length=T))


def test_a_picture_too_narrow_for_the_model_is_broken(tmp_path):
    path = write_episode(tmp_path, 0, 9)
    raw = json.loads(path.read_text())
    raw["observations"]["ego"][0]["crop_bbox"] = [0, 0, 201, 1]
    path.write_text(json.dumps(raw))
    with video_writer(tmp_path / "videos" / "0.ego.mp4", 202, 2, 30) as write:
        for _ in range(9):
            write(np.zeros((2, 202, 3), np.uint8))
    with pytest.raises(DataError, match=r"0.ego.mp4: height 1, width 201: the aspect ratio is above 200"):
        next(Stream(everything(tmp_path), 9, 0, chunk_length=T))


def test_video_shorter_than_its_json(tmp_path):
    write_episode(tmp_path, 0, 9, video_length=6)
    stream = Stream(everything(tmp_path), 9, 0, chunk_length=T)
    with pytest.raises(DataError, match=r"videos/0.ego.mp4: frame [678] of the clip: ends before"):
        next(stream)


def test_validation_is_held_out_whole_and_not_augmented(folder):
    mixture = Mixture((str(folder),), validation_fraction=0.25)
    samples = list(validation_samples(mixture, T, 6))
    held_out = {sample.source.rpartition(":")[0] for sample in samples}
    stream = Stream(mixture, 10, 0, chunk_length=T)
    trained = {sample.source.rpartition(":")[0] for batch in itertools.islice(stream, 6) for sample in batch}
    assert len(held_out) == 1
    assert not held_out & trained
    assert [frame_number(s.images["ego"]) for s in samples] == [int(s.source.rpartition(":")[2]) for s in samples]


def test_validation_reads_the_videos_of_the_batch_that_is_being_made(tmp_path):
    """Without workers the trainer makes the next batch in a thread while it validates, out of the same files."""
    video, length = write_video(tmp_path / "all.mp4", range(160)), 40
    for number in range(4):
        path = write_episode(tmp_path / "set", number, length)
        clip = Clip(video, number * length / 30, length, 30.0)
        episode = load_episode(path)
        save_episode(path, replace(episode, clips=dict.fromkeys(episode.clips, clip)))
    mixture = everything(tmp_path / "set", validation_fraction=0.5)
    batches = take(Stream(mixture, 4, 0, chunk_length=T), 12)
    held_out = fingerprint(validation_samples(mixture, T, 24))
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(take, Stream(mixture, 4, 0, chunk_length=T), 12)
        validated = [fingerprint(validation_samples(mixture, T, 24)) for _ in range(2)]
        assert made.result() == batches
    assert validated == [held_out] * 2


def test_own_validation_datasets_hold_nothing_out(folder, tmp_path):
    other = write_dataset(tmp_path / "v", (6,))
    mixture = Mixture((str(folder),), validation=(str(other),))
    assert sum(map(len, training_windows(mixture, T))) == 25
    assert {sample.source.rpartition("/")[0] for sample in validation_samples(mixture, T, 100)} == {str(other)}


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(60, 0.1, 6), (3, 0.1, 1), (1, 0.5, 0), (9, 0, 0)], ids=str
)
def test_split(count, fraction, held_out):
    here, elsewhere = (
        SimpleNamespace(
            names=[f"/{place}/episode_{n}.json" for n in range(count + 1)], statuses=["success"] * count + ["invalid"]
        )
        for place in ("here", "elsewhere")
    )
    train, validation = split(here, fraction)
    assert (len(validation), sorted(train + validation)) == (held_out, list(range(count)))
    assert split(elsewhere, fraction) == (train, validation)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4096])
def test_shuffled_is_a_permutation(size):
    orders = [[shuffled(position, size, (0, epoch)) for position in range(size)] for epoch in range(2)]
    assert [sorted(order) for order in orders] == [list(range(size))] * 2
    if size >= 1000:
        assert orders[0] != orders[1]
        # Neighbours end up apart: a uniform order has a mean distance of a third of the size.
        assert np.abs(np.diff(orders[0])).mean() == pytest.approx(size / 3, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"robot": ()}, "robot: expected at least one"),
        ({"language": ("a",)}, "expected both or neither"),
        ({"language_every": 7}, "expected both or neither"),
        ({"language": ("a",), "language_every": 1}, "0 or at least 2"),
    ],
    ids=["no robot", "language without ratio", "ratio without language", "language only"],
)
def test_mixture_that_makes_no_sense(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Mixture(**{"robot": ("x",), **settings})


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "much", "inf"])
def test_wrong_weight(folder, weight):
    with pytest.raises(ValueError, match="expected path or path=weight"):
        Stream(Mixture((f"{folder}={weight}",)), 1, 0)


def test_dataset_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: expected a dataset's folder"):
        Stream(everything(tmp_path / "nowhere"), 1, 0)
    with pytest.raises(DataError, match="holds no episode file"):
        Stream(everything(tmp_path), 1, 0)


@pytest.mark.parametrize(
    ("description", "complaint"),
    [("robot_type: libero_all", "got 'libero' of 'plain'"), ("views: {ego: a}", "are for LeRobot datasets")],
    ids=["one arm", "views"],
)
def test_description_that_does_not_fit_episode_files(tmp_path, description, complaint):
    write_dataset(tmp_path, (3,))
    (tmp_path / "xr0.yaml").write_text(description)
    with pytest.raises(DataError, match=complaint):
        open_source(tmp_path)


def test_view_of_the_embodiment_that_is_missing(tmp_path):
    path = write_episode(tmp_path, 0, 3)
    raw = json.loads(path.read_text())
    del raw["observations"]["wrist_right"]
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"episode_000\.json: lacks the view 'right_wrist' of embodiment 'bimanual'"):
        open_source(tmp_path)


def test_nothing_but_invalid_episodes(tmp_path):
    write_dataset(tmp_path, (5, 5), {0: "invalid", 1: "invalid"})
    with pytest.raises(DataError, match="nothing to train on"):
        Stream(everything(tmp_path), 1, 0)
