"""The graphs: golden cases through ONNX Runtime, their form, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from tests.export.cases import LIBERO, VIDEOS
from tests.support import CPU, GOLDEN
from xr0_engine.comparison import FLOAT32_EXPORT_MAX_ERROR
from xr0_engine.config import ModelConfig
from xr0_engine.export.agreement import compare_export
from xr0_engine.export.folder import STAGES, export_onnx, write_graphs
from xr0_engine.exported.manifest import ExportCase, Manifest, StaticShapes
from xr0_engine.exported.model import ExportedModel
from xr0_engine.exported.onnx_stage import OnnxStage
from xr0_engine.family import OFFSETS, VARIANT
from xr0_engine.golden.cases import chunk_inputs, golden_config, golden_inputs
from xr0_engine.model.weights import read_headers, read_index
from xr0_engine.types import CheckpointError

GOLDEN_CASES = [
    pytest.param(path, id=path.stem)
    for folder in (GOLDEN, GOLDEN.parent / "golden_xr1")
    for path in sorted(folder.glob("*.*.safetensors"))
    if not path.name.endswith(".weights.safetensors")
]
SPARE_TOKENS = 5
"""Golden prompts get that much more padding than they have, as a prompt shorter than its graph does."""


def golden_model(case: Path, inputs, folder: Path) -> ExportedModel:
    """The golden model as graphs of the case's shapes, in ONNX Runtime."""
    name = case.stem.partition(".")[0]
    config = golden_config(json.loads((case.parent / f"{name}.json").read_text()))
    stored, faults = read_headers([case.parent / f"{name}.weights.safetensors"])
    assert faults == []
    batch, tokens = inputs.input_ids.shape
    shapes = StaticShapes(inputs.image_grids, batch, inputs.action_mask.shape[1], (tokens + SPARE_TOKENS,))
    files = write_graphs(config, stored, shapes, "fp32", folder, tuple(STAGES), {})
    case_ = ExportCase(name, name, (0, 0), batch)
    manifest = Manifest("fp32", 0, case_, shapes, (), "", "", files, {})
    return ExportedModel(config, manifest, CPU, "onnx", files, lambda key: OnnxStage(folder / files[key], CPU), {})


@pytest.mark.parametrize("path", GOLDEN_CASES)
def test_golden_case_through_onnx_runtime(path, tmp_path):
    case = load_file(path)
    config = golden_config(json.loads(path.with_name(f"{path.stem.partition('.')[0]}.json").read_text()))
    inputs = golden_inputs(case, config)
    model = golden_model(path, inputs, tmp_path)
    noise, prefix, length = chunk_inputs(case, case["prefix"])

    vision = model.encode_images(inputs)
    kv = model.prefill(inputs, vision)
    actions = model.sample(kv, inputs.state, noise, prefix, length)
    whole = model.step(inputs, noise, prefix, length)

    is_token = inputs.attention_mask[:, None, :, None]
    for layer in range(len(kv.keys)):
        for name, ours in (("key", kv.keys), ("value", kv.values)):
            unpadded = ours[layer, :, :, SPARE_TOKENS:]
            expected = case[f"kv.{layer}.{name}"]
            torch.testing.assert_close(
                unpadded * is_token, expected * is_token, atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0, msg=name
            )
    torch.testing.assert_close(vision.tokens, case["vision_tokens"], atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)
    for chunk in (actions, whole):
        torch.testing.assert_close(chunk, case["actions"], atol=FLOAT32_EXPORT_MAX_ERROR, rtol=0)


def test_golden_cases_cover_both_families_modes_prefixes_padding_and_videos():
    names = {path.id for path in GOLDEN_CASES}
    assert {"full_causal.two_views_padded_batch2", "grouped.prefix6_batch2", "grouped.sync_one_view"} <= names
    assert {"xr1_post.prefix4_two_views", "xr1_video.padded_batch2", "xr1_video.three_cameras"} <= names


def test_a_stream_without_norms_is_kept_in_float32(checkpoint, video_checkpoint, tmp_path):
    """It grows through the depth, beyond what half precision holds."""
    found = {}
    for name, folder, case in (("norms", checkpoint, LIBERO), ("none", video_checkpoint, VIDEOS)):
        manifest = export_onnx(folder, case, "fp16", tmp_path / name, stages=["flow"])
        graph = onnx.load(tmp_path / name / next(iter(manifest.stages.values())), load_external_data=False).graph
        types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
        norms = [node for node in graph.node if "_layernorm" in node.name and node.op_type == "RMSNormalization"]
        found[name] = {types[node.input[0]] for node in norms}
    assert found == {"norms": {onnx.TensorProto.FLOAT16}, "none": {onnx.TensorProto.FLOAT}}


def test_graphs_hold_standard_operators_under_the_checkpoints_names(exported, checkpoint):
    manifest, stored = Manifest.read(exported), read_index(checkpoint)
    assert set(manifest.stages) == {
        "vision",
        *(f"{stage}.{manifest.shapes.tokens[0]}" for stage in ("prefill", "flow", "step")),
    }
    for name in manifest.stages.values():
        model = onnx.load(exported / name, load_external_data=False)
        onnx.checker.check_model(str(exported / name), full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", manifest.opset)]
        assert {node.domain for node in model.graph.node} == {""}
        weights = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".weight")}
        assert weights
        assert weights <= stored.keys()
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["checkpoint_sha256"] == manifest.checkpoint_sha256
        assert json.loads(metadata["robot_types"]) == list(manifest.robot_types)
        assert np.shape(json.loads(metadata["action_statistics"])["std"]) == (10, 32)


def test_time_is_folded_away(exported):
    """No weight of the time MLP is in the graph, and the flow's steps are unrolled."""
    manifest = Manifest.read(exported)
    graph = onnx.load(exported / manifest.stages[f"flow.{manifest.shapes.tokens[0]}"], load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer]
    assert [name for name in names if name.startswith(("t_embedder", "t_projector"))] == []
    assert "dit.layers.0.scale_a.step1" in names
    steps = {node.name.partition(".")[0] for node in graph.node if node.name.startswith("step")}
    assert steps == {"step0", "step1"}


def test_stages_share_one_file_of_weights(exported, checkpoint):
    stored = sum(place.num_elements * 4 for place in read_index(checkpoint).values())
    assert (exported / "weights.data").stat().st_size < 1.1 * stored
    assert [path.name for path in exported.glob("*.data")] == ["weights.data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"precision": "int8"}, "precision: expected fp32, fp16, bf16; got 'int8'", id="precision"),
        pytest.param({"stages": ["decode"]}, "stages: expected some of vision, prefill, flow, step", id="stage"),
        pytest.param({"tokens": [8]}, "tokens: expected at least", id="too few tokens"),
        pytest.param(
            {"case": ExportCase("towel", "towel_robot", (64, 64))}, "robot_type: expected one of", id="robot type"
        ),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing(arguments, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(
            **{"checkpoint": checkpoint, "case": LIBERO, "precision": "fp32", "out": tmp_path / "x", **arguments}
        )
    assert list(tmp_path.iterdir()) == []


def test_robot_types_without_a_profile_are_left_out(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    path = folder / "preprocessor_config.json"
    content = json.loads(path.read_text())
    robots = content["action_config"]
    content["action_config"] = {"libero_all": robots["libero_all"], "unheard_of": robots["libero_all"]}
    path.write_text(json.dumps(content))
    manifest = export_onnx(folder, LIBERO, "fp32", tmp_path / "x", stages=["vision"])
    assert manifest.robot_types == ("libero_all",)


@pytest.mark.parametrize("name", ["xr0", "xr1"])
def test_a_released_config_says_the_family_to_an_export(name, checkpoint, video_checkpoint, tmp_path):
    """Of either family it is of model_type mibot, and leaves family and widths to the weights' names."""
    whole, case = {"xr0": (checkpoint, LIBERO), "xr1": (video_checkpoint, VIDEOS)}[name]
    expected = ModelConfig.load(whole)
    if name == "xr1":
        # What nothing says is as in the released benchmark checkpoints.
        expected = replace(expected, head=replace(expected.head, position_offset=0))
    folder = shutil.copytree(whole, tmp_path / "released")
    hf = json.loads((folder / "config.json").read_text())
    dit = {key: value for key, value in hf["dit_config"].items() if key not in VARIANT}
    released = {key: value for key, value in hf.items() if key not in (*OFFSETS, "normalize_instruction")}
    (folder / "config.json").write_text(json.dumps({**released, "model_type": "mibot", "dit_config": dit}))
    assert ModelConfig.load(folder) == expected
    assert expected.family == name
    export_onnx(folder, case, "fp32", tmp_path / "x", stages=["flow"])
    assert ModelConfig.load(tmp_path / "x") == expected
    assert [row for row in compare_export(tmp_path / "x") if not row.passed] == []


def test_statistics_and_videos_of_a_processor_config_come_along(video_checkpoint, tmp_path):
    """As transformers 5 writes both, beside a file of the images alone."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(video_checkpoint, folder)
    plain, videos = folder / "preprocessor_config.json", folder / "video_preprocessor_config.json"
    images = json.loads(plain.read_text())
    nested = {"image_processor": images, "video_processor": json.loads(videos.read_text())}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    plain.write_text(json.dumps({name: value for name, value in images.items() if name != "action_config"}))
    videos.unlink()
    export_onnx(folder, VIDEOS, "fp32", tmp_path / "x", stages=["vision"])
    assert json.loads((tmp_path / "x" / plain.name).read_text()) == images
    assert json.loads((tmp_path / "x" / videos.name).read_text()) == {"do_resize": False}


def test_folder_that_holds_something_is_refused(checkpoint, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_onnx(checkpoint, LIBERO, "fp32", tmp_path)


def test_checkpoint_with_a_missing_tensor_is_refused(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        export_onnx(broken, LIBERO, "fp32", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_disk_without_room_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(OSError, match="GiB free"):
        export_onnx(checkpoint, LIBERO, "fp32", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(model, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(checkpoint, LIBERO, "fp32", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
