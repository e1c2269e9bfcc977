"""The stages of an inference as ONNX graphs of static shapes: vision, prefill, flow, and the whole step.

Shape legend: B batch, N tokens of the bucket (left padded), I image tokens, P patches, C hidden, H heads, G KV heads,
D head_dim, Q DiT tokens, T actions, A action columns, L DiT layers. Activations are (rows, C); only attention is not.
All that depends on the checkpoint and the shapes alone is a constant: adaLN modulations of every step, the position
tables of the images, masks, Euler's dt. The modules are those of `xr0_engine.model`, restated without loops over data.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.export.graph import Graph
from xr0_engine.exported.manifest import StaticShapes
from xr0_engine.model.dit import DIT_RMS_EPS, dit_geometry
from xr0_engine.model.layers import inverse_frequencies, mrope_axes
from xr0_engine.model.vision import LAYER_NORM_EPS

MODULATIONS = ("shift_a", "scale_a", "gate_a", "shift_m", "scale_m", "gate_m")


@dataclass(frozen=True)
class Plan:
    """What the graphs are made from, beside the weights that they name.

    modulations: (L, steps, 6, 1, C), ActionHead.modulation_table. positions: (P, C); cos, sin: (P, 1, D) float32, the
    vision tower's tables of all images.
    """

    config: ModelConfig
    shapes: StaticShapes
    modulations: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def image_tokens(self) -> int:
        return len(self.positions) // self.config.vision.spatial_merge_size**2


def add_vision(g: Graph, plan: Plan) -> None:
    """pixel_values (P, patch_dim) -> vision_tokens (I, C), deepstack.i (I, C)."""
    tokens, taps = _vision(g, plan, _pixel_values(g, plan))
    size = (plan.image_tokens, plan.config.vision.out_hidden_size)
    g.output("vision_tokens", tokens, g.dtype, *size)
    for index, tap in enumerate(taps):
        g.output(f"deepstack.{index}", tap, g.dtype, *size)


def add_prefill(g: Graph, plan: Plan, tokens: int) -> None:
    """input_ids, attention_mask, position_ids, vision_tokens, deepstack.i -> keys, values, next_position."""
    size = (plan.image_tokens, plan.config.vision.out_hidden_size)
    prompt = _prompt(g, plan, tokens)
    vision = g.input("vision_tokens", g.dtype, *size)
    taps = [g.input(f"deepstack.{i}", g.dtype, *size) for i in range(len(plan.config.vision.deepstack_layers))]
    keys, values, next_position = _prefill(g, plan, prompt, vision, taps)
    cache = _cache_shape(plan, tokens)
    g.output("keys", g.concat(*(g.unsqueeze(key, 0) for key in keys), axis=0), g.dtype, *cache)
    g.output("values", g.concat(*(g.unsqueeze(value, 0) for value in values), axis=0), g.dtype, *cache)
    g.output("next_position", next_position, torch.int64, 3, plan.shapes.batch)


def add_flow(g: Graph, plan: Plan, tokens: int) -> None:
    """keys, values, attention_mask, next_position, state, noise, prefix, prefix_length, action_mask -> actions."""
    batch, cache = plan.shapes.batch, _cache_shape(plan, tokens)
    layers = [1] * cache[0]
    caches = []
    for name in ("keys", "values"):
        parts = g.split(g.input(name, g.dtype, *cache), *layers, axis=0)
        caches.append([g.reshape(part, *cache[1:]) for part in parts])
    mask = g.input("attention_mask", torch.bool, batch, tokens)
    next_position = g.input("next_position", torch.int64, 3, batch)
    _actions(g, plan, caches[0], caches[1], mask, next_position, tokens)


def add_step(g: Graph, plan: Plan, tokens: int) -> None:
    """pixel_values, input_ids, attention_mask, position_ids, state, noise, prefix, ... -> actions: all in one."""
    vision, taps = _vision(g, plan, _pixel_values(g, plan))
    prompt = _prompt(g, plan, tokens)
    keys, values, next_position = _prefill(g, plan, prompt, vision, taps)
    _actions(g, plan, keys, values, prompt.mask, next_position, tokens)


@dataclass(frozen=True)
class _Prompt:
    """ids, mask: (B, N); positions: (3, B, N)."""

    ids: str
    mask: str
    positions: str
    tokens: int


def _cache_shape(plan: Plan, tokens: int) -> tuple[int, int, int, int, int]:
    head = plan.config.head
    return head.num_layers, plan.shapes.batch, head.num_kv_heads, tokens, head.head_dim


def _pixel_values(g: Graph, plan: Plan) -> str:
    return g.input("pixel_values", torch.float32, len(plan.positions), plan.config.vision.patch_dim)


def _prompt(g: Graph, plan: Plan, tokens: int) -> _Prompt:
    batch = plan.shapes.batch
    return _Prompt(
        ids=g.input("input_ids", torch.int64, batch, tokens),
        mask=g.input("attention_mask", torch.bool, batch, tokens),
        positions=g.input("position_ids", torch.int64, 3, batch, tokens),
        tokens=tokens,
    )


def _rotate(g: Graph, x: str, cos: str, sin: str) -> str:
    """Rotary embedding in float32. x: (..., D) in the graph's dtype; sin: its first half negated."""
    x = g.cast(x, torch.float32)
    first, second = g.ops("Split", 2, x, axis=-1, num_outputs=2)
    turned = g.op("Mul", g.concat(second, first, axis=-1), sin)
    return g.cast(g.op("Add", g.op("Mul", x, cos), turned), g.dtype)


def _mrope(g: Graph, positions: str, frequencies: Tensor, section: tuple[int, int, int]) -> tuple[str, str]:
    """positions: (3, B, N) -> cos and sin as _rotate takes them, (B, 1, N, D) float32."""
    axes = g.constant(mrope_axes(len(frequencies), section))
    chosen = g.cast(g.transpose(g.take(positions, axes), 1, 2, 0), torch.float32)
    angles = g.op("Mul", chosen, g.constant(frequencies))
    cos, sin = g.op("Cos", angles), g.op("Sin", angles)
    wide = g.concat(cos, cos, axis=-1), g.concat(g.op("Neg", sin), sin, axis=-1)
    return g.unsqueeze(wide[0], 1), g.unsqueeze(wide[1], 1)


def _gated_mlp(g: Graph, x: str) -> str:
    with g.scope("mlp"):
        gate, up = g.linears(x, "gate_proj", "up_proj")
        return g.linear(g.op("Mul", g.silu(gate), up), "down_proj")


def _projector(g: Graph, x: str, module: str) -> str:
    with g.scope(module):
        return g.linear(g.op("Gelu", g.linear(x, "layers.0"), approximate="tanh"), "layers.2")


def _vision(g: Graph, plan: Plan, pixel_values: str) -> tuple[str, list[str]]:
    config = plan.config.vision
    with g.scope("vlm", "model", "visual"):
        with g.scope("patch_embed", "proj"):
            kernel = g.reshape(g.weight("weight"), config.hidden_size, config.patch_dim)
            x = g.op("Gemm", g.cast(pixel_values, g.dtype), kernel, g.weight("bias"), transB=1)
        x = g.op("Add", x, g.table("positions", plan.positions))
        first, second = plan.sin.chunk(2, dim=-1)
        tables = g.table("cos", plan.cos), g.table("sin", torch.cat((-first, second), dim=-1))
        taps = []
        for index in range(config.depth):
            with g.scope(f"blocks.{index}"):
                h = g.layer_norm(x, "norm1", LAYER_NORM_EPS)
                x = g.op("Add", x, _vision_attention(g, plan, h, *tables))
                h = g.layer_norm(x, "norm2", LAYER_NORM_EPS)
                h = g.op("Gelu", g.linear(h, "mlp.linear_fc1", bias=True), approximate="tanh")
                x = g.op("Add", x, g.linear(h, "mlp.linear_fc2", bias=True))
            if index in config.deepstack_layers:
                with g.scope(f"deepstack_merger_list.{config.deepstack_layers.index(index)}"):
                    taps.append(_merge(g, plan, x, norm_after_merge=True))
        with g.scope("merger"):
            return _merge(g, plan, x, norm_after_merge=False), taps


def _vision_attention(g: Graph, plan: Plan, x: str, cos: str, sin: str) -> str:
    """Every image attends to itself; neighbours of equal size run as one batch."""
    config = plan.config.vision
    patches, heads, size = len(plan.positions), config.num_heads, config.hidden_size
    runs = [(len(list(run)), height * width) for (height, width), run in groupby(plan.shapes.grids)]
    with g.scope("attn"):
        qkv = g.reshape(g.linear(x, "qkv", bias=True), patches, 3, heads, size // heads)
        q, k, v = (g.reshape(part, patches, heads, size // heads) for part in g.split(qkv, 1, 1, 1, axis=1))
        rotated = (_rotate(g, q, cos, sin), _rotate(g, k, cos, sin), v)
        parts = [g.split(part, *(images * each for images, each in runs), axis=0) for part in rotated]
        outputs = []
        for (images, each), *run in zip(runs, *parts, strict=True):
            split = (g.transpose(g.reshape(part, images, each, heads, size // heads), 0, 2, 1, 3) for part in run)
            mixed = g.attention(*split)
            outputs.append(g.reshape(g.transpose(mixed, 0, 2, 1, 3), images * each, size))
        return g.linear(g.concat(*outputs, axis=0), "proj", bias=True)


def _merge(g: Graph, plan: Plan, x: str, norm_after_merge: bool) -> str:
    config = plan.config.vision
    merged = config.hidden_size * config.spatial_merge_size**2
    if norm_after_merge:
        x = g.layer_norm(g.reshape(x, plan.image_tokens, merged), "norm", LAYER_NORM_EPS)
    else:
        x = g.reshape(g.layer_norm(x, "norm", LAYER_NORM_EPS), plan.image_tokens, merged)
    return g.linear(g.op("Gelu", g.linear(x, "linear_fc1", bias=True)), "linear_fc2", bias=True)


def _prefill(g: Graph, plan: Plan, prompt: _Prompt, vision: str, taps: list[str]) -> tuple[list[str], list[str], str]:
    """Keys and values of the layers that the DiT reads, (B, G, N, D) each, and next_position (3, B)."""
    text, batch, tokens = plan.config.text, plan.shapes.batch, prompt.tokens
    rows = batch * tokens
    with g.scope("vlm", "model", "language_model"):
        ids = g.reshape(prompt.ids, rows)
        is_image = g.op("Equal", ids, g.constant(torch.tensor(plan.config.tokens.image)))
        # The n-th image token of the batch takes the n-th row of the vision tower's output.
        count = g.op("CumSum", g.cast(is_image, torch.int64), g.constant(torch.tensor(0)))
        index = g.op("Max", g.op("Sub", count, g.constant(torch.tensor(1))), g.constant(torch.tensor(0)))
        is_image = g.reshape(is_image, rows, 1)
        x = g.op("Where", is_image, g.take(vision, index), g.take(g.weight("embed_tokens.weight"), ids))
        zero = g.constant(torch.zeros((), dtype=g.dtype))

        compat_bf16 = plan.config.head.compat_bf16_time
        frequencies = inverse_frequencies(text.head_dim, text.rope_theta, compat_bf16=compat_bf16)
        cos, sin = _mrope(g, prompt.positions, frequencies, text.mrope_section)
        # Padding sees itself: a row that may attend to nothing has no softmax.
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        seen = g.op("And", g.reshape(prompt.mask, batch, 1, 1, tokens), g.constant(causal[None, None]))
        allowed = g.op("Or", seen, g.constant(torch.eye(tokens, dtype=torch.bool)[None, None]))

        keys, values = [], []
        for layer in range(text.num_layers):
            with g.scope(f"layers.{layer}"):
                h = g.rms_norm(x, "input_layernorm", text.rms_eps)
                with g.scope("self_attn"):
                    is_last = layer == text.num_layers - 1
                    names = [f"{name}_proj" for name in ("kv" if is_last else "qkv")]
                    *q, k, v = (_heads(g, part, batch, tokens, text.head_dim) for part in g.linears(h, *names))
                    k = _rotate(g, g.rms_norm(k, "k_norm", text.rms_eps), cos, sin)
                    if layer >= plan.config.first_read_layer:
                        keys.append(k)
                        values.append(v)
                    if is_last:
                        break
                    query = _rotate(g, g.rms_norm(q[0], "q_norm", text.rms_eps), cos, sin)
                    mixed = g.transpose(g.attention(query, k, v, allowed), 0, 2, 1, 3)
                    mixed = g.reshape(mixed, rows, text.num_heads * text.head_dim)
                    x = g.op("Add", x, g.linear(mixed, "o_proj"))
                x = g.op("Add", x, _gated_mlp(g, g.rms_norm(x, "post_attention_layernorm", text.rms_eps)))
                if layer < len(taps):
                    x = g.op("Add", x, g.op("Where", is_image, g.take(taps[layer], index), zero))

        used = g.op("Where", g.unsqueeze(prompt.mask, 0), prompt.positions, g.constant(torch.tensor(-1)))
        highest = g.op("ReduceMax", used, g.constant(torch.tensor([2])), keepdims=0)
        return keys, values, g.op("Add", highest, g.constant(torch.tensor(1)))


def _heads(g: Graph, x: str, batch: int, tokens: int, head_dim: int) -> str:
    """(B * N, heads * D) -> (B, heads, N, D)."""
    return g.transpose(g.reshape(x, batch, tokens, -1, head_dim), 0, 2, 1, 3)


def _actions(
    g: Graph, plan: Plan, keys: list[str], values: list[str], mask: str, next_position: str, tokens: int
) -> None:
    """The flow, with the inputs that only it has, and its output."""
    config, batch, length = plan.config.head, plan.shapes.batch, plan.shapes.chunk_length
    chunk, context = (batch, length, config.action_dim), config.context
    state = g.input("state", torch.float32, batch, config.state_length, config.state_dim)
    noise, prefix = g.input("noise", torch.float32, *chunk), g.input("prefix", torch.float32, *chunk)
    prefix_length = g.reshape(g.input("prefix_length", torch.int64, batch), batch, 1)
    action_mask = g.input("action_mask", torch.float32, *chunk)

    query = context + length
    token = torch.arange(query)
    rope, allowed = _dit_geometry(g, plan, mask, next_position, prefix_length, tokens)
    shared = config.num_heads // config.num_kv_heads
    keys, values = ([_repeat(g, plan, part, shared, tokens) for part in cache] for cache in (keys, values))

    rows = g.cast(g.reshape(state, batch * config.state_length, config.state_dim), g.dtype)
    states = g.reshape(_projector(g, rows, "state_projector"), batch, config.state_length, config.hidden_size)
    with g.scope("sink"):
        sink = g.expand(g.weight("weight"), batch, 1, config.hidden_size)
    start = g.concat(sink, states, axis=1)

    is_prefix = g.op("Less", g.constant(token[None, :length]), prefix_length)
    fixed = g.reshape(is_prefix, batch, length, 1)
    z = g.op("Where", fixed, prefix, noise)
    for step in range(config.flow_steps):
        g.step = step
        actions = g.cast(g.reshape(g.op("Mul", z, action_mask), batch * length, config.action_dim), g.dtype)
        embedded = _projector(g, actions, "action_projector")
        x = g.concat(start, g.reshape(embedded, batch, length, config.hidden_size), axis=1)
        x = _to_stream(g, plan, g.reshape(x, batch * query, config.hidden_size))
        for layer in range(config.num_layers):
            with g.scope(f"dit.layers.{layer}"):
                x = _dit_layer(g, plan, x, layer, step, rope, keys[layer], values[layer], allowed)
        x = g.reshape(x, batch, query, config.hidden_size)
        x = g.reshape(g.split(x, context, length, axis=1)[1], batch * length, config.hidden_size)
        velocity = _projector(g, _from_stream(g, plan, x), "action_output_layer")
        velocity = g.cast(g.reshape(velocity, *chunk), torch.float32)
        moved = g.op("Mul", velocity, g.constant(torch.tensor(1 / config.flow_steps)))
        z = g.op("Where", fixed, z, g.op("Add", z, moved))
    g.step = None
    g.output("actions", z, torch.float32, *chunk)


def _dit_geometry(
    g: Graph, plan: Plan, mask: str, next_position: str, prefix_length: str, tokens: int
) -> tuple[tuple[str, str], str]:
    """Rotary tables (B, 1, Q, D) and the mask (B, 1, Q, N + Q); prefix_length: (B, 1)."""
    config, text, batch = plan.config.head, plan.config.text, plan.shapes.batch
    context = config.context
    query = context + plan.shapes.chunk_length
    token = torch.arange(query)
    positions = g.op("Add", g.reshape(next_position, 3, batch, 1), g.constant(token))
    if config.position_offset:
        is_suffix = g.op("GreaterOrEqual", g.constant(token[None] - context), prefix_length)
        offset = g.constant(torch.tensor(config.position_offset))
        positions = g.op("Add", positions, g.op("Mul", g.cast(is_suffix, torch.int64), offset))
    frequencies = inverse_frequencies(config.head_dim, text.rope_theta, compat_bf16=config.compat_bf16_time)
    rope = _mrope(g, positions, frequencies, text.mrope_section)

    # Among the DiT's own tokens the mask is a constant.
    nothing = torch.ones(1, 0, dtype=torch.bool)
    own = dit_geometry(config, torch.zeros(3, 1), nothing, torch.zeros(1), plan.shapes.chunk_length).mask
    seen = g.expand(g.reshape(mask, batch, 1, 1, tokens), batch, 1, query, tokens)
    return rope, g.concat(seen, g.expand(g.constant(own), batch, 1, query, query), axis=-1)


def _repeat(g: Graph, plan: Plan, cache: str, times: int, tokens: int) -> str:
    """(B, G, N, D) -> (B, H, N, D): each KV head for the query heads that share it."""
    if times == 1:
        return cache
    config, batch = plan.config.head, plan.shapes.batch
    wide = g.expand(g.unsqueeze(cache, 2), batch, config.num_kv_heads, times, tokens, config.head_dim)
    return g.reshape(wide, batch, config.num_heads, tokens, config.head_dim)


def _stream_dtype(g: Graph, plan: Plan) -> torch.dtype:
    """Of the DiT's residual stream: without norms of its own it grows through the depth, so it stays in float32."""
    return g.dtype if plan.config.head.stream_norms else torch.float32


def _to_stream(g: Graph, plan: Plan, x: str) -> str:
    stream = _stream_dtype(g, plan)
    return x if stream == g.dtype else g.cast(x, stream)


def _from_stream(g: Graph, plan: Plan, x: str) -> str:
    return x if _stream_dtype(g, plan) == g.dtype else g.cast(x, g.dtype)


def _dit_layer(
    g: Graph, plan: Plan, x: str, layer: int, step: int, rope: tuple[str, str], keys: str, values: str, allowed: str
) -> str:
    """x: (B * Q, C), the stream; keys, values: (B, H, N, D). Returns (B * Q, C)."""
    config, batch = plan.config.head, plan.shapes.batch
    modulations = dict(zip(MODULATIONS, plan.modulations[layer, step, :, 0], strict=True))

    def norm(value: str, name: str) -> str:
        return g.rms_norm(value, f"{name}_layernorm", DIT_RMS_EPS, _stream_dtype(g, plan))

    def modulate(value: str, operator: str, name: str) -> str:
        return g.op(operator, value, g.table(f"{name}.step{step}", modulations[name]))

    h = _from_stream(g, plan, norm(x, "input"))
    h = modulate(modulate(h, "Mul", "scale_a"), "Add", "shift_a")
    with g.scope("attn"):
        qkv = g.reshape(g.linear(h, "qkv_proj", bias=True), batch, -1, 3, config.num_heads, config.head_dim)
        parts = g.split(g.transpose(qkv, 2, 0, 3, 1, 4), 1, 1, 1, axis=0)
        q, k, v = (g.reshape(part, batch, config.num_heads, -1, config.head_dim) for part in parts)
        q = _rotate(g, g.rms_norm(q, "q_norm", DIT_RMS_EPS), *rope)
        k = _rotate(g, g.rms_norm(k, "k_norm", DIT_RMS_EPS), *rope)
        mixed = g.attention(q, g.concat(keys, k, axis=2), g.concat(values, v, axis=2), allowed)
        h = g.linear(g.reshape(g.transpose(mixed, 0, 2, 1, 3), -1, config.hidden_size), "o_proj")
    x = g.op("Add", x, _to_stream(g, plan, modulate(h, "Mul", "gate_a")))
    x = norm(x, "middle") if config.stream_norms else x
    h = _from_stream(g, plan, norm(x, "post"))
    h = _gated_mlp(g, modulate(modulate(h, "Mul", "scale_m"), "Add", "shift_m"))
    x = g.op("Add", x, _to_stream(g, plan, modulate(h, "Mul", "gate_m")))
    return norm(x, "final") if config.stream_norms else x
