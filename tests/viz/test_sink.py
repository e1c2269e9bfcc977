"""Where --rerun may point, and what is said of the rest."""

from __future__ import annotations

import importlib.util
import socket

import pytest
from typer.testing import CliRunner

from xr0_engine.cli import app
from xr0_engine.viz import sink


def xr0(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def installed(monkeypatch):
    """Whether rerun is there or not: what is refused here does not need it."""
    monkeypatch.setattr(sink, "find_spec", lambda name: importlib.util.find_spec("json"))


def test_without_rerun_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "find_spec", lambda name: None)
    result = xr0("drive", "--env", "null", "--rerun", tmp_path / "run.rrd")
    assert result.exit_code == 2
    assert "pip install 'xr0-engine[viz]'" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("run.png", "expected a new .rrd file in an existing folder, or a viewer's address such as rerun.http://127"),
        ("missing/run.rrd", "expected a new .rrd file in an existing folder"),
        ("there.rrd", "expected a new file, and .*there.rrd exists"),
        ("http://host:9876/proxy", "expected FILE.rrd or rerun"),
        ("rerun+http:///proxy", "expected FILE.rrd or rerun"),
        ("rerun+http://host:nine/proxy", "expected FILE.rrd or rerun"),
    ],
)
def test_refused_before_anything_is_loaded(installed, tmp_path, monkeypatch, target, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.rrd").write_bytes(b"precious")
    with pytest.raises(ValueError, match=complaint):
        sink.check_target(target)
    assert (tmp_path / "there.rrd").read_bytes() == b"precious"


def test_a_viewer_that_does_not_run(installed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"rerun+http://127.0.0.1:{free.getsockname()[1]}/proxy"
        with pytest.raises(ConnectionError, match=r"no viewer answers .*: start `rerun` on that machine first"):
            sink.check_target(url)
