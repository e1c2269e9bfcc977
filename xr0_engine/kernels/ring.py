"""Weights that stream through shared memory, whatever a program waits for meanwhile: what streamed.py's stages share.

A program knows beforehand which weights it will multiply with: chunk by chunk they are asked for as soon as there is
room, RING of them ahead, by copies that no barrier of the grid holds up. So memory is busy from the first stage to the
last, and a stage finds its weights there.

A chunk is CHUNK_ROWS rows of a weight by COLUMNS of its columns. The chunks of all layers and steps are numbered
through, layer by layer, matrix by matrix, and dealt out to the programs in turn: each gets as many as the others within
a layer or two, though a stage may have fewer chunks than there are programs.

A warp has one part of a chunk's columns: it copies and multiplies those alone, and the parts are added up in shared
memory in one fixed order. What is multiplied with the weights lies in fragments: whoever writes a row puts its numbers
where the threads that multiply them will look, so that each loads what one instruction takes in one piece.

Written in Gluon, Triton's lower language, which says where everything lies: no interpreter runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from xr0_engine.kernels.device import POLL

WARPS, CHUNK_ROWS = gl.constexpr(8), gl.constexpr(16)
WIDE = gl.constexpr(8)
"""16-bit numbers that a thread moves at a time."""
BLOCK = gl.constexpr(16)
"""Rows and columns of a fragment, which one instruction multiplies: it has 32 times WIDE numbers."""
LEAST_PART = gl.constexpr(32)
"""Columns of a warp's part at least."""

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Of the block's threads; its name changed after Triton 3.6."""


class Widths(NamedTuple):
    """What the kernel is compiled for, as one argument.

    ROWS: of all batches' tokens, a power of two; OWN: the same of one batch. COLUMNS: of the streams; INNER: of the
    MLP; SHARE: heads that share a KV head; ACTIONS: of an action, in multiples of CHUNK_ROWS. KEYS: blocks of cached
    keys. DOUBLE: whether streams are normalised themselves; WIDE: whether the output layer's first product is one of
    its own, of as many columns. KEPT: whether the L2 cache is told to keep the cached keys and values of all layers,
    which the next step reads again.
    """

    ROWS: int
    OWN: int
    COLUMNS: int
    INNER: int
    HEADS: int
    SHARE: int
    DIM: int
    ACTIONS: int
    KEYS: int
    RING: int
    DOUBLE: bool
    WIDE: bool
    KEPT: bool


class Stream(NamedTuple):
    """Where the chunks are. addresses: (L, 4) int64, of each layer's matrices; wide_weight: of a wide output layer, or
    None; tokens_weight: what each step but the last ends with; chunks: of all steps; layers: L."""

    addresses: Tensor
    wide_weight: Tensor | None
    tokens_weight: Tensor
    chunks: int
    layers: int


@gluon.constexpr_function
def ends_of(widths: Any) -> tuple[int, int, int, int]:
    """Where each of a layer's matrices ends, in chunks."""
    rows, splits = widths.COLUMNS // CHUNK_ROWS, widths.INNER // widths.COLUMNS
    out = 4 * rows
    gate_up = out + 2 * splits * rows
    return 3 * rows, out, gate_up, gate_up + splits * rows


@gluon.constexpr_function
def step_chunks(widths: Any) -> tuple[int, int]:
    """Of the matrices that a step has beside its layers': of a wide output layer, of the next step's tokens."""
    rows = widths.COLUMNS // CHUNK_ROWS
    return rows if widths.WIDE else 0, rows


@gluon.constexpr_function
def parts_layout() -> Any:
    """Of a product whose warps have a part of K each: (WARPS, rows, CHUNK_ROWS)."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def weights_layout() -> Any:
    return gl.DotOperandLayout(1, parts_layout(), 2)


@gluon.constexpr_function
def ring_layout(columns: int) -> Any:
    """Eight rows that are read at once lie in other banks."""
    rows = max(1, 64 // (columns // WARPS))
    return gl.SwizzledSharedLayout(WIDE, rows, 8 // rows, [2, 1, 0])


@gluon.constexpr_function
def copy_layout(columns: int) -> Any:
    lanes = min(32, columns // WARPS // WIDE)
    return gl.BlockedLayout([1, 1, WIDE], [1, 32 // lanes, lanes], [WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def sums_layout() -> Any:
    """Of the parts of a tile that are added up: all parts of a number in one thread."""
    return gl.BlockedLayout([WARPS, 1, 1], [1, 2, 16], [1, WARPS, 1], [2, 1, 0])


@gluon.constexpr_function
def tile_layout() -> Any:
    """Of a finished tile, (rows, CHUNK_ROWS)."""
    return gl.SliceLayout(0, sums_layout())


@gluon.constexpr_function
def pairs_layout() -> Any:
    """As sums_layout; of gate and up, beside each other in one thread."""
    return gl.BlockedLayout([WARPS, 1, 2], [1, 4, 8], [1, WARPS, 1], [2, 1, 0])


@gluon.constexpr_function
def gated_layout() -> Any:
    """Of a finished tile of gates, (rows, CHUNK_ROWS / 2)."""
    return gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])


@gluon.jit
def new_ring(W: gl.constexpr):
    SHAPE: gl.constexpr = [W.RING, WARPS, CHUNK_ROWS, W.COLUMNS // WARPS]
    return gl.allocate_shared_memory(gl.bfloat16, SHAPE, ring_layout(W.COLUMNS))


@gluon.jit
def ask(stream, ring, number, W: gl.constexpr):
    """Chunk `number` of this program into its place in the ring; of chunks behind the last, nothing."""
    chunk = gl.program_id(0) + number * gl.num_programs(0)
    if chunk < stream.chunks:
        ENDS: gl.constexpr = ends_of(W)
        SPLITS: gl.constexpr = W.INNER // W.COLUMNS
        OWN: gl.constexpr = step_chunks(W)
        rest = chunk % (stream.layers * ENDS[3] + OWN[0] + OWN[1])
        layer, tile = rest // ENDS[3], rest % ENDS[3]
        of_layer = layer < stream.layers
        gated = of_layer & (tile >= ENDS[1]) & (tile < ENDS[2])
        down = of_layer & (tile >= ENDS[2])
        matrix = (tile >= ENDS[0]).to(gl.int32) + (tile >= ENDS[1]).to(gl.int32) + (tile >= ENDS[2]).to(gl.int32)
        start = gl.where(tile >= ENDS[0], ENDS[0], 0)
        start = gl.where(tile >= ENDS[1], ENDS[1], start)
        start = gl.where(tile >= ENDS[2], ENDS[2], start)
        # The step's own matrices, behind its layers', are as plain as attention's.
        tile -= gl.where(of_layer, start, 0)
        address = gl.load(stream.addresses + gl.minimum(layer, stream.layers - 1) * 4 + matrix)
        own = stream.tokens_weight.to(gl.int64)
        if W.WIDE:
            is_wide = (layer >= stream.layers) & (tile < OWN[0])
            own = gl.where(is_wide, stream.wide_weight.to(gl.int64), own)
            tile -= gl.where(of_layer | is_wide, 0, OWN[0])
        address = gl.where(of_layer, address, own)
        weight = gl.multiple_of(address.to(gl.pointer_type(gl.bfloat16), bitcast=True), 16)
        # Rows come in pairs: of gate and up, or of two neighbours.
        part = gl.where(down, tile % SPLITS, 0)
        first = gl.where(down, tile // SPLITS, tile) * gl.where(gated, CHUNK_ROWS // 2, CHUNK_ROWS)
        columns = gl.where(down, SPLITS, 1) * W.COLUMNS
        pair, distance = gl.where(gated, columns, 2 * columns), gl.where(gated, W.INNER, 1) * columns
        weight += first * columns + part * W.COLUMNS

        COPY: gl.constexpr = copy_layout(W.COLUMNS)
        PART: gl.constexpr = W.COLUMNS // WARPS
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY)))[:, None, None]
        row = gl.arange(0, CHUNK_ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))[None, :, None]
        k = gl.arange(0, PART, layout=gl.SliceLayout(0, gl.SliceLayout(1, COPY)))[None, None, :]
        place = weight + (row % 2 * distance + (warp * PART + k)) + row // 2 * pair
        async_copy.async_copy_global_to_shared(ring.index(number % W.RING), place)
    async_copy.commit_group()


@gluon.jit
def fill(stream, ring, W: gl.constexpr):
    """The first chunks on their way."""
    RING: gl.constexpr = W.RING
    for number in gl.static_range(RING):
        ask(stream, ring, number, W)


@gluon.jit
def take(ring, number, W: gl.constexpr):
    """This program's chunk `number`, (WARPS, COLUMNS / WARPS, CHUNK_ROWS), once all RING behind the last are asked for;
    its place is free then: `ask` for number + RING."""
    async_copy.wait_group(W.RING - 1)
    return ring.index(number % W.RING).permute((0, 2, 1)).load(weights_layout())


@gluon.jit
def multiply(rows, weights, W: gl.constexpr):
    """(ROWS, CHUNK_ROWS) float32, in sums_layout's parts: to be read as the tile or as pairs."""
    SHAPE: gl.constexpr = [WARPS, W.ROWS, CHUNK_ROWS]
    product = mma_v2(rows, weights, gl.zeros(SHAPE, gl.float32, parts_layout()))
    parts = gl.allocate_shared_memory(gl.float32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]), product)
    barrier()
    return parts


@gluon.jit
def add_tile(parts):
    """(ROWS, CHUNK_ROWS) float32, tile_layout."""
    return gl.sum(parts.load(sums_layout()), 0)


@gluon.jit
def add_pairs(parts, W: gl.constexpr):
    """Gate and up, (ROWS, CHUNK_ROWS / 2) float32 each, gated_layout."""
    SHAPE: gl.constexpr = [W.ROWS, CHUNK_ROWS // 2, 2]
    pairs = gl.reshape(gl.sum(parts.load(pairs_layout()), 0), SHAPE)
    gate, up = gl.split(pairs)
    return gl.convert_layout(gate, gated_layout()), gl.convert_layout(up, gated_layout())


@gluon.constexpr_function
def _fragments_layout() -> Any:
    """(WARPS, blocks of columns, blocks of rows, threads, WIDE)."""
    return gl.BlockedLayout([1, 1, 1, 1, WIDE], [1, 1, 1, 32, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def along(dim: int, layout: Any) -> Any:
    """The layout of one dimension of five."""
    for other in reversed([each for each in range(5) if each != dim]):
        layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def load_rows(fragments, W: gl.constexpr):
    """(WARPS, ROWS, COLUMNS / WARPS) factors."""
    LAYOUT: gl.constexpr = _fragments_layout()
    DEEP: gl.constexpr = W.COLUMNS // WARPS // BLOCK
    HIGH: gl.constexpr = W.ROWS // BLOCK
    warp = gl.arange(0, WARPS, layout=along(0, LAYOUT))[:, None, None, None, None]
    column = gl.arange(0, DEEP, layout=along(1, LAYOUT))[None, :, None, None, None]
    row = gl.arange(0, HIGH, layout=along(2, LAYOUT))[None, None, :, None, None]
    thread = gl.arange(0, 32, layout=along(3, LAYOUT))[None, None, None, :, None]
    number = gl.arange(0, WIDE, layout=along(4, LAYOUT))[None, None, None, None, :]
    block = (warp * DEEP + column) * HIGH + row
    found = gl.load(fragments + block * (BLOCK * BLOCK) + (thread * WIDE + number))
    # A thread has, of 8 by 4 places, the pairs of both halves of rows of both halves of columns.
    SPREAD: gl.constexpr = [WARPS, DEEP, HIGH, 8, 4, 2, 2, 2]
    FLAT: gl.constexpr = [WARPS, W.ROWS, W.COLUMNS // WARPS]
    found = gl.permute(gl.reshape(found, SPREAD), (0, 2, 6, 3, 1, 5, 4, 7))
    return gl.convert_layout(gl.reshape(found, FLAT), gl.DotOperandLayout(0, parts_layout(), 2), assert_trivial=True)


@gluon.jit
def fragment_place(row, column, W: gl.constexpr):
    """Where load_rows looks for a number."""
    block = column // BLOCK * (W.ROWS // BLOCK) + row // BLOCK
    thread = row % 8 * 4 + column % 8 // 2
    number = column % BLOCK // 8 * 4 + row % BLOCK // 8 * 2 + column % 2
    return block * (BLOCK * BLOCK) + thread * WIDE + number


@gluon.constexpr_function
def _slots_layout() -> Any:
    return gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])


@gluon.jit
def _add_slots(sums, rows, W: gl.constexpr):
    """(ROWS,) float32 of tile_layout: a row's sums over all slots, of CHUNK_ROWS columns each."""
    LAYOUT: gl.constexpr = _slots_layout()
    ROWS: gl.constexpr = W.ROWS
    SLOTS: gl.constexpr = W.COLUMNS // CHUNK_ROWS
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    found = gl.load(sums + slot * (2 * rows) + 2 * gl.minimum(row, rows - 1))
    return gl.convert_layout(gl.sum(found, 1), gl.SliceLayout(1, tile_layout()))


@gluon.jit
def norm_of(sums, rows, eps, W: gl.constexpr):
    """(ROWS,) float32 of tile_layout: what an rms norm multiplies the rows by. As statistics.py: row_norm."""
    return gl.rsqrt(_add_slots(sums, rows, W) * (1.0 / W.COLUMNS) + eps)


@gluon.jit
def norms_of(sums, rows, eps, double, W: gl.constexpr):
    """norm_of, and where `double` the norm of the normalised rows with it, if the streams have such norms at all."""
    scale = norm_of(sums, rows, eps, W)
    if W.DOUBLE:
        second = _add_slots(sums + 1, rows, W) * (1.0 / W.COLUMNS)
        scale *= gl.where(double, gl.rsqrt(scale * scale * second + eps), 1.0)
    return scale


@gluon.jit
def arrive(counter):
    """As stages.py."""
    # The counter is touched by one thread: every thread's stores must be there before.
    barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def refill(stream, ring, before, number, W: gl.constexpr):
    """Asks for what takes the place of a stage's last chunk, if it had one: while others are still waited for. before,
    number: of this program's chunks ahead of the stage, and behind it."""
    if number > before:
        ask(stream, ring, number - 1 + W.RING, W)


@gluon.jit
def wait_count(counter, count):
    """As device.py: wait_for. The first thread alone asks."""
    gl.inline_asm_elementwise(POLL, "=r,l,r", [counter, count], dtype=gl.int32, is_pure=False, pack=1)
    barrier()


@gluon.jit
def wait(counter, stage):
    """As stages.py: until all programs have arrived at the stage."""
    wait_count(counter, stage * gl.num_programs(0))


@gluon.jit
def begin(PDL: gl.constexpr):
    """As device.py: gdc_begin."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@gluon.jit
def leave(counter, stages):
    """Sets the counter back, once nobody waits for it any more."""
    if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == (stages + 1) * gl.num_programs(0) - 1:
        gl.store(counter, 0)


def ring_slots(columns: int, limit: int, reserved: int) -> int:
    """How many chunks fit a block's shared memory beside what the stages need."""
    return (limit - reserved) // (CHUNK_ROWS.value * columns * 2)


def padded(rows: int) -> int:
    """A power of two that matrix units take."""
    return max(16, triton.next_power_of_2(rows))


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) by the unit's own exponential and reciprocal, each within two last bits: what comes of it is
    rounded to 16 bits."""
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def gelu_tanh(x):
    """As device.py."""
    return x * sigmoid(x * gl.fma(x * x, 0.07135481282603588, 1.5957691216057308))
