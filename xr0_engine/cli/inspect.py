"""xr0 inspect: what a checkpoint holds, from its headers alone; and where its policy looks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    from xr0_engine.config import ModelConfig
    from xr0_engine.model.quantization import Format
    from xr0_engine.model.weights import StoredTensor
    from xr0_engine.robot.embodiment import Embodiment
    from xr0_engine.robot.limits import ImageLimits
    from xr0_engine.robot.normalize import ActionStatistics

PARTS = {
    "vlm.model.visual.": "vision tower",
    "vlm.model.language_model.": "language model",
    "vlm.lm_head.": "language model head (tied, unused)",
    **dict.fromkeys(
        (
            *("vlm.model.action_embed.", "vlm.model.score_embed."),
            *("state_projector_choice.", "action_projector_choice.", "score_projector_choice."),
        ),
        "choice heads (training alone)",
    ),
    "": "action head",
}
"""Start of a tensor's name -> part of the model; the first that fits."""

PROMPT_TEXT_TOKENS = 75
"""Of a prompt with three views, beside those of the images."""


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VIEW=FILE", help="Run it on this camera image, and draw where it looks; once for a view."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="The drawing.")] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", "-t", help="Beside --attention, as these, which are `xr0 infer`'s.")
    ] = None,
    state: Annotated[str | None, typer.Option(help="0.1,-0.5,... or a .json or .npy file; zeros if not given.")] = None,
    prefix: Annotated[Path | None, typer.Option(help=".json or .npy file: actions already decided.")] = None,
    robot_type: Annotated[str | None, typer.Option(help="Needed if the checkpoint has several.")] = None,
    embodiment: Annotated[str | None, typer.Option(help="A built-in profile or your own YAML file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The noise that the chunk grows from.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Show a checkpoint's sizes, robot types and memory need, and check its tensors, without loading them.

    Exit code 0: the checkpoint is complete; 2: it cannot be used, and the message says why.

    `xr0 inspect CHECKPOINT --attention base=front.png --attention left_wrist=hand.png -t "Open the drawer." --out
    looks.png` runs it instead, and draws over the images where the actions look, at each flow step.
    """
    if attention or out is not None:
        others = (attention, instruction, state, prefix, robot_type, embodiment, seed, device, dtype)
        return _draw_attention(checkpoint, out, as_json, *others)
    if instruction is not None or state is not None or prefix is not None:
        raise ValueError("--instruction, --state, --prefix: expected only beside --attention")
    from xr0_engine.robot.embodiment import builtin_embodiments, load_embodiment

    # Before torch is imported, which takes seconds: a mistake in these files is told at once.
    folder = Path(checkpoint).expanduser()
    told = _read(folder) if folder.is_dir() else None

    from xr0_engine.bench.step.memory import memory_need
    from xr0_engine.bench.step.workload import Workload, image_grid
    from xr0_engine.family import FAMILIES
    from xr0_engine.model.quantization import SCALE, read_quantization
    from xr0_engine.model.weights import check_model, check_quantized, read_index, resolve_checkpoint

    folder = resolve_checkpoint(checkpoint)
    config, statistics, limits, own = told or _read(folder)
    quantization = read_quantization(folder)
    stored = read_index(folder, quantized=quantization is not None)
    if quantization is None:
        check_model(config, stored)
        layers: Mapping[str, Format] = {}
    else:
        check_quantized(config, stored, quantization.layers)
        layers = quantization.layers
    profiles = [load_embodiment(name) for name in builtin_embodiments()]
    windowed = config.head.local_window is not None
    # Three views of 640x480, as long a prompt as they make, 30 actions.
    grid = image_grid((480, 640), config.vision, limits)
    image_tokens = 3 * grid[0] * grid[1] // config.vision.spatial_merge_size**2
    typical = Workload((grid,) * 3, PROMPT_TEXT_TOKENS + image_tokens, chunk_length=30, batch=1)
    report = {
        "checkpoint": str(folder),
        "family": FAMILIES[config.family].title,
        "tensors": len(stored),
        "stored_bytes": sum(place.num_bytes for place in stored.values()),
        "parameters": _parameters({n: place for n, place in stored.items() if not n.endswith(f".{SCALE}")}),
        "memory_bytes": {dtype: memory_need(config, typical, dtype, layers).peak for dtype in ("bfloat16", "float32")},
        "quantization": None
        if quantization is None
        else {
            "recipe": quantization.recipe,
            "source": quantization.source,
            "formats": dict(Counter(quantization.layers.values())),
        },
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


def _draw_attention(
    checkpoint: str,
    out: Path | None,
    as_json: bool,
    images: list[str] | None,
    instruction: str | None,
    state: str | None,
    prefix: Path | None,
    robot_type: str | None,
    embodiment: str | None,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    if not images or instruction is None or as_json:
        raise ValueError("--out: expected --attention VIEW=FILE and --instruction beside it, and no --json")
    if out is None or out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ValueError(f"--out: expected a .png file in an existing folder beside --attention, got {out}")
    from xr0_engine.cli.infer import read_numbers, read_views, shown

    views = read_views("--attention", images)
    given_prefix = None if prefix is None else read_numbers("--prefix", str(prefix))

    from xr0_engine.engine import Engine
    from xr0_engine.model.attention import KINDS
    from xr0_engine.model.weights import resolve_checkpoint
    from xr0_engine.plot import plot_attention
    from xr0_engine.robot.embodiment import load_embodiment
    from xr0_engine.robot.preprocess import Preprocessor
    from xr0_engine.types import Observation

    # All but the weights first: a mistake must not cost their loading.
    folder = resolve_checkpoint(checkpoint)
    own = None if embodiment is None else load_embodiment(embodiment)
    preprocess = Preprocessor.load(folder, own)
    head, read = preprocess.config.head, shown("--attention", views, preprocess.resolve(robot_type)[1])
    zeros = np.zeros((head.state_length, head.state_dim), np.float32)
    observation = Observation(read, instruction, zeros if state is None else read_numbers("--state", state), robot_type)
    _, profile = preprocess.check(observation)
    engine = Engine.from_pretrained(folder, device, dtype, "reference", own)
    seen = engine.attention(observation, prefix=given_prefix, seed=seed)
    plot_attention(seen, observation, profile, out)
    noisy = seen.where("action", of="queries")
    shares = {kind: float(seen.mass(kind)[..., noisy].mean()) for kind in KINDS}
    told = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items())
    print(f"of what the sampled actions take, mean over layers, heads and flow steps: {told}")
    print(f"drawn: {out}")


def _read(folder: Path) -> tuple[ModelConfig, dict[str, ActionStatistics], ImageLimits, Embodiment | None]:
    """All but the weights."""
    from xr0_engine.config import ModelConfig
    from xr0_engine.robot.embodiment import checkpoint_embodiment
    from xr0_engine.robot.limits import load_limits
    from xr0_engine.robot.normalize import load_statistics
    from xr0_engine.robot.prompt import PromptTokenizer

    config = ModelConfig.load(folder)
    statistics = load_statistics(folder, config.head.action_dim, config.std_epsilon, config.double_statistics)
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
    from xr0_engine.family import VARIANT

    told = {name: value for name, value in vars(part).items() if name not in VARIANT or value != VARIANT[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    parameters = Table("part", "parameters", title=f"{report['checkpoint']}: {report['family']}")
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
    if (eight := report["quantization"]) is not None:
        formats = ", ".join(f"{count} layers {name}" for name, count in eight["formats"].items())
        console.print(f"quantised from {eight['source']} by recipe {eight['recipe']}: {formats}", markup=False)
    memory = ", ".join(f"{_size(count)} in {dtype}" for dtype, count in report["memory_bytes"].items())
    console.print(f"{report['tensors']} tensors, {_size(report['stored_bytes'])} on disk")
    console.print(f"memory of one inference, weights included (three 640x480 views, 30 actions): {memory}")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
