"""What runs on an export from the command line: the demo and the benchmark."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app

STAGES = ["--stage", "vision", "--stage", "prefill", "--stage", "flow"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


def export(checkpoint, folder, case):
    result = CliRunner().invoke(app, ["export", "onnx", str(checkpoint), "--case", case, "--out", str(folder), *STAGES])
    assert result.exit_code == 0, result.stderr
    return str(folder)


def test_demo_runs_on_an_export(checkpoint, tmp_path):
    for package in ("gym_aloha", "av", "matplotlib"):
        pytest.importorskip(package)
    from xr0_engine.sim import choose_renderer

    try:
        choose_renderer()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    folder = export(checkpoint, tmp_path / "export", "bimanual")
    arguments = ["demo", "--export", folder, "--seconds", "0.6", "--out", str(tmp_path / "demo"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["checkpoint"], facts["frames"], facts["inferences"]) == (folder, 18, 2)
    assert facts["latency_ms"]["flow"]["p50"] > 0


def test_demo_takes_a_checkpoint_or_an_export(checkpoint, tmp_path):
    result = CliRunner().invoke(app, ["demo", str(checkpoint), "--export", str(tmp_path)])
    assert (result.exit_code, "--export: expected no checkpoint beside it" in result.stderr) == (2, True)


def test_latency_takes_turns_with_an_export(checkpoint, tmp_path):
    folder = export(checkpoint, tmp_path / "export", "libero")
    out = tmp_path / "result.json"
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--export",
        folder,
        "--export-backend",
        "onnx",
        "--alone",
        "--rounds",
        "2",
    ]
    result = CliRunner().invoke(app, ["bench", "latency", *arguments, "--dtype", "float32", "--json", str(out)])
    assert result.exit_code == 0, result.stderr
    measured = json.loads(out.read_text())
    assert set(measured["series"]) == {"engine", "onnx"}
    assert measured["series"]["onnx"].keys() == measured["series"]["engine"].keys()
    assert measured["facts"]["error_against_engine"]["onnx"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export", "nowhere"], "nowhere holds no manifest.json"),
        (["--export-backend", "onnx"], "export-backend: expected an export beside it, got 'onnx' alone"),
        (["--export", "nowhere", "--part", "dit"], "export: expected none beside part dit"),
    ],
    ids=["no-export", "backend-alone", "part"],
)
def test_wrong_latency_call_exits_with_2(arguments, message, checkpoint):
    result = CliRunner().invoke(app, ["bench", "latency", "--checkpoint", str(checkpoint), "--alone", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
