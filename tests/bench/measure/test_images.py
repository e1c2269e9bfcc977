"""Frames to patches: what is counted, what is refused, what the result holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xr0_engine.bench.measure import images
from xr0_engine.bench.measure.images import ON_CPU, ON_GPU, Frames, check
from xr0_engine.bench.results import read, write
from xr0_engine.bench.tell.bounds import bounds_of
from xr0_engine.robot.preprocess import MAX_PIXELS

SMALL = (Frames((90, 70)), Frames((32, 64)))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_frames_are_those_that_robots_have():
    assert [each.name for each in ON_CPU] == ["640x480 to 320x256", "256x256 to 256x256"]
    assert [each.name for each in ON_GPU] == ["3 x 640x480 to 320x256"]
    assert all(each.size[0] * each.size[1] <= MAX_PIXELS for each in ON_CPU)


def test_least_bytes_are_samples_read_and_patches_written():
    frames = Frames((480, 640), count=3)
    patches = 3 * (256 // 16) * (320 // 16)
    assert frames.shape == (patches, 2 * 3 * 16 * 16)
    assert frames.least_bytes() == 3 * 480 * 640 * 3 + 4 * patches * 2 * 3 * 16 * 16
    # What the rival that copies reads and writes.
    assert frames.least_bytes() % 2 == 0


def test_frames_are_pinned_noise():
    first, second = (Frames((90, 70), count=2).images() for _ in range(2))
    assert [image.shape for image in first] == [(90, 70, 3)] * 2
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])


def test_result_and_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(images, "ON_CPU", SMALL)
    measured, reason = images.measure("cpu", 3, "xr0 bench images")
    write(measured, tmp_path / "images.json")
    result = read(tmp_path / "images.json")
    assert reason is None
    assert (result.kind, result.boundary, result.environment["threads"]) == ("images", "patches", 1)
    names = [each.name for each in SMALL]
    for rival in ("engine", "processor", "memcpy", "bfloat16", "converted"):
        assert list(result.series[rival]) == names
    # Pillow has nothing to do where the size stays.
    assert list(result.series["pillow"]) == names[:1]
    assert {len(samples) for stages in result.series.values() for samples in stages.values()} == {3}
    bounds = bounds_of(result, [])
    assert bounds.ms == {name: np.median(result.series["memcpy"][name]) for name in names}
    images.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for text in (*names, "processor", "memcpy", "converted", "boundary patches", "3 rounds"):
        assert any(text in line for line in lines)


@pytest.mark.parametrize("fault", [1e-7, float("nan")], ids=["one bit", "NaN"])
def test_other_patches_are_not_timed(fault):
    expected = np.full((2, 3), 0.5, np.float32)
    wrong = expected.copy()
    wrong[1, 2] += np.float32(fault)
    with pytest.raises(RuntimeError, match="nothing was timed: 4x4: the engine's patches are not the host's"):
        check("4x4", wrong, expected, "the host's")


def test_short_patches_that_are_not_the_rounded_float32_are_not_timed(monkeypatch):
    real = images.patches.images_to_patches

    def off_by_an_ulp(*arguments):
        out = real(*arguments)
        if out.dtype == torch.bfloat16:
            out.view(torch.int16)[-1, -1] += 1
        return out

    monkeypatch.setattr(images, "ON_CPU", SMALL)
    monkeypatch.setattr(images.patches, "images_to_patches", off_by_an_ulp)
    with pytest.raises(RuntimeError, match=r"nothing was timed: 70x90 .* are not the rounded float32's"):
        images.measure("cpu", 1, "")


@pytest.mark.parametrize(
    ("device", "rounds", "message"),
    [
        ("cpu", 0, "rounds: expected at least 1, got 0"),
        ("tpu", 1, "device: expected auto, cpu, cuda or cuda:N; got 'tpu'"),
        ("cuda:99", 1, "device 'cuda:99': this machine has"),
    ],
)
def test_wrong_call_is_refused(device, rounds, message):
    with pytest.raises(ValueError, match=message):
        images.measure(device, rounds, "")


@pytest.mark.gpu
def test_on_a_gpu_launch_and_upload_are_timed():
    result, reason = images.measure("cuda", 2, "xr0 bench images --device cuda")
    assert reason is None
    assert (result.backend, list(result.series)) == ("cuda", ["engine", "host"])
    name = ON_GPU[0].name
    assert list(result.series["engine"]) == [
        f"{name}: {what}" for what in ("launch", "upload and launch", "from frames")
    ]
    assert list(result.series["host"]) == [f"{name}: from frames"]
