"""Random checkpoints: complete, reproducible, all or nothing."""

from __future__ import annotations

import errno
import filecmp
import json
import shutil

import pytest
import transformers
from tokenizers import Tokenizer
from typer.testing import CliRunner

from tests.support import load
from xr0_engine import checkpoint
from xr0_engine.checkpoint import ROBOTS, SIZES, init_checkpoint, published_config, tiny_config
from xr0_engine.cli import app
from xr0_engine.config import VARIANT, ModelConfig
from xr0_engine.model.weights import checkpoint_shapes, read_index
from xr0_engine.robot.embodiment import builtin_embodiments, load_embodiment
from xr0_engine.robot.normalize import load_statistics
from xr0_engine.robot.prompt import PromptTokenizer
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
    ids = tokenizer.encode(views, [64, 64], checkpoint.EXAMPLE_TASKS[0])
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
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2**20)
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

    monkeypatch.setattr(checkpoint, "save_file", full)
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


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_inspect_names_the_missing_file(tiny, tmp_path, name):
    folder = shutil.copytree(tiny, tmp_path / "x")
    (folder / name).unlink()
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 2
    assert name in result.stderr
