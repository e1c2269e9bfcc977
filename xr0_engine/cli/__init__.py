"""The command `xr0`. Each command is a function in a file of its own, both named as the command.

To add one, write xr0_engine/cli/<command>.py with `def <command>(...)`, and list it in COMMANDS; one with commands of
its own has a Typer `app` of that name instead. A command file imports what is heavy inside its functions, so that
`xr0 --help` stays quick and works without the optional packages.

Exit codes: 0 done; 1 done, and the answer is no (`verify`, `doctor`, `bench compare`); 2 a mistake in the call or its
files, or something this machine lacks, told in one line; 130 interrupted, 143 terminated. Anything else is a bug and
shows its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from xr0_engine import __version__

COMMANDS = (
    "demo",
    "init",
    "infer",
    "verify",
    "inspect",
    "doctor",
    "bench",
    "data",
    "guard",
    "serve",
    "drive",
    "eval",
    "lab",
    "replay",
    "train",
    "export",
    "quantize",
    "convert",
    "push",
)

LONGEST_MESSAGE = 4000
"""Characters of an error: a dozen tensors with their shapes, not the content of a file."""

EXTRAS = {
    "torch": "cpu",
    "huggingface_hub": "cpu",
    "triton": "cuda",
    "prometheus_client": "serve",
    "ray": "ray",
    "onnx": "export",
    "onnxruntime": "export",
    "transformers": "train",
    "pyarrow": "train",
    "tensorboard": "train",
    "matplotlib": "plot",
    "rerun": "viz",
    "av": "sim",
    "gym_aloha": "sim",
    "mujoco": "sim",
    "dm_control": "sim",
}
"""Optional package, as it is imported -> the extra of xr0-engine that installs it."""


def install_hint(module: str) -> str:
    """How to get an optional package, a key of EXTRAS."""
    if module in ("gym_aloha", "dm_control") and sys.version_info >= (3, 13):
        return "the simulator needs Python 3.12 or older (labmaze, which it uses, has no wheels for newer ones)"
    return f"pip install 'xr0-engine[{EXTRAS[module]}]'"


class _Commands(TyperGroup):
    """Imports a command's file when the command is looked up, and reports errors as the module says."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"{__name__}.{cmd_name}")
        if hasattr(module, "app"):
            return typer.main.get_command(module.app)
        single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        single.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(single)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):
            # Typer's own business; the first two are RuntimeErrors, the last an OSError.
            raise
        except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
            message = _explain(error)
            if message is None:
                raise
            # One line, whatever a library's message or a file's content makes of it.
            print(f"xr0: error: {' '.join(message.split())[:LONGEST_MESSAGE]}", file=sys.stderr)
            raise typer.Exit(2) from None


def _explain(error: Exception) -> str | None:
    """What to tell the user; None if the error is a bug."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return f"{module} is not installed: {install_hint(module)}" if module in EXTRAS else None
    if isinstance(error, RuntimeError) and not _raised_by_us(error):
        return None
    return str(error)


def _raised_by_us(error: Exception) -> bool:
    """Whether the error comes from a `raise` in this package. torch reports its own failures as RuntimeError too."""
    origin = traceback.extract_tb(error.__traceback__)[-1]
    package = Path(__file__).parent.parent
    return Path(origin.filename).is_relative_to(package) and (origin.line or "").startswith("raise ")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"xr0-engine {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _xr0(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Camera images and an instruction in, robot actions out: the model Xiaomi-Robotics-0.

    New here? `xr0 doctor` tells what this machine can do, and `xr0 demo` drives a simulated two-armed robot.
    """


def _terminate(process: int, number: int, frame: object) -> None:
    # What forks of this process inherit: they end as if there were no handler.
    if os.getpid() != process:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    # A second signal does not wait for what the first one began.
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the console script; ends the process with the exit code.

    SIGTERM ends a command as an error does: what it has half written is removed.
    """
    signal.signal(signal.SIGTERM, partial(_terminate, os.getpid()))
    app(prog_name="xr0")
