"""Folders of results: written, cut off, continued, refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest

from tests.evaluation.fake import a_run, an_episode
from xr0_engine.evaluation import results
from xr0_engine.evaluation.results import EPISODES_FILE, RUN_FILE, Writer, differences, read_results

EPISODES = (
    an_episode(),
    an_episode(trial=1, success=False, solved=0, error="world: it fell", video="videos/near-0-1-sync-0.mp4"),
    an_episode(trial=1, mode="async", delay_steps=2.5, latency_ms={}, reaction_ms={}, facts={"pieces": [1, 2]}),
)


@pytest.fixture
def folder(tmp_path):
    with Writer(tmp_path / "run", a_run()) as writer:
        for episode in EPISODES:
            writer.add(episode)
    return tmp_path / "run"


def change(folder, line, **fields):
    lines = (folder / EPISODES_FILE).read_text().splitlines()
    content = json.loads(lines[line])
    for name, value in fields.items():
        if value is ...:
            del content[name]
        else:
            content[name] = value
    lines[line] = json.dumps(content)
    (folder / EPISODES_FILE).write_text("\n".join(lines) + "\n")


def test_what_is_written_is_read(folder):
    found = read_results(folder)
    assert (found.run, found.episodes, found.planned) == (a_run(), EPISODES, 3)


def test_each_line_stands_by_itself(folder):
    line = json.loads((folder / EPISODES_FILE).read_text().splitlines()[1])
    assert line["run"] == {"versions": {"point": "1.0"}, "checkpoint": None, "code": {"version": "0", "commit": None}}
    assert (line["suite"], line["task"], line["trial"], line["seed"], line["success"]) == ("near", 0, 1, 0, False)


def test_a_run_without_episodes_can_be_read(tmp_path):
    Writer(tmp_path, a_run(), [episode.key for episode in EPISODES]).close()
    assert (read_results(tmp_path).episodes, read_results(tmp_path).planned) == ((), 3)
    (tmp_path / EPISODES_FILE).unlink()
    assert read_results(tmp_path).episodes == ()


def test_a_run_is_continued(folder):
    with Writer(folder, a_run(created="2027-01-01T00:00:00+00:00"), [an_episode(trial=7).key]) as writer:
        assert set(writer.done) == {episode.key for episode in EPISODES}
        assert read_results(folder).planned == 4
        writer.add(an_episode(trial=7))
        with pytest.raises(ValueError, match=r"suite near, task 0, trial 7, mode sync, delay 0 is in .* already"):
            writer.add(an_episode(trial=7))
    assert read_results(folder).run.created == a_run().created
    assert read_results(folder).episodes == (*EPISODES, an_episode(trial=7))


@pytest.mark.parametrize("kept", range(0, 700, 23))
def test_a_line_that_was_cut_off_is_run_again(folder, kept):
    path = folder / EPISODES_FILE
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - kept])
    whole = data[: len(data) - kept].count(b"\n")
    assert read_results(folder).episodes == EPISODES[:whole]
    with Writer(folder, a_run()) as writer:
        for episode in EPISODES[whole:]:
            writer.add(episode)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        pytest.param({"benchmark": "line"}, "benchmark: 'point' before, 'line' now", id="benchmark"),
        pytest.param({"protocol": {"horizon": 41}}, "protocol.horizon: 40 before, 41 now", id="protocol"),
        pytest.param({"protocol": {"horizon": 40, "new": 1}}, "protocol.new: nothing before, 1 now", id="new field"),
        pytest.param({"versions": {"point": "1.1"}}, "versions.point: '1.0' before, '1.1' now", id="versions"),
        pytest.param({"policy": {"kind": "engine"}}, "policy.kind: 'expert' before, 'engine' now", id="policy"),
        pytest.param(
            {"code": {"version": "1", "commit": "a"}}, "code.version: '0' before, '1' now; code.commit", id="code"
        ),
        pytest.param({"machine": {"processor": "slide rule", "gpu": None}}, "machine.processor", id="machine"),
    ],
)
def test_another_run_is_refused(folder, changed, complaint):
    before = (folder / EPISODES_FILE).read_bytes()
    with pytest.raises(ValueError, match=complaint):
        Writer(folder, a_run(**changed))
    assert (folder / EPISODES_FILE).read_bytes() == before
    assert read_results(folder).run == a_run()


def test_titles_and_times_are_free():
    assert differences(a_run(), a_run(created="2027-01-01", policy={**a_run().policy, "title": "another"})) == []


def test_one_writes_at_a_time(folder):
    with Writer(folder, a_run()), pytest.raises(ValueError, match="is being written by process"):
        Writer(folder, a_run())
    Writer(folder, a_run()).close()


class FullDisk:
    """A file that takes so many more bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        if not self._room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._file.write(data[: self._room])
        self._room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_leaves_what_is_written(folder, room):
    writer = Writer(folder, a_run())
    file = writer._file
    writer._file = FullDisk(file, room)
    with pytest.raises(OSError, match=r"No space left on device. What is written so far is valid"):
        writer.add(an_episode(trial=9))
    assert read_results(folder).episodes == EPISODES
    assert (folder / EPISODES_FILE).read_bytes().endswith(b"}\n")
    writer._file = file
    writer.add(an_episode(trial=9))
    writer.close()
    assert read_results(folder).episodes == (*EPISODES, an_episode(trial=9))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param({"suite": 3}, "suite: expected text, got 3", id="text"),
        pytest.param({"task": -1}, "task: expected a whole number of at least 0, got -1", id="negative"),
        pytest.param({"trial": True}, "trial: expected a whole number", id="truth"),
        pytest.param({"steps": 1.5}, "steps: expected a whole number", id="fraction"),
        pytest.param({"mode": "fast"}, "mode: expected one of sync, naive, async, guided, got 'fast'", id="mode"),
        pytest.param({"mode": ["sync"]}, "mode: expected one of", id="list"),
        pytest.param({"delay_steps": "2"}, "delay_steps: expected a number", id="number as text"),
        pytest.param({"success": 1}, "success: expected true or false", id="success"),
        pytest.param({"latency_ms": {"p50": 1}}, "latency_ms: expected an object of p50 and p99", id="half of them"),
        pytest.param({"reaction_ms": {"p50": 1, "p99": None}}, "reaction_ms: expected", id="no time"),
        pytest.param({"error": 3}, "error: expected text or null", id="error"),
        pytest.param({"video": "../../home/me.mp4"}, "video: expected a file within the folder", id="outside"),
        pytest.param({"video": "/etc/passwd"}, "video: expected a file within the folder", id="absolute"),
        pytest.param({"facts": []}, "facts: expected an object", id="facts"),
        pytest.param({"solved": 2}, "solved: expected at most 1 rollouts, got 2", id="more than there were"),
        pytest.param({"solved": 0}, "success: expected true exactly if all rollouts are solved", id="success unsolved"),
        pytest.param({"error": "it fell"}, "success: expected true exactly if", id="success with an error"),
        pytest.param({"colour": "red"}, "colour: unknown; expected suite, task", id="unknown"),
        pytest.param({"calls": ...}, "calls: missing", id="missing"),
        pytest.param({"run": ...}, "run: expected .*, as in run.json, got None", id="whose"),
        pytest.param({"run": {"checkpoint": "0"}}, "run: expected", id="another run's"),
        pytest.param(
            {"trial": 1, "mode": "async", "delay_steps": 2.5}, "line 3: .* delay 2.5 is there twice", id="twice"
        ),
    ],
)
def test_a_wrong_line_is_named(folder, fields, complaint):
    change(folder, 0, **fields)
    line = 3 if "is there twice" in complaint else 1
    with pytest.raises(ValueError, match=complaint) as told:
        read_results(folder)
    assert f"{folder / EPISODES_FILE}, line {line}: " in str(told.value)
    with pytest.raises(ValueError, match=complaint):
        Writer(folder, a_run())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("{", "not valid JSON", id="no JSON"),
        pytest.param("[1]", "expected an object", id="list"),
        pytest.param('{"suite": NaN}', "NaN", id="NaN"),
        pytest.param('{"suite": "a", "suite": "b"}', "suite", id="a key twice"),
        pytest.param("[" * 100_000, "not valid JSON", id="deep"),
    ],
)
def test_what_is_no_line_is_named(folder, text, complaint):
    with (folder / EPISODES_FILE).open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ValueError, match=complaint) as told:
        read_results(folder)
    assert "line 4" in str(told.value)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param({"schema": 2}, "schema: expected 1, got 2", id="schema"),
        pytest.param({"planned": -1}, "planned: expected", id="planned"),
        pytest.param({"versions": {"point": 1}}, "versions: expected an object of texts", id="versions"),
        pytest.param({"more": 1}, "more: unknown", id="unknown"),
    ],
)
def test_a_wrong_run_is_named(folder, fields, complaint):
    path = folder / RUN_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=complaint) as told:
        read_results(folder)
    assert str(path) in str(told.value)


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="holds no results of `xr0 eval`"):
        read_results(tmp_path)
    (tmp_path / EPISODES_FILE).write_text("{}\n")
    with pytest.raises(ValueError, match=r"episodes.jsonl without run.json"):
        Writer(tmp_path, a_run())


def test_what_would_be_refused_is_not_written(tmp_path):
    with Writer(tmp_path, a_run()) as writer:
        with pytest.raises(ValueError, match="Out of range float"):
            writer.add(an_episode(facts={"distance": float("nan")}))
        with pytest.raises(ValueError, match="solved"):
            writer.add(an_episode(solved=3))
    assert read_results(tmp_path).episodes == ()
    with pytest.raises(ValueError, match="versions"):
        Writer(tmp_path / "other", replace(a_run(), versions={"point": None}))
    assert not (tmp_path / "other" / results.RUN_FILE).exists()
