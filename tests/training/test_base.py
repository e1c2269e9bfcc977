"""What a run starts from: the Hugging Face folder of the VLM alone, read as strictly as XR-0's own."""

from __future__ import annotations

import json
import shutil
import struct
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.support import make_config
from tests.training.support import (
    ROBOT_TYPE,
    SIZES,
    config_for,
    language_sample,
    robot_sample,
    statistics,
    train,
    values,
)
from xr0_engine import Engine
from xr0_engine.config import read_hf_config
from xr0_engine.model.weights import checkpoint_shapes, read_tensor
from xr0_engine.sizes import published_config, tiny_xr1_config
from xr0_engine.training.base import fresh_head, read_base
from xr0_engine.training.batch import Collator
from xr0_engine.types import CheckpointError

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, base):
    """As transformers writes it, with random weights and image settings that are not XR-0's."""
    folder = tmp_path_factory.mktemp("qwen") / "vlm"
    config = Qwen3VLConfig(**make_config(**SIZES).to_hf()["vlm_config"])
    torch.manual_seed(1)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 16_777_216}}))
    return folder


@pytest.fixture
def copy(vlm, tmp_path):
    return shutil.copytree(vlm, tmp_path / "vlm")


def test_every_tensor_is_read_under_xr0s_name(vlm):
    base = read_base(vlm)
    assert not base.has_head
    stored = load_file(vlm / WEIGHTS)
    assert {f"vlm.{name}" for name in stored} == set(base.stored)
    for name, value in stored.items():
        assert torch.equal(read_tensor(base.stored[f"vlm.{name}"]), value)


def test_the_published_size_fits(tmp_path):
    """The layout of Qwen3-VL-4B-Instruct, its weights a hole in the file."""
    xr0 = published_config()
    hf = xr0.to_hf()["vlm_config"]
    with torch.device("meta"):
        vlm = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**hf))
    # Its LM head is tied, and not in the file.
    shapes = {name: list(p.shape) for name, p in vlm.named_parameters() if name != "lm_head.weight"}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    base = read_base(tmp_path)
    assert base.config == xr0
    expected = {name: shape for name, shape in checkpoint_shapes(xr0).items() if name.startswith("vlm.")}
    assert {name: place.shape for name, place in base.stored.items()} == expected


def test_new_weights_of_xr1_are_as_published():
    """Linear weights normal(0, 0.02), biases 0, norms 1, adaLN's table normal(0, 1) / sqrt(width)."""
    config = tiny_xr1_config()
    head = fresh_head(config, 0)
    assert torch.equal(head["t_embedder.mlp.0.weight"], fresh_head(config, 0)["t_embedder.mlp.0.weight"])
    width, seen = config.head.hidden_size, set()
    for name, value in head.items():
        if name.endswith("bias"):
            seen.add("bias")
            assert not value.any(), name
        elif value.ndim == 1:
            seen.add("norm")
            assert (value == 1).all(), name
        else:
            std = width**-0.5 if name.endswith("adaln_table") else 0.02
            # Four standard errors of a sample's deviation, of the smallest tensors too.
            assert abs(float(value.std()) / std - 1) < 4 / (2 * value.numel()) ** 0.5, name
            seen.add("table" if name.endswith("adaln_table") else "weight")
    assert seen == {"bias", "norm", "table", "weight"}


def test_pretraining_starts_from_the_vlm_and_ends_in_an_xr0_folder(vlm, tmp_path):
    config = config_for("pretrain_vlm", vlm, "optim.steps=4", "optim.warmup_steps=1", "data.language_every=2")
    lines = train(config, tmp_path / "first")
    assert values(lines, "winner_l1")
    assert values(lines, "next_token")
    made = tmp_path / "first" / "model"
    trained, begun = read_base(made), read_base(vlm)
    assert trained.has_head
    moved = [name for name in begun.stored if not torch.equal(*(read_tensor(b.stored[name]) for b in (trained, begun)))]
    assert len(moved) == len(begun.stored)
    for name, value in fresh_head(trained.config, config.run.seed).items():
        assert torch.equal(read_tensor(trained.stored[name]), value.bfloat16())
    engine = Engine.from_pretrained(made)
    assert engine.robot_types == (ROBOT_TYPE,)
    settings = json.loads((made / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 1024, "longest_edge": 90_000}
    assert (settings["min_pixels"], settings["max_pixels"]) == (1024, 90_000)
    # Step 2 goes on from there.
    second = train(config_for("pretrain_dit", made, "optim.steps=1"), tmp_path / "second")
    assert values(second, "loss")


def test_the_bases_limits_of_images_are_trained_with_and_kept(base, vlm, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    file = folder / "preprocessor_config.json"
    settings = {key: value for key, value in json.loads(file.read_text()).items() if key != "size"}
    file.write_text(json.dumps({**settings, "min_pixels": 4096, "max_pixels": 200_000}))
    read = read_base(folder)
    kept = {key: read.preprocessor()[key] for key in ("size", "min_pixels", "max_pixels")}
    assert kept == {"size": {"shortest_edge": 4096, "longest_edge": 200_000}, "min_pixels": 4096, "max_pixels": 200_000}
    # 32x32 is too small for them, not for the released ones. Those of the VLM alone are none of XR-0's.
    for place, config, tokens in ((folder, read.config, 4), (base, read.config, 1), (vlm, read_base(vlm).config, 1)):
        collate = Collator(place, config, statistics())
        for batch in (collate.robot([robot_sample(0)]), collate.language([language_sample(0)])):
            assert (batch.inputs.input_ids == config.tokens.image).sum() == tokens


def test_image_settings_that_cannot_be_trained_with_are_refused_before_training(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_std": [0.2, 0.2, 0.2]}))
    with pytest.raises(CheckpointError, match="image_std is"):
        train(config_for("finetune_head", folder, "optim.steps=1"), tmp_path / "run")


def test_a_stored_lm_head_may_only_repeat_the_embeddings(copy):
    tensors = load_file(copy / WEIGHTS)
    embeddings = tensors["model.language_model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, copy / WEIGHTS)
    read_base(copy)
    save_file(tensors | {"lm_head.weight": embeddings + 1}, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the text embeddings"):
        read_base(copy)


def without(tensors, name):
    del tensors[name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            lambda tensors: without(tensors, "model.visual.merger.norm.weight"),
            r"missing vlm.model.visual.merger.norm.weight \[32\]",
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.update({"model.language_model.layers.7.mlp.gate_proj.weight": torch.zeros(1)}),
            "unexpected vlm.model.language_model.layers.7.mlp.gate_proj.weight",
            id="unexpected",
        ),
        pytest.param(
            lambda tensors: tensors.update({"model.language_model.norm.weight": torch.zeros(7)}),
            r"vlm.model.language_model.norm.weight has shape \[7\], expected \[64\]",
            id="shape",
        ),
    ],
)
def test_tensors_at_fault_are_named(change, complaint, copy):
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=complaint):
        read_base(copy)


def test_a_config_that_is_none_is_refused(copy):
    raw = read_hf_config(copy)
    (copy / "config.json").write_text(json.dumps(raw | {"text_config": 7}))
    with pytest.raises(CheckpointError, match="no configuration of qwen3_vl"):
        read_base(copy)


@pytest.mark.parametrize("recipe", ["post_train_async", "finetune_head"])
def test_a_recipe_that_needs_a_head_is_refused(recipe, vlm, tmp_path):
    with pytest.raises(ValueError, match=r"vlm is a VLM without an action head; .* the recipe pretrain_vlm"):
        train(config_for(recipe, vlm), tmp_path / "run")
    assert not (tmp_path / "run").exists()
