"""Running the grid: each cell a process and a folder, trained, tried and looked into, and gone on with after any end.

A cell's folder holds the training run (`train/`), what each condition gave (`conditions.jsonl`), and, last and whole,
`row.json`: what analysis reads. A cell that has its row is done.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xr0_engine.bench.results import current_commit, processor
from xr0_engine.evaluation.runner import last_line
from xr0_engine.files import json_lines, read_json
from xr0_engine.lab.arms import ARMS, Cell, Condition, Plan, Size, conditions
from xr0_engine.lab.tasks import CHUNK, find_task
from xr0_engine.training.run_folder import CONFIG_FILE, METRICS_FILE
from xr0_engine.types import FileError
from xr0_engine.whole import only_writer, whole_folder, write_whole

if TYPE_CHECKING:
    from xr0_engine.engine import Engine
    from xr0_engine.lab.rollouts import Rollout
    from xr0_engine.training.config import TrainConfig

SCHEMA = 1
ROW_FILE, CONDITIONS_FILE, LOG_FILE = "row.json", "conditions.jsonl", "log.txt"
BEGUN_FILE = "begun.json"
"""Of a cell: its size, and the seconds of a processor that went into what it has. Written at each stage's end."""
POLL_S = 0.5


@dataclass(frozen=True)
class Failed:
    """A cell that ended without its row. reason: the last line that it wrote."""

    cell: Cell
    reason: str


def run(out: Path, plan: Plan, jobs: int, console: Console) -> list[Failed]:
    """Run the cells of a plan that have no row yet, `jobs` at a time. What fails is returned, the others go on.

    Raises RuntimeError if another process runs cells in this folder; ValueError for cells there of another size.
    """
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        left = [cell for cell in plan.cells if not _is_done(out / cell.name, plan.size)]
        # Shared by cells, so made before any of them runs.
        for cell in left:
            if cell.arm.recipe is None:
                continue
            _base(out, cell)
            _statistics(out, cell.task)
        return list(_deal(out, left, len(plan.cells), plan.size, jobs, console))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Of a grid's folder, or a file that `xr0 lab collect` wrote. Raises FileError; ValueError if none is there."""
    if folder.is_file():
        rows = [_checked(row, folder) for _, row in json_lines(folder, FileError)]
    else:
        rows = [_checked(read_json(path, FileError), path) for path in sorted(folder.rglob(ROW_FILE))]
    if not rows:
        raise ValueError(f"{folder}: expected cells with {ROW_FILE}, or a file of rows; there is none")
    return rows


def restore(rows: Path, out: Path) -> None:
    """Put the rows of a file of `xr0 lab collect` where their cells would lie, so that these count as done. Cells that
    have a row keep it. Raises FileError; ValueError if there is none, or a task or an arm is unknown."""
    for row in read_rows(rows):
        if row["arm"] not in ARMS:
            raise ValueError(f"{rows}: arm: expected one of {', '.join(ARMS)}, got {row['arm']!r}")
        file = out / Cell(find_task(row["task"]).name, ARMS[row["arm"]], row["seed"]).name / ROW_FILE
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(row, indent=1) + "\n")


def run_cell(cell: Cell, out: Path, size: Size) -> None:
    """Train, try and look into one cell, from wherever its folder stands; an expert is only tried. Raises ValueError
    for one of another size."""
    folder = out / cell.name
    spent = _Spent(folder, size)
    from xr0_engine.lab.inside import look

    engine = None if cell.arm.recipe is None else _trained(cell, out, size, spent)
    done = {Condition(entry["mode"], entry["delay_steps"]): entry for entry in _entries(folder)}
    for condition in conditions(cell.arm, size):
        if condition not in done:
            done[condition] = _try(cell, engine, condition, size)
            with (folder / CONDITIONS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[condition]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            spent.add()
    row = {
        "schema": SCHEMA,
        "task": cell.task,
        "arm": cell.arm.name,
        "seed": cell.seed,
        "size": asdict(size),
        "training": {} if engine is None else _training(folder / "train"),
        "conditions": [done[condition] for condition in conditions(cell.arm, size)],
        "inside": None if engine is None else asdict(look(engine, cell, size)),
        "code": current_commit(),
        "processor": processor(),
        "cpu_s": spent.add(),
    }
    write_whole(folder / ROW_FILE, json.dumps(row, indent=1) + "\n")
    # The model stays, for whoever wants to look at it; twice its size in optimiser states does not.
    shutil.rmtree(folder / "train" / "checkpoints", ignore_errors=True)


def _trained(cell: Cell, out: Path, size: Size, spent: _Spent) -> Engine:
    from xr0_engine.engine import Engine

    folder = out / cell.name / "train"
    if not (folder / "model").is_dir():
        _train(cell, out, folder, size)
        spent.add()
    return Engine.from_pretrained(folder / "model", "cpu", "float32", "reference")


class _Spent:
    """The processor time of a cell, over all its legs; what a killed leg did since its last stage is not in it."""

    def __init__(self, folder: Path, size: Size) -> None:
        self._path, self._size = folder / BEGUN_FILE, json.loads(json.dumps(asdict(size)))
        begun = read_json(self._path, FileError) if self._path.is_file() else {"size": self._size, "cpu_s": 0.0}
        if begun.get("size") != self._size:
            raise ValueError(f"{self._path}: size: begun with {begun.get('size')}: choose another folder")
        self._before = float(begun["cpu_s"]) - time.process_time()
        self.add()

    def add(self) -> float:
        """Seconds so far."""
        total = round(self._before + time.process_time(), 1)
        write_whole(self._path, json.dumps({"size": self._size, "cpu_s": total}))
        return total


def _train(cell: Cell, out: Path, folder: Path, size: Size) -> None:
    from xr0_engine.training.start import resume_run, start_run

    if (folder / CONFIG_FILE).is_file():
        resume_run(folder)
        return
    if folder.exists():
        # Ended before it had begun.
        shutil.rmtree(folder)
    start_run(training(cell, out, size), folder)


def training(cell: Cell, out: Path, size: Size) -> TrainConfig:
    """How a cell is trained: alike for all arms but for the arm's own changes. Raises ValueError for an arm without a
    recipe."""
    from xr0_engine.training.config import OptimConfig, RunConfig, override
    from xr0_engine.training.recipes import RECIPES, tiny

    if cell.arm.recipe is None:
        raise ValueError(f"{cell.name}: an expert is not trained")
    config = tiny(RECIPES[cell.arm.recipe]())
    steps = size.steps[cell.task]
    config = replace(
        config,
        optim=OptimConfig(steps, max(1, steps // 20), size.peak_lr, size.peak_lr / 100, weight_decay=0.01),
        run=RunConfig(seed=cell.seed, log_every=10, validate_every=steps, checkpoint_every=100, keep_last=1, threads=1),
        data=replace(
            config.data,
            robot=(f"xr0_engine.lab.demonstrations:{cell.task.replace('-', '_')}",),
            statistics=str(_statistics_file(out, cell.task)),
            chunk_length=CHUNK,
            batch_size=size.batch_size,
            workers=0,
            validation_samples=size.windows,
        ),
        # Random weights show a policy mostly what all pictures share.
        model=replace(config.model, checkpoint=str(_base_folder(out, cell)), standardize_vision=True),
        flow=replace(config.flow, repeat=size.repeat),
    )
    return override(config, cell.arm.changes)


def _try(cell: Cell, engine: Engine | None, condition: Condition, size: Size) -> dict[str, Any]:
    """One condition's entry in the row."""
    from xr0_engine.lab.benchmark import PointBenchmark
    from xr0_engine.lab.measures import measure
    from xr0_engine.lab.rollouts import roll_out, trials

    started, benchmark = time.monotonic(), PointBenchmark(cell.task)
    # Not the training seed: every policy of a task is tried in the same episodes, with the same noise.
    chosen = trials(benchmark, size.episodes, condition.mode, condition.delay_steps, size.trial_seed)
    rollouts = roll_out(engine, benchmark, chosen)
    pairs: list[tuple[Rollout, Rollout]] = []
    for missing, group in _by_first_event(rollouts[: size.twins]).items():
        twins = roll_out(engine, replace(benchmark, jumps=missing), [rollout.trial for rollout in group])
        pairs += zip(group, twins, strict=True)
    return {
        **asdict(condition),
        "episodes": len(rollouts),
        "successes": "".join(str(int(rollout.episode.success)) for rollout in rollouts),
        "measures": asdict(measure(find_task(cell.task), rollouts, pairs)),
        "wall_s": round(time.monotonic() - started, 1),
    }


def _by_first_event(rollouts: Sequence[Rollout]) -> dict[int, list[Rollout]]:
    """By the number of the first event that counts: no robot has the time to react to the others."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        first = next(number for number, event in enumerate(rollout.events) if event.counts)
        groups.setdefault(first, []).append(rollout)
    return groups


def _deal(out: Path, left: Sequence[Cell], planned: int, size: Size, jobs: int, console: Console) -> Iterator[Failed]:
    context = multiprocessing.get_context("spawn")
    waiting = list(left)
    running: dict[SpawnProcess, Cell] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("cells", total=planned, completed=planned - len(left))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    process = context.Process(target=_work, args=(cell, out, size), daemon=True)
                    process.start()
                    running[process] = cell
                progress.update(bar, description=", ".join(cell.name for cell in running.values()))
                time.sleep(POLL_S)
                for process in [process for process in running if not process.is_alive()]:
                    cell = running.pop(process)
                    progress.advance(bar)
                    if process.exitcode or not (out / cell.name / ROW_FILE).is_file():
                        failed = Failed(cell, f"exit code {process.exitcode}. {last_line(out / cell.name / LOG_FILE)}")
                        progress.console.print(f"{cell.name}: {failed.reason}", markup=False, highlight=False)
                        yield failed
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.join()


def _work(cell: Cell, out: Path, size: Size) -> None:
    """In a process of its own."""
    from xr0_engine.training.data.parallel import end_with_parent

    end_with_parent()
    folder = out / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        import torch

        torch.set_num_threads(1)
        run_cell(cell, out, size)


def _base(out: Path, cell: Cell) -> None:
    """The random checkpoint that a cell's run starts from: alike for all arms of a depth, and all tasks of a robot."""
    from xr0_engine.lab.sizes import write_base

    folder = _base_folder(out, cell)
    if not folder.is_dir():
        with whole_folder(folder) as partial:
            write_base(partial, find_task(cell.task), cell.arm.depth, cell.seed)


def _statistics(out: Path, task: str) -> None:
    from xr0_engine.training.data.stats import compute, merge

    file = _statistics_file(out, task)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        source = Path(f"xr0_engine.lab.demonstrations:{task.replace('-', '_')}")
        merge(file, compute([source], CHUNK, 0.1, 1), replace=False)


def _base_folder(out: Path, cell: Cell) -> Path:
    return out / "bases" / f"{find_task(cell.task).robot_type}-depth-{cell.arm.depth}-seed-{cell.seed}"


def _statistics_file(out: Path, task: str) -> Path:
    return out / "statistics" / f"{task}.json"


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Of the conditions that are done; a line that was cut off by a kill is taken out. Raises FileError."""
    path = folder / CONDITIONS_FILE
    if not path.is_file():
        return []
    entries = [entry for _, entry in json_lines(path, FileError)]
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))
    return entries


def _training(folder: Path) -> dict[str, Any]:
    """The end of a run's losses, and its open-loop errors."""
    lines = [entry for _, entry in json_lines(folder / METRICS_FILE, FileError)]
    losses = [line["loss"] for line in lines if "loss" in line][-5:]
    last = next(line for line in reversed(lines) if "validation/l1" in line)
    known = {name.rpartition("/")[2]: value for name, value in last.items() if name.startswith("validation/")}
    return {"loss": sum(losses) / len(losses)} | {k: v for k, v in known.items() if isinstance(v, float)}


def _is_done(folder: Path, size: Size) -> bool:
    path = folder / ROW_FILE
    if not path.is_file():
        return False
    row = _checked(read_json(path, FileError), path)
    if row["size"] != json.loads(json.dumps(asdict(size))):
        raise ValueError(
            f"{path}: size: this cell was run with {row['size']}: choose another folder for {asdict(size)}"
        )
    return True


def _checked(row: Any, path: Path) -> dict[str, Any]:
    """Raises FileError."""
    needed = {"schema": int, "task": str, "arm": str, "seed": int, "size": dict, "training": dict, "conditions": list}
    for name, kind in needed.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise FileError(f"{path}: {name}: expected {kind.__name__}: not a cell's row")
    if row["schema"] != SCHEMA:
        raise FileError(f"{path}: schema: expected {SCHEMA}, got {row['schema']}: of another version of xr0-engine")
    return dict(row)
