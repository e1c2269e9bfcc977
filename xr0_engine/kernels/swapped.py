"""Products of 65 to 1024 rows whose weight rows are the MMA's: the schedules "swapped" and "warpgroups". product.py has
the rest of the algorithm.

An MMA has 16 rows, or 64 where warpgroups multiply, and columns in steps of 8. Here the weight's rows are the MMA's,
and x's are its columns: a program holds all rows of x, or one of groups that are alike, in pieces of 256 to 8, beside
as many rows of the weight as its registers have room for. So x and the weight cross the L2 cache least, and few rows
are none.

Blocks of both come into a ring in shared memory, which runs on from one tile into the next; what comes of the weight
before the kernel ahead has ended is there at once. By "warpgroups" TMA brings them and warpgroups multiply (sm_90); by
"swapped" threads copy and warps multiply, on any chip.

Programs are as many as split_k says. As long as there is a whole tile for each, a program has it alone, and its
epilogue follows in registers. The blocks of K of the tiles that are left lie behind one another on a line, which is
shared out evenly. Of such a tile, each of its programs leaves its part in float32 in the workspace, waits for the
others, and then all of them finish some rows each, whose parts are added up in the order of K: replays are
bit-identical. They wait for one another, so that such a launch is cooperative.

Written in Gluon, Triton's lower language, which says where everything lies: no interpreter runs it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from xr0_engine.kernels.arguments import WARPGROUPS_ON, end_passes, heads_of_tile, sharers_of
from xr0_engine.kernels.bulk import check_factors, check_tma
from xr0_engine.kernels.calls import ProductCall
from xr0_engine.kernels.device import with_last
from xr0_engine.kernels.ends import finish_linear, finish_qkv, finish_swiglu
from xr0_engine.kernels.launch import INTERPRETED, PROCESSORS, capability, launch, processors
from xr0_engine.kernels.product import swapped_pieces
from xr0_engine.kernels.ring import barrier, wait_count
from xr0_engine.kernels.swapped_blocks import (
    Walk,
    ask_rows,
    ask_weights,
    block_bytes,
    multiply_of_warpgroups,
    multiply_of_warps,
    new_slots,
    next_block,
    sums_layout,
    tile_layout,
    waited,
    zeros,
)
from xr0_engine.kernels.swapped_ends import (
    WIDE,
    Sizes,
    added_parts,
    end_linear,
    end_qkv,
    end_swiglu,
    fill_scales,
    height_of,
    lanes_of,
    new_scales,
    part_place,
    pass_rows,
    row_layout,
    rows_at,
)

MOST_ROWS, PIECES = 512, 5
"""Of a program: rows, and pieces of them."""
MOST_PROGRAMS = max(PROCESSORS.values())
"""On paper."""
WARP_WEIGHTS = 16
"""Rows of an MMA that a warp has."""
MOST_SUMS = {False: 208, True: 104}
"""Of a thread that has up to 255 registers; of one that has 128, in more than 8 warps."""
COUNTED = 1 << 31
END_ROWS = 32
"""Rows that are finished at a time at least, of a piece that has so many."""
ENDS = {finish_linear: end_linear, finish_swiglu: end_swiglu, finish_qkv: end_qkv}


@gluon.constexpr_function
def _rows_at_once(sizes: Sizes) -> int:
    return max(END_ROWS, sizes.WARPS * 32 // lanes_of(sizes.UNIT))


@gluon.jit
def _end_piece(
    total, group, place, column_tile, scales, product, walk, end, FINISH: gl.constexpr, ACTIVATION: gl.constexpr,
    CENTRED: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """The epilogue of (WEIGHTS, ROWS) sums, some rows at a time."""
    if _rows_at_once(S) < ROWS:
        SPREAD: gl.constexpr = [S.WEIGHTS, 2, ROWS // 2]
        first, second = gl.split(gl.permute(gl.reshape(total, SPREAD), (0, 2, 1)))
        _end_piece(
            first, group, place, column_tile, scales, product, walk, end, FINISH, ACTIVATION, CENTRED, WIDTH, ROWS // 2,
            S
        )  # fmt: skip
        _end_piece(
            second, group, place + ROWS // 2, column_tile, scales, product, walk, end, FINISH, ACTIVATION, CENTRED,
            WIDTH, ROWS // 2, S
        )  # fmt: skip
    else:
        y = gl.convert_layout(gl.permute(total, (1, 0)), row_layout(S))
        rows = rows_at(product, group, place, scales, ROWS, S)
        FINISH(y, rows, column_tile, product, walk, end, ACTIVATION, CENTRED, WIDTH, ROWS, S)


@gluon.jit
def _scales_of(scales, filled, group, product, S: gl.constexpr):
    """Those of a group, where the group whose they are is another. Returns whose they are."""
    if filled != group:
        fill_scales(scales, group, product, S)
    return group


@gluon.jit
def _swapped(
    x_0,
    x_1,
    x_2,
    x_3,
    x_4,
    w,
    product,
    walk,
    end,
    CENTRED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    OUT_SLOTS: gl.constexpr,
    FINISH: gl.constexpr,
    PAIRED: gl.constexpr,
    WHOLE: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    WIDTH: gl.constexpr = 0 if OUT_SLOTS is None else OUT_SLOTS[1]
    STAGES: gl.constexpr = S.STAGES
    PARTS: gl.constexpr = S.PARTS
    HEIGHTS: gl.constexpr = S.HEIGHTS
    PIECE_COUNT: gl.constexpr = len(S.HEIGHTS)
    BARRIERS: gl.constexpr = [STAGES, 1]
    BYTES: gl.constexpr = block_bytes(S)
    program, programs = gl.program_id(0), gl.num_programs(0)
    blocks = walk.blocks
    x = (x_0, x_1, x_2, x_3, x_4)
    weights = new_slots(S.WEIGHTS, product, S)
    pieces = ()
    for i in gl.static_range(PIECE_COUNT):
        pieces = with_last(pieces, new_slots(HEIGHTS[i], product, S))
    scales = new_scales(S)
    # Of no use where threads copy, and then of no cost.
    full = gl.allocate_shared_memory(gl.int64, BARRIERS, mbarrier.MBarrierLayout())
    if S.GROUPED:
        for slot in gl.static_range(STAGES):
            mbarrier.init(full.index(slot), count=1)
        # TMA sees the barriers too.
        fence_async_shared()
        barrier()

    whole = gl.cdiv(walk.full - program, programs) if WHOLE else 0
    places = walk.shared * blocks
    first, last = 0, 0
    if PARTS > 1:
        first = gl.minimum(program, walk.sharers) * places // walk.sharers
        last = gl.minimum(program + 1, walk.sharers) * places // walk.sharers
    rest_tile, rest_k = walk.full + first // blocks, first % blocks
    total = whole * blocks + last - first
    tile, k = program, 0
    if not WHOLE:
        tile, k = rest_tile, rest_k
    ask_tile, ask_k = tile, k
    for slot in gl.static_range(STAGES - 1):
        there = slot < total
        if S.GROUPED:
            mbarrier.expect(full.index(slot), BYTES, there)
        ask_weights(w, weights, full, slot, ask_tile, ask_k, product, walk, there, PAIRED, S)
        ask_tile, ask_k = next_block(ask_tile, ask_k, rest_tile, rest_k, walk)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ask_tile, ask_k = tile, k
    for slot in gl.static_range(STAGES - 1):
        ask_rows(x, pieces, full, slot, ask_tile, ask_k, product, walk, slot < total, S)
        ask_tile, ask_k = next_block(ask_tile, ask_k, rest_tile, rest_k, walk)
    ALIKE: gl.constexpr = S.GROUPS == 1
    # Of one group alone the norms are there before the first block; of several, when a tile of another group comes.
    if S.NORM is not None and ALIKE:
        fill_scales(scales, 0, product, S)
    filled = -1
    cut = gl.where(last > first, gl.cdiv(last, blocks) - first // blocks, 0) if PARTS > 1 else 0
    done, slot, phase = 0, 0, 0
    for _ in tl.range(whole + cut, disable_licm=True):
        stop = gl.minimum(blocks, k + total - done)
        group, column_tile = tile % walk.groups, tile // walk.groups
        if S.NORM is not None and not ALIKE:
            filled = _scales_of(scales, filled, group, product, S)
        sums = ()
        for i in gl.static_range(PIECE_COUNT):
            sums = with_last(sums, zeros(HEIGHTS[i], S))
        for _ in range(k, stop):
            # The slot of the block before takes the next.
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            there = done + STAGES - 1 < total
            if S.GROUPED:
                mbarrier.wait(full.index(slot), phase)
                sums = multiply_of_warpgroups(weights, pieces, slot, sums, S)
                barrier()
                mbarrier.expect(full.index(free), BYTES, there)
            else:
                async_copy.wait_group(STAGES - 2)
                barrier()
            ask_weights(w, weights, full, free, ask_tile, ask_k, product, walk, there, PAIRED, S)
            ask_rows(x, pieces, full, free, ask_tile, ask_k, product, walk, there, S)
            ask_tile, ask_k = next_block(ask_tile, ask_k, rest_tile, rest_k, walk)
            if not S.GROUPED:
                sums = multiply_of_warps(weights, pieces, slot, sums, S)
            done += 1
            wraps = slot == STAGES - 1
            slot, phase = gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)
        if S.GROUPED:
            sums = waited(sums, 0, S)
        if PARTS > 1 and (not WHOLE or tile >= walk.full):
            place = 0
            for i in gl.static_range(PIECE_COUNT):
                target = part_place(
                    product, program + tile - walk.full, place, sums_layout(S, HEIGHTS[i]), HEIGHTS[i], S
                )
                gl.store(target, sums[i])
                place += HEIGHTS[i]
            # The counter is touched by one thread: every thread's part must be there before.
            barrier()
            gl.atomic_add(product.counters + tile - walk.full, 1, sem="release", scope="gpu")
        elif WHOLE:
            place = 0
            for i in gl.static_range(PIECE_COUNT):
                _end_piece(
                    sums[i], group, place, column_tile, scales, product, walk, end, FINISH, ACTIVATION, CENTRED, WIDTH,
                    HEIGHTS[i], S
                )  # fmt: skip
                place += HEIGHTS[i]
        tile, k = next_block(tile, stop - 1, rest_tile, rest_k, walk)
    if PARTS > 1:
        R: gl.constexpr = pass_rows(S) * S.UNITS
        for index in tl.range(first // blocks, first // blocks + cut, disable_licm=True):
            # The programs that hold the tile's first block and its last.
            opening = ((index * blocks + 1) * walk.sharers - 1) // places
            parts = ((index + 1) * blocks * walk.sharers - 1) // places - opening + 1
            counter, tile = product.counters + index, walk.full + index
            wait_count(counter, parts)
            if S.NORM is not None and not ALIKE:
                filled = _scales_of(scales, filled, tile % walk.groups, product, S)
            for unit in tl.range(program - opening, gl.cdiv(height_of(S), R), parts, disable_licm=True):
                y = added_parts(product, opening + index, parts, unit * R, R, S)
                rows = rows_at(product, tile % walk.groups, unit * R, scales, R, S)
                FINISH(y, rows, tile // walk.groups, product, walk, end, ACTIVATION, CENTRED, WIDTH, R, S)
            # Who is the last to have read it sets the counter back.
            barrier()
            if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == 2 * parts - 1:
                gl.store(counter, 0)


def launch_swapped(call: ProductCall) -> None:
    """A product whose weight rows are the MMA's. tactic.block_m: most rows of a program; split_k: how many programs run
    at once, as far as the chip has as many processors; 1: as many as there are tiles. Of heads, a tile has as many as
    block_n holds, at least one.

    Raises NotImplementedError for chips whose warpgroups do not multiply, for what TMA cannot bring (check_tma) and
    for what only a flow's norms have: gates, normalised residuals, double norms, weighted statistics; ValueError for
    tiles that are no MMAs of all warps, or more than their registers hold.
    """
    grouped = call.tactic.schedule == "warpgroups"
    if grouped:
        check_tma(call)
    check_factors(call, MOST_ROWS)
    _check(call)
    tactic, weight, rows = call.tactic, call.weight.data, call.rows
    paired = call.finish_tile is finish_swiglu
    heads, width = 1, call.tile_weights
    if call.finish_tile is finish_qkv:
        heads = heads_of_tile(tactic, width)
        width *= heads
    if width % (WARP_WEIGHTS * tactic.warps) or (grouped and tactic.warps % 4):
        raise ValueError(
            f"tactic.warps: expected {'a multiple of 4' if grouped else 'so many'} of which each has {WARP_WEIGHTS} of "
            f"{width} weight rows, got {tactic.warps}"
        )
    heights = swapped_pieces(rows, tactic)
    height = sum(heights)
    if len(heights) > PIECES:
        raise ValueError(f"tactic.block_m: {height} rows are more than {PIECES} pieces")
    if height * width > MOST_SUMS[tactic.warps > 8] * 32 * tactic.warps:
        raise ValueError(f"tactic.block_n: {height} rows by {width} are more sums than {tactic.warps} warps hold")
    groups, inputs = triton.cdiv(rows, height), weight.shape[1]
    tiles, blocks = groups * triton.cdiv(call.column_tiles, heads), triton.cdiv(inputs, tactic.block_k)
    programs = tiles if tactic.split_k == 1 else min(tactic.split_k, tiles * blocks, _at_once(call.x))
    shared = tiles % programs
    sharers, parts = sharers_of(shared, programs, blocks)
    shared = shared if parts > 1 else 0
    full = tiles - shared
    if shared * blocks * (sharers + 1) >= COUNTED:
        raise ValueError(f"tactic.split_k: expected programs that 32 bits count, got {tactic.split_k}")
    how = call.how(height, groups)
    unit = width // (2 * heads) if call.distance is not None else width
    sizes = Sizes(
        GROUPED=grouped,
        WARPS=tactic.warps,
        STAGES=tactic.stages,
        WEIGHTS=width,
        UNIT=unit,
        BLOCK_K=tactic.block_k,
        HEIGHTS=heights,
        GROUPS=groups,
        HEADS=heads,
        NORM=how.NORM,
        TURNS=0 if call.norm is None else triton.cdiv(call.norm.sums.shape[0], tactic.warps),
        PARTS=parts,
        UNITS=end_passes(height, tactic.warps, unit, parts),
        UNIFORM=sharers == shared * parts,
        EVEN_K=how.EVEN_K,
        SINGLE=call.x.shape[0] == 1,
    )
    described: dict[str, TensorDescriptor | None] = {f"x_{index}": None for index in range(PIECES)}
    if grouped:
        described |= {
            f"x_{index}": _described(call.flat_x, piece, tactic.block_k) for index, piece in enumerate(heights)
        }
    partials = counters = None
    if tactic.split_k > 1:
        # As much as fewer programs could need: how many run is the chip's number, which nobody knows on paper.
        most = min(tactic.split_k, tiles * blocks)
        scratch = call.workspace.partials(2 * most * height * width), call.workspace.counters(min(most, tiles))
        partials, counters = scratch if shared else (None, None)
    launch(
        _swapped,
        (programs,),
        {
            **described,
            "w": _described(weight, width // 2 if paired else width, tactic.block_k) if grouped else None,
            "product": call.product(groups, partials, counters),
            "walk": Walk(
                full=full,
                shared=shared,
                sharers=sharers,
                blocks=blocks,
                groups=groups,
                distance=call.distance or 0,
                weights=weight.shape[0],
                column_step=width // 2 if paired else width,
            ),
            **call.finishing,
            "FINISH": ENDS[call.finish_tile],
            "PAIRED": paired,
            "WHOLE": full > 0,
            "S": sizes,
        },
        tactic.warps,
        tactic.stages,
        cooperative=parts > 1,
    )


def _at_once(x: Tensor) -> int:
    """Programs that may wait for one another: a processor holds one."""
    return MOST_PROGRAMS if x.device.type == "meta" else processors(x.device)


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], tile_layout(columns))


def _check(call: ProductCall) -> None:
    name = f"tactic.schedule {call.tactic.schedule!r}"
    device = call.x.device
    if INTERPRETED:
        raise NotImplementedError(f"{name}: expected a GPU, got Triton's interpreter, which runs no Gluon")
    if call.tactic.schedule == "warpgroups" and device.type != "meta" and capability(device) != WARPGROUPS_ON:
        raise NotImplementedError(f"{name}: expected a chip of sm_{WARPGROUPS_ON}, got sm_{capability(device)}")
    if call.norm is not None and call.norm.kind == "double_rms":
        raise NotImplementedError(f"{name}: expected a norm of kind 'layer' or 'rms', got 'double_rms'")
    if call.tactic.schedule == "swapped" and call.x.shape[2] % WIDE.value:
        raise NotImplementedError(f"{name}: expected K in multiples of {WIDE.value}, got {call.x.shape[2]}")
    end = call.epilogue["end"]
    for field in ("gate", "base_sums", "stats_weight"):
        if getattr(end, field, None) is not None:
            raise NotImplementedError(f"{name}: expected no {field}, got one")
    options = call.finishing
    if options["CENTRED"] and end.outputs % options["OUT_SLOTS"][1]:
        raise NotImplementedError(f"{name}: expected whole slots of centred sums, got {end.outputs} columns")
