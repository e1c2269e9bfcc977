"""What the fused ops take besides tensors. No triton here: the oracle (reference.py) takes the same.

Shape legend: B batch, M rows of each, K columns in, N columns out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STATS_COLUMNS = 64
"""One partial sum of a row covers so many columns: whoever writes a row adds them up alone, in one fixed order."""


SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Compute capability -> bytes of shared memory that one block may use."""


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight. data: (N, K), K contiguous; 8-bit data come with scale, (N,) float32 per output."""

    data: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class InputNorm:
    """Normalisation of a product's input rows, applied to the output rows instead: nothing waits for whole rows.

    The norm's own weight is folded into the product's weight or column scale, its bias into the product's bias.
    sums: (slots, B, M, 2) float32, partial sums of each row of the input, as StatsOut describes.
    kind: rms: x / rms(x). layer: (x - mean(x)) / std(x), second sums plain; needs column_sums, (N,) float32, the sum of
    each row of the folded weight. double_rms: rms norm with a weight, then rms norm; second sums weighted.
    """

    sums: Tensor
    eps: float
    kind: Literal["rms", "layer", "double_rms"] = "rms"
    column_sums: Tensor | None = None


@dataclass(frozen=True)
class Residual:
    """out = base + gate * product + extra, with base = x, or rms_norm(x) * weight where sums are given.

    x: (B, M, N). gate: (N,) float32, or None = 1. sums: (slots, B, M, 2) float32 of x, weight: (N,) float32.
    extra: (rows, N), added where extra_index (B, M) int32 names one of its rows; -1 names none.
    """

    x: Tensor
    gate: Tensor | None = None
    sums: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0
    extra: Tensor | None = None
    extra_index: Tensor | None = None


@dataclass(frozen=True)
class StatsOut:
    """Where to put partial sums of the rows written, taken in float32 before rounding to out's dtype.

    sums: (slots, B, M, 2) float32, slots = ceil(N / STATS_COLUMNS), all written. [..., 0] of x * x; [..., 1] of
    (weight * x) ** 2 where a weight (N,) float32 is given, of x otherwise.
    """

    sums: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Tactic:
    """How one kernel runs. library: the product by torch (cuBLASLt), what surrounds it by one kernel of ours."""

    block_m: int = 32
    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    library: bool = False


class Workspace:
    """Scratch memory of split reductions, for kernels that run one after another on one stream.

    It grows until a CUDA graph is being captured; a call that was made before can be captured. Counters are zero
    between kernels: who arrives last at one puts it back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    def partials(self, elements: int) -> Tensor:
        """(elements,) float32, not initialised."""
        if self._partials.numel() < elements:
            self._refuse_under_capture()
            self._partials = torch.empty(elements, dtype=torch.float32, device=self.device)
        return self._partials[:elements]

    def counters(self, count: int) -> Tensor:
        """(count,) int32, all zero."""
        if self._counters.numel() < count:
            self._refuse_under_capture()
            self._counters = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._counters[:count]

    def _refuse_under_capture(self) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a workspace cannot grow while a CUDA graph is captured: run the step once before")
