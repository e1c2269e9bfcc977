"""xr0 inspect: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from xr0_engine.config import ModelConfig
    from xr0_engine.model.weights import StoredTensor
    from xr0_engine.robot.embodiment import Embodiment
    from xr0_engine.robot.limits import ImageLimits
    from xr0_engine.robot.normalize import ActionStatistics

PARTS = {
    "vlm.model.visual.": "vision tower",
    "vlm.model.language_model.": "language model",
    "vlm.lm_head.": "language model head (tied, unused)",
    "": "action head",
}
"""Start of a tensor's name -> part of the model; the first that fits."""

PROMPT_TEXT_TOKENS = 75
"""Of a prompt with three views, beside those of the images."""


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a checkpoint's sizes, robot types and memory need, and check its tensors, without loading them.

    Exit code 0: the checkpoint is complete; 2: it cannot be used, and the message says why.
    """
    from xr0_engine.robot.embodiment import builtin_embodiments, load_embodiment

    # Before torch is imported, which takes seconds: a mistake in these files is told at once.
    folder = Path(checkpoint).expanduser()
    told = _read(folder) if folder.is_dir() else None

    from xr0_engine.bench.step.memory import memory_need
    from xr0_engine.bench.step.workload import Workload, image_grid
    from xr0_engine.model.weights import check_model, read_index, resolve_checkpoint

    folder = resolve_checkpoint(checkpoint)
    config, statistics, limits, own = told or _read(folder)
    stored = read_index(folder)
    check_model(config, stored)
    profiles = [load_embodiment(name) for name in builtin_embodiments()]
    windowed = config.head.local_window is not None
    # Three views of 640x480, as long a prompt as they make, 30 actions.
    grid = image_grid((480, 640), config.vision, limits)
    image_tokens = 3 * grid[0] * grid[1] // config.vision.spatial_merge_size**2
    typical = Workload((grid,) * 3, PROMPT_TEXT_TOKENS + image_tokens, chunk_length=30, batch=1)
    report = {
        "checkpoint": str(folder),
        "tensors": len(stored),
        "stored_bytes": sum(place.num_bytes for place in stored.values()),
        "parameters": _parameters(stored),
        "memory_bytes": {dtype: memory_need(config, typical, dtype).peak for dtype in ("bfloat16", "float32")},
        "mask": f"windowed, {config.head.local_window} actions back" if windowed else "full_causal",
        "image_pixels": [limits.min_pixels, limits.max_pixels],
        "position_offset": config.head.position_offset,
        "flow_steps": config.head.flow_steps,
        "max_prefix": config.head.max_prefix,
        "normalize_instruction": config.normalize_instruction,
        "sizes": {name: _sizes(part) for name, part in vars(config).items() if name in ("text", "vision", "head")},
        "robot_types": {
            name: {
                "chunk_length": statistic.chunk_length,
                "active_columns": int(statistic.action_mask.any(0).sum()),
                "embodiment": own.name
                if own
                else next((profile.name for profile in profiles if name in profile.robot_types), None),
            }
            for name, statistic in statistics.items()
        },
        "notes": [note for name, statistic in statistics.items() for note in _notes(name, statistic, profiles)],
    }
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _print_tables(report)


def _read(folder: Path) -> tuple[ModelConfig, dict[str, ActionStatistics], ImageLimits, Embodiment | None]:
    """All but the weights."""
    from xr0_engine.config import ModelConfig
    from xr0_engine.robot.embodiment import checkpoint_embodiment
    from xr0_engine.robot.limits import load_limits
    from xr0_engine.robot.normalize import load_statistics
    from xr0_engine.robot.prompt import PromptTokenizer

    config = ModelConfig.load(folder)
    statistics = load_statistics(folder, config.head.action_dim, config.std_epsilon)
    limits, own = load_limits(folder, config.vision), checkpoint_embodiment(folder)
    PromptTokenizer.load(folder, config.tokens, config.text.vocab_size)
    return config, statistics, limits, own


def _parameters(stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, place in stored.items():
        part = next(label for start, label in PARTS.items() if name.startswith(start))
        counts[part] = counts.get(part, 0) + place.num_elements
    return counts | {"total": sum(counts.values())}


def _notes(robot_type: str, statistics: ActionStatistics, profiles: Sequence[Embodiment]) -> Iterator[str]:
    """What to tell of statistics without a list of active columns, in a layout that has one."""
    layout = next((profile.action_layout for profile in profiles if robot_type in profile.robot_types), None)
    if layout is None or layout.active_columns is None or statistics.active_columns is not None:
        return
    moving = statistics.action_mask.any(0).nonzero()[0].tolist()
    if moving != list(layout.active_columns):
        yield (
            f"{robot_type}: its statistics name no active_columns, so those that move are used: {moving}. The "
            f"post-training code uses {len(layout.active_columns)} whatever the statistics: if the model was trained "
            f"so, add active_columns {list(layout.active_columns)} to its entry in action_config"
        )


def _sizes(part: Any) -> dict[str, Any]:
    from xr0_engine.config import VARIANT

    told = {name: value for name, value in vars(part).items() if name not in VARIANT or value != VARIANT[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    parameters = Table("part", "parameters", title=report["checkpoint"])
    for part, count in report["parameters"].items():
        parameters.add_row(part, f"{count:,}")
    console.print(parameters)
    sizes = Table("part", "sizes", title="sizes")
    for part, values in report["sizes"].items():
        sizes.add_row(part, ", ".join(f"{name} {value}" for name, value in values.items()))
    console.print(sizes)
    robots = Table("robot type", "chunk length", "active columns", "embodiment", title="robot types")
    for name, robot in report["robot_types"].items():
        profile = robot["embodiment"] or "none built in: pass --embodiment"
        robots.add_row(name, str(robot["chunk_length"]), str(robot["active_columns"]), profile)
    console.print(robots)
    for note in report["notes"]:
        console.print(note)
    console.print(
        f"mask: {report['mask']}, position offset {report['position_offset']}, {report['flow_steps']} flow steps, "
        f"prefixes of up to {report['max_prefix']} actions"
    )
    console.print("images: {:,} to {:,} pixels".format(*report["image_pixels"]))
    text = "with a capital and a full stop" if report["normalize_instruction"] else "as given"
    console.print(f"task text in the prompt: {text}")
    memory = ", ".join(f"{_size(count)} in {dtype}" for dtype, count in report["memory_bytes"].items())
    console.print(f"{report['tensors']} tensors, {_size(report['stored_bytes'])} on disk")
    console.print(f"memory of one inference, weights included (three 640x480 views, 30 actions): {memory}")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
