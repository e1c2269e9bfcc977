"""Loading: strict, streamed, and nothing left unset."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import CPU, ROOT, load, make_config
from xr0_engine.checkpoint import init_checkpoint, write_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.model.weights import (
    INDEX_FILE,
    checkpoint_shapes,
    load_model,
    read_headers,
    read_index,
    resolve_checkpoint,
)
from xr0_engine.sizes import published_config
from xr0_engine.types import CheckpointError

SHARD = "model-00001-of-00001.safetensors"
RESIDENT_LIMIT = 1.15
"""Of the checkpoint's size, while and after loading."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "tiny")


def rewrite(folder, change):
    """Apply change to the dictionary of tensors, and drop the index so that the file alone counts."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    (folder / INDEX_FILE).unlink(missing_ok=True)


def load_error(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def loaded_tensors(model):
    return {name.removeprefix("head."): p.data for name, p in model.named_parameters()}


def test_published_checkpoint_has_the_published_tensors():
    shapes = checkpoint_shapes(published_config())
    head = {name: shape for name, shape in shapes.items() if not name.startswith("vlm.")}
    assert len(shapes) == 932
    assert len(head) == 219
    assert sum(torch.Size(shape).numel() for shape in head.values()) == 278_458_368
    assert shapes["dit.layers.15.attn.qkv_proj.weight"] == (3072, 1024)
    assert shapes["vlm.model.language_model.layers.35.mlp.down_proj.weight"] == (2560, 9728)
    assert shapes["vlm.model.visual.patch_embed.proj.weight"] == (1024, 3, 2, 16, 16)


def test_every_parameter_equals_the_file_packed_or_not(folder):
    stored = load_file(folder / SHARD)
    model = load(folder, torch.bfloat16)
    tensors = loaded_tensors(model)
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, stored[name])] == []
    last = "vlm.model.language_model.layers.3."
    unused = {"q_proj", "q_norm", "o_proj", "gate_proj", "up_proj", "down_proj", "post_attention_layernorm"}
    absent = set(stored) - set(tensors)
    assert absent - {"vlm.model.language_model.norm.weight"} == {
        name for name in stored if name.startswith(last) and name.split(".")[-2] in unused
    }
    packed = model.vlm.model.language_model.layers[0].self_attn
    assert packed.packed.data_ptr() == packed.q_proj.weight.data_ptr()


def test_training_prefix_is_read(folder):
    expected = loaded_tensors(load(folder))

    def prefix(tensors):
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    rewrite(folder, prefix)
    actual = loaded_tensors(load(folder))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_tied_lm_head_is_ignored(folder):
    rewrite(folder, lambda tensors: tensors.update({"vlm.lm_head.weight": torch.zeros(1024, 128)}))
    load(folder)


def test_float32_and_float16_files_load(folder):
    def convert(tensors):
        for index, name in enumerate(list(tensors)):
            tensors[name] = tensors[name].to((torch.float32, torch.float16)[index % 2])

    rewrite(folder, convert)
    assert {p.dtype for p in load(folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_missing_unexpected_and_misshapen_tensors_are_named_together(folder):
    def change(tensors):
        del tensors["sink.weight"], tensors["vlm.model.language_model.norm.weight"]
        tensors["dit.layers.9.adaln_table"] = torch.zeros(6, 128)
        tensors["state_projector.layers.0.weight"] = torch.zeros(128, 31)

    rewrite(folder, change)
    message = load_error(folder)
    for part in (
        "missing sink.weight [1, 128]",
        "missing vlm.model.language_model.norm.weight",
        "unexpected dit.layers.9.adaln_table",
        "state_projector.layers.0.weight has shape [128, 31], expected [128, 32]",
    ):
        assert part in message


def test_many_faults_are_counted_not_listed(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "visual" in name])
    message = load_error(folder)
    assert message.count("missing") == 12
    assert message.endswith("more")


def test_wrong_dtype_is_named(folder):
    rewrite(folder, lambda t: t.update({"sink.weight": torch.zeros(1, 128, dtype=torch.int32)}))
    assert "sink.weight has dtype I32" in load_error(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -1000], ids=lambda kept: f"{kept}-bytes")
def test_truncated_file_is_named(folder, kept):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:kept])
    assert f"file {SHARD} is truncated or corrupt" in load_error(folder)


def test_garbage_is_named(folder):
    (folder / SHARD).write_bytes(bytes(range(256)) * 40)
    assert f"file {SHARD} is truncated or corrupt" in load_error(folder)


def test_missing_shard_is_named(folder):
    (folder / SHARD).unlink()
    assert f"file {SHARD} is missing" in load_error(folder)


def test_index_and_file_that_disagree_are_refused(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["another.weight"] = SHARD
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert f"another.weight is not in {SHARD}, where the index has it" in load_error(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "\xff"], ids=repr)
def test_corrupt_index_is_named(folder, content):
    (folder / INDEX_FILE).write_text(content, encoding="latin-1")
    assert f"{INDEX_FILE} is corrupt" in load_error(folder)


@pytest.mark.parametrize("name", ["../tiny/model.safetensors", "weights.bin", "/etc/passwd"])
def test_index_cannot_lead_elsewhere(folder, name):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"sink.weight": name}}))
    assert "names files that are no safetensors of this folder" in load_error(folder)


def test_pickled_weights_are_never_read(folder, tmp_path):
    bomb = tmp_path / "tiny" / "pytorch_model.bin"
    torch.save(load_file(folder / SHARD), bomb)
    (folder / SHARD).unlink()
    (folder / INDEX_FILE).unlink()
    assert "holds no *.safetensors weights" in load_error(folder)


def test_same_name_twice_is_refused(folder):
    save_file({"sink.weight": torch.zeros(1, 128)}, folder / "extra.safetensors")
    (folder / INDEX_FILE).unlink()
    assert "sink.weight is stored twice" in load_error(folder)


def test_checkpoint_of_other_sizes_is_refused_before_reading(folder):
    config = replace(ModelConfig.load(folder), head=make_config(head={"num_layers": 4}).head)
    with pytest.raises(CheckpointError, match=r"missing dit\.layers\.3"):
        load_model(config, read_index(folder), CPU, torch.float32)


def test_read_headers_reports_all_files(folder):
    stored, faults = read_headers([folder / "a.safetensors", folder / SHARD, folder / "b.safetensors"])
    assert faults == ["file a.safetensors is missing", "file b.safetensors is missing"]
    assert len(stored) == len(load_file(folder / SHARD))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/folder/here", "there is no checkpoint folder"),
        ("", "is a file|holds no|there is no"),
        (f"{__file__}", "is a file; expected a checkpoint folder"),
    ],
    ids=["folder", "empty", "file"],
)
def test_unusable_path(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_index(resolve_checkpoint(path))


def test_hub_id_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="download it elsewhere and pass the folder"):
        resolve_checkpoint("nobody/no-such-model-of-xr0")


MEASURE = """
import sys, threading, time
from pathlib import Path
import psutil, torch
from xr0_engine.config import ModelConfig
from xr0_engine.model import weights
folder = Path(sys.argv[1])
weights.READ_WINDOW = int(sys.argv[2])
config, stored = ModelConfig.load(folder), weights.read_index(folder)
# What torch itself takes when it first works is not the checkpoint's.
weights.checkpoint_shapes(config)
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
process, peak, done = psutil.Process(), 0, False
before = process.memory_info().rss
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = weights.load_model(config, stored, torch.device("cpu"), torch.bfloat16)
done = True
thread.join()
print(peak - before)
"""


def test_loading_keeps_no_second_copy(tmp_path):
    config = make_config(
        text={"num_layers": 8, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 1024},
        vision={"depth": 4},
    )
    folder = tmp_path / "model"
    write_checkpoint(folder, config)
    size = sum(place.num_bytes for place in read_index(folder).values())
    window = size // 20
    command = [sys.executable, "-c", MEASURE, str(folder), str(window)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(run.stdout) < RESIDENT_LIMIT * size
