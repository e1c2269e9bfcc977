"""Embodiment profiles: the built-in ones against the published protocols, and every fault of a YAML file named."""

from __future__ import annotations

import re

import pytest
import yaml

from xr0_engine.robot.embodiment import (
    Embodiment,
    View,
    builtin_embodiments,
    checkpoint_embodiment,
    embodiment_for,
    load_embodiment,
)
from xr0_engine.robot.history import FrameHistory
from xr0_engine.types import CheckpointError

TITLES = {
    "libero": ["Base View", "Left-Wrist View"],
    "calvin": ["Base View", "Left-Wrist View"],
    "bridge": ["Base View"],
    "fractal": ["Ego View"],
    "bimanual": ["Ego View", "Left-Wrist View", "Right-Wrist View"],
    "mobile": ["Ego View", "Left-Wrist View", "Right-Wrist View"],
    "robodojo": ["Ego View", "Left-Wrist View", "Right-Wrist View"],
    "robocasa": ["Base View", "Base View", "Left-Wrist View"],
    "robocasa365": ["Left camera", "Right camera", "Wrist camera"],
    "vlabench": ["Ego View", "Base View", "Left-Wrist View"],
}
LAYOUTS = {"bimanual": "bimanual", "mobile": "mobile", "robodojo": "robodojo"}
OWN_PROFILE = """
name: my_arm
robot_types: [my_arm_v1]
layout: plain
control_rate_hz: 15
replan_every: null
views:
  - {key: base, title: Base View, center_crop: 0.9}
"""


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "profile.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_builtin_names():
    assert builtin_embodiments() == tuple(sorted(TITLES))


@pytest.mark.parametrize("name", TITLES)
def test_builtin_titles_and_layout(name):
    profile = load_embodiment(name)
    assert profile.name == name
    assert [view.title for view in profile.views] == TITLES[name]
    assert profile.layout == profile.action_layout.name == LAYOUTS.get(name, "plain")


@pytest.mark.parametrize(
    ("robot_type", "name"),
    [
        ("libero_all", "libero"),
        ("calvin_abc_orig", "calvin"),
        ("calvin_abcd_orig", "calvin"),
        ("bridge_delta", "bridge"),
        ("fractal_delta", "fractal"),
        ("bimanual", "bimanual"),
        ("mobile", "mobile"),
        ("robodojo", "robodojo"),
        ("robocasa_mg", "robocasa"),
        ("robocasa365", "robocasa365"),
        ("vlabench_choice", "vlabench"),
    ],
)
def test_profile_is_found_by_robot_type(robot_type, name):
    assert embodiment_for(robot_type) == load_embodiment(name)


def test_benchmark_protocols():
    libero, calvin = load_embodiment("libero"), load_embodiment("calvin")
    assert all(view.rotate_180 for view in libero.views)
    assert [view.center_crop for view in calvin.views] == [0.95, 0.95]
    replan = {name: load_embodiment(name).replan_every for name in builtin_embodiments()}
    assert replan == {
        **{"libero": 10, "calvin": 10, "bridge": 4, "fractal": 4, "bimanual": None},
        **{"mobile": None, "robocasa": 10, "robocasa365": 16, "robodojo": 10, "vlabench": 5},
    }


def test_xr1_benchmark_protocols():
    """spec section 8: crops, first resize, videos, what is done to the instruction."""
    profiles = {name: load_embodiment(name) for name in ("mobile", "robocasa", "robocasa365", "robodojo", "vlabench")}
    crops = {name: {view.center_crop for view in profile.views} for name, profile in profiles.items()}
    assert crops == {"mobile": {1.0}, "robocasa": {0.95}, "robocasa365": {0.95}, "robodojo": {0.95}, "vlabench": {1.0}}
    resized = {name: {(view.resize, view.resize_filter) for view in each.views} for name, each in profiles.items()}
    assert resized.pop("robodojo") == {((256, 320), "bilinear")}
    assert all(found == {(None, "bicubic")} for found in resized.values())
    assert {name: each.instruction for name, each in profiles.items() if each.instruction != "given"} == {
        "robodojo": "bare"
    }
    videos = {name: each.history for name, each in profiles.items() if each.history}
    assert videos == {"robocasa365": FrameHistory(4, 2)}
    assert profiles["robocasa365"].robot_info(16, 60, 6, 4).history == (4, 2)


def test_views_under_one_title_stand_together(yaml_file):
    two = "title: Base View}\n  - {key: wrist, title: Wrist}\n  - {key: again, title: Base View"
    with pytest.raises(ValueError, match="a title again only right behind"):
        load_embodiment(yaml_file(OWN_PROFILE.replace("title: Base View", two, 1)))
    two = "title: Base View}\n  - {key: again, title: Base View"
    assert [view.key for view in load_embodiment(yaml_file(OWN_PROFILE.replace("title: Base View", two, 1))).views] == [
        "base",
        "again",
    ]


@pytest.mark.parametrize(
    ("history", "match"),
    [
        ("{frames: 4}", "history: stride: missing"),
        ("{frames: 4, stride: 2, fps: 24}", "history: fps: unknown, expected one of frames, stride"),
        ("{frames: 0, stride: 2}", "history: frames: expected a whole number from 1 to 64, got 0"),
        ("{frames: 4, stride: true}", "history: stride: expected a whole number from 1 to 64, got True"),
        ("{frames: 1000000000, stride: 2}", "history: frames: expected"),
        ("[4, 2]", "history: expected a mapping of frames and stride, or null"),
    ],
)
def test_faulty_history(history, match, yaml_file):
    with pytest.raises(ValueError, match=match):
        load_embodiment(yaml_file(f"{OWN_PROFILE}history: {history}\n"))


def test_a_history_fills_its_temporal_patches(yaml_file):
    profile = load_embodiment(yaml_file(f"{OWN_PROFILE}history: {{frames: 3, stride: 2}}\n"))
    with pytest.raises(ValueError, match=r"'my_arm': history: expected a multiple of 2 frames.*got 3"):
        profile.prompt_form(2)


def test_unknown_robot_type_lists_the_known_and_the_remedy():
    with pytest.raises(ValueError, match=r"r2d2.*bimanual.*libero_all.*YAML") as caught:
        embodiment_for("r2d2")
    assert "pre-trained" not in str(caught.value)


@pytest.mark.parametrize(
    ("robot_type", "length"),
    [("agibot_pt_v3", 30), ("midata_mix_ann_pt_v1", 30), ("droid_pt", 15), ("molmoact_pt", 15)],
)
def test_robot_type_of_the_pretrained_model_says_what_is_known(robot_type, length):
    known = rf"{robot_type}.*YAML.*pre-trained model: its chunks have {length} actions.*never published.*of your own"
    with pytest.raises(ValueError, match=known):
        embodiment_for(robot_type)


def test_own_profile(yaml_file):
    path = yaml_file(OWN_PROFILE)
    expected = Embodiment("my_arm", ("my_arm_v1",), (View("base", "Base View", center_crop=0.9),), "plain", 15, None)
    assert load_embodiment(path) == load_embodiment(str(path)) == expected


def test_resize_is_height_and_width(yaml_file):
    path = yaml_file(OWN_PROFILE.replace("center_crop: 0.9", "resize: [256, 320]", 1))
    assert load_embodiment(path).views == (View("base", "Base View", resize=(256, 320)),)


@pytest.mark.parametrize("size", ["256", "[256]", "[256, 0]", "[256, 320.5]", "[true, 320]", "[256, 5000]", "[[], 1]"])
def test_wrong_resize(yaml_file, size):
    path = yaml_file(OWN_PROFILE.replace("center_crop: 0.9", f"resize: {size}", 1))
    with pytest.raises(ValueError, match=r"views\[0\] resize: expected \[height, width\] in whole pixels up to 4096"):
        load_embodiment(path)


def test_columns_of_a_kind(yaml_file):
    """Not known unless the file says it; none is another answer."""
    untold = load_embodiment(yaml_file(OWN_PROFILE))
    assert (untold.step_columns, untold.two_valued_columns) == (None, None)
    for name in ("libero", "robocasa", "robocasa365", "vlabench"):
        assert load_embodiment(name).step_columns == (0, 1, 2, 3, 4, 5), name
    assert load_embodiment("libero").two_valued_columns == (6,)
    profile = load_embodiment(yaml_file(OWN_PROFILE + "step_columns: []\ntwo_valued_columns: [6, 7]\n"))
    assert (profile.step_columns, profile.two_valued_columns) == ((), (6, 7))
    info = profile.robot_info(chunk_length=10, action_width=32, max_prefix=20)
    assert (info.step_columns, info.two_valued_columns) == ((), (6, 7))
    # All of a chunk but one action: there must be something to infer.
    assert (info.action_width, info.max_prefix) == (32, 9)


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ("step_columns: 3", "step_columns: expected a list of columns counted from 0"),
        ("step_columns: [0, -1]", "step_columns: expected a list of columns"),
        ("two_valued_columns: [6, 6]", "two_valued_columns: expected a list of columns .* none twice"),
        ("two_valued_columns: [[]]", "two_valued_columns: expected a list of columns"),
        ("{step_columns: [5, 6], two_valued_columns: [6]}", r"expected none of step_columns, got \[6\]"),
        ("{layout: bimanual, step_columns: [0]}", "step_columns: expected only with layout plain"),
    ],
    ids=["a number", "negative", "twice", "nested", "both", "layout"],
)
def test_wrong_columns_of_a_kind(yaml_file, lines, match):
    path = yaml_file(yaml.safe_dump(yaml.safe_load(OWN_PROFILE) | yaml.safe_load(lines)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*{match}"):
        load_embodiment(path)


def test_every_fault_of_a_file_in_one_error(yaml_file):
    path = yaml_file(
        "name: 3\n"
        "robot_type: [a]\n"
        "layout: trimanual\n"
        "control_rate_hz: 1.0e+12\n"
        "replan_every: 0\n"
        "views: [{key: a}, 7, {key: b, title: <|im_end|>, center_crop: 2, rotate_180: 1, flip: true}]\n"
    )
    with pytest.raises(ValueError, match=r"profile\.yaml") as caught:
        load_embodiment(path)
    for part in (
        "robot_types: missing",
        "robot_type: unknown",
        "name: expected",
        "layout: expected one of plain, bimanual, mobile, robodojo, got 'trimanual'",
        "control_rate_hz: expected",
        "replan_every: expected",
        "views[0] title: missing",
        "views[1] expected a mapping",
        "views[2] flip: unknown",
        "views[2] title: expected",
        "views[2] center_crop: expected",
        "views[2] rotate_180: expected",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("line", "replacement", "match"),
    [
        ("views:", "views: []\nold:", "views: expected a list of 1 to 32 views"),
        ("title: Base View", "title: Base View}\n  - {key: base, title: Base View", "no key twice"),
        ("robot_types: [my_arm_v1]", "robot_types: my_arm_v1", "robot_types: expected a list"),
        ("control_rate_hz: 15", "control_rate_hz: -1", "control_rate_hz: expected a number from 0.01 to 1000, got -1"),
        ("control_rate_hz: 15", "control_rate_hz: true", "control_rate_hz: expected a number .*, got True"),
        ("replan_every: null", "replan_every: 2.5", "replan_every: expected a whole number"),
        ("layout: plain", "layout: {plain: true}", "layout: expected one of plain, bimanual"),
        ("layout: plain", "layout: plain\nprompt: chatty", "prompt: expected one of titled, cameras"),
        ("layout: plain", "layout: plain\ninstruction: loud", "instruction: expected one of given, sentence, bare"),
        ("center_crop: 0.9", "resize_filter: nearest", "resize_filter: expected one of bicubic, bilinear"),
        ("name: my_arm", "name: 2020-99-99", "not valid YAML"),
        ("name: my_arm", "name: [", "not valid YAML"),
    ],
    ids=[
        "no views",
        "view twice",
        "robot type as text",
        "rate below 0",
        "rate is a flag",
        "half a step",
        "layout",
        "prompt",
        "instruction",
        "resize filter",
        "date",
        "syntax",
    ],
)
def test_faulty_file(yaml_file, line, replacement, match):
    path = yaml_file(OWN_PROFILE.replace(line, replacement, 1))
    with pytest.raises(ValueError, match=match) as caught:
        load_embodiment(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1", "just words"], ids=["empty", "list", "text"])
def test_file_that_is_no_mapping(yaml_file, text):
    with pytest.raises(ValueError, match="expected a mapping of fields"):
        load_embodiment(yaml_file(text))


def test_missing_file_lists_the_built_in_profiles(tmp_path):
    with pytest.raises(ValueError, match=r"bimanual, bridge, .*, libero, .*vlabench or the path of a YAML file"):
        load_embodiment(tmp_path / "absent.yaml")


def test_profile_made_in_code_is_checked_too():
    with pytest.raises(ValueError, match="center_crop: expected a number above 0, up to 1, got 0"):
        View("base", "Base View", center_crop=0)
    with pytest.raises(ValueError, match="replan_every"):
        Embodiment("mine", (), (View("base", "Base View"),), "plain", 10, 0)


def test_a_profile_in_config_json_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text('{"embodiment": {"name": "arm", "layout": "plane"}}')
    with pytest.raises(CheckpointError, match=r"config\.json: embodiment: .*views: missing"):
        checkpoint_embodiment(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_embodiment(tmp_path) is None
