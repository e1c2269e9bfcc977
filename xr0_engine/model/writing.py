"""What a checkpoint's folder is written from: weights in shards, and all that stands beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from xr0_engine.config import read_hf_config
from xr0_engine.family import completed, stored_shapes
from xr0_engine.files import find_settings
from xr0_engine.model.weights import INDEX_FILE
from xr0_engine.robot.limits import VIDEO_FILE, find_video_settings
from xr0_engine.robot.normalize import STATISTICS_FILE
from xr0_engine.robot.tokenizer_file import TOKENIZER_FILE

SHARD_BYTES = 2 * 2**30


def copy_description(folder: Path, target: Path) -> None:
    """All but the weights that inference reads of a checkpoint: what it says of the model, of images, actions, videos,
    and the tokenizer; files as they are, or written from what stands in their place."""
    # A released config.json leaves the family and widths to the weights' names, which may be others' there.
    told = completed(read_hf_config(folder), stored_shapes(folder))
    (target / "config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    shutil.copyfile(folder / TOKENIZER_FILE, target / TOKENIZER_FILE)
    # Of two files the statistics may stand in either; of images both say the same (robot.limits).
    settings_of = sorted(find_settings(folder).items(), key=lambda each: "action_config" not in each[1])
    settings_files = {STATISTICS_FILE: settings_of[0]}
    if (videos := find_video_settings(folder)) is not None:
        settings_files[VIDEO_FILE] = videos
    for name, (path, settings) in settings_files.items():
        if path.name == name:
            shutil.copyfile(path, target / name)
        else:
            (target / name).write_text(json.dumps(settings), encoding="utf-8")


def stored_sizes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, int]:
    """Name -> bytes."""
    return {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}


def write_weights(
    folder: Path, sizes: Mapping[str, int], tensors: Callable[[list[str]], dict[str, torch.Tensor]]
) -> None:
    """Safetensors shards of at most SHARD_BYTES, and their index. sizes: name -> bytes. tensors: those of one shard."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(track(shards, "writing weights", disable=len(shards) == 1), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # safetensors makes files that only their owner reads.
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        save_file(tensors(names), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
