"""Runs in rerun: what the executor did is read back from the file; and nobody waits for it."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.executor.support import CALL, RATE_HZ, WIDTH, MarkedPolicy, MarkedRobot, execute
from tests.viz.support import read, series, texts, told_at
from xr0_engine.cli import app
from xr0_engine.executor import Recorder, Several, Snapshot, VirtualClock, read_recording
from xr0_engine.executor.recording import FIELDS, OR_NULL, VERSION
from xr0_engine.types import Observation
from xr0_engine.viz import RunView, replayed, run, sink

# Times are whole nanoseconds in the file.
TIME_TOLERANCE_S = 1e-8
# For a process to start on a busy machine.
PATIENCE_S = 60
# Of each kind that FIELDS knows: a value that a recording holds.
VALUES = {
    "whole": VERSION,
    "number": 100.5,
    "text": "chunk",
    "settings": {"rate_hz": RATE_HZ, "mode": "sync"},
    "width": WIDTH,
    "row": [0.0] * WIDTH,
    "rows": [[0.0] * WIDTH],
    "counts": {"executed": 1},
    "any": None,
}
# JPEG of one colour.
SHADE_TOLERANCE = 3


class SeeingRobot(MarkedRobot):
    """Its picture is as bright as the observation's number; its state is the step."""

    def __init__(self, clock, **named):
        super().__init__(clock, **named)
        self.seen = []

    def observe(self, now_s):
        observation = super().observe(now_s).observation
        self.seen.append(now_s)
        image = np.full((8, 12, 3), 10 * len(self.seen), np.uint8)
        state = np.array([now_s, 0.0, 0.0], np.float32)
        return Snapshot(replace(observation, images={"ego": image, "left/wrist": image}, state=state))


def watched(path, stalls=None, **named):
    """A run in virtual time, seen and recorded: (report, robot, its file read back, its recording).

    stalls: command -> seconds that pass after it.
    """
    clock = VirtualClock(100.0)
    robot = SeeingRobot(clock, on_command=lambda count: clock.jump((stalls or {}).get(count, 0.0)))
    lines = path.with_suffix(".jsonl")
    with Recorder(lines, "a test") as recorder, RunView(path, "a test", patient=True) as view:
        report, _, _ = execute(robot=robot, clock=clock, recorder=Several([view, recorder]), **named)
    return report, robot, read(path), read_recording(lines)


def test_a_run_is_read_back(tmp_path):
    report, robot, rows, recording = watched(tmp_path / "run.rrd", delay_steps=lambda number: 3 + number % 3)
    zero_s = 100.0
    times, told = series(rows, "/commands/columns")
    np.testing.assert_array_equal(told, robot.rows)
    np.testing.assert_allclose(times, np.array(robot.times) - zero_s, atol=TIME_TOLERANCE_S)

    chunks = recording.lines["chunk"]
    planned = [series(rows, entity) for entity in sorted(rows) if entity.startswith("/plan/")]
    drawn = {call: (times, told) for times, told in planned for call in np.unique(told[~np.isnan(told[:, 0]), CALL])}
    assert len(planned) > 1
    for chunk in chunks:
        at, values = next((at, values) for at, values in planned if chunk["rows"][-1] in values.tolist())
        first = np.searchsorted(at, chunk["first_step"] / RATE_HZ - zero_s - TIME_TOLERANCE_S)
        length = len(chunk["rows"])
        np.testing.assert_array_equal(values[first : first + length], chunk["rows"])
        # A line of its own: it ends in nothing.
        assert np.isnan(values[first + length]).all()
    assert len(drawn) == len(chunks)

    given = [row for chunk in chunks for row in chunk["rows"][: chunk["prefix_length"]]]
    assert given
    np.testing.assert_array_equal(series(rows, "/prefix/columns")[1], given)

    asked = {line["number"]: line for line in recording.lines["inference"]}
    times, delays_ms = series(rows, "/delay/observation_to_chunk")
    np.testing.assert_allclose(times, [asked[chunk["number"]]["time_s"] - zero_s for chunk in chunks])
    expected = [1e3 * (chunk["finished_s"] - asked[chunk["number"]]["observed_s"]) for chunk in chunks]
    np.testing.assert_allclose(delays_ms[:, 0], expected)
    covered = series(rows, "/delay/covered_by_prefix")[1][:, 0]
    np.testing.assert_allclose(covered, [1e3 * chunk["prefix_length"] / RATE_HZ for chunk in chunks])
    assert len(series(rows, "/lateness")[0]) == len(robot.rows)
    assert texts(rows)[-1].startswith("ended: time")
    assert f"{report.counts['executed']} executed" in texts(rows)[-1]


def test_what_the_robot_saw_is_read_back(tmp_path):
    report, robot, rows, _ = watched(tmp_path / "run.rrd")
    assert len(robot.seen) == report.counts["inferences"]
    for entity in ("/camera/ego", "/camera/left\\/wrist"):
        shades = [np.asarray(Image.open(io.BytesIO(bytes(row["blob"][0])))).mean() for row in rows[entity]]
        expected = 10.0 * np.arange(1, len(robot.seen) + 1)
        np.testing.assert_allclose(shades, expected, atol=SHADE_TOLERANCE)
        times = [row["time"] for row in rows[entity]]
        np.testing.assert_allclose(times, np.array(robot.seen) - 100.0, atol=TIME_TOLERANCE_S)
    np.testing.assert_allclose(series(rows, "/state/columns")[1][:, 0], robot.seen)


def as_file(kind, shade):
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (shade, shade, shade)).save(file, kind)
    return file.getvalue()


class FileRobot(SeeingRobot):
    """Its cameras give files, videos, and nothing that can be shown."""

    def observe(self, now_s):
        snapshot = super().observe(now_s)
        shade = 10 * len(self.seen)
        images = {
            "jpeg": as_file("JPEG", shade),
            "png": as_file("PNG", shade),
            "files": [as_file("PNG", 0), as_file("JPEG", shade)],
            "video": np.stack([np.zeros((8, 12, 3), np.uint8), np.full((8, 12, 3), shade, np.uint8)]),
            "turned": np.full((3, 8, 12), shade, np.uint8),
            "film": as_file("GIF", shade),
            "float": np.zeros((8, 12, 3)),
            # More than a JPEG can hold.
            "long": np.zeros((70_000, 1, 3), np.uint8),
            "nothing": None,
        }
        return replace(snapshot, observation=replace(snapshot.observation, images=images))


def test_files_are_shown_as_they_are_and_what_cannot_be_shown_is_told_once(tmp_path):
    clock = VirtualClock(100.0)
    robot = FileRobot(clock)
    with RunView(tmp_path / "run.rrd", "a test", patient=True) as view:
        execute(robot=robot, clock=clock, recorder=view)
    rows = read(tmp_path / "run.rrd")
    assert len(series(rows, "/commands/columns")[0]) == len(robot.rows)
    shown = {view: rows.get(f"/camera/{view}", []) for view in robot.observe(clock.now()).observation.images}
    for view, kind in (("jpeg", "JPEG"), ("png", "PNG"), ("files", "JPEG"), ("video", None), ("turned", None)):
        blobs = [bytes(row["blob"][0]) for row in shown.pop(view)]
        assert len(blobs) == len(robot.seen) - 1 > 5
        for number, blob in enumerate(blobs, 1):
            with Image.open(io.BytesIO(blob)) as picture:
                assert picture.size == (12, 8)
                np.testing.assert_allclose(np.asarray(picture), 10.0 * number, atol=SHADE_TOLERANCE)
            assert kind is None or blob == as_file(kind, 10 * number)
    assert {view: len(found) for view, found in shown.items()} == dict.fromkeys(("film", "float", "long", "nothing"), 0)
    told = [text for text in texts(rows) if "is not shown" in text]
    assert sorted(text.split()[1] for text in told) == ["film", "float", "long", "nothing"]
    assert "view float is not shown: image: expected a JPEG or PNG file or a uint8 array (H, W, 3), got dtype" in str(
        told
    )


@pytest.mark.parametrize("delay_steps", [3.0, lambda number: 50 if number == 4 else 3], ids=["steady", "starves"])
def test_jumps_at_seams_are_where_chunks_meet(tmp_path, delay_steps):
    _, _, rows, recording = watched(tmp_path / "run.rrd", mode="naive_async", delay_steps=delay_steps)
    steps = recording.lines["step"]
    meets = [
        (line["time_s"] - 100.0, np.abs(np.array(line["row"]) - before["row"]).max())
        for before, line in pairwise(steps)
        if before["source"] == line["source"] == "chunk" and line["chunk"] != before["chunk"]
    ]
    assert ("hold" in {line["source"] for line in steps}) == (delay_steps != 3.0)
    times, jumps = series(rows, "/seam/robot_units")
    assert len(meets) > 1
    np.testing.assert_allclose(times, [time_s for time_s, _ in meets], atol=TIME_TOLERANCE_S)
    np.testing.assert_allclose(jumps[:, 0], [jump for _, jump in meets])


def test_trouble_is_told(tmp_path):
    policy = MarkedPolicy(faults={2: RuntimeError("the model is tired")})
    clock = VirtualClock(100.0)
    with RunView(tmp_path / "run.rrd", "", patient=True) as view:
        execute(policy=policy, clock=clock, recorder=view, delay_steps=lambda number: 50 if number == 4 else 3)
    told = "\n".join(texts(read(tmp_path / "run.rrd")))
    assert "inference 2 failed: RuntimeError: the model is tired" in told
    assert "holds: no action" in told
    assert "too late" in told


def test_a_recording_is_replayed_as_it_was_seen(tmp_path):
    _, _, rows, recording = watched(
        tmp_path / "run.rrd", {50: 5.5 / RATE_HZ}, delay_steps=lambda number: 40 if number == 3 else 3
    )
    replayed(recording, tmp_path / "again.rrd")
    again = read(tmp_path / "again.rrd")
    unseen = {entity for entity in rows if entity.startswith(("/camera", "/state"))}
    assert unseen
    assert set(rows) - set(again) == unseen
    for entity in set(again) - {"/events", "/__properties"}:
        for now, then in zip(series(again, entity), series(rows, entity), strict=True):
            np.testing.assert_array_equal(now, then)
    events = sorted(event for event in told_at(rows) if not event[1].startswith("instruction"))
    assert sorted(told_at(again)) == events


def test_steps_that_passed_are_told_where_they_passed(tmp_path):
    _, _, rows, recording = watched(tmp_path / "run.rrd", {50: 5.5 / RATE_HZ})
    (line,) = recording.lines["missed"]
    ((time_s, told),) = [event for event in told_at(rows) if "without a command" in event[1]]
    assert told == f"{line['count']} steps from {line['first']} on passed without a command"
    assert time_s == pytest.approx(line["first"] / RATE_HZ - 100.0, abs=TIME_TOLERANCE_S)


def a_line(kind):
    return {"kind": kind, **{name: VALUES[expected.removesuffix(OR_NULL)] for name, expected in FIELDS[kind].items()}}


@pytest.mark.parametrize("kind", FIELDS)
def test_every_kind_of_line_is_drawn(tmp_path, kind):
    """Live, and of a recording."""
    lines = [{**a_line("session"), "layout": "plain"}] + ([] if kind == "session" else [a_line(kind)])
    with RunView(tmp_path / "run.rrd", "", patient=True) as view, Recorder(tmp_path / "run.jsonl", "") as recorder:
        for line in lines:
            Several([view, recorder]).write(**line)
    replayed(read_recording(tmp_path / "run.jsonl"), tmp_path / "again.rrd")
    # A request is drawn with its chunk.
    for path in ("run.rrd", "again.rrd"):
        assert ("/events" in read(tmp_path / path)) == (kind not in ("session", "inference"))


def test_a_warning_of_a_guard_is_told_when_it_came(tmp_path):
    told = {"name": "frozen ego", "value": 2.0, "threshold": 1.5, "detail": "the picture stays the same"}
    with RunView(tmp_path / "run.rrd", "", patient=True) as view:
        view.write("session", settings=VALUES["settings"], layout="plain", width=WIDTH)
        for number in range(3):
            view.write(**{**a_line("step"), "step": number, "time_s": 100.0 + number})
        # Of an observation that is seconds old.
        view.write("warning", time_s=95.0, **told)
        view.write(**{**a_line("step"), "step": 3, "time_s": 103.0})
    rows = read(tmp_path / "run.rrd")
    assert told_at(rows)[-1] == (2.0, "guard, frozen ego: the picture stays the same (2, above 1.5)")
    np.testing.assert_array_equal(series(rows, "/commands/columns")[0], [0, 1, 2, 3])


def test_drive_shows_its_report_where_the_recording_fails(tmp_path, monkeypatch):
    def fails(*given):
        raise OSError("the disk is tired")

    monkeypatch.setattr(run._Page, "draw", fails)
    drive = ["drive", "--env", "null", "--delay-steps", "3", "--seconds", "1", "--rerun", str(tmp_path / "run.rrd")]
    result = CliRunner().invoke(app, drive)
    assert result.stdout.endswith("deadlines missed: 0; ended: time\n")
    assert (result.exit_code, result.stderr) == (2, f"xr0: error: --rerun {drive[-1]}: the disk is tired\n")


def test_drive_and_replay_write_it(tmp_path):
    run, again = tmp_path / "run.rrd", tmp_path / "again.rrd"
    arguments = ("drive", "--env", "null", "--delay-steps", "3", "--seconds", "1", "--rerun", str(run))
    assert CliRunner().invoke(app, [*arguments, "--record", str(tmp_path / "run.jsonl")]).exit_code == 0
    rows = read(run)
    assert len(series(rows, "/commands/left_joints")[0]) == 27
    assert {"/camera/ego", "/state/left_joints", "/plan/0/right_gripper", "/seam/rad"} <= set(rows)
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "run.jsonl"), "--rerun", str(again)])
    assert (result.exit_code, result.stdout) == (0, f"{again}\n")
    assert len(series(read(again), "/commands/left_joints")[0]) == 27
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.rrd", "run.jsonl", "run.rrd"]


def test_nobody_waits_for_it(tmp_path, monkeypatch):
    """A viewer that is stuck costs entries, which are counted, and no time."""
    free = threading.Event()
    monkeypatch.setattr(sink, "MOST_ENTRIES", 20)
    draw = run._Page.draw
    monkeypatch.setattr(run._Page, "draw", lambda *given: (free.wait(), draw(*given)))
    with RunView(tmp_path / "run.rrd", "") as view:
        _, robot, _ = execute(recorder=view)
        assert len(robot.rows) > 100
        free.set()
    # The session, twenty that waited at first, and nothing of the rest.
    assert view.dropped > 100
    assert len(series(read(tmp_path / "run.rrd"), "/commands/columns")[0]) < 25


def test_patience_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "MOST_ENTRIES", 2)
    monkeypatch.setattr(sink, "MOST_PICTURES", 1)
    _, robot, rows, _ = watched(tmp_path / "run.rrd")
    assert len(series(rows, "/commands/columns")[0]) == len(robot.rows)
    assert len(rows["/camera/ego"]) == len(robot.seen)


def test_a_failure_is_told_at_the_end(tmp_path, monkeypatch):
    def fails(*given):
        raise ValueError("nobody expected this")

    monkeypatch.setattr(run._Page, "_draw_saw", fails)
    view = RunView(tmp_path / "run.rrd", "", patient=True)
    view.write("session", settings={"rate_hz": RATE_HZ, "mode": "sync"}, layout="plain", width=WIDTH)
    view.saw(1, Observation({"ego": np.zeros((4, 4, 3))}, "go", np.zeros(3, np.float32), "robot", 0.0))
    for number in range(2 * sink.MOST_ENTRIES):
        view.write("missed", first=number, count=1)
    with pytest.raises(OSError, match=r"--rerun .*run.rrd: nobody expected this"):
        view.close()


def test_a_full_disk_is_told(tmp_path):
    (tmp_path / "full.rrd").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        sink.open_stream(str(tmp_path / "full.rrd"), "xr0 run", "")


def test_a_viewer_that_runs_is_shown_it(tmp_path):
    """The viewer is rerun's own, which saves what it is sent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    saved = tmp_path / "saved.rrd"
    command = [sys.executable, "-m", "rerun", "--bind", "127.0.0.1", f"--port={port}", "--save", saved]
    # Python starts the viewer as a process of its own, which would outlive it.
    viewer = subprocess.Popen(command, start_new_session=True)
    try:
        until(lambda: answers(port))
        with RunView(f"rerun+http://127.0.0.1:{port}/proxy", "a test", patient=True) as view:
            _, robot, _ = execute(recorder=view)
        until(lambda: saved.exists() and "/events" in read(saved) and texts(read(saved))[-1].startswith("ended"))
    finally:
        os.killpg(viewer.pid, signal.SIGKILL)
        viewer.wait()
    np.testing.assert_array_equal(series(read(saved), "/commands/columns")[1], robot.rows)


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
