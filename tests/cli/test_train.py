"""xr0 train: recipes from the command line. What training does is tested in tests/training."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from tests.support import make_config
from tests.training.data.fixtures import write_dataset
from tests.training.support import SIZES
from xr0_engine import Engine
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.cli import app
from xr0_engine.training.config import TrainConfig
from xr0_engine.training.recipes import RECIPES, post_train_async, tiny
from xr0_engine.whole import only_writer


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_help_lists_the_recipes():
    shown = run("--help").output
    assert [name for name in (*RECIPES, "resume", "export") if name not in shown] == []


def test_show_prints_the_resolved_config():
    result = run("post_train_async", "--tiny", "--show", "optim.steps=7")
    assert result.exit_code == 0
    config = TrainConfig.from_json(result.output)
    assert config.optim.steps == 7
    assert config.flow == tiny(post_train_async()).flow


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["finetune_head"], "expected model.checkpoint and data.robot and data.statistics, as KEY=VALUE"),
        (
            ["finetune_head", "model.checkpoint=c", "data.robot=d", "data.statistics=s.json", "data.embodiment=gone"],
            "data.embodiment: embodiment: expected bimanual",
        ),
        (["finetune_head", "optim.step=3"], "there is no key 'optim.step'; did you mean 'optim.steps'?"),
        (["resume", "nowhere"], "nowhere holds no config.json: not a run's folder"),
        (["export", "nowhere", "--out", "x"], "nowhere holds no config.json: not a run's folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, complaint, capfd):
    result = run(*arguments)
    assert result.exit_code == 2
    assert complaint in result.output + capfd.readouterr().err


def test_from_episodes_to_a_checkpoint_that_the_engine_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", make_config(**SIZES))
    write_dataset(tmp_path / "episodes", (12, 9))
    stats = ["data", "stats", "episodes", "--out", "statistics.json", "--chunk-length", "5"]
    assert CliRunner().invoke(app, stats).exit_code == 0
    paths = ["model.checkpoint=base", "data.robot=episodes", "data.statistics=statistics.json"]
    short = ["data.chunk_length=5", "data.batch_size=2", "data.workers=0", "data.validation_samples=2", "optim.steps=2"]
    started = run("finetune_head", "--tiny", "--out", "run", *paths, *short)
    assert started.exit_code == 0, started.output
    assert TrainConfig.from_json((tmp_path / "run" / "config.json").read_text()).data.chunk_length == 5
    engine = Engine.from_pretrained(tmp_path / "run" / "model")
    assert engine.robot_types == ("bimanual",)
    assert engine.statistics["bimanual"].chunk_length == 5
    assert engine.statistics["bimanual"].active_columns == (*range(13), *range(14, 27))
    kept = json.loads((tmp_path / "run" / "statistics.json").read_text())["action_config"]["bimanual"]
    assert kept["active_columns"] == [*range(13), *range(14, 27)]

    again = run("finetune_head", "--tiny", "--out", "run", *paths, *short)
    assert again.exit_code == 2
    assert "run exists and is not empty: xr0 train resume run" in again.output
    with only_writer(tmp_path / "run"), only_writer(tmp_path / "new"):
        for arguments in (("resume", "run"), ("finetune_head", "--tiny", "--out", "new", *paths, *short)):
            while_live = run(*arguments)
            assert (while_live.exit_code, " is being written by process " in while_live.output) == (2, True)
    assert run("resume", "run").exit_code == 0
    assert "--step: expected one of 2, got 7" in run("export", "run", "--out", "other", "--step", "7").output
    assert run("export", "run", "--out", "other").exit_code == 0
    weights = "model-00001-of-00001.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() == (tmp_path / "run" / "model" / weights).read_bytes()


def test_adapters_are_exported_alone_or_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", make_config(**SIZES))
    write_dataset(tmp_path / "episodes", (12, 9))
    stats = ["data", "stats", "episodes", "--out", "statistics.json", "--chunk-length", "5"]
    assert CliRunner().invoke(app, stats).exit_code == 0
    given = ["model.checkpoint=base", "data.robot=episodes", "data.statistics=statistics.json", "data.chunk_length=5"]
    given += ["data.validation_fraction=0", "data.workers=0", "data.batch_size=2", "optim.steps=1"]
    started = run("lora", "--tiny", "--out", "run", *given)
    assert started.exit_code == 0, started.output
    told = run("export", "run", "--adapter", "--out", "adapter")
    how = f"Engine.from_pretrained({str(tmp_path / 'base')!r}, adapter='adapter')"
    assert (told.exit_code, told.output) == (0, f"wrote adapter: {how}\n")
    assert "adapter exists and is not empty" in run("export", "run", "--adapter", "--out", "adapter").output
    engine = Engine.from_pretrained("base", adapter="adapter")
    assert engine.statistics["bimanual"].chunk_length == 5
    # Whatever stands there by now would be trained on, and merged into.
    shutil.rmtree(tmp_path / "base")
    write_checkpoint(tmp_path / "base", make_config(**SIZES), seed=1)
    export = ("export", "run", "--out", "other")
    for words in (export, (*export, "--adapter"), ("resume", "run")):
        again = run(*words)
        assert again.exit_code == 2
        assert "model.checkpoint: " in again.output
        assert "base has changed since the run began, with SHA-256 " in again.output
    shown = CliRunner().invoke(app, ["inspect", "adapter"])
    assert shown.exit_code == 2
    assert "adapter is an adapter and holds no base" in shown.output


def test_show_forecasts_the_memory_beside_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", make_config(**SIZES))
    write_dataset(tmp_path / "episodes", (12, 9))
    stats = ["data", "stats", "episodes", "--out", "statistics.json", "--chunk-length", "5"]
    assert CliRunner().invoke(app, stats).exit_code == 0
    given = ["model.checkpoint=base", "data.statistics=statistics.json", "data.chunk_length=5"]
    shown = run("lora", "--tiny", "--show", "--memory", "24", *given)
    assert TrainConfig.from_json(shown.stdout).lora.rank == 16
    assert "memory of a training step, forecast:\n  frozen weights " in shown.stderr
    assert "more than" not in shown.stderr
    shown = run("lora", "--tiny", "--show", "--memory", "1", *given)
    assert "more than the 0.0 GiB that there are for it: no setting makes it fit; model.checkpoint_language=true " in (
        shown.stderr
    )
    for missing in (["--memory", "1"], ["--show", "--memory", "1"]):
        alone = run("lora", "--tiny", *missing)
        assert (alone.exit_code, alone.stdout) == (2, "")
        assert "--memory: expected --show, model.checkpoint=... and data.statistics=... beside it" in alone.stderr
    wrong = run("lora", "--tiny", "--show", "lora.rank=64", *given)
    assert (wrong.exit_code, TrainConfig.from_json(wrong.stdout).lora.rank) == (2, 64)
    assert "lora.rank: expected less than 64, the narrow side of " in wrong.stderr


EGO = """name: ego_alone
robot_types: [bimanual]
layout: bimanual
control_rate_hz: 30
replan_every: null
views: [{key: ego, title: Ego View}]
"""


def test_a_checkpoint_is_seen_through_the_profile_of_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "base", make_config(**SIZES))
    write_dataset(tmp_path / "episodes", (12, 9))
    (tmp_path / "ego.yaml").write_text(EGO)
    given = ["model.checkpoint=base", "data.robot=episodes", "data.statistics=statistics.json", "data.chunk_length=5"]
    given += ["data.embodiment=ego.yaml", "data.validation_fraction=0", "data.workers=0", "optim.steps=1"]
    without = run("finetune_head", "--tiny", "--out", "run", *given)
    assert without.exit_code == 2
    assert "data.statistics: expected a file that `xr0 data stats` wrote, there is none" in without.output

    stats = ["data", "stats", "episodes", "--out", "statistics.json", "--chunk-length", "5"]
    assert CliRunner().invoke(app, stats).exit_code == 0
    assert run("finetune_head", "--tiny", "--out", "run", *given).exit_code == 0
    # The profile goes with the checkpoint, not with its file.
    (tmp_path / "ego.yaml").unlink()
    embodiment = Engine.from_pretrained(tmp_path / "run" / "model").embodiment("bimanual")
    assert (embodiment.name, [view.key for view in embodiment.views]) == ("ego_alone", ["ego"])
    chosen = Engine.from_pretrained(tmp_path / "run" / "model", embodiment="bimanual").embodiment("bimanual")
    assert [view.key for view in chosen.views] == ["ego", "left_wrist", "right_wrist"]
    shown = CliRunner().invoke(app, ["inspect", "run/model", "--json"])
    assert json.loads(shown.output)["robot_types"]["bimanual"]["embodiment"] == "ego_alone"


POINTS = "tests.training.points:points"


def test_datasets_and_driving_by_functions_from_a_file_of_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = {
        "vlm_config": {
            "text_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
            "vision_config": {"depth": 1, "hidden_size": 32, "deepstack_visual_indexes": [0]},
        },
        "dit_config": {"hidden_size": 64, "num_hidden_layers": 2},
    }
    (tmp_path / "sizes.json").write_text(json.dumps(told))
    commands = [
        ["init", "--config", "sizes.json", "--out", "base"],
        ["data", "check", POINTS],
        ["data", "stats", POINTS, "--out", "statistics.json", "--chunk-length", "5"],
    ]
    assert [CliRunner().invoke(app, command).exit_code for command in commands] == [0, 0, 0]
    given = ["model.checkpoint=base", f"data.robot={POINTS}=2", "data.statistics=statistics.json"]
    given += ["data.chunk_length=5", "data.batch_size=2", "data.workers=0", "data.validation_samples=2"]
    given += ["run.closed_loop=tests.training.driving:moves", "run.closed_loop_every=1"]
    given += ["run.checkpoint_every=1", "optim.steps=2"]
    started = run("post_train_sync", "--tiny", "--out", "run", *given)
    assert started.exit_code == 0, started.output
    assert f"{POINTS}: trains on top of profile point" in started.output
    # A name stays a name, where a path would be made absolute.
    assert TrainConfig.from_json((tmp_path / "run" / "config.json").read_text()).data.robot == (f"{POINTS}=2",)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "closed_loop/far" in line] == [0, 1, 2]
    assert {"validation/l1", "validation/l1_mean"} <= lines[-1].keys()
    assert run("resume", "run").exit_code == 0
    assert run("export", "run", "--out", "first", "--step", "1").exit_code == 0
    for folder in ("run/model", "first"):
        engine = Engine.from_pretrained(tmp_path / folder)
        assert (engine.robot_types, engine.embodiment("point").control_rate_hz) == (("point",), 10)
        assert engine.statistics["point"].chunk_length == 5
