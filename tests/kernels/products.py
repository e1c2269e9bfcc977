"""What the tests of linear, swiglu and qkv share: tactics, inputs with their norms, a product as the textbook has it.

The textbook normalises rows first and multiplies then, in the dtype of its input; the kernels and their oracle multiply
first. That both agree is what the oracle is tested by; how far the textbook is off in low precision is what the kernels
are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.support import DEVICE, randn, spread
from xr0_engine.kernels.arguments import STATS_COLUMNS, InputNorm, StatsOut, Tactic, Weight, Workspace
from xr0_engine.kernels.fused_reference import write_stats

EPS = 1e-3
"""Large enough to matter."""

SPLIT = pytest.param(Tactic(16, 64, 32, split_k=2), id="split K")
LIBRARY = pytest.param(Tactic(16, 64, 32, library=True), id="library")
STREAM = pytest.param(Tactic(64, 64, 32, split_k=3, schedule="stream"), id="stream")
TACTICS = [
    pytest.param(Tactic(16, 64, 64), id="whole K"),
    SPLIT,
    # Of three splits of a short K, the last has nothing to do.
    pytest.param(Tactic(32, 128, 32, split_k=3), id="large tiles"),
    LIBRARY,
]


def statistics(x: Tensor, weight: Tensor | None = None, centred: bool = False) -> Tensor:
    """StatsOut.sums of the rows x."""
    slots = -(-x.shape[-1] // STATS_COLUMNS)
    sums = spread(torch.zeros(slots, *x.shape[:2], 2, device=DEVICE))
    write_stats(x.float(), StatsOut(sums, weight, centred))
    return sums


@dataclass
class Product:
    """x, a weight, and what the model puts before and after their product. kind: of the norm, or None."""

    x: Tensor
    weight: Weight
    bias: Tensor | None
    col_scale: Tensor | None
    norm: InputNorm | None
    norm_weight: Tensor | None
    """The first norm's, of double_rms."""

    @classmethod
    def make(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        kind: str | None = None,
        bias: bool = False,
        col_scale: bool = False,
        x_dtype: torch.dtype | None = None,
    ) -> Product:
        """shape: (B, M, K, N); x_dtype: where x has another one than the weight."""
        batch, rows, inputs, outputs = shape
        x = spread(randn(batch, rows, inputs, dtype=x_dtype or dtype) + 0.5)
        data = randn(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
        scale = 1 + 0.2 * randn(inputs) if col_scale else None
        first_weight = 1 + 0.2 * randn(inputs) if kind == "double_rms" else None
        norm = None
        if kind is not None:
            column_sums = (data.float() if scale is None else data.float() * scale).sum(1) if kind == "layer" else None
            norm = InputNorm(statistics(x, first_weight, kind == "layer"), EPS, kind, column_sums)
        return cls(x, Weight(data), randn(outputs) if bias else None, scale, norm, first_weight)

    @property
    def arguments(self) -> dict:
        return {"bias": self.bias, "col_scale": self.col_scale, "norm": self.norm}

    def textbook(self, dtype: torch.dtype) -> Tensor:
        """norm(x) * col_scale @ weight^T + bias, in dtype throughout."""
        x, columns = self.x.to(dtype), (self.x.shape[-1],)
        kind = None if self.norm is None else self.norm.kind
        if kind == "layer":
            x = F.layer_norm(x, columns, eps=EPS)
        elif kind == "rms":
            x = F.rms_norm(x, columns, eps=EPS)
        elif kind == "double_rms":
            # The first norm's weight is part of col_scale in the model; here it is divided out of it again.
            x = F.rms_norm(F.rms_norm(x, columns, self.norm_weight.to(dtype), EPS), columns, eps=EPS)
            x = x / self.norm_weight.to(dtype)
        if self.col_scale is not None:
            x = x * self.col_scale.to(dtype)
        data = self.weight.data.to(dtype)
        if self.weight.scale is not None:
            data = data * self.weight.scale[:, None].to(dtype)
        return F.linear(x, data, None if self.bias is None else self.bias.to(dtype))


def workspace() -> Workspace:
    return Workspace(DEVICE)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_float(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def meta_sums(rows: int, columns: int) -> Tensor:
    return meta_float(-(-columns // STATS_COLUMNS), 1, rows, 2)


META_WORKSPACE = Workspace(torch.device("meta"))
