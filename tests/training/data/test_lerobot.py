"""LeRobot datasets of both layouts, the mapping of their columns, and whose words their rows have."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.data.fixtures import frame_number, write_video
from xr0_engine.robot.decode import rotation_exp
from xr0_engine.robot.embodiment import View
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.windows import Windows

FPS = 50
LENGTHS = (20, 11)
STATE_NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "grip", "pad"]
PLAIN = {
    "robot_type": "libero_all",
    "views": {"base": "observation.images.front", "left_wrist": "observation.images.wrist"},
    "state": [{"columns": "0:7", "from": "observation.state[0:7]"}],
    "action": [
        {"columns": "0:3", "from": "action[x, y, z]", "minus": "observation.state[x, y, z]"},
        {"columns": 6, "from": "action[grip]"},
    ],
}
VIDEOS = ("observation.images.front", "observation.images.wrist")
# Written as float32.
FLOAT32 = 1e-6


def columns_of(episode: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(episode)
    return {name: rng.normal(size=(length, 8)).astype(np.float32) for name in ("observation.state", "action")}


def table_of(episode: int, length: int, tasks: list[int], first: int):
    lists = {
        name: pa.array(rows.tolist(), pa.list_(pa.float32())) for name, rows in columns_of(episode, length).items()
    }
    numbers = np.arange(length)
    return pa.table(
        {
            **lists,
            "frame_index": numbers,
            "timestamp": (numbers / FPS).astype(np.float32),
            "episode_index": np.full(length, episode),
            "index": first + numbers,
            "task_index": np.array(tasks),
        }
    )


def features() -> dict:
    numbers = {"dtype": "float32", "shape": [8], "names": {"motors": STATE_NAMES}}
    video = {"dtype": "video", "shape": [32, 80, 3], "names": ["height", "width", "channels"]}
    return {"observation.state": numbers, "action": numbers, **dict.fromkeys(VIDEOS, video)}


def write_info(folder, version, **paths):
    (folder / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "fps": FPS, "chunks_size": 1000, "features": features(), **paths}
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def write_v2(folder):
    write_info(
        folder,
        "v2.1",
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    lines, first = [], 0
    for episode, length in enumerate(LENGTHS):
        path = folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of(episode, length, [episode] * length, first), path)
        for video in VIDEOS:
            numbers = range(100 * episode, 100 * episode + length)
            write_video(folder / "videos" / "chunk-000" / video / f"episode_{episode:06d}.mp4", numbers, FPS)
        lines.append(json.dumps({"episode_index": episode, "tasks": [f"Task {episode}."], "length": length}))
        first += length
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    tasks = [json.dumps({"task_index": n, "task": f"Task {n}."}) for n in range(2)]
    (folder / "meta" / "tasks.jsonl").write_text("\n".join(tasks))


def write_v3(folder, tasks_of=lambda episode, length: [episode] * length):
    """Both episodes in one data file and one video file a view, the second after the first."""
    write_info(
        folder,
        "v3.0",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    tables, rows, first = [], [], 0
    for episode, length in enumerate(LENGTHS):
        tables.append(table_of(episode, length, tasks_of(episode, length), first))
        row = {"episode_index": episode, "tasks": [f"Task {episode}."], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        for video in VIDEOS:
            row |= {f"videos/{video}/chunk_index": 0, f"videos/{video}/file_index": 0}
            row |= {
                f"videos/{video}/from_timestamp": first / FPS,
                f"videos/{video}/to_timestamp": (first + length) / FPS,
            }
        rows.append(row)
        first += length
    for path, table in (
        ("data/chunk-000/file-000.parquet", pa.concat_tables(tables)),
        ("meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows)),
        # pandas writes its index, the words, under this name.
        ("meta/tasks.parquet", pa.table({"task_index": [0, 1], "__index_level_0__": ["Task 0.", "Task 1."]})),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / path)
    numbers = [*range(LENGTHS[0]), *range(100, 100 + LENGTHS[1])]
    for video in VIDEOS:
        write_video(folder / "videos" / video / "chunk-000" / "file-000.mp4", numbers, FPS)


@pytest.fixture(params=[write_v2, write_v3], ids=["v2.1", "v3.0"])
def folder(request, tmp_path):
    request.param(tmp_path / "set")
    describe(tmp_path / "set", PLAIN)
    return tmp_path / "set"


def describe(folder, facts):
    (folder / "xr0.yaml").write_text(yaml.safe_dump(facts))


def test_nearest_measurement_and_frame_at_the_control_rate(folder):
    """LIBERO's 20 Hz out of 50 Hz: ticks 0, 1, 2, ... are rows 0, 3 (2.5), 5, 8 (7.5), 10."""
    source = open_source(folder)
    assert source.lengths == [8, 5]
    episode = source.load(1)
    rows = [0, 3, 5, 8, 10]
    recorded = columns_of(1, 11)
    np.testing.assert_array_equal(
        np.concatenate([episode.motion.state(tick) for tick in range(5)])[:, :7],
        recorded["observation.state"][rows, :7],
    )
    assert [frame_number(episode.image("base", tick)) for tick in range(5)] == [100 + row for row in rows]
    assert episode.instructions == ("Task 1.",)
    assert episode.status == "success"


def test_columns_go_where_the_description_says(folder):
    sample = Windows(open_source(folder), [0, 1], 4).sample(8 + 1)
    recorded = columns_of(1, 11)
    rows = [3, 5, 8, 10]
    expected = np.zeros((4, 32))
    expected[:, :3] = recorded["action"][rows, :3] - recorded["observation.state"][3, :3]
    expected[:, 6] = recorded["action"][rows, 6]
    np.testing.assert_allclose(sample.actions, expected, atol=FLOAT32)
    assert np.flatnonzero(sample.mask.all(axis=0)).tolist() == [0, 1, 2, 6]
    assert sample.robot_type == "libero_all"
    assert sample.source.endswith("set#1:1")
    assert not sample.state[:, 7:].any()


def test_task_that_changes_within_an_episode(tmp_path):
    write_v3(tmp_path / "set", lambda episode, length: [0] * 10 + [1] * (length - 10))
    describe(tmp_path / "set", PLAIN)
    windows = Windows(open_source(tmp_path / "set"), [0], 4)
    # The change at row 10 is tick 4 at 20 Hz.
    assert [windows.sample(tick).instruction for tick in range(8)] == ["Task 0."] * 4 + ["Task 1."] * 4


def test_task_is_the_rows_whatever_the_meta_data_say_of_the_episode(tmp_path):
    write_v3(tmp_path, lambda episode, length: [1] * length)
    describe(tmp_path, PLAIN)
    assert open_source(tmp_path).load(0).instructions == ("Task 1.",)


def test_meta_data_without_the_column_tasks(tmp_path):
    write_v3(tmp_path)
    describe(tmp_path, PLAIN)
    path = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["tasks"]), path)
    assert [open_source(tmp_path).load(number).instructions for number in (0, 1)] == [("Task 0.",), ("Task 1.",)]


def as_pandas(index, **columns):
    """A table whose schema says, as pandas writes it, which column is the index."""
    return pa.table(columns).replace_schema_metadata({"pandas": json.dumps({"index_columns": [index], "columns": []})})


@pytest.mark.parametrize(
    ("tasks", "answer"),
    [
        pytest.param(pa.table({"task_index": [0, 1], "task": ["a", "b"]}), "b", id="task"),
        pytest.param(pa.table({"task": ["b", "a"], "task_index": [1, 0]}), "b", id="another order"),
        pytest.param(pa.table({"words": ["a", "b"], "task_index": [0, 1]}), "b", id="the only text"),
        pytest.param(as_pandas("words", task_index=[0, 1], kind=["x", "y"], words=["a", "b"]), "b", id="named index"),
        pytest.param(as_pandas({"kind": "range"}, task_index=[0, 1], task=["a", "b"]), "b", id="numbered index"),
        pytest.param(
            as_pandas("__index_level_0__", task_index=[0, 1], task=["a", "b"], __index_level_0__=["c", "d"]),
            DataError(r"tasks\.parquet: task and __index_level_0__ both hold text"),
            id="two of them",
        ),
        pytest.param(
            pa.table({"task_index": [0, 1], "words": ["a", "b"], "note": ["x", "y"]}),
            DataError("words and note both hold text"),
            id="two texts",
        ),
        pytest.param(pa.table({"task_index": [0, 1]}), DataError("expected the tasks' words in a column"), id="none"),
        pytest.param(pa.table({"task": ["a", "b"]}), DataError("expected a column task_index"), id="no index"),
        pytest.param(
            pa.table({"task_index": [1, 1], "task": ["a", "b"]}), DataError("task_index 1 stands for both"), id="twice"
        ),
        pytest.param(
            pa.table({"task_index": [None, 1], "task": ["a", "b"]}), DataError("row 0: .* got None and 'a'"), id="null"
        ),
        pytest.param(
            pa.table({"task_index": [0, 1], "task": ["a", None]}), DataError("row 1: .* got 1 and None"), id="no words"
        ),
        pytest.param(pa.table({"task_index": [0], "task": ["a"]}), DataError("#1: task_index 1: .* 0$"), id="absent"),
    ],
)
def test_words_of_a_task(tmp_path, tasks, answer):
    write_v3(tmp_path)
    describe(tmp_path, PLAIN)
    pq.write_table(tasks, tmp_path / "meta/tasks.parquet")
    if isinstance(answer, str):
        assert open_source(tmp_path).load(1).instructions == (answer,)
    else:
        with pytest.raises(DataError, match=str(answer)):
            open_source(tmp_path).load(1)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ('{"task_index": 0, "task": "a"}\n{"task_index": 0, "task": "b"}', "task_index 0 stands for both 'a' and 'b'"),
        ('{"task_index": 0, "task": null}', "row 0: expected a whole task_index and words, got 0 and None"),
        ('{"task_index": 0}', "line 1: expected task_index and task, got task_index"),
        ('["a"]', "expected a JSON object a line"),
    ],
    ids=["twice", "no words", "no task", "no object"],
)
def test_wrong_tasks_of_v2(tmp_path, lines, complaint):
    write_v2(tmp_path)
    describe(tmp_path, PLAIN)
    (tmp_path / "meta/tasks.jsonl").write_text(lines)
    with pytest.raises(DataError, match=rf"#0: .*tasks\.jsonl: {complaint}"):
        open_source(tmp_path).load(0)


@pytest.mark.parametrize("kind", ["matrix", "axis_angle", "quaternion_xyzw", "quaternion_wxyz"])
def test_rotations_as_they_come(tmp_path, kind):
    """The same rotation in every spelling, in a feature of its own that is both state and action."""
    half = 0.3
    rotation = rotation_exp(np.array([0.0, 0.0, 2 * half]))
    spelling = {
        "matrix": rotation.ravel(),
        "axis_angle": [0, 0, 2 * half],
        "quaternion_xyzw": [0, 0, np.sin(half), np.cos(half)],
        "quaternion_wxyz": [np.cos(half), 0, 0, np.sin(half)],
    }[kind]
    write_v3(tmp_path)
    path = tmp_path / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = pa.array([list(map(float, spelling))] * table.num_rows, pa.list_(pa.float32()))
    pq.write_table(table.append_column("turn", rows), path)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    info["features"]["turn"] = {"dtype": "float32", "shape": [len(spelling)], "names": None}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    arms = {"left": {"rotation": {"state": "turn", "action": "turn", "as": kind}}}
    views = dict.fromkeys(("ego", "left_wrist", "right_wrist"), VIDEOS[0])
    describe(tmp_path, {"robot_type": "bimanual", "views": views, "arms": arms})
    motion = open_source(tmp_path).load(0).motion
    np.testing.assert_allclose(motion.proprios.left.rotation[4], rotation, atol=FLOAT32)
    assert np.flatnonzero(motion.columns).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            {"views": {"base": "front"}}, "expected one of observation.images.front, .*got 'front'", id="video"
        ),
        pytest.param({"views": {"top": VIDEOS[0]}}, "views: 'top' is unknown, expected base, left_wrist", id="view"),
        pytest.param(
            {"views": {"base": VIDEOS[0]}},
            "profile 'libero' has the view 'left_wrist', xr0.yaml maps base",
            id="unmapped",
        ),
        pytest.param({"actions": []}, "'actions' is unknown, expected dataset, robot_type", id="field"),
        pytest.param({"arms": {}}, "arms: not for layout 'plain'", id="layout"),
        pytest.param({"action": []}, "lacks state and action; the dataset has observation.state", id="no action"),
        pytest.param({"robot_type": "r2d2"}, "no built-in embodiment profile lists 'r2d2'", id="robot"),
        pytest.param({"state": [{"columns": "0:8", "from": "action[0:7]"}]}, "expected 8 columns, got 7", id="width"),
        pytest.param({"state": [{"columns": "0:2", "from": "action[x, w]"}]}, r"action\[w\]: the feature", id="name"),
        pytest.param({"state": [{"columns": "0:9", "from": "action[0:9]"}]}, "has 8 columns", id="slice"),
        pytest.param({"state": [{"columns": "30:34", "from": "action"}]}, "expected columns of 0 to 31", id="columns"),
        # What YAML makes of 6:8 without quotes.
        pytest.param({"state": [{"columns": 368, "from": "action"}]}, "write begin:end in quotes", id="quotes"),
        pytest.param({"state": [{"columns": 3, "from": "velocity"}]}, "'velocity' is no feature", id="feature"),
        pytest.param({"state": [{"columns": 3, "from": "a]b"}]}, "expected a feature such as", id="selector"),
        pytest.param({"state": [{"columns": 3, "source": "action"}]}, "'source' is unknown", id="entry"),
    ],
)
def test_wrong_description_says_what_is_wrong(tmp_path, change, complaint):
    write_v3(tmp_path)
    describe(tmp_path, PLAIN | change)
    with pytest.raises(DataError, match=complaint):
        open_source(tmp_path)


def test_more_views_than_its_profile_names(tmp_path):
    write_v3(tmp_path / "set")
    views = PLAIN["views"] | {"top": VIDEOS[1]}
    describe(tmp_path / "set", PLAIN | {"views": views})
    own = open_source(tmp_path / "set").description
    assert [view.key for view in own.stored_views] == ["base", "left_wrist"]
    libero = own.embodiment
    other = replace(libero, views=(*libero.views, View("top", "Top View")))
    seen = open_source(tmp_path / "set", embodiment=other)
    assert seen.description.views == views
    assert frame_number(seen.load(0).image("top", 0)) == frame_number(seen.load(0).image("left_wrist", 0))


def test_description_elsewhere_points_to_the_dataset(tmp_path):
    write_v3(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(PLAIN | {"dataset": "set"}))
    assert open_source(tmp_path / "mine.yaml").lengths == [8, 5]


def test_lerobot_without_description(tmp_path):
    write_v3(tmp_path)
    with pytest.raises(DataError, match=r"LeRobot dataset without xr0\.yaml"):
        open_source(tmp_path)


def test_nan_names_dataset_episode_and_frame(tmp_path):
    write_v3(tmp_path)
    describe(tmp_path, PLAIN)
    path = tmp_path / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    rows[LENGTHS[0] + 4][0] = float("nan")
    pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(rows)), path)
    with pytest.raises(DataError, match="#1: frame 4: action: expected finite"):
        open_source(tmp_path).load(1)


def test_names_that_repeat_in_groups(tmp_path):
    write_v3(tmp_path)
    describe(tmp_path, PLAIN)
    info = json.loads((tmp_path / "meta/info.json").read_text())
    info["features"]["action"]["names"] = {"left": ["x", "y", "z", "grip"], "right": ["x", "y", "z", "grip"]}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"action\[x\]: may be any of the columns 0, 4"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"data_path": "data/{episode_index:999999999d}.parquet"}, "data_path: expected a path in the dataset"),
        ({"data_path": "data/{episode_index.__class__}.parquet"}, "data_path: expected a path in the dataset"),
        ({"data_path": "../{episode_index}.parquet"}, "data_path: expected a path in the dataset"),
        ({"data_path": "/etc/{episode_index}.parquet"}, "data_path: expected a path in the dataset"),
        ({"data_path": 3}, "data_path is 3, not text"),
        ({"fps": "50"}, "fps: expected a number from 0.01 to 10000, got '50'"),
        ({"fps": 1e-9}, "fps: expected a number from 0.01 to 10000"),
        ({"fps": True}, "fps: expected a number"),
        ({"features": []}, r"features is \[\], not an object"),
        ({"features": {"action": 3}}, "action is 3, not an object"),
        ({"chunks_size": 0}, "chunks_size: expected 1 or more, got 0"),
    ],
)
def test_wrong_meta_data_are_one_error(tmp_path, change, complaint):
    write_v2(tmp_path)
    describe(tmp_path, PLAIN)
    path = tmp_path / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=complaint):
        open_source(tmp_path)


@pytest.mark.parametrize("length", [10**12, 10**6 * 5])
def test_an_episode_has_an_end(tmp_path, length):
    write_v2(tmp_path)
    describe(tmp_path, PLAIN)
    path = tmp_path / "meta" / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["length"] = length
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="length: expected a whole number of at most 4194304, got"):
        open_source(tmp_path)
