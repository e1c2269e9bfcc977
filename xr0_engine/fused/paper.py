"""Kernels on paper: what ops launch on tensors of the meta device, and what a launch compiles to for any chip.

For whoever predicts what a chip does with them.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from xr0_engine.kernels.launch import Launch as Launch


class Binary(NamedTuple):
    """cubin: the machine code; shared: bytes of a block; warps: of a block, those that the compiler adds included."""

    cubin: bytes
    shared: int
    warps: int


def recording() -> AbstractContextManager[list[Launch]]:
    """Within, launches on the meta device are written down instead of run."""
    from xr0_engine.kernels import launch

    return launch.recording()


def variant(call: Launch) -> Hashable:
    """The same for launches of the same code."""
    from xr0_engine.kernels.launch import Signature

    return Signature(call).key


def compile_launch(call: Launch, arch: int) -> Binary:
    """For a compute capability. Raises compiler_faults (backends.py) for what cannot be compiled."""
    from xr0_engine.kernels.launch import DEPENDENT_LAUNCH_FROM, Signature, compile_call

    binary = compile_call(call, Signature(call, arch >= DEPENDENT_LAUNCH_FROM), arch)
    # Specialised warps come on top of those that were asked for.
    warps = getattr(binary.metadata, "total_num_warps", None) or call.warps
    return Binary(binary.asm["cubin"], int(binary.metadata.shared), int(warps))


def row_pieces(rows: int, block_m: int) -> tuple[int, ...]:
    """As kernels/product.py."""
    from xr0_engine.kernels import product

    return product.row_pieces(rows, block_m)
