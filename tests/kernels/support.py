"""What the tests of kernels share: where they run, poisoned outputs, and how far from the oracle a result may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xr0_engine.env import emulated_arch

DEVICE = torch.device("cuda" if torch.cuda.is_available() and emulated_arch() is None else "cpu")
"""Where kernels run: on the GPU, or in the interpreter or the emulator."""
ARCHS = (89, 90, 120)
"""Compute capabilities of the chips that kernels are compiled for without one: Ada, Hopper, Blackwell."""

DTYPES = [
    # Bfloat16 is what GPUs run; the others' code differs from its by conversions, and float32's by products.
    pytest.param(torch.float32, id="float32", marks=pytest.mark.one_chip),
    pytest.param(torch.float16, id="float16", marks=pytest.mark.one_chip),
    # The interpreter's products are wrong on bfloat16.
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.compiled),
]

FLOAT32_ERROR = 1e-5
"""Of the largest magnitude: sums of up to some thousand float32 products in another order, and exp's last bits."""
LOW_PRECISION_FACTOR = 2
"""A kernel may be so many times as wrong as PyTorch in the same dtype, both against float32."""


class Frame:
    """An output inside a larger buffer full of NaN: what is left unwritten or written beyond shows.

    view: (*shape), with room beyond every dimension but the first; its rows are not adjacent.
    """

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.buffer = torch.full((*(size + 3 for size in shape[:-1]), shape[-1] + 16), torch.nan, dtype=dtype)
        self.buffer = self.buffer.to(DEVICE)
        self.shape = shape
        self.view = self.buffer[tuple(slice(size) for size in shape)]

    def result(self) -> Tensor:
        """The view, once nothing in it is NaN and all beyond it is."""
        inside = torch.zeros_like(self.buffer, dtype=torch.bool)
        inside[tuple(slice(size) for size in self.shape)] = True
        assert not self.view.isnan().any(), "elements were left unwritten, or are NaN"
        assert self.buffer[~inside].isnan().all(), "something was written beyond the output"
        return self.view


def spread(x: Tensor) -> Tensor:
    """The same values, with NaN between the rows and after them."""
    frame = Frame(*x.shape, dtype=x.dtype)
    frame.view.copy_(x)
    return frame.view


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values, strided as spread has it, the same on every device."""
    return spread((scale * torch.randn(shape)).to(DEVICE, dtype))


def assert_close(out: Tensor, exact: Tensor, plain: Tensor | None = None) -> None:
    """exact: the oracle's float32 result; plain: PyTorch's in out's own dtype, needed if that is not float32."""
    error = (out.float() - exact).abs().max().item()
    if out.dtype == torch.float32 and plain is None:
        allowed = FLOAT32_ERROR * max(1.0, exact.abs().max().item())
    else:
        assert plain is not None, "low precision is judged against PyTorch in low precision"
        allowed = LOW_PRECISION_FACTOR * (plain.float() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_as_plain(out: Tensor, exact: Tensor, plain: Tensor) -> None:
    """assert_close, with plain in out's dtype whatever that is; in float32 it must agree with the oracle too."""
    if out.dtype == torch.float32:
        assert_close(plain, exact)
        assert_close(out, exact)
    else:
        assert_close(out, exact, plain)
