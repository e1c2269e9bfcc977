"""The DiT action head (spec section 2). These are the modules that the trainer trains; names are the checkpoint's.

Shape legend: B batch, T actions, A action columns, S state columns, Q = context + T DiT tokens, N VLM tokens,
C hidden, H heads, G KV heads, D head_dim, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xr0_engine.config import ActionHeadConfig, ModelConfig
from xr0_engine.kernels import reference
from xr0_engine.model.flow import Guidance, Trace, euler_sample, flow_times, prefix_positions
from xr0_engine.model.layers import GatedMLP, RMSNorm, inverse_frequencies, mrope_tables
from xr0_engine.types import KVBlock

DIT_RMS_EPS = 1e-6
TIME_FREQUENCIES = 128
TIME_SCALE = 1000.0
"""The network sees 1000 t."""


@dataclass(frozen=True)
class DiTGeometry:
    """Where the DiT's tokens [sink, state, actions] stand and what they may attend to.

    positions: (3, B, Q) int64, M-RoPE; mask: (B, 1, Q, N + Q) bool, True = may attend.
    """

    positions: Tensor
    mask: Tensor


def dit_geometry(
    config: ActionHeadConfig, next_position: Tensor, kv_mask: Tensor, prefix_length: Tensor, chunk_length: int
) -> DiTGeometry:
    """Positions and mask of both modes, which differ in config.local_window and config.position_offset alone (2.4).

    next_position: (3, B), first free VLM position per axis; kv_mask: (B, N) bool, False = padding; prefix_length: (B,).
    """
    device = next_position.device
    context = config.context
    total = context + chunk_length
    token = torch.arange(total, device=device)
    is_suffix = token >= context + prefix_length.to(device)[:, None]
    positions = next_position[..., None] + token + config.position_offset * is_suffix

    query, key = token[:, None], token
    own = key <= query
    if config.local_window is not None:
        own = own & ((key < context) | (query - key <= config.local_window))
    batch, cached = kv_mask.shape
    mask = torch.cat((kv_mask[:, None, :].expand(batch, total, cached), own.expand(batch, total, total)), dim=-1)
    return DiTGeometry(positions, mask[:, None])


class Projector(nn.Module):
    """Linear, GELU(tanh), Linear, without biases."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden, out_features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TimeEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, hidden, bias=False)
        )

    def forward(self, scaled_time: Tensor) -> Tensor:
        """scaled_time: (B,) float32, 1000 t. Returns (B, C). The sinusoid is float32 (spec section 2.3)."""
        index = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=scaled_time.device)
        angles = scaled_time[:, None] * torch.exp(-math.log(10_000.0) * index / TIME_FREQUENCIES)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(next(self.parameters()).dtype))


class TimeProjector(nn.Module):
    """One embedding -> the six modulations that all layers share."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).unflatten(-1, (6, -1))


class DiTAttention(nn.Module):
    def __init__(self, config: ActionHeadConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, DIT_RMS_EPS)
        self.k_norm = RMSNorm(config.head_dim, DIT_RMS_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """x: (B, Q, C); keys, values: (B, G, N, D) of the VLM layer that this layer reads. Returns (B, Q, C)."""
        mixed = reference.lambda_attention(*self.heads(x, cos, sin), keys, values, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values: (B, H, Q, D) each."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return reference.rotate(self.q_norm(q), cos, sin), reference.rotate(self.k_norm(k), cos, sin), v


class DiTLayer(nn.Module):
    """With stream_norms the residual stream itself is normalised twice, by middle_layernorm and final_layernorm (spec
    section 2.2); without them these norms do not exist."""

    input_layernorm: RMSNorm
    middle_layernorm: RMSNorm
    post_layernorm: RMSNorm
    final_layernorm: RMSNorm

    def __init__(self, config: ActionHeadConfig) -> None:
        super().__init__()
        size, self.stream_norms = config.hidden_size, config.stream_norms
        self.adaln_table = nn.Parameter(torch.empty(6, size))
        self.attn = DiTAttention(config)
        self.mlp = GatedMLP(size, config.intermediate_size)
        # In the checkpoint's order, in which random checkpoints draw.
        whose = ("input", "middle", "post", "final") if config.stream_norms else ("input", "post")
        for name in whose:
            self.add_module(f"{name}_layernorm", RMSNorm(size, DIT_RMS_EPS))

    def forward(
        self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        """modulation: (B, 6, 1, C), as ActionHead.modulations returns it for this layer."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)
        h = torch.addcmul(shift_a, self.input_layernorm(x), scale_a)
        h = self.attn(h, cos, sin, keys, values, mask)
        x = torch.addcmul(x, gate_a, h)
        x = self.middle_layernorm(x) if self.stream_norms else x
        h = self.mlp(torch.addcmul(shift_m, self.post_layernorm(x), scale_m))
        x = torch.addcmul(x, gate_m, h)
        return self.final_layernorm(x) if self.stream_norms else x


class DiT(nn.Module):
    def __init__(self, config: ActionHeadConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DiTLayer(config) for _ in range(config.num_layers)])


class ActionHead(nn.Module):
    """Velocity of an action chunk, conditioned on the VLM's KV cache, the state, the time and the prefix. step: of the
    flow, the one that `sample` computes: for who has constants of each step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head, text = config.head, config.text
        self.config, self.step = head, 0
        self.rope_theta, self.mrope_section = text.rope_theta, text.mrope_section
        self.dit = DiT(head)
        self.state_projector = Projector(head.state_dim, head.hidden_size, head.hidden_size)
        self.action_projector = Projector(head.action_dim, head.hidden_size, head.hidden_size)
        self.action_output_layer = Projector(head.hidden_size, head.output_hidden_size, head.action_dim)
        self.t_embedder = TimeEmbedder(head.hidden_size)
        self.t_projector = TimeProjector(head.hidden_size)
        self.sink = nn.Embedding(1, head.hidden_size)

    def modulations(self, t: Tensor) -> Tensor:
        """t: (B,) float32, 0 = noise. Returns (L, B, 6, 1, C): shift, 1 + scale, gate of attention, then of MLP."""
        scaled = TIME_SCALE * t
        if self.config.compat_bf16_time:
            scaled = scaled.bfloat16().float()
        shared = self.t_projector(self.t_embedder(scaled))
        tables = torch.stack([layer.get_parameter("adaln_table") for layer in self.dit.layers])
        one = torch.zeros(6, 1, dtype=shared.dtype, device=shared.device)
        one[[1, 4]] = 1
        return (tables[:, None] + shared + one).unsqueeze(3)

    def modulation_table(self) -> Tensor:
        """modulations at every time of the sampling schedule, (L, steps, 6, 1, C): all that depends on time."""
        return self.modulations(flow_times(self.config.flow_steps).to(self.sink.weight.device))

    def context(self, state: Tensor) -> Tensor:
        """state: (B, state_length, S). Returns the tokens [sink, state]: (B, context, C)."""
        sink = self.sink.weight.expand(len(state), 1, -1)
        return torch.cat((sink, self.state_projector(state)), dim=1)

    def rope(self, geometry: DiTGeometry) -> tuple[Tensor, Tensor]:
        """cos, sin: (B, 1, Q, D) float32."""
        config, device = self.config, geometry.positions.device
        frequencies = inverse_frequencies(config.head_dim, self.rope_theta, device, config.compat_bf16_time)
        return mrope_tables(geometry.positions, frequencies, self.mrope_section)

    def forward(
        self,
        actions: Tensor,
        context: Tensor,
        modulations: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """actions: (B, T, A), times the action mask; keys, values: (L, B, G, N, D). Returns velocity (B, T, A)."""
        x = torch.cat((context, self.action_projector(actions)), dim=1)
        for layer, modulation, layer_keys, layer_values in zip(self.dit.layers, modulations, keys, values, strict=True):
            x = layer(x, modulation, *rope, layer_keys, layer_values, mask)
        return self.action_output_layer(x[:, context.shape[1] :])

    def sample(
        self,
        kv: KVBlock,
        state: Tensor,
        noise: Tensor,
        prefix: Tensor,
        prefix_length: Tensor,
        table: Tensor,
        trace: Trace = None,
        mask: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """One chunk per row, (B, T, A) float32, in the model's units (spec section 2.5).

        state: (B, state_length, S); noise, prefix: (B, T, A), prefix read where the row's prefix_length (B,) covers it;
        table: from modulation_table; trace, if given, receives z before each step and after the last; mask: as
        DiTGeometry's, where not everything that the geometry shows may be seen; guidance: on the device, where autograd
        works.
        """
        device, dtype = self.sink.weight.device, self.sink.weight.dtype
        prefix_length = prefix_length.to(device)
        geometry = dit_geometry(self.config, kv.next_position, kv.mask, prefix_length, noise.shape[1])
        rope = self.rope(geometry)
        context = self.context(state.to(device, dtype))
        attends = geometry.mask if mask is None else mask

        def velocity(z: Tensor, step: int) -> Tensor:
            self.step = step
            return self(z.to(dtype), context, table[:, step : step + 1], rope, attends, kv.keys, kv.values)

        is_prefix = prefix_positions(prefix_length, noise.shape[1])
        start, given, steps = noise.to(device), prefix.to(device), self.config.flow_steps
        return euler_sample(velocity, start, given, is_prefix, kv.action_mask, steps, trace, guidance)
