"""Which moment a LeRobot row is of, and which picture belongs to it: taken right, or refused with file and row."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.data.fixtures import encode_video, frame_number, numbered_frame, write_video
from tests.training.data.test_lerobot import PLAIN, VIDEOS, write_v3
from tests.training.data.test_lerobot import describe as describe_plain
from xr0_engine.training.data.lerobot_rows import TOLERANCE_S, frames_of
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.windows import Windows, chunk_at

FPS, ROWS, T = 30, 30, 4
VIDEO = "observation.images.front"
DATA = "data/chunk-000/episode_000000.parquet"
NUMBERS = np.arange(ROWS)
# Ten rows were taken out of the table.
KEPT = np.r_[0:5, 15:ROWS]
PROFILE = {
    "name": "one",
    "robot_types": ["one"],
    "layout": "plain",
    "replan_every": None,
    "views": [{"key": "base", "title": "Base View"}],
}
DESCRIPTION = {
    "robot_type": "one",
    "embodiment": "one.yaml",
    "views": {"base": VIDEO},
    "state": [{"columns": 0, "from": "observation.state"}],
    "action": [{"columns": 0, "from": "observation.state", "kind": "absolute"}],
}


def write(folder, numbers=NUMBERS, rate_hz=FPS, columns=None, video=range(ROWS), video_fps=FPS):
    """One episode of v2.1, whose state is the number of the picture that belongs to it. columns: in place of ours."""
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta").mkdir()
    table = {
        "observation.state": numbers.astype(np.float32),
        "frame_index": numbers,
        "timestamp": (numbers / FPS).astype(np.float32),
        "episode_index": np.zeros(len(numbers), int),
        "index": np.arange(len(numbers)),
        "task_index": np.zeros(len(numbers), int),
    } | (columns or {})
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), folder / DATA)
    write_video(folder / f"videos/chunk-000/{VIDEO}/episode_000000.mp4", video, video_fps)
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [1], "names": ["x"]},
            VIDEO: {"dtype": "video", "shape": [32, 80, 3], "names": ["height", "width", "channels"]},
        },
    }
    line = {"episode_index": 0, "tasks": ["Go."], "length": len(numbers)}
    for name, content in (
        ("info.json", info),
        ("episodes.jsonl", line),
        ("tasks.jsonl", {"task_index": 0, "task": "Go."}),
    ):
        (folder / "meta" / name).write_text(json.dumps(content))
    (folder / "one.yaml").write_text(yaml.safe_dump(PROFILE | {"control_rate_hz": rate_hz}))
    (folder / "xr0.yaml").write_text(yaml.safe_dump(DESCRIPTION))
    return folder


def pairs(folder):
    """Of every tick, the picture that its state is of, and the one that it gets."""
    episode = open_source(folder).load(0)
    return [
        (int(episode.motion.state(tick)[0, 0]), frame_number(episode.image("base", tick)))
        for tick in range(len(episode.motion))
    ]


def shuffled(columns):
    order = np.random.default_rng(0).permutation(ROWS)
    return {name: values[order] for name, values in columns.items()}


JITTER = np.random.default_rng(0).uniform(-1, 1, ROWS)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="whole"),
        pytest.param({"numbers": KEPT}, id="rows left out"),
        pytest.param({"numbers": np.arange(10, ROWS)}, id="begins later"),
        pytest.param({"columns": {"timestamp": None}}, id="frame_index alone"),
        pytest.param({"columns": {"frame_index": None}}, id="timestamp alone"),
        pytest.param({"numbers": KEPT, "columns": {"frame_index": None}}, id="rows left out, timestamp alone"),
        pytest.param({"columns": {"timestamp": NUMBERS / FPS + 0.5 * TOLERANCE_S * JITTER}}, id="within the tolerance"),
        pytest.param(
            {
                "columns": shuffled(
                    {"observation.state": NUMBERS, "frame_index": NUMBERS, "timestamp": NUMBERS / FPS, "index": NUMBERS}
                )
            },
            id="rows in another order",
        ),
        pytest.param({"video_fps": Fraction(30000, 1001)}, id="29.97 Hz, short"),
        pytest.param({"video": range(ROWS + 1)}, id="a last picture without a row"),
        pytest.param(
            {
                "columns": {
                    name: [[int(number)] for number in numbers]
                    for name, numbers in (("frame_index", NUMBERS), ("episode_index", [0] * ROWS), ("index", NUMBERS))
                }
            },
            id="lists of one number",
        ),
    ],
)
def test_a_tick_has_the_picture_of_its_row(tmp_path, changes):
    found = pairs(write(tmp_path, **changes))
    assert found == [(number, number) for number in changes.get("numbers", NUMBERS)]


def test_float32_times_of_a_long_episode():
    """Ten minutes and more: as exact as float32 writes them, and as float32 multiplies."""
    for fps in (15, 30, 50):
        numbers = np.arange(700 * fps)
        for timestamps in ((numbers / fps).astype(np.float32), numbers.astype(np.float32) * np.float32(1 / fps)):
            assert (frames_of(timestamps, numbers, fps) == numbers).all()


def test_a_longer_video_is_told_once(tmp_path, caplog):
    write(tmp_path, video=range(ROWS + 1))
    for _ in range(2):
        open_source(tmp_path).load(0)
    assert [record.message.count("a frame longer than their rows") for record in caplog.records] == [1]


def test_windows_end_where_rows_are_missing(tmp_path):
    source = open_source(write(tmp_path, KEPT))
    assert source.lengths == [20]
    windows = Windows(source, [0], T)
    steps = [int(windows.sample(tick).mask[:, 0].sum()) for tick in range(20)]
    assert steps == [4, 4, 3, 2, 1, *[4] * 12, 3, 2, 1]
    episode = source.load(0)
    assert chunk_at(episode, 2, T).actions[:, 0].tolist() == [2, 3, 4, 0]
    assert chunk_at(episode, 5, T).actions[:, 0].tolist() == [15, 16, 17, 18]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param(
            {"columns": {"timestamp": None, "frame_index": None}},
            "expected a column timestamp or frame_index",
            id="none",
        ),
        pytest.param(
            {"columns": {"frame_index": np.arange(ROWS) - 10, "timestamp": None}},
            "row 0: expected a time from 0",
            id="negative",
        ),
        pytest.param(
            {"numbers": np.arange(10, ROWS), "columns": {"frame_index": np.arange(20)}},
            r"row 0: timestamp 0\.333333 s is frame 10 at 30 Hz, frame_index says 0",
            id="trimmed start",
        ),
        pytest.param({"columns": {"timestamp": NUMBERS / FPS * 1000}}, "write seconds, not milliseconds", id="ms"),
        pytest.param(
            {"columns": {"timestamp": NUMBERS / FPS * 1000, "frame_index": None}}, "not milliseconds", id="ms alone"
        ),
        pytest.param({"columns": {"timestamp": 1.7e9 + NUMBERS / FPS}}, "frame_index says 0", id="absolute"),
        pytest.param(
            {"columns": {"timestamp": 1.7e9 + NUMBERS / FPS, "frame_index": None}},
            r"\.mp4: .*the rows at",
            id="absolute alone",
        ),
        pytest.param(
            {"columns": {"timestamp": NUMBERS / FPS + 20 * TOLERANCE_S * (NUMBERS == 7)}},
            "row 7: timestamp .* off the nearest frame at 30 Hz",
            id="jitter",
        ),
        pytest.param({"columns": {"timestamp": NUMBERS / 20}}, "says fps 30, that is 0.0333333 s", id="another rate"),
        pytest.param(
            {"columns": {"frame_index": 2 * NUMBERS, "timestamp": None}}, "2 frames apart", id="half the rate"
        ),
        pytest.param({"numbers": np.r_[0:9, 8, 10:ROWS]}, "rows 8 and 9 are both frame 8", id="twice"),
        pytest.param({"columns": {"timestamp": np.r_[0:9, 10, 9, 11:ROWS] / FPS}}, "row 9: timestamp", id="backwards"),
        pytest.param({"columns": {"timestamp": np.r_[np.nan, 1:ROWS] / FPS}}, "finite numbers of seconds", id="nan"),
        pytest.param({"columns": {"index": np.r_[0:5, 6, 5, 7:ROWS]}}, "rows 5 and 6: index 6 and 5", id="index"),
        pytest.param(
            {"columns": {"episode_index": np.full(ROWS, 7)}}, r"expected rows of episode 0 alone.*\[7\]", id="other"
        ),
        pytest.param(
            {"columns": {"episode_index": np.r_[np.zeros(29, int), 1]}},
            r"episode_index says \[0, 1\]",
            id="another too",
        ),
        pytest.param({"columns": {"task_index": None}}, "expected a column 'task_index'", id="no task"),
        pytest.param(
            {"columns": {"task_index": np.full(ROWS, 4)}}, "task_index 4: .*has the tasks 0", id="unknown task"
        ),
        pytest.param(
            {"columns": {"observation.state": [[1.0, 2.0], *[[1.0]] * (ROWS - 1)]}}, "rows of one width", id="ragged"
        ),
        pytest.param(
            {"columns": {"observation.state": [[1.0, 2.0]] * ROWS}}, "expected 1 columns .* got 2", id="width"
        ),
        pytest.param(
            {"video": range(ROWS - 6)}, r"\.mp4: its 24 frames at 30 Hz end at 0.8 s, the rows at 1 s", id="short"
        ),
        pytest.param({"video": range(ROWS + 2)}, "its 32 frames at 30 Hz end at 1.06667 s", id="long"),
        pytest.param({"video_fps": 25}, "its 30 frames at 25 Hz end at 1.2 s, .*the fps 30 of", id="video at 25 Hz"),
        pytest.param({"numbers": np.arange(20)}, "cut the video to the rows", id="rows left out and numbered anew"),
        pytest.param({"numbers": KEPT, "rate_hz": 20}, "missing between frames 4 and 15", id="gap at another rate"),
    ],
)
def test_rows_whose_moment_is_not_clear_are_refused(tmp_path, changes, complaint):
    write(tmp_path, **changes)
    with pytest.raises(DataError, match=f"#0: .*{complaint}"):
        open_source(tmp_path).load(0)


@pytest.mark.parametrize("first", [0, 15])
def test_a_video_s_own_clock(tmp_path, first):
    """It begins at 0.5 s: so must the rows."""
    write(tmp_path, np.arange(first, first + ROWS))
    path = tmp_path / f"videos/chunk-000/{VIDEO}/episode_000000.mp4"
    encode_video(path, [numbered_frame(number) for number in range(15, 15 + ROWS)], times_s=0.5 + NUMBERS / FPS)
    if first == 15:
        assert pairs(tmp_path) == [(number, number) for number in range(15, 15 + ROWS)]
    else:
        with pytest.raises(DataError, match=r"end at 1.5 s, the rows at 1 s"):
            open_source(tmp_path).load(0)


def test_rows_before_the_video_begins(tmp_path):
    """Of the length that the rows need, as far as its file tells: the first pictures are missing."""
    write(tmp_path)
    path = tmp_path / f"videos/chunk-000/{VIDEO}/episode_000000.mp4"
    encode_video(path, [numbered_frame(number) for number in range(15, ROWS)], times_s=np.arange(15, ROWS) / FPS)
    with pytest.raises(DataError, match=r"\.mp4: begins at 0.5 s, the first row is at 0 s"):
        open_source(tmp_path).load(0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"episode_index": 0, "length": 29}, "has 30 rows of it, the meta data say length 29"),
        ({"episode_index": 0, "length": None}, "episode 0: length: expected a whole number from 1, got None"),
        ({"episode_index": 0}, "lack 'length'"),
    ],
    ids=["other", "null", "none"],
)
def test_length_in_the_meta_data(tmp_path, line, complaint):
    write(tmp_path)
    (tmp_path / "meta/episodes.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=complaint):
        open_source(tmp_path).load(0)


def test_episode_that_is_listed_twice(tmp_path):
    write(tmp_path)
    path = tmp_path / "meta/episodes.jsonl"
    path.write_text("\n".join([path.read_text()] * 2))
    with pytest.raises(DataError, match="lists episode 0 more than once"):
        open_source(tmp_path)


def in_meta_of_v3(folder, change):
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


def spans(first, second):
    def change(rows):
        for row, (start_s, end_s) in zip(rows, (first, second), strict=True):
            row[f"videos/{VIDEOS[0]}/from_timestamp"], row[f"videos/{VIDEOS[0]}/to_timestamp"] = start_s, end_s

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(spans((0, 0.4), (0.3, 0.62)), "overlap those of episode 1", id="overlapping"),
        pytest.param(spans((-0.4, 0.0), (0.4, 0.62)), "expected 0 <= from_timestamp", id="negative"),
        pytest.param(spans((0.4, 0.0), (0.4, 0.62)), "expected 0 <= from_timestamp", id="backwards"),
        pytest.param(spans((0, 0.3), (0.4, 0.62)), "are 15 frames apart at 50 Hz, .* number 19", id="short"),
        pytest.param(spans((0, 0.4), (0.4, 0.9)), None, id="the other episode's"),
        pytest.param(spans((0, 0.42), (0.42, 0.62)), None, id="a last picture without a row"),
        pytest.param(spans((0, 0.44), (0.44, 0.62)), "are 22 frames apart at 50 Hz, .* number 19", id="long"),
        pytest.param(
            spans((2.0, 2.4), (0.4, 0.62)), r"file-000\.mp4: its 31 frames .* end at 0.62", id="beyond the file"
        ),
        pytest.param(
            lambda rows: rows[0].update({"dataset_from_index": 40, "dataset_to_index": 60}),
            "index goes from 0 to 19, .* dataset_from_index 40",
            id="index",
        ),
    ],
)
def test_spans_of_files_of_many_episodes(tmp_path, change, complaint):
    write_v3(tmp_path)
    describe_plain(tmp_path, PLAIN)
    in_meta_of_v3(tmp_path, change)
    source = open_source(tmp_path)
    if complaint is None:
        assert frame_number(source.load(0).image("base", 1)) == 3
    else:
        with pytest.raises(DataError, match=f"#0: .*{complaint}"):
            source.load(0)


def in_another_file(folder, listed):
    """Episode 1 of v3.0 has its rows in file-001, whatever the meta data say."""
    write_v3(folder)
    describe_plain(folder, PLAIN)
    path = folder / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(path)
    for number in (0, 1):
        pq.write_table(rows.filter(pc.field("episode_index") == number), path.with_name(f"file-00{number}.parquet"))
    in_meta_of_v3(folder, lambda rows: rows[1].update({"data/file_index": listed}))
    return open_source(folder)


def test_rows_in_another_file_than_the_meta_data_say(tmp_path):
    states = [in_another_file(tmp_path / str(listed), listed).load(1).motion.state(2) for listed in (0, 1)]
    assert (states[0] == states[1]).all()


def test_rows_in_two_files(tmp_path):
    source = in_another_file(tmp_path, 0)
    path = tmp_path / "data/chunk-000/file-001.parquet"
    path.with_name("file-002.parquet").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"file-000\.parquet has 0 rows of it"):
        source.load(1)


@pytest.mark.parametrize(
    "file", ["meta/info.json", "meta/tasks.jsonl", DATA, f"videos/chunk-000/{VIDEO}/episode_000000.mp4"]
)
def test_files_that_git_lfs_has_not_fetched(tmp_path, file):
    write(tmp_path)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DataError, match=f"{file} is a git-lfs pointer, .*git lfs pull"):
        open_source(tmp_path).load(0)


def test_ends_of_lines_within_a_task(tmp_path):
    write(tmp_path)
    task = {"task_index": 0, "task": "Pick\u2028it up."}
    (tmp_path / "meta/tasks.jsonl").write_text(json.dumps(task, ensure_ascii=False) + "\n", encoding="utf-8")
    assert open_source(tmp_path).load(0).instructions == (task["task"],)
