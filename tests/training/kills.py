"""kill -9 of a training run of two processes, again and again: python -m tests.training.kills [KILLS [SEED]].

One run goes undisturbed to its end. Another one of the same config is killed KILLS times, at moments that chance
chooses, and resumed each time: rank 0, rank 1 or both, while it starts, trains, writes a checkpoint, or exports. Its
ranks have the environment that torchrun gives them, and SIGTERM when the other one has died.

After each kill: what bears a checkpoint's name equals the undisturbed run's of that step, bit for bit, and so do the
losses up to it; no checkpoint has gone but older ones; no process of the run is left. At the end: losses, weights and
optimiser state are the undisturbed run's, and there is nothing in the folder that is not in the other. Whatever is not
so is printed and makes the exit code 1; so does a run that ended before it could be killed, or a kind of kill that did
not happen. The last line is JSON.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from typer.testing import CliRunner

from tests.training.data.fixtures import write_dataset
from tests.training.killed_run import (
    EXPORTING,
    MOMENTS,
    PATIENCE_S,
    POLL_S,
    STARTING,
    TRAINING,
    VICTIMS,
    WRITING,
    Run,
    told,
)
from tests.training.support import metrics, tiny_checkpoint
from xr0_engine import cli
from xr0_engine.training.checkpoint import PARTIAL, PROGRESS_FILE, checkpoints
from xr0_engine.training.run_folder import CHECKPOINTS, EXPORTED

EVERY = 3
"""Steps from one checkpoint to the next."""
AHEAD = 2 * EVERY
"""Steps that a life takes at most, until it is killed; and that are lost at most: a checkpoint has its name before the
next one is begun."""
WRITE_S = 0.02
"""After a checkpoint or an export has been begun; a write takes some milliseconds here."""
EXACT = ("step", "loss", "grad_norm", "learning_rate", "loss_by_step", "loss_by_time")
"""Of a line of metrics.jsonl: what does not depend on the machine's speed."""


@dataclass(frozen=True)
class Kill:
    """moment: what the run was doing, by its folder. step: the last one that it told. checkpoint: its newest.

    ended_s: from the kill until no process of the run was left. forced: whether the other one did not end by SIGTERM
    within the 30 s that torchrun waits before it kills it.
    """

    victim: str
    moment: str
    step: int
    checkpoint: int
    ended_s: float
    forced: bool

    @property
    def lost(self) -> int:
        return self.step - self.checkpoint


def exact(lines: list[dict[str, Any]]) -> list[list[Any]]:
    return [[line.get(name) for name in EXACT] for line in lines]


def differing(one: Path, other: Path) -> list[str]:
    """What two checkpoints do not have alike; none: they are the same, bit for bit."""
    states = []
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    for folder in (one, other):
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        state = {name: torch.empty(entry.size) for name, entry in entries.items()}
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
        states.append(state)
    first, second = states
    found = sorted(first.keys() ^ second.keys())
    found += [name for name in first.keys() & second.keys() if not torch.equal(first[name], second[name])]
    if (one / PROGRESS_FILE).read_bytes() != (other / PROGRESS_FILE).read_bytes():
        found.append(PROGRESS_FILE)
    return found


def names(folder: Path) -> set[str]:
    """All that is in a run's folder. TensorBoard's files are of one process each."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in found if not name.startswith("tensorboard/")}


def faults_after(run: Run, whole: Path, before: int) -> list[str]:
    """What a kill has spoiled. whole: the undisturbed run. before: the newest checkpoint after the kill before."""
    faults = []
    for path in run.checkpoints:
        if unlike := differing(path, whole / CHECKPOINTS / path.name):
            faults.append(f"{path.name} is not the undisturbed run's: {', '.join(unlike[:3])}")
    if run.last_checkpoint < before:
        faults.append(f"the newest checkpoint was step {before}, it is {run.last_checkpoint}")
    if run.last_step - run.last_checkpoint > AHEAD:
        faults.append(f"it was at step {run.last_step}, and its newest checkpoint is of step {run.last_checkpoint}")
    lines = [line for line in told(run.folder) if line["step"] <= run.last_checkpoint]
    if exact(lines) != exact(metrics(whole)[: run.last_checkpoint]):
        faults.append(f"what it told up to step {run.last_checkpoint} is not what the undisturbed run told")
    return faults


def faults_at_end(run: Run, whole: Path) -> list[str]:
    faults = []
    if exact(metrics(run.folder)) != exact(metrics(whole)):
        faults.append("its losses are not the undisturbed run's")
    faults += faults_of_export(run, whole)
    last = checkpoints(whole / CHECKPOINTS)[-1]
    ours = run.folder / CHECKPOINTS / last.name
    if not ours.is_dir() or differing(ours, last):
        faults.append(f"{last.name} is not the undisturbed run's")
    # It keeps all its checkpoints, to compare with.
    if left := {name for name in names(run.folder) ^ names(whole) if not name.startswith(f"{CHECKPOINTS}/step-")}:
        faults.append(f"one folder has, the other has not: {', '.join(sorted(left))}")
    if left := {name for name in names(run.folder) if PARTIAL in name}:
        faults.append(f"half made: {', '.join(sorted(left))}")
    return faults


def faults_of_export(run: Run, whole: Path) -> list[str]:
    faults = []
    for path in (whole / EXPORTED).iterdir():
        ours = run.folder / EXPORTED / path.name
        if not ours.is_file() or ours.read_bytes() != path.read_bytes():
            faults.append(f"{EXPORTED}/{path.name} is not the undisturbed run's")
    return faults


def plan(kills: int, chance: random.Random) -> list[tuple[str, str]]:
    """(moment, victim) of each: all as often as each other, but for the export, which comes at the end."""
    exports = [(EXPORTING, victim) for _, victim in zip(range(kills // 10), VICTIMS, strict=False)]
    pairs = [(moment, victim) for moment in (WRITING, TRAINING, STARTING) for victim in VICTIMS]
    first = [pairs[number % len(pairs)] for number in range(kills - len(exports))]
    chance.shuffle(first)
    return first + exports


def wait_for(run: Run, moment: str, chance: random.Random, start_s: float) -> bool:
    """Until it is to be killed; False if it has ended before. start_s: how long a run takes to start."""
    deadline = time.monotonic() + PATIENCE_S
    steps, skipped = chance.randint(1, AHEAD), chance.randint(0, 1)

    def until(condition: Callable[[], bool]) -> bool:
        while run.is_alive and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(POLL_S)
        return False

    if moment == STARTING:
        end = time.monotonic() + chance.uniform(0, start_s)
        return until(lambda: time.monotonic() > end or run.steps_done > 0)
    if moment == TRAINING:
        is_there = until(lambda: run.steps_done >= steps)
        time.sleep(chance.uniform(0, 0.1))
        return is_there and run.is_alive
    if moment == WRITING:
        until(lambda: run.steps_done > skipped * EVERY)
    is_there = until(lambda: run.has_half(moment))
    time.sleep(chance.uniform(0, WRITE_S))
    return is_there and run.is_alive


@contextmanager
def runs(folder: Path, steps: int) -> Iterator[tuple[Run, Path, list[str], float]]:
    """The run to kill, the undisturbed one's folder, the arguments that start either, and how long a start takes."""
    base = tiny_checkpoint(folder / "base")
    write_dataset(folder / "episodes", (12, 9))
    stats = ["data", "stats", str(folder / "episodes"), "--out", str(folder / "statistics.json"), "--chunk-length", "5"]
    done = CliRunner().invoke(cli.app, stats)
    assert done.exit_code == 0, done.output
    whole, killed = folder / "whole", folder / "killed"
    paths = (f"model.checkpoint={base}", f"data.robot={folder}/episodes", f"data.statistics={folder}/statistics.json")
    small = ("data.chunk_length=5", "data.batch_size=2", "data.validation_fraction=0", "flow.repeat=1", "run.threads=1")
    often = (f"optim.steps={steps}", "optim.warmup_steps=2", "run.log_every=1", f"run.checkpoint_every={EVERY}")
    start = ["post_train_async", "--tiny", *paths, *small, *often]
    undisturbed = Run(whole, folder / "whole.log")
    begun_s = time.monotonic()
    undisturbed.begin(*start, "--out", str(whole), f"run.keep_last={steps}")
    try:
        while undisturbed.is_alive and not undisturbed.last_step:
            time.sleep(POLL_S)
        start_s = time.monotonic() - begun_s
        assert not (fault := undisturbed.wait()), fault
    finally:
        undisturbed.stop()
    run = Run(killed, folder / "killed.log")
    try:
        yield run, whole, [*start, "--out", str(killed)], start_s
    finally:
        run.stop()


def kill_again_and_again(order: Sequence[tuple[str, str]], chance: random.Random) -> dict[str, Any]:
    """order: see plan. Prints a line for each kill. Returns them, and all that was wrong."""
    # Each life is killed before it has gone so many, but those that go on to the export.
    steps = (AHEAD + EVERY) * sum(moment != EXPORTING for moment, _ in order) + EVERY + 1
    done: list[Kill] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="xr0-kills-") as kept, runs(Path(kept), steps) as world:
        run, whole, start, start_s = world
        print(f"undisturbed: {steps} steps. killed:\n", flush=True)
        print(f"{'':4} {'process':8} {'while':22} {'step':>5} {'checkpoint':>11} {'lost':>5} {'ended':>8}", flush=True)
        for number, (moment, victim) in enumerate(order, 1):
            before = run.last_checkpoint
            if moment == EXPORTING and (run.folder / EXPORTED).exists():
                # The process that makes it was not hit, or was just through: there is to be one again, to be killed in.
                faults += [f"before kill {number}: {fault}" for fault in faults_of_export(run, whole)]
                shutil.rmtree(run.folder / EXPORTED)
            # What was killed before it had written its config is to be started anew, as it would tell.
            run.begin(*(["resume", str(run.folder)] if (run.folder / "config.json").exists() else start))
            if not wait_for(run, moment, chance, start_s):
                codes = [rank.exitcode for rank in run.ranks]
                run.stop()
                faults.append(f"kill {number}: it ended by itself with {codes}; its log: {run.log.read_text()[-600:]}")
                break
            seen, kill_s = run.moment, time.monotonic()
            wrong = run.kill(VICTIMS[victim])
            ended_s = time.monotonic() - kill_s
            found = Kill(victim, seen, run.last_step, run.last_checkpoint, round(ended_s, 2), run.forced)
            done.append(found)
            line = f"{number:4} {victim:8} {found.moment:22} {found.step:5} {found.checkpoint:11} {found.lost:5}"
            print(f"{line} {ended_s:6.1f} s", flush=True)
            wrong += faults_after(run, whole, before)
            faults += [f"kill {number}: {fault}" for fault in wrong]
            print("".join(f"     {fault}\n" for fault in wrong), end="", flush=True)
        else:
            run.begin("resume", str(run.folder))
            faults += [f"at the end: {fault}" for fault in run.wait() or faults_at_end(run, whole)]
    return {"kills": [asdict(kill) | {"lost": kill.lost} for kill in done], "steps": steps, "faults": faults}


def show(told: dict[str, Any], kills: int) -> None:
    """The table of docs/reliability.md, and what was wrong."""
    done = told["kills"]
    print(f"\n| killed while | {' | '.join(VICTIMS)} | steps lost, at most |\n|---|{'---:|' * (len(VICTIMS) + 1)}")
    for moment in MOMENTS:
        its = [kill for kill in done if kill["moment"] == moment]
        counts = Counter(kill["victim"] for kill in its)
        lost = max((kill["lost"] for kill in its), default=0)
        print(f"| {moment} | {' | '.join(str(counts[victim]) for victim in VICTIMS)} | {lost} |")
    times = [kill["ended_s"] for kill in done] or [0.0]
    forced = sum(kill["forced"] for kill in done)
    print(
        f"\ngone in {median(times):.1f} s in the middle, {max(times):.0f} s at most; SIGTERM was not enough: {forced}"
    )
    print(f"{len(done)} kills of {kills}; faults: {len(told['faults'])}")
    for fault in told["faults"]:
        print(fault)


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    chance = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    result = kill_again_and_again(plan(number, chance), chance)
    show(result, number)
    missing = set(MOMENTS) - {kill["moment"] for kill in result["kills"]} if number >= 10 else set()
    if missing:
        result["faults"].append(f"no kill came while {', '.join(sorted(missing))}: another seed?")
        print(result["faults"][-1])
    print(json.dumps(result))
    sys.exit(bool(result["faults"]) or len(result["kills"]) < number)
