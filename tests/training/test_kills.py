"""One kill of kills.py, and that it tells what a kill could spoil; `make kills` has thirty."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress

import pytest

from tests.training.killed_run import EXPORTING, GRACE_S, METRICS, MOMENTS, PATIENCE_S, TRAINING, VICTIMS, Run
from tests.training.kills import faults_after, faults_at_end, plan, runs, wait_for
from tests.training.support import FORKED
from xr0_engine.training.checkpoint import PROGRESS_FILE
from xr0_engine.training.config import override
from xr0_engine.training.distributed import world
from xr0_engine.training.recipes import finetune_head
from xr0_engine.training.run_folder import BASE_FILE, CONFIG_FILE, RUN_STATISTICS_FILE
from xr0_engine.training.start import start_run
from xr0_engine.whole import LOCK_FILE

WEIGHTS = "model/model-00001-of-00001.safetensors"


def test_plan_has_every_kind_as_often_as_every_other():
    order = plan(30, random.Random(0))
    assert order != plan(30, random.Random(1))
    assert [moment for moment, _ in order].count(EXPORTING) == 3
    assert {moment for moment, _ in order} == set(MOMENTS)
    assert all(9 <= [victim for _, victim in order].count(name) <= 11 for name in VICTIMS)


def test_a_killed_run_goes_on_and_what_would_be_spoiled_is_told(tmp_path):
    with runs(tmp_path, steps=7) as (run, whole, start, start_s):
        run.begin(*start)
        assert wait_for(run, TRAINING, random.Random(2), start_s)
        assert run.kill(VICTIMS["rank 1"]) == []
        assert faults_after(run, whole, 0) == []
        run.begin("resume", str(run.folder))
        assert run.wait() == []
    assert faults_at_end(run, whole) == []
    assert faults_after(run, whole, 0) == []
    spoiled = {
        WEIGHTS: lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
        METRICS: lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1])),
        f"checkpoints/step-00000007/{PROGRESS_FILE}": lambda path: path.write_text(json.dumps({"step": 6})),
        LOCK_FILE: lambda path: path.touch(),
        "checkpoints/step-00000009.partial": lambda path: path.mkdir(),
        f".metrics-01234567.partial.{METRICS}": lambda path: path.touch(),
    }
    for name, spoil in spoiled.items():
        copy = Run(tmp_path / "copy", run.log)
        shutil.copytree(run.folder, copy.folder)
        spoil(copy.folder / name)
        assert faults_at_end(copy, whole), name
        shutil.rmtree(copy.folder)
    (run.folder / METRICS).write_text("")
    shutil.rmtree(run.folder / "checkpoints" / "step-00000007")
    assert len(faults_after(run, whole, 7)) == 2


@pytest.mark.parametrize("left", [RUN_STATISTICS_FILE, BASE_FILE, f".{CONFIG_FILE[:-5]}-01234567.partial.json"])
def test_what_was_killed_before_it_had_a_config_can_be_started_again(left, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / left).write_text("{}")
    config = override(finetune_head(), ["model.checkpoint=gone", "data.robot=gone", "data.statistics=gone"])
    # A user's own file, perhaps.
    with pytest.raises(ValueError, match="exists and is not empty"):
        start_run(config, folder)
    (folder / LOCK_FILE).touch()
    with pytest.raises(ValueError, match="gone"):
        start_run(config, folder)
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        start_run(config, folder)


def wait_for_another(port: int) -> None:
    """As `xr0 train` does, which cleans up on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    with world():
        pass


def test_sigterm_ends_a_process_whose_other_one_does_not_come():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = FORKED.Process(target=wait_for_another, args=(port,))
    process.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while process.is_alive() and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        process.terminate()
        process.join(GRACE_S)
        assert process.exitcode == -signal.SIGTERM
    finally:
        process.kill()
