"""Damaged files of every format, for as long as asked: python -m tests.fuzz_files SECONDS [SEED [FORMAT [JOBS]]].

Each case is a valid file with something wrong about it, which its reader takes or refuses, in a process of its own, of
which there are JOBS (1) at a time. FORMAT: one of them, or `all`.
What the readers do is counted; the last four are mistakes, each shown with how to repeat it:

refused      an error that `xr0` tells in one line, with exit code 2
accepted     a value; a checkpoint is loaded, and gives finite actions
traceback    any other exception, or an end of the process
hang         more than 10 s of a processor
memory       more than 1 GiB beside what the process had before
not finite   actions with NaN or infinity

Exit code 1: there was a mistake. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

OUTCOMES = ("refused", "accepted", "traceback", "hang", "memory", "not finite")
MISTAKES = OUTCOMES[2:]

HANG_S = 10.0
"""Of processor time, children's included: other work on this machine does not count."""
DEAD_S = 120.0
"""Of a clock on the wall."""
MEMORY_BYTES = 1 << 30
ROOM_BYTES = 6 << 30
"""Address space beside what the process has: so that a mistake here does not take the machine's memory."""
SHOWN = 40


class Case(NamedTuple):
    """A damaged file: of which format, which file, and the number that its damage follows from."""

    format: str
    file: str
    number: int


def cases(seed: int, weights: dict[str, int], files: dict[str, tuple[str, ...]]) -> Iterator[Case]:
    """Endlessly, each format as often as its weight says, all of them from the beginning."""
    order = [name for turn in range(max(weights.values())) for name, weight in weights.items() if turn < weight]
    # Spread, so that a short run has some of each.
    random.Random(0).shuffle(order)
    number = 0
    while True:
        for name in order:
            number += 1
            yield Case(name, random.Random(f"{seed} {number}").choice(files[name]), number)


def fuzz(
    seconds: float, seed: int = 0, only: str | None = None, jobs: int = 1
) -> tuple[dict[str, Counter[str]], list[dict[str, Any]]]:
    """Counts by format and outcome, and the mistakes. jobs: processes at a time."""
    from tests.file_formats import formats

    known = {name: each for name, each in formats().items() if only in (None, name)}
    if not known:
        raise ValueError(f"format: expected one of {', '.join(formats())}, got {only!r}")
    counts: dict[str, Counter[str]] = {name: Counter() for name in known}
    mistakes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="xr0-fuzz-") as kept:
        folder = Path(kept)
        os.environ["XR0_CACHE"] = str(folder / "cache")
        _make(folder / "valid", known)
        queue = cases(seed, {name: each.weight for name, each in known.items()}, {n: e.files for n, e in known.items()})
        end = time.monotonic() + seconds
        workers = [_Worker(folder, f"now-{number}", known, seed) for number in range(jobs)]
        while True:
            for worker in workers:
                if worker.case is None and time.monotonic() < end:
                    worker.begin(next(queue))
            working = [worker for worker in workers if worker.case is not None]
            if not working:
                break
            for case, outcome, detail in _ended(working):
                counts[case.format][outcome] += 1
                if outcome in MISTAKES:
                    mistakes.append({**case._asdict(), "outcome": outcome, "detail": detail[-600:]})
                    print(f"{outcome}: {case}: {detail[-300:]}", file=sys.stderr, flush=True)
        for worker in workers:
            worker.stop()
    return counts, mistakes


def _make(folder: Path, known: dict[str, Any]) -> None:
    """Valid files, which are read once. In a process of its own: libraries' threads do not outlive a fork."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            for name, each in known.items():
                (folder / name).mkdir(parents=True)
                each.make(folder / name)
                each.read(folder / name)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the valid files cannot be made or read")


def _ended(workers: list[_Worker]) -> Iterator[tuple[Case, str, str]]:
    """What workers at work have ended with by now, within a moment."""
    ready, _, _ = select.select([worker.answers for worker in workers], [], [], 1.0)
    for worker in workers:
        case, told = worker.case, worker.end(worker.answers in ready)
        if case is not None and told is not None:
            yield case, *told


class _Worker:
    """A forked process that runs cases one after the other; a new one after each mistake that it may not outlive."""

    def __init__(self, folder: Path, place: str, known: dict[str, Any], seed: int) -> None:
        self._folder, self._place, self._known, self._seed = folder, place, known, seed
        self._pid = 0
        self.case: Case | None = None

    def begin(self, case: Case) -> None:
        if not self._pid:
            self._start()
        self.case, self._told, self._due = case, b"", time.monotonic() + DEAD_S
        os.write(self._to, (json.dumps(case) + "\n").encode())

    @property
    def answers(self) -> int:
        """A descriptor that can be read when the case has ended."""
        return self._from

    def end(self, is_ready: bool) -> tuple[str, str] | None:
        """What the case ended with; None while it is at work."""
        piece = os.read(self._from, 1 << 16) if is_ready else b""
        self._told += piece
        if self._told.endswith(b"\n"):
            outcome, detail = json.loads(self._told)
            if outcome in ("hang", "memory"):
                self.stop()
        elif is_ready and not piece:
            # A moment for its end to be seen.
            time.sleep(0.2)
            outcome, detail = "traceback", f"the process ended: {self.stop()}"
        elif time.monotonic() > self._due:
            self.stop()
            outcome, detail = "hang", f"no answer in {DEAD_S:g} s"
        else:
            return None
        self.case = None
        return outcome, detail

    def stop(self) -> int | None:
        """The status with which the process ended by itself, if it did."""
        if not self._pid:
            return None
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if not done:
            os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
        os.close(self._to)
        os.close(self._from)
        self._pid = 0
        return status if done else None

    def _start(self) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._to)
            os.close(self._from)
            try:
                _work(self._folder, self._place, self._known, self._seed, to_read, to_write)
            finally:
                os._exit(1)
        os.close(to_read)
        os.close(to_write)


def _work(folder: Path, name: str, known: dict[str, Any], seed: int, read_from: int, write_to: int) -> None:
    import numpy as np

    warnings.simplefilter("ignore")
    # A library's panics and warnings.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM_BYTES, size + ROOM_BYTES))
    with os.fdopen(read_from) as lines:
        for line in lines:
            case = Case(*json.loads(line))
            place = _prepare(folder, name, case, seed)
            before_s, (own, of_children) = _processor_s(), _largest()
            try:
                outcome, detail = "accepted", ""
                value = known[case.format].read(place)
                if isinstance(value, np.ndarray) and not np.isfinite(value).all():
                    outcome = "not finite"
            except BaseException as error:
                outcome, detail = _judged(error)
            taken_s, (now, now_of_children) = _processor_s() - before_s, _largest()
            grown = max(now - own, now_of_children if now_of_children > of_children else 0)
            if grown > MEMORY_BYTES:
                outcome, detail = "memory", f"{grown >> 20} MiB ({outcome}) {detail}"
            elif taken_s > HANG_S:
                outcome, detail = "hang", f"{taken_s:.1f} s ({outcome}) {detail}"
            shutil.rmtree(place)
            os.write(write_to, (json.dumps((outcome, detail)) + "\n").encode())


def _judged(error: BaseException) -> tuple[str, str]:
    """As the command `xr0` judges."""
    from xr0_engine.cli import _explain

    caught = isinstance(error, ValueError | RuntimeError | OSError | ModuleNotFoundError)
    if isinstance(error, Exception) and caught and _explain(error) is not None:
        return "refused", str(error)[:300]
    return "traceback", "".join(traceback.format_exception(error))[-1500:]


def _prepare(folder: Path, name: str, case: Case, seed: int) -> Path:
    """The valid files, linked, and one of them damaged. What is read here is not written."""
    from tests.damage import damaged

    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "valid" / case.format, place, copy_function=os.link)
    file = place / case.file
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(damaged(content, case.file, random.Random(f"{seed} {case.number} {case.file}")))
    return place


def _processor_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def _largest() -> tuple[int, int]:
    """Bytes that this process, and the largest child that ended, had at most so far."""
    own, children = (
        resource.getrusage(who).ru_maxrss << 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own, children


def table(counts: dict[str, Counter[str]]) -> str:
    """In Markdown."""
    rows = [("format", "files", *OUTCOMES)]
    rows += [(name, str(found.total()), *(str(found[each]) for each in OUTCOMES)) for name, found in counts.items()]
    total: Counter[str] = sum(counts.values(), Counter())
    rows.append(("all", str(total.total()), *(str(total[each]) for each in OUTCOMES)))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def main() -> None:
    given = dict(enumerate(sys.argv))
    seconds, seed, only = float(given[1]), int(given.get(2, "0")), given.get(3, "all")
    counts, mistakes = fuzz(seconds, seed, None if only == "all" else only, int(given.get(4, "1")))
    print(table(counts))
    for mistake in mistakes[:SHOWN]:
        print(json.dumps(mistake))
    print(json.dumps({"seed": seed, "seconds": seconds, "counts": counts, "mistakes": len(mistakes)}))
    sys.exit(bool(mistakes))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    main()
