"""All steps of the flow as one kernel: no launch between its 82 stages a step, a barrier of the whole grid instead.

There is at most one program per processor, and all of them run at once (a cooperative launch). Every program takes
its share of a stage's tiles, with the bodies of the kernels that are otherwise launched one after the other, and asks
for its first weight blocks of the next stage before it waits for the others. The barrier is a counter that only grows
during a launch: stage n begins when n times the number of programs have arrived. The last program to leave sets it back
to zero.

The layers' weights stay where they are; a table holds their addresses. What depends on step and layer lies stacked.

Shape legend: B batch, Q DiT tokens, T actions, A action columns, C hidden, F inner columns of the MLP, H heads, G KV
heads, D head_dim, N cached tokens, L layers, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from xr0_engine.kernels.arguments import STATS_COLUMNS, FlowBuffers, FlowInputs, FlowWeights, Tactic, Workspace
from xr0_engine.kernels.attention import LOG2_E, OWN_BLOCK, _lambda_attention
from xr0_engine.kernels.flow import OUTPUT_BLOCK, _euler_step, flow_tiles
from xr0_engine.kernels.launch import INTERPRETED, launch, processors
from xr0_engine.kernels.linear import _linear, _swiglu
from xr0_engine.kernels.product import STREAM_ROW_TILES, paired, prefetch_weight, tile_of
from xr0_engine.kernels.qkv import _qkv
from xr0_engine.kernels.shapes import expect, expect_head_dim, expect_tiles, strided

STAGES = ("qkv", "attention", "out", "gate_up", "down", "tokens")
"""What the tactic of each stage is called; the Euler step has none."""
BUFFERS = (
    *("start", "start_sums", "middle", "middle_sums", "end", "end_sums", "q", "k", "v", "mixed", "hidden", "embedded"),
    *("cos", "sin", "z"),
)
WARPS = 8
"""One program has a processor to itself; with fewer warps the stage that needs most registers spills some."""
SLOT = tl.constexpr(STATS_COLUMNS)


@triton.jit
def _weight(addresses, index, DTYPE: tl.constexpr):
    """The matrix whose address stands there."""
    return tl.multiple_of(tl.load(addresses + index).to(tl.pointer_type(DTYPE), bitcast=True), 16)


@triton.jit
def _arrive(barrier):
    """All that this program wrote before is there for those who have waited."""
    # The counter is touched by one thread: every thread's stores must be there before.
    tl.debug_barrier()
    tl.atomic_add(barrier, 1, sem="release", scope="gpu")


@triton.jit
def _wait(barrier, stage):
    """Until all programs have arrived at the stage."""
    while tl.atomic_add(barrier, 0, sem="acquire", scope="gpu") < stage * tl.num_programs(0):
        pass


@triton.jit
def _leave(barrier, stages):
    """Sets the counter back, once nobody waits for it any more."""
    if tl.atomic_add(barrier, 1, sem="acq_rel", scope="gpu") == (stages + 1) * tl.num_programs(0) - 1:
        tl.store(barrier, 0)


@triton.jit
def _begin_product(
    barrier,
    stage,
    w,
    row_tiles,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """A stage's barrier; meanwhile its weight, (OUTPUTS, INPUTS), is on its way. Returns the number of its tiles."""
    tiles = row_tiles * triton.cdiv(OUTPUTS, TILE[1]) * TILE[3]
    _arrive(barrier)
    if PREFETCH and tl.program_id(0) < tiles:
        _, split, column_tile = tile_of(tl.program_id(0), row_tiles, TILE[3])
        if GATED:
            n = paired(column_tile * (TILE[1] // 2), OUTPUTS // 2, TILE[1])
        else:
            n = column_tile * TILE[1] + tl.arange(0, TILE[1])
        prefetch_weight(w, INPUTS, tl.minimum(n, OUTPUTS - 1), split, INPUTS, TILE[3], TILE[2])
    _wait(barrier, stage)
    return tiles


@triton.jit
def _qkv_stage(
    barrier,
    stage,
    stream,
    sums,
    w,
    bias,
    col_scale,
    q,
    k,
    v,
    q_norm,
    k_norm,
    cos,
    sin,
    batch,
    tokens,
    eps,
    partials,
    counters,
    NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    SLOTS: tl.constexpr = triton.cdiv(COLUMNS, SLOT)
    rows = batch * tokens
    row_tiles = tl.cdiv(rows, TILE[0])
    tiles = _begin_product(barrier, stage, w, row_tiles, 3 * HEADS * DIM, COLUMNS, False, TILE, PREFETCH)
    head_b, head_h = HEADS * tokens * DIM, tokens * DIM
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _qkv(
            program=program, x=stream, x_b=tokens * COLUMNS, x_m=COLUMNS, w=w, w_n=COLUMNS, scale=None, bias=bias,
            col_scale=col_scale, sums=sums, sums_s=2 * rows, sums_b=2 * tokens, sums_m=2, column_sums=None,
            norm_eps=eps, partials=partials, counters=counters, rows=rows, batch_rows=tokens, inputs=COLUMNS,
            slots=SLOTS, row_tiles=row_tiles, query_heads=HEADS, kv_heads=HEADS, q=q, q_b=head_b, q_h=head_h, q_m=DIM,
            k=k, k_b=head_b, k_h=head_h, k_m=DIM, v=v, v_b=head_b, v_h=head_h, v_m=DIM, q_weight=q_norm,
            k_weight=k_norm, eps=eps, cos=cos, cos_b=tokens * (DIM // 2), cos_m=DIM // 2, sin=sin,
            sin_b=tokens * (DIM // 2), sin_m=DIM // 2, NORM=NORM, SLOTS=triton.next_power_of_2(SLOTS), LIBRARY=False,
            SPLIT_K=TILE[3], BLOCK_M=TILE[0], BLOCK_N=DIM, BLOCK_K=TILE[2], EVEN_K=COLUMNS % TILE[2] == 0,
            STREAM=STREAM, PDL=False,
        )  # fmt: skip


@triton.jit
def _linear_stage(
    barrier,
    stage,
    x,
    w,
    out,
    residual,
    gate,
    residual_sums,
    residual_weight,
    stats,
    stats_weight,
    batch,
    x_rows,
    out_rows,
    eps,
    partials,
    counters,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STREAM: tl.constexpr,
    TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """x_rows, out_rows: of each batch, in x and in the stream of which out is a part."""
    rows = batch * x_rows
    row_tiles = tl.cdiv(rows, TILE[0])
    tiles = _begin_product(barrier, stage, w, row_tiles, OUTPUTS, INPUTS, False, TILE, PREFETCH)
    out_b, sums_s, sums_b = out_rows * OUTPUTS, 2 * batch * out_rows, 2 * out_rows
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        _linear(
            program=program, x=x, x_b=x_rows * INPUTS, x_m=INPUTS, w=w, w_n=INPUTS, scale=None, bias=None,
            col_scale=None, sums=None, sums_s=0, sums_b=0, sums_m=0, column_sums=None, norm_eps=0.0,
            partials=partials, counters=counters, rows=rows, batch_rows=x_rows, inputs=INPUTS, slots=0,
            row_tiles=row_tiles, outputs=OUTPUTS, out=out, out_b=out_b, out_m=OUTPUTS, residual=residual,
            residual_b=out_b, residual_m=OUTPUTS, gate=gate, base_sums=residual_sums, base_sums_s=sums_s,
            base_sums_b=sums_b, base_sums_m=2, base_weight=residual_weight, base_eps=eps, extra=None, extra_r=0,
            extra_index=None, extra_index_b=0, stats=stats, stats_s=sums_s, stats_b=sums_b, stats_m=2,
            stats_weight=stats_weight, ACTIVATION=None,
            OUT_SLOTS=triton.next_power_of_2(triton.cdiv(OUTPUTS, SLOT)), SLOT_COLUMNS=SLOT,
            NORM=None, SLOTS=1, LIBRARY=False, SPLIT_K=TILE[3], BLOCK_M=TILE[0], BLOCK_N=TILE[1], BLOCK_K=TILE[2],
            EVEN_K=INPUTS % TILE[2] == 0, STREAM=STREAM, PDL=False,
        )  # fmt: skip


@triton.jit
def _flow_loop(
    addresses,
    attention_scale,
    attention_bias,
    attention_gate,
    mlp_scale,
    mlp_bias,
    mlp_gate,
    middle_norms,
    final_norms,
    q_norms,
    k_norms,
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
    start,
    start_sums,
    middle,
    middle_sums,
    end,
    end_sums,
    q,
    k,
    v,
    mixed,
    hidden,
    embedded,
    cos,
    sin,
    z,
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
    COLUMNS: tl.constexpr,
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
    ROWS: tl.constexpr,
    ACTIONS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    OWN: tl.constexpr,
    STREAM: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    SLOTS: tl.constexpr = triton.cdiv(COLUMNS, SLOT)
    SHARE: tl.constexpr = HEADS // GROUPS
    DTYPE: tl.constexpr = mixed.dtype.element_ty
    first, count = tl.program_id(0), tl.num_programs(0)
    rows, actions = batch * tokens, tokens - context
    stream_b, sums_s, sums_b, head_b, head_h = (
        tokens * COLUMNS,
        2 * rows,
        2 * tokens,
        HEADS * tokens * DIM,
        tokens * DIM,
    )
    action_rows = batch * actions
    attention_tiles = tl.cdiv(tokens * SHARE, ATTENTION[0])
    stage = 0
    # Left alone, the compiler computes the addresses of all stages ahead of the loops, and keeps them in registers.
    for step in tl.range(steps, disable_licm=True):
        keys, values = kv_keys, kv_values
        for layer in tl.range(layers, disable_licm=True):
            place = step * layers + layer
            qkv_weight, out_weight = _weight(addresses, 4 * layer, DTYPE), _weight(addresses, 4 * layer + 1, DTYPE)
            gate_up_weight = _weight(addresses, 4 * layer + 2, DTYPE)
            down_weight = _weight(addresses, 4 * layer + 3, DTYPE)
            q_norm, k_norm = q_norms + layer * DIM, k_norms + layer * DIM
            bias, col_scale = attention_bias + place * (3 * HEADS * DIM), attention_scale + place * COLUMNS
            gate, middle_norm = attention_gate + place * COLUMNS, middle_norms + layer * COLUMNS
            final_norm = final_norms + layer * COLUMNS

            stage += 1
            if layer == 0:
                _qkv_stage(
                    barrier, stage, start, start_sums, qkv_weight, bias, col_scale, q, k, v, q_norm, k_norm, cos, sin,
                    batch, tokens, eps, partials, counters, "rms", COLUMNS, HEADS, DIM, STREAM, QKV, PREFETCH,
                )  # fmt: skip
            else:
                _qkv_stage(
                    barrier, stage, end, end_sums, qkv_weight, bias, col_scale, q, k, v, q_norm, k_norm, cos, sin,
                    batch, tokens, eps, partials, counters, "double_rms", COLUMNS, HEADS, DIM, STREAM, QKV, PREFETCH,
                )  # fmt: skip

            stage += 1
            _arrive(barrier)
            _wait(barrier, stage)
            for program in range(first, attention_tiles * ATTENTION[2] * GROUPS * batch, count):
                _lambda_attention(
                    program=program, q=q, q_b=head_b, q_h=head_h, q_m=DIM, k=k, k_b=head_b, k_h=head_h, k_m=DIM, v=v,
                    v_b=head_b, v_h=head_h, v_m=DIM, kv_keys=keys, kv_keys_b=kv_keys_b, kv_keys_g=kv_keys_g,
                    kv_keys_n=kv_keys_n, kv_values=values, kv_values_b=kv_keys_b, kv_values_g=kv_keys_g,
                    kv_values_n=kv_keys_n, begin=begin, end=end_valid, out=mixed, out_b=stream_b, out_m=COLUMNS,
                    partials=partials, counters=counters, tiles=attention_tiles, groups=GROUPS, queries=tokens,
                    cached=cached, window=window, context=context, scale=scale, SHARE=SHARE, DIM=DIM,
                    SPLITS=ATTENTION[2], BLOCK_M=ATTENTION[0], BLOCK_N=ATTENTION[1], OWN=OWN, PDL=False,
                )  # fmt: skip

            stage += 1
            if layer == 0:
                _linear_stage(
                    barrier, stage, mixed, out_weight, middle, start, gate, None, None, middle_sums, middle_norm,
                    batch, tokens, tokens, eps, partials, counters, COLUMNS, COLUMNS, STREAM, OUT, PREFETCH,
                )  # fmt: skip
            else:
                _linear_stage(
                    barrier, stage, mixed, out_weight, middle, end, gate, end_sums, final_norm - COLUMNS, middle_sums,
                    middle_norm, batch, tokens, tokens, eps, partials, counters, COLUMNS, COLUMNS, STREAM, OUT,
                    PREFETCH,
                )  # fmt: skip

            stage += 1
            row_tiles = tl.cdiv(rows, GATE_UP[0])
            tiles = _begin_product(
                barrier, stage, gate_up_weight, row_tiles, 2 * INNER, COLUMNS, True, GATE_UP, PREFETCH
            )
            for program in range(first, tiles, count):
                _swiglu(
                    program=program, x=middle, x_b=stream_b, x_m=COLUMNS, w=gate_up_weight, w_n=COLUMNS, scale=None,
                    bias=mlp_bias + place * (2 * INNER), col_scale=mlp_scale + place * COLUMNS, sums=middle_sums,
                    sums_s=sums_s, sums_b=sums_b, sums_m=2, column_sums=None, norm_eps=eps, partials=partials,
                    counters=counters, rows=rows, batch_rows=tokens, inputs=COLUMNS, slots=SLOTS, row_tiles=row_tiles,
                    outputs=INNER, out=hidden, out_b=tokens * INNER, out_m=INNER, NORM="double_rms",
                    SLOTS=triton.next_power_of_2(SLOTS), LIBRARY=False, SPLIT_K=GATE_UP[3], BLOCK_M=GATE_UP[0],
                    BLOCK_N=GATE_UP[1], BLOCK_K=GATE_UP[2], EVEN_K=COLUMNS % GATE_UP[2] == 0, STREAM=STREAM,
                    PDL=False,
                )  # fmt: skip

            stage += 1
            _linear_stage(
                barrier, stage, hidden, down_weight, end, middle, mlp_gate + place * COLUMNS, middle_sums, middle_norm,
                end_sums, final_norm, batch, tokens, tokens, eps, partials, counters, INNER, COLUMNS, STREAM, DOWN,
                PREFETCH,
            )  # fmt: skip
            keys += kv_keys_l
            values += kv_keys_l

        stage += 1
        _arrive(barrier)
        _wait(barrier, stage)
        turn = step % 2
        column_tiles: tl.constexpr = triton.cdiv(COLUMNS, HIDDEN)
        z_b, z_size = actions * ACTION_COLUMNS, action_rows * ACTION_COLUMNS
        for program in range(first, tl.cdiv(action_rows, ROWS) * column_tiles, count):
            _euler_step(
                program=program, x=end + context * COLUMNS, x_b=stream_b, x_t=COLUMNS, sums=end_sums + 2 * context,
                sums_s=sums_s, sums_b=sums_b, sums_t=2, eps=eps, out_weight1=out_weight1, out_weight1_a=COLUMNS,
                out_weight2=out_weight2, out_weight2_a=ACTION_COLUMNS, z=z + turn * z_size, z_b=z_b,
                z_t=ACTION_COLUMNS, z_next=z + (1 - turn) * z_size, z_next_b=z_b, z_next_t=ACTION_COLUMNS,
                prefix_length=prefix_length, action_mask=action_mask, action_mask_b=z_b,
                action_mask_t=ACTION_COLUMNS, dt=dt, in_weight=in_weight, in_weight_c=ACTION_COLUMNS,
                hidden=embedded, hidden_b=actions * COLUMNS, hidden_t=COLUMNS, rows=action_rows, tokens=actions,
                actions=ACTION_COLUMNS, columns=COLUMNS, slots=SLOTS, hidden_columns=COLUMNS,
                column_tiles=column_tiles, ROWS=ROWS, ACTIONS=ACTIONS, HIDDEN=HIDDEN, OUTPUT=OUTPUT,
                SLOTS=triton.next_power_of_2(SLOTS), PDL=False,
            )  # fmt: skip

        if step + 1 < steps:
            stage += 1
            _linear_stage(
                barrier, stage, embedded, tokens_weight, start + context * COLUMNS, None, None, None, None,
                start_sums + 2 * context, None, batch, actions, tokens, eps, partials, counters, COLUMNS, COLUMNS,
                STREAM, TOKENS, PREFETCH,
            )  # fmt: skip
    _leave(barrier, stage)


def flow_loop(
    weights: FlowWeights,
    inputs: FlowInputs,
    buffers: FlowBuffers,
    *,
    eps: float,
    context: int,
    window: int | None,
    tactics: Mapping[str, Tactic],
    workspace: Workspace,
) -> None:
    """All steps of the flow: what lambda_attention, qkv, linear, swiglu and euler_step give in the model's sequence.

    buffers: contiguous; start, cos, sin and z[0] hold the first step's input; z[S % 2] then holds the chunk. eps: of
    all norms. context: sink and state tokens. window: as lambda_attention. tactics: of STAGES, none of
    them the library's; the kernel gets the stages of the one with the most. Raises ValueError for shapes that
    do not fit.
    """
    steps, layers, columns = weights.attention.scale.shape
    batch, heads, tokens, dim = buffers.q.shape
    groups, cached = inputs.keys.shape[2:4]
    inner, actions = buffers.hidden.shape[-1], buffers.z.shape[-1]
    _check(weights, inputs, buffers, context)
    for name in STAGES:
        if tactics[name].library:
            raise ValueError(f"tactics[{name!r}]: expected one of our own kernels, got the library's")
        expect_tiles(tactics[name], "block_m", "block_n", "block_k")
    rows, share = batch * tokens, heads // groups
    # Rows, weight rows and depth of a stage's product; a gated layer's tile holds as many rows of gate as of up.
    products = {
        "qkv": (rows, 3 * heads * dim, columns, dim),
        "out": (rows, columns, columns, tactics["out"].block_n),
        "gate_up": (rows, 2 * inner, columns, 2 * tactics["gate_up"].block_n),
        "down": (rows, columns, inner, tactics["down"].block_n),
        "tokens": (batch * (tokens - context), columns, columns, tactics["tokens"].block_n),
    }
    tiles, attention = {}, tactics["attention"]
    row_tiles = triton.cdiv(tokens * share, attention.block_m)
    # Of each stage: tiles, programs, float32 partial results.
    work = [(batch * groups * row_tiles, attention.split_k, attention.block_m * (dim + 2))]
    for name, (product_rows, outputs, _, width) in products.items():
        tactic = tactics[name]
        tiles[name.upper()] = (tactic.block_m, width, tactic.block_k, tactic.split_k)
        count = triton.cdiv(product_rows, tactic.block_m) * triton.cdiv(outputs, width)
        work.append((count, tactic.split_k, tactic.block_m * width))
    counters = workspace.counters(1 + max(count for count, _, _ in work))
    programs = max(count * split for count, split, _ in work)
    launch(
        _flow_loop,
        (min(programs, processors(buffers.q.device)),),
        {
            "addresses": weights.addresses,
            "attention_scale": weights.attention.scale,
            "attention_bias": weights.attention.bias,
            "attention_gate": weights.attention.gate,
            "mlp_scale": weights.mlp.scale,
            "mlp_bias": weights.mlp.bias,
            "mlp_gate": weights.mlp.gate,
            **{name: getattr(weights, name) for name in ("middle_norms", "final_norms", "q_norms", "k_norms")},
            "in_weight": weights.in_weights[0],
            "tokens_weight": weights.in_weights[1],
            "out_weight1": weights.out_weights[0],
            "out_weight2": weights.out_weights[1],
            **strided("kv_keys", inputs.keys, "lbgn"),
            "kv_values": inputs.values,
            "begin": inputs.begin,
            "end_valid": inputs.end,
            "prefix_length": inputs.prefix_length,
            "action_mask": inputs.action_mask,
            **{name: getattr(buffers, name) for name in BUFFERS},
            "partials": workspace.partials(max(count * split * size for count, split, size in work)),
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
            "COLUMNS": columns,
            "INNER": inner,
            "HEADS": heads,
            "GROUPS": groups,
            "DIM": dim,
            "ACTION_COLUMNS": actions,
            **tiles,
            "ATTENTION": (attention.block_m, attention.block_n, attention.split_k),
            **flow_tiles(batch * (tokens - context), actions),
            "OUTPUT": OUTPUT_BLOCK,
            "OWN": OWN_BLOCK,
            "STREAM": triton.cdiv(rows, min(tactics[name].block_m for name in products)) <= STREAM_ROW_TILES,
            "PREFETCH": not INTERPRETED,
        },
        WARPS,
        max(tactic.stages for tactic in tactics.values()),
        cooperative=True,
    )


def _check(weights: FlowWeights, inputs: FlowInputs, b: FlowBuffers, context: int) -> None:
    steps, layers, columns = weights.attention.scale.shape
    batch, heads, tokens, dim = b.q.shape
    groups, cached = inputs.keys.shape[2:4]
    inner, actions = b.hidden.shape[-1], b.z.shape[-1]
    expect_head_dim(dim)
    if heads % groups or heads * dim != columns:
        raise ValueError(f"q: expected {columns} columns, heads a multiple of {groups}; got {heads} heads of {dim}")
    chunk = (batch, tokens - context, actions)
    stream, sums = (batch, tokens, columns), (triton.cdiv(columns, STATS_COLUMNS), batch, tokens, 2)
    shapes = {
        "weights.addresses": (weights.addresses, (layers, 4)),
        **{
            f"weights.{half}.{name}": (getattr(getattr(weights, half), name), (steps, layers, width))
            for half, outputs in (("attention", 3 * columns), ("mlp", 2 * inner))
            for name, width in (("scale", columns), ("bias", outputs), ("gate", columns))
        },
        **{f"weights.{name}": (getattr(weights, name), (layers, columns)) for name in ("middle_norms", "final_norms")},
        **{f"weights.{name}": (getattr(weights, name), (layers, dim)) for name in ("q_norms", "k_norms")},
        "weights.in_weights[0]": (weights.in_weights[0], (columns, actions)),
        "weights.in_weights[1]": (weights.in_weights[1], (columns, columns)),
        "weights.out_weights[0]": (weights.out_weights[0], (actions, columns)),
        "weights.out_weights[1]": (weights.out_weights[1], (actions, actions)),
        **{name: (getattr(b, name), stream) for name in ("start", "middle", "end", "mixed")},
        **{f"{name}_sums": (getattr(b, f"{name}_sums"), sums) for name in ("start", "middle", "end")},
        **{name: (getattr(b, name), (batch, heads, tokens, dim)) for name in ("q", "k", "v")},
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
