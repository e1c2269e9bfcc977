"""What a profile makes of a camera's frame, pixel for pixel against Pillow and an independent crop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from xr0_engine.robot.embodiment import View, load_embodiment
from xr0_engine.robot.preprocess import orient, smart_resize
from xr0_engine.robot.views import kept_sides

XR1 = Path(os.environ.get("XR0_GOLDEN_XR1", Path(__file__).parents[3] / "shared" / "golden_xr1")) / "pipeline"


def random_image(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def cut_by_pillow(picture, box):
    return picture.crop(box).resize(picture.size, Image.BILINEAR)


# Frame as (height, width) of each profile's views, what Pillow makes of it, and the model's tokens (spec section 3.1).
RELEASED = [
    pytest.param("libero", 0, (256, 256), lambda picture: picture.rotate(180), 64, id="libero"),
    pytest.param("calvin", 0, (200, 200), lambda p: cut_by_pillow(p, (5, 5, 195, 195)), 36, id="calvin static"),
    pytest.param("calvin", 1, (84, 84), lambda p: cut_by_pillow(p, (2, 2, 81, 81)), 9, id="calvin gripper"),
    pytest.param(
        "bridge", 0, (480, 640), lambda p: cut_by_pillow(p.resize((256, 256)), (6, 6, 249, 249)), 64, id="bridge"
    ),
    pytest.param(
        "fractal", 0, (512, 640), lambda p: cut_by_pillow(p.resize((320, 256)), (8, 6, 312, 249)), 80, id="fractal"
    ),
]


@pytest.mark.parametrize(("profile", "number", "size", "by_pillow", "tokens"), RELEASED)
def test_profiles_prepare_frames_as_the_released_evaluations(profile, number, size, by_pillow, tokens):
    view = load_embodiment(profile).views[number]
    frame = random_image(*size)
    prepared = orient(frame, view)
    np.testing.assert_array_equal(prepared, np.asarray(by_pillow(Image.fromarray(frame))))
    height, width = smart_resize(*prepared.shape[:2])
    assert height * width // 32**2 == tokens


def test_crop_is_the_golden_one():
    golden = load_file(XR1.with_suffix(".safetensors"))
    view = View("base", "Base View", center_crop=0.95)
    np.testing.assert_array_equal(orient(golden["crop.before"], view), golden["crop.after"])


def test_crop_sizes_are_the_golden_ones():
    rows = json.loads(XR1.with_suffix(".json").read_text())["crop_095"]["rows"]
    assert len(rows) > 3
    for width, height, left, top, right, bottom in rows:
        frame = np.zeros((height, width, 3), np.uint8)
        assert kept_sides(frame, 0.95) == (bottom - top, right - left)


def test_order_is_turn_resize_crop():
    frame = random_image(101, 60)
    view = View("base", "Base View", rotate_180=True, center_crop=0.9, resize=(50, 31))
    turned = Image.fromarray(frame).rotate(180).resize((31, 50), Image.BICUBIC)
    # 0.9 of 31 columns is 27.9: 27 are kept, 4 go, 2 on each side.
    np.testing.assert_array_equal(orient(frame, view), np.asarray(cut_by_pillow(turned, (2, 2, 29, 47))))


def test_odd_margin_leaves_the_larger_half_below_and_to_the_right():
    frame = random_image(7, 11)
    view = View("base", "Base View", center_crop=0.9)
    np.testing.assert_array_equal(orient(frame, view), np.asarray(cut_by_pillow(Image.fromarray(frame), (1, 0, 10, 6))))


def test_view_that_prepares_nothing_copies_nothing():
    frame = random_image(8, 8)
    assert orient(frame, View("base", "Base View")) is frame
    assert np.shares_memory(orient(frame, View("base", "Base View", rotate_180=True)), frame)


@pytest.mark.parametrize("cut", [np.s_[::-1, ::-1], np.s_[::2, 1::3], np.s_[:, :, ::-1]], ids=str)
def test_strides_change_nothing(cut):
    frame = random_image(60, 60)[cut]
    view = View("base", "Base View", center_crop=0.9, resize=(40, 40))
    np.testing.assert_array_equal(orient(frame, view), orient(frame.copy(), view))


def test_something_is_kept_of_the_smallest_frame():
    frame = random_image(1, 1)
    np.testing.assert_array_equal(orient(frame, View("base", "Base View", center_crop=0.1)), frame)
