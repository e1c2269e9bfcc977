"""Recordings: what the executor writes is read back, and nothing else is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.executor.support import execute
from xr0_engine.executor import Recorder, read_recording
from xr0_engine.executor.report import COUNTS

HEADER = (
    '{"kind": "session", "version": 1, "title": "", "settings": {"rate_hz": 30, "mode": "sync"}, '
    '"layout": "plain", "width": 3}\n'
)


class TestRecording:
    def test_a_recording_is_read_back(self, tmp_path):
        path = tmp_path / "run.jsonl"
        with Recorder(path, "a test") as recorder:
            report, robot, policy = execute(recorder=recorder)
        recording = read_recording(path)
        lines = recording.lines
        assert recording.header["title"] == "a test"
        assert len(lines["chunk"]) == report.counts["chunks"]
        assert len(lines["inference"]) == report.counts["inferences"] == len(policy.calls)
        ended = [line["number"] for kind in ("chunk", "lost") for line in lines[kind]]
        assert sorted(ended) == [line["number"] for line in lines["inference"]]
        np.testing.assert_array_equal([line["row"] for line in lines["step"]], robot.rows)
        assert [line["step"] for line in lines["step"]] == robot.steps.tolist()
        assert lines["report"][0]["counts"] == dict(report.counts)
        assert set(COUNTS) <= set(report.counts)

    def test_a_crash_leaves_all_but_the_end(self, tmp_path):
        path = tmp_path / "run.jsonl"
        with Recorder(path, "") as recorder:
            execute(recorder=recorder)
        whole = read_recording(path)
        path.write_text(path.read_text() + '{"kind": "step", "st')
        assert read_recording(path) == whole

    def test_nothing_is_overwritten(self, tmp_path):
        path = tmp_path / "run.jsonl"
        path.write_text("precious")
        with pytest.raises(FileExistsError):
            Recorder(path, "")
        assert path.read_text() == "precious"

    @pytest.mark.parametrize(
        ("kind", "change", "complaint"),
        [
            ("session", {"settings": None}, "session: settings: expected settings, got None"),
            ("session", {"settings": {"rate_hz": 0, "mode": "sync"}}, "settings: expected settings"),
            ("session", {"settings": {"mode": "sync"}}, "settings: expected settings"),
            ("session", {"settings": {"rate_hz": 30, "mode": ["sync"]}}, "settings: expected settings"),
            ("session", {"title": 1.5}, "title: expected text, got 1.5"),
            ("session", {"width": 10**9}, "width: expected width"),
            ("chunk", {"rows": None}, "rows: expected rows, got None"),
            ("chunk", {"rows": [[1.0]]}, "rows: expected rows"),
            ("chunk", {"rows": [[1.0, 2.0, "3"]]}, "rows: expected rows"),
            ("chunk", {"first_step": "x"}, "first_step: expected whole, got 'x'"),
            ("chunk", {"first_step": 1e30}, "first_step: expected whole"),
            ("chunk", {"number": True}, "number: expected whole"),
            ("step", {"time_s": "now"}, "time_s: expected number, got 'now'"),
            ("step", {"row": {}}, "row: expected row"),
            ("report", {"counts": {"held": []}}, "counts: expected counts"),
        ],
    )
    def test_wrong_values_are_named(self, tmp_path, kind, change, complaint):
        path = tmp_path / "run.jsonl"
        with Recorder(path, "a test") as recorder:
            execute(recorder=recorder)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        number = next(number for number, line in enumerate(lines, start=1) if line["kind"] == kind)
        lines[number - 1] |= change
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError, match=rf"run\.jsonl, line {number}: {kind}: .*{complaint.split(': ', 1)[-1]}"):
            read_recording(path)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "empty"),
            ('{"kind": "session", "version": 99}\n', "version 1"),
            ('{"a": 1}\n', "version 1"),
            ("[1]\n", "object"),
            ('{"kind": "session", "version": 1}\n', "line 1: session lacks layout, settings, title, width"),
            (HEADER + '{"kind": "dance"}\n', "line 2: expected one of"),
            (HEADER + '{"kind": "clock"}\n', "line 2: clock lacks time_s"),
            (HEADER + "nonsense\n", "line 2: not valid JSON"),
        ],
        ids=["empty", "version", "no recording", "list", "header", "kind", "field", "json"],
    )
    def test_other_files_are_refused(self, tmp_path, text, complaint):
        path = tmp_path / "run.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            read_recording(path)
