"""AdamW whose moments take a byte each, for cards that four do not fit ("8-bit Optimizers", arXiv:2110.02861).

Blocks of a row's values share a scale, and each value is the nearest of 256 levels. Blocks never leave their row, and
weights are split over processes by rows: every number of processes has the same blocks, and opens the others'
checkpoints. Plain tensor operations, so the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, zeros

BLOCK, LEAST_ROW = 256, 64
"""Values that share a scale; a row that they do not divide is one block. Of rows shorter than these, and of what has
none (norms, biases), a scale would take as much as it saves: they keep float32."""
DECADES = 7
"""Powers of ten that the levels reach over."""
PIECE = 1 << 22
"""Values that are worked on at once, at the least a row."""
CODES, SCALE = ".codes", ".scale"
MOMENTS = {"exp_avg": True, "exp_avg_root": False}
"""Name -> whether it has signs. The second is kept as its square root, which is what the step divides by: the levels
then reach over twice as many decades of it."""


def blocks_in_row(shape: torch.Size) -> int:
    """Of a weight of this shape. 0: its moments stay float32."""
    row = math.prod(shape[1:])
    if len(shape) < 2 or row < LEAST_ROW:
        return 0
    return row // BLOCK if row % BLOCK == 0 else 1


def moment_bytes(shape: torch.Size) -> int:
    """Of both moments of a weight, or of a shard, of this shape."""
    blocks = blocks_in_row(shape)
    each = shape.numel() + shape[0] * blocks * torch.float32.itemsize if blocks else shape.numel() * 4
    return len(MOMENTS) * each


def work_bytes(shape: torch.Size) -> int:
    """At most, of what a step makes for a shard of this shape: both moments, the divisor, shares and their codes."""
    row = math.prod(shape[1:])
    return 5 * min(shape.numel(), max(PIECE // max(1, row), 1) * row) * torch.float32.itemsize


class AdamW8bit(torch.optim.Optimizer):
    """AdamW as torch has it, but for its moments between steps. groups: as of torch.optim, each with weight_decay."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def begin(self, parameter: nn.Parameter) -> None:
        """Give a parameter its state, zeros, if it has none."""
        state = self.state[parameter]
        if state:
            return
        # Not on a GPU, which would have to be waited for at each weight.
        state["step"] = torch.zeros(())
        blocks = blocks_in_row(parameter.shape)
        for name in MOMENTS:
            if not blocks:
                state[name] = torch.zeros_like(parameter)
                continue
            state[name + CODES] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[name + SCALE] = _zeros_like_rows(parameter, blocks)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.begin(parameter)
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        count = state["step"].item()
        (beta, beta_sq), rate = group["betas"], group["lr"]
        kept = {name: _local(value) for name, value in state.items() if name != "step"}
        weights, gradients = _local(parameter), _local(gradient)
        for rows in _pieces(weights):
            weight, slope = weights[rows], gradients[rows]
            mean, root = (_read(kept, name, rows) for name in MOMENTS)
            mean.lerp_(slope, 1 - beta)
            root.square_().mul_(beta_sq).addcmul_(slope, slope, value=1 - beta_sq).sqrt_()
            divisor = (root / math.sqrt(1 - beta_sq**count)).add_(group["eps"])
            weight.mul_(1 - rate * group["weight_decay"])
            weight.addcdiv_(mean, divisor, value=-rate / (1 - beta**count))
            _write(kept, "exp_avg", rows, mean)
            _write(kept, "exp_avg_root", rows, root)


@cache
def levels(is_signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values that a share of a block's largest is rounded to, ascending, and the 255 borders between them.

    Each decade from 1 down has half as many as the one above it, evenly spaced; 0 and 1 are among them. Without signs 0
    is for 0 alone: what divides is never rounded to it.
    """
    decades = []
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (DECADES - decade - is_signed) + 1, dtype=torch.float64)
        decades.append((edges[:-1] + edges[1:]) / 2 / 10**decade)
    above = torch.cat(decades)
    values = torch.cat([above, -above[: len(above) * is_signed], torch.tensor([0.0, 1.0])]).sort().values
    borders = (values[:-1] + values[1:]) / 2
    if not is_signed:
        borders[0] = 0
    return values.float().to(device), borders.float().to(device)


def _read(kept: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    """A copy, float32."""
    if name in kept:
        return kept[name][rows].clone()
    codes, scale = kept[name + CODES][rows], kept[name + SCALE][rows]
    values, _ = levels(MOMENTS[name], codes.device)
    shares = values.index_select(0, codes.flatten().int())
    return shares.view(*scale.shape, -1).mul_(scale.unsqueeze(-1)).view(codes.shape)


def _write(kept: Mapping[str, Tensor], name: str, rows: slice, moment: Tensor) -> None:
    if name in kept:
        kept[name][rows] = moment
        return
    codes, scale = kept[name + CODES][rows], kept[name + SCALE][rows]
    blocks = moment.view(*scale.shape, -1)
    scale.copy_(blocks.abs().amax(-1))
    # A block of zeros has zeros whatever it is divided by.
    shares = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    _, borders = levels(MOMENTS[name], codes.device)
    codes.copy_(torch.bucketize(shares, borders, out_int32=True).view(codes.shape))


def _pieces(weights: Tensor) -> Iterator[slice]:
    """Of its rows."""
    most = max(1, PIECE // math.prod(weights.shape[1:]))
    for begin in range(0, len(weights), most):
        yield slice(begin, begin + most)


def _local(value: Tensor) -> Tensor:
    """What this process has of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def _zeros_like_rows(parameter: Tensor, columns: int) -> Tensor:
    """(rows of the parameter, columns) float32, split as the parameter is."""
    shape = (len(parameter), columns)
    if isinstance(parameter, DTensor):
        return zeros(shape, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(shape, device=parameter.device)
