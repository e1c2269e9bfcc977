"""What the stages of a streamed flow loop do (kernels/streamed.py), for whoever predicts what they take of a chip.

Their weights come ahead of them, so a stage's own time is its barrier, a trip for its rows, its instructions and its
end; what all weights together take of memory and L2 is model.py's stream_share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xr0_engine.bench.predict.code import Code
from xr0_engine.bench.predict.work import FLOAT32, HALF, Work, glue_work
from xr0_engine.fused.backends import Shape
from xr0_engine.fused.ops import FlowBuffers

if TYPE_CHECKING:
    from xr0_engine.fused.paper import Launch

BEGIN, WIDE, END, TOKENS = "scale", "wide", "euler", "tokens"
LAYER = ("qkv", "attention", "out", "gate_up", "down")
CHUNK_ROWS = 16
"""As kernels/ring.py: weight rows that a program multiplies at a time."""
HIDDEN = 64
"""As kernels/streamed_end.py: columns of the next step's input that a program computes at a step's end."""
QUERIES, WARPS = 16, 8
KEYS, HELD, HELD_VALUES, FEWER_VALUES = 64, 5, 4, 2
"""As kernels/streamed_attention.py, kernels/ring.py."""


def step_end(launch: Launch) -> tuple[str, ...]:
    """The stages behind a step's layers."""
    return (WIDE, END) if launch.arguments["W"].WIDE else (END,)


def stage_code(name: str, launch: Launch, code: Code) -> Code | None:
    """Of one stage: the kernel has all of them behind each other, but what it begins with, whose code counts for
    nothing."""
    stages = (*LAYER, *step_end(launch), TOKENS)
    assert len(code.stages) == len(stages), f"expected {len(stages)} stages in the code, got {len(code.stages)}"
    return None if name == BEGIN else code.of_stage(stages.index(name))


def shapes(buffers: FlowBuffers) -> dict[str, Shape]:
    """Of the stages that no op of its own is."""
    rows, columns = buffers.q.shape[0] * buffers.q.shape[2], buffers.start.shape[-1]
    return {BEGIN: (rows, columns), END: (rows, columns, buffers.z.shape[-1])}


def stage_work(name: str, shape: Sequence[int], launch: Launch) -> Work:
    """name: of a stage, BEGIN too. shape: as backends.py: loop_shapes has it. launch: of the whole loop."""
    widths, programs = launch.arguments["W"], math.prod(launch.grid)
    if name == BEGIN:
        rows, columns = shape
        return glue_work(min(programs, columns // CHUNK_ROWS), WARPS, rows * columns * (FLOAT32 + HALF))
    if name == "attention":
        return _attention(shape, launch)
    if name == END:
        rows, columns, actions = shape
        read = HALF * (widths.ROWS * columns + actions * columns + actions * HIDDEN)
        tiles = columns // HIDDEN
        return Work(
            min(programs, tiles),
            mma_operations=2.0 * widths.ROWS * widths.ACTIONS * (columns + HIDDEN),
            useful=2.0 * rows * actions * columns * 2,
            l2_bytes=read,
            trips=1,
            stages=2,
            end_bytes=HALF * widths.ROWS * HIDDEN,
            rounds=3,
            warps=WARPS,
        )
    return _product(name, shape, widths, programs)


def _product(name: str, shape: Sequence[int], widths: Any, programs: int) -> Work:
    rows, outputs, inputs = shape[:3]
    splits = inputs // widths.COLUMNS
    chunks = outputs // CHUNK_ROWS * splits
    busy = min(programs, chunks)
    trips = math.ceil(chunks / busy)
    weight = HALF * outputs * inputs
    # Of rows whose norm is taken, two sums of each slot.
    normed = 2 * FLOAT32 * widths.ROWS * widths.COLUMNS / CHUNK_ROWS if name in ("qkv", "gate_up") else 0.0
    # Of each output: queries, keys and values in float32; a gated one's half; of a stream both.
    end_bytes = {"qkv": FLOAT32, "gate_up": HALF / 2, WIDE: HALF}.get(name, FLOAT32 + HALF)
    return Work(
        busy,
        mma_operations=2.0 * widths.ROWS * CHUNK_ROWS * widths.COLUMNS * trips,
        useful=2.0 * rows * outputs * inputs,
        l2_bytes=HALF * widths.ROWS * widths.COLUMNS + normed,
        memory_bytes=weight,
        ahead_bytes=weight,
        trips=1,
        stages=2,
        end_bytes=trips * widths.ROWS * CHUNK_ROWS * end_bytes,
        rounds=1,
        combines=outputs // CHUNK_ROWS if splits > 1 else 0,
        parts=splits,
        part_bytes=widths.ROWS * CHUNK_ROWS * FLOAT32 if splits > 1 else 0,
        wasted=1 - rows / widths.ROWS,
        warps=WARPS,
        busy=chunks / (busy * trips),
        streamed_bytes=weight,
    )


def _attention(shape: Sequence[int], launch: Launch) -> Work:
    """A program has QUERIES queries of one head. What the L2 cache keeps comes from memory in the first step alone."""
    batch, heads, queries, groups, cached, dim = shape
    tiles = math.ceil(queries / QUERIES)
    own = FLOAT32 * dim * (QUERIES + 2 * queries)
    cache = 2.0 * batch * groups * cached * dim * HALF
    if launch.arguments["W"].KEPT:
        cache /= launch.arguments["last_step"] - launch.arguments["first_step"]
    values = HELD_VALUES if cached <= HELD * KEYS else FEWER_VALUES
    held = min(cached, HELD * KEYS) + min(cached, values * KEYS)
    return Work(
        batch * heads * tiles,
        mma_operations=4.0 * QUERIES * dim * (cached + queries),
        useful=4.0 * batch * queries * (cached + queries) * heads * dim,
        l2_bytes=own + (2 * cached - held) * dim * HALF,
        held_bytes=held * dim * HALF,
        memory_bytes=cache,
        ahead_bytes=cache,
        trips=1,
        stages=2,
        end_bytes=QUERIES * dim * HALF,
        rounds=1,
        special=QUERIES * (cached + queries),
        wasted=1 - queries / (tiles * QUERIES),
        warps=WARPS,
    )
