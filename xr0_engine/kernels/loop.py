"""How a flow loop's stages are shared out among its programs (persistent.py): from tactics to tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import triton

from xr0_engine.kernels.arguments import FlowBuffers, FlowInputs, FlowWeights, Tactic, slot_columns
from xr0_engine.kernels.lambda_attention import OWN_BLOCK
from xr0_engine.kernels.product import MIN_DOT
from xr0_engine.kernels.shapes import expect, expect_head_dim, expect_tiles
from xr0_engine.kernels.stages import Tiling
from xr0_engine.kernels.whole import whole_steps

STAGES = ("qkv", "attention", "out", "gate_up", "down", "tokens")
"""What the tactic of each stage is called; the Euler step has none."""
WIDE = "wide"
"""The stage besides where an output layer's first product is one of its own."""
WIDE_BLOCK = 32
"""Rows, columns and depth of its default tile: with larger ones the loop spills registers on sm_120 (Triton 3.7)."""
WARPS = 8
"""One program has a processor to itself; with fewer warps the stage that needs most registers spills some."""
WITH_SLOTS = ("out", "down", "tokens")
"""Stages that leave sums of what they write."""
SKINNY_ROWS = 64
NARROW = 16
"""Columns of a linear layer's default tile: as many as a slot of the streams' sums has."""
FEW_OWN_KEYS = 16
"""At a time, where cached keys and values are held in registers meanwhile."""


@dataclass(frozen=True)
class Plan:
    """tiles: of each stage, by its name in capitals; own_keys: that attention takes at a time; programs: of the stage
    with most; the rest: of scratch memory."""

    tiles: dict[str, Any]
    own_keys: int
    programs: int
    counters: int
    partials: int


def loop_tactic(kind: str, shape: tuple[int, ...], alone: Tactic) -> Tactic:
    """How a stage runs for which nothing was measured. kind, shape: of its op; alone: tiled, as its own kernel.

    No product is split: a combine is as far a way as a barrier; linear layers have narrow tiles instead. Attention is
    split, and nothing is "whole": with all its stages so, the loop runs out of registers (Triton 3.9).
    """
    if kind == "lambda_attention":
        return alone
    rows, _, inputs = shape[:3]
    if kind != "linear" or rows > SKINNY_ROWS:
        return replace(alone, split_k=1)
    block_m, block_k = max(MIN_DOT, triton.next_power_of_2(rows)), 128 if inputs % 128 == 0 else 64
    return Tactic(block_m, NARROW, block_k, warps=WARPS, stages=alone.stages)


def wide_tactic(alone: Tactic) -> Tactic:
    """As loop_tactic, of the stage WIDE."""
    return Tactic(WIDE_BLOCK, WIDE_BLOCK, WIDE_BLOCK, warps=WARPS, stages=alone.stages)


def plan_loop(inputs: FlowInputs, buffers: FlowBuffers, context: int, tactics: Mapping[str, Tactic]) -> Plan:
    """Raises ValueError for tiles that cannot be, NotImplementedError for schedules that a loop does not have."""
    batch, heads, tokens, dim = buffers.q.shape
    groups, cached = inputs.keys.shape[2:4]
    columns, inner = buffers.start.shape[-1], buffers.hidden.shape[-1]
    rows, stream, own = batch * tokens, buffers.start.element_size(), buffers.mixed.element_size()
    for name in (*STAGES, *(() if buffers.wide is None else (WIDE,))):
        _check_tactic(name, tactics[name])
    raw = tactics["qkv"].schedule == "whole"
    attention, tiles = tactics["attention"], dict[str, Any]()
    if raw and attention.schedule != "whole":
        raise ValueError("tactics['attention'].schedule: expected 'whole', as tactics['qkv'] has, got 'tiled'")
    count = batch * groups * triton.cdiv(tokens * heads // groups, attention.block_m)
    # Of each stage: tiles, programs, float32 partial results.
    if attention.schedule == "whole":
        keys = attention.block_n * WARPS
        tiles["ATTENTION"] = (attention.block_m, keys, triton.cdiv(cached, keys), WARPS)
        work = [(count, 1, 0)]
    else:
        tiles["ATTENTION"] = (attention.block_m, attention.block_n, attention.split_k)
        work = [(count, attention.split_k, attention.block_m * (dim + 2))]
    # Rows, weight rows, depth and bytes of a number of a stage's product, weight rows of a tile; a gated layer's holds
    # as many of gate as of up.
    products = {
        "qkv": (rows, 3 * heads * dim, columns, stream, tactics["qkv"].block_n if raw else dim),
        "out": (rows, columns, columns, own, tactics["out"].block_n),
        "gate_up": (rows, 2 * inner, columns, stream, 2 * tactics["gate_up"].block_n),
        "down": (rows, columns, inner, own, tactics["down"].block_n),
        "tokens": (batch * (tokens - context), columns, columns, own, tactics["tokens"].block_n),
    }
    if buffers.wide is not None:
        width = buffers.wide.shape[-1]
        products[WIDE] = (batch * (tokens - context), width, columns, stream, tactics[WIDE].block_n)
    tiles[WIDE.upper()] = None
    slot = slot_columns("start_sums", buffers.start_sums, columns)
    for name, (product_rows, outputs, depth, size, width) in products.items():
        if name in WITH_SLOTS and width % slot:
            raise ValueError(f"tactics[{name!r}].block_n: expected a multiple of a slot's {slot} columns, got {width}")
        tiles[name.upper()] = tile = _tiling(tactics[name], depth, width, size, own)
        count = triton.cdiv(product_rows, tile.BLOCK_M) * triton.cdiv(outputs, width)
        work.append((count, tile.SPLIT_K, tile.BLOCK_M * width if tile.SPLIT_K > 1 or tile.PARTS == 0 else 0))
    return Plan(
        tiles,
        own_keys=FEW_OWN_KEYS if attention.schedule == "whole" else OWN_BLOCK,
        programs=max(count * split for count, split, _ in work),
        counters=max(count for count, _, _ in work),
        partials=max(count * split * size for count, split, size in work),
    )


def _check_tactic(name: str, tactic: Tactic) -> None:
    if tactic.library:
        raise ValueError(f"tactics[{name!r}]: expected one of our own kernels, got the library's")
    if tactic.schedule not in ("tiled", "whole"):
        raise NotImplementedError(
            f"tactics[{name!r}].schedule: expected 'tiled' or 'whole' in a loop, got {tactic.schedule!r}"
        )
    expect_tiles(tactic, "block_m", "block_n", "block_k")


def _tiling(tactic: Tactic, inputs: int, width: int, x_bytes: int, weight_bytes: int) -> Tiling:
    """Of a stage's product, whose tactic has as many warps as the loop. Raises ValueError for impossible tiles."""
    tile = tactic.block_m, width, tactic.block_k, tactic.split_k
    if tactic.schedule == "tiled":
        return Tiling(*tile)
    whole = whole_steps(x_bytes, weight_bytes, inputs, width, replace(tactic, warps=WARPS))
    # A loop has more to keep beside them: of what a kernel alone holds, half.
    return Tiling(*tile, whole.PARTS, whole.STEPS, max(1, whole.HELD // 2), max(1, whole.AHEAD // 2))


def check_loop(weights: FlowWeights, inputs: FlowInputs, b: FlowBuffers, context: int) -> None:
    """Raises ValueError for shapes that do not fit, as persistent.py: flow_loop has them, and for gaps in memory."""
    steps, layers, columns = weights.attention.scale.shape
    batch, heads, tokens, dim = b.q.shape
    groups, cached = inputs.keys.shape[2:4]
    inner, actions = b.hidden.shape[-1], b.z.shape[-1]
    width = actions if b.wide is None else b.wide.shape[-1]
    expect_head_dim(dim)
    if (weights.middle_norms is None) != (weights.final_norms is None):
        raise ValueError("weights.middle_norms: expected with final_norms, or neither; got one of the two")
    if heads % groups or heads * dim != columns:
        raise ValueError(f"q: expected {columns} columns, heads a multiple of {groups}; got {heads} heads of {dim}")
    chunk = (batch, tokens - context, actions)
    stream, sums = (batch, tokens, columns), (b.start_sums.shape[0], batch, tokens, 2)
    shapes = {
        "weights.addresses": (weights.addresses, (layers, 4)),
        **{
            f"weights.{half}.{name}": (getattr(getattr(weights, half), name), (steps, layers, width))
            for half, outputs in (("attention", 3 * columns), ("mlp", 2 * inner))
            for name, width in (("scale", columns), ("bias", outputs), ("gate", columns))
        },
        **{
            f"weights.{name}": (norms, (layers, columns))
            for name in ("middle_norms", "final_norms")
            if (norms := getattr(weights, name)) is not None
        },
        **{f"weights.{name}": (getattr(weights, name), (layers, dim)) for name in ("q_norms", "k_norms")},
        "weights.in_weights[0]": (weights.in_weights[0], (columns, actions)),
        "weights.in_weights[1]": (weights.in_weights[1], (columns, columns)),
        "weights.out_weights[0]": (weights.out_weights[0], (width, columns)),
        "weights.out_weights[1]": (weights.out_weights[1], (actions, width)),
        **({} if b.wide is None else {"wide": (b.wide, (batch, tokens - context, width))}),
        **{name: (getattr(b, name), stream) for name in ("start", "middle", "end", "mixed")},
        **{f"{name}_sums": (getattr(b, f"{name}_sums"), sums) for name in ("start", "middle", "end")},
        **{name: (getattr(b, name), (batch, heads, tokens, dim)) for name in ("q", "k", "v")},
        "raw": (b.raw, (batch, tokens, 3 * heads * dim)),
        **{name: (getattr(b, name), (batch, tokens, dim // 2)) for name in ("cos", "sin")},
        "hidden": (b.hidden, (batch, tokens, inner)),
        "embedded": (b.embedded, (batch, tokens - context, columns)),
        "z": (b.z, (2, *chunk)),
        "action_mask": (inputs.action_mask, chunk),
        **{name: (getattr(inputs, name), (batch,)) for name in ("begin", "end", "prefix_length")},
    }
    for name, (tensor, shape) in shapes.items():
        expect(name, tensor, shape)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    for name, cache in (("keys", inputs.keys), ("values", inputs.values)):
        expect(name, cache, (layers, batch, groups, cached, dim))
    if inputs.keys.stride() != inputs.values.stride():
        raise ValueError(f"values: expected the strides of keys, {inputs.keys.stride()}; got {inputs.values.stride()}")
