"""Files and folders that appear whole or not at all, and the lock of a folder that one process writes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xr0_engine import whole
from xr0_engine.whole import LOCK_FILE, is_fresh, only_writer, publish, whole_file, whole_folder, write_whole

PATIENCE_S = 60.0


@contextmanager
def process(code: str, *arguments: Path) -> Iterator[subprocess.Popen[str]]:
    """Another Python that runs code, and has printed its first line."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline()
        try:
            yield running
        finally:
            running.kill()


MAKING = """
    import sys
    from pathlib import Path
    from xr0_engine.whole import whole_folder
    with whole_folder(Path(sys.argv[1])) as partial:
        (partial / "half").write_text("half")
        print("making", flush=True)
        sys.stdin.readline()
"""
WRITING = """
    import sys
    from pathlib import Path
    from xr0_engine.whole import only_writer
    with only_writer(Path(sys.argv[1])):
        print("writing", flush=True)
        sys.stdin.readline()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("text")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "text"
    assert names(tmp_path / "deep") == ["out"]


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
    def fail() -> None:
        with whole_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("text")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_attempt(tmp_path):
    with process(MAKING, tmp_path / "out") as maker:
        maker.kill()
        maker.wait()
    (tmp_path / ".out-notours").mkdir()
    (tmp_path / ".other-00000000.partial").mkdir()
    assert len(names(tmp_path)) == 3
    with whole_folder(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert names(tmp_path) == [".other-00000000.partial", ".out-notours", "out"]


def test_two_processes_do_not_make_the_same_folder(tmp_path):
    with process(MAKING, tmp_path / "out") as maker:
        with pytest.raises(ValueError, match="out is being written by another process"), whole_folder(tmp_path / "out"):
            raise AssertionError
        with whole_folder(tmp_path / "out2") as partial:
            (partial / "file").touch()
        maker.communicate("go on\n", PATIENCE_S)
    assert names(tmp_path) == ["out", "out2"]


def test_a_disk_without_room_is_told_before_the_work(tmp_path):
    with pytest.raises(OSError, match="GiB free; out takes") as told, whole_folder(tmp_path / "out", 1 << 60):
        raise AssertionError
    assert told.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_a_disk_that_becomes_full_names_the_folder(tmp_path):
    with (
        pytest.raises(OSError, match="out could not be written, nothing of it is left"),
        whole_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_file_stays_until_its_successor_is_whole(tmp_path):
    path = tmp_path / "file.json"
    write_whole(path, "before")

    def fail() -> None:
        with whole_file(path) as partial:
            assert partial.suffix == ".json"
            partial.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "before"
    write_whole(path, "after")
    assert (path.read_text(), names(tmp_path)) == ("after", ["file.json"])


def test_contents_and_names_are_on_the_disk_before_it_returns(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    replace = os.replace
    monkeypatch.setattr(whole, "_sync", lambda path: events.append(("sync", path.name)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", Path(b).name)), replace(a, b)))
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "inner" / "file").touch()
    publish(tmp_path / "a", tmp_path / "b")
    assert events == [
        ("sync", "file"),
        ("sync", "inner"),
        ("sync", "a"),
        ("rename", "b"),
        ("sync", tmp_path.name),
    ]


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_are_the_umasks(tmp_path, mask, file_mode, folder_mode):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", "text")
        with whole_folder(tmp_path / "out"):
            pass
        with only_writer(tmp_path / "run"):
            lock_mode = (tmp_path / "run" / LOCK_FILE).stat().st_mode & 0o777
            run_mode = (tmp_path / "run").stat().st_mode & 0o777
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == lock_mode == file_mode
    assert (tmp_path / "out").stat().st_mode & 0o777 == run_mode == folder_mode


def test_one_process_writes_a_folder_and_the_other_is_told_which(tmp_path):
    with process(WRITING, tmp_path / "run") as writer:
        told = f"run is being written by process {writer.pid} on .*stop it"
        with pytest.raises(ValueError, match=told), only_writer(tmp_path / "run"):
            raise AssertionError
        # A holder that is killed holds nothing.
        writer.kill()
        writer.wait()
        with only_writer(tmp_path / "run"):
            assert is_fresh(tmp_path / "run")
    assert names(tmp_path / "run") == []


def test_a_lock_whose_file_its_last_holder_removed_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking; a third process would make a file of its own, and hold that."""
    hold, path = whole._hold, tmp_path / LOCK_FILE

    def hold_late(handle: int) -> bool:
        monkeypatch.setattr(whole, "_hold", hold)
        path.unlink()
        return hold(handle)

    monkeypatch.setattr(whole, "_hold", hold_late)
    with only_writer(tmp_path), pytest.raises(ValueError, match="is being written by"), only_writer(tmp_path):
        raise AssertionError
    assert names(tmp_path) == []


def test_a_lock_leaves_nothing_behind(tmp_path):
    with only_writer(tmp_path / "new"):
        assert names(tmp_path / "new") == [LOCK_FILE]
    assert not (tmp_path / "new").exists()

    def fail() -> None:
        with only_writer(tmp_path / "new"):
            (tmp_path / "new" / "work").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path / "new") == ["work"]
    assert not is_fresh(tmp_path / "new")
    assert is_fresh(tmp_path / "absent")
    assert not is_fresh(tmp_path / "new" / "work")


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(whole.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no locks here"), only_writer(tmp_path / "run"):
        pass
    (tmp_path / ".out-00000000.partial").mkdir()
    with whole_folder(tmp_path / "out"):
        pass
    # Nobody can tell whether somebody is at it.
    assert names(tmp_path) == [".out-00000000.partial", "out"]


def test_sigterm_leaves_nothing_of_a_command(tmp_path):
    command = """
        import sys, time
        from pathlib import Path
        from xr0_engine import cli
        from xr0_engine.whole import whole_folder
        def app(prog_name):
            with whole_folder(Path(sys.argv[1])) as partial:
                (partial / "half").write_text("half")
                print("making", flush=True)
                time.sleep(600)
        cli.app = app
        cli.main()
    """
    with process(command, tmp_path / "out") as running:
        assert len(names(tmp_path)) == 1
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert names(tmp_path) == []


def test_sigterm_of_a_fork_does_not_remove_what_its_parent_makes(tmp_path):
    command = """
        import os, sys, time
        from pathlib import Path
        from xr0_engine import cli
        from xr0_engine.whole import whole_folder
        def app(prog_name):
            with whole_folder(Path(sys.argv[1])) as partial:
                (partial / "half").write_text("half")
                ready, begun = os.pipe()
                if not (child := os.fork()):
                    # A signal that comes before Python is there after a fork is lost.
                    os.write(begun, b"1")
                    time.sleep(600)
                os.read(ready, 1)
                os.kill(child, 15)
                status = os.waitpid(child, 0)[1]
                print(os.WTERMSIG(status), len(list(partial.iterdir())), flush=True)
        cli.app = app
        cli.main()
    """
    arguments = [sys.executable, "-c", textwrap.dedent(command), str(tmp_path / "out")]
    told = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE_S)
    assert told.stdout.split() == [str(int(signal.SIGTERM)), "1"], told.stderr
    assert names(tmp_path) == ["out"]
