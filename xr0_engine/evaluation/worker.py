"""A process that simulates: it is told trials and tells episodes, one after the other, until it is told to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from xr0_engine.evaluation.benchmark import Benchmark, Episode, Trial, World
from xr0_engine.evaluation.episode import PICTURE_EVERY, Execution, Interrupted, act
from xr0_engine.evaluation.film import Film
from xr0_engine.evaluation.policies import Begin, Source
from xr0_engine.evaluation.view import EpisodeView
from xr0_engine.executor import Notes
from xr0_engine.serve.protocol import PolicyFailed, Refused
from xr0_engine.training.data.parallel import end_with_parent
from xr0_engine.types import ActionChunk, Guide, Observation

BEAT_S = 1.0

Video = Literal["none", "failures", "all"]


@dataclass(frozen=True)
class Job:
    """What all trials of a run have in common. folder: of the results, where videos go, and what rerun shows."""

    benchmark: Benchmark
    source: Source
    execution: Execution
    folder: Path
    video: Video = "none"
    rerun: Video = "none"


@dataclass(frozen=True)
class Asked:
    """An observation for the parent's engine; the reply is a chunk or the error."""

    observation: Observation
    prefix: np.ndarray | None
    seed: int
    guide: Guide | None = None


@dataclass(frozen=True)
class Beat:
    """Something goes on. patient: what comes next may take as long as it likes, such as waiting for a server."""

    patient: bool = False


@dataclass(frozen=True)
class Done:
    episode: Episode


@dataclass(frozen=True)
class Lost:
    """The trial says nothing, and is to be repeated."""

    reason: str


@dataclass(frozen=True)
class Unusable:
    """No trial can be run. kind: of the error."""

    kind: Literal["ValueError", "RuntimeError", "ConnectionError", "PermissionError", "OSError"]
    reason: str


Told = Asked | Beat | Done | Lost | Unusable


def work(connection: Connection, job: Job, log: Path) -> None:
    """The process's main function. log: what simulators print goes there."""
    # Ctrl-C is the parent's, which ends its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that was killed leaves nobody to work for.
    end_with_parent()
    _redirect(log)
    with Simulation(connection, job) as simulation:
        while (trial := connection.recv()) is not None:
            connection.send(simulation.attempt(trial))


class Simulation:
    """What is kept from trial to trial: the world and the connection to the policy."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self._connection, self._job = connection, job
        self._world: World | None = None
        self._begin: Begin | None = None
        self._policy = ExitStack()
        self._heard = 0.0

    def __enter__(self) -> Simulation:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget_world()
        self._policy.close()

    def attempt(self, trial: Trial) -> Done | Lost | Unusable:
        """What came of a trial."""
        try:
            begin, world = self._connect(), self._open()
            return self._act(trial, world, begin)
        except Interrupted as reason:
            self._begin = None
            self._policy.close()
            return Lost(str(reason))
        except PermissionError as error:
            return Unusable("PermissionError", str(error))
        except ConnectionError as error:
            return Unusable("ConnectionError", str(error))
        except OSError as error:
            return Unusable("OSError", str(error))
        except ValueError as error:
            return Unusable("ValueError", str(error))
        except (RuntimeError, ImportError) as error:
            return Unusable("RuntimeError", str(error))

    def _act(self, trial: Trial, world: World, begin: Begin) -> Done:
        job = self._job
        act_out = _Acting(world, begin, trial, job, self._beat)
        with ExitStack() as stack:
            film = view = None
            if job.video != "none":
                film = stack.enter_context(Film(job.folder, trial, job.execution.rate_hz / PICTURE_EVERY))
            if job.rerun != "none":
                view = EpisodeView(job.folder, trial)
                stack.enter_context(view)
            episode = act_out(film, view)
            if film is not None and (job.video == "all" or not episode.success):
                episode = replace(episode, video=film.keep())
            if view is not None and (job.rerun == "all" or not episode.success):
                view.keep()
        if film is not None and film.fault is not None:
            raise OSError(film.fault.errno, f"{job.folder / film.name}: {film.fault.strerror or film.fault}")
        if episode.error is not None:
            # Whatever it was, nobody knows what the world is like now.
            self._forget_world()
        return Done(episode)

    def _connect(self) -> Begin:
        if self._begin is None:
            self._connection.send(Beat(patient=True))
            self._begin = self._policy.enter_context(self._job.source.connect(self._job.benchmark, self._ask))
            self._connection.send(Beat())
        return self._begin

    def _open(self) -> World:
        if self._world is None:
            self._connection.send(Beat())
            self._world = self._job.benchmark.open()
        return self._world

    def _forget_world(self) -> None:
        world, self._world = self._world, None
        if world is not None:
            # One that broke may fail at that as well; it is replaced either way.
            with suppress(Exception):
                world.close()

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._heard >= BEAT_S:
            self._heard = now
            self._connection.send(Beat())

    def _ask(
        self, observation: Observation, prefix: np.ndarray | None, seed: int, guide: Guide | None = None
    ) -> ActionChunk:
        self._connection.send(Asked(observation, prefix, seed, guide))
        reply = self._connection.recv()
        if isinstance(reply, Refused | PolicyFailed):
            raise reply
        return reply


@dataclass(frozen=True)
class _Acting:
    """episode.act with all but the film and the view."""

    world: World
    begin: Begin
    trial: Trial
    job: Job
    beat: Callable[[], None]

    def __call__(self, film: Film | None, view: Notes | None) -> Episode:
        job, robot_type = self.job, self.job.source.robot_type
        return act(self.world, self.begin, self.trial, job.execution, robot_type, film, self.beat, watch=view)


def _redirect(log: Path) -> None:
    """Simulators print as they like; the terminal is the progress bar's."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
