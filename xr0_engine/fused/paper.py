"""Kernels on paper: what ops launch on tensors of the meta device, and what a launch compiles to for any chip.

For whoever predicts what a chip does with them, asks how much scratch memory they take, or compiles them ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

from xr0_engine.backend import interpreted
from xr0_engine.kernels.arguments import Tactic
from xr0_engine.kernels.arguments import end_passes as end_passes
from xr0_engine.kernels.arguments import heads_of_tile as heads_of_tile
from xr0_engine.kernels.arguments import schedule_runs as schedule_runs
from xr0_engine.kernels.arguments import sharers_of as sharers_of

if TYPE_CHECKING:
    from xr0_engine.kernels.launch import Compiled as Compiled
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


def row_pieces(rows: int, tactic: Tactic) -> tuple[int, ...]:
    """Heights of the pieces of a group of a product's rows, by a schedule that has such."""
    from xr0_engine.kernels import product

    if tactic.schedule in ("swapped", "warpgroups"):
        return product.swapped_pieces(rows, tactic)
    return product.row_pieces(rows, tactic.block_m)


def compile_kernels(work: Callable[[], None], arch: int, done: Callable[[int, int], None]) -> list[Compiled]:
    """Compile every kernel variant that work launches, for a chip that need not be here.

    work: runs stages on tensors of the meta device. arch: compute capability. done: called with the number compiled
    and of all. Raises RuntimeError in Triton's interpreter, which hides the kernels from the compiler.
    """
    from xr0_engine.kernels.launch import compile_for, variants

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    with recording() as launches:
        work()
    calls = variants(launches)
    compiled = []
    for number, call in enumerate(calls, 1):
        compiled.append(compile_for(call, arch))
        done(number, len(calls))
    return compiled


def compile_beside(work: Callable[[], None], threads: int) -> None:
    """Compile the kernels that work launches, several at a time, and run none; they are found compiled afterwards.

    work: calls with tactics that are no library's, on a CUDA GPU. What cannot be compiled is left out: its call will
    say why.
    """
    from xr0_engine.kernels.launch import compiling

    with compiling(threads):
        work()
