"""The released episode format."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from tests.training.data.fixtures import frame_number, write_episode, write_video
from xr0_engine.training.data.check import check
from xr0_engine.training.data.episode import DIGITS, arm_parts, load_episode, save_episode
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source

# Half of the last digit written, and the rounding of a matrix's nine numbers.
WRITTEN = 0.51 * 10**-DIGITS


@pytest.fixture
def path(tmp_path):
    return write_episode(tmp_path, 0, 8, instructions=("Fold the towel.", "Fold it."))


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def test_names_are_those_of_the_format(path):
    raw = json.loads(path.read_text())
    assert set(raw) == {"trajectory_type", "num_frames", "instruction", "observations", "proprios", "actions"}
    assert raw["num_frames"] == 8
    assert raw["instruction"]["general"][0]["images"] == [
        "observations.ego",
        "observations.wrist_left",
        "observations.wrist_right",
    ]
    assert raw["observations"]["wrist_left"] == [
        {"path": "videos/0.left_wrist.mp4", "start": 0, "end": 8, "fps": 30.0, "crop_bbox": None}
    ]
    shapes = {key: np.shape(rows) for key, rows in raw["actions"].items()}
    sizes = {"ee_pos": 3, "ee_rotm": 9, "arm_joint": 6, "gripper_pos": 1}
    assert shapes == {f"{arm}_{name}": (8, size) for arm in ("left", "right") for name, size in sizes.items()}


def test_round_trip(path, tmp_path):
    first = load_episode(path)
    save_episode(tmp_path / "again.json", first)
    second = load_episode(tmp_path / "again.json")
    assert (second.status, second.instructions, second.clips) == (first.status, first.instructions, first.clips)
    assert second.instructions == ("Fold the towel.", "Fold it.")
    for which in ("proprios", "targets"):
        expected = arm_parts(getattr(first.motion, which))
        for key, rows in arm_parts(getattr(second.motion, which)).items():
            np.testing.assert_allclose(rows, expected[key], atol=WRITTEN, err_msg=f"{which} {key}")


def test_file_is_whole_or_absent(path, monkeypatch):
    episode, before = load_episode(path), path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        save_episode(path, episode)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("value", "task"),
    [
        ("Fold the towel.", "Fold the towel."),
        ("<image>\nFold the towel.", "Fold the towel."),
        (
            "The following observations are captured from multiple views.\n# Ego View\n<image>\n"
            "Generate robot actions for the task:\nFold the towel. /no_cot",
            "Fold the towel.",
        ),
    ],
    ids=["task", "image and task", "whole prompt"],
)
def test_instruction_of_a_human_turn(path, value, task):
    edit(path, lambda raw: raw["instruction"]["general"][0]["conversations"][0].update(value=value))
    assert load_episode(path).instructions[0] == task


def test_sub_clip_other_rate_and_crop(path, tmp_path):
    """Ticks at 30 Hz, the video at 60: tick n shows frame 10 + 2 n."""
    write_video(tmp_path / "fast.mp4", range(40), 60)
    clip = {"path": "fast.mp4", "start": 10, "end": 26, "fps": 60, "crop_bbox": [0, 4, 80, 28]}
    edit(path, lambda raw: raw["observations"].update(ego=[clip]))
    images = [load_episode(path).image("ego", tick) for tick in range(8)]
    assert [frame_number(image) for image in images] == list(range(10, 26, 2))
    assert images[0].shape == (24, 80, 3)


def test_absent_part_is_not_supervised(path):
    edit(path, lambda raw: (raw["actions"].pop("left_ee_pos"), raw["proprios"].pop("right_ee_rotm")))
    columns = load_episode(path).motion.columns
    assert np.flatnonzero(~columns).tolist() == [0, 1, 2, 13, 17, 18, 19, *range(27, 32)]


def set_nan(raw):
    raw["actions"]["right_arm_joint"][5][2] = float("nan")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda raw: raw.pop("actions"), "'actions' is missing", id="no actions"),
        pytest.param(lambda raw: raw.update(trajectory_type="failed"), "expected one of success, ongoing", id="type"),
        pytest.param(lambda raw: raw.update(num_frames=9), r"expected shape \(9, 3\), got \(8, 3\)", id="rows"),
        pytest.param(
            lambda raw: raw.update(num_frames=30), "8 frames at 30 Hz are too short for num_frames 30", id="clip"
        ),
        pytest.param(lambda raw: raw.update(num_frames="8"), "num_frames: expected a whole number", id="num_frames"),
        pytest.param(set_nan, "is not valid JSON: expected finite numbers, got NaN", id="nan"),
        pytest.param(lambda raw: raw["instruction"].update(general=[]), "at least one conversation", id="no task"),
        pytest.param(
            lambda raw: raw["instruction"]["general"][0]["conversations"][0].update(value=[{"text": "Go."}]),
            "expected a human turn with the task",
            id="task of parts",
        ),
        pytest.param(
            lambda raw: raw["proprios"].update(left_ee_rotm=[[2.0] * 9] * 8),
            "expected rotation matrices",
            id="rotation",
        ),
        pytest.param(
            lambda raw: raw["observations"]["ego"][0].update(start=4, end=4), "0 <= start < end", id="empty clip"
        ),
        pytest.param(lambda raw: raw["observations"]["ego"][0].update(fps=0), "fps: expected", id="fps"),
        pytest.param(
            lambda raw: raw["observations"]["ego"][0].update(crop_bbox=[1, 2]), "crop_bbox: expected", id="crop"
        ),
    ],
)
def test_wrong_file_names_itself_and_the_field(path, change, complaint):
    edit(path, change)
    with pytest.raises(DataError, match=rf"episode_000.json.*{complaint}"):
        load_episode(path)


@pytest.mark.parametrize("content", ["", "{", "[1]"], ids=["empty", "cut off", "a list"])
def test_no_episode(tmp_path, content):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(DataError, match=r"e\.json(: | is not valid JSON)"):
        load_episode(tmp_path / "e.json")


def test_video_from_the_working_directory(path, tmp_path, monkeypatch):
    """As the released code takes a path; one beside the JSON comes first."""
    write_video(tmp_path / "elsewhere" / "run" / "v.mp4", range(100, 108))
    edit(path, lambda raw: raw["observations"]["ego"][0].update(path="run/v.mp4"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert frame_number(load_episode(path).image("ego", 0)) == 100
    write_video(tmp_path / "run" / "v.mp4", range(200, 208))
    assert frame_number(load_episode(path).image("ego", 0)) == 200


def test_video_that_is_in_neither_place(path, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    edit(path, lambda raw: raw["observations"]["ego"][0].update(path="run/v.mp4"))
    both = rf"observations\.ego: path: expected a video at {tmp_path}/run/v\.mp4 or at {tmp_path}/elsewhere/run/v\.mp4"
    with pytest.raises(DataError, match=both):
        load_episode(path)
    (finding,) = check(tmp_path, True, 1)
    assert str(tmp_path / "run/v.mp4") in finding.faults[0]
    assert str(tmp_path / "elsewhere/run/v.mp4") in finding.faults[0]


def test_absolute_path_of_a_video(path, tmp_path):
    elsewhere = write_video(tmp_path / "elsewhere" / "v.mp4", range(100, 108))
    edit(path, lambda raw: raw["observations"]["ego"][0].update(path=str(elsewhere)))
    assert frame_number(load_episode(path).image("ego", 3)) == 103
    elsewhere.unlink()
    with pytest.raises(DataError, match=f"path: expected a video at {elsewhere}: there is none"):
        load_episode(path)


@pytest.mark.parametrize("layout", ["bimanual", "mobile"])
@pytest.mark.parametrize("rate_hz", [20, 29.97, 60])
def test_a_profile_of_another_rate_is_refused(path, layout, rate_hz):
    """The rows of a file are at 30 Hz, and nothing in it says so: every chunk would be too fast or too slow."""
    views = [{"key": view, "title": view} for view in ("ego", "left_wrist", "right_wrist")]
    profile = {"name": "mine", "robot_types": ["mine"], "layout": layout, "replan_every": None, "views": views}
    described = path.parent / "xr0.yaml"
    described.write_text(yaml.safe_dump({"robot_type": "mine", "embodiment": "mine.yaml"}))

    def at(hz: float) -> None:
        (path.parent / "mine.yaml").write_text(yaml.safe_dump({**profile, "control_rate_hz": hz}))

    at(rate_hz)
    said = (
        rf"episode_000\.json: control_rate_hz: expected 30, .*got {rate_hz:g} of embodiment 'mine': choose a profile "
        r"of 30 Hz .*LeRobot dataset"
    )
    for skip_broken in (False, True):
        with pytest.raises(DataError, match=said):
            open_source(path.parent, skip_broken)
    with pytest.raises(DataError, match=said):
        check(path.parent, fast=True, processes=1)
    at(30)
    assert open_source(path.parent).lengths == (8,)
