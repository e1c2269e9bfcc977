"""Weights of Xiaomi-Robotics-1 that come as files of torch.save: the base's, and a training run's."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLConfig
from typer.testing import CliRunner

from tests.exchange.support import model_states, module_of
from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.exchange.exporting import to_released_pt
from xr0_engine.exchange.importing import ImportOptions, import_released
from xr0_engine.model.choice import choice_shapes
from xr0_engine.robot.limits import POST_TRAINING_LIMITS, load_limits
from xr0_engine.robot.normalize import load_statistics
from xr0_engine.sizes import FAMILY_ROBOTS, tiny_xr1_config
from xr0_engine.types import CheckpointError

ROBOT = "mobile"
HEAD = "model.vlm.lm_head.weight"
COLUMNS = sorted(FAMILY_ROBOTS["xr1"][ROBOT][1])


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange") / "xr1"
    init_checkpoint(folder, family="xr1", seed=3)
    return folder


@pytest.fixture(scope="module")
def module(like):
    """The base's tensors: those of inference, of training alone, and the tied head, `model.` before each."""
    generator = torch.Generator().manual_seed(0)
    choice = {
        f"model.{name}": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in choice_shapes(tiny_xr1_config()).items()
    }
    return module_of(like) | choice


@pytest.fixture
def base(module, tmp_path):
    torch.save({"module": module}, tmp_path / "model_states.pt")
    return tmp_path / "model_states.pt"


@pytest.fixture
def statistics(tmp_path):
    """As a released data configuration has them beside a checkpoint: 30 steps of actions, one row of states."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(0, 0.01, (30, 60)), rng.uniform(0.01, 0.1, (30, 60))
    q01, q99 = np.full((1, 60), -2.0), np.full((1, 60), 2.0)
    q99[0, 40:] = -2.0
    file = tmp_path / "statistics.json"
    tables = {"mean": mean, "std": std, "q01": q01, "q99": q99}
    file.write_text(json.dumps({name: table.tolist() for name, table in tables.items()}))
    return file


def imported(source, out, like, **options):
    return import_released(source, out, like, ImportOptions(**{"robot_type": ROBOT, **options}))


def qwen(folder):
    """A folder of the VLM alone: its config.json as transformers writes it, its tokenizer and image settings."""
    folder.mkdir()
    text = tiny_xr1_config().to_hf()["vlm_config"]
    Qwen3VLConfig(**{key: value for key, value in text.items() if key != "model_type"}).save_pretrained(folder)
    return folder


def test_the_base_becomes_a_folder_that_states_its_offset(base, statistics, like, tmp_path, module):
    told = imported(base, tmp_path / "ours", like, mode="post-training", statistics=statistics)
    hf = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (hf["position_offset"], hf["std_epsilon"], hf["normalize_instruction"]) == (10, 1e-6, False)
    config = ModelConfig.load(tmp_path / "ours")
    assert (config.family, config.head.local_window) == ("xr1", None)
    assert any("Xiaomi-Robotics-1, by the names of its tensors" in line for line in told)
    assert load_limits(tmp_path / "ours", config.vision) == POST_TRAINING_LIMITS
    written = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    assert {f"model.{name}" for name in written} | {HEAD} == set(module)
    assert all(torch.equal(value, module[f"model.{name}"]) for name, value in written.items())

    found = load_statistics(tmp_path / "ours", 60, 1e-6, double=True)[ROBOT]
    assert np.flatnonzero(found.action_mask[0]).tolist() == COLUMNS
    assert found.state is not None
    assert found.state.q99[0] == 2.0
    engine = Engine.from_pretrained(tmp_path / "ours", device="cpu", dtype="float32")
    chunk = engine.infer(engine.example(ROBOT), seed=0)
    assert chunk.actions.shape == (30, 60)
    assert np.flatnonzero(chunk.active_columns).tolist() == COLUMNS


def test_a_folder_of_the_vlm_gives_what_the_weights_lack(base, statistics, like, tmp_path):
    folder = qwen(tmp_path / "Qwen3-VL")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(like / name, folder / name)
    told = imported(base, tmp_path / "ours", folder, mode="post-training", statistics=statistics)
    assert any("is a VLM alone" in line for line in told)
    imported(base, tmp_path / "other", like, mode="post-training", statistics=statistics)
    ours, other = (ModelConfig.load(tmp_path / name) for name in ("ours", "other"))
    assert ours == other


def test_a_run_is_post_training_unless_told(module, statistics, like, tmp_path):
    model_states(tmp_path / "run" / "last.ckpt" / "checkpoint", {f"module.{name}": it for name, it in module.items()})
    imported(tmp_path / "run", tmp_path / "ours", like, statistics=statistics)
    assert ModelConfig.load(tmp_path / "ours").head.position_offset == 10
    options = {"mode": "benchmark", "statistics": like / "preprocessor_config.json", "robot_type": "robocasa_mg"}
    imported(tmp_path / "run", tmp_path / "benchmark", like, **options)
    config = ModelConfig.load(tmp_path / "benchmark")
    assert (config.head.position_offset, config.std_epsilon, config.normalize_instruction) == (0, 0.0, False)
    imported(tmp_path / "run", tmp_path / "stated", like, position_offset=7, **options)
    assert ModelConfig.load(tmp_path / "stated").head.position_offset == 7


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {},
            r"mode: .*--mode post-training \(full causal, position offset 10\) or --mode benchmark",
        ),
        ({"mode": "post-training"}, "statistics: .* comes without mean and std"),
        ({"mode": "post-training", "statistics": "statistics.json", "robot_type": None}, "robot_type: .* --robot-type"),
        ({"mode": "post-training", "statistics": "no quantiles.json"}, "'mobile' lacks q01 and q99 of its states"),
    ],
    ids=["offset", "statistics", "robot type", "quantiles"],
)
def test_what_the_file_lacks_is_asked_for_by_option(base, statistics, like, tmp_path, options, complaint):
    given = json.loads(statistics.read_text())
    (tmp_path / "no quantiles.json").write_text(json.dumps({name: given[name] for name in ("mean", "std")}))
    if "statistics" in options:
        options = {**options, "statistics": tmp_path / options["statistics"]}
    with pytest.raises((ValueError, CheckpointError), match=complaint):
        imported(base, tmp_path / "ours", like, **options)
    assert not (tmp_path / "ours").exists()


def test_the_command_asks_for_a_tokenizer(base):
    result = CliRunner().invoke(app, ["convert", str(base), "--out", "ours"])
    assert result.exit_code == 2
    assert "--like CHECKPOINT" in result.stderr
    assert "Qwen3-VL-4B-Instruct" in result.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda old: without(old, "model.vlm.model.score_embed.weight"), "missing vlm.model.score_embed.weight"),
        (lambda old: without(old, "model.dit.layers.3.mlp.up_proj.weight"), "missing dit.layers.3.mlp.up_proj.weight"),
        (
            lambda old: {**old, "model.dit.layers.0.middle_layernorm.weight": torch.ones(128).bfloat16()},
            "missing dit.layers.0.final_layernorm.weight",
        ),
        (
            lambda old: {**old, "model.vlm.lm_head.weight": 0 * old["model.vlm.lm_head.weight"]},
            "lm_head.weight differs",
        ),
    ],
    ids=["a choice tensor", "a tensor", "a norm of the other family", "untied head"],
)
def test_wrong_tensors_are_named(module, statistics, like, tmp_path, change, complaint):
    torch.save({"module": change(module)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=complaint):
        imported(tmp_path / "weights.pt", tmp_path / "ours", like, mode="post-training", statistics=statistics)


def without(tensors, name):
    return {other: value for other, value in tensors.items() if other != name}


def test_the_other_familys_code_gets_none_of_them(like, tmp_path):
    with pytest.raises(CheckpointError, match="the released code of Xiaomi-Robotics-0 has no such action head"):
        to_released_pt(like, tmp_path / "weights.pt")


def test_another_checkpoints_unresized_images_do_not_come_along(base, statistics, like, tmp_path):
    """Whether images are resized is the mode's to say, as their limits are."""
    other = shutil.copytree(like, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "do_resize": False}))
    imported(base, tmp_path / "out", other, mode="post-training", statistics=statistics)
    made = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert made.get("do_resize", True) is True
    assert made["max_pixels"] == 160_000
