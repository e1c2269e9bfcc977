"""Verification says yes to an export as written, and no to one that computes something else."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from tests.export.cases import LIBERO, VIDEOS
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.export.agreement import compare_export
from xr0_engine.export.engines import build_engines
from xr0_engine.export.folder import export_onnx
from xr0_engine.exported.manifest import MANIFEST_FILE, ExportCase, FileRecord, Manifest, sha256
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.history import FrameHistory
from xr0_engine.sizes import tiny_xr1_config


@pytest.fixture
def copied(exported, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    return folder


def change_weight(folder, name: str) -> None:
    """Add 0.5 to one element of a weight, where the graphs' file of weights has it."""
    graph = onnx.load(folder / "step.96.onnx", load_external_data=False).graph
    place = next(tensor for tensor in graph.initializer if tensor.name == name)
    offset = next(int(entry.value) for entry in place.external_data if entry.key == "offset")
    with (folder / "weights.data").open("r+b") as file:
        file.seek(offset)
        value = np.frombuffer(file.read(4), np.float32) + np.float32(0.5)
        file.seek(offset)
        file.write(value.tobytes())


def failures(folder) -> set[str]:
    return {f"{row.case}: {row.quantity}" for row in compare_export(folder) if not row.passed}


def test_export_as_written_passes_in_every_stage(exported):
    rows = list(compare_export(exported))
    assert [row for row in rows if not row.passed] == []
    assert {row.case for row in rows} == {"files", "vision", "prefill.96", "flow.96", "step.96", "end to end.96"}


def test_one_wrong_weight_fails_where_it_is(copied):
    change_weight(copied, "dit.layers.0.attn.o_proj.weight")
    assert failures(copied) == {
        "files: changed: weights.data",
        *(f"{case}.96: actions, prefix {length}" for case in ("flow", "step", "end to end") for length in (0, 3)),
    }


def test_wrong_weight_under_a_manifest_made_to_fit_fails_too(copied):
    change_weight(copied, "vlm.model.language_model.layers.1.self_attn.v_proj.weight")
    content = json.loads((copied / MANIFEST_FILE).read_text())
    content["files"]["weights.data"]["sha256"] = sha256(copied / "weights.data")
    (copied / MANIFEST_FILE).write_text(json.dumps(content))
    assert failures(copied) >= {"prefill.96: values", "end to end.96: actions, prefix 0"}
    assert not any(name.startswith(("files", "vision", "flow")) for name in failures(copied))


def test_padded_batch_two_prompt_lengths_and_half_precision(checkpoint, tmp_path):
    folder = tmp_path / "export"
    case = ExportCase("pair", "libero_all", (64, 96), batch=2)
    export_onnx(checkpoint, case, "fp16", folder, tokens=(160, 96), stages=["vision", "prefill", "flow"])
    assert Manifest.read(folder).shapes.tokens == (96, 160)
    rows = list(compare_export(folder))
    assert [row for row in rows if not row.passed] == []
    assert {"end to end.96", "end to end.160"} <= {row.case for row in rows}


def test_time_and_tables_rounded_as_the_released_code_does(checkpoint, tmp_path):
    config = ModelConfig.load(checkpoint)
    folder, out = tmp_path / "checkpoint", tmp_path / "export"
    write_checkpoint(folder, replace(config, head=replace(config.head, compat_bf16_time=True)))
    export_onnx(folder, LIBERO, "fp32", out)
    assert failures(out) == set()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_of_this_gpu_compute_the_same(precision, checkpoint, tmp_path):
    if torch.cuda.get_device_capability() not in ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)):
        pytest.skip("TensorRT for RTX does not build for this GPU")
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path / "export"
    export_onnx(checkpoint, LIBERO, precision, folder)
    build_engines(folder, "local", stages=["vision", "prefill", "flow", "step"])
    rows = list(compare_export(folder, backend="tensorrt"))
    assert [row for row in rows if not row.passed] == []
    assert "end to end.96" in {row.case for row in rows}


def test_another_checkpoint_is_refused(exported, checkpoint, tmp_path):
    other = tmp_path / "other"
    write_checkpoint(other, ModelConfig.load(checkpoint), seed=1)
    with pytest.raises(ValueError, match="is another checkpoint"):
        next(compare_export(exported, str(other)))
    # The hash comes first: a fine-tune of the same model need not have the export's robot type.
    settings = json.loads((other / "preprocessor_config.json").read_text())
    tables = settings["action_config"]
    settings["action_config"] = {name: tables[name] for name in tables if name != LIBERO.robot_type}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is another checkpoint"):
        next(compare_export(exported, str(other)))


def test_videos_and_several_states_in_half_precision(video_checkpoint, tmp_path):
    folder = tmp_path / "export"
    export_onnx(video_checkpoint, replace(VIDEOS, batch=2), "fp16", folder)
    rows = list(compare_export(folder))
    assert [row for row in rows if not row.passed] == []
    assert {row.case.partition(".")[0] for row in rows} == {"files", "vision", "prefill", "flow", "step", "end to end"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: tiny_xr1_config(),
            "another model than the export: family is xr0 in the export, xr1 there: name",
        ),
        (
            lambda config: replace(config, head=replace(config.head, state_length=4)),
            r"another model than the export: head\.state_length is 1 in the export, 4 there: name",
        ),
    ],
    ids=["family", "state-length"],
)
def test_a_checkpoint_of_another_model_is_named(change, message, exported, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(change(ModelConfig.load(checkpoint)).to_hf()))
    with pytest.raises(ValueError, match=message):
        next(compare_export(exported, str(tmp_path)))


def test_a_profile_that_has_become_another_is_named(copied, tmp_path):
    """Of a checkpoint that is the export's: its profile stands in a file beside it, which has a history by now."""
    profile = replace(load_embodiment("libero"), history=FrameHistory(4, 2))
    (tmp_path / "libero.yaml").write_text(json.dumps(asdict(profile)))
    manifest = json.loads((copied / MANIFEST_FILE).read_text())
    manifest["case"]["profile"] = str(tmp_path / "libero.yaml")
    (copied / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="history: frames: the export is for 1, the profile has 4"):
        next(compare_export(copied))


def test_command_exits_with_1_and_names_the_failure(copied):
    change_weight(copied, "dit.layers.0.attn.o_proj.weight")
    result = CliRunner().invoke(app, ["export", "verify", str(copied), "--json"])
    assert result.exit_code == 1, result.stderr
    wrong = {row["case"] for row in json.loads(result.stdout) if not row["passed"]}
    assert wrong == {"files", "flow.96", "step.96", "end to end.96"}


@pytest.mark.parametrize(("case", "tokens"), [("libero", 224), ("robocasa365", 544)])
def test_commands_export_and_verify_a_case(case, tokens, checkpoint, video_checkpoint, tmp_path):
    out, folder = tmp_path / "export", checkpoint if case == "libero" else video_checkpoint
    result = CliRunner().invoke(
        app, ["export", "onnx", str(folder), "--case", case, "--out", str(out), "--stage", "flow"]
    )
    assert result.exit_code == 0, result.stderr
    assert set(Manifest.read(out).stages) == {f"flow.{tokens}"}
    result = CliRunner().invoke(app, ["export", "verify", str(out)])
    assert result.exit_code == 0, result.stdout
    assert "3 of 3 within tolerance" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "nowhere holds no manifest.json: not a folder that `xr0 export` wrote"),
        (["onnx", "nowhere", "--out", "x"], "there is no checkpoint folder nowhere"),
        (["onnx", "{checkpoint}", "--out", "x", "--case", "towel"], "case: expected one of libero"),
        (["tensorrt", "{exported}", "--target", "h100"], "target: expected rtx4090, rtx5090, a100 or local"),
        (["verify", "{exported}", "--backend", "magic"], "backend: an export has auto, onnx, tensorrt; got 'magic'"),
    ],
    ids=["no-manifest", "no-checkpoint", "case", "target", "backend"],
)
def test_wrong_call_exits_with_2(arguments, message, checkpoint, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [word.format(checkpoint=checkpoint, exported=exported) for word in arguments]
    result = CliRunner().invoke(app, ["export", *filled])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def test_file_records_tell_size_and_hash(exported):
    record = Manifest.read(exported).files["config.json"]
    path = exported / "config.json"
    assert record == FileRecord(path.stat().st_size, sha256(path))
    assert Manifest.read(exported).case == LIBERO
