"""What a launch does, by kind of op and tactic: the one place that knows how each schedule shares its work out.

A kernel with another way to share it out needs a function in SCHEDULES and nothing else here. What the machine code
says (registers, shared memory, instructions) comes from code.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xr0_engine.fused.ops import SHARED_LIMIT, STATS_COLUMNS, Tactic
from xr0_engine.fused.paper import end_passes, heads_of_tile, row_pieces, sharers_of

FLOAT32 = 4
HALF = 2
PREFETCHED_BLOCKS = 8
"""Blocks of its weight that a program asks for before it waits (kernels/product.py: PREFETCH_BLOCKS)."""
OWN_BLOCK = 32
"""Own keys that lambda_attention takes at a time."""
MIN_ROWS = 16
WIDE, END_ROWS = 8, 32
"""As kernels/swapped.py and swapped_ends.py."""


@dataclass(frozen=True)
class Work:
    """What one launch does. Bytes and operations of a program are those of the busiest.

    programs: as many blocks. busy: their work on average, in that of the busiest. mma_operations: of a program, padding
    included; useful: of all, without. l2_bytes: that a program reads in its main loop, trips times block_bytes, of
    which stages - 1 are on their way. memory_bytes: that all read from memory, each byte once; ahead_bytes: of these,
    what is asked for before the wait for the kernel ahead. ends: epilogues that a program has, of end_bytes and rounds
    each: reads and writes outside the loop, and trips to L2 that wait for one another. combines: tiles whose parts come
    together through memory, parts: of each, part_bytes: of one, which is written and read. special: exponentials of a
    program. wasted: share of the rows that are padding. warps, shared: of a block, where no code says so.
    streamed_bytes: of all, that come through L2 whatever is waited for meanwhile; held_bytes: of a program, that come
    into its registers while it waits at its barrier. moved_parts: parts of tiles that a
    program writes and reads, 0: its own, and all of the tile that it ends; gathers: how often it waits for such parts,
    one after another, 0: as LOADS_AT_ONCE of them come together. runs: how often it goes through its code outside of
    the loop, 0: once for each end; units: how often through what of it stands in loops of its own, 0: as often; stores:
    instructions of a warp beside those. tiles: that are ended, 0: as ends and parts say.
    """

    programs: int
    mma_operations: float = 0.0
    useful: float = 0.0
    l2_bytes: float = 0.0
    memory_bytes: float = 0.0
    ahead_bytes: float = 0.0
    trips: float = 0.0
    block_bytes: float = 0.0
    stages: int = 2
    ends: float = 1.0
    end_bytes: float = 0.0
    rounds: float = 2.0
    combines: int = 0
    parts: int = 1
    part_bytes: float = 0.0
    special: float = 0.0
    wasted: float = 0.0
    warps: int = 4
    shared: int = 0
    busy: float = 1.0
    streamed_bytes: float = 0.0
    held_bytes: float = 0.0
    moved_parts: float = 0.0
    gathers: float = 0.0
    runs: float = 0.0
    units: float = 0.0
    stores: float = 0.0
    tiles: int = 0

    @property
    def all_end_bytes(self) -> float:
        """Of all programs, outside their loops. A split tile has one epilogue; its parts are written and read once."""
        joined = self.combines * (self.parts - 1)
        ends = self.tiles or max(1.0, self.programs * self.busy * self.ends - joined)
        return ends * self.end_bytes + 2 * self.combines * self.parts * self.part_bytes

    @property
    def all_l2_bytes(self) -> float:
        each = self.l2_bytes + self.held_bytes
        return self.programs * self.busy * each + self.all_end_bytes + self.streamed_bytes


@dataclass(frozen=True)
class Given:
    """A product as its op is called.

    rows, outputs, inputs: of a weight (outputs, inputs); tile: weight rows that a tile holds, unit: of these, columns
    that lie beside each other. x_bytes, weight_bytes: of
    an element; end_bytes: what the epilogue moves of each output. rounds: trips to L2 that it has in a row. normed:
    whether the sums of the rows are read.
    """

    rows: int
    outputs: int
    inputs: int
    tile: int
    unit: int
    x_bytes: int
    weight_bytes: int
    end_bytes: float
    rounds: int
    normed: bool


def given_product(
    kind: str,
    shape: Sequence[int],
    tactic: Tactic,
    arguments: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
) -> Given:
    """arguments, options: of the op's call; without them 16-bit factors, a norm before a gated product and before
    queries, keys and values, and a residual after another."""
    tile = unit = tactic.block_n
    if kind == "swiglu":
        tile *= 2
    elif kind == "qkv":
        tile, unit = shape[3], shape[3] // 2
        if SCHEDULES[tactic.schedule] is _swapped:
            tile *= heads_of_tile(tactic, tile)
    x_bytes = arguments[0].element_size() if arguments else HALF
    weight_bytes = arguments[1].data.element_size() if arguments else HALF
    options = options if options is not None else {"norm": kind != "linear", "residual": kind == "linear"}
    residual = options.get("residual")
    own_norm = getattr(residual, "sums", None) is not None
    out_bytes = arguments[2].element_size() if arguments and kind != "qkv" else HALF
    end_bytes = {"linear": out_bytes * (2.0 if residual else 1.0), "swiglu": out_bytes / 2, "qkv": HALF + FLOAT32}[kind]
    # The norm of the rows; the residual, and its own norm before it; a head's angles.
    rounds = 1 + bool(residual) + own_norm if kind == "linear" else 1 + (kind == "qkv")
    rows, outputs, inputs = shape[:3]
    return Given(rows, outputs, inputs, tile, unit, x_bytes, weight_bytes, end_bytes, rounds, bool(options.get("norm")))


def _tiled(given: Given, tactic: Tactic) -> Work:
    """A program a tile, or a part of one."""
    row_tiles, column_tiles = math.ceil(given.rows / tactic.block_m), math.ceil(given.outputs / given.tile)
    split = 1 if tactic.library else tactic.split_k
    tiles = row_tiles * column_tiles
    trips = math.ceil(math.ceil(given.inputs / tactic.block_k) / split)
    work = _product(given, tactic, tactic.block_m, tiles * split, trips)
    return _combined(work, given, tactic.block_m, row_tiles, tiles if split > 1 else 0, split)


def _whole(given: Given, tactic: Tactic) -> Work:
    """All of K in one program, or in split_k of them, over its warps. What the epilogue needs is there before the wait,
    and the weight on its way, without a loop."""
    work = _tiled(given, tactic)
    ahead = work.memory_bytes if given.rows <= tactic.block_m else work.ahead_bytes
    return replace(work, rounds=2, stages=max(2, math.ceil(work.trips) + 1), ahead_bytes=ahead)


def _stream(given: Given, tactic: Tactic) -> Work:
    """All rows of a column tile in a program. split_k programs share out the blocks of K of all tiles; 1: each tile has
    its own."""
    return _shared_out(given, tactic, whole_first=False)


def _tma(given: Given, tactic: Tactic) -> Work:
    """As stream, but as many whole tiles as there are for each program come first, and the rest is shared out."""
    return _shared_out(given, tactic, whole_first=True)


def _shared_out(given: Given, tactic: Tactic, whole_first: bool) -> Work:
    height = sum(row_pieces(given.rows, tactic))
    groups, blocks = math.ceil(given.rows / height), math.ceil(given.inputs / tactic.block_k)
    tiles = groups * math.ceil(given.outputs / given.tile)
    programs = tiles if tactic.split_k == 1 else min(tactic.split_k, tiles * blocks)
    whole = tiles // programs if whole_first else 0
    rest = (tiles - whole * programs) * blocks
    trips = whole * blocks + math.ceil(rest / programs)
    work = _product(given, tactic, height, programs, trips)
    if programs == tiles:
        return _combined(work, given, height, groups, 0, 1)
    # Where one program's run ends within a tile, the tile has parts.
    ends = [program * rest // programs for program in range(1, programs)]
    split = {end // blocks for end in ends if end % blocks}
    parts = math.ceil(sum(end % blocks != 0 for end in ends) / len(split)) + 1 if split else 1
    share = rest / programs / blocks
    work = _combined(work, given, height, groups, len(split), parts)
    return replace(work, ends=whole + max(1.0, math.ceil(share)), busy=(whole * blocks + rest / programs) / trips)


def _swapped(given: Given, tactic: Tactic) -> Work:
    """Whole tiles, then parts of those that are left for fewer than all programs, each of whom ends some rows."""
    height = sum(row_pieces(given.rows, tactic))
    groups, blocks = math.ceil(given.rows / height), math.ceil(given.inputs / tactic.block_k)
    tiles = groups * math.ceil(given.outputs / given.tile)
    programs = tiles if tactic.split_k == 1 else min(tactic.split_k, tiles * blocks)
    shared = tiles % programs
    sharers, parts = sharers_of(shared, programs, blocks)
    shared = shared if parts > 1 else 0
    whole, run = math.ceil((tiles - shared) / programs), shared * blocks / max(1, sharers)
    trips = whole * blocks + math.ceil(run)
    # A run within one tile is one part; others are two.
    deposits = 1 if sharers == shared * parts else math.ceil(run / blocks) + 1
    work = replace(
        _product(given, tactic, height, programs, trips), tiles=tiles, busy=tiles * blocks / programs / trips
    )
    work = _combined(work, given, height, groups, shared, parts)
    at_once = 32 * tactic.warps * WIDE // given.unit
    slices = math.ceil(height / max(END_ROWS, at_once))
    at_once *= end_passes(height, tactic.warps, given.unit, parts)
    units = deposits * math.ceil(math.ceil(height / at_once) / parts) if shared else 0
    # The rows of a norm are read once; what else an epilogue reads, for some rows after others.
    return replace(
        work,
        ends=1,
        rounds=1 + whole * (1 + slices * (given.rounds - 1)) + units * (given.rounds - 1),
        # Its own, and of its rows everybody's.
        moved_parts=deposits + units * parts * min(1.0, at_once / height) if shared else 0.0,
        gathers=float(units),
        runs=max(1, whole, deposits),
        units=units,
        # A number of the sums is stored by one instruction, and every fourth has an address of its own.
        stores=1.25 * deposits * height * given.tile / (32 * tactic.warps) if whole and shared else 0.0,
    )


SCHEDULES: dict[str, Callable[[Given, Tactic], Work]] = {
    "tiled": _tiled,
    "stream": _stream,
    "whole": _whole,
    "tma": _tma,
    "swapped": _swapped,
    "warpgroups": _swapped,
}


def _product(given: Given, tactic: Tactic, height: int, programs: int, trips: int) -> Work:
    """A program that multiplies height rows with one tile of weight rows, trips blocks of K deep."""
    block = tactic.block_k * (height * given.x_bytes + given.tile * given.weight_bytes)
    weight = given.outputs * given.inputs * given.weight_bytes
    asked = min(trips, PREFETCHED_BLOCKS) * tactic.block_k * given.tile * given.weight_bytes
    slots = math.ceil(given.inputs / STATS_COLUMNS) if given.normed else 0
    return Work(
        programs,
        mma_operations=2.0 * height * given.tile * trips * tactic.block_k,
        useful=2.0 * given.rows * given.outputs * given.inputs,
        l2_bytes=trips * block,
        memory_bytes=weight,
        ahead_bytes=min(weight, programs * asked),
        trips=trips,
        block_bytes=block,
        stages=tactic.stages,
        end_bytes=height * given.tile * given.end_bytes + 2 * FLOAT32 * slots * height,
        rounds=1 + given.rounds,
        warps=tactic.warps,
        shared=tactic.stages * block,
    )


def _combined(work: Work, given: Given, height: int, row_tiles: int, combines: int, parts: int) -> Work:
    """Each program leaves its part of a split tile; who comes last reads all of them."""
    part = height * given.tile * FLOAT32 if combines else 0
    wasted = 1 - given.rows / (row_tiles * height)
    return replace(work, combines=combines, parts=parts, part_bytes=part, wasted=wasted)


def attention_work(shape: Sequence[int], tactic: Tactic, causal: bool = False, lengths: Sequence[int] = ()) -> Work:
    """shape: (B, H, M, G, N, D). lengths: rows of segments, in the batch's place."""
    batch, heads, rows, groups, keys, dim = shape
    lengths, share = lengths or [rows] * batch, heads // groups
    tiles = [math.ceil(length * share / tactic.block_m) for length in lengths]
    most = max(keys, *lengths)
    blocks, block = math.ceil(most / tactic.block_n), 2 * tactic.block_n * dim * HALF
    # A causal program sees half of the keys on average, one of a shorter segment fewer.
    busy = sum(tile * length for tile, length in zip(tiles, lengths, strict=True)) / (sum(tiles) * max(lengths))
    seen = sum(length * (length + 1) / 2 if causal else length**2 for length in lengths)
    return Work(
        sum(tiles) * groups,
        mma_operations=4.0 * tactic.block_m * blocks * tactic.block_n * dim,
        useful=4.0 * seen * heads * dim,
        l2_bytes=blocks * block,
        trips=blocks,
        block_bytes=block,
        stages=tactic.stages,
        end_bytes=2 * tactic.block_m * dim * HALF,
        rounds=3,
        special=tactic.block_m * blocks * tactic.block_n,
        wasted=1 - sum(lengths) * share / (sum(tiles) * tactic.block_m),
        warps=tactic.warps,
        shared=tactic.stages * block + tactic.block_m * dim * HALF,
        busy=busy * (0.5 + 0.5 / max(tiles) if causal else 1.0),
    )


def lambda_work(shape: Sequence[int], tactic: Tactic) -> Work:
    """shape: (B, H, Q, G, N, D): own keys are the last of split_k programs' share, the others have the cached ones. By
    the schedule whole the keys are shared out over the warps of one program."""
    batch, heads, queries, groups, cached, dim = shape
    rows, whole = queries * heads // groups, tactic.schedule == "whole"
    row_tiles = math.ceil(rows / tactic.block_m)
    tiles, split = batch * groups * row_tiles, max(1, tactic.split_k)
    blocks, own = math.ceil(math.ceil(cached / tactic.block_n) / max(1, split - 1)), math.ceil(rows / OWN_BLOCK)
    block = 2 * tactic.block_n * dim * HALF
    shares = blocks * tactic.block_n, own * OWN_BLOCK
    keys, trips = (max(shares), max(blocks, own)) if split > 1 else (sum(shares), blocks + own)
    cache = 2.0 * batch * groups * cached * dim * HALF
    return Work(
        tiles * split,
        mma_operations=4.0 * tactic.block_m * dim * keys,
        useful=4.0 * batch * queries * (cached + queries) * heads * dim,
        l2_bytes=2 * keys * dim * HALF,
        memory_bytes=cache,
        ahead_bytes=cache,
        trips=math.ceil(trips / tactic.warps) if whole else trips,
        block_bytes=block,
        stages=tactic.stages,
        end_bytes=2 * tactic.block_m * dim * HALF,
        rounds=3,
        combines=tiles if split > 1 else 0,
        parts=split,
        part_bytes=tactic.block_m * (dim + 2) * FLOAT32 if split > 1 else 0,
        special=tactic.block_m * keys,
        wasted=1 - rows / (row_tiles * tactic.block_m),
        warps=tactic.warps,
        shared=tactic.stages * block,
    )


def glue_work(programs: int, warps: int, num_bytes: float) -> Work:
    """A pass over some rows."""
    return Work(programs, end_bytes=num_bytes / programs, rounds=3, warps=warps)


def op_work(
    kind: str,
    shape: Sequence[int],
    tactic: Tactic,
    arguments: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
) -> Work:
    """Of an op that has tactics, shape as tactic_key has it. Raises ValueError for another kind or schedule."""
    if kind == "attention":
        segments = (options or {}).get("segments")
        return attention_work(shape, tactic, bool((options or {}).get("causal")), segments.lengths if segments else ())
    if kind == "lambda_attention":
        return lambda_work(shape, tactic)
    if kind not in ("linear", "swiglu", "qkv"):
        raise ValueError(f"kind: expected an op that has tactics, got {kind!r}")
    if tactic.schedule not in SCHEDULES:
        raise ValueError(f"tactic.schedule: expected {', '.join(SCHEDULES)}; got {tactic.schedule!r}")
    return SCHEDULES[tactic.schedule](given_product(kind, shape, tactic, arguments, options), tactic)


def fits(work: Work, arch: int) -> bool:
    """Whether its tiles can be in a block's shared memory, as far as that is known before it is compiled."""
    return work.shared <= SHARED_LIMIT[arch]
