"""xr0_engine._C against a plain NumPy restatement, bit for bit."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

PATCH, TEMPORAL, MERGE = 16, 2, 2
PATCH_DIM = 3 * TEMPORAL * PATCH * PATCH


@pytest.fixture(scope="module")
def native():
    return pytest.importorskip("xr0_engine._C", reason="xr0_engine._C was not built: see `xr0 doctor`")


def restated(frame, patch=PATCH, temporal=TEMPORAL, merge=MERGE):
    """(H, W, 3) uint8 -> (patches, patch_dim) float32, one patch at a time."""
    scaled = (frame.astype(np.float64) * (1 / 255)).astype(np.float32)
    values = (scaled - np.float32(0.5)) / np.float32(0.5)
    rows, columns = frame.shape[0] // patch, frame.shape[1] // patch
    patches = [
        values[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].transpose(2, 0, 1)
        for block_y in range(0, rows, merge)
        for block_x in range(0, columns, merge)
        for y in range(block_y, block_y + merge)
        for x in range(block_x, block_x + merge)
    ]
    return np.repeat(np.stack(patches)[:, :, None], temporal, axis=2).reshape(rows * columns, -1)


def random_frame(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def poisoned_out(height, width):
    return np.full((height * width // PATCH**2, PATCH_DIM), np.nan, np.float32)


@pytest.mark.skipif(
    shutil.which("c++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="no C++ compiler or no Python headers: the package works without _C here",
)
def test_module_is_built_where_a_compiler_is_present():
    assert importlib.util.find_spec("xr0_engine._C") is not None


@pytest.mark.parametrize(
    ("height", "width"),
    [(32, 32), (32, 320), (256, 32), (256, 256), (256, 320), (288, 288)],
    ids=str,
)
def test_patches_are_bit_identical(native, height, width):
    frame, out = random_frame(height, width, 3), poisoned_out(height, width)
    native.frame_to_patches(frame, out)
    np.testing.assert_array_equal(out, restated(frame))


def test_every_pixel_value_is_bit_identical(native):
    frame = np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)
    assert np.unique(frame).size == 256
    out = poisoned_out(32, 32)
    native.frame_to_patches(frame, out)
    np.testing.assert_array_equal(out, restated(frame))


@pytest.mark.parametrize(("patch", "temporal", "merge"), [(14, 2, 2), (16, 1, 2), (8, 3, 1), (16, 2, 3)], ids=str)
def test_other_layouts(native, patch, temporal, merge):
    frame = random_frame(2 * patch * merge, 3 * patch * merge, 3)
    expected = restated(frame, patch, temporal, merge)
    out = np.full(expected.shape, np.nan, np.float32)
    native.frame_to_patches(frame, out, patch_size=patch, temporal_patch_size=temporal, merge_size=merge)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda frame: frame[:, 32:96], id="crop"),
        pytest.param(lambda frame: frame[::2], id="every second row"),
        pytest.param(lambda frame: frame[::-1], id="upside down"),
        pytest.param(lambda frame: np.broadcast_to(frame[:1], frame.shape), id="one row repeated"),
    ],
)
def test_any_row_stride(native, view):
    frame = view(random_frame(128, 128, 3))
    assert frame.strides[1:] == (3, 1)
    out = poisoned_out(*frame.shape[:2])
    native.frame_to_patches(frame, out)
    np.testing.assert_array_equal(out, restated(frame))


FRAME = random_frame(64, 32, 3)
OUT_SHAPE = (8, PATCH_DIM)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("frame", "out", "message"),
    [
        pytest.param(FRAME.astype(np.float32), OUT_SHAPE, "frame: expected uint8 .* got float32", id="dtype"),
        pytest.param(FRAME[..., 0], OUT_SHAPE, "frame: expected uint8 .* got uint8 \\(64, 32\\)", id="grey"),
        pytest.param(random_frame(64, 32, 4), OUT_SHAPE, "got uint8 \\(64, 32, 4\\)", id="four channels"),
        pytest.param(random_frame(3, 64, 32), OUT_SHAPE, "got uint8 \\(3, 64, 32\\)", id="channels first"),
        pytest.param(FRAME[:48], OUT_SHAPE, "multiples of 32, got \\(48, 32, 3\\)", id="height"),
        pytest.param(FRAME[:, :0], OUT_SHAPE, "multiples of 32, got \\(64, 0, 3\\)", id="empty"),
        pytest.param(FRAME[:, ::-1], OUT_SHAPE, "packed pixels .* got strides \\(96, -3, 1\\)", id="mirrored"),
        pytest.param(FRAME[..., ::-1], OUT_SHAPE, "packed pixels .* got strides \\(96, 3, -1\\)", id="BGR view"),
        pytest.param(FRAME, (7, PATCH_DIM), "out: expected .* got float32 \\(7, 1536\\)", id="out rows"),
        pytest.param(FRAME, (8 * PATCH_DIM,), "out: expected .* got float32 \\(12288,\\)", id="out flat"),
        pytest.param(FRAME, np.zeros(OUT_SHAPE), "out: expected float32 .*, got float64 \\(8, 1536\\)", id="out dtype"),
        pytest.param(FRAME, np.zeros(OUT_SHAPE, ">f4"), "out: expected float32 .*, got >f4", id="out byte order"),
        pytest.param(FRAME, np.zeros(OUT_SHAPE, np.float32, "F"), "out: expected .* C-contiguous", id="out order"),
        pytest.param(
            FRAME,
            np.zeros(8 * PATCH_DIM * 4 + 1, np.uint8)[1:].view(np.float32).reshape(OUT_SHAPE),
            "out: expected an aligned",
            id="out unaligned",
        ),
        pytest.param(FRAME, read_only(np.zeros(OUT_SHAPE, np.float32)), "out: expected a writable", id="out read-only"),
    ],
)
def test_bad_arrays_are_refused(native, frame, out, message):
    if isinstance(out, tuple):
        out = np.full(out, np.nan, np.float32)
    before = out.copy()
    with pytest.raises(ValueError, match=message):
        native.frame_to_patches(frame, out)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize("name", ["patch_size", "temporal_patch_size", "merge_size"])
@pytest.mark.parametrize("value", [0, -16, 1025])
def test_bad_sizes_are_refused(native, name, value):
    with pytest.raises(ValueError, match=f"{name}: expected 1 to 1024, got {value}"):
        native.frame_to_patches(FRAME, np.zeros(OUT_SHAPE, np.float32), **{name: value})
