"""A checkpoint's folder -> one whose layers have 8 bits, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.model.quantization import SCALE, Format, Quantization
from xr0_engine.model.quantized import rounded
from xr0_engine.model.weights import StoredTensor, check_model, inference_shapes, read_index, read_tensor
from xr0_engine.model.writing import copy_description, write_weights
from xr0_engine.types import CheckpointError


def write_quantized(
    folder: Path,
    target: Path,
    recipe: str,
    layers: Mapping[str, Format],
    largest: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
    source: str | None = None,
    dtype: torch.dtype | None = None,
) -> Quantization:
    """Fill a folder that exists: what inference reads of the checkpoint in `folder`, the weights of `layers` in 8 bits,
    the others as they are stored. largest, source: as Quantization has them; None is the folder's name. dtype: what the
    weights were in when they were compared: rounded to that first, they are the same. Raises CheckpointError, also for
    a weight that is not finite."""
    config, stored = ModelConfig.load(folder), read_index(folder)
    check_model(config, stored)
    sizes = quantized_sizes(config, stored, layers)

    # A weight's scales come behind it, maybe in the next shard.
    scales: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        if kind == SCALE:
            return scales.pop(layer)
        value = read_tensor(stored[name])
        if layer not in layers or kind != "weight":
            return value
        q, scales[layer] = rounded(value if dtype is None else value.to(dtype), layers[layer])
        if not bool(scales[layer].isfinite().all()):
            raise CheckpointError(f"{stored[name].file}: {name}: expected finite values")
        return q

    copy_description(folder, target)
    write_weights(target, sizes, lambda names: {name: tensor(name) for name in names})
    quantization = Quantization(recipe, layers, source or folder.name, checkpoint_hash(folder), largest)
    quantization.write(target)
    return quantization


def quantized_sizes(
    config: ModelConfig, stored: Mapping[str, StoredTensor], layers: Mapping[str, Format]
) -> dict[str, int]:
    """Name -> bytes of a quantised checkpoint's tensors."""
    sizes = {}
    for name in inference_shapes(config):
        layer, _, kind = name.rpartition(".")
        sizes[name] = stored[name].num_bytes
        if layer in layers and kind == "weight":
            sizes[name] = stored[name].num_elements
            sizes[f"{layer}.{SCALE}"] = stored[name].shape[0] * torch.float32.itemsize
    return sizes
