"""Random checkpoints: complete, reproducible, all or nothing."""

from __future__ import annotations

import errno
import filecmp
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer
from typer.testing import CliRunner

import xr0_engine
from tests.support import load
from xr0_engine import Engine, Observation
from xr0_engine.checkpoint import EXAMPLE_TASKS, init_checkpoint, read_plan
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.family import VARIANT
from xr0_engine.model import writing
from xr0_engine.model.weights import checkpoint_shapes, read_index
from xr0_engine.robot.embodiment import builtin_embodiments, load_embodiment
from xr0_engine.robot.limits import load_limits
from xr0_engine.robot.normalize import load_statistics
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.robot.prompt import PromptTokenizer
from xr0_engine.sim import INSTRUCTION, ROBOT_TYPE
from xr0_engine.sizes import ROBOTS, SIZES, published_config, tiny_config
from xr0_engine.types import CheckpointError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder)
    return folder


def test_tiny_is_complete(tiny):
    config = ModelConfig.load(tiny)
    assert config == SIZES["tiny"]()
    assert {name: place.shape for name, place in read_index(tiny).items()} == checkpoint_shapes(config)
    statistics = load_statistics(tiny, config.head.action_dim, config.std_epsilon)
    assert {name: statistic.chunk_length for name, statistic in statistics.items()} == {
        name: length for name, (length, _) in ROBOTS.items()
    }
    served = {name for profile in map(load_embodiment, builtin_embodiments()) for name in profile.robot_types}
    assert set(statistics) <= served
    assert load(tiny).config == config


def test_same_seed_same_files(tiny, tmp_path):
    init_checkpoint(tmp_path / "again")
    init_checkpoint(tmp_path / "other", seed=1)
    names = sorted(path.name for path in tiny.iterdir())
    assert filecmp.cmpfiles(tiny, tmp_path / "again", names, shallow=False) == (names, [], [])
    assert "model-00001-of-00001.safetensors" in filecmp.cmpfiles(tiny, tmp_path / "other", names, shallow=False)[1]


def test_special_tokens_stand_where_qwen_has_them():
    tokens = published_config().tokens
    assert (tokens.image, tokens.vision_start, tokens.vision_end) == (151655, 151652, 151653)


def test_tokenizer_reads_a_prompt_as_qwens_does_in_length(tiny):
    config = ModelConfig.load(tiny)
    tokenizer = PromptTokenizer.load(tiny, config.tokens)
    views = [view.title for view in load_embodiment("libero").views]
    ids = tokenizer.encode(views, [64, 64], EXAMPLE_TASKS[0])
    # 194 tokens with Qwen's vocabulary for a LIBERO task of ordinary length.
    assert 185 <= len(ids) <= 200
    assert (ids == config.tokens.image).sum() == 128
    text = Tokenizer.from_file(str(tiny / "tokenizer.json")).decode(ids.tolist())
    assert text.startswith("user\nThe following observations")
    assert text.endswith("<cot></cot>\n")


def test_transformers_reads_the_tokenizer_and_the_configuration(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == ModelConfig.load(tiny).tokens.image
    hf = json.loads((tiny / "config.json").read_text())
    config = transformers.Qwen3VLConfig(**hf["vlm_config"])
    assert config.text_config.rope_parameters["mrope_section"] == [6, 5, 5]


def test_configuration_round_trips():
    for make in SIZES.values():
        config = make()
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_what_it_says_of_prefixes():
    hf = tiny_config().to_hf()
    for stated in (0, 9):
        assert ModelConfig.from_hf({**hf, "max_prefix": stated}).head.max_prefix == stated
    # Released checkpoints do not say it.
    del hf["max_prefix"]
    assert ModelConfig.from_hf(hf).head.max_prefix == 6
    with pytest.raises(CheckpointError, match=r"head\.max_prefix is -1, expected 0 to 1024"):
        ModelConfig.from_hf({**hf, "max_prefix": -1})


def test_what_it_says_of_the_task_text():
    hf = tiny_config().to_hf()
    assert ModelConfig.from_hf({**hf, "normalize_instruction": False}).normalize_instruction is False
    # Released checkpoints do not say it.
    del hf["normalize_instruction"]
    assert ModelConfig.from_hf(hf).normalize_instruction is True
    with pytest.raises(CheckpointError, match="normalize_instruction is 'no', not true or false"):
        ModelConfig.from_hf({**hf, "normalize_instruction": "no"})


def test_inspect_tells_how_the_task_text_enters_the_prompt(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "as-given")
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "normalize_instruction": False}))
    for path, words, stated in ((tiny, "with a capital and a full stop", True), (folder, "as given", False)):
        assert f"task text in the prompt: {words}" in CliRunner().invoke(app, ["inspect", str(path)]).output
        told = CliRunner().invoke(app, ["inspect", str(path), "--json"]).output
        assert json.loads(told)["normalize_instruction"] is stated


def test_shards_are_split_and_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 2**20)
    init_checkpoint(tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    load(tmp_path / "many")


def test_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(app, ["init", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "exists and is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_size_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["init", "--size", "7b", "--out", str(tmp_path / "x")])
    assert (result.exit_code, "expected tiny, small, 4b; got '7b'" in result.stderr) == (2, True)


def test_disk_without_room_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    result = CliRunner().invoke(app, ["init", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "GiB free; " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    result = CliRunner().invoke(app, ["init", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_init_then_inspect(tmp_path):
    runner = CliRunner()
    assert runner.invoke(app, ["init", "--out", str(tmp_path / "x")]).exit_code == 0
    result = runner.invoke(app, ["inspect", str(tmp_path / "x"), "--json"])
    report = json.loads(result.stdout)
    assert report["tensors"] == len(checkpoint_shapes(SIZES["tiny"]()))
    assert report["parameters"]["total"] == sum(n for part, n in report["parameters"].items() if part != "total")
    memory = report["memory_bytes"]
    assert report["stored_bytes"] < memory["bfloat16"] < memory["float32"] < 2.1 * memory["bfloat16"]
    assert report["sizes"]["head"].keys() & VARIANT.keys() == set()
    assert report["robot_types"]["bimanual"] == {"chunk_length": 30, "active_columns": 26, "embodiment": "bimanual"}
    table = runner.invoke(app, ["inspect", str(tmp_path / "x")])
    assert table.exit_code == 0
    assert "libero_all" in table.stdout


POINT = {
    "name": "point",
    "robot_types": ["point"],
    "views": [{"key": "top", "title": "Top View"}],
    "layout": "plain",
    "control_rate_hz": 10,
    "replan_every": None,
}
SMALLER = {
    "vlm_config": {
        "text_config": {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        "vision_config": {"depth": 2, "deepstack_visual_indexes": [0, 1]},
    },
    "dit_config": {"hidden_size": 64, "num_hidden_layers": 2},
    "action_length": 16,
}


def init_from(told, folder, *options):
    file = folder / "told.json"
    file.write_text(told if isinstance(told, str) else json.dumps(told))
    return CliRunner().invoke(app, ["init", "--config", str(file), "--out", str(folder / "made"), *options])


def test_init_from_a_file_of_sizes(tmp_path):
    told = {**SMALLER, "embodiment": POINT, "max_pixels": 65536}
    assert init_from(told, tmp_path).exit_code == 0
    model, tiny = load(tmp_path / "made").config, tiny_config()
    assert (model.head.num_layers, model.head.action_length) == (2, 16)
    # What follows from what is given, and what is left out.
    assert (model.vision.out_hidden_size, model.head.head_dim, model.head.num_kv_heads) == (96, 16, 2)
    assert model.text.mrope_section == (4, 2, 2)
    assert (model.text.num_layers, model.text.rope_theta, model.tokens) == (4, tiny.text.rope_theta, tiny.tokens)
    statistics = load_statistics(tmp_path / "made", model.head.action_dim, 0.0)
    assert {name: (item.chunk_length, int(item.action_mask[0].sum())) for name, item in statistics.items()} == {
        "point": (16, 32)
    }
    assert load_limits(tmp_path / "made", model.vision).max_pixels == 65536
    engine = Engine.from_pretrained(tmp_path / "made", backend="reference")
    assert engine.embodiment("point").control_rate_hz == 10
    observation = Observation({"top": np.zeros((64, 64, 3), np.uint8)}, "Go on.", np.zeros((1, 32), np.float32))
    assert engine.infer(observation, seed=0).actions.shape == (16, 32)


def test_what_a_checkpoint_says_makes_the_same_one(tmp_path):
    assert init_from({**SMALLER, "embodiment": POINT}, tmp_path).exit_code == 0
    first = (tmp_path / "made").rename(tmp_path / "first")
    assert init_from((first / "config.json").read_text(), tmp_path, "--size", "small").exit_code == 0
    names = sorted(path.name for path in first.iterdir())
    assert filecmp.cmpfiles(first, tmp_path / "made", names, shallow=False) == (names, [], [])


def test_the_rotary_embedding_may_be_said_in_either_place(tmp_path):
    sections = {"mrope_section": [8, 4, 4]}
    for text in ({"rope_scaling": sections, "rope_theta": 1e4}, {"rope_parameters": {**sections, "rope_theta": 1e4}}):
        (tmp_path / "told.json").write_text(json.dumps({"vlm_config": {"text_config": text}}))
        read = read_plan(tmp_path / "told.json").model.text
        assert (read.mrope_section, read.rope_theta) == ((8, 4, 4), 1e4)
    (tmp_path / "told.json").write_text(json.dumps({"vlm_config": {"text_config": {**text, "rope_theta": 2e4}}}))
    with pytest.raises(CheckpointError, match=r"rope_theta is 20000\.0 in text_config, 10000\.0 elsewhere"):
        read_plan(tmp_path / "told.json")


def test_the_prompt_of_one_task_is_a_token_for_each_stretch_of_text(tmp_path):
    task = "hand the cube over"
    assert init_from({**SMALLER, "embodiment": POINT, "task": task}, tmp_path).exit_code == 0
    made = tmp_path / "made"
    tokens, titles = ModelConfig.load(made).tokens, [view["title"] for view in POINT["views"]]
    tokenizer = PromptTokenizer.load(made, tokens)
    plain = Tokenizer.from_file(str(made / "tokenizer.json"))
    for text, most in (("Hand the cube over.", 11 + 3 * len(titles)), ("Öffne die Tür.", 60)):
        ids = tokenizer.encode(titles, [4] * len(titles), text)
        assert len(ids) <= most + 4 * len(titles)
        assert f":\n{text} /no_cot" in plain.decode(ids.tolist())


XR1 = {"dit_config": {"num_hidden_layers": 1}}


@pytest.mark.parametrize(
    ("robot", "expected", "pictures"),
    [("mobile", "hand it over.", 3), ("robodojo", "hand it over", 3), ("robocasa365", "hand it over.", 6)],
)
def test_a_task_of_xr1_enters_its_prompt_as_its_robot_has_it(tmp_path, robot, expected, pictures):
    """Neither a capital nor a full stop is added; the prompt of the robot's own form is a token a stretch."""
    told = {**XR1, "embodiment": robot, "task": "hand it over."}
    assert init_from(told, tmp_path, "--family", "xr1").exit_code == 0
    prepare = Preprocessor.load(tmp_path / "made")
    inputs = prepare([replace(prepare.example(robot, (32, 32)), instruction="hand it over.")])
    ids = inputs.input_ids[0].tolist()
    assert f":\n{expected} /no_cot" in prepare.tokenizer._tokenizer.decode(ids, False)
    # Of a picture <|vision_start|>, <|vision_end|> and what stands before it; the six special tokens and line breaks of
    # the two turns, the task, the answer.
    assert len(ids) - ids.count(prepare.config.tokens.image) == 3 * pictures + 8


def test_states_of_a_random_checkpoint_are_normalised_as_its_robots_are(tmp_path):
    """So that its own statistics are those that XR-1's recipes want, which refuse others."""
    (tmp_path / "told.json").write_text(json.dumps({**XR1, "embodiment": "mobile", "action_length": 8}))
    init_checkpoint(tmp_path / "mobile", config=tmp_path / "told.json", family="xr1")
    prepare = Preprocessor.load(tmp_path / "mobile")
    observation = replace(prepare.example("mobile", (32, 32)), state=np.full(60, 9.0))
    assert prepare([observation]).state[0, 0].tolist() == [1.0] * 16 + [0.0] * 44

    init_checkpoint(tmp_path / "all", family="xr1")
    statistics = Preprocessor.load(tmp_path / "all").statistics
    rules = {name: None if item.state is None else item.state.rule for name, item in statistics.items()}
    benchmarks = dict.fromkeys(("robocasa_mg", "vlabench_choice"))
    assert rules == {"mobile": "post_training", "robodojo": "robodojo", **benchmarks}
    assert statistics["robodojo"].still_passes


def test_the_base_of_make_demo_policy_has_a_short_prompt_for_the_simulators_task(tmp_path):
    told = Path(xr0_engine.__file__).parent / "drive" / "aloha_transfer" / "base.json"
    init_checkpoint(tmp_path / "base", config=told)
    config, engine = ModelConfig.load(tmp_path / "base"), Engine.from_pretrained(tmp_path / "base", backend="reference")
    (view,) = engine.embodiment(ROBOT_TYPE).views
    # A token for each block of three by three patches.
    patches = load_limits(tmp_path / "base", config.vision).max_pixels // config.vision.patch_size**2
    assert patches == 4 * config.vision.spatial_merge_size**2
    ids = PromptTokenizer.load(tmp_path / "base", config.tokens).encode([view.title], [4], INSTRUCTION)
    assert (len(ids), int((ids == config.tokens.image).sum())) == (15, 4)
    image, state = np.zeros((240, 320, 3), np.uint8), np.zeros((1, 32), np.float32)
    chunk = engine.infer(Observation({view.key: image}, INSTRUCTION, state, ROBOT_TYPE), seed=0)
    assert chunk.actions.shape == (30, 32)


def test_a_profile_may_be_named(tmp_path):
    (tmp_path / "mine.yaml").write_text(json.dumps({**POINT, "robot_types": ["mine"]}))
    for told, types in (("mine.yaml", ("mine",)), ("bimanual", ("bimanual",))):
        (tmp_path / "told.json").write_text(json.dumps({"embodiment": told}))
        assert read_plan(tmp_path / "told.json").embodiment.robot_types == types


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ("[]", "expected an object with keys of config.json, got []"),
        ({"dit_config": {"num_layers": 3}}, "no key 'dit_config.num_layers'; did you mean 'num_hidden_layers'?"),
        ({"task": "Go on."}, "task: expected with `embodiment`"),
        ({"min_pixel": 3}, "there is no key 'min_pixel'; did you mean 'min_pixels'?"),
        ({"vlm_config": 3}, "vlm_config: expected an object, got 3"),
        ({"dit_config": {"num_hidden_layers": 9}}, "9 DiT layers read 4 VLM layers"),
        ({"vlm_config": {"text_config": {"vocab_size": 500}}}, "vocab_size at least 732, or image_token_id left out"),
        (
            {"vlm_config": {"image_token_id": 900}},
            "vision_start_token_id 897, vision_end_token_id 898, video_token_id 901",
        ),
        ({"max_pixels": 100}, "expected 1 <= min_pixels <= max_pixels"),
        ({"max_pixels": 1023, "min_pixels": 1}, "max_pixels is 1023, less than the 1024 pixels of one image token"),
        ({"embodiment": "nowhere.yaml"}, "or the path of a YAML file, got 'nowhere.yaml'"),
        ({"embodiment": {**POINT, "layout": "round"}}, "embodiment: layout: expected one of"),
        ({"embodiment": {**POINT, "robot_types": []}}, "'point' lists no robot_types"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_a_file_that_cannot_be_is_refused(told, complaint, tmp_path):
    result = init_from(told, tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path / 'told.json'}: " in result.stderr
    assert complaint in result.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_inspect_names_the_missing_file(tiny, tmp_path, name):
    folder = shutil.copytree(tiny, tmp_path / "x")
    (folder / name).unlink()
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 2
    assert name in result.stderr
