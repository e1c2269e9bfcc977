"""What several tests share: small configurations, checkpoints and inputs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from xr0_engine.config import ModelConfig
from xr0_engine.model.weights import load_model, read_index
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.robot.preprocess import position_ids
from xr0_engine.sizes import tiny_config
from xr0_engine.types import ModelInputs

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get("XR0_GOLDEN", ROOT.parent / "shared" / "golden"))
CPU = torch.device("cpu")


def make_config(text=None, vision=None, head=None) -> ModelConfig:
    """tiny_config with some sizes replaced; the vision tower's width follows the text's."""
    base = tiny_config()
    new_text = replace(base.text, **(text or {}))
    return replace(
        base,
        text=new_text,
        vision=replace(base.vision, **{"out_hidden_size": new_text.hidden_size, **(vision or {})}),
        head=replace(base.head, **(head or {})),
    )


def load(folder: Path, dtype: torch.dtype = torch.float32) -> XR0Model:
    return load_model(ModelConfig.load(folder), read_index(folder), CPU, dtype)


def random_inputs(
    config: ModelConfig,
    rows: list[list[tuple[int, int]]],
    texts: list[list[int]],
    preamble_tokens: int = 4,
    seed: int = 0,
) -> ModelInputs:
    """Random prompts: per row some image grids (patches), and numbers of text tokens before, between and after them.

    The first preamble_tokens tokens are the same in every row, and preamble_length says so.
    """
    rng = np.random.default_rng(seed)
    head = config.head
    common = rng.integers(0, 300, preamble_tokens)
    merge = config.vision.spatial_merge_size
    prompts = []
    for grids, lengths in zip(rows, texts, strict=True):
        parts = [common, rng.integers(0, 300, lengths[0])]
        for (height, width), length in zip(grids, lengths[1:], strict=True):
            parts += [np.full(height * width // merge**2, config.tokens.image), rng.integers(0, 300, length)]
        prompts.append(np.concatenate(parts))
    total = max(map(len, prompts))
    ids = np.zeros((len(rows), total), np.int64)
    mask = np.zeros((len(rows), total), bool)
    for row, prompt in enumerate(prompts):
        ids[row, total - len(prompt) :] = prompt
        mask[row, total - len(prompt) :] = True
    grids = tuple(grid for row in rows for grid in row)
    positions = [
        position_ids(row_ids, row_mask, row_grids, config.tokens.image, merge)
        for row_ids, row_mask, row_grids in zip(ids, mask, rows, strict=True)
    ]
    batch, patches = len(rows), sum(height * width for height, width in grids)
    action_mask = np.ones((batch, head.action_length, head.action_dim), np.float32)
    action_mask[..., -3:] = 0
    return ModelInputs(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        pixel_values=torch.from_numpy(rng.uniform(-1, 1, (patches, config.vision.patch_dim)).astype(np.float32)),
        image_grids=grids,
        position_ids=torch.from_numpy(np.stack(positions, axis=1)),
        preamble_length=preamble_tokens,
        state=torch.from_numpy(rng.standard_normal((batch, head.state_length, head.state_dim)).astype(np.float32)),
        action_mask=torch.from_numpy(action_mask),
    )
