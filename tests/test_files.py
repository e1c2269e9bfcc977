"""Files that git-lfs has not fetched are told from broken ones, wherever a checkpoint or an export is read."""

from __future__ import annotations

import shutil

import pytest
from typer.testing import CliRunner

from tests.support import GOLDEN
from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.export.folder import export_onnx
from xr0_engine.exported.manifest import ExportCase
from xr0_engine.files import read_json
from xr0_engine.training.base import read_base
from xr0_engine.training.data.stats import Statistics, merge
from xr0_engine.types import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
SHARD = "model-00001-of-00001.safetensors"
FILES = ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors.index.json", SHARD]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "export"
    export_onnx(tiny, ExportCase("libero", "libero_all", (64, 64)), "fp32", folder, stages=["vision"])
    return folder


def replaced(folder, target, name):
    copy = shutil.copytree(folder, target / "copy")
    (copy / name).write_bytes(POINTER)
    return copy


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_checkpoint(tiny, tmp_path, name):
    copy = replaced(tiny, tmp_path, name)
    result = CliRunner().invoke(app, ["inspect", str(copy)])
    assert result.exit_code == 2
    told = result.stderr.replace("\n", "")
    assert f"{copy / name} is a git-lfs pointer" in told
    assert f"`git lfs pull` in {copy}" in told
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Engine.from_pretrained(copy, "cpu", "float32")


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_the_base_of_a_training_run(tiny, tmp_path, name):
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_base(replaced(tiny, tmp_path, name))


@pytest.mark.parametrize("name", ["manifest.json", *FILES[:3], "vision.onnx", "weights.data"])
def test_every_file_of_an_export(exported, tmp_path, name):
    copy = replaced(exported, tmp_path, name)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
        Engine.from_export(copy)


def test_the_file_that_statistics_go_into(tmp_path):
    import numpy as np

    (tmp_path / "p.json").write_bytes(POINTER)
    table = np.ones((2, 32))
    with pytest.raises(CheckpointError, match="git lfs pull"):
        merge(tmp_path / "p.json", Statistics("arm", table, table, 1, 1), True)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_other_broken_files_are_no_pointers(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden cases are not at {GOLDEN}")
@pytest.mark.parametrize("name", ["grouped.json", "grouped.weights.safetensors", "grouped.prefix1.safetensors"])
def test_every_file_of_a_golden_case(tmp_path, name):
    folder = tmp_path / "golden"
    folder.mkdir()
    for file in ("grouped.json", "grouped.weights.safetensors", "grouped.prefix1.safetensors"):
        shutil.copyfile(GOLDEN / file, folder / file)
    (folder / name).write_bytes(POINTER)
    result = CliRunner().invoke(app, ["verify", str(folder), "--device", "cpu"])
    assert result.exit_code == 2
    assert f"{folder / name} is a git-lfs pointer" in result.stderr.replace("\n", "")
