"""Which family a checkpoint is of: told by its weights, and refused where they say something else than config.json."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.family import FAMILIES, VARIANT, named_family
from xr0_engine.model.choice import choice_shapes
from xr0_engine.model.weights import check_model, checkpoint_shapes, read_index
from xr0_engine.sizes import config_of, published_config, published_xr1_config, tiny_config, tiny_xr1_config
from xr0_engine.training.base import read_base
from xr0_engine.types import CheckpointError

RELEASED_KEYS = {
    *("model_type", "torch_dtype", "vlm_config", "dit_config"),
    *("action_length", "action_dim", "state_length", "state_dim"),
}
"""What a released config.json says of these."""
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "xr1"
    init_checkpoint(folder, family="xr1")
    return folder


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "xr1")


@pytest.fixture
def released(folder):
    """As the released benchmark checkpoints describe themselves: without any key of ours."""
    edit(folder, lambda hf: strip({key: value for key, value in hf.items() if key in RELEASED_KEYS}))
    return folder


def strip(hf):
    return {**hf, "dit_config": {key: value for key, value in hf["dit_config"].items() if key not in VARIANT}}


def edit(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def weights(folder, change):
    """Weights of a folder, changed, in the place of its own."""
    tensors = load_file(folder / WEIGHTS)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(tensors), folder / WEIGHTS)


def choice_tensors(config):
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in choice_shapes(config).items()}


def test_published_sizes_have_the_published_counts():
    config = published_xr1_config()
    shapes = checkpoint_shapes(config)
    head = {name: shape for name, shape in shapes.items() if not name.startswith("vlm.")}
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (1120, 5_053_149_696)
    assert (len(head), sum(map(math.prod, head.values()))) == (407, 615_333_888)
    assert head["action_output_layer.layers.0.weight"] == (1024, 1024)
    choice = choice_shapes(config)
    assert (len(choice), sum(map(math.prod, choice.values()))) == (14, 60_072_960)
    assert choice["action_projector_choice.1.layers.0.weight"] == (300, 2560)
    assert choice_shapes(published_config()) == {}


def test_the_released_form_is_read_as_our_own(tiny, released):
    ours, theirs = ModelConfig.load(tiny), ModelConfig.load(released)
    assert theirs == ours == tiny_xr1_config()
    assert (theirs.family, theirs.normalize_instruction, theirs.double_statistics) == ("xr1", False, True)
    assert (theirs.head.position_offset, theirs.head.stream_norms) == (0, False)
    engines = [Engine.from_pretrained(it, device="cpu", dtype="float32") for it in (tiny, released)]
    first, second = (engine.infer(engine.example("robocasa_mg"), seed=0) for engine in engines)
    assert (first.actions == second.actions).all()


def test_xr0_may_call_itself_the_same(tmp_path):
    """Its released classes are named as XR-1's: the weights decide."""
    init_checkpoint(tmp_path / "xr0")
    edit(tmp_path / "xr0", lambda hf: strip({**hf, "model_type": FAMILIES["xr1"].model_type}))
    config = ModelConfig.load(tmp_path / "xr0")
    assert config == tiny_config()
    assert config.family == "xr0"
    # A training starts from it too.
    assert read_base(tmp_path / "xr0").config == config


@pytest.mark.parametrize("widths", [{"mlp_width": 96}, {"output_width": 64}, {"mlp_width": 200, "output_width": 40}])
def test_widths_come_from_the_weights(tmp_path, widths):
    file = tmp_path / "told.json"
    file.write_text(json.dumps({"dit_config": widths}))
    init_checkpoint(tmp_path / "made", config=file, family="xr1")
    edit(tmp_path / "made", strip)
    head = ModelConfig.load(tmp_path / "made").head
    assert {name: getattr(head, name) for name in widths} == widths
    check_model(ModelConfig.load(tmp_path / "made"), read_index(tmp_path / "made"))


@pytest.mark.parametrize("key", ["position_offset", "inference_action_position_offset"])
def test_the_offset_is_read_under_either_key(released, key):
    edit(released, lambda hf: {**hf, key: 10})
    assert ModelConfig.load(released).head.position_offset == 10


def test_an_offset_in_another_place_is_refused(released):
    edit(released, lambda hf: {**hf, "dit_config": {**hf["dit_config"], "inference_action_position_offset": 10}})
    with pytest.raises(CheckpointError, match="inference_action_position_offset within dit_config: put it beside"):
        ModelConfig.load(released)


def test_offsets_that_differ_are_refused(released):
    edit(released, lambda hf: {**hf, "position_offset": 10, "inference_action_position_offset": 0})
    with pytest.raises(CheckpointError, match="position_offset is 10, inference_action_position_offset is 0: keep one"):
        ModelConfig.load(released)


def test_a_training_run_without_offset_is_refused(released):
    weights(released, lambda old: {f"model.{name}": value for name, value in old.items()})
    with pytest.raises(CheckpointError, match=r"lacks position_offset, and this is weights of a training run \(mo"):
        ModelConfig.load(released)
    edit(released, lambda hf: {**hf, "position_offset": 10})
    assert ModelConfig.load(released).head.position_offset == 10


def test_choice_heads_without_offset_are_refused(released):
    weights(released, lambda old: old | choice_tensors(tiny_xr1_config()))
    with pytest.raises(CheckpointError, match="lacks position_offset, and this is weights of a training run"):
        ModelConfig.load(released)


def test_a_folder_of_ours_that_has_lost_its_offset_is_refused(folder):
    edit(folder, lambda hf: {key: value for key, value in hf.items() if key != "position_offset"})
    with pytest.raises(CheckpointError, match=r'lacks position_offset, .*: add "position_offset": 10'):
        ModelConfig.load(folder)


def test_tensors_of_training_are_all_there_or_none(folder):
    config = tiny_xr1_config()
    weights(folder, lambda old: old | choice_tensors(config))
    check_model(config, read_index(folder))
    report = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert report["parameters"]["choice heads (training alone)"] == sum(map(math.prod, choice_shapes(config).values()))
    weights(folder, lambda old: {name: value for name, value in old.items() if "score_embed" not in name})
    with pytest.raises(CheckpointError, match=r"missing vlm.model.score_embed.weight \[1, 128\]$"):
        check_model(config, read_index(folder))


def test_what_no_model_has_is_unexpected(folder):
    weights(folder, lambda old: {**old, "dit.layers.0.extra.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"unexpected dit\.layers\.0\.extra\.weight"):
        Engine.from_pretrained(folder, device="cpu")


def test_another_familys_weights_are_told(folder, tmp_path):
    """Its config.json says that its stream is never normalised."""
    init_checkpoint(tmp_path / "xr0")
    weights(folder, lambda old: load_file(tmp_path / "xr0" / WEIGHTS))
    with pytest.raises(
        CheckpointError, match="head of Xiaomi-Robotics-1, they are named as those of Xiaomi-Robotics-0"
    ):
        Engine.from_pretrained(folder, device="cpu")


def test_xr1_s_weights_under_xr0_s_configuration_are_told(folder, tmp_path):
    edit(folder, lambda hf: strip({**hf, "model_type": FAMILIES["xr0"].model_type}))
    # By the statistics, where these are of a robot whose actions only the other family has,
    with pytest.raises(CheckpointError, match=r"rule: expected none, as config.json describes Xiaomi-Robotics-0"):
        Engine.from_pretrained(folder, device="cpu")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["action_config"]["robodojo"]["rule"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    # else by the weights.
    with pytest.raises(
        CheckpointError, match="head of Xiaomi-Robotics-0, they are named as those of Xiaomi-Robotics-1"
    ):
        Engine.from_pretrained(folder, device="cpu")


def test_a_folder_without_statistics_is_told(folder):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["action_config"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="lacks `action_config`"):
        Engine.from_pretrained(folder, device="cpu")


def test_names_tell_the_family():
    assert named_family(["model.dit.layers.0.middle_layernorm.weight"]) == "xr0"
    assert named_family(["dit.layers.0.input_layernorm.weight", "sink.weight"]) == "xr1"
    assert named_family(["vlm.model.visual.patch_embed.proj.bias"]) is None


def test_wrong_families_and_sizes_are_refused():
    with pytest.raises(ValueError, match="family: expected xr0 or xr1; got 'xr2'"):
        config_of("xr2", "tiny")
    with pytest.raises(ValueError, match="size: expected tiny, 5b; got '4b'"):
        config_of("xr1", "4b")
