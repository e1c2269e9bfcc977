"""Small device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_l2(pointers):
    """Start loading the 128-byte lines at valid addresses into the L2 cache. Not for the interpreter."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def gelu_tanh(x):
    """x float32. The tanh form, as x * sigmoid(2 u): 0.5 (1 + tanh(u)) is sigmoid(2 u)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gdc_begin(PDL: tl.constexpr):
    """After it, what earlier kernels wrote is there; lets the next kernel start. Nothing without dependent launch."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
