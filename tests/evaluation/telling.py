"""Made-up results for the tests of what is told of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.evaluation.fake import a_run, an_episode
from xr0_engine.evaluation.benchmark import Episode
from xr0_engine.evaluation.results import Results, Writer

HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1)|`&[red]"


def some(
    successes: int,
    trials: int,
    suite: str = "spatial",
    task: int = 0,
    mode: Any = "sync",
    delay: float = 0.0,
    **more: Any,
) -> list[Episode]:
    """Trials of a task, of which the first ones succeeded."""
    name = more.pop("name", f"{suite} {task}")
    return [
        an_episode(
            suite=suite,
            task=task,
            name=name,
            trial=trial,
            mode=mode,
            delay_steps=delay,
            success=trial < successes,
            solved=int(trial < successes),
            **more,
        )
        for trial in range(trials)
    ]


def chains(solved: Sequence[int], length: int = 5, **more: Any) -> list[Episode]:
    """Trials of several rollouts, of which so many were solved."""
    return [
        an_episode(trial=trial, success=done == length, solved=done, rollouts=length, **more)
        for trial, done in enumerate(solved)
    ]


def clocked(pieces: int, timeouts: int = 0, minutes: float = 30.0, **more: Any) -> Episode:
    """A run against the clock."""
    facts = {
        "pieces": pieces,
        "timeouts": timeouts,
        "duration_s": 60 * minutes,
        "piece_s": [20.0] * pieces,
        "cut": True,
    }
    return an_episode(
        **{"suite": "throughput", "success": False, "solved": pieces, "rollouts": pieces + timeouts + 1, "facts": facts}
        | more
    )


def results(
    episodes: Iterable[Episode], planned: int | None = None, folder: Path = Path("nowhere"), **run: Any
) -> Results:
    """As read_results gives them; run: fields of Run that differ from fake.a_run's."""
    found = tuple(episodes)
    return Results(
        folder,
        a_run(**{"policy": {"title": "Some policy", "kind": "engine"}} | run),
        found,
        len(found) if planned is None else planned,
    )


def write(told: Results, folder: Path) -> Path:
    """The same as a folder on the disk."""
    with Writer(folder, told.run, [episode.key for episode in told.episodes]) as writer:
        for episode in told.episodes:
            writer.add(episode)
    return folder


def hostile() -> Results:
    """Text of a page and of a terminal's markup wherever text can be."""
    episodes = [
        replace(episode, name=HOSTILE, error=HOSTILE, success=False, solved=0) for episode in some(0, 2, suite=HOSTILE)
    ]
    return results(
        episodes,
        benchmark=HOSTILE,
        policy={"title": HOSTILE, "kind": HOSTILE, "checkpoint": HOSTILE},
        protocol={HOSTILE: {HOSTILE: HOSTILE}},
        versions={HOSTILE: HOSTILE},
        code={"commit": HOSTILE},
        machine={"processor": HOSTILE},
        created=HOSTILE,
    )
