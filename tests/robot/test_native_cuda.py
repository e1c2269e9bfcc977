"""The CUDA part of xr0_engine._C: what can be told without a GPU, and on one the host's patches, bit for bit."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import ROOT
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.robot import patches as frames

native = pytest.importorskip("xr0_engine._C", reason="xr0_engine._C was not built: see `xr0 doctor`")

ARCHS = re.search(r'XR0_CUDA_ARCHS "([\d;]+)"', (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))[1].split(";")
NVCC = shutil.which("nvcc")

# Four blocks of 256 threads fit a multiprocessor of any target, whose 65,536 registers they share.
MOST_REGISTERS = 64
# What a block may have on every target without asking for more.
MOST_SHARED_BYTES = 48 * 1024

NOISE = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
NO_GPU = native.cuda_fault() is not None
CALL = {
    "frames": [(1, (64, 32), (96, 3, 1))],
    "sizes": [(64, 32)],
    "columns": [(1, 4)],
    "rows": [(1, 4)],
    "out": 1,
    "dtype": "float32",
    "temporal_patch_size": 2,
    "merge_size": 2,
    "vertical_first": [False],
    "slices": [-1],
    "bgr": False,
    "device": 0,
    "stream": 0,
}


def pair_of(name, value):
    """The call with two frames, and another value."""
    per_frame = ("frames", "sizes", "columns", "rows", "vertical_first", "slices")
    return {each: CALL[each] * 2 for each in per_frame} | {name: value}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit_every_target(arch, tmp_path):
    command = [NVCC, "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Xptxas=-v", "-I", ROOT / "csrc" / "include"]
    compiled = subprocess.run(
        [*command, "-o", tmp_path / "patches.cubin", ROOT / "csrc" / "patches_cuda.cu"],
        check=True,
        capture_output=True,
        text=True,
    )
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
    used = re.findall(r"Used (\d+) registers.*?(\d+) bytes smem", compiled.stderr)
    # One kernel for each of float32, bfloat16 and float16.
    assert spills == [("0", "0")] * 3
    assert len(used) == 3
    for registers, shared in used:
        assert int(registers) <= MOST_REGISTERS
        assert int(shared) <= MOST_SHARED_BYTES


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_kernel_gives_the_hosts_bits_when_run_on_the_cpu(tmp_path):
    sources = [ROOT / "csrc" / "tests" / "patches_cuda_on_cpu.cpp", ROOT / "csrc" / "rows_portable.cpp"]
    include = ["-I", ROOT / "csrc", "-I", ROOT / "csrc" / "include"]
    command = ["c++", "-std=c++20", "-O1", "-pthread", "-ffp-contract=off", *include, *sources, "-o", tmp_path / "run"]
    subprocess.run(command, check=True)
    run = subprocess.run([tmp_path / "run"], check=True, capture_output=True, text=True)
    assert run.stdout == "30 cases\n"


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_without_a_gpu_the_call_says_so():
    with pytest.raises(RuntimeError, match=r"GPU 0 cannot be used: (no GPU with a driver|.*built without CUDA)"):
        native.images_to_patches_cuda(**CALL)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": []}, "frames: expected 1 to 16, got 0"),
        ({"frames": CALL["frames"] * 17}, "frames: expected 1 to 16, got 17"),
        ({"frames": [(1, (1, 20000), (60000, 3, 1))]}, "frames.0.: .* 200, got .* \\(1, 20000\\)"),
        ({"sizes": [(64, 48)]}, "sizes.0.: expected multiples of .* 32, got \\(64, 48\\)"),
        ({"sizes": []}, "sizes: expected one for each of 1 frames, got 0"),
        ({"columns": []}, "columns: expected one for each of 1 frames, got 0"),
        ({"rows": []}, "rows: expected one for each of 1 frames, got 0"),
        ({"vertical_first": []}, "vertical_first: expected one for each of 1 frames, got 0"),
        ({"slices": []}, "slices: expected one for each of 1 frames, got 0"),
        ({"slices": [1]}, "slices.0.: expected -1 or 0, got 1 and \\(64, 32\\)"),
        ({"slices": [-2]}, "slices.0.: expected -1 or 0, got -2"),
        ({"slices": [0]}, "slices: expected all 2 of a patch, got 1 for the last"),
        (pair_of("slices", [0, 0]), "slices.1.: expected 1 and the size of the frame before, got 0"),
        (pair_of("slices", [0, 2]), "slices.1.: expected 1 and the size of the frame before, got 2"),
        (
            pair_of("slices", [0, 1]) | {"sizes": [(64, 32), (32, 64)]},
            "slices.1.: expected 1 and the size of the frame before, got 1 and \\(32, 64\\)",
        ),
        ({"merge_size": 0}, "merge_size: expected 1 to 1024, got 0"),
        ({"dtype": "int8"}, "dtype: expected float32, bfloat16 or float16, got 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        native.images_to_patches_cuda(**CALL | changed)


@pytest.mark.parametrize(("in_size", "out_size"), [(640, 320), (480, 256), (32, 320), (5, 96), (1, 32)])
def test_resize_table_is_pillows_resize(in_size, out_size):
    table = native.resize_table(in_size, out_size)
    first, weights = table[:out_size], table[out_size:].reshape(out_size, -1)
    row = NOISE[:1, :in_size]
    padded = np.pad(row[0].astype(np.int64), ((0, weights.shape[1]), (0, 0)))
    windows = padded[first[:, None] + np.arange(weights.shape[1])]
    sums = np.einsum("otc,ot->oc", windows, weights.astype(np.int64))
    resized = np.clip((sums + (1 << 21)) >> 22, 0, 255)
    expected = np.asarray(Image.fromarray(row).resize((out_size, 1), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resized, expected[0])


@pytest.mark.parametrize("size", [0, -1, 32769])
def test_resize_table_needs_sizes(size):
    with pytest.raises(ValueError, match=f"in_size: expected 1 to 32768, got {size}"):
        native.resize_table(size, 32)


def memory(address, count, dtype=np.uint8):
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype)


class HostsGpu:
    """images_to_patches_cuda's contract on memory of the host: what it is told is all that it knows."""

    resize_table = staticmethod(native.resize_table)

    def __init__(self):
        self.launches = []

    def images_to_patches_cuda(
        self, frames, sizes, columns, rows, out, dtype, temporal_patch_size, merge_size, vertical_first, slices, bgr,
        device, stream,
    ):  # fmt: skip
        assert (device, stream) == (None, 7)
        assert 1 <= len(frames) <= 16
        self.launches.append(len(frames))
        images = []
        for (address, (height, width), strides), size, *tables in zip(frames, sizes, columns, rows, strict=True):
            for (table, taps), side, target in zip(tables, (width, height), size[::-1], strict=True):
                np.testing.assert_array_equal(
                    memory(table, target * (1 + taps), np.int32), native.resize_table(side, target)
                )
            # NumPy must not be told of an array's end, since it runs to both sides from the first pixel.
            image = np.lib.stride_tricks.as_strided(memory(address, 1), (height, width, 3), strides)
            images.append(image)
        element = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
        begin = 0
        for image, size, first, own in zip(images, sizes, vertical_first, slices, strict=True):
            # What one frame gives, into its own temporal slices of the patches that it shares.
            rows = size[0] * size[1] // 256
            one = np.zeros((rows, 3 * 256), element)
            native.images_to_patches([image], [size], one, 16, 1, merge_size, [first], bgr)
            shape = (begin + rows, 3, temporal_patch_size, 256)
            patches = memory(out, np.prod(shape), element).reshape(shape)[begin:]
            patches[:, :, slice(None) if own < 0 else slice(own, own + 1)] = one.reshape(rows, 3, 1, 256)
            begin += rows if own in (-1, temporal_patch_size - 1) else 0


@pytest.fixture
def hosts_gpu(monkeypatch):
    gpu = HostsGpu()
    monkeypatch.setattr(frames, "_C", gpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    frames._table.cache_clear()
    yield gpu
    frames._table.cache_clear()


def launched(images, sizes, patch, temporal, merge, out, threads=1):
    """frames.images_to_patches on the host's GPU."""
    pixels = torch.zeros(sum(image.size for image in images), dtype=torch.uint8)
    frames.launch_patches(pixels, frames.pack(images, pixels), sizes, temporal, merge, out)
    return out


@pytest.mark.parametrize(("count", "launches"), [(1, [1]), (16, [16]), (37, [16, 16, 5])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temporal", [1, 2])
def test_launches_tell_the_operator_all_of_the_images(temporal, dtype, count, launches, hosts_gpu):
    views = (NOISE[::-1, ::-1], NOISE[:, :, ::-1], NOISE, NOISE[::2, ::-3], NOISE[::-1].transpose(1, 0, 2))
    images = [views[row % 5][row : row + 40 + row, 3 * row : 90 + row] for row in range(count)]
    sizes = [(32, 64), (64, 32), (96, 96)] * 13
    shape = (sum(height * width for height, width in sizes[:count]) // 256, 3 * temporal * 256)
    out, expected = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    launched(images, sizes[:count], 16, temporal, 2, out)
    assert hosts_gpu.launches == launches
    order = [frames.vertical_first(image.shape, size) for image, size in zip(images, sizes, strict=False)]
    native.images_to_patches(images, sizes[:count], frames._as_array(expected), 16, temporal, 2, order)
    assert torch.equal(out, expected)


def test_an_engine_on_the_operator_gives_the_same_chunks(hosts_gpu, monkeypatch, tmp_path):
    init_checkpoint(tmp_path / "tiny", "tiny")
    plain = Engine.from_pretrained(tmp_path / "tiny", device="cpu", backend="reference")
    engine = Engine(FusedModel(plain.model, "reference", TacticTable(""), graphs=False), plain._preprocess)
    observations = [engine.example("bimanual")] * 6
    with monkeypatch.context() as context:
        context.setattr(frames, "_C", native)
        expected = engine.infer(observations, seed=0)
    monkeypatch.setattr(frames, "images_to_patches", launched)
    found = engine.infer(observations, seed=0)
    assert hosts_gpu.launches == [16, 2]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.normalized, theirs.normalized)


def test_frames_that_share_patches_are_launched_together(hosts_gpu):
    """Ten videos behind seven pictures: the sixteenth view of the first launch would be half a video."""
    pictures = [NOISE[row : row + 40, 30:90] for row in range(7)]
    videos = [NOISE[row : row + 100].reshape(2, 50, 1920, 3)[:, ::-1, 5:75] for row in range(10)]
    images, sizes = [*pictures, *videos], [(32, 64), (64, 32), (96, 96), (32, 32)] * 4 + [(32, 32)]
    shape = (sum(height * width for height, width in sizes) // 256, 1536)
    out, expected = (torch.full(shape, torch.nan) for _ in range(2))
    launched(images, sizes, 16, 2, 2, out)
    assert hosts_gpu.launches == [15, 12]
    order = [frames.vertical_first(image.shape[-3:], size) for image, size in zip(images, sizes, strict=True)]
    native.images_to_patches(images, sizes, expected.numpy(), 16, 2, 2, order)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda image: image, id="as it is"),
        pytest.param(lambda image: image[::-1, ::-1], id="turned"),
        pytest.param(lambda image: image[..., ::-1], id="channels reversed"),
        pytest.param(lambda image: image[5:, 30:3:-2], id="mirrored part"),
        pytest.param(lambda image: image.transpose(1, 0, 2)[::-1], id="transposed"),
        pytest.param(lambda image: np.broadcast_to(image[:1], image.shape), id="one row for all"),
        pytest.param(lambda image: image[:1, :1], id="a pixel"),
    ],
)
def test_packed_images_lie_where_they_are_said_to(view):
    image = view(NOISE[:40, :50].copy())
    before = NOISE[:7, :9]
    out = torch.full((before.size + image.size,), 77, dtype=torch.uint8)
    _, packed = frames.pack([before, image], out)
    assert packed.shape == image.shape[:2]
    offsets = packed.first + sum(
        step * place for step, place in zip(packed.strides, np.indices(image.shape), strict=True)
    )
    np.testing.assert_array_equal(out.numpy()[offsets], image)
    # In the order of the memory that is read, whichever way the axes run.
    assert [step < 0 for step in packed.strides] == [step < 0 for step in image.strides]


@pytest.mark.parametrize(
    ("device", "patch", "fault", "expected"),
    [
        ("cuda:1", 16, None, "cuda:1"),
        ("cuda:1", 16, "built without CUDA", "cpu"),
        ("cuda:1", 14, None, "cpu"),
        ("cpu", 16, None, "cpu"),
    ],
)
def test_patches_are_made_where_the_operator_is(device, patch, fault, expected, monkeypatch):
    monkeypatch.setattr(frames, "_C", SimpleNamespace(cuda_fault=lambda index: fault if index == 1 else "GPU 0"))
    assert frames.made_on(torch.device(device), patch) == torch.device(expected)


def on_both(images, sizes, dtype, temporal=2, merge=2):
    shape = (sum(height * width for height, width in sizes) // 256, 3 * temporal * 256)
    host = torch.full(shape, torch.nan, dtype=dtype)
    device = torch.full(shape, torch.nan, dtype=dtype, device="cuda:0")
    for out in (host, device):
        frames.images_to_patches(images, sizes, 16, temporal, merge, out)
    return host, device.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_gives_the_hosts_bits_over_random_sizes(dtype):
    rng = np.random.default_rng(0)
    for _ in range(100):
        images, sizes = [], []
        for _ in range(5):
            height, width = (int(side) for side in rng.integers(10, [1081, 1921]))
            image = NOISE[:height, 1920 - width :]
            images.append(image[::-1, ::-1] if rng.random() < 0.3 else image)
            sizes.append(tuple(int(side) for side in 32 * rng.integers(1, 8, 2)))
        host, device = on_both(images, sizes, dtype)
        assert torch.equal(host, device)


@pytest.mark.gpu
def test_upload_and_launch_apart_give_the_hosts_bits():
    images, sizes = [NOISE[:480, :640], NOISE[:480, 640:1280][::-1, ::-1], NOISE[:480:2, :640]], [(256, 320)] * 3
    host = torch.full((960, 1536), torch.nan)
    frames.images_to_patches(images, sizes, 16, 2, 2, host)
    staged = torch.empty(sum(image.size for image in images), dtype=torch.uint8, pin_memory=True)
    packed = frames.pack(images, staged)
    out = torch.full_like(host, torch.nan, device="cuda:0")
    frames.launch_patches(staged.to(out.device, non_blocking=True), packed, sizes, 2, 2, out)
    assert torch.equal(host, out.cpu())


@pytest.mark.gpu
def test_gpu_puts_a_videos_frames_into_the_same_patches():
    videos = [NOISE[row : row + 100].reshape(2, 50, 1920, 3)[:, ::-1, 5:75] for row in range(10)]
    host, device = on_both([*videos, NOISE[:50, :70]], [(32, 64)] * 11, torch.bfloat16)
    assert torch.equal(host, device)


@pytest.mark.gpu
def test_gpu_takes_more_images_than_a_launch():
    images, sizes = [NOISE[row : row + 50, :70] for row in range(40)], [(32, 64), (64, 32)] * 20
    host, device = on_both(images, sizes, torch.bfloat16, temporal=1)
    assert torch.equal(host, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("temporal", "merge"), [(1, 2), (2, 1), (3, 3)])
def test_gpu_has_other_layouts(temporal, merge):
    host, device = on_both([NOISE[:50, :70]], [(32 * merge, 48 * merge)], torch.float32, temporal, merge)
    assert torch.equal(host, device)


@pytest.mark.gpu
def test_gpu_reads_bgr_and_any_stride():
    frame = torch.from_numpy(NOISE[:100, :120].copy()).cuda()
    view = frame[::2, 10:90]
    out = torch.full((12, 1536), torch.nan, device="cuda")
    tables = [torch.from_numpy(native.resize_table(size, 32 * blocks)).cuda() for size, blocks in ((80, 3), (50, 1))]
    columns, rows = [
        (table.data_ptr(), table.numel() // size - 1) for table, size in zip(tables, (96, 32), strict=True)
    ]
    native.images_to_patches_cuda(
        **CALL
        | {
            "frames": [(view.data_ptr(), (50, 80), view.stride())],
            "sizes": [(32, 96)],
            "columns": [columns],
            "rows": [rows],
            "out": out.data_ptr(),
            "bgr": True,
            "stream": torch.cuda.current_stream().cuda_stream,
        }
    )
    expected = np.full((12, 1536), np.nan, np.float32)
    native.images_to_patches([view.cpu().numpy()], [(32, 96)], expected, bgr=True)
    np.testing.assert_array_equal(out.cpu(), expected)


@pytest.mark.gpu
def test_host_memory_is_refused():
    frame = torch.zeros(64, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"frames.0.: expected memory of GPU 0, but it is in host memory"):
        native.images_to_patches_cuda(**CALL | {"frames": [(frame.data_ptr(), (64, 32), (96, 3, 1))]})


@pytest.mark.gpu
def test_null_is_refused():
    with pytest.raises(ValueError, match=r"frames.0.: expected memory of GPU 0, but it is null"):
        native.images_to_patches_cuda(**CALL | {"frames": [(0, (64, 32), (96, 3, 1))]})


@pytest.mark.gpu
def test_gpu_has_patches_of_16_only():
    with pytest.raises(NotImplementedError, match="patch: the GPU's operator has 16 only, got 14"):
        frames.images_to_patches([NOISE[:28, :28]], [(28, 28)], 14, 2, 2, torch.empty(4, 1176, device="cuda:0"))
