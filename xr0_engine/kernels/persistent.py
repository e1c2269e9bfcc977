"""Steps of the flow as one kernel: no launch between stages, 82 a step of XR-0, a barrier of the whole grid instead.

There is at most one program per processor, and all of them run at once (a cooperative launch). Every program takes
its share of a stage's tiles, with the bodies of the kernels that are otherwise launched one after the other. stages.py
has the barrier and the products.

A launch takes any run of places, one layer of one step each, and what ends a step after its last layer: all of them, or
one at a time, as many launches as places. Its first stage needs no barrier: what came before is another kernel's.

The layers' weights stay where they are; a table holds their addresses. What depends on step and layer lies stacked.

Shape legend: B batch, Q DiT tokens, T actions, A action columns, C hidden, F inner columns of the MLP, H heads, G KV
heads, D head_dim, N cached tokens, L layers, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from xr0_engine.kernels.arguments import FlowBuffers, FlowInputs, FlowWeights, Tactic, Workspace, slot_columns
from xr0_engine.kernels.attention import LOG2_E
from xr0_engine.kernels.flow import OUTPUT_BLOCK, _euler_step, flow_tiles
from xr0_engine.kernels.lambda_attention import _lambda_attention
from xr0_engine.kernels.launch import INTERPRETED, launch, processors
from xr0_engine.kernels.loop import WARPS, check_loop, plan_loop
from xr0_engine.kernels.product import STREAM_ROW_TILES
from xr0_engine.kernels.shapes import strided
from xr0_engine.kernels.stages import (
    Shared,
    arrive,
    attention_stage,
    leave,
    linear_stage,
    qkv_stage,
    raw_stage,
    swiglu_stage,
    wait,
    wide_stage,
)
from xr0_engine.kernels.whole_attention import Cached, Own


@triton.jit
def _weight(addresses, index, DTYPE: tl.constexpr):
    """The matrix whose address stands there."""
    return tl.multiple_of(tl.load(addresses + index).to(tl.pointer_type(DTYPE), bitcast=True), 16)


# Else numbers of places that are one, or even, would be kernels of their own.
@triton.jit(do_not_specialize=("first_place", "last_place"))
def _flow_loop(
    addresses,
    attention,
    mlp,
    middle_norms,
    final_norms,
    q_norms,
    k_norms,
    wide_weight,
    out_weight1,
    out_weight2,
    in_weight,
    tokens_weight,
    kv_keys,
    kv_values,
    kv_keys_l,
    kv_keys_b,
    kv_keys_g,
    kv_keys_n,
    begin,
    end_valid,
    prefix_length,
    action_mask,
    buffers,
    partials,
    counters,
    barrier,
    batch,
    tokens,
    context,
    cached,
    window,
    scale,
    eps,
    dt,
    steps,
    layers,
    first_place,
    last_place,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    INNER: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    ACTION_COLUMNS: tl.constexpr,
    QKV: tl.constexpr,
    ATTENTION: tl.constexpr,
    OUT: tl.constexpr,
    GATE_UP: tl.constexpr,
    DOWN: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    STREAM_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIONS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    OWN: tl.constexpr,
    STREAM: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    SHARE: tl.constexpr = HEADS // GROUPS
    DTYPE: tl.constexpr = buffers.mixed.dtype.element_ty
    b, shared = buffers, Shared(barrier, partials, counters, batch, tokens, eps)
    first, count = tl.program_id(0), tl.num_programs(0)
    actions = tokens - context
    stream_b, head_b, head_h = tokens * COLUMNS, HEADS * tokens * DIM, tokens * DIM
    action_rows = batch * actions
    stage = -1
    # Left alone, the compiler computes the addresses of all stages ahead of the loop, and keeps them in registers.
    for place in tl.range(first_place, last_place, disable_licm=True):
        step, layer = place // layers, place % layers
        # What a stage alone needs is computed there: here it would be kept in registers through the stages ahead of it.
        qkv_weight = _weight(addresses, 4 * layer, DTYPE)
        q_norm, k_norm = q_norms + layer * DIM, k_norms + layer * DIM
        bias, col_scale = attention.bias + place * (3 * HEADS * DIM), attention.scale + place * COLUMNS
        stage += 1
        if layer == 0:
            if QKV.PARTS == 0:
                qkv_stage(
                    shared, stage, b.start, b.start_sums, qkv_weight, bias, col_scale, b.q, b.k, b.v, q_norm, k_norm,
                    b.cos, b.sin, "rms", COLUMNS, SLOTS[0], HEADS, DIM, STREAM, QKV, COMPILED, PDL,
                )  # fmt: skip
            else:
                raw_stage(
                    shared, stage, b.start, b.start_sums, qkv_weight, bias, col_scale, b.raw, "rms", COLUMNS,
                    3 * HEADS * DIM, SLOTS[0], STREAM, QKV, COMPILED, PDL,
                )  # fmt: skip
        else:
            if QKV.PARTS == 0:
                qkv_stage(
                    shared, stage, b.end, b.end_sums, qkv_weight, bias, col_scale, b.q, b.k, b.v, q_norm, k_norm,
                    b.cos, b.sin, STREAM_NORM, COLUMNS, SLOTS[0], HEADS, DIM, STREAM, QKV, COMPILED, PDL,
                )  # fmt: skip
            else:
                raw_stage(
                    shared, stage, b.end, b.end_sums, qkv_weight, bias, col_scale, b.raw, STREAM_NORM, COLUMNS,
                    3 * HEADS * DIM, SLOTS[0], STREAM, QKV, COMPILED, PDL,
                )  # fmt: skip

        stage += 1
        keys, values = kv_keys + layer * kv_keys_l, kv_values + layer * kv_keys_l
        if len(ATTENTION) == 4:
            cached_keys = Cached(
                kv_keys=keys, kv_keys_b=kv_keys_b, kv_keys_g=kv_keys_g, kv_keys_n=kv_keys_n, kv_values=values,
                kv_values_b=kv_keys_b, kv_values_g=kv_keys_g, kv_values_n=kv_keys_n, begin=begin, end=end_valid,
                length=cached,
            )  # fmt: skip
            if QKV.PARTS == 0:
                own = Own(
                    q=b.q, q_b=head_b, q_h=head_h, q_m=DIM, k=b.k, k_b=head_b, k_h=head_h, k_m=DIM, v=b.v, v_b=head_b,
                    v_h=head_h, v_m=DIM, q_weight=None, k_weight=None, eps=eps, cos=None, cos_b=0, cos_m=0, sin=None,
                    sin_b=0, sin_m=0,
                )  # fmt: skip
            else:
                raw_m: tl.constexpr = 3 * HEADS * DIM
                raw_b, table_b = tokens * raw_m, tokens * (DIM // 2)
                own = Own(
                    q=b.raw, q_b=raw_b, q_h=DIM, q_m=raw_m, k=b.raw + HEADS * DIM, k_b=raw_b, k_h=DIM, k_m=raw_m,
                    v=b.raw + 2 * HEADS * DIM, v_b=raw_b, v_h=DIM, v_m=raw_m, q_weight=q_norm, k_weight=k_norm, eps=eps,
                    cos=b.cos, cos_b=table_b, cos_m=DIM // 2, sin=b.sin, sin_b=table_b, sin_m=DIM // 2,
                )  # fmt: skip
            attention_stage(
                shared, stage, own, cached_keys, b.mixed, window, context, scale, HEADS, GROUPS, DIM, ATTENTION, OWN,
                COMPILED,
            )  # fmt: skip
        else:
            arrive(barrier)
            wait(barrier, stage, COMPILED)
            attention_tiles = tl.cdiv(tokens * SHARE, ATTENTION[0])
            for program in range(first, attention_tiles * ATTENTION[2] * GROUPS * batch, count):
                _lambda_attention(
                    program=program, q=b.q, q_b=head_b, q_h=head_h, q_m=DIM, k=b.k, k_b=head_b, k_h=head_h, k_m=DIM,
                    v=b.v, v_b=head_b, v_h=head_h, v_m=DIM, kv_keys=keys, kv_keys_b=kv_keys_b, kv_keys_g=kv_keys_g,
                    kv_keys_n=kv_keys_n, kv_values=values, kv_values_b=kv_keys_b, kv_values_g=kv_keys_g,
                    kv_values_n=kv_keys_n, begin=begin, end=end_valid, out=b.mixed, out_b=stream_b, out_m=COLUMNS,
                    partials=partials, counters=counters, tiles=attention_tiles, groups=GROUPS, queries=tokens,
                    cached=cached, window=window, context=context, scale=scale, SHARE=SHARE, DIM=DIM,
                    SPLITS=ATTENTION[2], BLOCK_M=ATTENTION[0], BLOCK_N=ATTENTION[1], OWN=OWN, PDL=False,
                )  # fmt: skip

        stage += 1
        out_weight, gate = _weight(addresses, 4 * layer + 1, DTYPE), attention.gate + place * COLUMNS
        # Of streams that are never normalised, nobody takes weighted sums.
        middle_norm, end_norm, normed_middle = None, None, None
        if STREAM_NORM == "double_rms":
            middle_norm, end_norm = middle_norms + layer * COLUMNS, final_norms + layer * COLUMNS
            normed_middle = b.middle_sums
        if layer == 0:
            linear_stage(
                shared, stage, b.mixed, tokens, out_weight, b.middle, b.start, gate, None, None, b.middle_sums,
                middle_norm, COLUMNS, COLUMNS, SLOTS, STREAM, OUT, COMPILED,
            )  # fmt: skip
        else:
            norm_before, normed_end = None, None
            if STREAM_NORM == "double_rms":
                norm_before, normed_end = final_norms + (layer - 1) * COLUMNS, b.end_sums
            linear_stage(
                shared, stage, b.mixed, tokens, out_weight, b.middle, b.end, gate, normed_end, norm_before,
                b.middle_sums, middle_norm, COLUMNS, COLUMNS, SLOTS, STREAM, OUT, COMPILED,
            )  # fmt: skip

        stage += 1
        gate_up_weight = _weight(addresses, 4 * layer + 2, DTYPE)
        swiglu_stage(
            shared, stage, b.middle, b.middle_sums, gate_up_weight, mlp.bias + place * (2 * INNER),
            mlp.scale + place * COLUMNS, b.hidden, STREAM_NORM, COLUMNS, SLOTS[0], INNER, STREAM, GATE_UP, COMPILED,
        )  # fmt: skip

        stage += 1
        down_weight = _weight(addresses, 4 * layer + 3, DTYPE)
        linear_stage(
            shared, stage, b.hidden, tokens, down_weight, b.end, b.middle, mlp.gate + place * COLUMNS, normed_middle,
            middle_norm, b.end_sums, end_norm, INNER, COLUMNS, SLOTS, STREAM, DOWN, COMPILED,
        )  # fmt: skip

        if layer == layers - 1:
            stage += 1
            turn = step % 2
            column_tiles: tl.constexpr = triton.cdiv(COLUMNS, HIDDEN)
            z_b, z_size = actions * ACTION_COLUMNS, action_rows * ACTION_COLUMNS
            last, last_b, last_sums = b.end + context * COLUMNS, stream_b, None
            if STREAM_NORM == "double_rms":
                last_sums = b.end_sums + 2 * context
            if WIDE is not None:
                wide_stage(
                    shared, stage, last, last_sums, wide_weight, b.wide, actions, COLUMNS, OUT_COLUMNS, SLOTS[0],
                    STREAM, WIDE, COMPILED,
                )  # fmt: skip
                stage += 1
                last, last_b, last_sums = b.wide, actions * OUT_COLUMNS, None
            arrive(barrier)
            wait(barrier, stage, COMPILED)
            for program in range(first, tl.cdiv(action_rows, ROWS) * column_tiles, count):
                _euler_step(
                    program=program, x=last, x_b=last_b, x_t=OUT_COLUMNS, sums=last_sums, sums_s=2 * batch * tokens,
                    sums_b=2 * tokens, sums_t=2, eps=eps, out_weight1=out_weight1, out_weight1_a=OUT_COLUMNS,
                    out_weight2=out_weight2, out_weight2_a=ACTION_COLUMNS, z=b.z + turn * z_size, z_b=z_b,
                    z_t=ACTION_COLUMNS, z_next=b.z + (1 - turn) * z_size, z_next_b=z_b, z_next_t=ACTION_COLUMNS,
                    prefix_length=prefix_length, action_mask=action_mask, action_mask_b=z_b,
                    action_mask_t=ACTION_COLUMNS, dt=dt, in_weight=in_weight, in_weight_c=ACTION_COLUMNS,
                    hidden=b.embedded, hidden_b=actions * COLUMNS, hidden_t=COLUMNS, rows=action_rows, tokens=actions,
                    actions=ACTION_COLUMNS, columns=OUT_COLUMNS, slots=SLOTS[0], hidden_columns=COLUMNS,
                    column_tiles=column_tiles, ROWS=ROWS, ACTIONS=ACTIONS, HIDDEN=HIDDEN, OUTPUT=OUTPUT,
                    SLOTS=triton.next_power_of_2(SLOTS[0]), PDL=False,
                )  # fmt: skip

            if step + 1 < steps:
                stage += 1
                linear_stage(
                    shared, stage, b.embedded, actions, tokens_weight, b.start + context * COLUMNS, None, None, None,
                    None, b.start_sums + 2 * context, None, COLUMNS, COLUMNS, SLOTS, STREAM, TOKENS, COMPILED,
                )  # fmt: skip
    leave(barrier, stage)


def flow_loop(
    weights: FlowWeights,
    inputs: FlowInputs,
    buffers: FlowBuffers,
    *,
    eps: float,
    context: int,
    window: int | None,
    places: tuple[int, int],
    programs: int | None = None,
    tactics: Mapping[str, Tactic],
    workspace: Workspace,
) -> None:
    """Places of the flow: what lambda_attention, qkv, linear, swiglu and euler_step give in the model's sequence.

    Place s L + l is layer l of step s, and the step's end with its last layer. places: the first, and one past the
    last, of one launch. buffers: contiguous; start, cos, sin and z[0] hold the first step's input; z[S % 2] holds the
    chunk after the last place. eps: of all norms. context: sink and state tokens. window: as lambda_attention.
    programs: at most so many, None for as many as there are processors: what they leave is free for other kernels.
    tactics: of loop.py's STAGES, none of them the library's; the kernel gets the stages of the one with the most.
    Raises ValueError for shapes that do not fit and places that are none, NotImplementedError as plan_loop.
    """
    steps, layers, columns = weights.attention.scale.shape
    batch, heads, tokens, dim = buffers.q.shape
    groups, cached = inputs.keys.shape[2:4]
    inner, actions, slots = buffers.hidden.shape[-1], buffers.z.shape[-1], buffers.start_sums.shape[0]
    check_loop(weights, inputs, buffers, context)
    if not 0 <= places[0] < places[1] <= steps * layers:
        raise ValueError(f"places: expected a run within {steps * layers}, got {places}")
    if programs is not None and programs < 1:
        raise ValueError(f"programs: expected at least 1, got {programs}")
    rows, plan = batch * tokens, plan_loop(inputs, buffers, context, tactics)
    counters = workspace.counters(1 + plan.counters)
    most = min(plan.programs, programs or processors(buffers.q.device))
    launch(
        _flow_loop,
        (min(most, processors(buffers.q.device)),),
        {
            "addresses": weights.addresses,
            "attention": weights.attention,
            "mlp": weights.mlp,
            **{name: getattr(weights, name) for name in ("middle_norms", "final_norms", "q_norms", "k_norms")},
            "STREAM_NORM": "rms" if weights.middle_norms is None else "double_rms",
            "OUT_COLUMNS": columns if buffers.wide is None else buffers.wide.shape[-1],
            "in_weight": weights.in_weights[0],
            "tokens_weight": weights.in_weights[1],
            # The Euler step has both products of the output layer, or the second.
            "wide_weight": None if buffers.wide is None else weights.out_weights[0],
            "out_weight1": weights.out_weights[buffers.wide is not None],
            "out_weight2": None if buffers.wide is not None else weights.out_weights[1],
            **strided("kv_keys", inputs.keys, "lbgn"),
            "kv_values": inputs.values,
            "begin": inputs.begin,
            "end_valid": inputs.end,
            "prefix_length": inputs.prefix_length,
            "action_mask": inputs.action_mask,
            "buffers": buffers,
            "partials": workspace.partials(plan.partials),
            "counters": counters[1:],
            "barrier": counters[:1],
            "batch": batch,
            "tokens": tokens,
            "context": context,
            "cached": cached,
            "window": tokens if window is None else window,
            "scale": dim**-0.5 * LOG2_E,
            "eps": eps,
            "dt": 1.0 / steps,
            "steps": steps,
            "layers": layers,
            "first_place": places[0],
            "last_place": places[1],
            "COLUMNS": columns,
            "SLOTS": (slots, slot_columns("start_sums", buffers.start_sums, columns)),
            "INNER": inner,
            "HEADS": heads,
            "GROUPS": groups,
            "DIM": dim,
            "ACTION_COLUMNS": actions,
            **plan.tiles,
            **flow_tiles(batch * (tokens - context), actions),
            "OUTPUT": OUTPUT_BLOCK,
            "OWN": plan.own_keys,
            "STREAM": triton.cdiv(rows, plan.tiles["DOWN"].BLOCK_M) <= STREAM_ROW_TILES,
            "COMPILED": not INTERPRETED,
        },
        WARPS,
        max(tactic.stages for tactic in tactics.values()),
        cooperative=True,
        reached=weights.matrices,
    )
