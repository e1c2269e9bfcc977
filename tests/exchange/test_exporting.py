"""A checkpoint of ours for the released code: its files, names and statistics, and what it cannot express.

The released code is not here. What is known of it: its names of tensors (spec section 2.1), the VLM part being
transformers' Qwen3-VL under `vlm.`, the class and file names in config.json and processor_config.json, mask std > 1e-5
and decoding a * std + mean (spec section 3.3), and the training's `{"module": {"model." + name}}`.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from typer.testing import CliRunner

from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.exchange.exporting import to_released, to_released_pt
from xr0_engine.exchange.importing import ImportOptions, import_released
from xr0_engine.model.weights import TIED_LM_HEAD
from xr0_engine.robot.normalize import load_statistics
from xr0_engine.types import CheckpointError

MODEL_CODE = {
    "AutoConfig": "configuration_mibot.MiBoTConfig",
    "AutoModel": "modeling_mibot.MiBoTForActionGeneration",
}
PROCESSOR_CODE = {"AutoProcessor": "processing_mibot.MiBotProcessor"}
SAME_DECODING = 2e-7
"""Robot units of order 0.1 in float32: std + epsilon is rounded before the product instead of within it."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange") / "ours"
    init_checkpoint(folder, seed=1)
    return folder


@pytest.fixture
def like(tmp_path):
    """A folder as the released ones are, of the tests' size, its code three empty files."""
    folder = tmp_path / "like"
    init_checkpoint(folder)
    edit(
        folder / "config.json",
        lambda hf: {
            **{key: value for key, value in hf.items() if key not in OURS_ALONE},
            "model_type": "mibot",
            "architectures": ["MiBoTForActionGeneration"],
            "auto_map": MODEL_CODE,
            "transformers_version": "4.57.1",
        },
    )
    processor = {"auto_map": PROCESSOR_CODE, "processor_class": "MiBotProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    edit(folder / "preprocessor_config.json", lambda old: {**old, **processor, "min_pixels": None, "max_pixels": None})
    for name in ("configuration_mibot.py", "modeling_mibot.py", "processing_mibot.py"):
        (folder / name).write_text("# the user's own copy\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


OURS_ALONE = (
    *("flow_steps", "local_window", "position_offset", "compat_bf16_time", "max_prefix", "std_epsilon"),
    "normalize_instruction",
)


def edit(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def stored(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_folder_has_the_released_form(ours, like, tmp_path):
    told = to_released(ours, tmp_path / "out", like)
    written, theirs = (json.loads((it / "config.json").read_text()) for it in (tmp_path / "out", like))
    assert {key: value for key, value in written.items() if key in theirs} == theirs
    assert set(written) - set(theirs) == {"flow_steps", "max_prefix"}
    assert any("flow_steps, max_prefix" in line for line in told)
    assert {path.name for path in like.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert settings["processor_class"] == "MiBotProcessor"
    assert (settings["min_pixels"], settings["max_pixels"]) == (1024, 90_000)
    assert settings["size"] == {"shortest_edge": 1024, "longest_edge": 90_000}


def test_image_limits_are_ours(ours, like, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "trained")
    edit(
        folder / "preprocessor_config.json",
        lambda old: {**old, "max_pixels": 65_536, "size": {"shortest_edge": 1024, "longest_edge": 65_536}},
    )
    to_released(folder, tmp_path / "out", like)
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (settings["max_pixels"], settings["size"]["longest_edge"]) == (65_536, 65_536)


def test_a_like_saved_by_transformers_5_leaves_nothing_of_its_own(ours, like, tmp_path):
    """It has image settings and statistics in processor_config.json, which transformers 5 would read first."""
    settings = json.loads((like / "preprocessor_config.json").read_text())
    edit(like / "processor_config.json", lambda old: {**old, "image_processor": settings})
    (like / "preprocessor_config.json").unlink()
    to_released(ours, tmp_path / "out", like)
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {
        "auto_map": PROCESSOR_CODE,
        "processor_class": "MiBotProcessor",
    }
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["action_config"]
    assert written.keys() == load_statistics(ours, 32, 0).keys()


def test_weights_and_statistics_are_ours(ours, like, tmp_path):
    to_released(ours, tmp_path / "out", like)
    written, before = stored(tmp_path / "out"), stored(ours)
    assert written.keys() == before.keys()
    assert TIED_LM_HEAD not in written
    assert all(torch.equal(value, before[name]) for name, value in written.items())
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    first, second = (Engine.from_pretrained(it, device="cpu", dtype="float32") for it in (ours, tmp_path / "out"))
    observation = first.example("libero_all")
    assert np.array_equal(first.infer(observation, seed=0).actions, second.infer(observation, seed=0).actions)


def test_transformers_loads_the_vlm_of_it_strictly(ours, like, tmp_path):
    to_released(ours, tmp_path / "out", like)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**hf["vlm_config"]))
    state = {name.removeprefix("vlm."): it for name, it in stored(tmp_path / "out").items() if name.startswith("vlm.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])


def test_std_epsilon_goes_into_the_statistics(ours, like, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "trained")
    edit(folder / "config.json", lambda hf: {**hf, "std_epsilon": 1e-6})
    to_released(folder, tmp_path / "out", like)
    assert ModelConfig.load(tmp_path / "out").std_epsilon == 0
    before = load_statistics(folder, 32, 1e-6)["bimanual"]
    entry = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["action_config"]["bimanual"]
    mean, std = (torch.tensor(entry[name], dtype=torch.float32).numpy() for name in ("mean", "std"))
    normalized = np.random.default_rng(0).standard_normal(std.shape, dtype=np.float32)
    used = before.action_mask > 0
    # The released processor's own mask and decoding.
    assert np.array_equal(std > 1e-5, used)
    decoded = normalized * std + mean
    np.testing.assert_allclose(decoded[used], before.denormalize(normalized)[used], atol=SAME_DECODING)


def test_a_used_column_that_stands_still_is_refused(ours, like, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "trained")

    def still(settings):
        entry = settings["action_config"]["bimanual"]
        entry["active_columns"] = [0, 1, 2]
        entry["std"] = [[0.0, *row[1:]] for row in entry["std"]]
        return settings

    edit(folder / "preprocessor_config.json", still)
    edit(folder / "config.json", lambda hf: {**hf, "std_epsilon": 1e-6})
    with pytest.raises(CheckpointError, match=r"'bimanual' uses columns \[0\].*--to released-pt"):
        to_released(folder, tmp_path / "out", like)


def test_unused_columns_stay_unused(ours, like, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "trained")

    def reserved(settings):
        entry = settings["action_config"]["bimanual"]
        entry["active_columns"] = list(range(13))
        return settings

    edit(folder / "preprocessor_config.json", reserved)
    to_released(folder, tmp_path / "out", like)
    entry = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["action_config"]["bimanual"]
    assert np.flatnonzero((np.array(entry["std"]) > 1e-5).any(0)).tolist() == list(range(13))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("local_window", 4, "local_window 4, position_offset 0.*released-pt"),
        ("position_offset", 10, "local_window all, position_offset 10"),
    ],
)
def test_another_mask_is_refused(ours, like, tmp_path, key, value, words):
    folder = shutil.copytree(ours, tmp_path / "trained")
    edit(folder / "config.json", lambda hf: {**hf, key: value})
    with pytest.raises(CheckpointError, match=words):
        to_released(folder, tmp_path / "out", like)
    assert not (tmp_path / "out").exists()


def test_an_action_head_that_the_released_code_lacks_is_refused(ours, like, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "other")
    edit(folder / "config.json", lambda hf: {**hf, "dit_config": {**hf["dit_config"], "stream_norms": False}})
    for call in (
        lambda: to_released(folder, tmp_path / "out", like),
        lambda: to_released_pt(folder, tmp_path / "x.pt"),
    ):
        with pytest.raises(CheckpointError, match="stream_norms False"):
            call()


def without_map(like):
    edit(like / "config.json", lambda hf: {key: value for key, value in hf.items() if key != "auto_map"})


def another_size(like):
    edit(like / "config.json", lambda hf: {**hf, "dit_config": {**hf["dit_config"], "num_hidden_layers": 2}})


def other_pixels(like):
    edit(like / "preprocessor_config.json", lambda old: {**old, "image_mean": [0.4, 0.5, 0.5]})


def other_words(like):
    def change(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        first, second = "Ġthe", "Ġand"
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        return tokenizer

    edit(like / "tokenizer.json", change)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_map, "no auto_map that names the model's code"),
        (lambda like: (like / "processing_mibot.py").unlink(), "lacks processing_mibot.py"),
        (another_size, "num_hidden_layers 2, not 3"),
        (other_pixels, r"image_mean is \[0.4, 0.5, 0.5\]"),
        (other_words, "gives other tokens"),
        (lambda like: (like / "preprocessor_config.json").unlink(), "holds no preprocessor_config.json"),
        (shutil.rmtree, "expected a local folder of a released checkpoint"),
    ],
    ids=["no code named", "code missing", "size", "pixels", "words", "no settings", "nowhere"],
)
def test_a_like_that_does_not_fit_is_refused(ours, like, tmp_path, damage, words):
    damage(like)
    with pytest.raises(CheckpointError, match=words):
        to_released(ours, tmp_path / "out", like)
    assert not (tmp_path / "out").exists()


def test_the_trainings_file(ours, tmp_path):
    told = to_released_pt(ours, tmp_path / "xr0.pt")
    content = torch.load(tmp_path / "xr0.pt", weights_only=True)
    before = stored(ours)
    assert list(content) == ["module"]
    assert content["module"].keys() == {f"model.{name}" for name in [*before, TIED_LM_HEAD]}
    assert all(torch.equal(content["module"][f"model.{name}"], value) for name, value in before.items())
    size = sum(value.numel() * 2 for value in before.values())
    # The tied head is stored once.
    assert (tmp_path / "xr0.pt").stat().st_size < 1.1 * size
    assert any("is full causal: right as a start" in line for line in told)
    assert [path.name for path in tmp_path.iterdir()] == ["xr0.pt"]


def test_there_and_back(ours, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "trained")
    edit(folder / "config.json", lambda hf: {**hf, "local_window": 4, "position_offset": 10, "std_epsilon": 1e-6})
    to_released_pt(folder, tmp_path / "xr0.pt")
    options = ImportOptions(
        mode="post-training", statistics=folder / "preprocessor_config.json", robot_type="bimanual", max_prefix=6
    )
    import_released(tmp_path / "xr0.pt", tmp_path / "back", folder, options)
    engines = [Engine.from_pretrained(it, device="cpu", dtype="float32") for it in (folder, tmp_path / "back")]
    observation = engines[0].example("bimanual")
    chunks = [engine.infer(observation, seed=0).normalized for engine in engines]
    used = engines[0].statistics["bimanual"].action_mask > 0
    assert np.array_equal(chunks[0][used], chunks[1][used])


def test_an_offset_that_the_training_code_cannot_have_is_refused(ours, tmp_path):
    folder = shutil.copytree(ours, tmp_path / "trained")
    edit(folder / "config.json", lambda hf: {**hf, "local_window": 4, "position_offset": 2})
    with pytest.raises(CheckpointError, match="position_offset 2; the post-training code always adds 10"):
        to_released_pt(folder, tmp_path / "xr0.pt")
    edit(folder / "config.json", lambda hf: {**hf, "local_window": 7, "position_offset": 10})
    assert any("local_window=7" in line for line in to_released_pt(folder, tmp_path / "xr0.pt"))


def test_the_command(ours, like, tmp_path):
    def convert(*arguments):
        return CliRunner().invoke(app, ["convert", str(ours), "--to", *map(str, arguments)])

    assert "--to released needs --like FOLDER" in convert("released", "--out", tmp_path / "out").stderr
    result = convert("released", "--out", tmp_path / "out", "--like", like)
    assert result.exit_code == 0, result.stderr
    assert "exists and is not empty" in convert("released", "--out", tmp_path / "out", "--like", like).stderr
    assert "mode: only for --to engine" in convert("released-pt", "--out", "x.pt", "--mode", "benchmark").stderr
    assert "ends in .pt" in convert("released-pt", "--out", tmp_path / "xr0").stderr
    assert convert("released-pt", "--out", tmp_path / "xr0.pt").exit_code == 0
    assert "exists; remove it" in convert("released-pt", "--out", tmp_path / "xr0.pt").stderr
