"""Layers that more than one part of the model is made of, and rotary tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr0_engine.kernels import reference

Part = TypeVar("Part", bound=nn.Module)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


class PackedLinears(nn.Module):
    """Linear layers that read the same input and can share one GEMM.

    Each keeps its own parameter under the checkpoint's name. `pack` makes these parameters slices of one tensor, which
    `project` then multiplies at once on a GPU. Packing is a matter of storage alone, and does not survive moving or
    copying the module: pack on the final device, then load. Quantised layers are packed if all have one format, for
    kernels; here each multiplies for itself.
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__()
        self.part_sizes = parts
        self.packed: Tensor | None = None
        self.packed_scale: Tensor | None = None
        for name, out_features in parts.items():
            self.add_module(name, nn.Linear(in_features, out_features, bias=False))

    def pack(self) -> None:
        linears = [self.get_submodule(name) for name in self.part_sizes]
        formats = {getattr(linear, "format", None) for linear in linears}
        if len(formats) > 1:
            return
        self.packed = self._joined(linears, "weight")
        self.packed_scale = None if formats == {None} else self._joined(linears, "weight_scale")

    def _joined(self, linears: list[nn.Module], name: str) -> Tensor:
        """That parameter of all, which become its slices."""
        parts = [linear.get_parameter(name).data for linear in linears]
        # Not every device joins float8.
        plain = [part.view(torch.int8) for part in parts] if parts[0].element_size() == 1 else parts
        whole = torch.cat(plain).view(parts[0].dtype)
        for linear, rows in zip(linears, whole.split(list(self.part_sizes.values())), strict=True):
            setattr(linear, name, nn.Parameter(rows, requires_grad=False))
        return whole

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        # On a CPU one product is slower than several: what follows would read halves of its rows.
        if self.packed is not None and self.packed_scale is None and x.is_cuda:
            return F.linear(x, self.packed).split(list(self.part_sizes.values()), dim=-1)
        return tuple(self.get_submodule(name)(x) for name in self.part_sizes)


class GatedMLP(PackedLinears):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, intermediate_size: int) -> None:
        super().__init__(size, {"gate_proj": intermediate_size, "up_proj": intermediate_size})
        self.down_proj = nn.Linear(intermediate_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


def parts_of(modules: Iterable[nn.Module], kind: type[Part]) -> list[Part]:
    """The modules as what they are: torch's containers forget it."""
    parts = []
    for part in modules:
        assert isinstance(part, kind), type(part)
        parts.append(part)
    return parts


def pack_linears(module: nn.Module) -> None:
    """Pack every PackedLinears inside module."""
    for part in module.modules():
        if isinstance(part, PackedLinears):
            part.pack()


def inverse_frequencies(
    dim: int, theta: float, device: torch.device | None = None, compat_bf16: bool = False
) -> Tensor:
    """(dim / 2,) float32 rotary frequencies theta ** (-2j / dim). compat_bf16: rounded to bfloat16."""
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    return frequencies.bfloat16().float() if compat_bf16 else frequencies


def mrope_axes(count: int, section: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
    """(count,) int64: interleaved M-RoPE: frequency j turns with axis (time, height, width)[j % 3] while its section
    lasts, else with time."""
    axis = torch.zeros(count, dtype=torch.long, device=device)
    axis[1 : 3 * section[1] : 3] = 1
    axis[2 : 3 * section[2] : 3] = 2
    return axis


def mrope_tables(positions: Tensor, frequencies: Tensor, section: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """positions: (3, B, N) integer; frequencies: (D / 2,) float32. Returns cos, sin: (B, 1, N, D) float32."""
    axis = mrope_axes(len(frequencies), section, positions.device)
    angles = positions[axis].permute(1, 2, 0).float() * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()
