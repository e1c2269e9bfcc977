"""What every launcher does with its tensors: check their shapes, hand over their strides."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xr0_engine.kernels.arguments import Tactic


def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless tensor has this shape and its last dimension is contiguous."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}")


def expect_head_dim(dim: int) -> None:
    """Raises ValueError unless tiles of whole heads exist: a power of two, at least 16."""
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"head_dim: expected a power of two, at least 16; got {dim}")


def expect_tiles(tactic: Tactic, *names: str) -> None:
    """Raises ValueError unless these sizes of a tactic are powers of two, at least 16, and the split is one."""
    for name in names:
        size = getattr(tactic, name)
        if size < 16 or size & (size - 1):
            raise ValueError(f"tactic.{name}: expected a power of two, at least 16; got {size}")
    if tactic.split_k < 1:
        raise ValueError(f"tactic.split_k: expected at least 1, got {tactic.split_k}")


def strided(name: str, tensor: Tensor | None, dimensions: str) -> dict[str, Any]:
    """Kernel arguments: the tensor, and the strides of its leading dimensions as name_b, name_m, ...; 0 without one."""
    strides = {f"{name}_{letter}": tensor.stride(i) if tensor is not None else 0 for i, letter in enumerate(dimensions)}
    return {name: tensor, **strides}
