"""Prompts as the fused path lays them out: padded on the right, in buckets, behind their kept preamble."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.types import ModelInputs

PROMPT_BUCKET = 8
"""Prompts are padded to a multiple of so many tokens: one captured graph serves all instructions of a bucket. What is
padded is computed: 194 tokens become 200, of which 17 are kept and 183 computed. It is what an MMA multiplies at least,
where tokens are its columns (kernels/swapped.py)."""


@dataclass(frozen=True)
class SessionKey:
    """What buffers and graphs are made for.

    patch_columns: of pixel_values. preamble: ids of the kept first tokens; tokens: N, these included.
    """

    batch: int
    grids: tuple[tuple[int, int], ...]
    patch_columns: int
    tokens: int
    preamble: tuple[int, ...]
    chunk_length: int


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts padded on the right: what of ModelInputs changes from call to call, as int32 arrays.

    ids, image_index: (B, M); positions: (3, B, M); next_position: (3, B); lengths: (B,), preamble included.
    """

    ids: np.ndarray
    image_index: np.ndarray
    positions: np.ndarray
    next_position: np.ndarray
    lengths: np.ndarray


def session_key(inputs: ModelInputs) -> SessionKey:
    batch, columns = inputs.attention_mask.shape
    longest = int(inputs.attention_mask.sum(1).max())
    pad = columns - int(inputs.attention_mask[0].sum())
    preamble = inputs.input_ids[0, pad : pad + inputs.preamble_length]
    return SessionKey(
        batch=batch,
        grids=inputs.image_grids,
        patch_columns=inputs.pixel_values.shape[1],
        tokens=bucket(longest),
        preamble=tuple(preamble.tolist()),
        chunk_length=inputs.action_mask.shape[1],
    )


def bucket(tokens: int) -> int:
    return -(-tokens // PROMPT_BUCKET) * PROMPT_BUCKET


def right_padded(inputs: ModelInputs, key: SessionKey, config: ModelConfig) -> Prompts:
    """Prompts padded on the left, as ModelInputs has them, to the session's layout, without the kept preamble.

    Raises ValueError if image tokens and images do not match.
    """
    ids, mask = inputs.input_ids.numpy(), inputs.attention_mask.numpy()
    positions = inputs.position_ids.numpy()
    preamble, own = len(key.preamble), key.tokens - len(key.preamble)
    out = Prompts(
        ids=np.zeros((key.batch, own), np.int32),
        image_index=np.full((key.batch, own), -1, np.int32),
        positions=np.zeros((3, key.batch, own), np.int32),
        next_position=np.zeros((3, key.batch), np.int32),
        lengths=mask.sum(1).astype(np.int32),
    )
    images = 0
    for row, keep in enumerate(mask):
        kept_ids, kept_positions = ids[row, keep], positions[:, row, keep]
        count = len(kept_ids) - preamble
        out.ids[row, :count] = kept_ids[preamble:]
        out.positions[:, row, :count] = kept_positions[:, preamble:]
        out.next_position[:, row] = kept_positions.max(1) + 1
        slots = np.flatnonzero(kept_ids[preamble:] == config.tokens.image)
        out.image_index[row, slots] = np.arange(images, images + len(slots))
        images += len(slots)
    expected = sum(height * width for height, width in key.grids) // config.vision.spatial_merge_size**2
    if images != expected:
        raise ValueError(f"input_ids hold {images} image tokens, the images give {expected}")
    return out


def left_padded(cache: Tensor, mask: Tensor) -> Tensor:
    """(L, B, G, tokens, D) padded on the right -> (L, B, G, N, D) as mask (B, N) has it; padding is zero."""
    source = (mask.cumsum(1) - 1).clamp(min=0)
    index = source[None, :, None, :, None].expand(len(cache), -1, cache.shape[2], -1, cache.shape[4])
    return cache.gather(3, index) * mask[:, None, :, None]


def visible_range(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) bool -> first visible token and one past the last, (B,) int32 each. Raises ValueError for gaps."""
    count, begin = mask.sum(1), mask.int().argmax(1)
    column = torch.arange(mask.shape[1], device=mask.device)
    end = begin + count
    if not bool((mask == ((column >= begin[:, None]) & (column < end[:, None]))).all()):
        raise ValueError("mask: expected one run of visible tokens in each row, got a gap")
    return begin.int(), end.int()
