"""What a golden case holds: a model's sizes, its inputs, expected results of the form that they must have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.files import refuse_pointer
from xr0_engine.part_configs import POSITIONS
from xr0_engine.types import ModelInputs

CASE_SHAPES = {
    "input_ids": "BN",
    "attention_mask": "BN",
    "vlm_position_ids": "3BN",
    "state": "BSs",
    "noise": "BTA",
    "action_mask": "BTA",
    "prefix": "BpA",
    "vision_tokens": "VH",
    "flow_trace": "FBTA",
    "actions": "BTA",
}
PICTURE_SHAPES = (
    {"image_grid_thw": "I3", "pixel_values": "PC"},
    {"video_grid_thw": "I3", "pixel_values_videos": "PC"},
)
"""What a case may show: one or the other."""
TRAINING_SHAPES = {
    "train.action": "BTA",
    "train.t": "B11",
    "train.velocity": "BTA",
    "train.loss": "1",
    "train.loss_mse": "1",
}
LOSS_SHAPES: Mapping[str, Mapping[str, str]] = {
    "xr0": {"train.loss_with_freq": "1"},
    "xr1": {
        "train.action_mask": "BTA",
        "train.loss_freq": "1",
        "train.loss_choice": "1",
        "train.loss_score": "1",
        "choice.input_ids": "BM",
        "choice.attention_mask": "BM",
        "choice.condition_end": "B",
        "choice.steps": "B",
        "choice.candidates": "BTcA",
        "choice.scores": "Bc",
    },
}
"""By family. Of a case: B batch, N tokens, I images or videos, P patches, C columns of a patch, S states, s their
columns, T actions, A their columns, p those of the prefix, V image tokens, H hidden size, F flow steps and one, which
may be others, M tokens with the choice turn, c candidates."""
WHOLE_NUMBERS = (
    *("input_ids", "attention_mask", "vlm_position_ids", "image_grid_thw", "video_grid_thw"),
    *("choice.input_ids", "choice.attention_mask", "choice.condition_end", "choice.steps"),
)


def golden_config(golden: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a golden model's JSON, which names some fields otherwise than config.json."""
    head, text = golden["action_head"], golden["text_config"]
    dit = {
        "hidden_size": head["hidden_size"],
        "num_hidden_layers": head["num_layers"],
        "head_dim": head["head_dim"],
        "num_key_value_heads": head["num_kv_heads"],
        "stream_norms": head.get("stream_norms", True),
        "output_width": head.get("output_hidden"),
    }
    rope = {"mrope_section": text["mrope_section"], "mrope_interleaved": text["mrope_interleaved"]}
    vlm = {
        **golden["tokens"],
        "text_config": {**text, "rope_scaling": rope},
        "vision_config": golden["vision_config"],
    }
    config = ModelConfig.from_hf({**head, "vlm_config": vlm, "dit_config": dit})
    family = golden.get("family", "xr0")
    if family != config.family:
        raise ValueError(f"family is {family!r:.40}, its action_head that of {config.family!r}")
    return config


def golden_inputs(case: Mapping[str, Tensor], config: ModelConfig) -> ModelInputs:
    """A case's, a video as the images that it is computed as: one for each of its temporal patches."""
    ids, mask = case["input_ids"], case["attention_mask"].bool()
    if config.tokens.video is not None:
        ids = ids.masked_fill(ids == config.tokens.video, config.tokens.image)
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    common, shortest = 0, min(map(len, rows))
    while common < shortest and len({row[common] for row in rows}) == 1 and rows[0][common] != config.tokens.image:
        common += 1
    grids, pixels = _pictures(case)
    return ModelInputs(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=case[pixels],
        image_grids=tuple((int(height), int(width)) for times, height, width in case[grids] for _ in range(int(times))),
        position_ids=case["vlm_position_ids"],
        preamble_length=common,
        state=case["state"],
        action_mask=case["action_mask"],
    )


def _pictures(case: Mapping[str, Tensor]) -> tuple[str, str]:
    """Names of the grids and patches that a case shows: of images, or of videos."""
    shown = [tuple(shapes) for shapes in PICTURE_SHAPES if shapes.keys() & case.keys()]
    if len(shown) > 1:
        raise ValueError("expected images or videos, got both")
    grids, pixels = shown[0] if shown else PICTURE_SHAPES[0]
    return grids, pixels


def chunk_inputs(case: Mapping[str, Tensor], prefix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """noise and padded prefix, (B, T, A) each, and the prefix's lengths, (B,)."""
    noise = case["noise"]
    padded = torch.zeros_like(noise)
    padded[:, : prefix.shape[1]] = prefix
    return noise, padded, torch.full((len(noise),), prefix.shape[1])


def check_case(case: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raises KeyError for a tensor that is missing, ValueError for one that is not as CASE_SHAPES has it, or whose
    values the model has no place for."""
    text, vision, head = config.text, config.vision, config.head
    sizes = {"1": 1, "3": 3, "S": head.state_length, "s": head.state_dim, "A": head.action_dim, "C": vision.patch_dim}
    sizes |= {"K": text.num_kv_heads, "D": text.head_dim, "H": text.hidden_size}
    grids_name, pixels_name = _pictures(case)
    shapes = {**CASE_SHAPES, grids_name: "I3", pixels_name: "PC"}
    if "train.loss" in case:
        shapes |= {**TRAINING_SHAPES, **LOSS_SHAPES[config.family]}
    if "train.loss" in case and "prefix" in case and case["prefix"].numel():
        shapes["train.l1_error"] = "BqA"
    shapes |= {f"kv.{layer}.{part}": "BKND" for layer in range(head.num_layers) for part in ("key", "value")}
    for name, letters in shapes.items():
        tensor = case[name]
        # What the configuration does not say, the first tensor that has it does.
        for letter, size in zip(letters, tensor.shape, strict=False):
            sizes.setdefault(letter, size)
        expected = [sizes[letter] for letter in letters if letter in sizes]
        if list(tensor.shape) != expected or (0 in expected and "p" not in letters):
            raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
        if tensor.is_floating_point() == (name in WHOLE_NUMBERS) or tensor.dtype == torch.bool:
            raise ValueError(f"{name}: got {tensor.dtype}")
    if sizes["p"] > sizes["T"]:
        raise ValueError(f"prefix: expected at most {sizes['T']} actions, got {sizes['p']}")
    if sizes.get("q", sizes["T"] - sizes["p"]) != sizes["T"] - sizes["p"]:
        raise ValueError(f"train.l1_error: expected {sizes['T'] - sizes['p']} actions, got {sizes['q']}")
    ids, grids, positions = case["input_ids"], case[grids_name], case["vlm_position_ids"]
    if ids.min() < 0 or ids.max() >= text.vocab_size:
        raise ValueError(f"input_ids: expected ids from 0 below {text.vocab_size}")
    if positions.min() < 0 or positions.max() > POSITIONS[1]:
        raise ValueError(f"vlm_position_ids: expected 0 to {POSITIONS[1]}")
    merge, patches = vision.spatial_merge_size, sizes["P"]
    is_video = "video" in grids_name
    token = config.tokens.video if is_video else config.tokens.image
    shown = 0 if token is None else int((ids == token).sum()) * merge**2
    fits = grids.min() > 0 and not bool((grids[:, 1:] % merge).any()) and (is_video or bool((grids[:, 0] == 1).all()))
    if not fits or grids.max() > patches or int(grids.prod(1).sum()) != patches or shown != patches:
        raise ValueError(f"{grids_name}, input_ids: expected {patches} patches in all, as {pixels_name} has")


def load_case(path: Path) -> dict[str, Tensor]:
    try:
        refuse_pointer(path)
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error})") from None
