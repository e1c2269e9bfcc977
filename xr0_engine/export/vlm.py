"""A checkpoint's fine-tuned language model as a plain Qwen3-VL folder, for transformers, vLLM and lmms-eval.

The tensors are the checkpoint's own, bit for bit, under the names of Qwen3VLForConditionalGeneration, which are the
checkpoint's without `vlm.`; the language model's head is tied to its embeddings and stored once. The action head stays
behind, and what training alone has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from json import dumps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from xr0_engine.config import ModelConfig
from xr0_engine.export.qwen import gather
from xr0_engine.model.choice import choice_shapes
from xr0_engine.model.weights import (
    INDEX_FILE,
    TIED_LM_HEAD,
    StoredTensor,
    check_tensors,
    checkpoint_shapes,
    read_index,
    resolve_checkpoint,
)
from xr0_engine.robot.limits import ImageLimits, load_limits
from xr0_engine.types import CheckpointError
from xr0_engine.whole import refuse_used, whole_folder

PREFIX = "vlm."
EMBEDDINGS = "vlm.model.language_model.embed_tokens.weight"
SHARD_BYTES = 2**30
"""At most; a shard is what is held in memory at once."""
COMPARED_ROWS = 4096
"""Of the tied head and the embeddings, at a time."""


def export_vlm(
    checkpoint: str | Path,
    out: Path,
    like: Path | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> list[str]:
    """Write the folder; it appears whole or not at all. Returns what there is to know.

    checkpoint: folder or hub id. like: a local folder of Qwen3-VL whose tokenizer, chat template and generation
    settings are taken instead of the checkpoint's. min_pixels, max_pixels: of an image; None: as in the checkpoint, of
    the robots' images.
    Raises CheckpointError or ValueError for a checkpoint that no such folder can hold, each naming what is missing and
    the remedy, and OSError.
    """
    refuse_used(out)
    if like is not None and not like.is_dir():
        raise ValueError(f"tokenizer: expected a local folder with the tokenizer files of Qwen3-VL, got {like}")
    folder = resolve_checkpoint(checkpoint)
    config = ModelConfig.load(folder)
    stored = read_index(folder)
    shapes = checkpoint_shapes(config)
    check_tensors(stored, shapes, choice_shapes(config))
    _check_tied(stored)
    kept = {name.removeprefix(PREFIX): stored[name] for name in shapes if name.startswith(PREFIX)}
    trained = load_limits(folder, config.vision)
    limits = ImageLimits(
        trained.min_pixels if min_pixels is None else min_pixels,
        trained.max_pixels if max_pixels is None else max_pixels,
    )
    companions = gather(folder, config, _dtype(stored), like, limits)
    num_bytes = sum(place.num_bytes for place in kept.values())
    with whole_folder(out, num_bytes) as target:
        companions.write(target)
        write_shards(target, kept)
    return [*_told(stored, kept, limits, limits == trained), *companions.told]


def write_shards(folder: Path, places: Mapping[str, StoredTensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Safetensors of at most shard_bytes and their index, with tensors as they are stored: bits, shape and dtype.

    places: new name -> where it is. One shard is in memory at a time.
    """
    shards = list(_shards(places, shard_bytes))
    weight_map: dict[str, str] = {}
    console = Console(stderr=True)
    columns = (TextColumn("writing weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    total = sum(place.num_bytes for place in places.values())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=total)
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(_read({name: places[name] for name in names}), folder / file, metadata={"format": "pt"})
            # safetensors makes files that only their owner reads.
            (folder / file).chmod(0o644)
            weight_map.update(dict.fromkeys(names, file))
            progress.advance(task, sum(places[name].num_bytes for name in names))
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(dumps(index, indent=2), encoding="utf-8")


def _shards(places: Mapping[str, StoredTensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names in the order of the files that hold them."""
    names: list[str] = []
    room = shard_bytes
    for name in sorted(places, key=lambda name: (places[name].file, places[name].key)):
        size = places[name].num_bytes
        if names and size > room:
            yield names
            names, room = [], shard_bytes
        names.append(name)
        room -= size
    if names:
        yield names


def _read(places: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        handles = {}
        for name, place in places.items():
            try:
                if place.file not in handles:
                    handles[place.file] = stack.enter_context(safe_open(place.file, framework="pt"))
                tensors[name] = handles[place.file].get_tensor(place.key).contiguous()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{place.file} cannot be read: {error}") from None
    return tensors


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    """Raises CheckpointError for a head of its own: the folder has none, and would answer otherwise than the model."""
    head, embeddings = stored.get(TIED_LM_HEAD), stored[EMBEDDINGS]
    if head is None:
        return
    same = (head.shape, head.dtype) == (embeddings.shape, embeddings.dtype)
    with ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(safe_open(place.file, framework="pt")).get_slice(place.key)
            for place in (head, embeddings)
        )
        for start in range(0, head.shape[0] if same else 0, COMPARED_ROWS):
            rows = slice(start, start + COMPARED_ROWS)
            same = same and torch.equal(ours[rows], theirs[rows])
    if not same:
        raise CheckpointError(
            f"{TIED_LM_HEAD} differs from {EMBEDDINGS}: the model's head is tied to its embeddings. Remove "
            "the head from the file if the embeddings are the trained ones"
        )


def _dtype(stored: Mapping[str, StoredTensor]) -> str:
    return str(stored[EMBEDDINGS].dtype).removeprefix("torch.")


def _told(
    stored: Mapping[str, StoredTensor], kept: Mapping[str, StoredTensor], limits: ImageLimits, is_robots: bool
) -> Iterator[str]:
    num_bytes = sum(place.num_bytes for place in kept.values())
    dtypes = sorted({str(place.dtype).removeprefix("torch.") for place in kept.values()})
    left = len(stored) - len(kept) - (TIED_LM_HEAD in stored)
    yield (
        f"{len(kept)} tensors of the language model, {num_bytes / 2**20:.0f} MiB, {' and '.join(dtypes)}, as they are; "
        f"left behind: {left} of the action head and of training"
    )
    if len(dtypes) > 1:
        yield f"transformers will load all of them as {_dtype(stored)}, which config.json names: say dtype= for another"
    if is_robots:
        yield (
            f"images of {limits.min_pixels} to {limits.max_pixels} pixels, as the robots' were: small for documents "
            "and charts; --max-pixels sets another limit"
        )
