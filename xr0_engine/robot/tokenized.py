"""Model inputs of an observation whose sender has made tokens and patches of it already (spec section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from xr0_engine.config import ModelConfig
from xr0_engine.robot.limits import RELEASED_LIMITS, ImageLimits
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import position_ids
from xr0_engine.robot.prompt import MAX_TEXT_TOKENS, PromptTokenizer, check_prompt_tokens, preamble_length
from xr0_engine.types import ModelInputs, TokenizedObservation

RANGE_TOLERANCE = 1e-2
"""Pixels are scaled to [-1, 1] in whatever arithmetic the sender has; another scale is far beyond."""


def tokenized_inputs(
    observation: TokenizedObservation,
    views: Sequence[str],
    config: ModelConfig,
    statistics: ActionStatistics,
    tokenizer: PromptTokenizer,
    limits: ImageLimits = RELEASED_LIMITS,
    per_view: int | None = None,
) -> ModelInputs:
    """Model inputs of a batch of one; positions and the action mask are made here. The prompt is run as it was sent.

    views: of the robot type, an image for each. tokenizer: the checkpoint's, which knows what no prompt may hold.
    limits: of images, the checkpoint's. per_view: temporal patches of each view's video, which stands under the video
    token; None: views are pictures. Raises ValueError that names the field, what was expected and what came.
    """
    grids = _grids(observation.image_grids, views, config, limits, per_view or 1)
    check_prompt_tokens(sum(height * width for height, width in grids) // config.vision.spatial_merge_size**2)
    patches = sum(height * width for height, width in grids)
    pixel_values = _numbers("pixel_values", observation.pixel_values, (patches, config.vision.patch_dim))
    if not -1 - RANGE_TOLERANCE <= pixel_values.min() <= pixel_values.max() <= 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"pixel_values: expected pixels scaled to [-1, 1], x / 127.5 - 1, got {pixel_values.min():.3g} to "
            f"{pixel_values.max():.3g}"
        )
    input_ids = _input_ids(observation.input_ids, grids, config, per_view is not None)
    tokenizer.check_sent(input_ids)
    state = np.asarray(observation.state)
    shape = (config.head.state_length, config.head.state_dim)
    state = _numbers("state", state[None] if shape[0] == 1 and state.ndim == 1 else state, shape)
    if statistics.state is not None:
        state = statistics.state.normalize(np.reshape(observation.state, shape)).astype(np.float32)
    _check_mask(observation.action_mask, statistics.action_mask)
    attention = np.ones(input_ids.shape, bool)
    positions = position_ids(input_ids, attention, grids, config.tokens.image, config.vision.spatial_merge_size)
    return ModelInputs(
        input_ids=torch.from_numpy(input_ids)[None],
        attention_mask=torch.from_numpy(attention)[None],
        pixel_values=torch.from_numpy(pixel_values),
        image_grids=grids,
        position_ids=torch.from_numpy(positions)[:, None],
        preamble_length=preamble_length(input_ids, config.tokens.vision_start),
        state=torch.from_numpy(state)[None],
        action_mask=torch.from_numpy(statistics.action_mask)[None],
    )


def _check_mask(sent: np.ndarray | None, mask: np.ndarray) -> None:
    """What the sender takes the chunk to be is what will be made."""
    if sent is None:
        return
    if not isinstance(sent, np.ndarray) or sent.shape != mask.shape:
        raise ValueError(f"action_mask: expected numbers of shape {mask.shape}, got {_described(sent)}")
    if ((sent != 0) != (mask != 0)).any():
        raise ValueError(
            f"action_mask: expected the columns {mask.any(0).nonzero()[0].tolist()} of this robot type's statistics, "
            f"got {(sent != 0).any(0).nonzero()[0].tolist()}, or other steps of them: is it another robot's?"
        )


def _grids(
    grids: tuple[tuple[int, int], ...], views: Sequence[str], config: ModelConfig, limits: ImageLimits, per_view: int
) -> tuple[tuple[int, int], ...]:
    if len(grids) != len(views) * per_view:
        many = "one" if per_view == 1 else f"{per_view}, its temporal patches,"
        raise ValueError(f"image_grids: expected {many} for each view ({', '.join(views)}), got {len(grids)}")
    merge, pixels = config.vision.spatial_merge_size, config.vision.patch_size**2
    for grid in grids:
        if min(grid) < 1 or any(side % merge for side in grid):
            raise ValueError(f"image_grids: expected multiples of {merge} patches, got {grid}")
        if grid[0] * grid[1] * pixels > limits.max_pixels:
            raise ValueError(
                f"image_grids: expected at most {limits.max_pixels} pixels an image, got {grid} patches of {pixels}"
            )
        if limits.resize and grid[0] * grid[1] * pixels < limits.min_pixels:
            raise ValueError(
                f"image_grids: expected at least {limits.min_pixels} pixels an image, to which the processor enlarges "
                f"it, got {grid} patches of {pixels}"
            )
    return grids


def _input_ids(
    input_ids: np.ndarray,
    grids: tuple[tuple[int, int], ...],
    config: ModelConfig,
    videos: bool,
) -> np.ndarray:
    if not isinstance(input_ids, np.ndarray) or input_ids.ndim != 1 or input_ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids: expected whole numbers (N,), got {_described(input_ids)}")
    ids = np.array(input_ids, np.int64)
    tokens = config.tokens
    pad, other = (tokens.video, tokens.image) if videos else (tokens.image, tokens.video)
    if other is not None and other in ids:
        raise ValueError(
            f"input_ids: expected the token of {'videos' if videos else 'images'} ({pad}), got {other}, as this robot "
            f"type's views are {'videos' if videos else 'pictures'}"
        )
    if videos:
        # Computed as images' (spec section 8).
        ids[ids == pad] = tokens.image
    is_image = ids == tokens.image
    text = len(ids) - np.count_nonzero(is_image)
    if not 0 < text <= MAX_TEXT_TOKENS:
        raise ValueError(f"input_ids: expected 1 to {MAX_TEXT_TOKENS} tokens of text, got {text}")
    if ids.min() < 0 or ids.max() >= config.text.vocab_size:
        raise ValueError(
            f"input_ids: expected ids below the model's {config.text.vocab_size}, got {ids.min()} to {ids.max()}; "
            "were they made with this checkpoint's tokenizer?"
        )
    # Each image opens with its own token: runs that touch would pass for other grids.
    images = np.count_nonzero(is_image[1:] & (ids[:-1] == tokens.vision_start))
    if images != len(grids):
        raise ValueError(f"input_ids: expected {len(grids)} images, one for each grid, got {images}")
    return ids


def _numbers(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A copy as float32, finite: what came may be read-only."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or values.shape != shape:
        raise ValueError(f"{name}: expected numbers of shape {shape}, got {_described(values)}")
    # A value that float32 cannot hold becomes infinite and is refused with the others.
    with np.errstate(over="ignore"):
        converted = np.array(values, np.float32)
    if not np.isfinite(converted).all():
        raise ValueError(f"{name}: expected finite numbers in float32, got NaN or infinity")
    return converted


def _described(values: object) -> str:
    return f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
