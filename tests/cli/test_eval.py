"""xr0 eval: from options to a folder of results, on the fake benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.evaluation.fake import PointBenchmark, as_line
from tests.serve.support import EchoEngine, backend
from tests.support import ROOT
from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.results import read_results
from xr0_engine.evaluation.start import check_trials, chosen_tasks, read_delays, read_modes, read_numbers
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.worker import EngineThread

OWN = {"horizon_steps", "minutes", "piece_timeout_s"}


@pytest.fixture
def fake(monkeypatch):
    """`xr0 eval aloha` runs the fake; what it is can be changed in `made`."""
    made = {}

    def make(**own):
        assert own.keys() == OWN
        return PointBenchmark(**made)

    monkeypatch.setattr("xr0_engine.evaluation.aloha.Aloha", make)
    return made


def command(folder, *options):
    return CliRunner().invoke(app, ["eval", "aloha", "--out", str(folder), *options])


def lines(folder):
    return {episode.key: as_line(episode) for episode in read_results(folder).episodes}


def test_a_grid_of_modes_and_delays(fake, tmp_path):
    options = ["--expert", "--suite", "far", "--task", "1", "--trials", "2", "--delay-steps", "0-2", "--jobs", "2"]
    result = command(tmp_path / "run", *options, "--mode", "sync,async", "--seed", "3")
    assert result.exit_code == 0, result.output
    found = read_results(tmp_path / "run")
    assert len(found.episodes) == found.planned == 2 * 2 * 3
    assert {(episode.suite, episode.task, episode.seed) for episode in found.episodes} == {("far", 1, 3)}
    run = found.run
    assert (run.benchmark, run.versions) == ("point", {"point": "1.0"})
    assert (run.policy["kind"], run.policy["checkpoint"], run.policy["max_prefix"]) == ("expert", None, None)
    assert run.execution == {
        "rate_hz": 20.0,
        "execute": 4,
        "trigger": "execute",
        "margin": 0,
        "max_prefix": None,
        "seed": 3,
    }
    assert run.code["version"]
    assert "page: " in result.stdout
    assert (tmp_path / "run" / "page.html").exists()
    assert "12/12" in result.stderr
    # The same command again has nothing left to do; another is refused.
    again = command(tmp_path / "run", *options, "--mode", "sync,async", "--seed", "3")
    assert again.exit_code == 0
    assert read_results(tmp_path / "run") == found
    other = command(tmp_path / "run", *options)
    assert other.exit_code == 2
    assert "execution.seed: 3 before, 0 now" in other.stderr
    for name in ("show", "page"):
        assert CliRunner().invoke(app, ["eval", name, str(tmp_path / "run")]).exit_code == 0
    shown = CliRunner().invoke(app, ["eval", "show", str(tmp_path / "run"), "--json"])
    json.loads(shown.stdout)
    itself = CliRunner().invoke(app, ["eval", "compare", str(tmp_path / "run"), str(tmp_path / "run"), "--json"])
    assert itself.exit_code == 0, itself.output
    json.loads(itself.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


def as_libero(fake):
    """The fake as the tiny checkpoint's LIBERO robot."""
    fake |= {"views": ("base", "left_wrist"), "robot": "libero_all", "horizon": 8}


def test_a_checkpoint_and_its_server_give_the_same(fake, tmp_path, checkpoint):
    as_libero(fake)
    which = ["--suite", "near", "--task", "0", "--trials", "1", "--mode", "sync,async", "--delay-steps", "1"]
    result = command(tmp_path / "engine", str(checkpoint), "--device", "cpu", "--dtype", "float32", *which)
    assert result.exit_code == 0, result.output
    policy = read_results(tmp_path / "engine").run.policy
    assert (policy["robot_type"], policy["dtype"], policy["backend"]) == ("libero_all", "float32", "reference")
    assert len(policy["checkpoint"]) == 64
    line = json.loads((tmp_path / "engine" / "episodes.jsonl").read_text().splitlines()[0])
    assert line["run"]["checkpoint"] == policy["checkpoint"]

    served = EngineThread(lambda: Engine.from_pretrained(checkpoint, "cpu", "float32"), (16, 16), "libero_all")
    with BackgroundServer(served, ServerConfig(port=0)) as server:
        result = command(tmp_path / "server", "--server", server.url, *which)
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "server") == lines(tmp_path / "engine")
    assert read_results(tmp_path / "server").run.policy["checkpoint"] is None


def test_a_server_that_does_not_come(fake, tmp_path):
    result = command(tmp_path / "run", "--server", "ws://127.0.0.1:9", "--wait-s", "0.1")
    assert result.exit_code == 2
    assert "cannot connect" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_server_that_goes_for_good(fake, tmp_path):
    as_libero(fake)
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        options = ["--server", server.url, "--suite", "near", "--task", "0", "--wait-s", "0.5"]
        assert command(tmp_path, *options, "--trials", "1").exit_code == 0
    result = command(tmp_path, *options)
    assert result.exit_code == 2
    assert "cannot connect" in result.stderr
    assert len(read_results(tmp_path).episodes) == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        pytest.param([], "CHECKPOINT, --server, --openpi, --expert: expected exactly one", id="no policy"),
        pytest.param(["x", "--expert"], "expected exactly one of them", id="two policies"),
        pytest.param(
            ["--expert", "--suite", "middle"], "--suite: expected one of near, far or all; got 'middle'", id="suite"
        ),
        pytest.param(
            ["--expert", "--task", "7"], "--task: expected one of suite near: 0 near 0, 1 near 1; got 7", id="task"
        ),
        pytest.param(["--expert", "--task", "two"], "--task: expected whole numbers", id="task in words"),
        pytest.param(
            ["--expert", "--mode", "fast"], "--mode: expected sync, naive, async, guided, with commas", id="mode"
        ),
        pytest.param(["--expert", "--delay-steps", "6-0,x"], "--delay-steps: expected steps such as", id="delay"),
        pytest.param(["--expert", "--video", "some"], "--video: expected none, failures or all", id="video"),
        pytest.param(["--expert", "--trigger", "0"], "--trigger: expected execute, deadline or a number", id="trigger"),
        pytest.param(["--expert", "--dtype", "float32"], "--dtype: expected only with a CHECKPOINT", id="dtype"),
        pytest.param(["--expert", "--robot-type", "a"], "--robot-type: expected only with", id="robot type"),
        pytest.param(["--expert", "--api-key", "a"], "--api-key: expected only with --server or", id="key"),
        pytest.param(["--expert", "--ca-file", "a.pem"], "--ca-file: expected only with --server", id="certificates"),
        pytest.param(["--server", "ftp://x"], "url: expected ws://host:port", id="url"),
        pytest.param(["--openpi", "ws://localhost:9"], "--openpi: expected a benchmark that openpi has", id="openpi"),
        pytest.param(["/nowhere/at/all", "--device", "cpu"], "there is no checkpoint folder", id="checkpoint"),
    ],
)
def test_mistakes_are_told_in_one_line(fake, tmp_path, options, complaint):
    result = command(tmp_path / "run", *options)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("xr0: error: ")
    assert complaint in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_the_policy_cannot_do_is_told_before_anything_runs(fake, tmp_path, checkpoint):
    as_libero(fake)
    options = [str(checkpoint), "--device", "cpu", "--mode", "async", "--delay-steps", "0-7"]
    result = command(tmp_path / "run", *options)
    assert result.exit_code == 2
    assert "--mode async, --delay-steps 7: " in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_simulator_is_told_with_its_remedy(fake, tmp_path):
    fake["missing"] = "the simulator is not installed: pip install 'xr0-engine[sim]'"
    result = command(tmp_path / "run", "--expert")
    # What is raised outside of the package is shown as a bug would be; benchmarks are inside.
    assert str(result.exception) == fake["missing"]
    assert not (tmp_path / "run").exists()


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
if __name__ == "__main__":
    from pathlib import Path
    from rich.console import Console
    from tests.evaluation.fake import PointBenchmark
    from xr0_engine.evaluation import page, start, tables
    which, out = start.Which(suites=("near",), trials=1), Path(sys.argv[1])
    tables.show_results(
        start.evaluate(PointBenchmark(), start.Who(expert=True), which, start.How(), out, Console(stderr=True))
    )
    page.write_page(out)
"""


def test_it_needs_no_torch(tmp_path):
    """The simulators' environments may not have it: the policy is a server's then."""
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_TORCH)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")], check=True, env=environment, capture_output=True
    )
    assert len(read_results(tmp_path / "run").episodes) == 2


def test_reading_of_options():
    assert read_delays("0-3") == (0, 1, 2, 3)
    assert read_delays("0,2.5, 6-7,0") == (0, 2.5, 6, 7)
    assert read_modes("async, sync,async") == ("async", "sync")
    assert read_numbers("--task", "3,0,3") == (3, 0)
    for wrong in ("", "-1", "1-", "nan", "3--4", "1e9"):
        with pytest.raises(ValueError, match="--delay-steps: expected"):
            read_delays(wrong)


class WithDefaults(PointBenchmark):
    default_suites = ("far",)
    most_trials = 5


def test_default_suites():
    names = lambda tasks: [(task.suite, task.index) for task in tasks]  # noqa: E731
    assert names(chosen_tasks(PointBenchmark(), ("all",), None)) == [(s, n) for s in ("near", "far") for n in (0, 1)]
    assert names(chosen_tasks(WithDefaults(), ("all",), None)) == [("far", 0), ("far", 1)]
    assert names(chosen_tasks(WithDefaults(), ("near", "all"), (1,))) == [("near", 1), ("far", 1)]
    assert Trial(chosen_tasks(WithDefaults(), ("near",), (1,))[0], 0, 0).key == ("near", 1, 0, "sync", 0)
    check_trials(WithDefaults(), 5)
    check_trials(PointBenchmark(), 6)
    with pytest.raises(ValueError, match="--trials: expected at most 5"):
        check_trials(WithDefaults(), 6)
