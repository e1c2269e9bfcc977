"""xr0 eval: success rates in simulation, at rest and under inference delay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xr0_engine.cli.evaluating import evaluating

if TYPE_CHECKING:
    from xr0_engine.evaluation.benchmark import Benchmark

app = typer.Typer(name="eval", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def _eval() -> None:
    """Success rates of a checkpoint, a server or a scripted expert in simulation, at rest and under inference delay.

    A run that ends for whatever reason is continued by the same command. docs/evaluation.md tells what is measured.
    """


@app.command()
@evaluating
def libero(
    env_seed: Annotated[int, typer.Option(min=0, help="Of the simulator, which places what a state does not.")] = 7,
    wait_steps: Annotated[int, typer.Option(min=0, help="Before the policy's first look.")] = 10,
    image_size: Annotated[int, typer.Option(min=32, max=2048, help="Pixels, width and height of both views.")] = 256,
    plain_text: Annotated[bool, typer.Option(help="The instruction as the task has it: openpi's models.")] = False,
    text: Annotated[
        str, typer.Option(help="Words from the task's name or its file; auto: file in *_lan, *_task.")
    ] = "auto",
    new_env: Annotated[bool, typer.Option(help="A new environment for each trial: the same results, slower.")] = False,
) -> Benchmark:
    """LIBERO and LIBERO-PRO: one Franka arm, 20 Hz, by the released protocol (extra `libero`)."""
    from xr0_engine.evaluation.libero import Libero

    return Libero(
        env_seed=env_seed,
        wait_steps=wait_steps,
        image_size=image_size,
        sentence=not plain_text,
        text=text,  # type: ignore[arg-type]
        keep=not new_env,
    )


@app.command()
@evaluating
def aloha(
    horizon_steps: Annotated[int, typer.Option(min=1, help="Suite transfer: of a trial.")] = 240,
    minutes: Annotated[float, typer.Option(min=0.1, help="Suite throughput: simulated time of a run.")] = 30.0,
    piece_timeout_s: Annotated[float, typer.Option(min=0.1, help="Suite throughput: what a piece may take.")] = 20.0,
) -> Benchmark:
    """ALOHA: two arms hand a cube over, 30 Hz; success, or pieces a minute (extra `sim`)."""
    from xr0_engine.evaluation.aloha import Aloha

    return Aloha(horizon_steps=horizon_steps, minutes=minutes, piece_timeout_s=piece_timeout_s)


@app.command()
@evaluating
def calvin(
    dataset: Annotated[str | None, typer.Option(metavar="DIR", help="A CALVIN dataset with scene D.")] = None,
    sequences: Annotated[str | None, typer.Option(metavar="FILE", help="JSON of chains; else CALVIN's own.")] = None,
    config: Annotated[str | None, typer.Option(metavar="DIR", help="Of new_playtable_*.yaml; else CALVIN's.")] = None,
) -> Benchmark:
    """CALVIN: chains of five subtasks, on your own calvin_env and calvin_agent."""
    from xr0_engine.evaluation.calvin import Calvin

    return Calvin(dataset=dataset, sequences=sequences, config=config)


@app.command()
@evaluating
def simpler(
    repeats: Annotated[int | None, typer.Option(min=1, help="How often each setup counts; else as released.")] = None,
    reuse_env: Annotated[
        bool, typer.Option("--reuse-env", help="One environment for all episodes of a scene.")
    ] = False,
) -> Benchmark:
    """SimplerEnv: WidowX and Google robot, on your own simpler_env."""
    from xr0_engine.evaluation.simpler import Simpler

    return Simpler(repeats=repeats, fresh_env=not reuse_env)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Results.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Results of the same trials.")],
    across: Annotated[str, typer.Option(help="What may differ: policy, code or versions.")] = "policy",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """B against A, trial by trial (McNemar's test). Exit code 1: B is worse."""
    import json

    from xr0_engine.evaluation import compare as module

    found = module.compare(a, b, across)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(module.as_json(found)))
    else:
        module.show(found)
    raise typer.Exit(1 if found.verdict == "worse" else 0)


@app.command()
def page(folder: Annotated[Path, typer.Argument(help="Results.")]) -> None:
    """A folder's results as one self-contained web page, page.html."""
    from xr0_engine.evaluation.page import write_page

    print(write_page(folder))


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Results.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A folder's results as tables, beside the published figures."""
    import json

    from xr0_engine.evaluation import results, tables

    found = results.read_results(folder)
    if as_json:
        print(json.dumps(tables.summary(found)))
    else:
        tables.show_results(found)
