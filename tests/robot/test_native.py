"""xr0_engine._C against Pillow and a plain NumPy restatement, bit for bit."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from xr0_engine.robot import patches as frames

PATCH, TEMPORAL, MERGE = 16, 2, 2
PATCH_DIM = 3 * TEMPORAL * PATCH * PATCH

native = pytest.importorskip("xr0_engine._C", reason="xr0_engine._C was not built: see `xr0 doctor`")


def restated(image, size, patch=PATCH, temporal=TEMPORAL, merge=MERGE):
    """(H, W, 3) uint8 -> (patches, patch_dim) float32: Pillow's resize, then one patch at a time."""
    frame = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], Image.Resampling.BICUBIC))
    scaled = (frame.astype(np.float64) * (1 / 255)).astype(np.float32)
    values = (scaled - np.float32(0.5)) / np.float32(0.5)
    rows, columns = size[0] // patch, size[1] // patch
    patches = [
        values[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].transpose(2, 0, 1)
        for block_y in range(0, rows, merge)
        for block_x in range(0, columns, merge)
        for y in range(block_y, block_y + merge)
        for x in range(block_x, block_x + merge)
    ]
    return np.repeat(np.stack(patches)[:, :, None], temporal, axis=2).reshape(rows * columns, -1)


def poisoned(patches, patch_dim=PATCH_DIM, dtype=np.float32):
    return np.full((patches, patch_dim), np.nan, np.float32).astype(dtype)


def computed(images, sizes, **options):
    """The native patches of several images in one call, in Pillow's order of passes."""
    out = poisoned(sum(height * width for height, width in sizes) // PATCH**2)
    order = [frames.vertical_first(image.shape, size) for image, size in zip(images, sizes, strict=True)]
    native.images_to_patches(images, sizes, out, vertical_first=order, **options)
    return out


NOISE = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
VIEWS = {
    "corner": lambda image: image,
    "turned": lambda image: image[::-1, ::-1],
    "channels reversed": lambda image: image[:, :, ::-1],
    "every nth": lambda image: image[::2, ::3],
    "transposed": lambda image: image.transpose(1, 0, 2),
}


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("view", VIEWS)
def test_patches_are_pillows_over_random_sizes(view, instruction_set):
    """100 pairs of sizes for each of the 5 views: 500 for every instruction set."""
    rng = np.random.default_rng(sorted(VIEWS).index(view))
    shrunk = enlarged = by_rows = 0
    for _ in range(100):
        # Log-uniform: as many tiny images as big ones.
        height, width = np.exp(rng.uniform(0, np.log([1081, 1921]))).astype(int)
        image = VIEWS[view](NOISE[:height, 1920 - width :])
        if max(image.shape[:2]) > 200 * min(image.shape[:2]):
            continue
        size = tuple(int(side) for side in 32 * rng.integers(1, 8, 2))
        shrunk += size[1] < image.shape[1]
        enlarged += size[1] > image.shape[1]
        by_rows += frames.vertical_first(image.shape, size)
        threads = int(rng.integers(1, 4))
        found = computed([image], [size], threads=threads, instruction_set=instruction_set)
        np.testing.assert_array_equal(found, restated(image, size), err_msg=f"{image.shape} to {size}")
    assert min(shrunk, enlarged) > 10
    assert by_rows > 5 or frames.PILLOW < (13, 0)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("vertical_first", [False, True], ids=["columns first", "rows first"])
def test_passes_round_in_between(vertical_first, instruction_set):
    """Two resizes of one axis each, so that the order does not depend on the Pillow that is installed."""
    image = NOISE[:301, :257]
    once = Image.fromarray(image).resize((257, 96) if vertical_first else (128, 301), Image.Resampling.BICUBIC)
    out = poisoned(48)
    native.images_to_patches(
        [image], [(96, 128)], out, vertical_first=[vertical_first], instruction_set=instruction_set
    )
    np.testing.assert_array_equal(out, restated(np.asarray(once), (96, 128)))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((300, 300), (100, 200), False), ((301, 300), (100, 200), True), ((200, 100), (200, 200), False)],
    ids=["twice as much", "more", "not less high"],
)
def test_order_of_passes_is_that_of_pillow_13(shape, size, expected, monkeypatch):
    monkeypatch.setattr(frames, "PILLOW", (13, 0))
    assert frames.vertical_first(shape, size) is expected


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_every_pixel_value(instruction_set):
    image = np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)
    assert np.unique(image).size == 256
    found = computed([image], [(32, 32)], instruction_set=instruction_set)
    np.testing.assert_array_equal(found, restated(image, (32, 32)))


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_extremes_are_clipped_as_pillow_does(instruction_set):
    checkers = np.where(np.indices((90, 70)).sum(0)[..., None] // 5 % 2, 255, 0).astype(np.uint8).repeat(3, 2)
    for size in [(96, 96), (64, 64), (256, 320)]:
        found = computed([checkers], [size], instruction_set=instruction_set)
        np.testing.assert_array_equal(found, restated(checkers, size))


@pytest.mark.parametrize("threads", [1, 2, 3, 100])
def test_several_frames_in_one_call(threads):
    images = [NOISE[:480, :640], NOISE[:256, :256], NOISE[:1, :1], NOISE[:640, 7:487]]
    sizes = [(256, 320), (256, 256), (32, 32), (320, 256)]
    expected = np.concatenate([restated(image, size) for image, size in zip(images, sizes, strict=True)])
    np.testing.assert_array_equal(computed(images, sizes, threads=threads), expected)


def test_pillow_path_gives_the_same(monkeypatch):
    images, sizes = [NOISE[:480, :640], NOISE[:70, :50][::-1, ::-1]], [(256, 320), (64, 32)]
    both = {}
    for reason in (None, "hidden by the test"):
        monkeypatch.setattr(frames, "native", reason)
        out = torch.full((328, PATCH_DIM), torch.nan)
        both[reason] = frames.images_to_patches(images, sizes, PATCH, TEMPORAL, MERGE, out)
    assert torch.equal(*both.values())


VIDEOS = {
    "one behind the other": NOISE[:96].reshape(2, 48, 1920, 3)[:, :, :70],
    "backwards": NOISE[:96].reshape(2, 48, 1920, 3)[::-1, :, 7:77],
    "upside down": NOISE[:96].reshape(2, 48, 1920, 3)[:, ::-1, 70:0:-1],
    "channels reversed": NOISE[:96].reshape(2, 48, 1920, 3)[:, :, :70, ::-1],
    "between other frames": NOISE[:96].reshape(4, 24, 1920, 3)[::2, :, ::5],
    "the same frame twice": np.broadcast_to(NOISE[:48, :70], (2, 48, 70, 3)),
}


@pytest.mark.parametrize("instruction_set", [*native.instruction_sets(), "pillow"])
@pytest.mark.parametrize("video", VIDEOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_videos_frames_share_their_patches(dtype, video, instruction_set, monkeypatch):
    images, sizes = [NOISE[:40, :90], VIDEOS[video], NOISE[:1, :1]], [(64, 32), (32, 96), (32, 32)]
    parts = [restated(images[0], sizes[0]), None, restated(images[2], sizes[2])]
    first, second = (restated(frame, sizes[1], temporal=1).reshape(-1, 3, 1, PATCH**2) for frame in VIDEOS[video])
    parts[1] = np.concatenate([first, second], axis=2).reshape(-1, PATCH_DIM)
    expected = torch.from_numpy(np.concatenate(parts)).to(dtype)
    if instruction_set == "pillow":
        monkeypatch.setattr(frames, "native", "hidden by the test")
    else:
        one = partial(native.images_to_patches, instruction_set=instruction_set)
        monkeypatch.setattr(frames, "_C", SimpleNamespace(images_to_patches=one))
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    frames.images_to_patches(images, sizes, PATCH, TEMPORAL, MERGE, out, threads=3)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize("path", ["native", "pillow"])
def test_a_video_has_as_many_frames_as_its_patches(path, temporal, monkeypatch):
    if path == "pillow":
        monkeypatch.setattr(frames, "native", "hidden by the test")
    out = torch.empty(4, 3 * temporal * PATCH**2)
    with pytest.raises(ValueError, match=f"frames.*: expected .*{temporal}.*, got"):
        frames.images_to_patches([NOISE[:96].reshape(3, 32, 1920, 3)[:, :, :32]], [(32, 32)], 16, temporal, 2, out)


def test_no_frames_give_no_patches(monkeypatch):
    native.images_to_patches([], [], poisoned(0))
    monkeypatch.setattr(frames, "native", "hidden by the test")
    assert frames.images_to_patches([], [], PATCH, TEMPORAL, MERGE, torch.empty(0, PATCH_DIM)).shape == (0, PATCH_DIM)


def test_bgr_is_the_reversed_rgb():
    image = NOISE[:100, :90]
    expected = restated(image, (64, 96))
    np.testing.assert_array_equal(computed([image[..., ::-1].copy()], [(64, 96)], bgr=True), expected)
    np.testing.assert_array_equal(computed([image[..., ::-1]], [(64, 96)], bgr=True), restated(image, (64, 96)))


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize(
    ("patch", "temporal", "merge"), [(14, 2, 2), (16, 1, 2), (8, 3, 1), (16, 2, 3), (1, 1, 1), (3, 2, 1)], ids=str
)
def test_other_layouts(patch, temporal, merge, instruction_set):
    size = (2 * patch * merge, 3 * patch * merge)
    expected = restated(NOISE[:50, :70], size, patch, temporal, merge)
    out = poisoned(*expected.shape)
    native.images_to_patches([NOISE[:50, :70]], [size], out, patch, temporal, merge, instruction_set=instruction_set)
    np.testing.assert_array_equal(out, expected)


EDGES = {
    "every value": np.resize(np.arange(256, dtype=np.uint8), (96, 64, 3)),
    "black": np.zeros((70, 50, 3), np.uint8),
    "white": np.full((33, 40, 3), 255, np.uint8),
    "checkers": np.where(np.indices((90, 70)).sum(0)[..., None] // 5 % 2, 255, 0).astype(np.uint8).repeat(3, 2),
    "a pixel": NOISE[:1, :1],
    "noise": NOISE[:301, :257],
    "channels reversed": NOISE[:77, 90:10:-1, ::-1],
}


@pytest.mark.parametrize("frames_in_patch", [1, 2, 3], ids=lambda number: f"{number} frames")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("instruction_set", [*native.instruction_sets(), "pillow"])
def test_patches_are_the_float32_ones_rounded_to_the_nearest(instruction_set, dtype, frames_in_patch, monkeypatch):
    images = list(EDGES.values())
    sizes = [(64, 64), (96, 32), (32, 32), (64, 96), (32, 64), (128, 96), (32, 32)]
    whole = [restated(image, size, temporal=frames_in_patch) for image, size in zip(images, sizes, strict=True)]
    expected = torch.from_numpy(np.concatenate(whole)).to(dtype)
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    if instruction_set == "pillow":
        monkeypatch.setattr(frames, "native", "hidden by the test")
    else:
        set_of = {"instruction_set": instruction_set}
        monkeypatch.setattr(
            frames, "_C", SimpleNamespace(images_to_patches=partial(native.images_to_patches, **set_of))
        )
    frames.images_to_patches(images, sizes, PATCH, frames_in_patch, MERGE, out, threads=2)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_short_values_are_rounded_over_random_sizes(instruction_set, dtype):
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(4, 300, 2)
        size = tuple(int(side) for side in 32 * rng.integers(1, 5, 2))
        float32 = computed([NOISE[:height, :width]], [size], instruction_set=instruction_set)
        out = np.zeros(float32.shape, dtype)
        order = [frames.vertical_first((height, width), size)]
        native.images_to_patches(
            [NOISE[:height, :width]], [size], out, vertical_first=order, instruction_set=instruction_set
        )
        rounded = torch.from_numpy(float32).to(torch.float16 if dtype == "float16" else torch.bfloat16)
        np.testing.assert_array_equal(out.view(np.uint16), rounded.view(torch.uint16).numpy())


def test_frames_are_only_read():
    image = NOISE[:40, :40].copy()
    image.flags.writeable = False
    np.testing.assert_array_equal(computed([image], [(32, 32)]), restated(image, (32, 32)))


FRAME = NOISE[:64, :32].copy()
SIZE = (64, 32)
OUT_SHAPE = (8, PATCH_DIM)


def read_only(array):
    array.flags.writeable = False
    return array


UNALIGNED = np.zeros(8 * PATCH_DIM * 4 + 1, np.uint8)[1:].view(np.float32).reshape(OUT_SHAPE)


@pytest.mark.parametrize(
    ("frame", "size", "out", "message"),
    [
        pytest.param(FRAME.astype(np.float32), SIZE, OUT_SHAPE, "frames.0.: expected uint8 .* got float32", id="dtype"),
        pytest.param(FRAME.astype(np.int8), SIZE, OUT_SHAPE, "frames.0.: expected uint8 .* got int8", id="signed"),
        pytest.param(FRAME[..., 0], SIZE, OUT_SHAPE, "expected uint8 .* got uint8 \\(64, 32\\)", id="grey"),
        pytest.param(NOISE[..., :2], SIZE, OUT_SHAPE, "got uint8 \\(1080, 1920, 2\\)", id="two channels"),
        pytest.param(FRAME.transpose(2, 0, 1), SIZE, OUT_SHAPE, "got uint8 \\(3, 64, 32\\)", id="channels first"),
        pytest.param(FRAME[:, :0], SIZE, OUT_SHAPE, "1 to 32768, got \\(64, 0\\)", id="empty"),
        pytest.param(np.zeros((1, 20000, 3), np.uint8), SIZE, OUT_SHAPE, "200, .* \\(1, 20000\\)", id="a line"),
        pytest.param(np.zeros((200, 32769, 3), np.uint8), SIZE, OUT_SHAPE, "32768, got \\(200, 32769\\)", id="wide"),
        pytest.param(FRAME, (48, 32), OUT_SHAPE, "sizes.0.: .* multiples of .* 32, got \\(48, 32\\)", id="height"),
        pytest.param(FRAME, (64, 0), OUT_SHAPE, "sizes.0.: .* 1 to 32768, got \\(64, 0\\)", id="no width"),
        pytest.param(FRAME, (-64, 32), OUT_SHAPE, "1 to 32768, got \\(-64, 32\\)", id="negative height"),
        pytest.param(FRAME, (2**40, 32), OUT_SHAPE, "1 to 32768, got \\(1099511627776, 32\\)", id="absurd height"),
        pytest.param(FRAME, SIZE, (7, PATCH_DIM), "out: expected .* got float32 \\(7, 1536\\)", id="out rows"),
        pytest.param(FRAME, SIZE, (8 * PATCH_DIM,), "out: expected .* got float32 \\(12288,\\)", id="out flat"),
        pytest.param(FRAME, SIZE, np.zeros(OUT_SHAPE), "out: expected .* got float64 \\(8, 1536\\)", id="out dtype"),
        pytest.param(FRAME, SIZE, np.zeros(OUT_SHAPE, ">f4"), "out: expected .* got >f4", id="out byte order"),
        pytest.param(FRAME, SIZE, np.zeros(OUT_SHAPE, ">f2"), "out: expected .* got >f2", id="out short byte order"),
        pytest.param(FRAME, SIZE, np.zeros(OUT_SHAPE, np.int16), "out: expected .* got int16", id="out signed"),
        pytest.param(FRAME, SIZE, np.zeros(OUT_SHAPE, np.float32, "F"), "out: .* C-contiguous", id="out order"),
        pytest.param(FRAME, SIZE, UNALIGNED, "out: expected an aligned", id="out unaligned"),
        pytest.param(FRAME, SIZE, read_only(np.zeros(OUT_SHAPE, np.float32)), "out: .* writable", id="out read-only"),
    ],
)
def test_bad_arrays_are_refused(frame, size, out, message):
    if isinstance(out, tuple):
        out = np.full(out, np.nan, np.float32)
    before = out.copy()
    with pytest.raises(ValueError, match=message):
        native.images_to_patches([frame], [size], out)
    np.testing.assert_array_equal(out, before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            (name, value, f"1 to 1024, got {value}")
            for name in ("patch_size", "merge_size")
            for value in (0, -16, 1025)
        ),
        ("temporal_patch_size", 0, "1 to 1024, got 0"),
        ("threads", 0, "1 to 1024, got 0"),
        ("vertical_first", [True, True], "one for each of 1 frames, got 2"),
        ("instruction_set", "sse9", "portable; got 'sse9'"),
        ("sizes", [SIZE, SIZE], "one for each of 1 frames, got 2"),
    ],
)
def test_bad_options_are_refused(name, value, message):
    arguments = {"frames": [FRAME], "sizes": [SIZE], "out": poisoned(8)} | {name: value}
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        native.images_to_patches(**arguments)


@pytest.mark.parametrize("frame", [None, b"bytes", FRAME.tolist()], ids=["null", "bytes", "list"])
def test_other_objects_are_refused(frame):
    with pytest.raises(TypeError):
        native.images_to_patches([frame], [SIZE], poisoned(8))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            torch.empty(OUT_SHAPE, dtype=torch.float64),
            "expected one of float32, bfloat16, float16 on cpu or cuda, got torch.float64",
        ),
        (torch.empty(OUT_SHAPE, device="meta"), "got torch.float32 on meta"),
        (torch.empty(7, PATCH_DIM), "out: expected .*got .*\\(7, 1536\\)"),
    ],
    ids=["dtype", "device", "shape"],
)
@pytest.mark.parametrize("path", ["native", "pillow"])
def test_bad_tensors_are_refused(out, message, path, monkeypatch):
    if path == "pillow":
        monkeypatch.setattr(frames, "native", "hidden by the test")
    with pytest.raises(ValueError, match=message):
        frames.images_to_patches([FRAME], [SIZE], PATCH, TEMPORAL, MERGE, out)
