"""What every launcher does with its tensors: check their shapes, hand over their strides."""

from __future__ import annotations

from torch import Tensor


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


def strided(name: str, tensor: Tensor, dimensions: str) -> dict[str, Tensor | int]:
    """Kernel arguments: the tensor, and the strides of its leading dimensions as name_b, name_m, ..."""
    return {name: tensor, **{f"{name}_{letter}": tensor.stride(i) for i, letter in enumerate(dimensions)}}
