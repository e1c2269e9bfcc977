"""Results as rates: per condition (mode and delay), suite and task, with intervals; failures by their cause.

What tables, the page and the JSON summary are made of. A condition is one column of the grid that a run went through.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

from xr0_engine.evaluation.benchmark import Episode, Mode, Run
from xr0_engine.evaluation.intervals import (
    Interval,
    count_per_time,
    mcnemar,
    mean_of_rates,
    mean_of_values,
    paired_difference,
    wilson,
)
from xr0_engine.evaluation.published import LIBERO_SUITES, PARTS, Unit

if TYPE_CHECKING:
    from xr0_engine.evaluation.results import Results

Item = TypeVar("Item")
MODES: tuple[Mode, ...] = ("sync", "naive", "async", "guided")
NOT_REACHED = "goal not reached"
"""The cause of a failure without an error."""
LONGEST_CAUSE = 160
"""Characters of an error that are told: what comes after is mostly a path or a dump."""


@dataclass(frozen=True)
class Rate:
    """How many of some trials succeeded."""

    successes: int
    trials: int

    @property
    def interval(self) -> Interval:
        return wilson(self.successes, self.trials)


@dataclass(frozen=True)
class TaskRate:
    """index: in its suite. name: the simulator's."""

    suite: str
    index: int
    name: str
    rate: Rate


@dataclass(frozen=True)
class Chains:
    """Of trials of several rollouts, one after the other until one fails: mean: how many succeeded in a row.
    positions: the share of trials that got at least so far, from the first."""

    mean: Interval
    positions: tuple[Rate, ...]


@dataclass(frozen=True)
class SuiteRate:
    """pooled: over all its trials. mean: of its tasks' rates, as papers have it; the same where all tasks had as many
    trials. parts: of its tasks, those that papers list, as they list them. chains: None unless its trials are some."""

    pooled: Rate
    mean: Interval
    parts: Mapping[str, Rate]
    chains: Chains | None


@dataclass(frozen=True)
class Headline:
    """The one figure of a condition: value in unit. most: what it cannot pass; None if nothing bounds it."""

    value: Interval
    unit: Unit
    most: float | None


@dataclass(frozen=True)
class Throughput:
    """pieces, timeouts: in minutes of simulated time, over all trials. per_minute: their rate. piece_s: the median of
    what a piece took; None if none says."""

    pieces: int
    timeouts: int
    minutes: float
    per_minute: Interval
    piece_s: float | None


@dataclass(frozen=True)
class Condition:
    """All episodes of one mode and delay. keys: suite, task and trial of each; solved: of those that succeeded. suites:
    in the order of papers. total: the mean of the suites' rates, as papers have it. times in ms: medians over the
    episodes of what each one has; None where none has any. success_s: the mean of the simulated seconds that a success
    took; None without any."""

    mode: Mode
    delay_steps: float
    delay_ms: float | None
    keys: frozenset[tuple[str, int, int]]
    solved: frozenset[tuple[str, int, int]]
    suites: Mapping[str, SuiteRate]
    tasks: tuple[TaskRate, ...]
    total: Interval
    chains: Chains | None
    throughput: Throughput | None
    latency_ms: Mapping[str, float | None]
    reaction_ms: Mapping[str, float | None]
    success_s: float | None

    @property
    def trials(self) -> int:
        return len(self.keys)

    @property
    def headline(self) -> Headline:
        """Tasks in a row of chains, pieces a minute where nothing else was counted, else the success rate."""
        if self.chains is not None:
            return Headline(self.chains.mean, "tasks in a row", len(self.chains.positions))
        if self.throughput is not None and len(self.suites) == 1:
            return Headline(self.throughput.per_minute, "pieces/min", None)
        return Headline(per_cent(self.total), "%", 100)

    @property
    def label(self) -> str:
        return condition_label(self.mode, self.delay_steps)


@dataclass(frozen=True)
class Paired:
    """A condition against another, over the trials that both went through. gained, lost: trials that it alone, and the
    other alone, solved. difference: of the rates, over these trials. p: of McNemar's exact test."""

    pairs: int
    gained: int
    lost: int
    difference: Interval
    p: float


def against(first: Condition, other: Condition) -> Paired | None:
    """None for one and the same, without a trial in common, and for runs against the clock."""
    pairs = len(first.keys & other.keys)
    if first is other or not pairs or first.throughput is not None:
        return None
    gained, lost = (len(one & two.keys - two.solved) for one, two in ((other.solved, first), (first.solved, other)))
    return Paired(pairs, gained, lost, paired_difference(gained, lost, pairs), mcnemar(gained, lost))


def condition_label(mode: str, delay_steps: float) -> str:
    return f"{mode}, delay {delay_steps:g}"


def conditions(results: Results) -> tuple[Condition, ...]:
    """In the order of modes and delays; empty for a run of no episodes. The first is the released loop where it was
    run."""
    found = grouped(results.episodes, lambda episode: (episode.mode, episode.delay_steps))
    order = sorted(found, key=lambda key: (MODES.index(key[0]), key[1]))
    return tuple(_condition(results.run, mode, delay, found[mode, delay]) for mode, delay in order)


def _condition(run: Run, mode: Mode, delay_steps: float, episodes: Sequence[Episode]) -> Condition:
    # Episodes come in the order in which they ended.
    by_suite = dict(sorted(grouped(episodes, lambda episode: episode.suite).items(), key=lambda item: _place(item[0])))
    suites = {suite: _suite(found) for suite, found in by_suite.items()}
    by_task = grouped(episodes, lambda episode: (_place(episode.suite), episode.task))
    tasks = [TaskRate(e[0].suite, e[0].task, e[0].name, _rate(e)) for _, e in sorted(by_task.items())]
    rate_hz = run.execution.get("rate_hz")
    steps = [episode.steps for episode in episodes if episode.success]
    return Condition(
        mode,
        delay_steps,
        1000 * delay_steps / rate_hz if rate_hz else None,
        frozenset((episode.suite, episode.task, episode.trial) for episode in episodes),
        frozenset((episode.suite, episode.task, episode.trial) for episode in episodes if episode.success),
        suites,
        tuple(tasks),
        mean_of_rates([suite.mean for suite in suites.values()]),
        _chains(episodes),
        throughput(episodes),
        _middle([episode.latency_ms for episode in episodes]),
        _middle([episode.reaction_ms for episode in episodes]),
        fmean(steps) / rate_hz if steps and rate_hz else None,
    )


def trial_order(key: tuple[str, int, int, str, float]) -> tuple[Any, ...]:
    """Of Episode.key, to sort by: as papers order suites, modes as MODES does."""
    suite, task, trial, mode, delay = key
    return _place(suite), task, trial, [str(known) for known in MODES].index(mode), delay


def causes(episodes: Iterable[Episode]) -> dict[str, int]:
    """Why episodes failed -> how many, the most frequent first; an error by its first line."""
    return dict(Counter(cause(episode) for episode in episodes if failed(episode)).most_common())


def failed(episode: Episode) -> bool:
    """Of a run against the clock, only an error is one: that a piece timed out is its rate's affair."""
    return not episode.success and (episode.error is not None or not counts_pieces(episode))


def cause(episode: Episode) -> str:
    """Of a failure: the first line of its error, or that it did not get there."""
    if episode.error is None:
        return NOT_REACHED
    first = (episode.error.strip() or "an error without a message").splitlines()[0]
    return first if len(first) <= LONGEST_CAUSE else f"{first[: LONGEST_CAUSE - 1]}…"


def uneven(found: Sequence[Condition]) -> str | None:
    """What is wrong with a grid whose conditions have not run the same trials; None if they have."""
    if len({condition.keys for condition in found}) < 2:
        return None
    fewest, most = min(condition.trials for condition in found), max(condition.trials for condition in found)
    counts = f"{fewest} to {most}" if fewest < most else f"{most}, but not the same"
    return f"modes and delays differ in the trials that were run ({counts}): compare their rates loosely"


def is_expert(run: Run) -> bool:
    """Whether the policy looks into the simulator: nothing published is comparable with it."""
    return run.policy.get("kind") == "expert"


def policy_title(run: Run) -> str:
    return str(run.policy.get("title") or run.policy.get("kind") or "a policy without a title")


def counts_pieces(episode: Episode) -> bool:
    """Whether a trial was a run against the clock: its facts then have `pieces` and `duration_s`. Its `success`, that
    every piece was done in time, says little."""
    return bool(_number(episode.facts, "duration_s")) and _number(episode.facts, "pieces") is not None


def per_cent(interval: Interval) -> Interval:
    return Interval(100 * interval.value, 100 * interval.low, 100 * interval.high)


def _place(suite: str) -> tuple[int, str]:
    """Of a suite among others."""
    short = suite.removeprefix("libero_")
    return (LIBERO_SUITES.index(short) if short in LIBERO_SUITES else len(LIBERO_SUITES), suite)


def _suite(episodes: Sequence[Episode]) -> SuiteRate:
    pooled = _rate(episodes)
    by_part = grouped(episodes, lambda episode: PARTS.get(episode.name, episode.task))
    tasks = {name: _rate(found) for name, found in by_part.items()}
    # Equal shares: the mean is the pooled rate, whose interval is the narrower.
    even = len({rate.trials for rate in tasks.values()}) == 1
    mean = pooled.interval if even else mean_of_rates([rate.interval for rate in tasks.values()])
    parts = {name: rate for name, rate in tasks.items() if isinstance(name, str)}
    return SuiteRate(pooled, mean, parts, _chains(episodes))


def _rate(episodes: Sequence[Episode]) -> Rate:
    """Of trials; of a run against the clock, of its pieces."""
    successes = trials = 0
    for episode in episodes:
        if not counts_pieces(episode):
            successes, trials = successes + episode.success, trials + 1
            continue
        pieces, timeouts = (int(_number(episode.facts, name) or 0) for name in ("pieces", "timeouts"))
        # What ended in an error was one more piece, and so was the one that nothing came of.
        successes, trials = successes + pieces, trials + max(pieces + timeouts + (episode.error is not None), 1)
    return Rate(successes, trials)


def _chains(episodes: Sequence[Episode]) -> Chains | None:
    """None unless all trials are chains of the same length, without a clock that they run against."""
    lengths = {episode.rollouts for episode in episodes}
    if len(lengths) != 1 or (length := lengths.pop()) < 2 or any(map(counts_pieces, episodes)):
        return None
    solved = [min(max(episode.solved, 0), length) for episode in episodes]
    positions = [Rate(sum(done > place for done in solved), len(solved)) for place in range(length)]
    return Chains(mean_of_values(solved, length), tuple(positions))


def throughput(episodes: Sequence[Episode]) -> Throughput | None:
    """None if no episode has counted pieces."""
    counted = [episode.facts for episode in episodes if counts_pieces(episode)]
    if not counted:
        return None
    pieces = int(sum(_number(facts, "pieces") or 0 for facts in counted))
    timeouts = int(sum(_number(facts, "timeouts") or 0 for facts in counted))
    minutes = sum(_number(facts, "duration_s") or 0 for facts in counted) / 60
    each = [float(value) for facts in counted for value in facts.get("piece_s") or ()]
    return Throughput(pieces, timeouts, minutes, count_per_time(pieces, minutes), median(each) if each else None)


def _number(facts: Mapping[str, Any], name: str) -> float | None:
    """A fact that is a number of 0 or more."""
    value = facts.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if usable and value is not None else None


def _middle(measured: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in ("p50", "p99"):
        values = [times[name] for times in measured if math.isfinite(times.get(name, math.nan))]
        found[name] = median(values) if values else None
    return found


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """By a key, in the order in which keys first come."""
    found: dict[Any, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
