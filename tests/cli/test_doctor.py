"""xr0 doctor: on this machine, and on machines that lack something."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.support import CPU
from xr0_engine import __version__
from xr0_engine.cli import app, doctor, install_hint
from xr0_engine.config import ModelConfig
from xr0_engine.fused.tactics import TacticTable


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", *arguments])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


@pytest.fixture
def gpu(cache, monkeypatch):
    """The CPU counts as a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("XR0_EMULATE", raising=False)
    monkeypatch.setattr("xr0_engine.backend.auto_checks", lambda device: True)


def kept(outcome: str, created: str, stage: str = "", reason: str = "", **identity) -> str:
    """The file of a verdict on this machine."""
    from xr0_engine.fused.verdict import Verdict, identity_of, keep

    given = {"device": CPU, "dtype": "bfloat16", "table": TacticTable("")} | identity
    return str(keep(Verdict(outcome, identity_of(**given), stage, reason, created=created)))


def auto(*arguments: str) -> list[dict]:
    return json.loads(run("--json", *arguments).stdout)["auto"]


def test_without_a_gpu_auto_is_the_reference(monkeypatch):
    monkeypatch.setattr("xr0_engine.backend.kernel_devices", list)
    assert auto() == [{"device": "cpu", "runs": "reference: there is no GPU", "verdicts": []}]


def test_what_auto_runs_is_told_before_and_after_its_checks(gpu, tmp_path):
    (found,) = auto()
    assert found["runs"].startswith("triton, if it passes its self-check")
    seeded = kept("passed", "2026-01-02T10:00:00+00:00")
    assert auto()[0]["runs"] == "triton: self-check of seeded model, bfloat16: passed on 2026-01-02"
    layers = kept("failed", "2026-01-03T10:00:00+00:00", "flow", "SIGSEGV", config=checkpoint_config(tmp_path))
    (found,) = auto()
    assert found["runs"] == "reference: self-check of checkpoint, bfloat16: failed on 2026-01-03: flow: SIGSEGV"
    assert [(each["checked"], each["outcome"], each["file"]) for each in found["verdicts"]] == [
        ("seeded model, bfloat16", "passed", seeded),
        ("checkpoint, bfloat16", "failed", layers),
    ]
    assert (found["verdicts"][1]["stage"], found["verdicts"][1]["reason"]) == ("flow", "SIGSEGV")
    assert run().output.count("failed on 2026-01-03: flow: SIGSEGV") == 1


def checkpoint_config(tmp_path) -> ModelConfig:
    from xr0_engine.checkpoint import init_checkpoint

    init_checkpoint(tmp_path / "tiny")
    return ModelConfig.load(tmp_path / "tiny")


@pytest.mark.parametrize(("kernel", "exit_code"), [("os.abort()", 1), ("honest(*words, **named)", 0)])
def test_a_check_is_made_anew_and_decides_the_exit_code(gpu, tmp_path, monkeypatch, kernel, exit_code):
    """In a process of its own, whose kernels are the oracles, or abort."""
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(
        "import os\nfrom xr0_engine.fused import ops, parts\nhonest = ops.FusedOps.linear\n"
        f"def run(*words, **named): {kernel}\nops.FusedOps.linear = run\n"
        "parts.FusedOps = lambda backend, *rest, **named: ops.FusedOps('reference', *rest, **named)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "patch"))
    old = kept("failed" if exit_code == 0 else "passed", "2026-01-02", config=checkpoint_config(tmp_path))
    result = run("--json", "--check")
    assert "checking the GPU kernels" in result.stderr
    assert result.exit_code == exit_code, result.output
    ((verdict,),) = (each["verdicts"] for each in json.loads(result.stdout)["auto"])
    # The one on the checkpoint went: its next use checks it again.
    assert verdict["file"] != old
    expected = ("passed", "") if exit_code == 0 else ("failed", "its process was ended by SIGABRT")
    assert (verdict["outcome"], verdict["reason"]) == expected
    assert verdict["checked"] == "seeded model, float32"


def test_kernels_that_cannot_run_are_not_checked(cache, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("XR0_EMULATE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("--check")
    assert result.exit_code == 2
    assert result.stderr.startswith("xr0: error: --check: t")
    assert not cache.exists()
