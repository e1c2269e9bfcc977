"""Episode files to LeRobot datasets, as LeRobot itself reads them, and back."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.data.fixtures import (
    INSTRUCTION,
    damage,
    frame_number,
    numbered_frame,
    write_dataset,
    write_episode,
)
from tests.training.data.test_lerobot import PLAIN, describe, write_v3
from xr0_engine.training.data import lerobot_writer
from xr0_engine.training.data.convert import from_lerobot, to_lerobot
from xr0_engine.training.data.episode import arm_parts
from xr0_engine.training.data.lerobot_stats import PictureStats, combined, stats_of
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source

# Written as float32.
FLOAT32 = 1e-6
# The same sum in another order.
ORDER = 1e-12


@pytest.fixture
def episodes(tmp_path):
    folder = write_dataset(tmp_path / "episodes", (12, 7), {1: "invalid"})
    write_episode(folder, 2, 9, instructions=("Fold the towel.", "Fold it."))
    return folder


def test_episodes_to_lerobot_and_back(episodes, tmp_path):
    to_lerobot(open_source(episodes), tmp_path / "lerobot")
    from_lerobot(open_source(tmp_path / "lerobot"), tmp_path / "back")
    before = open_source(episodes)
    for name in ("lerobot", "back"):
        after = open_source(tmp_path / name)
        assert list(after.lengths) == [12, 7, 9]
        assert list(after.statuses) == ["success", "invalid", "success"]
        for number in range(3):
            old, new = before.load(number), after.load(number)
            assert (new.instructions, list(new.clips)) == (old.instructions, list(old.clips))
            assert [frame_number(new.image("left_wrist", tick)) for tick in range(len(new.motion))] == list(
                range(len(old.motion))
            )
            for which in ("proprios", "targets"):
                expected = arm_parts(getattr(old.motion, which))
                for key, rows in arm_parts(getattr(new.motion, which)).items():
                    np.testing.assert_allclose(rows, expected[key], atol=FLOAT32, err_msg=f"{name} {which} {key}")


def test_converted_dataset_has_lerobot_s_layout(episodes, tmp_path):
    to_lerobot(open_source(episodes), tmp_path / "out")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 3, 28)
    assert info["features"]["action"]["shape"] == [38]
    table = pq.read_table(tmp_path / "out" / info["data_path"].format(chunk_index=0, file_index=0))
    assert table["index"].to_pylist() == list(range(28))
    assert table["frame_index"].to_pylist() == [*range(12), *range(7), *range(9)]
    rows = pq.read_table(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    starts = [row["videos/observation.images.ego/from_timestamp"] for row in rows]
    assert starts == pytest.approx([0, 12 / 30, 19 / 30])
    assert [row["dataset_from_index"] for row in rows] == [0, 12, 19]


@pytest.mark.parametrize("convert", [to_lerobot, from_lerobot])
def test_conversion_is_whole_or_absent(episodes, tmp_path, convert):
    source = open_source(episodes)
    if convert is from_lerobot:
        to_lerobot(source, tmp_path / "lerobot")
        source = open_source(tmp_path / "lerobot")
        (tmp_path / "lerobot/videos/observation.images.ego/chunk-000/file-000.mp4").unlink()
    else:
        damage(episodes / "videos" / "2.ego.mp4")
    with pytest.raises((DataError, OSError)):
        convert(source, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_existing_folder_is_kept(episodes, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already"):
        to_lerobot(open_source(episodes), tmp_path / "out")


def test_one_arm_does_not_fit_episode_files(tmp_path):
    write_v3(tmp_path / "set")
    describe(tmp_path / "set", PLAIN)
    with pytest.raises(ValueError, match="holds two arms at 30 Hz"):
        from_lerobot(open_source(tmp_path / "set"), tmp_path / "out")


def test_missing_rows_do_not_fit_episode_files(episodes, tmp_path):
    to_lerobot(open_source(episodes), tmp_path / "lerobot")
    path = tmp_path / "lerobot/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table[:4], table[6:]]), path)
    path = tmp_path / "lerobot/meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["length"] -= 2
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match="#0: rows are missing on the way"):
        from_lerobot(open_source(tmp_path / "lerobot"), tmp_path / "out")


def test_files_are_no_longer_than_lerobot_can_tell_times_apart(episodes, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_writer, "SECONDS_PER_FILE", 20 / 30)
    to_lerobot(open_source(episodes), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/data/chunk-000").iterdir()) == [
        "file-000.parquet",
        "file-001.parquet",
    ]
    source = open_source(tmp_path / "out")
    assert [entry.spans["observation.images.ego"].start_s for entry in source.entries] == pytest.approx([0, 0.4, 0])
    assert frame_number(source.load(2).image("ego", 8)) == 8


def test_wordings_are_of_the_rows_task(episodes, tmp_path):
    """Rows that were given another task since have none of the wordings that were written beside them."""
    to_lerobot(open_source(episodes), tmp_path / "out")
    path = tmp_path / "out/meta/tasks.parquet"
    pq.write_table(pa.table({"task_index": [0, 1], "task": ["Wash it.", "Fold it."]}), path)
    assert open_source(tmp_path / "out").load(2).instructions == ("Wash it.",)


def test_words_are_what_pandas_reads_as_the_index(episodes, tmp_path):
    """LeRobot: a frame's task is the index of row task_index."""
    to_lerobot(open_source(episodes), tmp_path / "out")
    tasks = pandas.read_parquet(tmp_path / "out/meta/tasks.parquet")
    assert (tasks.index.name, list(tasks.columns)) == ("task", ["task_index"])
    assert [tasks.iloc[number].name for number in range(2)] == [INSTRUCTION, "Fold it."]
    assert tasks.loc["Fold it."].task_index == 1


def test_statistics_of_episodes_and_dataset(episodes, tmp_path):
    to_lerobot(open_source(episodes), tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    actions = np.array(table["action"].to_pylist(), np.float64)
    np.testing.assert_allclose(rows[1]["stats/action/mean"], actions[12:19].mean(axis=0), atol=ORDER)
    whole = json.loads((tmp_path / "out/meta/stats.json").read_text())
    assert set(whole) == set(json.loads((tmp_path / "out/meta/info.json").read_text())["features"])
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(whole["action"][name], getattr(actions, name)(axis=0), atol=ORDER)
    assert whole["action"]["count"] == whole["observation.images.ego"]["count"] == [28]
    assert np.shape(whole["observation.images.ego"]["q99"]) == (3, 1, 1)
    assert whole["index"]["max"] == [27]


def test_statistics_of_pictures():
    pictures = np.random.default_rng(0).integers(0, 200, (3, 4, 5, 3), dtype=np.uint8)
    seen = PictureStats(3)
    for tick, picture in enumerate(pictures):
        seen.see(tick, picture)
    stats, values = seen.stats(), pictures.reshape(-1, 3) / 255
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats[name][:, 0, 0], getattr(values, name)(axis=0), atol=ORDER)
    expected = np.quantile(values, 0.5, axis=0, method="inverted_cdf")
    np.testing.assert_allclose(stats["q50"][:, 0, 0], expected, atol=ORDER)
    assert stats["count"].tolist() == [3]


def test_long_episodes_are_looked_at_in_steps():
    seen = PictureStats(250)
    for tick in range(250):
        seen.see(tick, np.zeros((2, 2, 3), np.uint8))
    assert seen.stats()["count"].tolist() == [84]


def test_statistics_of_parts_are_those_of_the_whole():
    rows = np.random.default_rng(0).normal(size=(30, 2))
    whole, parts = stats_of(rows), combined([stats_of(rows[:7]), stats_of(rows[7:])])
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(parts[name], whole[name], atol=ORDER)


def test_one_column_alone(tmp_path):
    """LeRobot keeps a feature of one column as plain numbers."""
    path = write_episode(tmp_path / "episodes", 0, 5)
    raw = json.loads(path.read_text())
    for which in ("proprios", "actions"):
        raw[which] = {"left_gripper_pos": raw[which]["left_gripper_pos"]}
    path.write_text(json.dumps(raw))
    to_lerobot(open_source(tmp_path / "episodes"), tmp_path / "out")
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    assert pa.types.is_floating(table.schema.field("action").type)
    assert open_source(tmp_path / "out").load(0).motion.targets.left.gripper.shape == (5, 1)


@pytest.fixture
def one_view(tmp_path):
    """Three cameras, of which a profile of one's own has one."""
    folder = write_dataset(tmp_path / "episodes", (5, 6))
    (folder / "mine.yaml").write_text(
        "{name: mine, robot_types: [bimanual], layout: bimanual, control_rate_hz: 30, replan_every: null, "
        "views: [{key: ego, title: Ego View}]}"
    )
    (folder / "xr0.yaml").write_text("{robot_type: bimanual, embodiment: mine.yaml}")
    return folder


def test_a_profile_of_one_s_own_goes_along(one_view, tmp_path):
    to_lerobot(open_source(one_view), tmp_path / "lerobot")
    from_lerobot(open_source(tmp_path / "lerobot"), tmp_path / "back")
    expected = open_source(one_view).description.embodiment
    for name in ("lerobot", "back"):
        source = open_source(tmp_path / name)
        assert (source.description.embodiment, list(source.lengths)) == (expected, [5, 6])
    assert (tmp_path / "lerobot/videos/observation.images.left_wrist").is_dir()


def test_episodes_with_other_views_than_the_first_one(one_view, tmp_path):
    path = one_view / "episode_001.json"
    raw = json.loads(path.read_text())
    del raw["observations"]["wrist_right"]
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"episode_001\.json: has the views ego, left_wrist, the first episode has ego"):
        to_lerobot(open_source(one_view), tmp_path / "lerobot")


@pytest.mark.parametrize(
    ("task", "complaint"),
    [("", "expected a task in words"), ("Pick <image> up", "would be read back as 'Pick  up'")],
    ids=["empty", "markup"],
)
def test_tasks_that_episode_files_do_not_hold(one_view, tmp_path, task, complaint):
    to_lerobot(open_source(one_view), tmp_path / "lerobot")
    path = tmp_path / "lerobot/meta/tasks.parquet"
    pq.write_table(pa.table({"task_index": [0], "task": [task]}), path)
    with pytest.raises(ValueError, match=complaint):
        from_lerobot(open_source(tmp_path / "lerobot"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_empty_task_is_not_converted(episodes, tmp_path):
    path = episodes / "episode_001.json"
    path.write_text(path.read_text().replace(INSTRUCTION, "<image>"))
    with pytest.raises(DataError, match="episode_001"):
        to_lerobot(open_source(episodes), tmp_path / "out")


@pytest.mark.skipif("LEROBOT_PYTHON" not in os.environ, reason="needs LEROBOT_PYTHON, an environment with LeRobot")
def test_lerobot_itself_reads_what_is_converted(episodes, tmp_path):
    to_lerobot(open_source(episodes), tmp_path / "out")
    script = Path(__file__).with_name("read_by_lerobot.py")
    command = [os.environ["LEROBOT_PYTHON"], str(script), str(tmp_path / "out")]
    result = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    read = json.loads(result.stdout.splitlines()[-1])
    assert read["rows"] == [
        [episode, frame, INSTRUCTION, (numbered_frame(frame)[16, 4::8, 0] > 127).tolist()]
        for episode, length in enumerate((12, 7, 9))
        for frame in range(length)
    ]
    assert read["robot_type"] == "bimanual"
    assert read["stats"]["action"]["mean"] == [38]
    assert read["stats"]["observation.images.ego"]["q99"] == [3, 1, 1]
