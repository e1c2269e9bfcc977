"""A vision tower with random weights, started so that what it says differs from picture to picture.

Random weights turn what all pictures share (a grey table) into most of every visual token: a tenth of it differs, and a
policy learns to see late or never. So the first and the last layers of the tower are shifted and scaled to mean 0 and
standard deviation 1 over some pictures of the training data, as layer-sequential unit-variance initialisation does with
every layer (Mishkin and Matas, "All you need is a good init", 2016, arXiv:1511.06422).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xr0_engine.model.vision import VisionTower


@torch.no_grad()
def standardize_vision(tower: VisionTower, pixels: Tensor, grids: tuple[tuple[int, int], ...]) -> dict[str, Tensor]:
    """Change the patch embedding and the last layers of the mergers, in place; return what has changed by name.

    tower: float32. pixels: (P, patch_dim), and grids, of the pictures, as in ModelInputs. After it, over the patches,
    each channel of the patch embedding has mean 0 and all of them together std 1; so have the visual tokens and taps
    that the language model is given. Raises ValueError if there are no pictures, or if they are all alike.
    """
    if not grids:
        raise ValueError("model.standardize_vision: expected pictures in the training data, the first batch has none")
    _standardize(tower.patch_embed.proj, tower.patch_embed(pixels))
    tokens = tower(pixels, grids)
    changed = ["patch_embed.proj"]
    mergers = {"merger": tokens.tokens}
    mergers |= {f"deepstack_merger_list.{index}": tap for index, tap in enumerate(tokens.deepstack)}
    for name, out in mergers.items():
        changed.append(f"{name}.linear_fc2")
        _standardize(tower.get_submodule(changed[-1]), out)
    return {
        f"{name}.{part}": tower.get_submodule(name).get_parameter(part).detach()
        for name in changed
        for part in ("weight", "bias")
    }


def _standardize(last: Any, out: Tensor) -> None:
    """Shift and scale a layer with weight and bias so that out, (N, C), which it gave, would have had mean 0, std 1."""
    mean = out.mean(0)
    std = (out - mean).std()
    if not std > 0:
        raise ValueError("model.standardize_vision: the pictures of the first batch are all alike")
    last.bias.sub_(mean).div_(std)
    last.weight.div_(std)
