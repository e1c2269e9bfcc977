"""The runner on quick stand-ins: what hangs, crashes, refuses to die, is killed or has no room costs only itself."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench.machine import standins
from tests.support import ROOT
from xr0_engine.bench.machine import processes, state

WAIT_S = 60.0
"""For what takes a fraction of a second on a machine that is not busy."""


class Run:
    """A run of stand-ins in a process of its own."""

    def __init__(self, folder: Path, *steps: str, minutes: float = 1.0, limit=None) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.bench.machine.standins", str(folder), str(minutes), *steps]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, preexec_fn=limit, **pipes)

    def end(self) -> str:
        output, _ = self.process.communicate(timeout=WAIT_S)
        return output

    @property
    def verdicts(self) -> dict[str, str]:
        return {name: each.verdict for name, each in state.read(self.folder).ended.items()}


def finished(folder: Path, *steps: str, **options) -> Run:
    run = Run(folder, *steps, **options)
    output = run.end()
    assert run.process.returncode == 0, output
    return run


def begun(folder: Path) -> list[str]:
    """Steps in the order in which they began, again those that began again."""
    path = folder / "begun"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def until(happened) -> None:
    end = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


BEHAVIOURS = {
    "quick": ("passed", ""),
    "file": ("passed", ""),
    "prints": ("passed", ""),
    "says no": ("failed", "the answer is no"),
    "prints nonsense": ("failed", r".*\.json is not valid JSON: Expecting value.*"),
    "leaves nothing": ("failed", "it left no result"),
    "breaks off": ("failed", r".*\.json is not valid JSON: Expecting.*"),
    "fails": ("failed", r"the driver is too old \(exit code 2\)"),
    "raises": ("failed", r"KeyError: 'lost' \(exit code 1\)"),
    "crashes": ("crashed", "ended by signal 11"),
    "hangs": ("timed out", "its time was up"),
    "hangs for good": ("timed out", "its time was up"),
    "keeps what it has": ("cut short", "its time was up"),
    "leaves a child": ("passed", ""),
    "needs a GPU": ("left out", "needs a GPU"),
    "writes much": ("passed", ""),
}
LEFT = {"file": [1], "prints": [2], "says no": [3], "keeps what it has": [4]}


def test_a_step_costs_only_itself(tmp_path):
    names = {f"step{number}": behaviour for number, behaviour in enumerate(BEHAVIOURS)}
    finished(tmp_path, *(f"{name}={behaviour}" for name, behaviour in names.items()), "last=quick")
    ended = state.read(tmp_path).ended
    assert ended.keys() == {*names, "last"}
    for name, each in ended.items():
        verdict, reason = BEHAVIOURS[names.get(name, "quick")]
        assert each.verdict == verdict, names[name]
        assert re.fullmatch(reason, each.reason), names[name]
    for name, behaviour in names.items():
        if behaviour != "writes much":
            assert state.printed(tmp_path / "results" / f"{name}.json") == LEFT.get(behaviour)
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]
    # What ignored the signals, and the child that was left behind, have ended too.
    assert is_gone(int((tmp_path / "left").read_text()))
    assert [line for line in (tmp_path / "begun").read_text().splitlines() if not is_gone(int(line.split()[1]))] == []
    refused = next(name for name, behaviour in names.items() if behaviour == "hangs for good")
    assert ended[refused].seconds > sum(standins.GRACE_S.values())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_run_that_is_killed_in_any_step_is_gone_on_with(tmp_path, place):
    """SIGKILL: nobody gets to tidy up. The step ends all the same, its child when the next run comes."""
    names = ["a", "b", "c"]
    steps = [f"{name}={'hangs with a child' if here == place else 'file'}" for here, name in enumerate(names)]
    run = Run(tmp_path, *steps)
    until((tmp_path / "child").exists)
    until(lambda: (tmp_path / "child").read_text().isdigit())
    child, leader = int((tmp_path / "child").read_text()), int((tmp_path / "begun").read_text().split()[-1])
    run.process.kill()
    run.end()
    until(lambda: is_gone(leader))
    left = state.read(tmp_path)
    assert left.running == names[place]
    assert {name: each.verdict for name, each in left.ended.items()} == dict.fromkeys(names[:place], "passed")

    (tmp_path / "go").touch()
    again = finished(tmp_path, *steps)
    assert is_gone(child)
    assert again.verdicts == dict.fromkeys(names, "passed")
    assert begun(tmp_path) == [*names[: place + 1], *names[place + 1 :], names[place]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_the_step_and_the_run_and_leaves_a_valid_state(tmp_path, number, code):
    # So long that only the signal can have ended it.
    run = Run(tmp_path, "a=quick", "b=hangs with a child", "c=quick", minutes=100)
    until((tmp_path / "child").exists)
    until(lambda: (tmp_path / "child").read_text().isdigit())
    run.process.send_signal(number)
    run.end()
    assert run.process.returncode == code
    assert run.verdicts == {"a": "passed", "b": "interrupted"}
    assert is_gone(int((tmp_path / "child").read_text()))
    (tmp_path / "go").touch()
    again = finished(tmp_path, "a=quick", "b=hangs with a child", "c=quick")
    assert set(again.verdicts.values()) == {"passed"}
    assert begun(tmp_path) == ["a", "b", "b", "c"]


def test_a_second_ctrl_c_is_in_a_hurry(tmp_path):
    run = Run(tmp_path, "a=hangs for good")
    until((tmp_path / "begun").exists)
    run.process.send_signal(signal.SIGINT)
    time.sleep(3 * processes.POLL_S)
    run.process.send_signal(signal.SIGINT)
    run.end()
    assert state.read(tmp_path).ended["a"].seconds < sum(standins.GRACE_S.values())
    assert run.verdicts == {"a": "interrupted"}


def test_what_does_not_fit_is_left_out_by_name_and_done_by_the_next_run(tmp_path):
    run = finished(tmp_path, "a=hangs", "b=quick", minutes=1.6 / 60)
    assert run.verdicts == {"a": "timed out", "b": "left out"}
    assert re.match(r"the time was up: it needs 1 s, \d were left", state.read(tmp_path).ended["b"].reason)
    again = finished(tmp_path, "a=hangs", "b=quick")
    assert again.verdicts == {"a": "timed out", "b": "passed"}
    # What was tried in vain comes last.
    assert begun(tmp_path) == ["a", "b", "a"]


def test_a_step_that_is_run_again_leaves_nothing_of_before(tmp_path):
    finished(tmp_path, "a=keeps what it has")
    assert state.printed(tmp_path / "results" / "a.json") == [4]
    finished(tmp_path, "a=starts over")
    assert state.printed(tmp_path / "results" / "a.json") is None


def test_what_needs_a_step_that_failed_is_left_out(tmp_path):
    run = finished(tmp_path, "a=fails", "b=quick=a", "c=quick", "d=quick=c")
    assert run.verdicts == {"a": "failed", "b": "left out", "c": "passed", "d": "passed"}
    assert state.read(tmp_path).ended["b"].reason == "it needs a, which has not passed"
    again = finished(tmp_path, "a=quick", "b=quick=a", "c=quick", "d=quick=c")
    assert set(again.verdicts.values()) == {"passed"}


def test_another_commit_needs_another_folder(tmp_path):
    finished(tmp_path, "a=quick")
    with pytest.raises(ValueError, match=r"holds a run with commit 'c' \(now 'd'\); take another folder"):
        state.go_on(tmp_path, {"commit": "d"})


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with (
        state.locked(tmp_path),
        pytest.raises(ValueError, match="another run is at work"),
        state.locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', '{"schema": 1, "ended": 3}'])
def test_a_broken_state_is_named(tmp_path, text):
    (tmp_path / state.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"state\.json is corrupt: .*; remove it to begin anew"):
        state.go_on(tmp_path, {})


def test_a_disk_that_is_full_fails_the_step_that_needs_the_room(tmp_path):
    """A limit on the size of files is what a process without rights can have of a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))

    run = finished(tmp_path, "a=writes much", "b=quick", limit=limit)
    assert run.verdicts == {"a": "failed", "b": "passed"}
    assert "File too large" in state.read(tmp_path).ended["a"].reason


def test_a_state_that_cannot_be_written_ends_the_run_and_stays_as_it_was(tmp_path):
    finished(tmp_path, "a=quick")
    before = (tmp_path / state.FILE).read_text()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    run = Run(tmp_path, "a=quick", "b=quick", limit=limit)
    assert "File too large" in run.end()
    assert run.process.returncode == 1
    assert (tmp_path / state.FILE).read_text() == before
    assert json.loads(before)["ended"].keys() == {"a"}
    assert begun(tmp_path) == ["a"]


def test_steps_get_the_environment_and_no_terminal(tmp_path):
    finished(tmp_path, "a=quick")
    log = tmp_path / "logs" / "a.log"
    assert log.read_text() == "did it\n"
    assert os.stat(log).st_mode & 0o777 == 0o644
