"""The configuration that weights alone do not tell: of a checkpoint of the same model, or of the VLM that it is made
of, with the sizes that the tensors tell in the place of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xr0_engine.config import DIT_KEYS, HEAD_SIZES, VLM_TYPE, ModelConfig, describes_vlm, read_hf_config
from xr0_engine.exchange.pickled import Weights
from xr0_engine.family import OFFSETS, VARIANT, named_family
from xr0_engine.sizes import published_config
from xr0_engine.types import CheckpointError


def weights_family(weights: Weights) -> str:
    """A key of FAMILIES. Raises CheckpointError for weights without an action head."""
    family = named_family(weights.tensors)
    if family is None:
        names = ", ".join(list(weights.tensors)[:3])
        raise CheckpointError(f"{weights.files[0]} holds another model: {names}, ... and no dit.layers.0")
    return family


def base_config(folder: Path, weights: Weights) -> ModelConfig:
    """What folder's config.json describes, with the action head that the weights hold."""
    hf = read_hf_config(folder)
    if describes_vlm(hf):
        hf = _around(hf)
    if not isinstance(hf, Mapping) or not isinstance(hf.get("dit_config"), Mapping):
        return ModelConfig.from_hf(hf)
    found = _head_sizes(weights.tensors)
    dit = {key: value for key, value in hf["dit_config"].items() if key not in VARIANT}
    dit |= {key: found[name] for name, key in DIT_KEYS.items() if name in found}
    # The mode says where actions stand, not this file.
    told = {key: value for key, value in hf.items() if key not in OFFSETS} | {"position_offset": 0}
    told |= {name: found[name] for name in HEAD_SIZES if name in found}
    return ModelConfig.from_hf(
        {**told, "dit_config": dit}, {name: tuple(it.shape) for name, it in weights.tensors.items()}
    )


def other_sizes(folder: Path, config: ModelConfig) -> Iterator[str]:
    """What folder's own action head has otherwise, if it has one."""
    hf = read_hf_config(folder)
    if describes_vlm(hf):
        yield f"action head: by its tensors; {folder} is a VLM alone, as which {VLM_TYPE} describes itself"
        return
    stated = {name: hf["dit_config"].get(key) for name, key in DIT_KEYS.items()}
    stated |= {name: hf.get(name) for name in ("state_dim", "action_dim")}
    other = {name: getattr(config.head, name) for name, value in stated.items() if getattr(config.head, name) != value}
    if other:
        yield f"action head: {other} by its tensors; {folder} has another"


def _around(vlm: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model with this VLM; sizes that no tensor tells are the published ones."""
    head = published_config().head
    text = vlm.get("text_config")
    dit = {key: getattr(head, name) for name, key in DIT_KEYS.items()}
    if isinstance(text, Mapping):
        dit["num_key_value_heads"] = text.get("num_key_value_heads", head.num_kv_heads)
    return {"vlm_config": vlm, "dit_config": dit, **{name: getattr(head, name) for name in HEAD_SIZES}}


def _head_sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of the action head that its tensors tell; those of tensors that are missing are left out."""
    columns = {
        "hidden_size": "sink.weight",
        "state_dim": "state_projector.layers.0.weight",
        "action_dim": "action_projector.layers.0.weight",
        "head_dim": "dit.layers.0.attn.q_norm.weight",
    }
    sizes = {size: tensors[name].shape[-1] for size, name in columns.items() if name in tensors and tensors[name].ndim}
    layers = {int(match[1]) for name in tensors if (match := re.match(r"dit\.layers\.(\d+)\.", name))}
    return sizes | ({"num_layers": max(layers) + 1} if layers else {})
