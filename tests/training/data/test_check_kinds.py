"""`xr0 data check` on LeRobot sets with one fault of each kind: each is found where it is, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from tests.training.data.fixtures import damage
from xr0_engine.cli import app
from xr0_engine.training.data.check import Checker, check
from xr0_engine.training.data.video import video_writer

TICKS, FPS = 40, 30
HEIGHT, WIDTH = 48, 64
VIDEO = "observation.images.front"
TASK = "Push the block."
PROFILE = {
    "name": "one",
    "robot_types": ["one"],
    "layout": "plain",
    "control_rate_hz": FPS,
    "replan_every": None,
    "views": [{"key": "base", "title": "Base View"}],
}
DESCRIPTION = {
    "robot_type": "one",
    "embodiment": "one.yaml",
    "views": {"base": VIDEO},
    "state": [{"columns": "0:4", "from": "observation.state"}],
    "action": [{"columns": "0:4", "from": "action"}],
}


@dataclass
class Recorded:
    """An episode as it is written, whole unless a test breaks it. change: called with the video's path at the end."""

    number: int
    actions: np.ndarray = field(init=False)
    frames: list = field(init=False)
    frame_index: np.ndarray = field(init=False)
    timestamp: np.ndarray = field(init=False)
    task_index: int = 0
    video_fps: float = FPS
    change: object = None

    def __post_init__(self):
        rng = np.random.default_rng(self.number)
        self.actions = rng.uniform(-1, 1, (TICKS, 4))
        # Bright above, and a little different in every frame.
        scene = np.linspace(220, 30, HEIGHT)[:, None, None] + rng.normal(0, 4, (TICKS, HEIGHT, WIDTH, 3))
        self.frames = list(np.clip(scene, 0, 255).astype(np.uint8))
        self.frame_index = np.arange(TICKS)
        self.timestamp = np.arange(TICKS) / FPS


def write(folder, episodes, tasks=(TASK, ""), **description):
    for sub in ("meta", "data/chunk-000", f"videos/chunk-000/{VIDEO}"):
        (folder / sub).mkdir(parents=True)
    numbers = {"dtype": "float32", "shape": [4], "names": None}
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": numbers,
            "action": numbers,
            VIDEO: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]},
        },
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    lines, first = [], 0
    for number, episode in enumerate(episodes):
        rows = len(episode.actions)
        words = [tasks[episode.task_index]] if episode.task_index < len(tasks) else []
        table = pa.table(
            {
                "observation.state": pa.array(episode.actions.astype(np.float32).tolist(), pa.list_(pa.float32())),
                "action": pa.array(episode.actions.astype(np.float32).tolist(), pa.list_(pa.float32())),
                "frame_index": episode.frame_index,
                "timestamp": episode.timestamp.astype(np.float32),
                "episode_index": np.full(rows, number),
                "index": first + np.arange(rows),
                "task_index": np.full(rows, episode.task_index),
            }
        )
        pq.write_table(table, folder / f"data/chunk-000/episode_{number:06d}.parquet")
        path = folder / f"videos/chunk-000/{VIDEO}/episode_{number:06d}.mp4"
        height, width = episode.frames[0].shape[:2]
        with video_writer(path, width, height, episode.video_fps) as write_frame:
            for frame in episode.frames:
                write_frame(frame)
        if episode.change is not None:
            episode.change(path)
        lines.append(json.dumps({"episode_index": number, "tasks": words, "length": rows}))
        first += rows
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    known = [json.dumps({"task_index": index, "task": text}) for index, text in enumerate(tasks)]
    (folder / "meta" / "tasks.jsonl").write_text("\n".join(known))
    (folder / "one.yaml").write_text(yaml.safe_dump(PROFILE))
    (folder / "xr0.yaml").write_text(yaml.safe_dump(DESCRIPTION | description))
    return folder


def drop_rows(episode):
    """Without a trace: what is left is numbered anew, and the video is whole."""
    episode.actions = np.delete(episode.actions, np.s_[10:20], axis=0)
    episode.frame_index = np.arange(TICKS - 10)
    episode.timestamp = episode.frame_index / FPS


def trim_start(episode):
    """The numbers of the rows begin anew, their times do not, and the video is whole."""
    episode.actions, episode.frame_index = episode.actions[10:], np.arange(TICKS - 10)
    episode.timestamp = np.arange(10, TICKS) / FPS


def wrap(episode):
    episode.actions[:, 1] = (np.arange(TICKS) * 0.1 + 2.0 + np.pi) % (2 * np.pi) - np.pi


def not_finite(episode):
    episode.actions[7, 2] = np.nan


def turn(episode):
    episode.frames = [frame[::-1, ::-1] for frame in episode.frames]


def another_rate(episode):
    episode.video_fps = 25


def ends_early(episode):
    episode.frames = episode.frames[: TICKS // 2]


def empty_task(episode):
    episode.task_index = 1


def unknown_task(episode):
    episode.task_index = 5


def mirror(episode):
    episode.frames = [frame[::-1] for frame in episode.frames]


def smaller(episode):
    episode.frames = [np.ascontiguousarray(frame[:, : WIDTH - 16]) for frame in episode.frames]


def broken_video(episode):
    episode.change = damage


def missing_video(episode):
    episode.change = lambda path: path.unlink()


KINDS = {
    "rows dropped": (drop_rows, "the rows at 1 s"),
    "start trimmed": (trim_start, "timestamp"),
    "an angle that wraps": (wrap, "action column 1 jumps by a turn"),
    "a value that is no number": (not_finite, "finite"),
    "pictures upside down": (turn, "upside down"),
    "a video of another rate": (another_rate, "25"),
    "a video that ends early": (ends_early, "episode_"),
    "pictures of another size": (smaller, "several sizes: its 48x48, most others' 64x48"),
    "an empty task": (empty_task, "task"),
    "a task that is not there": (unknown_task, "task"),
    "a damaged frame": (broken_video, "frame"),
    "no video": (missing_video, "episode_"),
}


def test_a_whole_dataset_has_no_fault(tmp_path):
    findings = check(write(tmp_path / "set", [Recorded(number) for number in range(4)]), False, 1)
    assert [finding.faults for finding in findings] == [()] * 4
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "set"), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["usable"] is True


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Three whole episodes, and one of each kind of fault after them."""
    folder = tmp_path_factory.mktemp("kinds") / "set"
    episodes = [Recorded(number) for number in range(3 + len(KINDS))]
    for episode, (breaks, _) in zip(episodes[3:], KINDS.values(), strict=True):
        breaks(episode)
    return write(folder, episodes)


def test_each_fault_is_found_where_it_is_and_no_other(faulty):
    findings = check(faulty, False, 1)
    assert len(findings) == 3 + len(KINDS)
    assert [finding.faults for finding in findings[:3]] == [()] * 3
    for (kind, (_, needle)), finding in zip(KINDS.items(), findings[3:], strict=True):
        assert len(finding.faults) == 1, (kind, finding)
        assert needle in finding.faults[0], (kind, finding)


def test_the_command_names_episodes_and_ends_with_a_verdict(faulty):
    result = CliRunner().invoke(app, ["data", "check", str(faulty), "--json"])
    assert result.exit_code == 1
    (dataset,) = json.loads(result.stdout)["datasets"]
    assert (dataset["checked"], dataset["broken"]) == (3 + len(KINDS), len(KINDS))
    assert len(dataset["findings"]) == len(KINDS)
    assert "not fit to train on" in dataset["verdict"]
    told = CliRunner().invoke(app, ["data", "check", str(faulty)]).stdout
    assert told.rstrip().endswith(dataset["verdict"])


def test_a_fault_of_a_view_names_episode_and_file(faulty):
    findings = check(faulty, True, 1)
    place = 3 + list(KINDS).index("no video")
    (fault,) = findings[place].faults
    assert fault.startswith(f"{findings[place].name}: ")
    assert f"episode_{place:06d}.mp4" in fault


def test_pictures_that_are_mirrored(tmp_path):
    episodes = [Recorded(number) for number in range(4)]
    for episode in episodes:
        # Brighter at the left, so that mirrored is not the same as turned.
        episode.frames = [
            frame // 2 + np.uint8(40) * (np.arange(WIDTH) < 20)[None, :, None] for frame in episode.frames
        ]
    mirror(episodes[1])
    found = [finding.faults for finding in check(write(tmp_path / "set", episodes), True, 1)]
    assert [len(faults) for faults in found] == [0, 1, 0, 0]
    assert "lie upside down and mirrored" in found[1][0]


def test_a_gripper_that_opens_for_a_moment_is_no_fault(tmp_path):
    episodes = [Recorded(number) for number in range(4)]
    for episode in episodes:
        episode.actions[:, 3] = 0.0
    episodes[2].actions[-1, 3] = 1.0
    action = [{"columns": "0:3", "from": "action[0:3]"}, {"columns": 3, "from": "action[3:4]"}]
    dataset = write(tmp_path / "set", episodes, action=action)
    assert "action column 3 is 0 at 159 of 160 ticks" in check(dataset, True, 1)[-1].faults[0]
    action[1]["kind"] = "two_valued"
    said = write(tmp_path / "said", episodes, action=action)
    assert not any(finding.faults for finding in check(said, True, 1))


@pytest.mark.parametrize("kind", ["periodic", "step"])
def test_an_angle_of_which_it_is_said_is_no_fault(tmp_path, kind):
    episode = Recorded(0)
    wrap(episode)
    said = [
        {"columns": 0, "from": "action[0:1]"},
        {"columns": 1, "from": "action[1:2]", "kind": kind},
        {"columns": "2:4", "from": "action[2:4]"},
    ]
    (finding,) = check(write(tmp_path / "set", [episode], action=said), False, 1)
    assert finding.faults == ()


def test_special_tokens_in_a_task(tmp_path):
    tasks = ("Pick the <|object_ref_start|>cup<|object_ref_end|>.",)
    (finding,) = check(write(tmp_path / "set", [Recorded(0)], tasks=tasks), False, 1)
    assert "special token '<|object_ref_start|>'" in finding.faults[0]


def test_a_column_that_hardly_moves_is_told_of_the_dataset_as_a_whole(tmp_path):
    episodes = [Recorded(number) for number in range(4)]
    for episode in episodes:
        episode.actions[:, 3] = 1e-5 * episode.actions[:, 3]
    findings = check(write(tmp_path / "set", episodes), False, 1)
    assert [finding.faults for finding in findings[:4]] == [()] * 4
    assert findings[4].name == str(tmp_path / "set")
    assert "action column 3 has a standard deviation" in findings[4].faults[0]


def test_datasets_of_one_robot_that_lie_otherwise(tmp_path):
    checker = Checker()
    turned = [Recorded(number) for number in range(3)]
    for episode in turned:
        turn(episode)
    assert not any(f.faults for f in checker.check(write(tmp_path / "one", [Recorded(n) for n in range(3)])))
    (fault,) = checker.check(write(tmp_path / "two", turned))[-1].faults
    assert "view base: its pictures lie upside down compared with those of" in fault
