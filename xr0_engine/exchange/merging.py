"""An adapter and the checkpoint that it was trained on -> one folder, for all that takes no adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from xr0_engine.config import ModelConfig
from xr0_engine.exchange.importing import IMPORT_DTYPES
from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.model.adapter import Adapter
from xr0_engine.model.weights import (
    ADAPTER_FILE,
    check_model,
    checkpoint_shapes,
    read_index,
    read_tensor,
    resolve_checkpoint,
)
from xr0_engine.model.writing import stored_sizes, write_weights
from xr0_engine.whole import refuse_used, whole_folder


def merge(source: str | Path, base: str | Path, out: Path, dtype: str = "bfloat16") -> list[str]:
    """Write what `Engine.from_pretrained(base, adapter=source)` runs as a checkpoint folder, whole or not at all.

    source, base: folders or hub ids. dtype: of IMPORT_DTYPES. Returns what was merged. Raises CheckpointError for an
    adapter or a base that cannot be used, or another base than the adapter's; ValueError and OSError.
    """
    if dtype not in IMPORT_DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(IMPORT_DTYPES)}, got {dtype!r}")
    refuse_used(out)
    adapter, folder = Adapter.load(source), resolve_checkpoint(base)
    config = ModelConfig.load(adapter.folder)
    adapter.check_base(folder, checkpoint_hash)
    stored, merges = adapter.over(read_index(folder)), adapter.merges()
    check_model(config, stored)
    sizes = stored_sizes(checkpoint_shapes(config), IMPORT_DTYPES[dtype])

    def tensors(names: list[str]) -> dict[str, torch.Tensor]:
        read = {name: read_tensor(stored[name]) for name in names}
        read |= {name: merges[name](weight) for name, weight in read.items() if name in merges}
        return {name: weight.to(IMPORT_DTYPES[dtype]).contiguous() for name, weight in read.items()}

    with whole_folder(out, sum(sizes.values())) as target:
        for file in adapter.folder.glob("*.json"):
            if file.name != ADAPTER_FILE:
                shutil.copyfile(file, target / file.name)
        write_weights(target, sizes, tensors)
    told = adapter.info
    return [f"{len(merges)} layers of {told.base} with adapters of rank {told.rank}: {', '.join(told.targets)}"]
