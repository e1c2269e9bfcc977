"""A run: its trials dealt out to processes that simulate, its episodes written as they end.

A process that dies or hangs is ended by its own id and replaced, and its trial is repeated, as is one whose server went
away; both are counted. Whatever ends the run leaves a folder that the same command goes on with.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from xr0_engine.evaluation.benchmark import Benchmark, Episode, Mode, Task, Trial
from xr0_engine.evaluation.desk import Call, Desk, Reply
from xr0_engine.evaluation.film import check_films
from xr0_engine.evaluation.results import VIDEO_FOLDER, VIEW_FOLDER, Key, Writer
from xr0_engine.evaluation.worker import Asked, Beat, Done, Job, Lost, Told, Unusable, work
from xr0_engine.viz.sink import check_installed

if TYPE_CHECKING:
    from types import TracebackType

MOST_REPEATS = 3
POLL_S = 1.0
END_S = 10.0
START_S = 120.0
"""What a process may take to start, where that is longer than one may be silent."""
LOG_FOLDER = "logs"

_ERRORS = {kind.__name__: kind for kind in (ValueError, RuntimeError, ConnectionError, PermissionError, OSError)}


class Watcher(Protocol):
    """Who is told how a run goes."""

    def ended(self, episode: Episode) -> None: ...

    def repeated(self, reason: str) -> None: ...


def plan(
    benchmark: Benchmark,
    tasks: Sequence[Task],
    trials: int | None,
    seed: int,
    modes: Sequence[Mode],
    delays: Sequence[float],
) -> list[Trial]:
    """All trials of a run, task by task. trials: of each task; None: the benchmark's own number of them."""
    return [
        Trial(task, number, seed, mode, delay)
        for task in tasks
        for number in range(benchmark.trials(task) if trials is None else trials)
        for mode in modes
        for delay in delays
    ]


def check(job: Job, trials: Iterable[Trial]) -> None:
    """Raises ValueError for a policy that cannot be executed in one of the modes and delays; RuntimeError if videos are
    asked for and cannot be made, or rerun and it is not there."""
    if job.video != "none":
        check_films()
    if job.rerun != "none":
        check_installed()
    if job.source.info is not None:
        for trial in {(trial.mode, trial.delay_steps): trial for trial in trials}.values():
            try:
                job.execution.settings(trial, job.source.info)
            except ValueError as reason:
                raise ValueError(f"--mode {trial.mode}, --delay-steps {trial.delay_steps:g}: {reason}") from None


def run(
    job: Job,
    trials: Sequence[Trial],
    writer: Writer,
    watcher: Watcher,
    jobs: int = 1,
    hang_s: float = 300.0,
    desk: Desk | None = None,
) -> None:
    """Run those trials that the folder does not have yet.

    jobs: processes. hang_s: one that gives no sign of life for so long is ended. desk: the engine, for a source that
    needs one. Raises what no other trial would escape: RuntimeError for a simulator that is missing, ValueError for a
    policy that does not fit, ConnectionError for a server that does not come back, PermissionError if it refuses the
    key, OSError for a disk that takes no more. What has ended is in the folder then.
    """
    left = [trial for trial in trials if trial.key not in writer.done]
    for folder in (VIDEO_FOLDER, VIEW_FOLDER):
        for partial in (job.folder / folder).glob(".*.partial.*"):
            partial.unlink()
    with _Crew(job, left, writer, watcher, hang_s, desk) as crew:
        crew.work(min(jobs, len(left)))


@dataclass(eq=False)
class _Worker:
    """A process and what it is at. has_begun: it has said something. patient: it may be silent for as long as it
    likes."""

    number: int
    process: SpawnProcess
    connection: Connection
    trial: Trial | None = None
    heard: float = field(default_factory=time.monotonic)
    has_begun: bool = False
    patient: bool = False
    last_task: tuple[str, int] | None = None


class _Crew:
    """The processes of a run. Arguments as of run."""

    def __init__(
        self, job: Job, left: list[Trial], writer: Writer, watcher: Watcher, hang_s: float, desk: Desk | None
    ) -> None:
        self._job, self._left, self._writer, self._watcher = job, left, writer, watcher
        self._hang_s, self._desk = hang_s, desk
        self._workers: list[_Worker] = []
        self._repeats: dict[Key, int] = {}
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Those that are idle are told to end, all others are ended."""
        with ExitStack() as stack:
            for worker in self._workers:
                stack.callback(self._end, worker, patience_s=END_S if kind is None else 0.0)
                if kind is None:
                    with suppress(OSError):
                        worker.connection.send(None)

    def work(self, jobs: int) -> None:
        self._workers = [self._start(number) for number in range(jobs)]
        for worker in self._workers:
            self._deal(worker)
        while busy := [worker for worker in self._workers if worker.trial is not None]:
            by_handle = {worker.connection: worker for worker in busy}
            for ready in wait(list(by_handle), POLL_S):
                assert isinstance(ready, Connection)
                self._hear(by_handle[ready])
            for worker in busy:
                self._look_after(worker)

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        log = self._job.folder / LOG_FOLDER / f"worker-{number}.log"
        process = self._context.Process(target=work, args=(theirs, self._job, log))
        process.start()
        # The process's end alone then says that it is gone.
        theirs.close()
        return _Worker(number, process, ours)

    def _deal(self, worker: _Worker) -> None:
        """The next trial: of the task that the process has at hand, or of one that nobody else has."""
        worker.trial = None
        if not self._left:
            return
        taken = {other.last_task for other in self._workers}
        of_task = [(trial.task.suite, trial.task.index) for trial in self._left]
        index = next((index for index, task in enumerate(of_task) if task == worker.last_task), None)
        if index is None:
            index = next((index for index, task in enumerate(of_task) if task not in taken), 0)
        worker.trial, worker.last_task = self._left.pop(index), of_task[index]
        worker.heard, worker.patient = time.monotonic(), False
        # One that has died is looked after in its turn.
        with suppress(OSError):
            worker.connection.send(worker.trial)

    def _hear(self, worker: _Worker) -> None:
        try:
            told: Told = worker.connection.recv()
        except (EOFError, OSError):
            self._mourn(worker)
            return
        worker.heard, worker.has_begun = time.monotonic(), True
        worker.patient = isinstance(told, Beat) and told.patient
        if isinstance(told, Asked):
            worker.patient = True
            self._ask(worker, told)
        elif isinstance(told, Done):
            _refuse_misfit(told.episode, self._writer)
            self._ended(told.episode)
            self._deal(worker)
        elif isinstance(told, Lost):
            self._repeat(worker, told.reason)
            self._deal(worker)
        elif isinstance(told, Unusable):
            raise _ERRORS[told.kind](told.reason)

    def _ask(self, worker: _Worker, asked: Asked) -> None:
        assert self._desk is not None
        connection = worker.connection

        def answer(reply: Reply) -> None:
            # A process that was ended meanwhile needs none, and another may have its place.
            if worker.connection is connection:
                worker.heard, worker.patient = time.monotonic(), False
            with suppress(OSError):
                connection.send(reply)

        self._desk.ask(Call(asked.observation, asked.prefix, asked.seed, answer, asked.guide))

    def _ended(self, episode: Episode) -> None:
        episode = replace(episode, repeats=self._repeats.get(episode.key, 0))
        self._writer.add(episode)
        self._watcher.ended(episode)

    def _look_after(self, worker: _Worker) -> None:
        silent_s = time.monotonic() - worker.heard
        limit_s = self._hang_s if worker.has_begun else max(self._hang_s, START_S)
        if worker.trial is not None and not worker.patient and silent_s > limit_s:
            self._end(worker, patience_s=0)
            self._replace(worker, f"its simulator gave no sign of life for {silent_s:.0f} s")

    def _mourn(self, worker: _Worker) -> None:
        worker.process.join(END_S)
        code = worker.process.exitcode
        log = self._job.folder / LOG_FOLDER / f"worker-{worker.number}.log"
        if code is None or code >= 0:
            # It was not killed: an error of the package or of the benchmark, which all trials would meet.
            raise RuntimeError(f"a simulating process ended with exit code {code}. {last_line(log)}")
        self._replace(worker, f"its simulator's process was ended by signal {-code}")

    def _replace(self, worker: _Worker, reason: str) -> None:
        self._repeat(worker, reason)
        worker.connection.close()
        fresh = self._start(worker.number)
        worker.process, worker.connection = fresh.process, fresh.connection
        worker.has_begun, worker.last_task = False, None
        self._deal(worker)

    def _repeat(self, worker: _Worker, reason: str) -> None:
        trial, worker.trial = worker.trial, None
        assert trial is not None
        repeats = self._repeats[trial.key] = self._repeats.get(trial.key, 0) + 1
        name = f"{trial.task.suite} {trial.task.index}, trial {trial.number}, {trial.mode}, delay {trial.delay_steps:g}"
        if repeats <= MOST_REPEATS:
            self._watcher.repeated(f"{name}: {reason}")
            self._left.insert(0, trial)
            return
        self._repeats[trial.key] = MOST_REPEATS
        self._ended(_given_up(trial, f"given up after {MOST_REPEATS} repeats: {reason}"))

    def _end(self, worker: _Worker, patience_s: float) -> None:
        """By its own id."""
        worker.process.join(patience_s)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(END_S)


def _refuse_misfit(episode: Episode, writer: Writer) -> None:
    """Raises ValueError if a run's first episode ended because the policy refused the first thing that it saw."""
    refused = episode.error is not None and episode.error.startswith("policy")
    if refused and (episode.calls, episode.steps) == (1, 0) and not writer.done:
        raise ValueError(f"the policy does not take what {writer.run.benchmark} shows it: {episode.error}")


def _given_up(trial: Trial, reason: str) -> Episode:
    return Episode.of(
        trial,
        success=False,
        solved=0,
        rollouts=0,
        steps=0,
        calls=0,
        latency_ms={},
        reaction_ms={},
        wall_s=0.0,
        error=reason,
    )


def last_line(log: Path) -> str:
    """Of what a process wrote, with where."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return f"The last that it wrote, in {log}: {lines[-1]}" if lines else f"It wrote nothing to {log}"
