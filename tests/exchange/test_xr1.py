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
from xr0_engine.robot.limits import (
    POST_TRAINING_LIMITS,
    RELEASED_LIMITS,
    find_video_settings,
    load_limits,
    load_video_limits,
)
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


def run_of(module, folder, config=None):
    """A training run of the base's tensors; config: what its config.py says, as values."""
    model_states(folder / "last.ckpt" / "checkpoint", {f"module.{name}": it for name, it in module.items()})
    if config is not None:
        (folder / "config.py").write_text("".join(f"{name} = {value!r}\n" for name, value in config.items()))
    return folder


def recipe_of(statistics, **model):
    """As a run of the post-training code tells it."""
    return {
        "data": {"params": {"train_datasets": json.loads(statistics.read_text())}},
        "model": {"params": {"model": model}},
    }


def imported(source, out, like, **options):
    return import_released(source, out, like, ImportOptions(**{"robot_type": ROBOT, **options}))


def qwen(folder, like):
    """A folder of the VLM alone: its config.json as transformers writes it, like's tokenizer and image settings."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(like / name, folder / name)
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
    folder = qwen(tmp_path / "Qwen3-VL", like)
    told = imported(base, tmp_path / "ours", folder, mode="post-training", statistics=statistics)
    assert any("is a VLM alone" in line for line in told)
    imported(base, tmp_path / "other", like, mode="post-training", statistics=statistics)
    ours, other = (ModelConfig.load(tmp_path / name) for name in ("ours", "other"))
    assert ours == other


def test_a_run_is_of_the_code_whose_configuration_it_has_or_is_told(module, statistics, like, tmp_path):
    run_of(module, tmp_path / "trained", recipe_of(statistics))
    imported(tmp_path / "trained", tmp_path / "ours", like)
    assert ModelConfig.load(tmp_path / "ours").head.position_offset == 10
    found = load_statistics(tmp_path / "ours", 60, 1e-6, double=True)[ROBOT]
    assert (found.state.rule, found.state.q99[0], found.quantiles) == ("post_training", 2.0, None)

    # RoboDojo's have transforms there, and nothing else tells the two apart.
    run_of(module, tmp_path / "run", {"data": {"transforms": [{"type": "Normalize", "mode": "gaussian"}]}})
    with pytest.raises(ValueError, match=r"mode: .*--mode post-training .*or --mode robodojo .*or --mode benchmark"):
        imported(tmp_path / "run", tmp_path / "other", like, statistics=statistics)
    options = {"mode": "benchmark", "statistics": like / "preprocessor_config.json", "robot_type": "robocasa_mg"}
    imported(tmp_path / "run", tmp_path / "benchmark", like, **options)
    config = ModelConfig.load(tmp_path / "benchmark")
    assert (config.head.position_offset, config.std_epsilon, config.normalize_instruction) == (0, 0.0, False)
    imported(tmp_path / "run", tmp_path / "stated", like, position_offset=7, **options)
    assert ModelConfig.load(tmp_path / "stated").head.position_offset == 7


def robodojo_entry(statistics, **changes):
    """What a user writes down of a RoboDojo run's transforms: one column by quantiles, the others gaussian."""
    given = json.loads(statistics.read_text())
    std = np.array(given["std"])[:10]
    std[:, 3] = 1e-6
    state = {"rule": "robodojo", "q01": [-2.0] * 60, "q99": [2.0] * 16 + [-2.0] * 44, "by_mean": [1]}
    state |= {"mean": [0.5] * 60, "std": [0.25] * 60}
    quantiles = {"action_q01": [[-1.0] * 60], "action_q99": [[3.0] * 60], "quantile_columns": [7]}
    return {"mean": given["mean"][:10], "std": std.tolist(), **quantiles, "state": state} | changes


def test_a_robodojo_run_has_its_columns_offset_and_statistics(module, statistics, like, tmp_path):
    run = run_of(module, tmp_path / "run", {"model": {"params": {"model": {"async_train": False}}}})
    file = tmp_path / "robodojo.json"
    unsaid = {"rule": None, "active_columns": None}
    file.write_text(json.dumps({"action_config": {"robodojo": robodojo_entry(statistics, **unsaid)}}))
    options = {"mode": "robodojo", "robot_type": "robodojo", "statistics": file}
    imported(run, tmp_path / "ours", like, **options)
    config = ModelConfig.load(tmp_path / "ours")
    assert (config.head.position_offset, config.head.max_prefix, config.head.state_length) == (0, 0, 1)
    assert (config.std_epsilon, config.normalize_instruction) == (1e-6, False)
    assert load_limits(tmp_path / "ours", config.vision) == POST_TRAINING_LIMITS

    engine = Engine.from_pretrained(tmp_path / "ours", device="cpu", dtype="float32", backend="reference")
    found, columns = engine.statistics["robodojo"], [*range(6), 7, *range(8, 14), 15]
    assert np.flatnonzero(found.action_mask[0]).tolist() == columns
    unit = found.denormalize(np.ones((10, 60)))
    mean, std = (np.array(json.loads(statistics.read_text())[name])[:10] for name in ("mean", "std"))
    np.testing.assert_allclose(unit[:, 7], 3, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(unit[:, 3], 1)
    np.testing.assert_allclose(unit[:, 8], (mean + std + 1e-6)[:, 8], rtol=1e-6)
    # Neither clipped nor 0 where it stands still, and one column by its mean.
    state = found.state.normalize(np.full(60, 3.0))
    np.testing.assert_allclose(state[[0, 1, 20]], [1.5, 10, 3], rtol=1e-5)
    assert engine.infer(engine.example("robodojo"), seed=0).actions.shape == (10, 60)


@pytest.mark.parametrize(
    ("changes", "options", "complaint"),
    [
        ({"state": None}, {}, "lacks statistics of its states.*by_mean, mean and std for those that are gaussian"),
        ({"state": {"rule": "post_training", "q01": [0.0] * 60, "q99": [1.0] * 60}}, {}, "expected rule robodojo, as"),
        ({"mean": [[0.0] * 60], "std": [[1.0] * 60]}, {}, "mean has one row, and rows are the steps of a chunk"),
        (
            {"rule": "robodojo"},
            {"mode": "post-training", "robot_type": "my_robot"},
            "'my_robot': rule 'robodojo' of its actions is not that of the post-training code: choose another --mode$",
        ),
        ({}, {"mode": "post-training"}, "by layout robodojo, the columns of the post-training code are .* mobile"),
        ({}, {"mode": "benchmark"}, "`state` normalises its states, the released benchmark checkpoints take them as"),
        ({"state": {"q01": [0], "q99": [1]}}, {"mode": "benchmark"}, "`state` normalises .*or choose another --mode$"),
        ({"state": {"rule": "robodojo", "q01": [0.0], "q99": [1.0]}}, {}, "expected q01 and q99 of 60 columns, got 1"),
        ({"q01": [[0.0] * 60], "q99": [[1.0] * 60], "state": None}, {}, "q01 and q99 beside mean and std"),
    ],
    ids=["state", "rule", "rows", "rule of actions", "layout", "benchmark", "benchmark, no rule", "width", "whose"],
)
def test_what_is_not_robodojos_is_refused(base, statistics, like, tmp_path, changes, options, complaint):
    file = tmp_path / "robodojo.json"
    asked = {"mode": "robodojo", "robot_type": "robodojo", "statistics": file} | options
    file.write_text(json.dumps({"action_config": {asked["robot_type"]: robodojo_entry(statistics, **changes)}}))
    with pytest.raises(CheckpointError, match=complaint) as refusal:
        imported(base, tmp_path / "ours", like, **asked)
    assert str(file) in str(refusal.value)


def test_columns_that_statistics_name_win(base, statistics, like, tmp_path):
    """Which they are is data of a layout, and runs with others than the mode's exist."""
    file, columns = tmp_path / "robodojo.json", [0, 6, 16]
    file.write_text(json.dumps({"action_config": {"robodojo": robodojo_entry(statistics, active_columns=columns)}}))
    imported(base, tmp_path / "ours", like, mode="robodojo", robot_type="robodojo", statistics=file)
    engine = Engine.from_pretrained(tmp_path / "ours", device="cpu", dtype="float32", backend="reference")
    chunk = engine.infer(engine.example("robodojo"), seed=0)
    assert np.flatnonzero(chunk.active_columns).tolist() == columns
    assert np.flatnonzero(chunk.actions.any(0)).tolist() == columns


def test_plain_quantiles_matter_only_to_code_that_normalises_states(base, statistics, like, tmp_path):
    entry = json.loads(statistics.read_text())
    imported(base, tmp_path / "released", like, mode="benchmark", statistics=statistics)
    statistics.write_text(json.dumps({"action_config": {ROBOT: entry}}))
    with pytest.raises(CheckpointError, match=rf"{statistics}: .*q01 and q99 beside mean and std.*or leave them out"):
        imported(base, tmp_path / "ours", like, mode="post-training", statistics=statistics)
    imported(base, tmp_path / "ours", like, mode="benchmark", statistics=statistics)
    for name in ("released", "ours"):
        found = load_statistics(tmp_path / name, 60, 0.0, double=True)[ROBOT]
        assert (found.state, found.quantiles, found.mean.tolist()) == (None, None, entry["mean"])


def test_plain_quantiles_are_nobodys_to_robodojo(base, statistics, like, tmp_path):
    """A released data configuration has the states' there; RoboDojo's has both kinds."""
    with pytest.raises(CheckpointError, match=r"nothing says what its q01 and q99 are of.*action_q01 and action_q99"):
        imported(base, tmp_path / "ours", like, mode="robodojo", robot_type="robodojo", statistics=statistics)


def test_a_robot_known_by_other_columns_is_refused(base, statistics, like, tmp_path):
    with pytest.raises(CheckpointError, match="the engine knows it by layout bimanual, the columns of the"):
        imported(base, tmp_path / "ours", like, mode="post-training", robot_type="bimanual", statistics=statistics)


@pytest.mark.parametrize(("is_async", "longest"), [(True, 6), (False, 0), (None, 6)], ids=["async", "sync", "unsaid"])
def test_prefixes_that_a_run_has_seen(module, statistics, like, tmp_path, is_async, longest):
    """Unsaid, its code's: the key is Xiaomi-Robotics-0's, and this code trains with them always."""
    model = {} if is_async is None else {"async_train": is_async}
    run = run_of(module, tmp_path / "run", recipe_of(statistics, **model))
    told = imported(run, tmp_path / "ours", like)
    assert ModelConfig.load(tmp_path / "ours").head.max_prefix == longest
    assert any("no async_train says" in line for line in told) == (is_async is None)


def test_the_post_training_code_has_one_state_whatever_like_has(module, statistics, like, tmp_path):
    other = shutil.copytree(like, tmp_path / "other")
    hf = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**hf, "state_length": 4}))
    run = run_of(module, tmp_path / "run", recipe_of(statistics))
    told = imported(run, tmp_path / "ours", other)
    assert ModelConfig.load(tmp_path / "ours").head.state_length == 1
    assert "states of an observation: 1, by the post-training code" in told
    configured = run_of(module, tmp_path / "configured", recipe_of(statistics, state_length=4))
    with pytest.raises(ValueError, match=r"how many states .* is 1 by the post-training code, 4 by .*config.py"):
        imported(configured, tmp_path / "second", other, robot_type="my_robot")
    imported(configured, tmp_path / "second", like, robot_type="my_robot", state_length=4)
    assert ModelConfig.load(tmp_path / "second").head.state_length == 4


def test_how_many_states_is_asked_where_nobody_tells(module, statistics, like, tmp_path):
    """No tensor does: a run with four of them has the same shapes."""
    vlm = qwen(tmp_path / "Qwen3-VL", like)
    run = run_of(module, tmp_path / "run", recipe_of(statistics))
    own = {"mode": "benchmark", "robot_type": "my_robot"}
    with pytest.raises(ValueError, match=r"state_length: no tensor and no file given says how many .*--state-length"):
        imported(run, tmp_path / "ours", vlm, **own)
    imported(run, tmp_path / "ours", vlm, state_length=4, **own)
    assert ModelConfig.load(tmp_path / "ours").head.state_length == 4
    configured = run_of(module, tmp_path / "configured", recipe_of(statistics, state_length=4))
    imported(configured, tmp_path / "second", vlm, **own)
    assert ModelConfig.load(tmp_path / "second").head.state_length == 4
    # The checkpoint at --like has one.
    with pytest.raises(ValueError, match=r"how many states .* is 1 by .*/config.json, 4 by .*config.py"):
        imported(configured, tmp_path / "third", like, **own)
    four = {"mode": "benchmark", "robot_type": "robocasa365", "statistics": benchmark_statistics(tmp_path)}
    told = imported(run, tmp_path / "third", vlm, **four)
    assert ModelConfig.load(tmp_path / "third").head.state_length == 4
    assert "states of an observation: 4, by robot type robocasa365" in told


def benchmark_statistics(folder):
    file = folder / "benchmark.json"
    file.write_text(json.dumps({"mean": np.zeros((16, 60)).tolist(), "std": np.ones((16, 60)).tolist()}))
    return file


def test_a_benchmarks_pictures_are_not_the_vlms(base, like, tmp_path):
    vlm = qwen(tmp_path / "Qwen3-VL", like)
    settings = json.loads((vlm / "preprocessor_config.json").read_text())
    size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    settings = {key: value for key, value in settings.items() if not key.endswith("_pixels")}
    (vlm / "preprocessor_config.json").write_text(json.dumps({**settings, "size": size}))
    (vlm / "video_preprocessor_config.json").write_text(json.dumps({"do_resize": True, "size": size}))
    options = {"mode": "benchmark", "statistics": benchmark_statistics(tmp_path)}
    imported(base, tmp_path / "ours", vlm, robot_type="robocasa365", **options)
    vision = ModelConfig.load(tmp_path / "ours").vision
    assert load_limits(tmp_path / "ours", vision) == RELEASED_LIMITS
    assert RELEASED_LIMITS.max_pixels == 90_000
    # RoboCasa365's videos are taken as they come.
    assert not load_video_limits(tmp_path / "ours", vision).resize
    # A checkpoint's own are the model's.
    own = shutil.copytree(like, tmp_path / "own")
    limits = {"min_pixels": 4096, "max_pixels": 250_000}
    (own / "preprocessor_config.json").write_text(json.dumps({**settings, **limits}))
    imported(base, tmp_path / "second", own, robot_type="robocasa_mg", **options)
    assert load_limits(tmp_path / "second", vision).max_pixels == 250_000
    # As transformers 5 saves what it says of videos.
    videos = {"do_resize": False, "temporal_patch_size": vision.temporal_patch_size}
    (own / "processor_config.json").write_text(json.dumps({"video_processor": videos}))
    (own / "video_preprocessor_config.json").unlink(missing_ok=True)
    imported(base, tmp_path / "third", own, robot_type="robocasa_mg", **options)
    assert find_video_settings(tmp_path / "third") == (tmp_path / "third" / "video_preprocessor_config.json", videos)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, r"mode: .*--mode post-training \(full causal, position offset 10: post-training code\) or --mode rob"),
        ({"mode": "post-training"}, "statistics: .* comes without mean and std"),
        ({"mode": "post-training", "statistics": "statistics.json", "robot_type": None}, "robot_type: .* --robot-type"),
        ({"mode": "post-training", "statistics": "no quantiles.json"}, "'mobile' lacks statistics of its states"),
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
        (lambda old: {**old, HEAD: 0 * old[HEAD]}, "lm_head.weight differs"),
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
