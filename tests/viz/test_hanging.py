"""A viewer that hangs: whoever shows it something goes on, ends, and is told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from tests.executor.support import RATE_HZ, WIDTH, execute
from tests.support import ROOT
from xr0_engine.viz import run, sink

pytest.importorskip("rerun")

# Instead of STUCK_S: nobody takes anything here.
SHORT_S = 0.3
# What giving up takes beyond that, on a busy machine; without an end it would be for ever.
SLACK_S = 20.0
# For a process to start, drive and end on one.
PATIENCE_S = 120.0
HANGS = "the viewer hangs: it has not taken what it was sent in 0.3 s"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(sink, "STUCK_S", SHORT_S)


def begun(url):
    view = run.RunView(url, "", patient=True)
    view.write("session", settings={"rate_hz": RATE_HZ, "mode": "sync"}, layout="plain", width=WIDTH)
    return view


def test_the_end_does_not_wait_for_it(silent_viewer):
    start_s = time.monotonic()
    view = begun(silent_viewer)
    report, _, _ = execute(recorder=view)
    with pytest.raises(OSError, match=re.escape(f"--rerun {silent_viewer}: {HANGS}")):
        view.close()
    assert report.ended == "time"
    assert time.monotonic() - start_s < SLACK_S


def test_neither_does_simulated_time(silent_viewer, monkeypatch):
    """Where its thread can hand it nothing more."""
    free = threading.Event()
    monkeypatch.setattr(run._Page, "draw", lambda *given: free.wait())
    monkeypatch.setattr(sink, "MOST_ENTRIES", 2)
    start_s = time.monotonic()
    view = begun(silent_viewer)
    report, robot, _ = execute(recorder=view)
    with pytest.raises(OSError, match=HANGS):
        view.close()
    assert (report.ended, len(robot.rows) > 100) == ("time", True)
    assert time.monotonic() - start_s < SLACK_S
    free.set()


def test_one_that_is_slow_is_waited_for(tmp_path, monkeypatch):
    """As long as one entry after the other gets there."""
    monkeypatch.setattr(sink, "_patience_s", lambda target: SHORT_S)
    drawn = []
    monkeypatch.setattr(run._Page, "draw", lambda page, stream, entry: drawn.append(time.sleep(SHORT_S / 3)))
    view = begun(tmp_path / "run.rrd")
    for number in range(5):
        view.write("missed", first=number, count=1)
    view.close()
    assert len(drawn) == 6


def test_drive_shows_its_report_and_ends(silent_viewer):
    """A process of its own: rerun waits for viewers when Python ends."""
    drive = ["drive", "--env", "null", "--delay-steps", "3", "--seconds", "1", "--rerun", silent_viewer]
    program = f"from xr0_engine.viz import sink; sink.STUCK_S = {SHORT_S}; from xr0_engine.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *drive],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.endswith("deadlines missed: 0; ended: time\n")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"xr0: error: --rerun {silent_viewer}: {HANGS}")
