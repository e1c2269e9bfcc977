"""The action head as a sequence of fused ops on static buffers: KV block, state and noise to a chunk (spec section 2).

Nothing is allocated and nothing on the device is waited for, so that a CUDA graph can hold it. All that depends on time
is in tables made at load. The residual stream is kept before its norms, in float32: whoever reads it takes the norm's
scale from sums that its writer left, so that no kernel waits for whole rows.

Shape legend: B batch, T actions, A action columns, Q = context + T DiT tokens, N cached tokens, C hidden, H heads, G KV
heads, D head_dim, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xr0_engine.fused.ops import (
    Flow,
    FlowBuffers,
    FlowInputs,
    FlowWeights,
    FusedOps,
    HalfBlock,
    Heads,
    InputNorm,
    Residual,
    StatsOut,
    Weight,
    streamed_rows,
)
from xr0_engine.fused.products import Product, scratch_for
from xr0_engine.fused.vlm import new_sums
from xr0_engine.model.dit import DIT_RMS_EPS, ActionHead, DiTLayer, Projector
from xr0_engine.model.flow import Trace, flow_times
from xr0_engine.model.layers import inverse_frequencies, mrope_axes, parts_of

SLOT_COLUMNS = 16
"""Of a slot of the streams' sums: as many as the narrowest tiles that write them have."""


@dataclass(frozen=True)
class _Layer:
    """A layer and its products."""

    module: DiTLayer
    qkv: Product
    out: Product
    gate_up: Product
    down: Product

    @staticmethod
    def of(layer: DiTLayer) -> _Layer:
        attn, mlp, dtype = layer.attn, layer.mlp, layer.adaln_table.dtype
        return _Layer(layer, *(Product.of(part, dtype) for part in (attn.qkv_proj, attn.o_proj, mlp, mlp.down_proj)))

    @property
    def products(self) -> tuple[Product, ...]:
        return self.qkv, self.out, self.gate_up, self.down


class _Shifts(NamedTuple):
    """What adaLN adds to the columns of attention's input and of the MLP's, (S, L, C) float32: of rows in 8 bits it is
    rounded with them, of others it is in the product's bias."""

    attention: Tensor
    mlp: Tensor


class FusedHead:
    """Shares the head's matrices, which it leaves as they are.

    has_loop: whether the flow may run as one kernel, which multiplies in 16 bits alone.
    """

    def __init__(self, head: ActionHead) -> None:
        self.head, self.config = head, head.config
        weight = head.sink.weight
        self.context = self.config.context
        self.frequencies = inverse_frequencies(
            self.config.head_dim, head.rope_theta, weight.device, self.config.compat_bf16_time
        )
        self.axes = mrope_axes(len(self.frequencies), head.mrope_section, weight.device).int()
        self._layers = [_Layer.of(layer) for layer in parts_of(head.dit.layers, DiTLayer)]
        self._state_weights = _weights(head.state_projector)
        self._weights, self._shifts = _flow_weights(head, self._layers)
        self.has_loop = all(product.weight.scale is None for layer in self._layers for product in layer.products)

    def way(self, flow: Flow, ops: FusedOps, inputs: FlowInputs, b: FlowBuffers) -> Flow:
        """The flow that a table asks for, or chained where a streamed one is not for such sizes."""
        return "chained" if flow == "streamed" and ops.never_streams(inputs, b) else flow

    @property
    def steps(self) -> int:
        return self.config.flow_steps

    @property
    def _is_wide(self) -> bool:
        """Whether the output layer's first product is one of its own: the Euler step's kernel has it where it has as
        many columns as actions."""
        return self.config.output_hidden_size != self.config.action_dim

    def buffers(self, batch: int, chunk_length: int) -> FlowBuffers:
        config, sink = self.config, self.head.sink.weight
        tokens, width = self.context + chunk_length, config.hidden_size

        def empty(*shape: int, dtype: torch.dtype = sink.dtype) -> Tensor:
            return torch.zeros(shape, device=sink.device, dtype=dtype)

        def stream() -> tuple[Tensor, Tensor]:
            rows = empty(batch, tokens, width, dtype=torch.float32)
            return rows, new_sums((batch, tokens), width, sink.device, SLOT_COLUMNS)

        def table() -> Tensor:
            return empty(batch, tokens, config.head_dim // 2, dtype=torch.float32)

        (start, start_sums), (middle, middle_sums), (end, end_sums) = stream(), stream(), stream()
        # The sink never changes: neither do its row nor that row's sum.
        start[:, 0] = sink
        start_sums[0, :, 0, 0] = start[0, 0].square().sum()
        height = streamed_rows(batch * tokens)
        heads = (batch, config.num_heads, tokens, config.head_dim)
        z_shape = (batch, chunk_length, config.action_dim)
        return FlowBuffers(
            start=start,
            start_sums=start_sums,
            middle=middle,
            middle_sums=middle_sums,
            end=end,
            end_sums=end_sums,
            q=empty(*heads),
            k=empty(*heads),
            v=empty(*heads),
            raw=empty(batch, tokens, 3 * config.num_heads * config.head_dim, dtype=torch.float32),
            mixed=empty(batch, tokens, width),
            hidden=empty(batch, tokens, config.intermediate_size),
            embedded=empty(batch, chunk_length, width),
            state_hidden=empty(batch, config.state_length, width),
            cos=table(),
            sin=table(),
            z=empty(2, *z_shape, dtype=torch.float32),
            wide=empty(batch, chunk_length, config.output_hidden_size) if self._is_wide else None,
            fragments=None if height is None else empty(height, 4 * width + config.intermediate_size),
            scratch=scratch_for(
                ((product, batch * tokens) for layer in self._layers for product in layer.products),
                sink.dtype,
                sink.device,
            ),
        )

    def run(
        self,
        ops: FusedOps,
        inputs: FlowInputs,
        b: FlowBuffers,
        trace: Trace = None,
        *,
        flow: Flow = "chained",
    ) -> Tensor:
        """Returns the half of b.z that then holds the chunk, (B, T, A) float32, in the model's units.

        trace, if given, receives a copy of z before each step and after the last; only a chained flow leaves one.
        """
        self.begin(ops, inputs, b)
        return self.finish(ops, inputs, b, 0, trace, flow)

    def finish(
        self,
        ops: FusedOps,
        inputs: FlowInputs,
        b: FlowBuffers,
        first: int,
        trace: Trace = None,
        flow: Flow = "chained",
    ) -> Tensor:
        """The steps from `first` on. As run. Raises NotImplementedError for another flow than a chain without
        has_loop."""
        assert flow == "chained" or trace is None
        if flow != "chained" and not self.has_loop:
            raise NotImplementedError(f"flow {flow}: the loop multiplies in 16 bits alone; take chained")
        if flow == "streamed":
            ops.streamed_loop(
                self._weights, inputs, b, eps=DIT_RMS_EPS, context=self.context, window=self.config.local_window,
                steps=(first, self.steps),
            )  # fmt: skip
            return b.z[self.steps % 2]
        if flow != "chained":
            layers = self.config.num_layers
            end, width = self.steps * layers, 1 if flow == "layered" else self.steps * layers
            for place in range(first * layers, end, width):
                ops.flow_loop(
                    self._weights, inputs, b, eps=DIT_RMS_EPS, context=self.context, window=self.config.local_window,
                    places=(place, min(place + width, end)),
                )  # fmt: skip
            return b.z[self.steps % 2]
        for step in range(first, self.steps):
            if trace is not None:
                trace.append(b.z[step % 2].clone())
            for index in range(self.config.num_layers):
                self.layer(ops, inputs, b, step, index)
            self.end_step(ops, inputs, b, step)
        if trace is not None:
            trace.append(b.z[self.steps % 2].clone())
        return b.z[self.steps % 2]

    def begin(self, ops: FusedOps, inputs: FlowInputs, b: FlowBuffers) -> None:
        """Rotary tables, the state's token, and the first step's input."""
        (state_in, state_out), (action_in, action_out) = self._state_weights, self._weights.in_weights
        ops.dit_rope_tables(
            inputs.next_position, inputs.prefix_length, self.frequencies, self.axes, b.cos, b.sin,
            context=self.context, offset=self.config.position_offset,
        )  # fmt: skip
        ops.linear(inputs.state, Weight(state_in), b.state_hidden, activation="gelu_tanh")
        self._write_tokens(ops, b, b.state_hidden, state_out, slice(1, self.context))
        ops.start_flow(
            inputs.noise, inputs.prefix, inputs.prefix_length, inputs.action_mask, action_in, b.z[0], b.embedded
        )
        self._write_tokens(ops, b, b.embedded, action_out, slice(self.context, None))

    def layer(self, ops: FusedOps, inputs: FlowInputs, b: FlowBuffers, step: int, index: int) -> None:
        """The first layer of a step reads b.start, the others b.end; all write b.end."""
        assert b.scratch is not None, "buffers of another head"
        layer, weights, shifts = self._layers[index], self._weights, self._shifts
        attention, mlp = weights.attention.at(step, index), weights.mlp.at(step, index)
        middle_norm, final_norm = _at(weights.middle_norms, index), _at(weights.final_norms, index)
        if index == 0:
            norm, residual = InputNorm(b.start_sums, DIT_RMS_EPS), Residual(b.start, attention.gate)
        else:
            norm = _norm(b.end_sums, final_norm)
            residual = _residual(b.end, attention.gate, b.end_sums, _at(weights.final_norms, index - 1))
        qkv, out, gate_up, down = layer.products
        kv_block = (inputs.keys[index], inputs.values[index], inputs.begin, inputs.end)
        window = self.config.local_window
        heads = Heads(weights.q_norms[index], weights.k_norms[index], DIT_RMS_EPS, b.cos, b.sin)
        x, options = qkv.take(ops, residual.x, b.scratch, norm, attention.scale, shifts.attention[step, index])
        options["bias"] = attention.bias
        if ops.finishes_heads((*b.q.shape[:3], *inputs.keys.shape[2:]), inputs.keys.dtype):
            ops.linear(x, qkv.weight, b.raw, **options)
            q, k, v = b.raw.unflatten(-1, (3, *b.q.shape[1::2])).permute(2, 0, 3, 1, 4)
            ops.lambda_attention(q, k, v, *kv_block, b.mixed, window=window, context=self.context, heads=heads)
        else:
            ops.qkv(
                x, qkv.weight, b.q, b.k, b.v, q_weight=heads.q_weight, k_weight=heads.k_weight, eps=heads.eps,
                cos=heads.cos, sin=heads.sin, **options,
            )  # fmt: skip
            ops.lambda_attention(b.q, b.k, b.v, *kv_block, b.mixed, window=window, context=self.context)
        x, options = out.take(ops, b.mixed, b.scratch)
        ops.linear(x, out.weight, b.middle, residual=residual, stats=StatsOut(b.middle_sums, middle_norm), **options)
        norm = _norm(b.middle_sums, middle_norm)
        x, options = gate_up.take(ops, b.middle, b.scratch, norm, mlp.scale, shifts.mlp[step, index])
        ops.swiglu(x, gate_up.weight, b.hidden, bias=mlp.bias, **options)
        x, options = down.take(ops, b.hidden, b.scratch)
        ops.linear(
            x, down.weight, b.end, stats=StatsOut(b.end_sums, final_norm),
            residual=_residual(b.middle, mlp.gate, b.middle_sums, middle_norm), **options,
        )  # fmt: skip

    def end_step(self, ops: FusedOps, inputs: FlowInputs, b: FlowBuffers, step: int) -> None:
        """Velocity, Euler update and, but for the last step, the next step's input."""
        (first, second), more = self._weights.in_weights, step + 1 < self.steps
        x, sums = b.end[:, self.context :], b.end_sums[:, :, self.context :] if self.config.stream_norms else None
        weight1: Tensor
        weight2: Tensor | None
        weight1, weight2 = self._weights.out_weights
        if b.wide is not None:
            norm = None if sums is None else InputNorm(sums, DIT_RMS_EPS)
            ops.linear(x, Weight(weight1), b.wide, norm=norm, activation="gelu_tanh")
            x, sums, weight1, weight2 = b.wide, None, self._weights.out_weights[1], None
        ops.euler_step(
            x, sums, DIT_RMS_EPS, weight1, weight2,
            b.z[step % 2], b.z[(step + 1) % 2], inputs.prefix_length, inputs.action_mask, 1.0 / self.steps,
            first if more else None, b.embedded if more else None,
        )  # fmt: skip
        if more:
            self._write_tokens(ops, b, b.embedded, second, slice(self.context, None))

    def _write_tokens(self, ops: FusedOps, b: FlowBuffers, hidden: Tensor, weight: Tensor, tokens: slice) -> None:
        ops.linear(hidden, Weight(weight), b.start[:, tokens], stats=StatsOut(b.start_sums[:, :, tokens]))


def _at(norms: Tensor | None, index: int) -> Tensor | None:
    """The weight of a layer's stream norm, in heads that have them."""
    return None if norms is None else norms[index]


def _norm(sums: Tensor, weight: Tensor | None) -> InputNorm:
    """Of a stream that its own norm of this weight, or none, comes before."""
    return InputNorm(sums, DIT_RMS_EPS, "rms" if weight is None else "double_rms")


def _residual(x: Tensor, gate: Tensor, sums: Tensor, weight: Tensor | None) -> Residual:
    return Residual(x, gate) if weight is None else Residual(x, gate, sums, weight, DIT_RMS_EPS)


def _weights(projector: Projector) -> tuple[Tensor, Tensor]:
    first, second = (part for part in projector.layers.children() if isinstance(part, nn.Linear))
    return first.weight, second.weight


def _flow_weights(head: ActionHead, layers: list[_Layer]) -> tuple[FlowWeights, _Shifts]:
    attention, mlp, shifts = _half_blocks(head, layers)
    modules = [layer.module for layer in layers]
    first, second = _weights(head.action_output_layer)
    middle_norms, final_norms = None, None
    if head.config.stream_norms:
        middle_norms = torch.stack([layer.middle_layernorm.weight.float() for layer in modules])
        final_norms = torch.stack([layer.final_layernorm.weight.float() for layer in modules])
        first = (first.float() * final_norms[-1]).to(first.dtype)
    matrices = [[product.weight.data for product in layer.products] for layer in layers]
    assert all(matrix.is_contiguous() for layer in matrices for matrix in layer)
    addresses = [[matrix.data_ptr() for matrix in layer] for layer in matrices]
    weights = FlowWeights(
        addresses=torch.tensor(addresses, dtype=torch.int64, device=first.device),
        matrices=tuple(matrix for layer in matrices for matrix in layer),
        attention=attention,
        mlp=mlp,
        middle_norms=middle_norms,
        final_norms=final_norms,
        q_norms=torch.stack([layer.attn.q_norm.weight.float() for layer in modules]),
        k_norms=torch.stack([layer.attn.k_norm.weight.float() for layer in modules]),
        in_weights=_weights(head.action_projector),
        out_weights=(first, second),
    )
    return weights, shifts


def _half_blocks(head: ActionHead, layers: list[_Layer]) -> tuple[HalfBlock, HalfBlock, _Shifts]:
    """Attention and MLP."""
    # (L, steps, 6, C): shift, 1 + scale, gate of attention, then of the MLP.
    modulations = head.modulations(flow_times(head.config.flow_steps).to(head.sink.weight.device)).squeeze(3).float()
    outer = torch.ones_like(modulations[0, 0, 0])
    attention: list[tuple[Tensor, ...]] = []
    mlp: list[tuple[Tensor, ...]] = []
    for layer, parts in zip(layers, modulations.transpose(1, 2), strict=True):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        module = layer.module
        into_attention = outer * module.input_layernorm.weight.float()
        into_mlp = module.post_layernorm.weight.float()
        if module.stream_norms:
            into_mlp = module.middle_layernorm.weight.float() * into_mlp
            outer = module.final_layernorm.weight.float()
        attention.append((into_attention * scale_a, _bias(layer.qkv, shift_a), gate_a))
        mlp.append((into_mlp * scale_m, _bias(layer.gate_up, shift_m), gate_m))

    def stacked(half: list[tuple[Tensor, ...]]) -> HalfBlock:
        return HalfBlock(*(torch.stack(of_layers, dim=1) for of_layers in zip(*half, strict=True)))

    by_step = modulations.transpose(0, 1)
    return stacked(attention), stacked(mlp), _Shifts(by_step[:, :, 0], by_step[:, :, 3])


def _bias(product: Product, shift: Tensor) -> Tensor:
    """(S, N) float32 of a product whose input is shifted by (S, C): of rows in 8 bits, which are shifted themselves,
    its own."""
    outputs = product.weight.data.shape[0]
    own = shift.new_zeros(outputs) if product.bias is None else product.bias.float()
    return own.expand(len(shift), -1) if product.rows is not None else shift @ product.wide().T + own
