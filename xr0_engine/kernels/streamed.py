"""Steps of the flow as one kernel whose weights never stop coming. As persistent.py, a barrier of the grid between
stages; unlike there, what a program multiplies with next is on its way through shared memory (ring.py) while it waits.

It is for few rows of 16-bit weights, those of one observation: all tokens of all batches are one tile. A launch takes
whole steps.

Shape legend: B batch, Q DiT tokens, T actions, A action columns, C hidden, F inner columns of the MLP, H heads, G KV
heads, D head_dim, N cached tokens, L layers, S steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from xr0_engine.kernels.arguments import (
    SHARED_LIMIT,
    STREAMED_ROWS,
    FlowBuffers,
    FlowInputs,
    FlowWeights,
    Workspace,
    slot_columns,
)
from xr0_engine.kernels.attention import LOG2_E
from xr0_engine.kernels.launch import INTERPRETED, PROCESSORS, l2_bytes, launch, processors
from xr0_engine.kernels.loop import check_loop
from xr0_engine.kernels.ring import (
    CHUNK_ROWS,
    LEAST_PART,
    WARPS,
    Stream,
    Widths,
    arrive,
    begin,
    ends_of,
    fill,
    leave,
    new_ring,
    padded,
    refill,
    ring_slots,
    step_chunks,
)
from xr0_engine.kernels.shapes import strided
from xr0_engine.kernels.streamed_attention import KEYS, Cache, Turn, attention_stage, release_cache
from xr0_engine.kernels.streamed_end import Output, euler_stage, tokens_stage, wide_stage
from xr0_engine.kernels.streamed_stages import (
    End,
    Loop,
    down_stage,
    gate_up_stage,
    out_stage,
    qkv_stage,
    scale_stage,
)

MOST_COLUMNS = 1024
DIMS = 64, 128
"""Of a head: of larger ones the attention takes more shared memory than is left for it."""
MOST_KEYS = 512
"""A program holds its part of so many cached keys in registers."""
MOST_KEPT = 0.5
"""Of the L2 cache, which weights stream through: what the keys and values of all layers may take of it for good."""
STAGES_SHARED = 28 * 1024
"""Bytes that the stages take beside the ring at most. Ahead of time the published sizes are held to the chips'."""


@gluon.jit
def _streamed_flow(
    addresses,
    attention,
    mlp,
    middle_norms,
    final_norms,
    q_norms,
    k_norms,
    out_weight1,
    out_weight2,
    in_weight,
    wide_weight,
    tokens_weight,
    kv_keys,
    kv_values,
    kv_keys_l,
    kv_keys_b,
    kv_keys_g,
    kv_keys_n,
    begin_valid,
    end_valid,
    prefix_length,
    action_mask,
    buffers,
    partials,
    counters,
    barrier,
    rows,
    tokens,
    context,
    cached,
    window,
    scale,
    eps,
    dt,
    layers,
    first_step,
    last_step,
    actions,
    W: gl.constexpr,
    PDL: gl.constexpr,
):
    b = buffers
    ENDS: gl.constexpr = ends_of(W)
    WIDE: gl.constexpr = step_chunks(W)[0]
    TOKENS: gl.constexpr = step_chunks(W)[1]
    SIZE: gl.constexpr = W.COLUMNS
    chunks = (last_step - first_step) * (layers * ENDS[3] + WIDE + TOKENS) - TOKENS
    stream = Stream(addresses, wide_weight, tokens_weight, chunks, layers)
    loop = Loop(stream, buffers, barrier, partials, counters, rows, tokens, context, eps)
    ring = new_ring(W)
    fill(stream, ring, W)
    # In fragments, of all rows.
    middle_scaled, end_scaled = b.fragments, b.fragments + W.ROWS * SIZE
    mixed, embedded, hidden = end_scaled + W.ROWS * SIZE, end_scaled + 2 * W.ROWS * SIZE, end_scaled + 3 * W.ROWS * SIZE
    begin(PDL)
    scale_stage(loop, b.start, attention.scale + first_step * layers * SIZE, end_scaled, W)
    # Before, number: of chunks, at the beginning and the end of a stage. chunk: of all programs, where a layer begins.
    stage, before, number, chunk = 0, 0, 0, 0
    # Left alone, the compiler computes the addresses of all stages ahead of the loop, and keeps them in registers.
    for step in tl.range(first_step, last_step, disable_licm=True):
        for layer in tl.range(layers, disable_licm=True):
            place = step * layers + layer
            later = layer > 0
            arrive(barrier)
            refill(stream, ring, before, number, W)
            before, stage = number, stage + 1
            number = qkv_stage(
                loop, stage, number, chunk + ENDS[0], ring, end_scaled, gl.where(later, b.end_sums, b.start_sums),
                attention.bias + place * (3 * SIZE), later, W,
            )  # fmt: skip

            arrive(barrier)
            refill(stream, ring, before, number, W)
            stage += 1
            cache = Cache(
                kv_keys + layer * kv_keys_l, kv_values + layer * kv_keys_l, kv_keys_b, kv_keys_g, kv_keys_n,
                begin_valid, end_valid, cached,
            )  # fmt: skip
            turn = Turn(q_norms + layer * W.DIM, k_norms + layer * W.DIM, b.cos, b.sin, window, scale)
            attention_stage(loop, stage, cache, turn, mixed, W)

            arrive(barrier)
            before, stage = number, stage + 1
            middle_norm, end_norm, norm_before = None, None, None
            if W.DOUBLE:
                middle_norm, end_norm = middle_norms + layer * SIZE, final_norms + layer * SIZE
                norm_before = final_norms + gl.maximum(layer - 1, 0) * SIZE
            to_middle = End(
                out=b.middle, sums=b.middle_sums, sums_weight=middle_norm, base=gl.where(later, b.end, b.start),
                base_sums=b.end_sums, base_weight=norm_before, normed=later, gate=attention.gate + place * SIZE,
                scaled=middle_scaled, scales=True, scale=mlp.scale + place * SIZE,
            )  # fmt: skip
            number = out_stage(loop, stage, number, chunk + ENDS[1], ring, mixed, to_middle, W)

            arrive(barrier)
            refill(stream, ring, before, number, W)
            before, stage = number, stage + 1
            number = gate_up_stage(
                loop, stage, number, chunk + ENDS[2], ring, middle_scaled, b.middle_sums,
                mlp.bias + place * (2 * W.INNER), hidden, W,
            )  # fmt: skip

            arrive(barrier)
            refill(stream, ring, before, number, W)
            before, stage = number, stage + 1
            # The output layer reads the last layer's as it is.
            following = attention.scale + gl.minimum(place + 1, last_step * layers - 1) * SIZE
            to_end = End(
                out=b.end, sums=b.end_sums, sums_weight=end_norm, base=b.middle, base_sums=b.middle_sums,
                base_weight=middle_norm, normed=True, gate=mlp.gate + place * SIZE, scaled=end_scaled,
                scales=layer < layers - 1, scale=following,
            )  # fmt: skip
            number = down_stage(loop, stage, number, chunk + ENDS[3], ring, hidden, to_end, W)
            chunk += ENDS[3]

        arrive(barrier)
        refill(stream, ring, before, number, W)
        before, stage = number, stage + 1
        if W.WIDE:
            number = wide_stage(loop, stage, number, chunk + WIDE, ring, end_scaled, mixed, W)
            chunk += WIDE
            arrive(barrier)
            refill(stream, ring, before, number, W)
            stage += 1
        turns = rows // tokens * (tokens - context) * actions
        z, z_next = b.z + step % 2 * turns, b.z + (1 - step % 2) * turns
        output = Output(out_weight1, out_weight2, in_weight, prefix_length, action_mask, z, z_next, dt, actions)
        euler_stage(loop, stage, mixed if W.WIDE else end_scaled, embedded, output, W)
        before = number
        if step + 1 < last_step:
            arrive(barrier)
            stage += 1
            to_start = End(
                out=b.start, sums=b.start_sums, sums_weight=None, base=b.start, base_sums=None, base_weight=None,
                normed=False, gate=None, scaled=end_scaled, scales=True,
                scale=attention.scale + (step + 1) * layers * SIZE,
            )  # fmt: skip
            number = tokens_stage(loop, stage, number, chunk + TOKENS, ring, embedded, to_start, W)
            chunk += TOKENS
    if W.KEPT:
        release_cache(kv_keys, kv_values, layers * kv_keys_l, W)
    leave(barrier, stage)


def streamed_loop(
    weights: FlowWeights,
    inputs: FlowInputs,
    buffers: FlowBuffers,
    *,
    eps: float,
    context: int,
    window: int | None,
    steps: tuple[int, int],
    arch: int,
    programs: int | None = None,
    workspace: Workspace,
) -> None:
    """Steps of the flow, as persistent.py: flow_loop. steps: the first, and one past the last. arch: compute
    capability, which says how much of the ring a processor holds.

    Raises ValueError for shapes that do not fit, NotImplementedError for sizes and dtypes that this kernel is not for:
    what never_streams says.
    """
    check_loop(weights, inputs, buffers, context)
    if reason := never_streams(inputs, buffers):
        raise NotImplementedError(f"flow streamed: {reason}; take chained")
    total, layers, columns = weights.attention.scale.shape
    batch, heads, tokens, dim = buffers.q.shape
    groups, cached = inputs.keys.shape[2:4]
    inner, actions = buffers.hidden.shape[-1], buffers.z.shape[-1]
    if not 0 <= steps[0] < steps[1] <= total:
        raise ValueError(f"steps: expected a run within {total}, got {steps}")
    assert buffers.fragments is not None
    if slot_columns("start_sums", buffers.start_sums, columns) != CHUNK_ROWS.value:
        raise ValueError(f"start_sums: expected slots of {CHUNK_ROWS.value} columns")
    device, splits = buffers.q.device, inner // columns
    available = PROCESSORS[arch] if device.type == "meta" else processors(device)
    widths = Widths(
        ROWS=buffers.fragments.shape[0],
        OWN=padded(tokens),
        COLUMNS=columns,
        INNER=inner,
        HEADS=heads,
        SHARE=heads // groups,
        DIM=dim,
        ACTIONS=padded(actions),
        KEYS=triton.cdiv(cached, KEYS.value),
        RING=min(8, ring_slots(columns, SHARED_LIMIT[arch], STAGES_SHARED)),
        DOUBLE=weights.middle_norms is not None,
        WIDE=buffers.wide is not None,
        KEPT=2 * inputs.keys.nbytes <= MOST_KEPT * l2_bytes(device, arch),
    )
    # In each tile that a program has of the last product, it has the same part of K.
    grid = min(available if programs is None else programs, available) // splits * splits
    if grid < 1:
        given = available if programs is None else programs
        raise NotImplementedError(f"flow streamed: expected at least {splits} programs, got {given}; take chained")
    counters = workspace.counters(1 + columns // CHUNK_ROWS.value)
    launch(
        _streamed_flow,
        (grid,),
        {
            "addresses": weights.addresses,
            "attention": weights.attention,
            "mlp": weights.mlp,
            **{name: getattr(weights, name) for name in ("middle_norms", "final_norms", "q_norms", "k_norms")},
            # The Euler step has both products of the output layer, or the second.
            "wide_weight": weights.out_weights[0] if widths.WIDE else None,
            "out_weight1": weights.out_weights[widths.WIDE],
            "out_weight2": None if widths.WIDE else weights.out_weights[1],
            "in_weight": weights.in_weights[0],
            "tokens_weight": weights.in_weights[1],
            **strided("kv_keys", inputs.keys, "lbgn"),
            "kv_values": inputs.values,
            "begin_valid": inputs.begin,
            "end_valid": inputs.end,
            "prefix_length": inputs.prefix_length,
            "action_mask": inputs.action_mask,
            "buffers": buffers,
            "partials": workspace.partials(columns * splits * widths.ROWS),
            "counters": counters[1:],
            "barrier": counters[:1],
            "rows": batch * tokens,
            "tokens": tokens,
            "context": context,
            "cached": cached,
            "window": tokens if window is None else window,
            "scale": dim**-0.5 * LOG2_E,
            "eps": eps,
            "dt": 1.0 / total,
            "layers": layers,
            "first_step": steps[0],
            "last_step": steps[1],
            "actions": actions,
            "W": widths,
        },
        WARPS.value,
        1,
        cooperative=True,
        reached=weights.matrices,
    )


def never_streams(inputs: FlowInputs, buffers: FlowBuffers) -> str:
    """Why a streamed loop is not for these; empty: it is."""
    batch, tokens = buffers.q.shape[0], buffers.q.shape[2]
    columns, inner, cached = buffers.start.shape[-1], buffers.hidden.shape[-1], inputs.keys.shape[3]
    dim = buffers.q.shape[3]
    if INTERPRETED:
        return "expected compiled kernels, got Triton's interpreter"
    if buffers.mixed.dtype != torch.bfloat16:
        return f"expected bfloat16, got {str(buffers.mixed.dtype).removeprefix('torch.')}"
    if buffers.wide is not None and buffers.wide.shape[-1] != columns:
        return f"expected an output layer as wide as its actions or of {columns} columns, got {buffers.wide.shape[-1]}"
    least = WARPS.value * LEAST_PART.value
    if columns & (columns - 1) or not least <= columns <= MOST_COLUMNS or inner % columns:
        return f"expected {least} to {MOST_COLUMNS} columns, and a multiple inside; got {columns}, {inner}"
    if dim not in DIMS:
        return f"expected heads of {' or '.join(map(str, DIMS))} columns, got {dim}"
    if buffers.fragments is None:
        return f"expected at most {STREAMED_ROWS[-1]} tokens in all, got {batch * tokens}"
    if cached > MOST_KEYS:
        return f"expected at most {MOST_KEYS} cached tokens, got {cached}"
    return ""
