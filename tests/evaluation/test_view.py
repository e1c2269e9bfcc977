"""Episodes in rerun: which are kept, and what is in them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.fake import PointBenchmark
from tests.evaluation.support import a_job, evaluate
from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.runner import check
from xr0_engine.evaluation.worker import Simulation
from xr0_engine.viz import sink


class Nobody:
    """A connection to a parent that says nothing."""

    def send(self, told): ...


def attempts(benchmark, folder, rerun):
    trials = [Trial(benchmark.suites()["near"][0], number, 0) for number in (0, 1)]
    with Simulation(Nobody(), a_job(benchmark, folder, rerun=rerun)) as simulation:
        return [simulation.attempt(trial) for trial in trials]


@pytest.mark.parametrize(
    ("rerun", "kept"),
    [("none", []), ("failures", ["near-0-1-sync-0.rrd"]), ("all", ["near-0-0-sync-0.rrd", "near-0-1-sync-0.rrd"])],
)
def test_what_is_kept(tmp_path, rerun, kept):
    pytest.importorskip("rerun")
    told = attempts(PointBenchmark(fault="raise"), tmp_path, rerun)
    assert [done.episode.success for done in told] == [True, False]
    assert sorted(path.name for path in tmp_path.rglob("*.rrd")) == kept


def test_an_episode_is_read_back(tmp_path):
    pytest.importorskip("rerun")
    from tests.viz.support import read, series, texts

    benchmark = PointBenchmark(rollouts=2)
    plain = attempts(benchmark, tmp_path / "plain", "none")
    seen = attempts(benchmark, tmp_path / "seen", "all")
    # It is watched, not changed.
    assert [(done.episode.steps, done.episode.calls) for done in seen] == [
        (done.episode.steps, done.episode.calls) for done in plain
    ]
    rows = read(tmp_path / "seen" / "rerun" / "near-0-0-sync-0.rrd")
    episode = seen[0].episode
    times, told = series(rows, "/commands/columns")
    assert told.shape == (episode.steps, 32)
    # Rollouts come one after the other.
    assert (np.diff(times) > 0).all()
    assert np.diff(times).max() >= 1
    assert len(rows["/camera/base"]) == episode.calls
    assert sum(text.startswith("ended") for text in texts(rows)) == 2


def test_a_disk_that_takes_none_ends_the_run(tmp_path):
    pytest.importorskip("rerun")
    (tmp_path / "rerun").touch()
    (told, _) = attempts(PointBenchmark(), tmp_path, "all")
    assert told.kind == "OSError"


def test_what_a_run_that_was_killed_left_is_removed(tmp_path):
    left = tmp_path / "rerun" / ".near-0-0-sync-0.partial.rrd"
    left.parent.mkdir()
    left.touch()
    evaluate(PointBenchmark(names=()), tmp_path)
    assert not left.exists()


def test_it_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'xr0-engine\[viz\]'"):
        check(a_job(PointBenchmark(), tmp_path, rerun="failures"), [])
