"""Image settings of preprocessor_config.json: limits are honoured as transformers does, the rest is as released."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from typer.testing import CliRunner

from tests.support import make_config
from xr0_engine import Engine
from xr0_engine.bench.cases import Setup, find_case
from xr0_engine.bench.step.workload import Workload
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.export.folder import export_onnx
from xr0_engine.exported.manifest import ExportCase
from xr0_engine.robot.limits import RELEASED_LIMITS, ImageLimits, load_limits
from xr0_engine.robot.preprocess import Preprocessor, images_to_patches, smart_resize
from xr0_engine.types import CheckpointError

VISION = make_config().vision
IMAGE_FILE = "preprocessor_config.json"
LARGER = {"min_pixels": 4096, "max_pixels": 400_000}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits") / "tiny"
    init_checkpoint(folder)
    return folder


def change(folder, **settings):
    """None removes a key."""
    file = folder / IMAGE_FILE
    raw = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


@pytest.fixture
def larger(tiny, tmp_path):
    return change(shutil.copytree(tiny, tmp_path / "larger"), size=None, **LARGER)


def limits_of(folder, **settings) -> ImageLimits:
    (folder / IMAGE_FILE).write_text(json.dumps(settings))
    return load_limits(folder, VISION)


def test_our_own_checkpoints_say_them_under_both_keys(tiny):
    raw = json.loads((tiny / IMAGE_FILE).read_text())
    assert raw["size"] == {"shortest_edge": 1024, "longest_edge": 90_000}
    assert (raw["min_pixels"], raw["max_pixels"]) == (1024, 90_000)
    assert load_limits(tiny, VISION) == RELEASED_LIMITS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1024, 90_000)),
        ({"size": None, "min_pixels": None}, (1024, 90_000)),
        ({"size": {"shortest_edge": 2048, "longest_edge": 200_000}}, (2048, 200_000)),
        ({"min_pixels": 2048, "max_pixels": 2e5}, (2048, 200_000)),
        ({"max_pixels": 200_000}, (1024, 200_000)),
        ({"size": {"shortest_edge": 2048, "longest_edge": 200_000}, "max_pixels": 200_000}, (2048, 200_000)),
        (
            {"size": {"shortest_edge": 65_536, "longest_edge": 2**24}, "min_pixels": 2048, "max_pixels": 2e5},
            (2048, 200_000),
        ),
        ({"size": {"shortest_edge": 2048, "longest_edge": 200_000, "height": None, "width": None}}, (2048, 200_000)),
        ({"do_center_crop": False, "do_pad": None, "crop_size": None}, (1024, 90_000)),
    ],
    ids=["absent", "null", "size", "pixels", "one of them", "both agree", "pixels go first", "null sizes", "no crop"],
)
def test_limits_are_read(tmp_path, settings, expected):
    limits = limits_of(tmp_path, **settings)
    assert (limits.min_pixels, limits.max_pixels) == expected


def test_pixels_go_before_size_as_in_transformers(tmp_path):
    size = {"shortest_edge": 65_536, "longest_edge": 2**24}
    limits = limits_of(tmp_path, size=size, min_pixels=2048, max_pixels=200_000)
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size == limits.to_hf()["size"]


def saved_by_transformers(tiny, folder, **settings):
    """processor_config.json as transformers 5 saves a processor: what preprocessor_config.json holds is in it."""
    Qwen2VLImageProcessorPil.from_pretrained(tiny).save_pretrained(folder / "saved")
    nested = {**json.loads((folder / "saved" / IMAGE_FILE).read_text()), **settings}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested, "processor_class": "Any"}))


def test_a_processor_saved_by_transformers_5_says_it_all(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    saved_by_transformers(tiny, copy, size={"shortest_edge": 4096, "longest_edge": 400_000})
    (copy / IMAGE_FILE).unlink()
    assert load_limits(copy, VISION) == ImageLimits(**LARGER)
    ours, theirs = Preprocessor.load(copy).statistics, Preprocessor.load(tiny).statistics
    assert {name: one.to_json() for name, one in ours.items()} == {name: one.to_json() for name, one in theirs.items()}


def test_an_export_of_it_opens(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    saved_by_transformers(tiny, copy)
    (copy / IMAGE_FILE).unlink()
    export_onnx(copy, ExportCase("libero", "libero_all", (64, 64)), "fp32", tmp_path / "export", stages=["vision"])
    ours, theirs = Engine.from_export(tmp_path / "export").statistics, Preprocessor.load(tiny).statistics
    assert ours["libero_all"].to_json() == theirs["libero_all"].to_json()


def test_both_files_may_agree_but_not_contradict(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    saved_by_transformers(tiny, copy)
    assert load_limits(copy, VISION) == RELEASED_LIMITS
    Preprocessor.load(copy)
    saved_by_transformers(tiny, copy, size={"shortest_edge": 4096, "longest_edge": 400_000})
    with pytest.raises(CheckpointError, match=rf"{IMAGE_FILE} has 1024 to 90000.*processor_config.json has 4096 to"):
        load_limits(copy, VISION)
    saved_by_transformers(tiny, copy, action_config={"arm": {"mean": [], "std": []}})
    with pytest.raises(CheckpointError, match="hold different action statistics"):
        Preprocessor.load(copy)


def test_a_processor_without_images_says_nothing(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "x.Y"}}))
    assert load_limits(copy, VISION) == RELEASED_LIMITS
    Preprocessor.load(copy)


def test_no_file_means_the_released_ones(tmp_path):
    assert load_limits(tmp_path, VISION) == RELEASED_LIMITS


BAD: list[tuple[dict[str, Any], str]] = [
    ({"size": {"shortest_edge": 1024, "longest_edge": 90_000}, "max_pixels": 80_000},
     "size.longest_edge is 90000, max_pixels is 80000"),
    ({"size": {"height": 224, "width": 224}}, r"size is .*height.*: expected the pixels as"),
    ({"size": {"shortest_edge": 1024}}, "size is .*: expected the pixels as"),
    ({"size": 224}, "size is 224"),
    ({"min_pixels": "1024"}, "min_pixels is '1024': expected a whole number"),
    ({"max_pixels": True}, "max_pixels is True"),
    ({"max_pixels": 90_000.5}, "max_pixels is 90000.5"),
    ({"max_pixels": 2**27}, "max_pixels <= 67108864"),
    ({"min_pixels": 0}, "expected 1 <= min_pixels"),
    ({"min_pixels": 100_000}, "got 100000 and 90000"),
    ({"min_pixels": 2**25, "max_pixels": 2**26}, "min_pixels <= 1048576"),
    ({"min_pixels": 1, "max_pixels": 1023}, "less than the 1024 pixels of one image token"),
    ({"image_mean": [0.48145466, 0.4578275, 0.40821073]}, r"image_mean is \[0.48.*the engine has \[0.5, 0.5, 0.5\]"),
    ({"image_std": [0.5, 0.5, 0.4]}, "image_std is"),
    ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ({"do_resize": "no"}, "do_resize is 'no', not true or false"),
    ({"do_rescale": 0}, "do_rescale is 0"),
    ({"do_normalize": False}, "do_normalize is False"),
    ({"do_center_crop": True}, "do_center_crop is True"),
    ({"do_pad": True}, "do_pad is True"),
    ({"resample": 2}, "resample is 2, the engine has 3"),
    ({"patch_size": 14}, "patch_size is 14, the engine has 16"),
    ({"merge_size": 1}, "merge_size is 1"),
    ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "complaint"), BAD, ids=[complaint[:24] for _, complaint in BAD])
def test_what_the_engine_does_not_do_is_refused(tmp_path, settings, complaint):
    with pytest.raises(CheckpointError, match=f"{IMAGE_FILE}: .*{complaint}"):
        limits_of(tmp_path, **settings)


def test_every_fault_is_named_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"do_rescale is False.*min_pixels is 'x'"):
        limits_of(tmp_path, do_rescale=False, min_pixels="x")


def test_a_checkpoint_may_resize_nothing(tmp_path):
    """Its images then come in the size that the model takes, or are refused (spec section 8)."""
    limits = limits_of(tmp_path, do_resize=False)
    assert not limits.resize
    assert limits_of(tmp_path, **limits.to_hf()) == limits
    assert smart_resize(512, 640, 32, limits) == (512, 640)
    for size in [(480, 648), (2048, 1024)]:
        with pytest.raises(ValueError, match=r"image: expected multiples of 32 pixels, .*do_resize.*got height"):
            smart_resize(*size, 32, limits)


def test_the_factor_may_be_rounded(tmp_path):
    assert limits_of(tmp_path, rescale_factor=0.00392156862745098, resample=3, do_resize=True) == RELEASED_LIMITS


@pytest.mark.parametrize("size", [(480, 640), (84, 84), (40, 50), (1080, 1920)])
@pytest.mark.parametrize("limits", [(1024, 90_000), (4096, 400_000), (65_536, 16_777_216), (1024, 2048)])
def test_patches_are_those_of_transformers_with_these_limits(size, limits):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    own = ImageLimits(*limits)
    processor = Qwen2VLImageProcessorPil(
        size=own.to_hf()["size"], patch_size=16, merge_size=2, temporal_patch_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    expected = processor(images=[image], return_tensors="pt")
    patches, (grid,) = images_to_patches([image], VISION, limits=own)
    assert list(grid) == expected["image_grid_thw"][0].tolist()[1:]
    np.testing.assert_array_equal(patches, expected["pixel_values"])


def test_the_engine_resizes_as_its_checkpoint_says(tiny, larger):
    engines = [Engine.from_pretrained(folder, "cpu", "float32") for folder in (tiny, larger)]
    example = engines[0].example("libero_all", (480, 640))
    released, own = (engine._preprocess([example]) for engine in engines)
    assert set(released.image_grids) == {(16, 20)}
    height, width = smart_resize(480, 640, limits=ImageLimits(**LARGER))
    assert set(own.image_grids) == {(height // 16, width // 16)} == {(30, 40)}
    assert own.input_ids.shape[1] > released.input_ids.shape[1]


def test_a_benchmark_of_a_checkpoint_counts_its_patches(tiny, larger):
    case = find_case("bimanual")
    grids = [Workload.of_case(Setup(case, checkpoint=str(folder)))[1].grids[0] for folder in (tiny, larger)]
    assert grids[0] != grids[1]
    height, width = (side // 16 for side in smart_resize(*case.image_size, limits=ImageLimits(**LARGER)))
    assert grids[1] == (height, width)


def test_inspect_tells_them_and_what_they_cost(tiny, larger):
    reports = [json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout) for path in (tiny, larger)]
    assert [report["image_pixels"] for report in reports] == [[1024, 90_000], [4096, 400_000]]
    assert reports[0]["memory_bytes"]["float32"] < reports[1]["memory_bytes"]["float32"]


def test_inspect_refuses_what_cannot_be_honoured(tiny, tmp_path):
    folder = change(shutil.copytree(tiny, tmp_path / "x"), image_mean=[0.1, 0.2, 0.3])
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert (result.exit_code, "image_mean is [0.1, 0.2, 0.3]" in result.stderr) == (2, True)
    with pytest.raises(CheckpointError, match="image_mean"):
        Preprocessor.load(folder)
