"""Runs watched by Weights & Biases, offline: what its folder holds, how a run goes on, and what is refused."""

from __future__ import annotations

import json
import struct
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from xr0_engine.cli import app
from xr0_engine.training import tracking
from xr0_engine.training.config import override
from xr0_engine.training.metrics import Log
from xr0_engine.training.recipes import finetune_head
from xr0_engine.training.tracking import WANDB_FILE, check_tracking
from xr0_engine.types import FileError

CONFIG = override(finetune_head(), ["run.wandb=team/robots", "optim.steps=4"])


BLOCK, HEAD, WHOLE_OR_LAST = 32 * 1024, 7, (1, 4)
"""Of the format of LevelDB's logs: a block's size, a record's head (checksum, length, kind), and the kinds that end."""


def messages(data: bytes):
    """Records of a .wandb file, behind its own head of as many bytes."""
    place, parts = HEAD, b""
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEAD])
        parts += data[place + HEAD : place + HEAD + length]
        place += HEAD + length
        if kind in WHOLE_OR_LAST:
            yield parts
            parts = b""


def records(folder):
    """History rows and settings of every offline run in a folder."""
    from wandb.proto import wandb_internal_pb2

    rows, runs = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in messages(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows, runs


def test_a_run_and_its_resumption_are_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "pick-cubes"
    for start, steps in ((0, (1, 2)), (2, (3, 4))):
        log = Log(run, CONFIG, start)
        for step in steps:
            log.write(step, {"loss": 1.0 / step, "loss_by_step": [0.5, None], "note": None})
        log.close()
        # Offline, a run's folder is named by the second in which it began; one goes on later than that.
        time.sleep(1.1)
    rows, runs = records(run)
    assert [(row["step"], row["loss"], row["loss_by_step/00"]) for row in rows] == [
        (step, 1.0 / step, 0.5) for step in (1, 2, 3, 4)
    ]
    assert not any("loss_by_step/01" in row or "note" in row for row in rows)
    assert {(each.entity, each.project, each.display_name) for each in runs} == {("team", "robots", "pick-cubes")}
    assert {each.run_id for each in runs} == {json.loads((run / WANDB_FILE).read_text())["id"]}
    told = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert told["recipe"] == "finetune_head"
    assert told["optim"]["steps"] == 4


def test_tensorboard_has_what_was_reported_and_a_run_that_asks_for_no_more_makes_no_more(tmp_path):
    config = replace(CONFIG, run=replace(CONFIG.run, wandb=""))
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = Log(tmp_path, config, start)
        for step in steps:
            log.write(step, {"loss": 1.0 / (step + start), "loss_by_step": [0.5, None]})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    # What a killed run reported behind its checkpoint is void.
    losses = {each.step: each.value for each in board.Scalars("loss")}
    assert losses == pytest.approx({1: 1.0, 2: 0.5, 3: 0.2, 4: 1 / 6})
    assert {each.value for each in board.Scalars("loss_by_step/00")} == {0.5}
    assert "loss_by_step/01" not in board.Tags()["scalars"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("project", ["a/b/c", "te:am", "/robots", "team/", "a#b"])
def test_a_project_that_cannot_be_one_is_refused_in_the_config(project):
    with pytest.raises(ValueError, match=r"run\.wandb: expected a project or entity/project"):
        override(finetune_head(), [f"run.wandb={project}"])


def test_a_run_that_fails_is_told_to_have_failed_and_a_refused_start_is_named(tmp_path, monkeypatch):
    codes = []

    class Refused(Exception):
        pass

    def init(**told):
        if told["project"] == "closed":
            raise Refused("no rights")
        return SimpleNamespace(
            id="1", define_metric=lambda *_, **__: None, finish=lambda exit_code: codes.append(exit_code)
        )

    wandb = SimpleNamespace(init=init, errors=SimpleNamespace(Error=Refused))
    monkeypatch.setattr(tracking, "import_module", lambda name: wandb)
    for failed in (False, True):
        tracking.WeightsAndBiases(tmp_path, CONFIG).close(failed)
    assert codes == [0, 1]
    closed = override(CONFIG, ["run.wandb=team/closed"])
    with pytest.raises(ValueError, match=r"run.wandb: team/closed: no rights .*or remove .*wandb.json for a new one"):
        tracking.WeightsAndBiases(tmp_path, closed)


@pytest.mark.parametrize("content", ["[]", "{}", '{"id": 3}', "{"])
def test_a_damaged_id_is_named(tmp_path, content):
    (tmp_path / WANDB_FILE).write_text(content)
    with pytest.raises(FileError, match=WANDB_FILE):
        tracking._known_id(tmp_path / WANDB_FILE)


def test_what_the_machine_lacks_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    words = ["train", "finetune_head", "model.checkpoint=nowhere", "data.robot=d", "data.statistics=s"]
    words += ["run.wandb=robots", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "run.wandb: wandb is not installed: pip install" in result.output
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: object())

    def api():
        raise RuntimeError("no key is configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=api, errors=SimpleNamespace(Error=RuntimeError)))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"run\.wandb: no key is configured \(`wandb login`"):
        check_tracking(CONFIG)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracking(CONFIG)
    assert not (tmp_path / "run").exists()
