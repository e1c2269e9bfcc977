"""xr0 doctor: on this machine, and on machines that lack something."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from xr0_engine import __version__
from xr0_engine.cli import app, doctor, install_hint


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", *arguments])


@pytest.fixture
def lacking(monkeypatch):
    """Hides packages from doctor."""

    def hide(*packages: str) -> None:
        version = doctor._version
        monkeypatch.setattr(doctor, "_version", lambda package: None if package in packages else version(package))

    return hide


def test_this_machine_is_ready():
    result = run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ready"] is True
    assert report["versions"]["xr0-engine"] == __version__
    assert report["backends"]["reference"] is None


def test_without_torch_it_says_what_to_install(lacking):
    lacking("torch")
    result = run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["ready"] is False
    assert report["backends"] == {"reference": "torch is not installed"}
    assert report["remedies"]["torch"] == "to run the model: pip install 'xr0-engine[cpu]'"


def test_without_the_simulator_the_model_still_runs(lacking):
    lacking("gym_aloha")
    report = json.loads(run("--json").stdout)
    assert report["ready"] is True
    assert report["rendering"] == "the simulator is not installed"
    assert report["remedies"]["gym_aloha"].endswith(install_hint("gym_aloha"))
    assert "rendering" not in report["remedies"]


def test_without_the_native_module_it_names_the_compiler(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    report = json.loads(run("--json").stdout)
    assert report["ready"] is True
    assert report["native"].startswith("not built")
    assert "g++" in report["remedies"]["native module"]


def test_table_shows_states_and_remedies(lacking):
    lacking("torch")
    result = run()
    assert result.exit_code == 1
    assert "The model cannot run here." in result.output
    # Square brackets are markup to the library that prints the table.
    assert "pip install 'xr0-engine[cpu]'" in result.output
