"""What tuning tries: for each kind of op, a bounded list of tiles and splits, and then warps and stages of the best.

A tactic that does not suit an op (a tile too narrow for its statistics) or a chip (too much shared memory) may be among
them: it is refused when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

from xr0_engine.fused.backends import LOOP, LOOP_STAGES
from xr0_engine.fused.ops import Tactic

SKINNY_ROWS = 64
"""Up to so many rows a product reads its weight once, whatever the tile: one row tile."""
SKINNY_TILES = ((32, 128), (32, 256), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128))
"""(weight rows, columns of K) of a program."""
WIDE_TILES = ((32, 128, 64), (64, 64, 64), (64, 128, 64), (64, 128, 128), (64, 256, 64), (128, 64, 64), (128, 128, 64),
              (128, 128, 128), (128, 256, 64))  # fmt: skip
"""(rows, weight rows, columns of K)."""
WHOLE_WIDTHS, WHOLE_STEPS, WHOLE_WARPS = (16, 32, 64), (512, 1024, 2048), 8
"""Weight rows of a program whose warps share out K, up to SKINNY_ROWS rows, and columns of K at a time."""
WHOLE_HELD = 64 * 512
"""Numbers of the weight that it may have in registers at a time."""
CROWD, EMPTY = 2, 0.25
"""Programs for each processor: more wait for others, fewer leave too many idle."""
LOOP_TILES = ((64, 128), (64, 64), (32, 128))
"""As SKINNY_TILES, of a stage of a flow loop, where each costs compiling the whole loop; and the same of WHOLE_*."""
LOOP_WHOLE = ((16, 256), (16, 512), (32, 128), (32, 512), (64, 128))
STREAM_TILES = ((128, 64), (128, 128), (256, 64), (256, 128), (512, 64))
"""(rows at most, weight rows) of a program that has pieces of mixed heights, for more than SKINNY_ROWS rows."""
TMA_TILES = ((256, 128), (128, 128), (128, 64))
"""(rows, weight rows) of one that TMA feeds."""
SWAPPED_TILES = ((256, 128), (128, 128), (128, 64))
WARPGROUP_TILES = (*SWAPPED_TILES, (512, 128), (256, 256))
"""(rows at most, weight rows) of one whose weight rows are the MMA's; of more, warps alone have too few registers."""
WARP_WEIGHTS = 16
"""Of these a warp has so many."""
SHARED_OUT_WARPS = 8
SPLITS_TRIED = 3
MAX_WIDE_SPLIT = 8
LIBRARY_ROWS = (16, 64)
"""Rows that one program finishes after the library's product."""
WARPS, STAGES = (4, 8), (2, 3, 4, 5)
EIGHT_WARPS_FROM = 128 * 128
"""Numbers in a tile from which eight warps share them."""


def tiles(kind: str, shape: tuple[int, ...], default: Tactic, processors: int) -> list[Tactic]:
    """The first round: tiles, splits, and the library where it has such an op. The default comes first.

    shape: as tactic_key has it. processors: of the chip. Raises ValueError for an unknown kind.
    """
    if kind.startswith(LOOP):
        found = _loop_tiles(LOOP_STAGES[kind.removeprefix(LOOP)], shape, default, processors)
    elif kind == "attention":
        found = [*_attention_tiles(default), replace(default, library=True)]
        if find_spec("flash_attn") is not None:
            found.append(replace(default, library=True, flash=True))
    elif kind == "lambda_attention":
        found = _lambda_tiles(shape, default, processors)
    elif kind in ("linear", "swiglu", "qkv"):
        found = [*_product_tiles(kind, shape, default, processors), *_library(default)]
    else:
        raise ValueError(f"kind: expected an op that has tactics, got {kind!r}")
    return list(dict.fromkeys((default, *found)))


def schedules(kind: str, best: Tactic) -> list[Tactic]:
    """The second round: the same tile, other warps and stages, of which a flow loop has one number for all its own."""
    if best.library or kind.startswith(LOOP):
        return []
    stages_tried, warps_tried = [*STAGES], [*WARPS]
    if best.schedule == "whole":
        # Where warps share out K, nothing is loaded in stages.
        stages_tried = [best.stages]
    elif best.schedule in ("swapped", "warpgroups"):
        # A warp has its own rows of the weight; of two stages, one is never on its way.
        stages_tried, warps_tried = [*STAGES[1:]], [best.warps]
    found = [replace(best, warps=warps, stages=stages) for warps in warps_tried for stages in stages_tried]
    return [tactic for tactic in found if tactic != best]


def named(kind: str, shape: tuple[int, ...], default: Tactic, processors: int) -> dict[str, Tactic]:
    """Name -> tactic, of all that both rounds may try: what the names in a table mean. Raises as tiles."""
    first = tiles(kind, shape, default, processors)
    every = [*first, *(tactic for tile in first for tactic in schedules(kind, tile))]
    return {name(tactic): tactic for tactic in every}


def name(tactic: Tactic) -> str:
    """`64x128x64 split 2, 4 warps, 3 stages`, behind a schedule other than tiles."""
    if tactic.flash:
        return "flash-attn"
    if tactic.library:
        return f"library, {tactic.block_m}x{tactic.block_n} after it"
    tile = f"{tactic.block_m}x{tactic.block_n}x{tactic.block_k} split {tactic.split_k}"
    schedule = "" if tactic.schedule == "tiled" else f"{tactic.schedule} "
    return f"{schedule}{tile}, {tactic.warps} warps, {tactic.stages} stages"


def _product_tiles(kind: str, shape: tuple[int, ...], default: Tactic, processors: int) -> list[Tactic]:
    rows, n, k = shape[:3]
    found, tiled = [], replace(default, schedule="tiled", library=False)
    if rows <= SKINNY_ROWS:
        block_m = max(16, _power_of_two(rows))
        for width, block_k in _widths(SKINNY_TILES, kind, shape):
            for split in _splits(math.ceil(n / width), math.ceil(k / block_k), processors):
                found.append(replace(tiled, block_m=block_m, block_n=width, block_k=block_k, split_k=split))
        if kind != "qkv":
            found += _whole_tiles(shape, block_m, tiled, processors)
    else:
        for block_m, (width, block_k) in (
            (m, tile) for m, *rest in WIDE_TILES for tile in _widths([rest], kind, shape)
        ):
            count = math.ceil(rows / block_m) * math.ceil(n / width)
            splits = _splits(count, math.ceil(k / block_k), processors) if count < processors else []
            warps = 8 if block_m * width >= EIGHT_WARPS_FROM else 4
            for split in {1, *(split for split in splits if split <= MAX_WIDE_SPLIT)}:
                tile = Tactic(block_m, width, block_k, split, warps, default.stages)
                found.append(tile)
        shared_out = replace(tiled, warps=SHARED_OUT_WARPS)
        found += _shared_out(replace(shared_out, schedule="stream"), STREAM_TILES, kind, shape, processors)
        found += _shared_out(replace(shared_out, schedule="tma"), TMA_TILES, kind, shape, processors)
        found += [
            tactic
            for schedule in ("swapped", "warpgroups")
            for tactic in _swapped(replace(tiled, schedule=schedule), kind, shape, processors)
        ]
    # A gated product's tile counts its own columns: it reads as many weight rows of the gate as of the other half.
    return [replace(tactic, block_n=tactic.block_n // 2) for tactic in found] if kind == "swiglu" else found


def _whole_tiles(shape: tuple[int, ...], block_m: int, tiled: Tactic, processors: int) -> list[Tactic]:
    """Of the schedule "whole": K in whole steps."""
    _, n, k = shape[:3]
    tactic, found = replace(tiled, block_m=block_m, warps=WHOLE_WARPS, schedule="whole"), []
    for width, block_k in product(WHOLE_WIDTHS, WHOLE_STEPS):
        for split in sorted({1, 2, k // block_k} if k % block_k == 0 and width * block_k <= WHOLE_HELD else ()):
            programs = math.ceil(n / width) * split / processors
            if k % (block_k * split) == 0 and EMPTY <= programs <= CROWD:
                found.append(replace(tactic, block_n=width, block_k=block_k, split_k=split))
    return found


def _shared_out(
    tactic: Tactic, sizes: Iterable[tuple[int, int]], kind: str, shape: tuple[int, ...], processors: int
) -> list[Tactic]:
    """A program a tile, and as many programs as processors, among whom all of the work is shared out."""
    tiles = dict.fromkeys((m, width) for m, n in sizes for width, _ in _widths([(n, tactic.block_k)], kind, shape))
    return [replace(tactic, block_m=m, block_n=width, split_k=split) for m, width in tiles for split in (1, processors)]


def _swapped(tactic: Tactic, kind: str, shape: tuple[int, ...], processors: int) -> list[Tactic]:
    """A program a tile; as many programs as processors; and as many for each tile as there are processors."""
    rows, n = shape[:2]
    found = []
    for block_m, width in WARPGROUP_TILES if tactic.schedule == "warpgroups" else SWAPPED_TILES:
        if (kind == "qkv" and width not in (shape[3], 2 * shape[3])) or (block_m > 256 and rows <= 256):
            continue
        tiles = math.ceil(rows / block_m) * math.ceil(n / width)
        even = processors // tiles * tiles
        for split in sorted({1, processors, *((even,) if even > tiles else ())}):
            tile = replace(tactic, block_m=block_m, block_n=width, split_k=split)
            # Few stages: what does not fit is tried with no others.
            found.append(replace(tile, warps=width // WARP_WEIGHTS, stages=STAGES[1]))
    return found


def _loop_tiles(kind: str, shape: tuple[int, ...], default: Tactic, processors: int) -> list[Tactic]:
    if kind == "lambda_attention":
        whole = replace(default, block_m=16, block_n=16, split_k=1, schedule="whole")
        found = [replace(default, block_m=block_m, block_n=block_n) for block_m, block_n in product((16, 32), (16, 32))]
        return [*found, whole]
    rows, n, k = shape[:3]
    block_m, tiled = max(16, _power_of_two(rows)), replace(default, schedule="tiled")
    if rows > SKINNY_ROWS:
        return []
    found = []
    for width, block_k in _widths(LOOP_TILES, kind, shape):
        split = _splits(math.ceil(n / width), math.ceil(k / block_k), processors)[0]
        found.append(replace(tiled, block_m=block_m, block_n=width, block_k=block_k, split_k=split))
    whole = replace(tiled, block_m=block_m, split_k=1, schedule="whole")
    found += [replace(whole, block_n=width, block_k=depth) for width, depth in LOOP_WHOLE if k % depth == 0]
    return [replace(tactic, block_n=tactic.block_n // 2) for tactic in found] if kind == "swiglu" else found


def _widths(tiles: Iterable[Iterable[int]], kind: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(weight rows, columns of K); with queries, keys and values a tile is one head."""
    pairs = [(width, block_k) for width, block_k in tiles]
    return list(dict.fromkeys((shape[3] if kind == "qkv" else width, block_k) for width, block_k in pairs))


def _splits(tiles: int, blocks: int, processors: int) -> list[int]:
    """The divisors of K's blocks that come nearest to one program per processor."""
    divisors = [divisor for divisor in range(1, blocks + 1) if blocks % divisor == 0]
    return sorted(divisors, key=lambda split: abs(math.log(tiles * split / processors)))[:SPLITS_TRIED]


def _library(default: Tactic) -> list[Tactic]:
    plain = replace(default, split_k=1, library=True, schedule="tiled")
    return [replace(plain, block_m=rows, block_n=64) for rows in LIBRARY_ROWS]


def _attention_tiles(default: Tactic) -> list[Tactic]:
    return [
        replace(default, block_m=block_m, block_n=block_n, warps=8 if block_m > 64 else 4)
        for block_m in (32, 64, 128)
        for block_n in (32, 64, 128)
    ]


def _lambda_tiles(shape: tuple[int, ...], default: Tactic, processors: int) -> list[Tactic]:
    batch, heads, queries, groups, cached, _ = shape
    rows, found = queries * heads // groups, []
    whole = replace(default, split_k=1, warps=WHOLE_WARPS, schedule="whole")
    found += [replace(whole, block_m=block_m, block_n=block_n) for block_m, block_n in product((16, 32), (16, 32))]
    for block_m in (16, 32, 64):
        programs = batch * groups * math.ceil(rows / block_m)
        for block_n in (16, 32, 64):
            most = math.ceil(cached / block_n)
            wanted = (processors / programs * factor for factor in (0.5, 1, 2))
            for split in {min(most, max(1, round(count))) for count in wanted}:
                found.append(replace(default, block_m=block_m, block_n=block_n, split_k=split, schedule="tiled"))
    return found


def _power_of_two(number: int) -> int:
    """The smallest one that is not below."""
    return 1 << (number - 1).bit_length()
