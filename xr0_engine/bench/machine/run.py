"""`xr0 bench machine`: the steps of a plan one after the other, resumable at each, and the page that tells of them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xr0_engine.bench.machine import processes
from xr0_engine.bench.machine.plan import Step, Wish, choose_size, parts_of, plan
from xr0_engine.bench.machine.private import Scrubber
from xr0_engine.bench.machine.processes import Stop
from xr0_engine.bench.machine.state import (
    CRASHED,
    CUT_SHORT,
    FACTS,
    FAILED,
    FAULTS,
    INTERRUPTED,
    KILLED,
    LEFT_OUT,
    LOGS,
    PASSED,
    RESULTS,
    TIMED_OUT,
    Ended,
    State,
    check,
    go_on,
    locked,
)
from xr0_engine.whole import write_whole

FACTS_S = 120
SAME = ("commit", "version")
SAME_ENVIRONMENT = ("device", "processor", "driver", "torch", "triton", "emulated")
"""What runs in one folder must have in common: of the facts, and of the environment in them."""
WORK_SHARE = 0.6
"""Of a step's time, for what is told how long it may take: the rest is for loading before and proving after."""
ERROR, RAISED = "xr0: error: ", re.compile(r"[\w.]+(Error|Exception|Interrupt)\b")
"""How lines of a log begin that say what went wrong: `xr0`'s own, and a traceback's last."""
MOST_REASON = 300
"""Letters of a reason; the log has all."""

Say = Callable[[str], None]


def machine(wish: Wish, minutes: float, out: Path, say: Say) -> int:
    """All of it. Returns the exit code: 0, 1 if a step failed, 128 + a signal that ended the run.

    Raises ValueError for a wrong wish or a folder that holds another run, NotImplementedError without a GPU,
    RuntimeError if the machine cannot be told of, OSError if the folder cannot be written.
    """
    # torch is slow to import: what only runs steps does without.
    from xr0_engine.bench.machine.page import write_page

    wish.check()
    if not minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, got {minutes:g}")
    end = time.monotonic() + 60 * minutes
    out = out.absolute()
    for folder in (out, out / RESULTS, out / LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    places = {str(out): "DIR"} | ({} if wish.golden is None else {str(wish.golden.absolute()): "GOLDEN"})
    scrub = Scrubber(places)
    with locked(out), processes.stopping() as stop:
        facts = _facts(wish, out, stop)
        if stop.signal:
            return 128 + stop.signal
        size, why = choose_size(facts, wish)
        state = go_on(out, _same(facts, size))
        state.told = {"size": size, "size_reason": why, "golden": wish.golden is not None}
        write_whole(out / FACTS, json.dumps(scrub.value(facts), indent=1) + "\n")
        steps = plan(facts, wish, size, out)

        def done() -> None:
            write_page(out, facts, steps, state)

        run(steps, state, minutes, end, wish.environment(), stop, scrub, done, say)
    if stop.signal:
        return 128 + stop.signal
    return int(any(each.verdict in FAULTS for each in state.ended.values()))


def run(
    steps: Sequence[Step],
    state: State,
    minutes: float,
    end: float,
    environment: Mapping[str, str],
    stop: Stop,
    scrub: Scrubber,
    done: Callable[[], None],
    say: Say,
) -> None:
    """What has not passed yet, until the time is up or a signal comes; afterwards state says how each step ended.

    end: of the time, on the monotonic clock. done: called after every step. Raises OSError if the folder cannot be
    written; what runs is ended then.
    """
    processes.end_leftovers(state.run)
    for step in steps:
        _scrub(step, state.folder, scrub)
    state.parts = {part: [step.name for step in found] for part, found in parts_of(steps).items()}
    without: dict[str, list[str]] = {}
    waiting = [step for step in steps if state.verdict(step.name) != PASSED]
    # What was tried in vain comes after what was not tried; last of all, what may have taken the machine down. What
    # others need keeps its place.
    needed = {step.needs for step in steps}
    waiting.sort(key=lambda step: state.verdict(step.name) in (*FAULTS, CUT_SHORT) and step.name not in needed)
    waiting.sort(key=lambda step: state.verdict(step.name) == KILLED and step.name not in needed)
    for number, step in enumerate(waiting, 1):
        if stop.signal:
            break
        remaining = end - time.monotonic()
        reason = step.left_out
        if reason is None and step.needs and state.verdict(step.needs) != PASSED:
            reason = f"it needs {step.needs}, which has not passed"
        if reason is None and remaining < step.least_s:
            reason = f"the time was up: it needs {step.least_s:.0f} s, {max(0.0, remaining):.0f} were left"
        if reason is not None:
            # How it ended before says more, if it was begun.
            if state.verdict(step.name) in (None, LEFT_OUT, INTERRUPTED):
                state.ended[step.name] = Ended(LEFT_OUT, reason)
            without.setdefault(reason, []).append(step.name)
            continue
        limit = step.limit_s(minutes, remaining)
        say(f"[{number}/{len(waiting)}] {step.name} (at most {limit:.0f} s): {step.what}")
        state.running = step.name
        state.write()
        ended = _one(step, state, limit, environment, stop)
        _scrub(step, state.folder, scrub)
        state.running = None
        state.ended[step.name] = replace(ended, reason=scrub.text(ended.reason))
        state.write()
        done()
        say(f"    {ended.verdict} after {ended.seconds:.0f} s{f': {ended.reason}' if ended.reason else ''}")
    for reason, names in without.items():
        say(f"left out: {', '.join(names)}: {reason}")
    state.write()
    done()


def _one(step: Step, state: State, limit_s: float, environment: Mapping[str, str], stop: Stop) -> Ended:
    result = state.folder / RESULTS / step.file if step.file else None
    partial = state.folder / RESULTS / f".{step.name}-printed"
    if result is not None:
        result.unlink(missing_ok=True)
    minutes = f"{WORK_SHARE * limit_s / 60:.2f}"
    command = [*step.wrapper, sys.executable, *(word.replace("{minutes}", minutes) for word in step.arguments)]
    begin, clock = time.time(), time.monotonic()
    with _log(step, state.folder).open("wb") as log, partial.open("wb") if step.printed else log as output:
        try:
            process = processes.start(command, environment, state.run, log, output)
        except OSError as error:
            partial.unlink(missing_ok=True)
            return Ended(FAILED, f"{command[0]} could not be started: {error.strerror}")
        code, why = processes.wait(process, limit_s, stop)
    seconds = time.monotonic() - clock
    kept, fault = _take(step, state.folder, partial, begin, why is None)
    if why == "stop":
        return Ended(INTERRUPTED, "the run was ended", seconds, limit_s, code)
    if why == "time":
        told = "its time was up" if code is not None else "its time was up, and no signal ended it"
        return Ended(CUT_SHORT if kept else TIMED_OUT, told, seconds, limit_s, code)
    assert code is not None
    if code < 0:
        return Ended(CRASHED, f"ended by signal {-code}", seconds, limit_s, code)
    if code == 0:
        return Ended(FAILED if fault else PASSED, fault or "", seconds, limit_s, code)
    # What prints its findings has told why.
    reason = "the answer is no" if code == 1 and step.printed and kept else _reason(_log(step, state.folder), code)
    return Ended(FAILED, reason, seconds, limit_s, code)


def _take(step: Step, folder: Path, partial: Path, begin: float, finished: bool) -> tuple[bool, str | None]:
    """Put what a step left where it belongs. Returns whether it left anything, and what is wrong with its file."""
    kept, fault = False, None
    if step.file:
        result = folder / RESULTS / step.file
        if step.printed and finished:
            os.replace(partial, result)
        partial.unlink(missing_ok=True)
        if result.is_file():
            try:
                check(result)
                kept = True
            except ValueError as error:
                fault = str(error)
                os.replace(result, folder / LOGS / f"{step.file}.broken")
        else:
            fault = "it left no result"
    if step.copied is not None:
        source, target = step.copied
        if source.is_file() and source.stat().st_mtime >= begin:
            write_whole(target, source.read_text(encoding="utf-8"))
            kept = True
    return kept, fault


def _reason(log: Path, code: int) -> str:
    """The line that says it best: our own error, else the exception, else the last."""
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    raised = [line for line in lines if RAISED.match(line)]
    told = (ours or raised or lines)[-1:] or ["it printed nothing"]
    return f"{told[0][:MOST_REASON]} (exit code {code})"


def _log(step: Step, folder: Path) -> Path:
    return folder / LOGS / f"{step.name}.log"


def _scrub(step: Step, folder: Path, scrub: Scrubber) -> None:
    scrub.file(_log(step, folder))
    if step.file:
        scrub.file(folder / RESULTS / step.file)
    if step.copied is not None:
        scrub.file(step.copied[1])


def _facts(wish: Wish, out: Path, stop: Stop) -> dict[str, Any]:
    """What facts.examine says, in a process of its own."""
    device = "cpu" if wish.emulate is not None else "auto"
    command = [sys.executable, "-m", "xr0_engine.bench.machine.facts", device]
    log, told = out / LOGS / "facts.log", out / LOGS / ".facts-printed"
    with log.open("wb") as errors, told.open("wb") as output:
        code, why = processes.wait(processes.start(command, wish.environment(), "", errors, output), FACTS_S, stop)
    text = told.read_text(encoding="utf-8")
    told.unlink()
    if stop.signal:
        return {}
    if code != 0:
        raise RuntimeError(f"this machine cannot be told of: {why or _reason(log, code or 0)}; see {log}")
    facts: dict[str, Any] = json.loads(text)
    if facts["gpu"] is None and wish.emulate is None:
        raise NotImplementedError(
            "torch finds no CUDA GPU here; `xr0 doctor` says why, and --emulate 90 runs the sequence without one"
        )
    return facts


def _same(facts: Mapping[str, Any], size: str) -> dict[str, Any]:
    known = facts["environment"]
    ours = {name: facts[name] for name in SAME}
    return {**ours, **{name: known.get(name) for name in SAME_ENVIRONMENT}, "size": size}
