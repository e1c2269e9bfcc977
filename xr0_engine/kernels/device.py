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


POLL = tl.constexpr("""
{
.reg .pred again;
.reg .b32 value;
mov.u32 value, %tid.x;
setp.ne.u32 again, value, 0;
@again bra DONE;
POLL:
ld.acquire.gpu.global.b32 value, [$1];
setp.lt.s32 again, value, $2;
@again bra POLL;
DONE:
mov.b32 $0, 0;
}
""")
"""The first thread reads an int32 until it is at least a number; the others go on."""


@triton.jit
def wait_for(counter, count):
    """Hold the program until the int32 at counter, which only grows, is at least count. Not for the interpreter.

    The first thread alone reads it, again and again, past the caches: more readers would stand in the way of those who
    count. Its loads acquire what was released by whoever counted up to there; the block's barrier passes that on to the
    other threads, whose later loads see it too.
    """
    tl.inline_asm_elementwise(POLL, "=r,l,r", [counter, count], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def tile_of(program, row_tiles, SPLIT_K: tl.constexpr):
    """(row tile, split, column tile) of a program."""
    rest = program // row_tiles
    return program % row_tiles, rest % SPLIT_K, rest // SPLIT_K


@triton.jit
def paired(first, distance, N: tl.constexpr):
    """N / 2 pairs (first + i, first + i + distance), flattened: tl.split then parts them within each thread."""
    column = tl.arange(0, N)
    return first + column // 2 + (column % 2) * distance


@triton.jit
def with_last(values, value):
    """values, a tuple, and one more. Triton unpacks no tuple within another."""
    return values + (value,)  # noqa: RUF005


@triton.jit
def rows_of(row_tile, rows, batch_rows, BLOCK_M: tl.constexpr):
    """(batch, row, is it one) of a tile's rows; those behind the last are the last again."""
    return rows_from(row_tile * BLOCK_M, rows, batch_rows, BLOCK_M)


@triton.jit
def rows_from(first, rows, batch_rows, BLOCK_M: tl.constexpr):
    """rows_of, of the rows from first on.

    batch and row are int64: a row's place in its batch may be beyond 2^31 elements, in the patches of many images.
    """
    index = first + tl.arange(0, BLOCK_M)
    inside = index < rows
    index = tl.minimum(index, rows - 1)
    batch = index // batch_rows
    return batch.to(tl.int64), (index - batch * batch_rows).to(tl.int64), inside


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


@triton.jit
def sin_cos(angle):
    """(sin, cos) of a float32 angle, to float32 accuracy up to 100,000 radians.

    The library's functions keep their path for huge angles in local memory, which no rotary table needs. Here: quarter
    turns are taken off in four parts, then Taylor series on what is left, within 0.8 radians. The first three parts
    have 8 bits each: times 16 bits of quarter turns they are exact, also where an fma rounds twice, as in the
    interpreter before Triton 3.9.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = tl.fma(quarter, -1.5703125, angle)
    x = tl.fma(quarter, -0.0004825592041015625, x)
    x = tl.fma(quarter, -1.2665987014770508e-06, x)
    x = tl.fma(quarter, -9.92093629470503e-10, x)
    square = x * x
    sin = 1.0 / 362880 * square - 1.0 / 5040
    sin = x + x * square * (square * (square * sin + 1.0 / 120) - 1.0 / 6)
    cos = square * (1.0 / 40320 - 1.0 / 3628800 * square) - 1.0 / 720
    cos = 1.0 + square * (square * (square * cos + 1.0 / 24) - 0.5)
    turns = quarter.to(tl.int32) & 3
    swapped = (turns & 1) == 1
    first, second = tl.where(swapped, cos, sin), tl.where(swapped, sin, cos)
    return tl.where(turns >= 2, -first, first), tl.where((turns == 1) | (turns == 2), -second, second)
