"""Colour alike in all views, a crop of each, and nothing left to chance but rng."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from xr0_engine.training.data import augment as module
from xr0_engine.training.data.augment import augment, recolor

# Pillow rounds after every step, and its mean grey to a whole number.
PILLOW_ROUNDING = 2


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("factors", [(1.1, 1, 1), (1, 0.6, 1), (1, 1, 1.4), (0.9, 1.5, 0.5)], ids=str)
def test_colour_is_pillow_s(image, factors):
    expected = Image.fromarray(image)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        expected = enhance(expected).enhance(factor)
    difference = recolor(image, *factors).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= PILLOW_ROUNDING


def test_factor_one_is_the_image(image):
    assert recolor(image, 1, 1, 1) is image


def test_depends_on_rng_alone_and_keeps_sizes(image):
    images = {"ego": image, "wrist": image[:20, :30]}
    first, second, other = (augment(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for view in images:
        assert (first[view].shape, first[view].dtype) == (images[view].shape, np.uint8)
        np.testing.assert_array_equal(first[view], second[view])
        assert not np.array_equal(first[view], other[view])


def test_colour_is_shared_by_the_views(image, monkeypatch):
    factors = []
    monkeypatch.setattr(module, "recolor", lambda image, *f: factors.append(f) or image)
    for seed in range(200):
        augment({"ego": image, "wrist": image}, np.random.default_rng(seed))
    drawn = np.array(factors).reshape(200, 2, 3)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    changed = drawn[:, 0] != 1
    # Half of 200, give or take five standard deviations of 7.
    assert ((changed.sum(axis=0) > 65) & (changed.sum(axis=0) < 135)).all()
    spans = np.array([module.BRIGHTNESS, module.CONTRAST, module.SATURATION])
    assert ((drawn >= spans[:, 0]) & (drawn <= spans[:, 1])).all()


def test_crop_keeps_95_percent_of_each_side():
    """A ramp from 0 to 255 over 100 columns: what is left of it spans 95 of them."""
    ramp = np.broadcast_to(np.linspace(0, 255, 100)[None, :, None], (100, 100, 3)).astype(np.uint8)
    spans = []
    for seed in range(30):
        cropped = module._crop(ramp, np.random.default_rng(seed))(ramp).astype(int)
        spans.append((cropped[50, 0, 0], cropped[50, -1, 0]))
    assert {round((last - first) / 255 * 99) + 1 for first, last in spans} <= {94, 95, 96}
    assert len({first for first, _ in spans}) > 3


def test_centre_crop_becomes_a_crop_of_its_size_at_a_random_place(monkeypatch):
    """0.9 of 84 is 75.6: 75 are kept, at one of 10 x 10 places, and enlarged as a centre crop is."""
    monkeypatch.setattr(module, "PROBABILITY", 0.0)
    frame = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
    picture = Image.fromarray(frame)
    parts = {
        np.asarray(picture.crop((left, top, left + 75, top + 75)).resize((84, 84), Image.BILINEAR)).tobytes()
        for left in range(10)
        for top in range(10)
    }
    seen = {
        augment({"base": frame}, np.random.default_rng(seed), {"base": 0.9})["base"].tobytes() for seed in range(30)
    }
    assert seen <= parts
    assert len(seen) > 10


def test_view_without_a_centre_crop_is_cropped_as_ever(image):
    """One view's crop does not change what another draws."""
    images = {"ego": image, "wrist": image}
    first, second = (augment(images, np.random.default_rng(1), crops) for crops in (None, {"wrist": 0.95}))
    np.testing.assert_array_equal(first["ego"], second["ego"])
