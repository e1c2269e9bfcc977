"""A guard tried: faults put on to the simulated robot while a policy drives it, and the same policy left alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.drive.aloha import SimulatedAloha, aloha_limits
from xr0_engine.drive.faults import FAULTS, FaultyRobot
from xr0_engine.drive.policies import Source
from xr0_engine.executor import Executor, Settings, VirtualClock
from xr0_engine.executor.settings import Mode
from xr0_engine.files import read_json, reading
from xr0_engine.guard import Guard, RobotProfile
from xr0_engine.guard.recording import RunWriter
from xr0_engine.guard.thread import GuardInLoop
from xr0_engine.sim import CONTROL_RATE_HZ, INSTRUCTION, AlohaEnv
from xr0_engine.types import FileError, GuardWarning

DELAY_STEPS = 2.0
"""Control steps that an inference takes."""
LONGEST_S = 8.0
"""Of a run, as of the episodes of this task; it ends when the cube has changed hands."""
FIRST_BEGIN_S, LAST_BEGIN_S = 1.0, 2.0
"""When faults begin: a run's own moment in between, while the arms are on their way."""
FIRST_SEED = 5000
"""Of the cube's place: none of those that were recorded for training or calibration (docs/guard.md)."""


@dataclass(frozen=True)
class Run:
    """begin_step: of the fault; None without one. steps: of the run. alarms: names of warnings before any fault.
    caught: the first warning after its begin. late_steps: from begin to it. names: all warnings after it.
    done: whether the cube changed hands."""

    fault: str | None
    seed: int
    begin_step: int | None
    steps: int
    clean_s: float
    alarms: tuple[str, ...]
    caught: str | None
    late_steps: int | None
    names: tuple[str, ...]
    done: bool


def try_guard(
    source: Source,
    profile: RobotProfile,
    faults: Sequence[str],
    runs: int,
    clean: int,
    first_seed: int = FIRST_SEED,
    keep: Path | None = None,
) -> Iterator[Run]:
    """Each fault so many runs, then runs without one; the same seeds for every fault. keep: a folder for what the guard
    saw of the runs without one that went well; it must hold no runs. Raises ValueError for a fault that there is not,
    or a folder that holds runs."""
    from xr0_engine.training.data.expert import transferred

    if unknown := sorted(set(faults) - set(FAULTS)):
        raise ValueError(f"faults: expected some of {', '.join(FAULTS)}, got {', '.join(unknown)}")
    plan: list[tuple[str | None, int]] = [(fault, first_seed + run) for fault in faults for run in range(runs)]
    plan += [(None, first_seed + runs + run) for run in range(clean)]
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.glob("*.jsonl")):
            raise ValueError(f"--keep: {keep} holds runs already, perhaps of another policy: choose another folder")
    with AlohaEnv(first_seed, width=320, height=240, views=source.views) as env:
        for fault, seed in plan:
            if keep is None or fault is not None:
                yield _run(source, Guard(profile), env, fault, seed, lambda: transferred(env))
                continue
            # Under its name once it is whole and went well.
            path = keep / f"run_{seed:06d}.partial"
            path.unlink(missing_ok=True)
            with RunWriter(path, profile) as writer:
                run = _run(source, Guard(profile, writer.keep), env, fault, seed, lambda: transferred(env))
            if run.done:
                path.replace(path.with_suffix(".jsonl"))
            else:
                path.unlink()
            yield run


def _run(source: Source, guard: Guard, env: AlohaEnv, fault: str | None, seed: int, is_done: Any) -> Run:
    import torch

    torch.manual_seed(seed)
    env.reset(seed)
    begin_s = float(np.random.default_rng(seed).uniform(FIRST_BEGIN_S, LAST_BEGIN_S)) if fault else math.inf
    clock = VirtualClock()
    ended: list[float] = []

    def look_whether_done() -> None:
        if not ended and is_done():
            ended.append(clock.now())
            executor.end("done")

    robot = FaultyRobot(
        SimulatedAloha(env, clock, INSTRUCTION), env, FAULTS[fault] if fault else None, begin_s, look_whether_done
    )
    mode: Mode = "async" if source.max_prefix else "guided"
    settings = Settings(rate_hz=CONTROL_RATE_HZ, mode=mode, max_prefix=source.max_prefix)
    executor = Executor(
        source.policy,
        robot,
        source.frame,
        settings,
        aloha_limits(env),
        clock,
        delay_s=lambda number: DELAY_STEPS / CONTROL_RATE_HZ,
        guard=GuardInLoop(guard),
    )
    report = executor.run(LONGEST_S)
    warnings = [GuardWarning(**told) for told in report.warnings]
    after = [warning for warning in warnings if warning.time_s >= begin_s - 0.5 / CONTROL_RATE_HZ]
    end_s = ended[0] if ended else LONGEST_S
    return Run(
        fault=fault,
        seed=seed,
        begin_step=round(begin_s * CONTROL_RATE_HZ) if fault else None,
        steps=round(end_s * CONTROL_RATE_HZ),
        clean_s=min(begin_s, end_s),
        alarms=tuple(warning.name for warning in warnings if warning not in after),
        caught=after[0].name if after else None,
        late_steps=round((after[0].time_s - begin_s) * CONTROL_RATE_HZ) if after else None,
        names=tuple(dict.fromkeys(warning.name for warning in after)),
        done=bool(ended),
    )


def results_of(runs: Sequence[Run], profile: RobotProfile, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a results file holds."""
    return {
        "kind": "guard",
        "settings": dict(settings),
        "calibrated": dict(profile.facts),
        "thresholds": dict(profile.thresholds),
        "runs": [asdict(run) for run in runs],
    }


def read_results(path: Path) -> dict[str, Any]:
    """Raises FileError for a file that holds none, OSError."""
    raw = read_json(path, FileError)
    with reading(path, FileError):
        if not isinstance(raw, dict) or raw["kind"] != "guard":
            raise ValueError("expected results of `xr0 guard try --out`")
        runs = [Run(**run) for run in raw["runs"]]
        if not sum(run.clean_s for run in runs) > 0:
            raise ValueError("runs: expected some")
    return raw


def table(results: Mapping[str, Any]) -> str:
    """Markdown of a results file: what is caught, how early, false alarms."""
    runs = [Run(**run) for run in results["runs"]]
    lines = [
        "| fault | caught | control steps to the warning, median (longest) | what warned first |",
        "|---|---|---|---|",
    ]
    for fault in dict.fromkeys(run.fault for run in runs if run.fault):
        own = [run for run in runs if run.fault == fault and run.steps > (run.begin_step or 0)]
        late = [run.late_steps for run in own if run.late_steps is not None]
        first = Counter(run.caught for run in own if run.caught)
        steps = f"{np.median(late):.0f} ({max(late)})" if late else "–"
        names = ", ".join(f"`{name}` {count}" for name, count in first.most_common())
        lines.append(f"| {fault} | {len(late)} of {len(own)} | {steps} | {names or '–'} |")
    return "\n".join([*lines, "", alarms(runs)])


def alarms(runs: Sequence[Run]) -> str:
    """False alarms of the time without a fault, with the most that is to be believed of their rate; of runs that went
    well apart, since where a policy loses its way a warning may be right."""
    clean = [run for run in runs if run.fault is None]
    well, others = ([run for run in clean if run.done is done] for done in (True, False))
    alarmed = [sum(bool(run.alarms) for run in some) for some in (well, others)]
    return (
        f"Without a fault, {len(clean)} runs and the time before each fault: {_rate(runs)}. The cube changed hands in "
        f"{len(well)} of these runs, {alarmed[0]} of which had an alarm{f': {_rate(well)}' if well else ''}. Of the "
        f"{len(others)} in which it did not, {alarmed[1]} had one."
    )


def _rate(runs: Sequence[Run]) -> str:
    hours = sum(run.clean_s for run in runs) / 3600
    names = Counter(name for run in runs for name in run.alarms)
    number = sum(names.values())
    by = ", ".join(f"`{name}` {count}" for name, count in names.most_common())
    told = f"{number} {'alarm' if number == 1 else 'alarms'} in {hours:.2f} h{f' ({by})' if by else ''}"
    return f"{told}, {number / hours:.1f} an hour (95 %: at most {_most(number) / hours:.1f})"


def _most(number: int) -> float:
    """The upper end of the one-sided 95 % interval of a Poisson count, exact: the mean of which so few are 5 %."""
    low, high = 0.0, 10.0 + 4.0 * number
    for _ in range(60):
        mean = (low + high) / 2
        chance = sum(math.exp(-mean + count * math.log(mean) - math.lgamma(count + 1)) for count in range(number + 1))
        low, high = (mean, high) if chance > 0.05 else (low, mean)
    return high
