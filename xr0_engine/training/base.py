"""What a run starts from: an XR-0 checkpoint, or the Hugging Face folder of the VLM alone (Qwen3-VL).

Both are read under XR-0's names, strictly. The VLM's folder says nothing about an action head: that has the published
size, no more than the VLM's, and new weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Qwen3VLConfig

from xr0_engine.checkpoint import preprocessor_config
from xr0_engine.config import VLM_TYPE, ModelConfig, VisionConfig, describes_vlm, read_hf_config
from xr0_engine.family import FAMILIES
from xr0_engine.files import find_settings
from xr0_engine.hub import HubId, hub_id
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.weights import (
    TIED_LM_HEAD,
    StoredTensor,
    check_model,
    read_index,
    read_tensor,
    resolve_checkpoint,
)
from xr0_engine.robot.limits import (
    RELEASED_LIMITS,
    ImageLimits,
    find_video_settings,
    load_limits,
    load_video_limits,
)
from xr0_engine.sizes import published_config
from xr0_engine.types import CheckpointError

EMBEDDINGS = "vlm.model.language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Base:
    """config: the stored model's. stored: XR-0's name -> place of every tensor. has_head: False for a VLM alone. name:
    by which it is found again from anywhere: an absolute path, or the hub's id with its commit."""

    folder: Path
    name: str
    config: ModelConfig
    stored: Mapping[str, StoredTensor]
    has_head: bool

    def preprocessor(self) -> dict[str, Any]:
        """What preprocessor_config.json says besides the action statistics; a VLM's own has other image sizes.

        Raises CheckpointError as load_limits does.
        """
        told = find_settings(self.folder) if self.has_head else {}
        if not told:
            return preprocessor_config(self.config)
        limits = load_limits(self.folder, self.config.vision)
        return {**next(iter(told.values())), **limits.to_hf()}

    def video_preprocessor(self) -> Any:
        """What video_preprocessor_config.json says; None where nothing is said of videos, which are then as images."""
        told = find_video_settings(self.folder) if self.has_head else None
        return None if told is None else told[1]


def read_base(checkpoint: str | Path) -> Base:
    """Folder or hub id, its config and the place of every tensor; no tensor is read but a stored LM head.

    Raises CheckpointError that names what is missing, unexpected or of another shape, and for an LM head that is not
    tied to the text embeddings.
    """
    folder = resolve_checkpoint(checkpoint)
    raw = read_hf_config(folder)
    has_head = not describes_vlm(raw)
    config = ModelConfig.load(folder) if has_head else ModelConfig.from_hf(_with_head(raw))
    stored = read_index(folder)
    if not has_head:
        stored = {_xr0_name(name): place for name, place in stored.items()}
    check_model(config, stored, complete=has_head)
    if not has_head and TIED_LM_HEAD in stored:
        head, embeddings = read_tensor(stored[TIED_LM_HEAD]), read_tensor(stored[EMBEDDINGS])
        if not torch.equal(head, embeddings):
            raise CheckpointError(f"{folder}: lm_head.weight differs from the text embeddings; XR-0 ties them")
    return Base(folder, _lasting_name(checkpoint, folder), config, stored, has_head)


def _lasting_name(checkpoint: str | Path, folder: Path) -> str:
    source = None if Path(checkpoint).expanduser().is_dir() else hub_id(checkpoint)
    # The hub's cache names a folder after its commit.
    return str(folder.resolve()) if source is None else str(HubId(source.name, folder.name))


def base_limits(folder: Path, vision: VisionConfig) -> ImageLimits:
    """The limits of images that a base is trained on with; those of a VLM alone are not XR-0's.

    Raises CheckpointError as load_limits does.
    """
    return RELEASED_LIMITS if describes_vlm(read_hf_config(folder)) else load_limits(folder, vision)


def base_video_limits(folder: Path, vision: VisionConfig) -> ImageLimits:
    """The same of videos. Raises CheckpointError as load_video_limits does."""
    return RELEASED_LIMITS if describes_vlm(read_hf_config(folder)) else load_video_limits(folder, vision)


def fresh_head(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Checkpoint's name -> new weight of the action head, float32, the same for a seed (Family.fresh_std)."""
    std = FAMILIES[config.family].fresh_std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ActionHead(config)
        for name, parameter in head.named_parameters():
            if name.endswith("adaln_table"):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif std is not None and parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)
            elif std is not None and name.endswith("bias"):
                nn.init.zeros_(parameter)
    return {name: parameter.detach() for name, parameter in head.named_parameters()}


def _with_head(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the VLM alone -> XR-0's."""
    try:
        # transformers knows what a file of another release leaves out.
        vlm = Qwen3VLConfig(**raw).to_dict()
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json is no configuration of {VLM_TYPE}: {error}") from None
    published = published_config().to_hf()
    text, dit = vlm["text_config"], published["dit_config"]
    sizes = {name: min(dit[name], text[name]) for name in ("hidden_size", "num_hidden_layers")}
    shared = {name: text[name] for name in ("head_dim", "num_key_value_heads")}
    return {**published, "vlm_config": vlm, "dit_config": sizes | shared}


def _xr0_name(name: str) -> str:
    """A VLM tensor's name, as read_index gives it (without `model.`) -> XR-0's."""
    return TIED_LM_HEAD if name == "lm_head.weight" else f"vlm.model.{name}"
