"""How `xr0` starts, stays light, and reports errors; what the commands do is tested in files of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import xr0_engine
from xr0_engine import cli

# Packages that take long to import, or that a base installation lacks.
HEAVY = ("torch", "transformers", "matplotlib", "mujoco", "dm_control", "gym_aloha", "av", "huggingface_hub", "rerun")


def heavy_modules_after(code: str) -> set[str]:
    report = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True)
    return set(run.stderr.splitlines()[-1].split())


def start(*arguments: str) -> str:
    return f"from xr0_engine.cli import app; app({list(arguments)}, standalone_mode=False)"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import xr0_engine", id="package"),
        pytest.param(start("--help"), id="xr0 --help"),
        *(pytest.param(start(name, "--help"), id=f"xr0 {name} --help") for name in cli.COMMANDS),
        pytest.param(start("bench", "latency", "--help"), id="xr0 bench latency --help"),
    ],
)
def test_start_imports_nothing_heavy(code):
    assert heavy_modules_after(code) == set()


def test_a_robot_that_a_server_drives_needs_nothing_heavy():
    """As `pip install xr0-engine` has it; nobody listens on port 9."""
    words = ("drive", "--env", "null", "--robot-type", "libero_all", "--seconds", "1", "--server", "ws://127.0.0.1:9")
    assert heavy_modules_after(start(*words)) == set()


def test_only_the_engine_needs_torch():
    names = ", ".join(sorted(set(xr0_engine.__all__) - {"Engine"}))
    assert heavy_modules_after(f"from xr0_engine import {names}") == set()


def test_every_public_name_resolves():
    for name in xr0_engine.__all__:
        assert getattr(xr0_engine, name) is not None
        assert name in dir(xr0_engine)
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = xr0_engine.Motor


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_help_lists_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert [name for name in cli.COMMANDS if name not in result.output] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_has_help(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f" {name} [OPTIONS]" in result.output


def test_version():
    assert invoke("--version").output == f"xr0-engine {xr0_engine.__version__}\n"


def test_runs_as_module():
    run = subprocess.run([sys.executable, "-m", "xr0_engine", "--version"], check=True, capture_output=True, text=True)
    assert run.stdout == f"xr0-engine {xr0_engine.__version__}\n"


@pytest.mark.parametrize("arguments", [("dance",), ("doctor", "--fast"), ()], ids=["command", "option", "nothing"])
def test_wrong_call_exits_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.fixture
def fail(monkeypatch, tmp_path):
    """Runs a command of the package whose only statement is the one given."""

    def run(statement: str):
        # The errors are told apart by the file that raises them, so this folder plays the package.
        monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli" / "__init__.py"))
        path = tmp_path / "cli" / "fail.py"
        path.parent.mkdir()
        path.write_text(f"import torch, typer\ndef fail() -> None:\n    'Fail.'\n    {statement}\n")
        spec = importlib.util.spec_from_file_location("xr0_engine.cli.fail", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "xr0_engine.cli.fail", module)
        monkeypatch.setattr(cli, "COMMANDS", ("fail",))
        return invoke("fail")

    return run


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        pytest.param(
            "raise ValueError('state: expected 32 values, got 7')", "state: expected 32 values, got 7", id="value"
        ),
        pytest.param("raise NotImplementedError('backend x: use y')", "backend x: use y", id="not implemented"),
        pytest.param("raise RuntimeError('no GPU')", "no GPU", id="our RuntimeError"),
        pytest.param("open('/nowhere/at/all')", "[Errno 2] No such file or directory: '/nowhere/at/all'", id="file"),
        pytest.param(
            "raise OSError(28, 'No space left on device')", "[Errno 28] No space left on device", id="full disk"
        ),
        pytest.param(
            "raise ModuleNotFoundError('No module', name='torch.nn')",
            "torch is not installed: pip install 'xr0-engine[cpu]'",
            id="extra",
        ),
    ],
)
def test_mistake_is_one_line_and_exits_with_2(fail, statement, message):
    result = fail(statement)
    assert (result.exit_code, result.stderr, result.stdout) == (2, f"xr0: error: {message}\n", "")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        pytest.param("{}['state']", KeyError, id="KeyError"),
        pytest.param("torch.ones(2) @ torch.ones(3)", RuntimeError, id="RuntimeError of torch"),
        pytest.param("import module_of_nobody", ModuleNotFoundError, id="unknown module"),
    ],
)
def test_bug_keeps_its_traceback(fail, statement, kind):
    result = fail(statement)
    assert type(result.exception) is kind
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("statement", "exit_code"),
    [
        pytest.param("raise typer.Exit(1)", 1, id="answer is no"),
        pytest.param("raise KeyboardInterrupt", 130, id="Ctrl-C"),
    ],
)
def test_exit_code_without_message(fail, statement, exit_code):
    result = fail(statement)
    assert (result.exit_code, result.output) == (exit_code, "")
