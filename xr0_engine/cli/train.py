"""`xr0 train`: recipes to checkpoints that the engine loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from xr0_engine.training.recipes import RECIPES, tiny

if TYPE_CHECKING:
    from xr0_engine.training.config import TrainConfig

app = typer.Typer(name="train", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as optim.steps=500.")
]
Run = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.callback()
def _train() -> None:
    """Train XR-0 or XR-1: a recipe with changes, into a run's folder (docs/training.md).

    More than one GPU: `torchrun --nproc-per-node 8 -m xr0_engine train RECIPE ...`.
    """


def _command(recipe: Callable[[], TrainConfig]) -> Callable[..., None]:
    def start(
        overrides: Overrides = None,
        out: Annotated[Path, typer.Option(help="The run's folder; it must be absent or empty.")] = Path(
            "outputs/train"
        ),
        is_tiny: Annotated[
            bool, typer.Option("--tiny", help="For a checkpoint of `xr0 init --size tiny`, on a CPU, in minutes.")
        ] = False,
        show: Annotated[bool, typer.Option("--show", help="Print the resolved config and do nothing.")] = False,
        memory: Annotated[
            float | None,
            typer.Option(
                min=0, help="GiB of the GPU that the run is for; --show then says what to change if it does not fit."
            ),
        ] = None,
    ) -> None:
        from xr0_engine.training.config import override

        config = override(tiny(recipe()) if is_tiny else recipe(), overrides or [])
        is_told = bool(config.model.checkpoint and config.data.statistics)
        if memory is not None and not (show and is_told):
            raise ValueError(
                "--memory: expected --show, model.checkpoint=... and data.statistics=... beside it, for a forecast"
            )
        if show:
            print(config.to_json(), flush=True)
            if is_told:
                from xr0_engine.training.start import forecast_settings

                Console(stderr=True, highlight=False, soft_wrap=True).print(forecast_settings(config, memory))
            return
        from xr0_engine.training.start import start_run

        start_run(config, out)

    start.__doc__ = recipe.__doc__
    return start


for _name, _recipe in RECIPES.items():
    app.command(_name)(_command(_recipe))


@app.command()
def resume(run: Run) -> None:
    """Go on after the last checkpoint, exactly as if nothing had happened."""
    from xr0_engine.training.start import resume_run

    resume_run(run)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to create; it must be absent or empty.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the last one if not given.")] = None,
    adapter: Annotated[
        bool,
        typer.Option("--adapter", help="Only what the run has trained, for Engine.from_pretrained(BASE, adapter=OUT)."),
    ] = False,
    average: Annotated[
        bool, typer.Option("--average", help="The moving average of the weights, of a run with optim.average.")
    ] = False,
) -> None:
    """Write a checkpoint of a run as a folder that the engine loads."""
    from xr0_engine.training.start import export_run

    base = export_run(run, out, step, adapter, average)
    if adapter:
        print(f"wrote {out}: Engine.from_pretrained({base!r}, adapter={str(out)!r})")
    else:
        print(f"wrote {out}\nnext: xr0 inspect {out}")
