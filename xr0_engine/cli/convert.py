"""xr0 convert: checkpoints of the released code to ours, ours to theirs, and an adapter with its base to one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A released training run's folder, one of its steps, or a .pt of weights; an adapter's folder; with "
            "--to released or released-pt a checkpoint folder of ours, or a hub id."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder (released-pt: file) to write; it must be absent or empty.")],
    to: Annotated[str, typer.Option(help="engine, released (Hugging Face folder) or released-pt.")] = "engine",
    like: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint of the same model. To engine: gives sizes, tokenizer, image settings; a folder of "
            "Qwen3-VL-4B-Instruct will do. To released: a released folder as downloaded, for its code. Of an adapter: "
            "the checkpoint that it was trained on."
        ),
    ] = None,
    step: Annotated[str | None, typer.Option(help="Which step of a run; else the newest.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="File of action statistics; else those of the run's own config.py.")
    ] = None,
    robot_type: Annotated[str | None, typer.Option(help="Name of the robot that the statistics are of.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="post-training (offset 10, std + 1e-6, task text as given, and for Xiaomi-Robotics-0 window 4; the "
            "default for a run whose config.py has mean and std), benchmark (full causal, offset 0), or for "
            "Xiaomi-Robotics-1 robodojo (offset 0, RoboDojo's columns and statistics)."
        ),
    ] = None,
    local_window: Annotated[int | None, typer.Option(min=0, help="Instead of the mode's.")] = None,
    position_offset: Annotated[int | None, typer.Option(min=0, help="Instead of the mode's.")] = None,
    max_prefix: Annotated[
        int | None,
        typer.Option(min=0, help="Longest prefix trained with; else as the run's config.py says (async_train)."),
    ] = None,
    state_length: Annotated[
        int | None,
        typer.Option(min=1, help="States of an observation, of Xiaomi-Robotics-1 alone; else asked if unknown."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32, of the weights that are written.")] = "bfloat16",
) -> None:
    """Bring a checkpoint of the released post-training code to the engine, or one of ours to the released code; or
    merge an adapter (`xr0 train export --adapter`) into its base.

    Files of torch.save are read without running what they hold; tensors are checked by name and shape.
    """
    from xr0_engine.exchange.importing import ImportOptions, import_released
    from xr0_engine.model.weights import ADAPTER_FILE

    options = ImportOptions(
        step, mode, local_window, position_offset, max_prefix, state_length, statistics, robot_type, dtype
    )
    if to not in ("engine", "released", "released-pt"):
        raise ValueError(f"to: expected engine, released or released-pt, got {to!r}")
    usual = vars(ImportOptions())
    foreign = [name for name, value in vars(options).items() if value != usual[name]]
    if to != "engine":
        told = _to_released(source, out, to, like, foreign)
    elif (Path(source).expanduser() / ADAPTER_FILE).is_file():
        told = _merged(source, out, like, dtype, [name for name in foreign if name != "dtype"])
    elif like is None and (Path(source).expanduser() / "config.json").is_file():
        raise ValueError(
            f"{source} is a checkpoint folder, which the engine loads as it is; --to released or --to released-pt "
            "writes it for the released code"
        )
    elif like is None:
        raise ValueError(
            "like: weights alone have no tokenizer and no image settings: --like CHECKPOINT, such as the released "
            "Xiaomi-Robotics-0-Pretrain that the run started from, or a folder of Qwen3-VL-4B-Instruct"
        )
    else:
        told = import_released(Path(source).expanduser(), out, like, options)
    for line in told:
        print(line)
    print(f"wrote {out}" + (f"; next: xr0 inspect {out}" if to == "engine" else ""))


def _merged(source: str, out: Path, like: str | None, dtype: str, foreign: list[str]) -> list[str]:
    from xr0_engine.exchange.merging import merge

    if foreign:
        raise ValueError(f"{foreign[0]}: only for a released run; an adapter says it itself")
    if like is None:
        raise ValueError(f"like: {source} is an adapter: --like BASE, the checkpoint that it was trained on")
    return merge(source, like, out, dtype)


def _to_released(source: str, out: Path, to: str, like: str | None, foreign: list[str]) -> list[str]:
    from xr0_engine.exchange.exporting import to_released, to_released_pt

    if foreign:
        raise ValueError(f"{foreign[0]}: only for --to engine; a checkpoint of ours says it itself")
    if to == "released-pt":
        return to_released_pt(source, out)
    if like is None:
        raise ValueError(
            "like: --to released needs --like FOLDER, a released checkpoint as downloaded: the model's own .py files "
            "are taken from it, since this package ships none"
        )
    return to_released(source, out, Path(like).expanduser())
