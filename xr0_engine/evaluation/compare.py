"""`xr0 eval compare A B`: the same trials under two policies, or two versions of the code, pair by pair.

Pairs are trials of the same suite, task, number, mode, delay and seed. What pairs share, an easy start or a hard one,
cancels out: far smaller differences show than between two rates, and whether one is by chance has an exact answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from xr0_engine.evaluation.benchmark import Episode, Run
from xr0_engine.evaluation.intervals import Interval, mcnemar, mean_difference, mean_of_values, paired_difference
from xr0_engine.evaluation.rates import (
    Rate,
    condition_label,
    counts_pieces,
    grouped,
    per_cent,
    policy_title,
    throughput,
    trial_order,
)
from xr0_engine.evaluation.results import Results, read_results

Across = Literal["policy", "code", "versions"]
"""What is compared, and so may differ: the policy, our code, or the versions of the simulator."""
Verdict = Literal["better", "worse", "not told apart"]
Pair = tuple[Episode, Episode]
SIGNIFICANT = 0.05
MOST_TOLD = 5
"""Discordant trials of a side that are named: to look at what went otherwise."""


@dataclass(frozen=True)
class Row:
    """Some pairs. label: which. a, b: the rates of either side. only_a, only_b: pairs that this side alone solved.
    difference: rate of B minus rate of A. p: how likely chance alone makes the sides differ so much or more."""

    label: str
    a: Rate
    b: Rate
    only_a: int
    only_b: int
    difference: Interval
    p: float

    @property
    def pairs(self) -> int:
        return self.a.trials

    @property
    def verdict(self) -> Verdict:
        """Of B against A."""
        if self.p >= SIGNIFICANT:
            return "not told apart"
        return "better" if self.only_b > self.only_a else "worse"


@dataclass(frozen=True)
class Comparison:
    """titles: of A and B. across: what was compared. rows: first of all pairs, then by mode and delay and by suite,
    where there are several; none if all trials are runs against the clock. lengths: of chains, the mean that succeeded
    in a row in A and in B, and how much longer B's are; None without chains. throughput: pieces a minute in A and in B,
    by mode and delay. only_a, only_b: the trials that this side alone solved, as the other side went through them.
    notes: what differs or was left out and does not forbid the comparison."""

    titles: tuple[str, str]
    across: Across
    rows: tuple[Row, ...]
    lengths: tuple[Interval, Interval, Interval] | None
    throughput: Mapping[str, tuple[Interval, Interval]]
    only_a: tuple[Episode, ...]
    only_b: tuple[Episode, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Of B against A, over all pairs."""
        return self.rows[0].verdict if self.rows else "not told apart"


def compare(a: Path, b: Path, across: Across = "policy") -> Comparison:
    """Two results folders.

    across: what may differ between them. All else must be equal: benchmark, protocol, execution, and of policy, code
    and versions the other two. Raises ValueError that names every field at fault, for folders without a trial in
    common, and as read_results; OSError.
    """
    return compare_results(read_results(a), read_results(b), across)


def compare_results(a: Results, b: Results, across: Across = "policy") -> Comparison:
    """As compare, of what was read."""
    if across not in get_args(Across):
        raise ValueError(f"across: expected one of {', '.join(get_args(Across))}, got {across!r}")
    notes = _check_comparable(a.run, b.run, across)
    of_a, of_b = ({episode.key: episode for episode in side.episodes} for side in (a, b))
    pairs = [(of_a[key], of_b[key]) for key in sorted(of_a.keys() & of_b.keys(), key=trial_order)]
    if not pairs:
        raise ValueError(
            f"these results cannot be compared: no trial is in both; A has {len(of_a)} episodes, B {len(of_b)}"
        )
    for one, other in pairs:
        if one.seed != other.seed:
            raise ValueError(
                f"these results cannot be compared: seed of {trial_label(one)} is {one.seed} in A, {other.seed} in B"
            )
    for name, side, own in (("A", of_a, [one for one, _ in pairs]), ("B", of_b, [other for _, other in pairs])):
        if left := len(side) - len(pairs):
            notes.append(f"{left} episodes of {name} are not in the other: left out")
        if errors := sum(episode.error is not None for episode in own):
            notes.append(f"{errors} trials of {name} ended in an error and count as failures")
    clocked = [pair for pair in pairs if all(map(counts_pieces, pair))]
    pairs = [pair for pair in pairs if not any(map(counts_pieces, pair))]
    return Comparison(
        (policy_title(a.run), policy_title(b.run)),
        across,
        tuple(_rows(pairs)),
        _lengths(pairs),
        _throughput(clocked),
        tuple(other for one, other in pairs if one.success and not other.success),
        tuple(one for one, other in pairs if other.success and not one.success),
        tuple(notes),
    )


def as_json(comparison: Comparison) -> dict[str, Any]:
    """As JSON values; rates and differences as shares of 1."""

    def rate(found: Rate) -> dict[str, Any]:
        return {"successes": found.successes, **asdict(found.interval)}

    lengths = comparison.lengths
    return {
        "a": comparison.titles[0],
        "b": comparison.titles[1],
        "across": comparison.across,
        "rows": [
            {
                "label": row.label,
                "pairs": row.pairs,
                "a": rate(row.a),
                "b": rate(row.b),
                "only_a": row.only_a,
                "only_b": row.only_b,
                "difference": asdict(row.difference),
                "p": row.p,
                "verdict": row.verdict,
            }
            for row in comparison.rows
        ],
        "lengths": lengths and dict(zip(("a", "b", "difference"), map(asdict, lengths), strict=True)),
        "pieces_per_minute": {
            label: {"a": asdict(one), "b": asdict(other)} for label, (one, other) in comparison.throughput.items()
        },
        "verdict": comparison.verdict,
        "only_a": [list(episode.key) for episode in comparison.only_a],
        "only_b": [list(episode.key) for episode in comparison.only_b],
        "notes": list(comparison.notes),
    }


def show(comparison: Comparison, console: Any = None) -> None:
    """Print it. console: a rich one; None: the standard output."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    a, b = comparison.titles
    console.print(f"A: {escape(a)}\nB: {escape(b)}", highlight=False)
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for column in ("pairs", "A, %", "B, %", "B − A", "only A", "only B", "p"):
        table.add_column(column, justify="right")
    for row in comparison.rows:
        difference = per_cent(row.difference)
        table.add_row(
            escape(row.label),
            str(row.pairs),
            *(_rate_cell(rate) for rate in (row.a, row.b)),
            f"{difference.value:+.1f}\n[dim]{difference.low:+.1f} to {difference.high:+.1f}[/dim]",
            str(row.only_a),
            str(row.only_b),
            f"{row.p:.2g}",
        )
    if comparison.rows:
        console.print(table)
        console.print("95 % intervals: Wilson's, of the difference Tango's; p: McNemar's exact test", highlight=False)
    if comparison.lengths is not None:
        a_row, b_row, longer = (f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})" for one in comparison.lengths)
        console.print(f"tasks in a row: A {a_row}, B {b_row}, B − A {longer}", highlight=False)
    for label, sides in comparison.throughput.items():
        a_rate, b_rate = (f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})" for one in sides)
        console.print(f"pieces a minute, {label}: A {a_rate}, B {b_rate}", highlight=False)
    for name, episodes in (("A", comparison.only_a), ("B", comparison.only_b)):
        if episodes:
            more = f" and {len(episodes) - MOST_TOLD} more" if len(episodes) > MOST_TOLD else ""
            named = "; ".join(trial_label(episode) for episode in episodes[:MOST_TOLD])
            console.print(f"only {name}: {escape(named)}{more}", highlight=False)
    for note in comparison.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    console.print(f"[bold]{told_verdict(comparison)}", highlight=False)


def told_verdict(comparison: Comparison) -> str:
    """The comparison in one sentence."""
    if not comparison.rows:
        return "only throughput was compared: pieces are no pairs, see whether the intervals part"
    row = comparison.rows[0]
    against = f"{row.only_b} trials to {row.only_a}"
    if row.verdict == "not told apart":
        return f"A and B are not told apart by {row.pairs} pairs ({against}, p = {row.p:.2g})"
    return f"B is {row.verdict} than A ({against} of {row.pairs} pairs, p = {row.p:.2g})"


def trial_label(episode: Episode) -> str:
    """Which trial it is, in words."""
    place = f"suite {episode.suite}, task {episode.task}, trial {episode.trial}"
    return f"{place}, {condition_label(episode.mode, episode.delay_steps)}"


def _rows(pairs: Sequence[Pair]) -> list[Row]:
    found = [_row("all pairs", pairs)] if pairs else []
    for parts in (grouped(pairs, _condition), grouped(pairs, lambda pair: pair[0].suite)):
        found += [_row(label, part) for label, part in parts.items()] if len(parts) > 1 else []
    return found


def _condition(pair: Pair) -> str:
    return condition_label(pair[0].mode, pair[0].delay_steps)


def _lengths(pairs: Sequence[Pair]) -> tuple[Interval, Interval, Interval] | None:
    most = {episode.rollouts for pair in pairs for episode in pair}
    if len(most) != 1 or max(most) < 2:
        return None
    (length,) = most
    a, b = (mean_of_values([pair[side].solved for pair in pairs], length) for side in (0, 1))
    return a, b, mean_difference([(one.solved, other.solved) for one, other in pairs], length)


def _throughput(pairs: Sequence[Pair]) -> dict[str, tuple[Interval, Interval]]:
    found = {}
    for label, part in grouped(pairs, _condition).items():
        a, b = (throughput([pair[side] for pair in part]) for side in (0, 1))
        if a is not None and b is not None:
            found[label] = (a.per_minute, b.per_minute)
    return found


def _row(label: str, pairs: Sequence[Pair]) -> Row:
    only_a = sum(one.success and not other.success for one, other in pairs)
    only_b = sum(other.success and not one.success for one, other in pairs)
    return Row(
        label,
        Rate(sum(one.success for one, _ in pairs), len(pairs)),
        Rate(sum(other.success for _, other in pairs), len(pairs)),
        only_a,
        only_b,
        paired_difference(only_b, only_a, len(pairs)),
        mcnemar(only_a, only_b),
    )


def _check_comparable(a: Run, b: Run, across: Across) -> list[str]:
    """Raises ValueError with every reason not to compare; returns what merely differs."""
    sections: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        "protocol": (a.protocol, b.protocol),
        "execution": (a.execution, b.execution),
        "policy": (a.policy, b.policy),
        "code": (a.code, b.code),
        "versions": (a.versions, b.versions),
        "machine": (a.machine, b.machine),
    }
    faults = [] if a.benchmark == b.benchmark else [f"benchmark is {a.benchmark!r} in A, {b.benchmark!r} in B"]
    notes, differs = [], False
    for section, (one, other) in sections.items():
        # What a policy is called does not make it another.
        names = [name for name in dict.fromkeys([*one, *other]) if (section, name) != ("policy", "title")]
        found = [
            f"{section}.{name} is {_said(one, name)} in A, {_said(other, name)} in B"
            for name in names
            if one.get(name) != other.get(name)
        ]
        if section == across:
            differs = bool(found)
        elif section == "machine":
            notes += found
        else:
            faults += found
    if faults:
        hints = [
            f"`--across {section}` compares two of them"
            for section in get_args(Across)
            if section != across and any(fault.startswith(f"{section}.") for fault in faults)
        ]
        raise ValueError("; ".join([f"these results cannot be compared: {faults[0]}", *faults[1:], *hints]))
    if not differs:
        notes.append(f"the {across} of A and B is the same: what differs is chance or the machine")
    if any(str(side.code.get("commit") or "").endswith("-dirty") for side in (a, b)):
        notes.append("a side ran code that was not committed: it may differ in what its commit does not say")
    return notes


def _said(section: Mapping[str, Any], name: str) -> str:
    return f"{section[name]!r:.120}" if name in section else "absent"


def _rate_cell(rate: Rate) -> str:
    found = per_cent(rate.interval)
    return f"{found.value:.1f}\n[dim]{found.low:.1f}–{found.high:.1f}[/dim]"
