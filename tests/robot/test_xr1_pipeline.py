"""XR-1's surroundings against the golden file: prompts, sizes, crops, videos, states, quaternions, anchoring."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support import ROOT
from xr0_engine.executor import Synchronizer
from xr0_engine.part_configs import VisionConfig
from xr0_engine.robot import mobile, patches
from xr0_engine.robot.decode import decode, encode_prefix, quaternion_log
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.history import FrameHistory, History
from xr0_engine.robot.layouts import MOBILE, ROBODOJO
from xr0_engine.robot.limits import POST_TRAINING_LIMITS, RELEASED_LIMITS
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import images_to_patches, smart_resize
from xr0_engine.robot.quantiles import StateStatistics
from xr0_engine.robot.templates import build_prompt
from xr0_engine.robot.views import cut_out, kept_sides
from xr0_engine.types import Observation, RobotInfo

GOLDEN = Path(os.environ.get("XR0_GOLDEN_XR1", ROOT.parent / "shared" / "golden_xr1")) / "pipeline"

FLOAT64 = 1e-12
"""Of values up to some hundred in float64, after a dozen operations in another order."""

PIXELS = 1e-7
"""The file has x / 127.5 - 1 in one rounding, the processor and we (x / 255 - 0.5) / 0.5."""

needs_golden = pytest.mark.skipif(not GOLDEN.with_suffix(".json").is_file(), reason=f"{GOLDEN}.json is not there")


@cache
def told():
    return json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))


@cache
def tensors():
    return load_file(GOLDEN.with_suffix(".safetensors"))


def part(name):
    return {key.removeprefix(f"{name}."): value for key, value in tensors().items() if key.startswith(f"{name}.")}


@needs_golden
@pytest.mark.parametrize(
    ("prompt", "profile"),
    [
        ("post_training", "mobile"),
        ("post_training", "robodojo"),
        ("robocasa", "robocasa"),
        ("vlabench", "vlabench"),
        ("robocasa365", "robocasa365"),
    ],
)
def test_prompts_byte_for_byte(prompt, profile):
    embodiment = load_embodiment(profile)
    titles, form = [view.title for view in embodiment.views], embodiment.prompt_form(2)
    # The file has two tokens for each picture of a video, one for a still picture.
    counts = [1 if len(form.stamps) == 1 else 2] * len(titles) * len(form.stamps)
    assert build_prompt(titles, counts, told()["instruction"], form) == told()["prompts"][prompt]


@needs_golden
@pytest.mark.parametrize(
    ("table", "limits"), [("resize_min3136_max160000", POST_TRAINING_LIMITS), ("resize_max90000", RELEASED_LIMITS)]
)
def test_sizes_are_the_processors(table, limits):
    rows = told()[table]
    for height, width, *expected in rows["rows"] if isinstance(rows, dict) else rows:
        assert smart_resize(height, width, 32, limits) == tuple(expected), (height, width)


@needs_golden
def test_crops_are_truncated_and_lie_in_the_middle():
    for width, height, left, top, right, bottom in told()["crop_095"]["rows"]:
        kept_height, kept_width = kept_sides(np.empty((height, width, 3), np.uint8), 0.95)
        assert (kept_height, kept_width) == (bottom - top, right - left)
        assert ((height - kept_height) // 2, (width - kept_width) // 2) == (top, left)


@needs_golden
def test_a_crop_is_brought_back_to_its_size():
    before = part("crop")["before"]
    height, width = kept_sides(before, 0.95)
    found = cut_out(before, (before.shape[0] - height) // 2, (before.shape[1] - width) // 2, height, width)
    np.testing.assert_array_equal(found, part("crop")["after"])


@needs_golden
def test_a_history_takes_the_frames_of_the_released_rule():
    rule = load_embodiment("robocasa365").history
    assert rule.span == 7
    for seen, expected in told()["robocasa365_history"]["rows"]:
        assert rule.places(min(seen, rule.span)) == expected
        history = History(rule)
        for step in range(seen):
            image = np.full((2, 2, 3), step, np.uint8)
            history.push(Observation({"base": image}, "go", np.zeros(3, np.float32)))
        shown = history.observe().images["base"][:, 0, 0, 0].tolist()
        assert shown == [place + max(0, seen - rule.span) for place in expected]


@needs_golden
@pytest.mark.parametrize("path", ["native", "pillow"])
def test_a_videos_patches(path, monkeypatch):
    if path == "pillow":
        monkeypatch.setattr(patches, "native", "hidden by the test")
    elif patches.native:
        pytest.skip(patches.native)
    frames, expected = part("video")["frames"], part("video")["patches"]
    vision = VisionConfig(1, 64, 1, 64, 64, 16, 2, 2, 3, 16, ())
    found, grids = images_to_patches([frames[:2], frames[2:]], vision)
    temporal, height, width = part("video")["grid"].tolist()
    assert grids == ((height, width),) * temporal
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=PIXELS)


@needs_golden
def test_states_by_quantiles():
    state = part("state")
    statistics = StateStatistics("post_training", state["q01"], state["q99"])
    found = statistics.normalize(state["raw"])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, state["normalised"], rtol=0, atol=FLOAT64)
    still = state["q99"] <= state["q01"]
    assert still.any()
    assert (found[still] == 0).all()
    assert np.abs(found).max() == 1


@needs_golden
def test_quaternions():
    quaternion = part("quaternion")
    np.testing.assert_allclose(quaternion_log(quaternion["xyzw"]), quaternion["axis_angle"], rtol=0, atol=FLOAT64)


def poses(rows):
    anchored = part("anchor")
    arms = (
        mobile.MobileArm(*(anchored[f"{side}.{name}"][rows] for name in ("position", "rotation", "gripper")))
        for side in ("left", "right")
    )
    return mobile.MobilePose(*arms, anchored["waist"][rows], anchored["base_velocity"][rows])


@needs_golden
def test_anchoring():
    origin, targets, expected = poses(0), poses(slice(1, None)), part("anchor")["actions"]
    found = mobile.anchor(targets, origin, mobile.MOBILE)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64)
    back = mobile.recover(found, origin, mobile.MOBILE)
    for side in ("left", "right"):
        for name in ("position_m", "rotation", "gripper"):
            ours, theirs = getattr(getattr(back, side), name), getattr(getattr(targets, side), name)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(back.waist, targets.waist, rtol=0, atol=FLOAT64)
    # Never a difference.
    np.testing.assert_array_equal(back.base_velocity, targets.base_velocity)
    np.testing.assert_array_equal(found[:, 17:20], part("anchor")["base_velocity"][1:])


@needs_golden
def test_normalisation_in_float64_and_back():
    anchored = part("anchor")
    statistics = ActionStatistics(anchored["mean"], anchored["std"], 1e-6, MOBILE.active_columns)
    found = encode_prefix(anchored["actions"], statistics)
    # Rounded once, at the end.
    np.testing.assert_array_equal(found, anchored["normalised"].astype(np.float32))
    np.testing.assert_array_equal(decode(anchored["normalised"], statistics), anchored["actions"].astype(np.float32))


def test_robodojo_has_absolute_grippers_elsewhere():
    assert ROBODOJO.active_columns == (*range(6), 7, *range(8, 14), 15)
    assert MOBILE.active_columns == (*range(7), *range(8, 15), 16, 17, 18, 19)
    arm = mobile.MobileArm(np.zeros(3), np.eye(3), np.array([0.25]))
    targets = mobile.MobileArm(np.ones((2, 3)), np.stack([np.eye(3)] * 2), np.array([[0.5], [0.75]]))
    origin, path = mobile.MobilePose(arm, arm), mobile.MobilePose(targets, targets, base_velocity=np.ones((2, 3)))
    actions = mobile.anchor(path, origin, mobile.ROBODOJO)
    assert actions[:, 7].tolist() == actions[:, 15].tolist() == [0.5, 0.75]
    assert not actions[:, [6, 14, 16, 17, 18, 19]].any()
    assert mobile.anchor(path, origin, mobile.MOBILE)[:, 6].tolist() == [0.25, 0.5]
    assert mobile.recover(actions, origin, mobile.ROBODOJO).right.gripper.tolist() == [[0.5], [0.75]]


def test_end_effector_frames_are_rotations_and_undone():
    rotation = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0], [0.48, 0.64, 0.6]])
    for robot, turn in mobile.END_EFFECTOR_FRAMES.items():
        assert np.linalg.det(turn) == pytest.approx(1)
        there = mobile.to_model_frame(rotation, robot)
        np.testing.assert_allclose(mobile.from_model_frame(there, robot), rotation, rtol=0, atol=FLOAT64)
    # About z by -90 and 180 degrees (spec section 8).
    assert mobile.END_EFFECTOR_FRAMES["piper_x"][:2, :2].tolist() == [[0, 1], [-1, 0]]
    assert mobile.END_EFFECTOR_FRAMES["piper"][:2, :2].tolist() == [[-1, 0], [0, -1]]


def test_robodojos_states_pass_where_they_stand_still():
    q01, q99 = np.array([-1.0, 2.0, 0.0]), np.array([3.0, 2.0, 1e-7])
    statistics = StateStatistics("robodojo", q01, q99)
    found = statistics.normalize(np.array([[9.0, 5.0, 4.0], [1.0, 2.0, 3.0]]))
    # The range is 4 + 1e-6; not clipped.
    np.testing.assert_allclose(
        found, [[2 * 10 / (4 + 1e-6) - 1, 5, 4], [4 / (4 + 1e-6) - 1, 2, 3]], rtol=0, atol=FLOAT64
    )
    by_mean = StateStatistics("robodojo", q01, q99, np.array([0, 1.0, 0]), np.array([1.0, 2.0, 0]), by_mean=(1, 2))
    np.testing.assert_allclose(
        by_mean.normalize(np.array([1.0, 5.0, 4.0])), [4 / (4 + 1e-6) - 1, 4 / (2 + 1e-6), 4], rtol=0, atol=FLOAT64
    )


def test_several_states_without_a_history_have_no_stride():
    told = RobotInfo(10, 20, 10, ("base",), "plain", state_length=3)
    with pytest.raises(ValueError, match=r"state_length: the policy takes 3 states .*FrameHistory\(1, STRIDE\), 3"):
        History.of(told)
    with pytest.raises(ValueError, match="state_length: the policy takes 3 states"):
        Synchronizer(["base"], "go", None, robot=told)
    history = History(FrameHistory(1, 5), state_length=3)
    for step in range(11):
        history.push(Observation({"base": np.zeros((2, 2, 3), np.uint8)}, "go", np.full(2, step, np.float32)))
    assert history.observe().state[:, 0].tolist() == [0, 5, 10]
    # Where there are frames, states are as far apart.
    assert History.of(replace(told, history=(4, 2))).frames == FrameHistory(4, 2)


def test_a_history_repeats_its_oldest_and_is_forgotten():
    history = History(FrameHistory(4, 2), state_length=4)
    with pytest.raises(RuntimeError, match="history: nothing was pushed"):
        history.observe()
    for step in range(4):
        state = np.full(2, step, np.float32)
        history.push(Observation({"base": np.full((2, 3, 3), step, np.uint8)}, "go", state, timestamp_s=step / 20))
    shown = history.observe()
    assert shown.images["base"].shape == (4, 2, 3, 3)
    assert shown.images["base"][:, 0, 0, 0].tolist() == shown.state[:, 0].tolist() == [0, 0, 1, 3]
    assert shown.timestamp_s == 3 / 20
    with pytest.raises(ValueError, match="expected the views and sizes of the one before"):
        history.push(Observation({"base": np.zeros((3, 3, 3), np.uint8)}, "go", np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match=r"images\['base'\]: expected one picture"):
        history.push(Observation({"base": np.zeros((4, 2, 3, 3), np.uint8)}, "go", np.zeros(2, np.float32)))
    history.reset()
    assert len(history) == 0
    history.push(Observation({"base": np.zeros((3, 3, 3), np.uint8)}, "go", np.zeros(2, np.float32)))
    assert history.observe().images["base"].shape == (4, 3, 3, 3)


def test_without_a_history_the_picture_is_given_as_it_came():
    history = History(FrameHistory(1, 1))
    observation = Observation({"base": np.zeros((2, 3, 3), np.uint8)}, "go", np.zeros(2, np.float32))
    history.push(observation)
    assert history.observe().images["base"] is observation.images["base"]
    assert history.observe().state is observation.state
