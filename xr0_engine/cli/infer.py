"""`xr0 infer`: one observation from files, one action chunk out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    from xr0_engine.robot.embodiment import Embodiment
    from xr0_engine.types import ActionChunk

SHOWN_STEPS = 6
MOST_NUMBERS = 1 << 20
"""In a file of states or actions: a thousand of a thousand columns."""


def infer(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a Hugging Face hub id.")],
    instruction: Annotated[str, typer.Option("--instruction", "-t", help="What the robot shall do, in plain words.")],
    image: Annotated[
        list[str],
        typer.Option(
            "--image",
            "-i",
            metavar="VIEW=FILE",
            help="A camera image; once for every view, such as base=front.png; where the robot's views are videos, "
            "their frames one after the other, the oldest first (too few: the oldest again).",
        ),
    ],
    state: Annotated[
        str | None,
        typer.Option(
            help="Joint and gripper readings in the model's columns and the robot's own units: 0.1,-0.5,... or a .json "
            "or .npy file. Zeros if not given."
        ),
    ] = None,
    robot_type: Annotated[
        str | None, typer.Option(help="Which of the checkpoint's action statistics to use; needed if it has several.")
    ] = None,
    embodiment: Annotated[
        str | None,
        typer.Option(help="Views and layout: a built-in profile or your own YAML file. Follows from the robot type."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Repeatable result: the noise that the chunk grows from.")] = None,
    prefix: Annotated[
        Path | None,
        typer.Option(help=".json or .npy file with the first actions, (P, columns), if they are already decided."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="auto, reference or triton.")] = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Infer so often, report the last: the first pays for set-up.")] = 1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the chunk beside the images.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole chunk as JSON.")] = False,
) -> None:
    """From camera images and an instruction to the robot's next actions.

    `xr0 infer CHECKPOINT -i base=front.png -i left_wrist=hand.png -t "Open the drawer." --robot-type libero_all`
    """
    views = read_views("--image", image)
    given_state = None if state is None else read_numbers("--state", state)
    given_prefix = None if prefix is None else read_numbers("--prefix", str(prefix))
    if plot is not None and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):
        raise ValueError(f"--plot: expected a .png file in an existing folder, got {plot}")

    from xr0_engine.bench.timing import peak_memory_bytes
    from xr0_engine.engine import Engine
    from xr0_engine.model.weights import resolve_checkpoint
    from xr0_engine.robot.embodiment import load_embodiment
    from xr0_engine.robot.preprocess import Preprocessor
    from xr0_engine.types import Observation

    # Everything but the weights is read and checked first: a misspelt view must not cost the loading of a big model.
    folder = resolve_checkpoint(checkpoint)
    own_profile = None if embodiment is None else load_embodiment(embodiment)
    preprocess = Preprocessor.load(folder, own_profile)
    if given_state is None:
        given_state = np.zeros((preprocess.config.head.state_length, preprocess.config.head.state_dim), np.float32)
    observation = Observation(
        shown("--image", views, preprocess.resolve(robot_type)[1]), instruction, given_state, robot_type
    )
    preprocess.check(observation)
    engine = Engine.from_pretrained(folder, device, dtype, backend, own_profile)
    for _ in range(repeat):
        chunk = engine.infer(observation, prefix=given_prefix, seed=seed)
    peak = peak_memory_bytes(engine.model.device)
    profile = engine.embodiment(robot_type)
    if plot is not None:
        from xr0_engine.plot import plot_chunk

        plot_chunk(chunk, observation, profile, plot)
    if as_json:
        told = {"backend": engine.backend, "backend_reason": engine.backend_reason, "peak_memory_bytes": peak}
        print(json.dumps(_as_json(chunk, profile) | told))
    else:
        _print_table(chunk, profile)
        print(f"peak memory {peak / 2**30:.2f} GiB, loading included")
        print(f"backend {engine.backend}: {engine.backend_reason}")


def shown(option: str, views: dict[str, list[np.ndarray]], profile: Embodiment) -> dict[str, np.ndarray]:
    """What read_views read, as Observation.images. Raises ValueError that names the option, for more files of a view
    than the robot has, or of several sizes."""
    most = 1 if profile.history is None else profile.history.frames
    for view, frames in views.items():
        if len(frames) > most or len({frame.shape for frame in frames}) > 1:
            expected = "every view once" if most == 1 else f"up to {most} frames of one size"
            raise ValueError(f"{option} {view}: expected {expected}, got {', '.join(str(f.shape[:2]) for f in frames)}")
    if profile.history is None:
        return {view: frames[0] for view, frames in views.items()}
    return {view: np.stack([frames[0]] * (most - len(frames)) + frames) for view, frames in views.items()}


def read_views(option: str, arguments: list[str]) -> dict[str, list[np.ndarray]]:
    """View -> its pictures in turn, of arguments VIEW=FILE. Raises ValueError that names the option."""
    from xr0_engine.robot.images import read_picture
    from xr0_engine.robot.picture_cost import PictureError

    views: dict[str, list[np.ndarray]] = {}
    for argument in arguments:
        view, separator, file = argument.partition("=")
        if not (view and separator and file):
            raise ValueError(f"{option}: expected VIEW=FILE, such as base=front.png, got {argument!r}")
        try:
            views.setdefault(view, []).append(read_picture(Path(file)))
        except PictureError as error:
            raise ValueError(f"{option} {view}: {error}") from None
    return views


def read_numbers(option: str, text: str) -> np.ndarray:
    """A table of numbers as float32: a .npy or .json file, or numbers with commas between them."""
    from tokenize import TokenError

    from xr0_engine.files import FAULTS, one_line, read_json, table
    from xr0_engine.types import FileError

    try:
        if text.endswith(".npy"):
            # A header may ask for more than the file has: mapped, it is refused without being reserved.
            array = np.load(text, mmap_mode="r", allow_pickle=False)
            if array.size > MOST_NUMBERS or array.dtype.kind not in "fiu":
                raise ValueError(f"expected up to {MOST_NUMBERS} numbers, got {array.dtype} {array.shape}")
            return np.array(array, dtype=np.float32)
        if text.endswith(".json"):
            numbers = read_json(Path(text), FileError, most_values=MOST_NUMBERS)
            # NumPy takes text for numbers too, and reserves the longest text's size for every cell.
            rows = numbers if isinstance(numbers, list) and numbers and isinstance(numbers[0], list) else [numbers]
            array = table(rows, "it")
            return (array if rows is numbers else array[0]).astype(np.float32)
        return np.array(text.split(","), dtype=np.float32)
    # NumPy reads a header with Python's own parser.
    except (OSError, EOFError, SyntaxError, TokenError, *FAULTS) as error:
        raise ValueError(
            f"{option}: expected numbers, or a .json or .npy file of numbers, got {text:.200}: {one_line(error)}"
        ) from None


def _as_json(chunk: ActionChunk, profile: Embodiment) -> dict[str, Any]:
    return {
        "robot_type": chunk.robot_type,
        "control_rate_hz": profile.control_rate_hz,
        "columns": {
            column.index: f"{column.group} {column.name}".strip() + f" ({column.unit})"
            for panel in profile.action_layout.panels(chunk.active_columns)
            for column in panel
        },
        "actions": chunk.actions.tolist(),
        "prefix_length": chunk.prefix_length,
        "timestamp_s": chunk.timestamp_s,
        "timing_ms": dict(chunk.timing_ms),
    }


def _print_table(chunk: ActionChunk, profile: Embodiment) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from xr0_engine.plot import spread

    steps = spread(len(chunk.actions), SHOWN_STEPS)
    title = f"{chunk.robot_type}: {len(chunk.actions)} actions at {profile.control_rate_hz:g} Hz"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("column", no_wrap=True)
    for step in steps:
        table.add_column(f"{step / profile.control_rate_hz:.2f} s", justify="right")
    for panel in profile.action_layout.panels(chunk.active_columns):
        heading = f"[bold]{panel[0].group} ({panel[0].unit})"
        if len(panel) > 1:
            table.add_row(heading)
        for column in panel:
            values = (f"{chunk.actions[step, column.index]:+.3f}" for step in steps)
            table.add_row(f"  {column.name}" if len(panel) > 1 else heading, *values)
    console = Console()
    console.print(table)
    console.print(f"{len(steps)} of {len(chunk.actions)} actions shown, all with --json")
    console.print("ms: " + ", ".join(f"{stage} {time_ms:.1f}" for stage, time_ms in chunk.timing_ms.items()))
