"""An evaluation from what somebody asks for: which trials, which policy, how executed, where to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from xr0_engine import __version__
from xr0_engine.bench.results import current_commit, processor, utc_now
from xr0_engine.evaluation import policies
from xr0_engine.evaluation.benchmark import Benchmark, Mode, Run, Task
from xr0_engine.evaluation.desk import Desk
from xr0_engine.evaluation.episode import Execution, longest_prefix
from xr0_engine.evaluation.policies import Source
from xr0_engine.evaluation.progress import Bar
from xr0_engine.evaluation.results import Results, Writer, read_results
from xr0_engine.evaluation.runner import check, plan, run
from xr0_engine.evaluation.worker import Job, Video

if TYPE_CHECKING:
    from rich.console import Console

    from xr0_engine.engine import Engine

# Of the hang limit, what a server's reply may take: a process that waits for one is not hanging.
REPLY_SHARE = 0.8


@runtime_checkable
class ForSuites(Protocol):
    """A benchmark whose fields follow from the suites."""

    def for_suites(self, names: Sequence[str]) -> Benchmark: ...


@runtime_checkable
class HasDefaultSuites(Protocol):
    """A benchmark whose published rate is that of some of its suites."""

    default_suites: Sequence[str]


@runtime_checkable
class HasMostTrials(Protocol):
    """A benchmark with so many initial states for each task."""

    most_trials: int


@dataclass(frozen=True)
class Who:
    """The policy: exactly one of checkpoint, server, openpi and expert. device, dtype, backend, threads, batch: of the
    engine of a checkpoint; as Engine.from_pretrained, torch's threads on a CPU, and observations inferred together."""

    checkpoint: str | None = None
    server: str | None = None
    openpi: str | None = None
    expert: bool = False
    api_key: str | None = None
    ca_file: Path | None = None
    robot_type: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    backend: str = "auto"
    threads: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        given = [self.checkpoint is not None, self.server is not None, self.openpi is not None, self.expert]
        if sum(given) != 1:
            raise ValueError("CHECKPOINT, --server, --openpi, --expert: expected exactly one of them")
        own = ("device", "dtype", "backend", "threads", "batch")
        changed = [f"--{name}" for name in own if getattr(self, name) != getattr(Who, name)]
        if changed and self.checkpoint is None:
            raise ValueError(f"{', '.join(changed)}: expected only with a CHECKPOINT: a server has its own")
        if self.api_key is not None and self.server is None and self.openpi is None:
            raise ValueError("--api-key: expected only with --server or --openpi")
        if self.ca_file is not None and self.server is None:
            raise ValueError("--ca-file: expected only with --server")
        if self.robot_type is not None and (self.openpi is not None or self.expert):
            raise ValueError("--robot-type: expected only with a CHECKPOINT or --server")


@dataclass(frozen=True)
class Which:
    """Which trials. suites: none for the benchmark's default. tasks: by number, None for all. trials: of each task,
    None for the benchmark's own number. modes, delays: each with each."""

    suites: tuple[str, ...] = ()
    tasks: tuple[int, ...] | None = None
    trials: int | None = None
    modes: tuple[Mode, ...] = ("sync",)
    delays: tuple[float, ...] = (0.0,)
    seed: int = 0


@dataclass(frozen=True)
class How:
    """How the run is made. execute: None for the benchmark's. trigger, margin, max_prefix: as Execution. hang_s: as
    runner.run. wait_s: for a server to come, or to come back."""

    jobs: int = 1
    execute: int | None = None
    trigger: int | Literal["execute", "deadline"] = "execute"
    margin: int = 0
    max_prefix: int | None = None
    video: Video = "none"
    rerun: Video = "none"
    hang_s: float = 300.0
    wait_s: float = 300.0


def evaluate(benchmark: Benchmark, who: Who, which: Which, how: How, out: Path, console: Console) -> Results:
    """Run what is not yet in the folder, and read it.

    Raises ValueError for what does not fit, naming the option; RuntimeError for what is missing here; as runner.run.
    """
    if "guided" in which.modes and (who.expert or who.openpi is not None):
        raise ValueError("--mode guided: expected a CHECKPOINT or --server: a script or openpi's server takes no guide")
    benchmark = chosen(benchmark, which.suites, how.execute)
    tasks = chosen_tasks(benchmark, which.suites, which.tasks)
    check_trials(benchmark, which.trials)
    trials = plan(benchmark, tasks, which.trials, which.seed, which.modes, which.delays)
    versions = benchmark.versions()
    with ExitStack() as stack:
        source, desk, gpu = _source(who, benchmark, how, stack)
        execution = Execution(benchmark.rate_hz, benchmark.execute, how.trigger, how.margin, how.max_prefix, which.seed)
        job = Job(benchmark, source, execution, out, how.video, how.rerun)
        check(job, trials)
        this = Run(
            benchmark=benchmark.name,
            protocol=benchmark.protocol(),
            versions=versions,
            policy={**source.told, "max_prefix": None if source.info is None else longest_prefix(source.info)},
            execution=execution.as_json(),
            code={"version": __version__, "commit": current_commit()},
            machine={"processor": processor(), "gpu": gpu},
            created=utc_now(),
        )
        writer = stack.enter_context(Writer(out, this, [trial.key for trial in trials]))
        succeeded = sum(episode.success for episode in writer.done.values())
        planned = len({*writer.done, *(trial.key for trial in trials)})
        try:
            with Bar(console, planned, len(writer.done), succeeded) as bar:
                run(job, trials, writer, bar, how.jobs, how.hang_s, desk)
        except BaseException:
            console.print(
                f"{len(writer.done)} of {planned} episodes are in {out}; the same command goes on from there",
                markup=False,
                highlight=False,
            )
            raise
    return read_results(out)


def chosen(benchmark: Benchmark, suites: Sequence[str], execute: int | None) -> Benchmark:
    """The benchmark as these suites and the option need it."""
    if isinstance(benchmark, ForSuites):
        benchmark = benchmark.for_suites([name for name in suites if name != "all"])
    if execute is not None:
        made: Any = benchmark
        benchmark = replace(made, execute=execute)
    return benchmark


def chosen_tasks(benchmark: Benchmark, suites: Sequence[str], numbers: Sequence[int] | None) -> list[Task]:
    """In the order of the suites. `all`, or none: the benchmark's default ones. Raises ValueError that lists what there
    is."""
    known = benchmark.suites()
    names: list[str] = []
    for name in suites or ("all",):
        if name == "all":
            names += benchmark.default_suites if isinstance(benchmark, HasDefaultSuites) else known
        elif name in known:
            names.append(name)
        else:
            raise ValueError(f"--suite: expected one of {', '.join(known)} or all; got {name!r}")
    tasks = []
    for name in dict.fromkeys(names):
        by_number = {task.index: task for task in known[name]}
        for number in by_number if numbers is None else numbers:
            if number not in by_number:
                there = ", ".join(f"{task.index} {task.name}" for task in by_number.values())
                raise ValueError(f"--task: expected one of suite {name}: {there}; got {number}")
            tasks.append(by_number[number])
    return tasks


def check_trials(benchmark: Benchmark, trials: int | None) -> None:
    if isinstance(benchmark, HasMostTrials) and trials is not None and trials > benchmark.most_trials:
        raise ValueError(
            f"--trials: expected at most {benchmark.most_trials}, as many as {benchmark.name} has initial states for a "
            f"task, got {trials}"
        )


def read_modes(text: str) -> tuple[Mode, ...]:
    """`sync,async`. Raises ValueError that lists them."""
    modes = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if unknown := [mode for mode in modes if mode not in get_args(Mode)]:
        raise ValueError(f"--mode: expected {', '.join(get_args(Mode))}, with commas between; got {unknown[0]!r}")
    return modes  # type: ignore[return-value]


def read_delays(text: str) -> tuple[float, ...]:
    """`0-6`, `0,2,4` or `2.5`. Raises ValueError."""
    delays: list[float] = []
    for word in text.split(","):
        low, dash, high = word.strip().partition("-")
        try:
            delays += range(int(low), int(high) + 1) if dash else [float(low)]
        except ValueError:
            delays.append(-1)
    if not delays or not all(0 <= delay < 1000 for delay in delays):
        raise ValueError(f"--delay-steps: expected steps such as 3, 0-6 or 0,2.5; got {text!r}")
    return tuple(dict.fromkeys(map(float, delays)))


def read_numbers(name: str, text: str) -> tuple[int, ...]:
    """`3` or `0,4`. Raises ValueError that names the option."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{name}: expected whole numbers with commas between, got {text!r}")
    return tuple(dict.fromkeys(map(int, words)))


def _source(who: Who, benchmark: Benchmark, how: How, stack: ExitStack) -> tuple[Source, Desk | None, str | None]:
    """The policy, its engine and its GPU, as far as they are in this process."""
    reply_s = REPLY_SHARE * how.hang_s
    if who.server is not None:
        return (
            policies.of_server(who.server, who.api_key, who.ca_file, who.robot_type, benchmark, how.wait_s, reply_s),
            None,
            None,
        )
    if who.openpi is not None:
        return policies.of_openpi(who.openpi, who.api_key, benchmark, how.wait_s, reply_s), None, None
    if who.checkpoint is None:
        return policies.of_expert(), None, None
    desk = stack.enter_context(Desk(_loading(who), who.batch))
    source = policies.of_engine(desk.engine, who.checkpoint, who.robot_type, benchmark, who.dtype)
    return replace(source, told={**source.told, "batch": who.batch}), desk, _gpu(desk.engine)


def _loading(who: Who) -> Callable[[], Engine]:
    def load() -> Engine:
        import torch

        from xr0_engine.engine import Engine

        if who.threads is not None:
            torch.set_num_threads(who.threads)
        assert who.checkpoint is not None
        return Engine.from_pretrained(who.checkpoint, who.device, who.dtype, who.backend)

    return load


def _gpu(engine: Engine) -> str | None:
    import torch

    device = engine.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
