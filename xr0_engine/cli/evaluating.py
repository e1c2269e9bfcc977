"""What the benchmarks of `xr0 eval` have in common: options, and how an evaluation is started."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from xr0_engine.evaluation.benchmark import Benchmark

COMMON: dict[str, tuple[Any, Any]] = {
    "checkpoint": (Annotated[str | None, typer.Argument(help="Checkpoint folder, or a Hugging Face hub id.")], None),
    "out": (
        Annotated[Path, typer.Option(metavar="DIR", help="Results; a folder of the same run is continued.")],
        inspect.Parameter.empty,
    ),
    "server": (
        Annotated[str | None, typer.Option(metavar="URL", help="ws://host:port of an `xr0 serve` instead.")],
        None,
    ),
    "openpi": (
        Annotated[str | None, typer.Option(metavar="URL", help="A server of openpi's protocol instead (π0, π0.5).")],
        None,
    ),
    "expert": (
        Annotated[bool, typer.Option("--expert", help="The benchmark's scripted policy instead, which looks inside.")],
        False,
    ),
    "api_key": (
        Annotated[str | None, typer.Option(help="For a server that asks for one; of ours also XR0_API_KEY.")],
        None,
    ),
    "ca_file": (
        Annotated[Path | None, typer.Option(metavar="FILE.pem", help="Certificates to trust, for a wss:// server.")],
        None,
    ),
    "robot_type": (Annotated[str | None, typer.Option(help="The policy's robot type, if it has several.")], None),
    "suite": (Annotated[str, typer.Option(help="Suites, with commas; all: those of the published average.")], "all"),
    "task": (Annotated[str | None, typer.Option(help="Numbers of tasks, with commas; all, if not given.")], None),
    "trials": (
        Annotated[int | None, typer.Option(min=1, help="Of each task; the released number, if not given.")],
        None,
    ),
    "mode": (
        Annotated[str, typer.Option(help="sync, naive (async without prefix), async, guided; with commas.")],
        "sync",
    ),
    "delay_steps": (
        Annotated[str, typer.Option(help="Control steps that an inference takes: 3, 0-6 or 0,2.5.")],
        "0",
    ),
    "seed": (Annotated[int, typer.Option(min=0, help="Of the policy's noise, and of what a benchmark draws.")], 0),
    "jobs": (Annotated[int, typer.Option(min=1, help="Processes that simulate.")], 1),
    "video": (Annotated[str, typer.Option(help="none, failures or all.")], "none"),
    "rerun": (
        Annotated[str, typer.Option(help="none, failures or all: those in rerun, in OUT/rerun (extra `viz`).")],
        "none",
    ),
    "execute": (Annotated[int | None, typer.Option(min=1, help="Actions of each chunk that are executed.")], None),
    "trigger": (
        Annotated[
            str,
            typer.Option(help="Modes but sync: infer every --execute actions (execute), deadline, or a number left."),
        ],
        "execute",
    ),
    "margin": (Annotated[int, typer.Option(min=0, help="Modes async, guided: committed actions beyond the delay.")], 0),
    "max_prefix": (Annotated[int | None, typer.Option(min=0, help="Mode async: the policy's, if not given.")], None),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")], "auto"),
    "dtype": (Annotated[str, typer.Option(help="bfloat16, float16 or float32.")], "bfloat16"),
    "backend": (Annotated[str, typer.Option(help="auto, reference or triton.")], "auto"),
    "threads": (Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if not given.")], None),
    "batch": (
        Annotated[int, typer.Option(min=1, help="Observations inferred together; above 1 last bits are chance.")],
        1,
    ),
    "hang_s": (
        Annotated[float, typer.Option(min=1, help="A simulator silent for so long is ended, and replaced.")],
        300,
    ),
    "wait_s": (Annotated[float, typer.Option(min=0.1, help="For a server to come, or to come back.")], 300),
}
"""Options of every benchmark: annotation and default."""


def evaluating(make: Callable[..., Benchmark]) -> Callable[..., None]:
    """A command of a function that makes a benchmark of its own options: COMMON's come with them."""
    signature = inspect.signature(make, locals={"Benchmark": Any}, eval_str=True)
    own = {name: (each.annotation, each.default) for name, each in signature.parameters.items()}

    @functools.wraps(make)
    def run(**given: Any) -> None:
        benchmark = make(**{name: given.pop(name) for name in own})
        _run(benchmark, **given)

    options = COMMON | own
    # What typer reads of a command.
    run.__annotations__ = {name: annotation for name, (annotation, _) in options.items()}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
    )
    return run


def _run(benchmark: Benchmark, out: Path, **given: Any) -> None:
    from rich.console import Console

    from xr0_engine import env
    from xr0_engine.evaluation import start

    for name in ("video", "rerun"):
        if given[name] not in ("none", "failures", "all"):
            raise ValueError(f"--{name}: expected none, failures or all, got {given[name]!r}")
    trigger: str = given["trigger"]
    if trigger not in ("execute", "deadline") and not (trigger.isdecimal() and int(trigger)):
        raise ValueError(f"--trigger: expected execute, deadline or a number above 0, got {trigger!r}")
    names = ("checkpoint", "server", "openpi", "expert", "ca_file", "robot_type", "device", "dtype", "backend")
    api_key: str | None = given["api_key"]
    if api_key is None and given["server"] is not None:
        # Of ours alone: it is no business of somebody else's server.
        api_key = env.api_key()
    who = start.Who(**{name: given[name] for name in (*names, "threads", "batch")}, api_key=api_key)
    which = start.Which(
        suites=tuple(name.strip() for name in given["suite"].split(",")),
        tasks=None if given["task"] is None else start.read_numbers("--task", given["task"]),
        trials=given["trials"],
        modes=start.read_modes(given["mode"]),
        delays=start.read_delays(given["delay_steps"]),
        seed=given["seed"],
    )
    own = ("jobs", "execute", "margin", "max_prefix", "video", "rerun", "hang_s", "wait_s")
    how = start.How(
        **{name: given[name] for name in own},
        trigger=trigger if trigger in ("execute", "deadline") else int(trigger),  # type: ignore[arg-type]
    )
    console = Console(stderr=True)
    results = start.evaluate(benchmark, who, which, how, out, console)
    from xr0_engine.evaluation import page as pages
    from xr0_engine.evaluation import tables

    tables.show_results(results)
    print(f"page: {pages.write_page(out)}")
