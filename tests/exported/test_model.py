"""An engine over an export: the reference engine's chunks, and what the export cannot take is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.export.cases import VIDEOS, write_video_checkpoint
from tests.support import make_config
from xr0_engine import Engine
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.comparison import FLOAT32_EXPORT_MAX_ERROR
from xr0_engine.export.folder import export_onnx
from xr0_engine.exported.manifest import MANIFEST_FILE, ExportCase, Manifest, record_files
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.history import FrameHistory

LONG = "pick up the red cube" + ", then the blue cube" * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    write_checkpoint(folder, make_config(text={"num_layers": 3}, head={"num_layers": 2, "flow_steps": 2}))
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "libero"
    stages = ("vision", "prefill", "flow")
    export_onnx(checkpoint, ExportCase("libero", "libero_all", (64, 64)), "fp32", folder, stages=stages)
    return folder


@pytest.fixture(scope="module")
def engine(exported):
    return Engine.from_export(exported)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Engine.from_pretrained(checkpoint, "cpu", "float32")


@pytest.fixture
def observation(engine):
    return engine.example("libero_all", (64, 64))


@pytest.mark.parametrize("prefix_length", [0, 3], ids=["sync", "prefix"])
@pytest.mark.parametrize(
    "instruction", ["stop", "pick up the red cube and place it on the plate"], ids=["short", "long"]
)
def test_chunks_are_the_reference_engines(engine, reference, observation, instruction, prefix_length):
    observation = replace(observation, instruction=instruction)
    prefix = reference.infer(observation, seed=3).actions[:prefix_length] if prefix_length else None
    ours, theirs = (one.infer(observation, prefix=prefix, seed=7) for one in (engine, reference))
    np.testing.assert_allclose(ours.normalized, theirs.normalized, atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)
    np.testing.assert_allclose(ours.actions, theirs.actions, atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)
    assert (ours.robot_type, ours.prefix_length) == ("libero_all", prefix_length)
    assert ours.timing_ms.keys() == theirs.timing_ms.keys()


def test_the_graph_of_the_whole_step_is_what_runs(checkpoint, reference, observation, tmp_path):
    folder = tmp_path / "whole"
    export_onnx(checkpoint, ExportCase("libero", "libero_all", (64, 64)), "fp32", folder, stages=("vision", "step"))
    engine = Engine.from_export(folder)
    prefix = reference.infer(observation, seed=3).actions[:3]
    ours, theirs = (one.infer(observation, prefix=prefix, seed=7) for one in (engine, reference))
    np.testing.assert_allclose(ours.normalized, theirs.normalized, atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)
    assert list(ours.timing_ms) == ["preprocess", "step", "decode", "total"]
    with pytest.raises(ValueError, match="other image sizes, views or batch"):
        engine.infer(engine.example("libero_all", (96, 64)))
    with pytest.raises(ValueError, match=r"holds no prefill\.\d+, only vision, step"):
        engine.prefill(observation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_of_one_frame_are_taken_as_the_whole(dtype, engine, observation):
    whole = engine._preprocess([observation], engine.model.patch_buffer)
    assert (whole.pixel_values.dtype, whole.pixel_values.shape[1]) == (torch.float32, 1536)
    whole = replace(whole, pixel_values=whole.pixel_values.to(dtype))
    one = replace(whole, pixel_values=whole.pixel_values.unflatten(1, (3, 2, 256))[:, :, 0].flatten(1))
    assert torch.equal(engine.model.encode_images(one).tokens, engine.model.encode_images(whole).tokens)
    with pytest.raises(ValueError, match=r"expected 1536 columns .* or 768 .*, got 512"):
        engine.model.encode_images(replace(whole, pixel_values=whole.pixel_values[:, :512]))


def test_a_trace_is_refused(engine, observation):
    with pytest.raises(NotImplementedError, match="trace: an export does not show its steps"):
        engine.model.sample(engine.prefill(observation), *[torch.zeros(1)] * 4, trace=[])


def test_several_chunks_from_one_kept_block(engine, reference, observation):
    state = observation.state[None, None]
    kept = engine.prefill(observation), reference.prefill(observation)
    for seed in range(2):
        ours, theirs = (one.sample(kv, state, seed=seed) for one, kv in zip((engine, reference), kept, strict=True))
        torch.testing.assert_close(ours, theirs, atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)


def test_engine_tells_what_it_is(engine, reference):
    assert (engine.backend, engine.config) == ("onnx", reference.config)
    # Those with the case's chunk length and number of views.
    assert engine.robot_types == ("libero_all", "calvin_abc_orig", "calvin_abcd_orig")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"instruction": LONG}, "instruction: the prompt has .* for at most", id="prompt too long"),
        pytest.param({"robot_type": "bimanual"}, "robot_type: expected one of calvin_abc_orig", id="robot type"),
        pytest.param({"state": np.zeros(3, np.float32)}, "state: expected shape", id="state"),
    ],
)
def test_what_the_export_cannot_take_is_refused(engine, observation, change, message):
    with pytest.raises(ValueError, match=message):
        engine.infer(replace(observation, **change))
    engine.infer(observation, seed=0)


def test_other_image_sizes_and_batches_are_refused(engine, observation):
    larger = engine.example("libero_all", (96, 64))
    with pytest.raises(
        ValueError, match=r"images: the export is for patch grids \[\(4, 4\), \(4, 4\)\], got \[\(6, 4\)"
    ):
        engine.infer(larger)
    with pytest.raises(ValueError, match="other image sizes, views or batch"):
        engine.infer([observation, observation])


def changed(folder, tmp_path, **entries):
    """A copy whose manifest has other entries."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = json.loads((copy / MANIFEST_FILE).read_text())
    (copy / MANIFEST_FILE).write_text(json.dumps({**content, **entries}))
    return copy


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        pytest.param({"format": "other"}, "is foreign: its format is not 'xr0-export-onnx'", id="format"),
        pytest.param({"schema": 2}, "has schema 2; this version reads 1", id="schema"),
        pytest.param({"colour": "red"}, r"is corrupt: missing \[\], unknown \['colour'\]", id="unknown entry"),
        pytest.param({"precision": "int3"}, "precision 'int3'; it is corrupt", id="precision"),
        pytest.param({"shapes": {"batch": 1}}, "'grids' is missing; it is corrupt", id="shapes"),
        pytest.param(
            {"shapes": {"batch": 1, "chunk_length": 10, "grids": [[4, 4]], "tokens": [96], "frames": 65}},
            "frames: expected 1 to 64, got 65; it is corrupt",
            id="frames",
        ),
        pytest.param({"opset": 1e12}, "opset: expected 1 to 1000, got 1000000000000.0; it is corrupt", id="range"),
        pytest.param({"robot_types": "libero"}, "robot_types is 'libero', not a list", id="type"),
        pytest.param({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "is corrupt", id="file outside"),
        pytest.param({"stages": {"vision": "else.onnx"}}, "stages name files that are not listed", id="stage's file"),
    ],
)
def test_corrupt_or_foreign_manifest_is_refused(exported, tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_export(changed(exported, tmp_path, **entries))


def test_folder_without_manifest_is_refused(checkpoint):
    with pytest.raises(ValueError, match="not a folder that `xr0 export` wrote"):
        Engine.from_export(checkpoint)


def test_missing_and_truncated_files_are_named(exported, tmp_path):
    copy = changed(exported, tmp_path)
    (copy / "vision.onnx").unlink()
    (copy / "weights.data").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"is damaged: .*vision\.onnx is missing; .*weights\.data has 5 bytes"):
        Engine.from_export(copy)


def test_stage_that_was_not_exported_is_named(exported, tmp_path, observation):
    stages = {"vision": "vision.onnx"}
    partial = Engine.from_export(changed(exported, tmp_path, stages=stages))
    with pytest.raises(ValueError, match=r"holds no prefill\.96, only vision: export that stage too"):
        partial.infer(observation)


def test_graph_that_is_none_is_named(exported, tmp_path, observation):
    copy = changed(exported, tmp_path)
    size = (copy / "vision.onnx").stat().st_size
    (copy / "vision.onnx").write_bytes(b"\xff" * size)
    manifest = Manifest.read(copy)
    replace(manifest, files={**manifest.files, **record_files(copy, ["vision.onnx"])}).write(copy)
    with pytest.raises(ValueError, match=r"vision\.onnx cannot be read by ONNX Runtime"):
        Engine.from_export(copy).infer(observation)


def test_bfloat16_on_a_cpu_says_what_works(checkpoint, tmp_path, observation):
    folder = tmp_path / "bf16"
    export_onnx(checkpoint, ExportCase("libero", "libero_all", (64, 64)), "bf16", folder, stages=["vision"])
    with pytest.raises(NotImplementedError, match="does not run this precision on cpu, use fp32 or fp16"):
        Engine.from_export(folder, "cpu").infer(observation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "magic"}, "backend: an export has auto, onnx, tensorrt; got 'magic'"),
        ({"backend": "tensorrt", "device": "cpu"}, "no engines for device cpu; there are: none"),
        ({"device": "cuda:7"}, "CUDA GPUs that torch can use"),
    ],
    ids=["backend", "tensorrt", "device"],
)
def test_wrong_arguments_are_refused(exported, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_export(exported, **arguments)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A checkpoint of XR-1's that sees videos, and its export."""
    folder = tmp_path_factory.mktemp("videos")
    write_video_checkpoint(folder / "checkpoint")
    export_onnx(folder / "checkpoint", VIDEOS, "fp32", folder / "export")
    return folder


@pytest.mark.parametrize("prefix_length", [0, 3], ids=["sync", "prefix"])
def test_videos_and_several_states_of_another_family(videos, prefix_length):
    ours = Engine.from_export(videos / "export")
    theirs = Engine.from_pretrained(videos / "checkpoint", "cpu", "float32")
    assert ours.config == theirs.config
    assert ours.robot_info() == theirs.robot_info()
    assert (ours.robot_info().history, ours.robot_info().state_length) == ((4, 2), 4)
    observation = theirs.example(image_size=VIDEOS.image_size)
    prefix = theirs.infer(observation, seed=3).actions[:prefix_length] if prefix_length else None
    chunks = [engine.infer(observation, prefix=prefix, seed=7) for engine in (ours, theirs)]
    np.testing.assert_allclose(chunks[0].normalized, chunks[1].normalized, atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)
    np.testing.assert_allclose(chunks[0].actions, chunks[1].actions, atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)
    assert chunks[0].normalized.shape == (16, 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": None}, r"history: frames: the export is for 4, the profile has 1: take the profile of the export"),
        ({"history": FrameHistory(6, 2)}, "history: frames: the export is for 4, the profile has 6"),
        ({"views": load_embodiment("robocasa365").views[:2]}, "views: the export is for 3, the profile has 2:"),
    ],
    ids=["pictures", "frames", "views"],
)
def test_a_profile_of_other_views_or_history_is_refused(change, message, videos):
    profile = replace(load_embodiment("robocasa365"), **change)
    with pytest.raises(ValueError, match=message):
        Engine.from_export(videos / "export", embodiment=profile)


def test_fewer_states_or_frames_than_the_exports_are_refused(videos):
    engine = Engine.from_export(videos / "export")
    observation = engine.example(image_size=VIDEOS.image_size)
    with pytest.raises(ValueError, match=r"state: expected shape \(4, 60\), got \(60,\)"):
        engine.infer(replace(observation, state=observation.state[0]))
    pictures = {view: frames[-1] for view, frames in observation.images.items()}
    with pytest.raises(ValueError, match=r"images\['left'\]: expected uint8 RGB of shape \(4, height, width, 3\)"):
        engine.infer(replace(observation, images=pictures))
