"""The attention of a streamed flow (streamed.py): a program has the queries of one head, and all its keys.

Its warps share out the keys of a product of queries and keys, and the columns of one of probabilities and values: so
of what a warp computes nothing has to be added up to another's, and the softmax alone goes round. Cached keys are
loaded, in the order in which a thread multiplies them, before the program waits for its queries. Head norm and rotation
as in whole_attention.py.

Shape legend: streamed.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from xr0_engine.kernels.device import with_last
from xr0_engine.kernels.ring import BLOCK, WARPS, WIDE, along, barrier, fragment_place, wait

KEYS = gl.constexpr(64)
"""Of a block."""
DEPTH = gl.constexpr(32)
"""Columns that four threads load of a key at a time."""
HELD, HELD_VALUES, FEWER_VALUES = gl.constexpr(5), gl.constexpr(4), gl.constexpr(2)
"""Blocks of keys and of values that a program holds while it waits; of more keys than those, fewer values."""
QUERIES = gl.constexpr(16)
LINE = gl.constexpr(64)
"""Numbers of a cache line."""


class Cache(NamedTuple):
    """A layer's KV block: kv_keys, kv_values with the same strides; begin, end: (B,). length: N."""

    kv_keys: Any
    kv_values: Any
    stride_b: Any
    stride_g: Any
    stride_n: Any
    begin: Any
    end: Any
    length: Any


class Turn(NamedTuple):
    """A layer's head norms, and the rotary tables, (B, Q, D / 2). window: tokens; scale: of scores, to base 2."""

    q_norm: Any
    k_norm: Any
    cos: Any
    sin: Any
    window: Any
    scale: Any


@gluon.constexpr_function
def _scores_layout() -> Any:
    return gl.NVMMADistributedLayout([2, 0], [1, WARPS], [16, 8])


@gluon.constexpr_function
def _own_layout(own: int) -> Any:
    """Of scores of a chunk's own keys. As long as they are few, every warp has all of them: nothing of theirs goes
    round then."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS, 1] if own == QUERIES else [1, WARPS], [16, 8])


@gluon.constexpr_function
def _head_layout() -> Any:
    """Of rows of half a head."""
    return gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def _values_layout() -> Any:
    """Of rows of a head, as they come from memory."""
    return gl.BlockedLayout([1, WIDE], [2, 16], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def _swizzled() -> Any:
    return gl.SwizzledSharedLayout(8, 1, 8, [1, 0])


@gluon.constexpr_function
def _keys_layout() -> Any:
    """(blocks of DEPTH columns, warps, keys of a warp, threads of a key, WIDE)."""
    return gl.BlockedLayout([1, 1, 1, 1, WIDE], [1, 1, 8, 4, 1], [1, WARPS, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.jit
def _order(HALF: gl.constexpr, layout: gl.constexpr):
    """(HALF,): the column that stands at each place of a product's K: as _load_keys has them."""
    place = gl.arange(0, HALF, layout=layout)
    within = place // BLOCK % 2 * 4 + place // 8 % 2 * 2 + place % 2
    column = place // DEPTH * DEPTH + place % 8 // 2 * WIDE + within
    return gl.max_contiguous(gl.multiple_of(column, 2), 2)


@gluon.jit
def _load_keys(cache, batch, group, first, end, HALF: gl.constexpr, POLICY: gl.constexpr):
    """(HALF, KEYS) twice, of the keys from first on, zeros from end on: both halves of a head, each as a product's
    second factor. A thread's WIDE columns are those of two of its instructions, which takes them out of order."""
    LAYOUT: gl.constexpr = _keys_layout()
    block = gl.arange(0, HALF // DEPTH, layout=along(0, LAYOUT))[:, None, None, None, None]
    warp = gl.arange(0, WARPS, layout=along(1, LAYOUT))[None, :, None, None, None]
    within = gl.arange(0, 8, layout=along(2, LAYOUT))[None, None, :, None, None]
    thread = gl.arange(0, 4, layout=along(3, LAYOUT))[None, None, None, :, None]
    number = gl.arange(0, WIDE, layout=along(4, LAYOUT))[None, None, None, None, :]
    key, column = first + warp * 8 + within, block * DEPTH + thread * WIDE + number
    place = cache.kv_keys + batch * cache.stride_b + group * cache.stride_g + key * cache.stride_n + column
    inside = (key < end) & (column >= 0)
    one = gl.load(place, inside, 0.0, eviction_policy=POLICY)
    other = gl.load(place + HALF, inside, 0.0, eviction_policy=POLICY)
    return _as_factor(one, HALF), _as_factor(other, HALF)


@gluon.jit
def _as_factor(keys, HALF: gl.constexpr):
    SPREAD: gl.constexpr = [HALF // DEPTH, WARPS, 8, 4, 2, 2, 2]
    FLAT: gl.constexpr = [HALF, KEYS]
    keys = gl.reshape(gl.permute(gl.reshape(keys, SPREAD), (0, 4, 5, 3, 6, 1, 2)), FLAT)
    return gl.convert_layout(keys, gl.DotOperandLayout(1, _scores_layout(), 2), assert_trivial=True)


@gluon.jit
def _load_values(cache, batch, group, first, end, DIM: gl.constexpr, POLICY: gl.constexpr):
    """(KEYS, DIM)."""
    LAYOUT: gl.constexpr = _values_layout()
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    values = cache.kv_values + (batch * cache.stride_b + group * cache.stride_g + first * cache.stride_n)
    place = values + (key * cache.stride_n + column)
    return gl.load(place, (key < end - first) & (column >= 0), 0.0, eviction_policy=POLICY)


class Factors(NamedTuple):
    """What both halves of heads' rows at place are normalised and turned by, (rows, D / 2): there before the rows are.
    A half's norm, times the cosine and times the sine."""

    place: Any
    first_cos: Any
    first_sin: Any
    second_cos: Any
    second_sin: Any


@gluon.jit
def _factors(place, row, norm, turn, batch, tokens, W: gl.constexpr):
    """Columns in the order of the keys'."""
    HALF: gl.constexpr = W.DIM // 2
    column = _order(HALF, gl.SliceLayout(0, _head_layout()))
    near = gl.minimum(row, tokens - 1)[:, None]
    angle = (batch * tokens + near) * HALF + column[None, :]
    cos, sin = gl.load(turn.cos + angle), gl.load(turn.sin + angle)
    first, second = gl.load(norm + column)[None, :], gl.load(norm + HALF + column)[None, :]
    return Factors(
        place + near * (3 * W.COLUMNS) + column[None, :], first * cos, first * sin, second * cos, second * sin
    )


@gluon.jit
def _turned(by, eps, W: gl.constexpr):
    """Both halves of a head's rows after its norm and rotation, (rows, D / 2) bfloat16 each."""
    HALF: gl.constexpr = W.DIM // 2
    first, second = gl.load(by.place), gl.load(by.place + HALF)
    squares = gl.sum(gl.fma(first, first, second * second), 1)
    scale = gl.rsqrt(gl.fma(squares, 1.0 / W.DIM, eps))[:, None]
    one = scale * gl.fma(first, by.first_cos, -second * by.second_sin)
    other = scale * gl.fma(second, by.second_cos, first * by.first_sin)
    return one.to(gl.bfloat16), other.to(gl.bfloat16)


@gluon.jit
def release_cache(keys, values, elements, W: gl.constexpr):
    """What the L2 cache was told to keep is as any other data from here on: that of a robot which does not come again
    would stay there instead of what others need. keys, values: of all layers, elements each."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    THREADS: gl.constexpr = 32 * WARPS
    lines = gl.cdiv(elements, LINE)
    thread = gl.program_id(0) * THREADS + gl.arange(0, THREADS, layout=LAYOUT)
    for first in tl.range(0, lines, gl.num_programs(0) * THREADS, disable_licm=True):
        place = gl.minimum(first + thread, lines - 1).to(gl.int64) * (2 * LINE)
        for cache in gl.static_range(2):
            start = (values if cache else keys).to(gl.int64)
            gl.inline_asm_elementwise(
                "applypriority.global.L2::evict_normal [$1], 128; mov.b32 $0, 0;", "=r,l", [start + place],
                dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@gluon.jit
def attention_stage(loop, stage, cache, turn, out, W: gl.constexpr):
    """out = attention of raw's queries over the cached tokens and their own; of a head, QUERIES queries a program."""
    b, tokens, context = loop.buffers, loop.tokens, loop.context
    DIM: gl.constexpr = W.DIM
    HALF: gl.constexpr = DIM // 2
    OWN: gl.constexpr = W.OWN
    BLOCKS: gl.constexpr = W.KEYS
    TILES: gl.constexpr = OWN // QUERIES
    POLICY: gl.constexpr = "evict_last" if W.KEPT else ""
    AHEAD: gl.constexpr = HELD_VALUES if BLOCKS <= HELD else FEWER_VALUES
    SCORES: gl.constexpr = _scores_layout()
    OWN_SCORES: gl.constexpr = _own_layout(OWN)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SCORES, 2)
    HEAD: gl.constexpr = _head_layout()
    VALUES: gl.constexpr = _values_layout()
    units = loop.rows // tokens * W.HEADS * TILES
    program = gl.program_id(0)
    if program >= units:
        wait(loop.barrier, stage)
    for unit in tl.range(program, units, gl.num_programs(0), disable_licm=True):
        first, head = unit % TILES * QUERIES, unit // TILES % W.HEADS
        batch, group = unit // TILES // W.HEADS, head // W.SHARE
        begin = gl.maximum(gl.load(cache.begin + batch), 0)
        end = gl.minimum(gl.load(cache.end + batch), cache.length)
        keys = ()
        for block in gl.static_range(BLOCKS):
            if block < HELD:
                keys = with_last(keys, _load_keys(cache, batch, group, begin + block * KEYS, end, HALF, POLICY))
        values = ()
        for block in gl.static_range(BLOCKS):
            if block < AHEAD:
                values = with_last(values, _load_values(cache, batch, group, begin + block * KEYS, end, DIM, POLICY))
        place = b.raw + batch * tokens * (3 * W.COLUMNS) + head * DIM
        own_row = gl.arange(0, OWN, layout=gl.SliceLayout(1, HEAD))
        of_keys = _factors(place + W.COLUMNS, own_row, turn.k_norm, turn, batch, tokens, W)
        row = first + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, HEAD))
        of_queries = _factors(place, row, turn.q_norm, turn, batch, tokens, W)
        own_row = gl.minimum(gl.arange(0, OWN, layout=gl.SliceLayout(1, VALUES)), tokens - 1)[:, None]
        column = gl.arange(0, DIM, layout=gl.SliceLayout(0, VALUES))[None, :]
        own_place = place + 2 * W.COLUMNS + own_row * (3 * W.COLUMNS) + column
        query = first + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, SCORES))[:, None]
        own_key = gl.arange(0, OWN, layout=gl.SliceLayout(0, OWN_SCORES))[None, :]
        distance = gl.convert_layout(query, OWN_SCORES, assert_trivial=True) - own_key
        allowed = (own_key < tokens) & (distance >= 0) & ((own_key < context) | (distance <= turn.window))
        if unit == program:
            wait(loop.barrier, stage)

        k1, k2 = _turned(of_keys, loop.eps, W)
        q1, q2 = _turned(of_queries, loop.eps, W)
        own_values = gl.load(own_place).to(gl.bfloat16)
        own1 = gl.allocate_shared_memory(gl.bfloat16, [OWN, HALF], _swizzled(), k1)
        own2 = gl.allocate_shared_memory(gl.bfloat16, [OWN, HALF], _swizzled(), k2)
        shared_values = gl.allocate_shared_memory(gl.bfloat16, [OWN, DIM], _swizzled(), own_values)
        queries1 = gl.allocate_shared_memory(gl.bfloat16, [QUERIES, HALF], _swizzled(), q1)
        queries2 = gl.allocate_shared_memory(gl.bfloat16, [QUERIES, HALF], _swizzled(), q2)
        barrier()
        q1, q2 = queries1.load(LEFT), queries2.load(LEFT)

        own_scores = gl.zeros([QUERIES, OWN], gl.float32, OWN_SCORES)
        own_q1 = gl.convert_layout(q1, gl.DotOperandLayout(0, OWN_SCORES, 2), assert_trivial=True)
        own_q2 = gl.convert_layout(q2, gl.DotOperandLayout(0, OWN_SCORES, 2), assert_trivial=True)
        own_scores = mma_v2(own_q1, own1.permute((1, 0)).load(gl.DotOperandLayout(1, OWN_SCORES, 2)), own_scores)
        own_scores = mma_v2(own_q2, own2.permute((1, 0)).load(gl.DotOperandLayout(1, OWN_SCORES, 2)), own_scores)
        own_scores = gl.where(allowed, own_scores, float("-inf"))
        scores = ()
        key = begin + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))[None, :]
        most = gl.full([QUERIES, KEYS], float("-inf"), gl.float32, SCORES)
        for block in gl.static_range(BLOCKS):
            if block >= HELD:
                keys = with_last(keys, _load_keys(cache, batch, group, begin + block * KEYS, end, HALF, POLICY))
            found = mma_v2(q1, keys[block][0], gl.zeros([QUERIES, KEYS], gl.float32, SCORES))
            found = mma_v2(q2, keys[block][1], found)
            found = gl.where(key + block * KEYS < end, found, float("-inf"))
            most = gl.maximum(most, found)
            scores = with_last(scores, found)
        # Every query sees itself: it has a maximum; those behind the last see somebody.
        top = gl.convert_layout(gl.max(own_scores, 1), ROWS, assert_trivial=True)
        top = -turn.scale * gl.maximum(top, gl.max(most, 1))[:, None]

        own_top = gl.convert_layout(top, OWN_SCORES, assert_trivial=True)
        exponentials = gl.exp2(gl.fma(own_scores, turn.scale, own_top))
        weight = gl.convert_layout(gl.sum(exponentials, 1), ROWS, assert_trivial=True)
        seen = gl.allocate_shared_memory(gl.bfloat16, [QUERIES, OWN], _swizzled(), exponentials.to(gl.bfloat16))
        barrier()
        total = gl.zeros([QUERIES, DIM], gl.float32, SCORES)
        total = mma_v2(seen.load(LEFT), shared_values.load(RIGHT), total)
        added = gl.zeros([QUERIES, KEYS], gl.float32, SCORES)
        for block in gl.static_range(BLOCKS):
            exponentials = gl.exp2(gl.fma(scores[block], turn.scale, top))
            added += exponentials
            block_seen = gl.allocate_shared_memory(
                gl.bfloat16, [QUERIES, KEYS], _swizzled(), exponentials.to(gl.bfloat16)
            )
            block_values = gl.allocate_shared_memory(gl.bfloat16, [KEYS, DIM], _swizzled(), values[block])
            if block + AHEAD < BLOCKS:
                later = begin + (block + AHEAD) * KEYS
                values = with_last(values, _load_values(cache, batch, group, later, end, DIM, POLICY))
            barrier()
            total = mma_v2(block_seen.load(LEFT), block_values.load(RIGHT), total)
        weight += gl.sum(added, 1)

        column = gl.arange(0, DIM, layout=gl.SliceLayout(0, SCORES))[None, :]
        place = out + head * (DIM * W.ROWS) + fragment_place(batch * tokens + query, column, W)
        gl.store(place, (total * (1.0 / weight)[:, None]).to(gl.bfloat16), query < tokens)
