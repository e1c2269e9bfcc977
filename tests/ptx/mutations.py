"""The emulator's own proof: each barrier, fence, wait, order and index of a compiled kernel broken in turn.

    XR0_EMULATE=90 python -m tests.ptx.mutations            # all places, into tests/ptx/mutations/sm_90.md

A mutant is noticed if the machine reports something, or else if the numbers differ. Of most rules every mutant has to
be noticed. What goes unnoticed of the others is in the table, by its source line; `HARMLESS` says why it may.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from tests.ptx import EmulationError, launcher, stream
from tests.ptx.families import FAMILIES, Family

SEEDS = (1, 2)
BUDGET = 50_000_000
"""Instructions; whole kernels take less than a tenth."""
FOLDER = Path(__file__).parent / "mutations"

Lines = list[str]
Change: TypeAlias = Callable[[Lines, int, re.Match[str]], None]


@dataclass(frozen=True)
class Rule:
    """What to break. pattern: finds it in a line. change: (lines, index of such a line, match) -> the lines, broken."""

    name: str
    pattern: re.Pattern[str]
    change: Change


def _dropped(lines: Lines, index: int, match: re.Match[str]) -> None:
    lines[index] = lines[index][: match.start()] + lines[index][match.end() :]


def _replaced(by: str) -> Change:
    def change(lines: Lines, index: int, match: re.Match[str]) -> None:
        lines[index] = lines[index][: match.start()] + by + lines[index][match.end() :]

    return change


def _later(lines: Lines, index: int, match: re.Match[str]) -> None:
    """One more group may be under way."""
    lines[index] = lines[index][: match.start(1)] + str(int(match[1]) + 1) + lines[index][match.end(1) :]


def _moved(by: int) -> Change:
    """The address, by so many bytes."""

    def change(lines: Lines, index: int, match: re.Match[str]) -> None:
        before, base, offset = match.groups()
        start, end = match.span()
        lines[index] = f"{lines[index][:start]}{before}[{base}+{int(offset or 0) + by}]{lines[index][end:]}"

    return change


def _behind_barrier(lines: Lines, index: int, match: re.Match[str]) -> None:
    """A store, behind the barrier that follows it."""
    for after in range(index + 1, min(index + 40, len(lines))):
        if "bar.sync" in lines[after]:
            lines.insert(after + 1, lines[index])
            del lines[index]
            return


def _rule(name: str, pattern: str, change: Change = _dropped) -> Rule:
    return Rule(name, re.compile(pattern), change)


ADDRESS = r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?\s*\]"
RULES = (
    _rule("barrier dropped", r"bar\.sync\s[^;]*;"),
    _rule("warp's barrier dropped", r"bar\.warp\.sync\s[^;]*;"),
    _rule("store moved behind the barrier", r"^\s(?:@!?%p\d+ )?(?:st\.shared|stmatrix)[^;]*;", _behind_barrier),
    _rule("wait for copies: one more may be under way", r"cp\.async\.wait_group\s+(\d+)", _later),
    _rule("wait for copies dropped", r"cp\.async\.wait_(?:group|all)[^;]*;"),
    _rule("group of copies not closed", r"cp\.async\.commit_group\s*;"),
    _rule("acquire and release relaxed", r"\.acq_rel", _replaced(".relaxed")),
    _rule("release relaxed", r"\.release", _replaced(".relaxed")),
    _rule("acquire relaxed", r"\.acquire", _replaced(".relaxed")),
    _rule("wait for the kernel ahead dropped", r"griddepcontrol\.wait[^;]*;"),
    _rule("wait for products dropped", r"wgmma\.wait_group[^;]*;"),
    _rule("fence before products dropped", r"wgmma\.fence[^;]*;"),
    _rule("group of products not closed", r"wgmma\.commit_group[^;]*;"),
    _rule("proxy fence dropped", r"fence\.proxy\.async[^;]*;"),
    _rule("mask of a load dropped", r"@!?%p\d+ (?=ld\.global)"),
    _rule("mask of a store dropped", r"@!?%p\d+ (?=st\.global)"),
    _rule("mask of an atomic dropped", r"@!?%p\d+ (?=(?:atom|red)\.)"),
    _rule("address of a load, 4 bytes on", rf"(?<=ld\.global)([^\[;]*){ADDRESS}", _moved(4)),
    _rule("address of a store, 4 bytes on", rf"(?<=st\.global)([^\[;]*){ADDRESS}", _moved(4)),
    _rule("address in shared memory, 16 bytes on", rf"(?<=(?:ld|st)\.shared)([^\[;]*){ADDRESS}", _moved(16)),
    _rule("address of ldmatrix, 16 bytes on", rf"(?<=ldmatrix)([^\[;]*){ADDRESS}", _moved(16)),
    _rule("target of a copy, 16 bytes on", rf"(?<=cp\.async\.c[ag])([^\[;]*){ADDRESS}", _moved(16)),
    _rule("mbarrier not initialised", r"(?<=\s)@%p\d+ mbarrier\.init[^;]*;"),
    _rule(
        "wait at an mbarrier dropped", r"mbarrier\.try_wait\S* complete,[^;]*", _replaced("setp.eq.u32 complete, 0, 0")
    ),
    _rule("an mbarrier's bytes: one more", r"(?<=mbarrier\.arrive\.expect_tx)[^;]*, (\d+)", _later),
    _rule("tensor copy dropped", r"(?<=\s)@%p\d+ cp\.async\.bulk\.tensor[^;]*;"),
)

HARMLESS = {
    "barrier dropped": "another barrier stands before whatever it orders: the compiler's own second one",
    "store moved behind the barrier": "what it writes is read behind a later barrier only",
    "wait for copies: one more may be under way": "no further group is under way there: the last turn of a loop",
    "wait for copies dropped": "nothing is read of what is still under way: groups without copies",
    "group of copies not closed": "its copies join the next group, and both are waited for at once",
    "fence before products dropped": "the products just before it have one, and others' accumulators",
    "proxy fence dropped": "another fence stands between the copies and the product",
    "mask of a load dropped": "what it reads is in the same tensor, and is multiplied by zero or not stored",
    "mask of a store dropped": "the lanes that it holds back would store the same value in the same word",
    "address in shared memory, 16 bytes on": "what it reads belongs to rows beyond the last, which are not stored",
}
"""Rule -> why some of its mutants change nothing."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant. reports: kinds, all seeds'. differs: whether numbers did, in a run without reports.
    executed: whether the broken instruction is."""

    rule: str
    source: str
    reports: tuple[str, ...]
    differs: bool
    executed: bool

    @property
    def noticed(self) -> bool:
        return bool(self.reports) or self.differs


@contextmanager
def altered(kernel: str, change: Callable[[str], str]) -> Iterator[None]:
    """Within, the kernel of that name runs as changed PTX."""
    launcher.altered = lambda name, text: change(text) if name == kernel else text
    try:
        yield
    finally:
        launcher.altered = None


def texts(family: Family) -> list[str]:
    """The PTX of a family's kernel, of each of its variants that is launched."""
    found: dict[str, None] = {}

    def keep(text: str) -> str:
        found[text] = None
        return text

    with altered(family.kernel, keep):
        run(family)
    return list(found)


def run(family: Family) -> tuple[Tensor, ...]:
    """With launches that overlap."""
    with torch.inference_mode(), stream():
        return family.run()


def places(text: str, rule: Rule, most: int | None = None) -> list[int]:
    """Lines that a rule can break; of more than `most`, so many evenly spread."""
    found = [index for index, line in enumerate(text.split("\n")) if rule.pattern.search(line)]
    if most is None or len(found) <= most:
        return found
    return [found[(2 * number + 1) * len(found) // (2 * most)] for number in range(most)]


def mutant(text: str, rule: Rule, line: int) -> str:
    lines = text.split("\n")
    match = rule.pattern.search(lines[line])
    assert match is not None
    rule.change(lines, line, match)
    return "\n".join(lines)


def try_mutant(family: Family, expected: Sequence[Tensor], text: str, rule: Rule, line: int) -> Outcome:
    """Run a family with one place of one variant broken, under several schedules."""
    broken = mutant(text, rule, line)
    reports: set[str] = set()
    differs = False
    for seed in SEEDS:
        found, out = _try(family, text, broken, seed)
        reports.update(found)
        differs |= bool(out) and not all(torch.equal(own, other) for own, other in zip(out, expected, strict=True))
    executed = bool(reports) or differs or _executed(family, text, line)
    return Outcome(rule.name, source_of(text, line), tuple(sorted(reports)), differs, executed)


def _try(family: Family, text: str, broken: str, seed: int) -> tuple[set[str], tuple[Tensor, ...]]:
    """Kinds of reports, or what came out where there are none."""
    with environment(XR0_EMULATE_SEED=str(seed), XR0_EMULATE_BUDGET=str(BUDGET)):
        try:
            with altered(family.kernel, lambda given: broken if given == text else given):
                return set(), run(family)
        except EmulationError as error:
            return {report.kind for report in error.reports} or {"hangs"}, ()


def _executed(family: Family, text: str, line: int) -> bool:
    lines = text.split("\n")
    lines[line] = re.sub(r"^(\s*(?:@!?%p\d+ )?)[a-z][^;]*;", r"\1trap;", lines[line])
    return bool(_try(family, text, "\n".join(lines), SEEDS[0])[0])


def source_of(text: str, line: int) -> str:
    """`product.py:185`: the line of a kernel's source that a line of PTX comes from."""
    for before in reversed(text.split("\n")[: line + 1]):
        if match := re.search(r"//\s*(\w+\.py):(\d+)", before):
            return f"{match[1]}:{match[2]}"
    return "?"


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def outcomes(family: Family, most: int) -> Iterator[Outcome]:
    """Of every rule, at up to so many places of each of the family's variants."""
    expected = run(family)
    for text in texts(family):
        for rule in RULES:
            for line in places(text, rule, most):
                yield try_mutant(family, expected, text, rule, line)


def rows(name: str, found: Sequence[Outcome]) -> list[str]:
    """The table's rows of one family: what became of each rule's mutants."""
    told = []
    for rule in RULES:
        own = [outcome for outcome in found if outcome.rule == rule.name and outcome.executed]
        if not own:
            continue
        kinds = sorted({kind for outcome in own for kind in outcome.reports})
        reported = sum(bool(outcome.reports) for outcome in own)
        numbers = sum(outcome.noticed and not outcome.reports for outcome in own)
        unnoticed = ", ".join(f"{outcome.source}" for outcome in own if not outcome.noticed)
        told.append(
            f"| {name} | {rule.name} | {len(own)} | {reported} | {numbers} | {unnoticed} | {', '.join(kinds)} |"
        )
    return told


HEADER = """# What becomes of broken kernels: sm_{arch}

Made by `XR0_EMULATE={arch} python -m tests.ptx.mutations`. Each row: a family of kernels, what was broken in its PTX,
at how many places in turn; how often the machine reported something, how often the numbers alone differed, and the
source lines of what went unnoticed, explained below. Two schedules each, launches overlapping; instructions that these
sizes never execute are left out.

| kernel | broken | places | reported | numbers alone | unnoticed at | reported as |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    arch = os.environ.get("XR0_EMULATE", "")
    most = {"flow_loop": 3, "streamed_flow": 3}
    told = []
    for name, family in FAMILIES.items():
        begin = time.perf_counter()
        found = list(outcomes(family, most.get(name, 8)))
        told += rows(name, found)
        noticed = sum(outcome.noticed for outcome in found)
        print(f"{name}: {noticed} of {len(found)} noticed, {time.perf_counter() - begin:.0f} s", flush=True)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"sm_{arch}.md"
    reasons = [f"- {rule}: {reason}." for rule, reason in HARMLESS.items()]
    parts = [HEADER.format(arch=arch) + "\n".join(told), "## Why some change nothing", "\n".join(reasons)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
