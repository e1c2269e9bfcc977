"""The nouns that pass between the stages, one frozen dataclass each.

Shape legend: B batch, N VLM tokens (left padded), P image patches, L DiT layers, T chunk length, A action columns,
S state columns, H heads, D head_dim. NumPy on the robot's side, torch on the model's; this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used: the message names every file or tensor at fault."""


@dataclass(frozen=True)
class Observation:
    """What the robot sees, is told and feels at one instant.

    images: view key -> (height, width, 3) uint8 RGB, keys as in the embodiment profile (`base`, `left_wrist`, ...).
    instruction: the task in plain words; capitalisation and the final full stop are added if missing.
    state: (S,) or (state_length, S) float32, proprio state, in the robot's own units, never normalised.
    robot_type: key of the checkpoint's action statistics; None if the checkpoint holds exactly one.
    timestamp_s: when the images were taken, on the caller's clock; copied to the chunk.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray
    robot_type: str | None = None
    timestamp_s: float | None = None


@dataclass(frozen=True)
class ActionChunk:
    """The next T actions.

    actions: (T, A) float32, robot units; for layout `bimanual` anchored at the observation's pose (see decode.py).
    normalized: (T, A) float32, the model's own units, as sampled.
    active_columns: (A,) bool, the columns that the robot type uses anywhere in the chunk.
    prefix_length: how many leading actions were given (committed), not sampled.
    timing_ms: stage -> milliseconds: preprocess, vision, prefill, flow (one `step` where they run as one CUDA graph),
    decode, total. In a batch: of the whole batch.
    """

    actions: np.ndarray
    normalized: np.ndarray
    active_columns: np.ndarray
    robot_type: str
    prefix_length: int = 0
    timestamp_s: float | None = None
    timing_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInputs:
    """A batch of observations as tensors, on the host until the engine moves them.

    input_ids: (B, N) int64. attention_mask: (B, N) bool, False = left padding.
    pixel_values: (P, 3 * temporal_patch * patch * patch) float32, all images in order of batch, then view.
    image_grids: per image (height, width) in patches. position_ids: (3, B, N) int64, M-RoPE.
    preamble_length: leading tokens (padding aside) equal in every row and free of images: their KV can be kept.
    state: (B, state_length, S) float32. action_mask: (B, T, A) float32, 1 = column used by the robot type.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    image_grids: tuple[tuple[int, int], ...]
    position_ids: Tensor
    preamble_length: int
    state: Tensor
    action_mask: Tensor


@dataclass(frozen=True)
class VisionTokens:
    """Vision tower output. tokens: (image tokens, hidden); deepstack: the same per tap, for the first text layers."""

    tokens: Tensor
    deepstack: tuple[Tensor, ...]


@dataclass(frozen=True)
class KVBlock:
    """The VLM's keys and values that the DiT reads, kept so that more than one chunk can be sampled from them.

    keys, values: (L, B, kv_heads, N, D), DiT layer i at index i; keys after k_norm and RoPE.
    mask: (B, N) bool, False = padding. next_position: (3, B) int64, max VLM position per M-RoPE axis, plus one.
    action_mask: (B, T, A) float32, from the observation's robot type.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    next_position: Tensor
    action_mask: Tensor
