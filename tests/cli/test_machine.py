"""xr0 bench machine as it is called; what it runs is tested in tests/bench/machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from tests.support import ROOT
from xr0_engine.cli import app


def machine(*arguments: object):
    return CliRunner().invoke(app, ["bench", "machine", *map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--minutes", "0"), "--minutes: expected more than 0, got 0"),
        (("--golden", "/nowhere"), "--golden: there is no folder /nowhere"),
        (("--emulate", "75"), "--emulate: expected one of 80, 86, 89, 90, 120; got 75"),
        (("--emulate", "90", "--size", "4b"), "--size: the emulator is for tiny models"),
    ],
)
def test_mistake_exits_with_2_and_leaves_nothing(tmp_path, options, message):
    out = tmp_path / "out"
    told = machine("--out", out, *options)
    assert told.exit_code == 2
    assert message in told.stderr
    assert not out.exists()


def test_out_that_cannot_be_a_folder_exits_with_2(tmp_path):
    (tmp_path / "file").write_text("")
    told = machine("--out", tmp_path / "file" / "out", "--emulate", "90")
    assert told.exit_code == 2
    assert len(told.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_there_is_instead(tmp_path):
    told = machine("--out", tmp_path / "out")
    assert told.exit_code == 2
    assert "torch finds no CUDA GPU here" in told.stderr
    assert "--emulate 90" in told.stderr


def test_an_installed_package_has_no_emulator(tmp_path):
    shutil.copytree(ROOT / "xr0_engine", tmp_path / "site" / "xr0_engine", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "xr0_engine", "bench", "machine", "--emulate", "90", "--out", str(tmp_path / "o")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 2
    assert "the emulator is in a checkout's tests/ptx/__init__.py" in told.stderr
