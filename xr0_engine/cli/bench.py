"""xr0 bench: measurements that anyone can repeat, each command a module of xr0_engine.bench."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from xr0_engine.cli.machine import machine
from xr0_engine.cli.memory import memory
from xr0_engine.cli.seams import seams
from xr0_engine.cli.telling import check_file, compare, report
from xr0_engine.sizes import PUBLISHED, size_of

if TYPE_CHECKING:
    from xr0_engine.bench.cases import Setup
    from xr0_engine.bench.results import Result

    Measured: TypeAlias = "tuple[tuple[Result, BaseException | None], Callable[[Result], None]]"
    """The result and what cut it short, and how to show it."""

Size = Annotated[
    str,
    typer.Option(
        help="Random weights: tiny, small or 4b (8.8 GiB, the published sizes); of XR-1 tiny or 5b (9.5 GiB); "
        "published: 4b or 5b, as the case has it."
    ),
]
Checkpoint = Annotated[str | None, typer.Option(help="Your own checkpoint instead: folder or Hugging Face hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Rounds = Annotated[int, typer.Option(help="How often each is measured.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every sample and the environment here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CaseName = Annotated[
    str, typer.Option("--case", help="libero, bimanual, two_views or stress; of XR-1: robodojo or robocasa365.")
]
Backend = Annotated[str, typer.Option(help="What runs the engine: auto, reference or triton.")]

QUANTIZE = {
    "quantize": (
        Annotated[str | None, typer.Option(help="In 8 bits, by a recipe of docs/quantization.md: int8, for one.")],
        None,
    )
}
"""Beside SETUP, of commands that know 8 bits."""

SETUP: dict[str, tuple[Any, Any]] = {
    "case": (CaseName, "libero"),
    "size": (Size, "small"),
    "checkpoint": (Checkpoint, None),
    "device": (Device, "auto"),
    "dtype": (Dtype, "bfloat16"),
    "threads": (Annotated[int | None, typer.Option(help="CPU threads; torch's choice if not given.")], None),
}
"""Options that make a Setup: annotation and default."""

app = typer.Typer(name="bench", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def _bench() -> None:
    """Measure the engine on this machine, against its rivals, its bounds and its past.

    Random checkpoints (`--size`) are made on first use and kept in XR0_CACHE; nothing is downloaded. Ctrl-C keeps what
    was measured so far, marked as incomplete.
    """


def _measuring(
    backend: Any = Backend, **changed: tuple[Any, Any]
) -> Callable[[Callable[..., Measured]], Callable[..., None]]:
    """A command of a function (setup, own options) that measures: SETUP's options come before its own, --backend (None:
    it has none) and --json behind them; what it returns is written and shown. changed: as SETUP, instead."""
    before = {**SETUP, **changed}
    behind = ({} if backend is None else {"backend": (backend, "auto")}) | {"json_file": (JsonFile, None)}

    def command(measure: Callable[..., Measured]) -> Callable[..., None]:
        signature = inspect.signature(measure, locals={"Setup": Any, "Measured": Any}, eval_str=True)
        _, *own = signature.parameters.values()
        options = before | {each.name: (each.annotation, each.default) for each in own} | behind

        @functools.wraps(measure)
        def run(json_file: Path | None, backend: str = "auto", **given: Any) -> None:
            check_file(json_file)
            setup = _setup(**{name: given.pop(name) for name in before}, backend=backend)
            measured, show = measure(setup, **given)
            _deliver(*measured, show, json_file)

        # What typer reads of a command.
        run.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return app.command()(run)

    return command


@_measuring(**QUANTIZE)
def latency(
    setup: Setup,
    rounds: Rounds = 100,
    part: Annotated[str, typer.Option(help="all, or dit: the action head alone, which needs no checkpoint.")] = "all",
    boundary: Annotated[
        str | None,
        typer.Option(
            help="What is timed: stage (each stage), infer (the whole call) or websocket (through the server)."
        ),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Only the engine, without the released way beside it.")
    ] = False,
    attention: Annotated[str, typer.Option(help="Attention of the released way: sdpa, eager or flash.")] = "sdpa",
    compiled: Annotated[
        bool, typer.Option("--compile", help="A third rival: the released way under torch.compile (takes minutes).")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(help="A folder of `xr0 export` for this case, as a further rival.")
    ] = None,
    export_backend: Annotated[str, typer.Option(help="What runs the export: onnx, tensorrt or auto.")] = "auto",
    guided: Annotated[bool, typer.Option("--guided", help="A call with a guide as a further rival.")] = False,
) -> Measured:
    """The engine against the released way to run the model, per stage, taking turns in one run.

    Nothing is timed before both have given the same actions. A dash stands for a percentile that so few rounds cannot
    tell: p99 takes 100 rounds, p99.9 takes 1000.
    """
    from xr0_engine.bench.measure import latency as module

    options = (part, boundary, alone, attention, compiled, export, export_backend, guided)
    return module.measure(setup, rounds, _command(), *options), module.show


@_measuring(**QUANTIZE)
def throughput(
    setup: Setup,
    rounds: Rounds = 20,
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,2,4,8",
) -> Measured:
    """Chunks per second against batch size."""
    from xr0_engine.bench.measure import throughput as module

    try:
        sizes = [int(word) for word in batches.split(",")]
    except ValueError:
        raise ValueError(f"batches: expected whole numbers with commas between, got {batches!r}") from None
    return module.measure(setup, sizes, rounds, _command()), module.show


@_measuring(**QUANTIZE)
def coldstart(
    setup: Setup,
    rounds: Annotated[int, typer.Option(help="How many processes are started.")] = 5,
    evict: Annotated[
        bool, typer.Option("--evict", help="Ask the kernel to drop the weights from its page cache before each.")
    ] = False,
) -> Measured:
    """From the start of a fresh process to its first action, weights on disk."""
    from xr0_engine.bench.measure import coldstart as module

    return module.measure(setup, rounds, evict, _command()), module.show


@_measuring(**QUANTIZE)
def jitter(
    setup: Setup,
    rate: Annotated[float, typer.Option(help="Ticks per second.")] = 30.0,
    seconds: Annotated[float, typer.Option(help="How long the loop runs.")] = 10.0,
) -> Measured:
    """A control loop of fixed rate that infers in every tick: tail of the latency, missed deadlines, steadiness."""
    from xr0_engine.bench.measure import jitter as module

    return module.measure(setup, rate, seconds, _command()), module.show


@_measuring(backend=Annotated[str, typer.Option(help="auto, reference or triton.")])
def kernels(setup: Setup, rounds: Rounds = 20) -> Measured:
    """Every op and GEMM of a case alone, beside its bound on this machine.

    Makes and reads no weights; with --backend triton: the calls of one of the engine's own steps, with its tactics.
    """
    from xr0_engine.bench.step import kernels as module
    from xr0_engine.bench.step import step_kernels

    measure = step_kernels.measure if setup.backend == "triton" else module.measure
    return measure(setup, rounds, _command()), module.show


@app.command()
def images(
    device: Device = "cpu",
    rounds: Rounds = 100,
    json_file: JsonFile = None,
) -> None:
    """Camera frames to patches on one thread: against transformers' image processor, Pillow's resize and a plain copy.

    Nothing is timed before all bits agree. On a GPU: three frames by its own clock, with and without the upload.
    """
    from xr0_engine.bench.measure import images as module

    check_file(json_file)
    _deliver(*module.measure(device, rounds, _command()), module.show, json_file)


@_measuring(backend=None)
def ablate(setup: Setup, rounds: Rounds = 20) -> Measured:
    """What each optimisation buys on this machine: the engine against itself without one of them."""
    from xr0_engine.bench.measure import ablate as module

    return module.measure(setup, rounds, _command()), module.show


@_measuring(backend=None)
def finetune(setup: Setup, rounds: Rounds = 10) -> Measured:
    """A step of the recipe finetune_head by the trainer itself, on fabricated samples: time and memory."""
    from xr0_engine.bench.measure import finetune as module

    return module.measure(setup, rounds, _command()), module.show


@_measuring(
    backend=None,
    size=(Size, PUBLISHED),
    **QUANTIZE,
)
def roofline(
    setup: Setup,
    chip: Annotated[
        str,
        typer.Option(help="a100, h100, h200, l40s, rtx4090, rtx5090; here: what this machine is measured to reach."),
    ] = "rtx4090",
    operators: Annotated[bool, typer.Option("--operators", help="List every operator, not only the stages.")] = False,
) -> Measured:
    """The least that a case can take on a chip: arithmetic and memory traffic of every operator. Times nothing."""
    from xr0_engine.bench.step import roofline as module

    show = functools.partial(module.show, list_operators=operators)
    return (module.measure(setup, chip, _command()), None), show


@_measuring(backend=None, size=(Size, PUBLISHED))
def predict(
    setup: Setup,
    chip: Annotated[str, typer.Option(help="a100, rtx3090, rtx4090, l40s, h100, h200, b200 or rtx5090.")] = "rtx4090",
    flow: Annotated[str | None, typer.Option(help="How the flow runs; the table's way if not given.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Tactics of `xr0 bench tune`; the stated defaults if not given."),
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="List every kind of launch, not only the stages.")] = False,
    validate: Annotated[
        bool, typer.Option("--validate", help="Instead: the model against what others measured and published.")
    ] = False,
) -> Measured:
    """What a step takes on a chip that need not be here, by a model: kernel by kernel, with a range. Times nothing.

    Compiles every kernel for the chip, which takes a minute or two. docs/benchmarks.md tells how far to trust it.
    """
    from xr0_engine.bench.predict import run as module

    if validate:
        from xr0_engine.bench.predict import validate as published

        return (published.measure(_command()), None), published.show
    show = functools.partial(module.show, list_kernels=kernels)
    return (module.measure(setup, chip, flow, table, _command()), None), show


@app.command("compile")
def compile_(
    arch: Annotated[int, typer.Option(help="Compute capability: 80, 86, 89 (RTX 4090), 90 (H200), 100, 120.")],
    case: CaseName = "bimanual",
    size: Size = PUBLISHED,
    checkpoint: Checkpoint = None,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Compile every Triton kernel of a step for a chip that need not be here: registers, spills, shared memory.

    Takes a minute or two; Triton keeps what it compiled. Exit code 1 if a kernel does not fit the chip or spills.
    """
    from xr0_engine.bench.step.compile import run

    if not run(_setup(case, size, checkpoint, "cpu", dtype, None), arch, as_json):
        raise typer.Exit(1)


@app.command()
def tune(
    cases: Annotated[
        str, typer.Option("--case", help="Cases whose shapes are tuned, with commas.")
    ] = "libero,bimanual",
    size: Size = PUBLISHED,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    minutes: Annotated[float, typer.Option(help="After so many no further op is begun; the rest keep defaults.")] = 5.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Instead of XR0_CACHE/tactics.")] = None,
    predicted: Annotated[
        bool, typer.Option("--predict", help="By a model, for a chip that need not be here: into the package's tables.")
    ] = False,
    chip: Annotated[str, typer.Option(help="With --predict: as `xr0 bench predict` has it.")] = "h200",
) -> None:
    """Measure which kernel variant is fastest for each op of a step on this GPU, and write the table that says so.

    A variant is timed only after it has given what the default gives. The engine reads the table when it loads.
    """
    from xr0_engine.bench.cases import find_case
    from xr0_engine.bench.step import tune as module

    if out is not None:
        check_file(out, "--out")
    found = [find_case(name.strip()) for name in cases.split(",")]
    if predicted:
        from xr0_engine.bench.predict import tables

        # Each of its own family's sizes.
        setups = [_setup(case.name, size, checkpoint, "cpu", dtype, None, "triton") for case in found]
        tables.run(setups, chip, minutes, out)
        return
    if len({case.family for case in found}) > 1:
        # One checkpoint is measured; what is predicted needs none.
        raise ValueError(
            f"--case: expected cases of one model family, got {cases}; name those of the model that you run"
        )
    module.run(_setup(found[0].name, size, checkpoint, device, dtype, None, "triton"), found, minutes, out)


@app.command()
def graph(
    case: CaseName = "libero",
    size: Size = "small",
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """What the captured CUDA graphs hold, read back from the driver: nodes by kind, kernels by name. Times nothing."""
    from xr0_engine.bench.measure.replay import run

    run(_setup(case, size, checkpoint, device, dtype, None, "triton"), as_json)


app.command(context_settings={"ignore_unknown_options": True})(compare)
app.command()(memory)
app.command()(seams)
app.command()(report)
app.command()(machine)


def _setup(
    case: str,
    size: str,
    checkpoint: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    backend: str = "auto",
    quantize: str | None = None,
) -> Setup:
    from xr0_engine.bench.cases import Setup, find_case

    found = find_case(case)
    return Setup(found, size_of(found.family, size), checkpoint, device, dtype, threads, backend, quantize)


def _command() -> str:
    """What was typed, for the result."""
    return shlex.join(["xr0", *sys.argv[1:]])


def _deliver(result: Result, reason: BaseException | None, show: Callable[[Any], None], json_file: Path | None) -> None:
    """Write and show what was measured; what cut it short then takes its course."""
    from xr0_engine.bench.results import write

    if json_file is not None:
        write(result, json_file)
    show(result)
    if reason is not None:
        raise reason
