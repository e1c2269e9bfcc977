"""What leaves a machine names nobody, and nothing else changes."""

from __future__ import annotations

import json
import socket
import tempfile
from pathlib import Path

import pytest

import xr0_engine
from xr0_engine.bench.machine.private import Scrubber

PACKAGE = str(Path(xr0_engine.__file__).parent.parent)


@pytest.fixture
def scrub(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("XR0_CACHE", "/home/ada/cache")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine.lab.example")
    return Scrubber({"/home/ada/runs/first": "DIR", "/data/ada/golden": "GOLDEN"})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("wrote /home/ada/runs/first/results/a.json", "wrote DIR/results/a.json"),
        ("/home/ada/runs/first-try/x", "~/runs/first-try/x"),
        ("/home/ada/cache/4b", "XR0_CACHE/4b"),
        (f'File "{PACKAGE}/xr0_engine/engine.py", line 3', 'File "PACKAGE/xr0_engine/engine.py", line 3'),
        ("/data/ada/golden/grouped.json", "GOLDEN/grouped.json"),
        ("/mnt/ada/weights, /mnt/adam", "/mnt/USER/weights, /mnt/adam"),
        ("[W socket.cpp] engine.lab.example and engine:", "[W socket.cpp] HOST and HOST:"),
        ("the engines, search-engine, adaptive", "the engines, search-engine, adaptive"),
    ],
)
def test_text(scrub, before, after):
    assert scrub.text(before) == after


def test_a_result_keeps_its_keys_and_words(scrub, tmp_path):
    """The host is called as a series is: no harm is done to it."""
    path = tmp_path / "result.json"
    content = {"series": {"engine": {"total": [1.5]}}, "backend": "engine", "command": "xr0 --json /home/ada/a.json"}
    path.write_text(json.dumps(content))
    scrub.file(path)
    assert json.loads(path.read_text()) == {**content, "command": "xr0 --json ~/a.json"}
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_a_file_that_names_nobody_is_left_alone(scrub, tmp_path):
    path = tmp_path / "quiet.log"
    path.write_bytes(b"nothing \xff here\n")
    before = path.stat().st_mtime_ns
    scrub.file(path)
    assert path.stat().st_mtime_ns == before
    scrub.file(tmp_path / "missing.log")


def test_a_broken_json_is_scrubbed_as_text(scrub, tmp_path):
    path = tmp_path / "half.json"
    path.write_text('{"command": "/home/ada/x')
    scrub.file(path)
    assert path.read_text() == '{"command": "~/x'


def test_common_names_are_words(monkeypatch):
    monkeypatch.setenv("USER", "root")
    monkeypatch.setenv("HOME", tempfile.gettempdir() + "/root")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert Scrubber({}).text("a localhost, /sys/root") == "a localhost, /sys/root"
