"""A training run of two processes in a folder, to be killed: what it is doing, and what it has written so far."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.training.support import FORKED
from xr0_engine import cli
from xr0_engine.training.checkpoint import PARTIAL, checkpoints
from xr0_engine.training.run_folder import CHECKPOINTS, EXPORTED

FORKED.set_forkserver_preload(["tests.training.support", "xr0_engine.cli.train", "xr0_engine.training.start"])

RANKS = 2
POLL_S = 0.001
AGENT_S = 0.1
"""How often torchrun looks at its processes."""
GRACE_S = 30.0
"""How long torchrun waits for them after SIGTERM."""
PATIENCE_S = 300.0

STARTING, TRAINING, WRITING, EXPORTING = MOMENTS = ("starting", "training", "writing a checkpoint", "exporting")
VICTIMS = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}
METRICS = "metrics.jsonl"


class Run:
    """A run in a folder of its own, by processes that may be killed. log: what they printed. forced: whether the last
    kill's other process did not end by SIGTERM in time."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log = folder, log
        self.ranks: list[BaseProcess] = []
        self.forced = False
        self._begun_s, self._begun_at = 0.0, 0

    def begin(self, *arguments: str) -> None:
        """`xr0 train ARGUMENTS`, as torchrun starts it."""
        self._begun_s, self._begun_at = time.time(), self.last_checkpoint
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks = [FORKED.Process(target=_rank, args=(rank, port, self.log, arguments)) for rank in range(RANKS)]
        for rank in self.ranks:
            rank.start()

    def kill(self, victims: tuple[int, ...]) -> list[str]:
        """Then as torchrun does: the other one is told to end, and killed after a while. Returns what was wrong."""
        family = [pid for rank in self.ranks for pid in _family(rank.pid or 0)]
        hit = [self.ranks[number] for number in victims]
        for rank in hit:
            rank.kill()
        for rank in hit:
            rank.join()
        codes = [rank.exitcode for rank in hit]
        faults = [] if codes == [-signal.SIGKILL] * len(victims) else [f"it had ended before it was killed: {codes}"]
        time.sleep(AGENT_S)
        for rank in self.ranks:
            rank.terminate()
        deadline = time.monotonic() + GRACE_S
        for rank in self.ranks:
            rank.join(max(deadline - time.monotonic(), 0))
        # One that waits for a batch ends when it has come.
        self.forced = any(rank.is_alive() for rank in self.ranks)
        self.stop()
        # A reader that is starting comes to look for its parent once it has started.
        deadline += PATIENCE_S
        while left := [pid for pid in family if _is_alive(pid)]:
            if time.monotonic() > deadline:
                faults.append(f"{len(left)} readers were still there after {PATIENCE_S:g} s")
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(POLL_S)
        return faults

    def wait(self) -> list[str]:
        """To its end. Returns what was wrong about it."""
        for rank in self.ranks:
            rank.join(PATIENCE_S)
        codes = [rank.exitcode for rank in self.ranks]
        return [] if codes == [0] * RANKS else [f"it ended with {codes}: {self.log.read_text()[-600:]}"]

    def stop(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    @property
    def is_alive(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in told(self.folder)), default=0)

    @property
    def last_checkpoint(self) -> int:
        return max((step_of(path) for path in self.checkpoints), default=0)

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoints(self.folder / CHECKPOINTS)

    @property
    def steps_done(self) -> int:
        """By this life; what the one before has told is in the file until this one has its own to tell."""
        path = self.folder / METRICS
        is_ours = path.exists() and path.stat().st_mtime > self._begun_s
        return max(self.last_step - self._begun_at, 0) if is_ours else 0

    def has_half(self, moment: str) -> bool:
        """Whether there is half of a checkpoint, or of the export, by this life."""
        pattern = f"{CHECKPOINTS}/*{PARTIAL}" if moment == WRITING else f".{EXPORTED}-*{PARTIAL}"
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > self._begun_s:
                    return True
        return False

    @property
    def moment(self) -> str:
        """What it is doing."""
        halves = [moment for moment in (EXPORTING, WRITING) if self.has_half(moment)]
        return halves[0] if halves else TRAINING if self.steps_done else STARTING


def _rank(rank: int, port: int, log: Path, arguments: tuple[str, ...]) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["xr0", "train", *arguments]
    cli.main()


def _family(pid: int) -> Iterator[int]:
    """A process and all that it has started: readers of data."""
    yield pid
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            yield from _family(int(child))


def _is_alive(pid: int) -> bool:
    """Zombies, which nobody has asked after yet, are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def told(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a kill may have cut the last one off."""
    path = folder / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
