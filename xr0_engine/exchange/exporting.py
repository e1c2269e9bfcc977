"""A checkpoint of ours -> what the released code loads: a folder of its Hugging Face layout, or its training's .pt.

The released benchmark code is full causal without an offset, decodes `a * std + mean`, uses the columns with
std > 1e-5 and takes five flow steps; its model class and processor are Python files within the checkpoint, which are
taken from a released folder of the user's own. The post-training code reads `{"module": {"model." + name: tensor}}`,
the tied LM head included, and always runs window and offset.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from xr0_engine.checkpoint import EXAMPLE_TASKS
from xr0_engine.config import HEAD_SIZES, ModelConfig, read_hf_config
from xr0_engine.exchange.importing import EMBEDDINGS, read_settings
from xr0_engine.exchange.modes import MODES
from xr0_engine.family import VARIANT
from xr0_engine.files import PROCESSOR_FILE, read_json
from xr0_engine.model.weights import (
    TIED_LM_HEAD,
    TRAINING_PREFIX,
    StoredTensor,
    check_tensors,
    checkpoint_shapes,
    read_index,
    resolve_checkpoint,
)
from xr0_engine.model.writing import stored_sizes, write_weights
from xr0_engine.robot.limits import load_limits
from xr0_engine.robot.normalize import ACTIVE_STD, STATISTICS_FILE, load_statistics
from xr0_engine.robot.prompt import PromptTokenizer
from xr0_engine.types import CheckpointError
from xr0_engine.whole import refuse_used, whole_file, whole_folder

DTYPE = torch.bfloat16
RELEASED_STEPS = 5
KEPT_KEYS = ("flow_steps", "max_prefix")
"""Keys of ours that stay in config.json: the released classes keep what they do not know, and do not use it."""
COMPANIONS = {".json", ".jinja", ".txt", ".py"}
"""What else of a released folder its code may read."""
REPLACED = re.compile(r"config\.json|preprocessor_config\.json|.*\.safetensors\.index\.json")
CODE = re.compile(r"(?:[\w./-]+--)?(\w+)\.\w+")
"""A value of auto_map: module.Class, a hub id before it if the code is elsewhere."""


def to_released(checkpoint: str | Path, out: Path, like: Path) -> list[str]:
    """Write a folder for the released benchmark code; it appears whole or not at all. Returns what there is to know.

    checkpoint: folder or hub id of ours; like: local folder of a released checkpoint, whose code, tokenizer and
    settings it takes. Raises CheckpointError or ValueError for what that code cannot express, and OSError.
    """
    refuse_used(out)
    folder = resolve_checkpoint(checkpoint)
    config = ModelConfig.load(folder)
    _refuse_variant(config)
    if config.head.local_window is not None or config.head.position_offset != 0:
        window = "all" if config.head.local_window is None else config.head.local_window
        raise CheckpointError(
            f"{folder} runs with local_window {window}, position_offset {config.head.position_offset}: the released "
            "benchmark code knows neither and would run another mask without a word. For the released post-training "
            "code: --to released-pt"
        )
    released = _read_like(like, config)
    settings = _preprocessor(folder, like, config)
    _same_prompts(folder, like, config)
    places = read_index(folder)
    shapes = checkpoint_shapes(config)
    check_tensors(places, shapes)
    ours = config.to_hf()
    described = {**released, **{key: ours[key] for key in (*HEAD_SIZES, *KEPT_KEYS)}}
    sizes = stored_sizes(shapes, DTYPE)
    with whole_folder(out, sum(sizes.values())) as target:
        for file in sorted(like.iterdir()):
            if file.is_file() and file.suffix in COMPANIONS and not REPLACED.fullmatch(file.name):
                shutil.copy(file, target / file.name)
        _unnest(target / PROCESSOR_FILE)
        (target / "config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
        (target / STATISTICS_FILE).write_text(json.dumps(settings), encoding="utf-8")
        write_weights(target, sizes, lambda names: {name: _tensor(places[name]) for name in names})
    return list(_told(config, like))


def to_released_pt(checkpoint: str | Path, out: Path) -> list[str]:
    """Write the file that the released post-training code starts from; whole or not at all. Returns as to_released.

    Raises CheckpointError or ValueError for what that code cannot express, and OSError.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another name")
    if out.suffix != ".pt":
        raise ValueError(f"out: expected a file that ends in .pt, got {out}")
    folder = resolve_checkpoint(checkpoint)
    config = ModelConfig.load(folder)
    _refuse_variant(config)
    trained, usual = config.head, MODES[config.family]["post-training"]
    if trained.local_window is not None and trained.position_offset != usual.position_offset:
        raise CheckpointError(
            f"{folder} has position_offset {trained.position_offset}; the post-training code always adds "
            f"{usual.position_offset}"
        )
    places = read_index(folder)
    shapes = checkpoint_shapes(config)
    check_tensors(places, shapes)
    state = {TRAINING_PREFIX + name: _tensor(places[name]) for name in shapes}
    # The released code loads strictly, and its model has the tied head under a name of its own.
    state[TRAINING_PREFIX + TIED_LM_HEAD] = state[TRAINING_PREFIX + EMBEDDINGS]
    with whole_file(out) as partial:
        torch.save({"module": state}, partial)
    told = [f"load it by model.params.model.pretrained={out}", "mean and std go into its data configuration by hand"]
    if trained.local_window is None:
        told.append(
            f"that code runs window {usual.local_window} and offset {usual.position_offset}; {folder} is full causal: "
            "right as a start for training, wrong to serve as it is"
        )
    elif trained.local_window != usual.local_window:
        told.append(
            f"set model.params.model.local_window={trained.local_window}: its own value is {usual.local_window}"
        )
    return told


def _refuse_variant(config: ModelConfig) -> None:
    strange = {
        name: getattr(config.head, name) for name, value in VARIANT.items() if getattr(config.head, name) != value
    }
    if strange:
        told = ", ".join(f"{name} {value}" for name, value in strange.items())
        raise CheckpointError(f"config.json: {told}: the released code of Xiaomi-Robotics-0 has no such action head")


def _tensor(place: StoredTensor) -> Tensor:
    with safe_open(place.file, framework="pt") as handle:
        value: Tensor = handle.get_tensor(place.key).to(DTYPE).contiguous()
    return value


def _read_like(like: Path, config: ModelConfig) -> dict[str, Any]:
    """config.json of a released folder, checked: it names code that is there, for a model of the same sizes."""
    if not like.is_dir():
        raise CheckpointError(f"like: expected a local folder of a released checkpoint with its code, got {like}")
    released: dict[str, Any] = read_hf_config(like)
    theirs = ModelConfig.from_hf(released)
    maps = [released.get("auto_map"), *(_map_of(like / name) for name in (PROCESSOR_FILE, STATISTICS_FILE))]
    modules = [CODE.fullmatch(str(value)) for found in maps if isinstance(found, Mapping) for value in found.values()]
    if not isinstance(released.get("auto_map"), Mapping) or not all(modules):
        raise CheckpointError(
            f"{like}/config.json has no auto_map that names the model's code: give a folder of the released weights as "
            "downloaded, not one that this engine wrote"
        )
    missing = sorted({f"{match[1]}.py" for match in modules if match and not (like / f"{match[1]}.py").is_file()})
    if missing:
        raise CheckpointError(
            f"{like} lacks {', '.join(missing)}, the released code: download them from the hub into it (hf download)"
        )
    ours, differing = config.to_hf(), []
    for part in ("text", "vision", "tokens"):
        one, other = getattr(config, part), getattr(theirs, part)
        if part == "tokens" and None in (one.video, other.video):
            one, other = (replace(tokens, video=None) for tokens in (one, other))
        if one != other:
            differing.append(f"{part} {other}, not {one}")
    for key, value in {**ours["dit_config"], **{key: ours[key] for key in HEAD_SIZES}}.items():
        other = {**released["dit_config"], **released}.get(key)
        # Chunks are as long as the statistics; the released code uses this key nowhere else.
        if key != "action_length" and other != value:
            differing.append(f"{key} {other}, not {value}")
    if differing:
        raise CheckpointError(f"{like} is of another size than the checkpoint: " + "; ".join(differing))
    return released


def _unnest(file: Path) -> None:
    """Take image settings and statistics out of a processor_config.json: transformers 5 would read the released
    folder's there, and preprocessor_config.json has the checkpoint's."""
    content = read_json(file) if file.is_file() else None
    if isinstance(content, dict) and content.pop("image_processor", None) is not None:
        file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _map_of(file: Path) -> Any:
    content = read_json(file) if file.is_file() else None
    return content.get("auto_map") if isinstance(content, Mapping) else None


def _preprocessor(folder: Path, like: Path, config: ModelConfig) -> dict[str, Any]:
    """The released folder's preprocessor_config.json with our image limits and our statistics."""
    settings = read_settings(like)
    # What the two could differ in besides the limits, the engine refuses in either.
    load_limits(like, config.vision)
    limits = load_limits(folder, config.vision)
    return {**settings, **limits.to_hf(), "action_config": _action_config(folder, config)}


def _action_config(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Statistics by which the released processor decodes and masks exactly as the engine does."""
    action_config = {}
    for name, statistics in load_statistics(
        folder, config.head.action_dim, config.std_epsilon, config.double_statistics
    ).items():
        mean = statistics.denormalize(np.zeros_like(statistics.mean))
        active = statistics.action_mask > 0
        # A column that is not used must have no std there.
        unused = np.where(statistics.std > ACTIVE_STD, np.float32(0), statistics.std)
        std = np.where(active, statistics.std + np.float32(config.std_epsilon), unused)
        hidden = np.flatnonzero((active & ~(std > ACTIVE_STD)).any(0)).tolist()
        if hidden:
            raise CheckpointError(
                f"{folder / STATISTICS_FILE}: robot type {name!r} uses columns {hidden}, whose std is at most "
                f"{ACTIVE_STD:g} at some step: the released benchmark code would leave them out. The post-training "
                "code does not: --to released-pt"
            )
        action_config[name] = {"mean": mean.tolist(), "std": std.tolist()}
    return action_config


def _same_prompts(folder: Path, like: Path, config: ModelConfig) -> None:
    ours, theirs = (PromptTokenizer.load(place, config.tokens) for place in (folder, like))
    for task in EXAMPLE_TASKS:
        if not np.array_equal(ours.encode(["Base View"], [1], task), theirs.encode(["Base View"], [1], task)):
            raise CheckpointError(f"{like}/tokenizer.json gives other tokens than the checkpoint's for {task!r}")


def _told(config: ModelConfig, like: Path) -> Iterator[str]:
    yield f"code, tokenizer and settings: {like}; weights, sizes and statistics: the checkpoint's"
    dropped = {"local_window", "position_offset", "std_epsilon", "normalize_instruction", "compat_bf16_time"}
    yield f"kept in config.json, and not used there: {', '.join(KEPT_KEYS)}; left out: {', '.join(sorted(dropped))}"
    if config.std_epsilon:
        yield f"std_epsilon {config.std_epsilon:g} is added to the std that is written: that code adds none"
    if config.head.flow_steps != RELEASED_STEPS:
        yield f"that code takes {RELEASED_STEPS} flow steps; call it with num_steps={config.head.flow_steps}"
    if not config.normalize_instruction:
        yield "trained on the task text as recorded; the released clients capitalise it and add a full stop"
