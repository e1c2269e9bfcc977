"""The fused ops that the GPU backend's stages are made of: which kernel runs, with which tactic. Alone imports kernels.

Every op writes into buffers that it is given. `triton` runs kernels, on a CUDA GPU or, on a CPU, under
TRITON_INTERPRET=1 in Triton's interpreter and under XR0_EMULATE as compiled for another chip; `reference` is their
oracle, which runs everywhere and shows what a stage is to compute.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from xr0_engine.fused.backends import LOOP, Flow, Shape, capability, compiler_faults, kernels_of, loop_shapes
from xr0_engine.fused.neighbours import Neighbours
from xr0_engine.kernels.arguments import (
    SHARED_LIMIT,
    STATS_COLUMNS,
    FlowBuffers,
    FlowInputs,
    FlowWeights,
    HalfBlock,
    Heads,
    InputNorm,
    Residual,
    RowScratch,
    Segments,
    StatsOut,
    Tactic,
    Weight,
    Workspace,
    streamed_rows,
)

__all__ = [
    "SHARED_LIMIT",
    "STATS_COLUMNS",
    "Flow",
    "FlowBuffers",
    "FlowInputs",
    "FlowWeights",
    "FusedOps",
    "HalfBlock",
    "Heads",
    "InputNorm",
    "Residual",
    "RowScratch",
    "Segments",
    "Shape",
    "StatsOut",
    "Tactic",
    "Weight",
    "has_dependent_launch",
    "streamed_rows",
    "tactic_key",
    "without_dependent_launch",
]


class FusedOps:
    """The fused ops of one backend, in the order of one stream.

    tactics: key -> tactic, as measured on this GPU; kept: keys whose default was not beaten. What has no entry runs
    with that of nearly as many rows (neighbours.py), else with its kernel's stated default. arch: compute
    capability that defaults are chosen for; None: the device's. programs: at most so many run a flow loop, and
    leave the rest of the chip free; None: as many as it has processors.
    """

    def __init__(
        self, backend: str, device: torch.device, tactics: Mapping[str, Tactic] | None = None, arch: int | None = None,
        programs: int | None = None, kept: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.backend, self.tactics, self.programs, self.kept = backend, dict(tactics or {}), programs, frozenset(kept)
        self._neighbours = Neighbours(self.tactics, self.kept)
        self.workspace = Workspace(device)
        self._kernels = kernels_of(backend)
        self.arch = arch if arch is not None else capability(device)

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        *,
        x_scale: Tensor | None = None,
        bias: Tensor | None = None,
        col_scale: Tensor | None = None,
        norm: InputNorm | None = None,
        activation: Literal["gelu", "gelu_tanh"] | None = None,
        residual: Residual | None = None,
        stats: StatsOut | None = None,
    ) -> None:
        """(B, M, K) -> (B, M, N), with what comes before and after it. As kernels/linear.py: linear."""
        options = {"x_scale": x_scale, "bias": bias, "col_scale": col_scale, "norm": norm, "activation": activation}
        self._run_product("linear", x, weight, (out,), options | {"residual": residual, "stats": stats})

    def swiglu(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        *,
        x_scale: Tensor | None = None,
        bias: Tensor | None = None,
        col_scale: Tensor | None = None,
        norm: InputNorm | None = None,
    ) -> None:
        """(B, M, K) -> (B, M, F), silu(gate) * up. As kernels/linear.py: swiglu."""
        options = {"x_scale": x_scale, "bias": bias, "col_scale": col_scale, "norm": norm}
        self._run_product("swiglu", x, weight, (out,), options)

    def qkv(
        self,
        x: Tensor,
        weight: Weight,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        *,
        x_scale: Tensor | None = None,
        bias: Tensor | None = None,
        col_scale: Tensor | None = None,
        norm: InputNorm | None = None,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """(B, M, K) -> heads, normalised and rotated. As kernels/qkv.py: qkv."""
        options = {"x_scale": x_scale, "bias": bias, "col_scale": col_scale, "norm": norm, "eps": eps}
        options |= {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
        self._run_product("qkv", x, weight, (q, k, v), options, k.shape[-1])

    def _run_product(
        self, kind: str, x: Tensor, weight: Weight, outs: tuple[Tensor | None, ...], options: dict[str, Any], *dim: int
    ) -> None:
        self.run(
            kind, (x.shape[0] * x.shape[1], *weight.data.shape, *dim), weight.data.dtype, (x, weight, *outs), options
        )

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, causal: bool, segments: Segments | None = None
    ) -> None:
        """As kernels/attention.py: attention. The key of segments is that of a batch of the longest."""
        (batch, heads, rows, dim), (_, groups, keys, _) = q.shape, k.shape
        if segments is not None:
            batch, rows = len(segments.spans), segments.lengths[0]
            keys = rows
        shape = (batch, heads, rows, groups, keys, dim)
        self.run("attention", shape, q.dtype, (q, k, v, out), {"causal": causal, "segments": segments})

    def lambda_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_keys: Tensor,
        kv_values: Tensor,
        begin: Tensor,
        end: Tensor,
        out: Tensor,
        *,
        window: int | None,
        context: int,
        heads: Heads | None = None,
    ) -> None:
        """As kernels/lambda_attention.py: lambda_attention. Its key has the dtype of the KV block."""
        arguments = (q, k, v, kv_keys, kv_values, begin, end, out)
        shape, options = (*q.shape[:3], *kv_keys.shape[1:]), {"window": window, "context": context, "heads": heads}
        self.run("lambda_attention", shape, kv_keys.dtype, arguments, options)

    def finishes_heads(self, shape: Shape, dtype: torch.dtype) -> bool:
        """Whether lambda_attention of this shape takes queries and keys before norms and RoPE: with "whole" it does."""
        return self.tactic("lambda_attention", shape, dtype).schedule == "whole"

    def start_flow(
        self,
        noise: Tensor,
        prefix: Tensor,
        prefix_length: Tensor,
        action_mask: Tensor,
        in_weight: Tensor,
        z: Tensor,
        hidden: Tensor,
    ) -> None:
        """As kernels/flow.py: start_flow."""
        self._kernels.start_flow(noise, prefix, prefix_length, action_mask, in_weight, z, hidden)

    def euler_step(
        self,
        x: Tensor,
        sums: Tensor | None,
        eps: float,
        out_weight1: Tensor,
        out_weight2: Tensor | None,
        z: Tensor,
        z_next: Tensor,
        prefix_length: Tensor,
        action_mask: Tensor,
        dt: float,
        in_weight: Tensor | None,
        hidden: Tensor | None,
    ) -> None:
        """As kernels/flow.py: euler_step."""
        self._kernels.euler_step(
            x, sums, eps, out_weight1, out_weight2, z, z_next, prefix_length, action_mask, dt, in_weight, hidden
        )

    def flow_loop(
        self,
        weights: FlowWeights,
        inputs: FlowInputs,
        buffers: FlowBuffers,
        *,
        eps: float,
        context: int,
        window: int | None,
        places: tuple[int, int],
    ) -> None:
        """A run of the flow's layers and steps. As kernels/persistent.py: flow_loop.

        Its stages have tactics of their own: tiles that won as kernels of their own need not win here. Raises
        NotImplementedError for the reference, which has no such kernel.
        """
        options = {"eps": eps, "context": context, "window": window, "places": places}
        self._loop(weights, inputs, buffers, options, {})

    def _loop(
        self,
        weights: FlowWeights,
        inputs: FlowInputs,
        buffers: FlowBuffers,
        options: Mapping[str, Any],
        given: Mapping[str, Tactic],
    ) -> None:
        """given: stage -> tactic, in the place of the table's."""
        if self.backend == "reference":
            raise NotImplementedError("a flow as one kernel: the reference runs op by op; the triton backend has it")
        shapes, dtype = loop_shapes(inputs, buffers), buffers.q.dtype
        tactics = {
            stage: given.get(stage) or self.tactic(LOOP + stage, shape, dtype) for stage, shape in shapes.items()
        }
        options = {**options, "programs": self.programs, "tactics": tactics, "workspace": self.workspace}
        self._kernels.flow_loop(weights, inputs, buffers, **options)

    def streamed_loop(
        self,
        weights: FlowWeights,
        inputs: FlowInputs,
        buffers: FlowBuffers,
        *,
        eps: float,
        context: int,
        window: int | None,
        steps: tuple[int, int],
    ) -> None:
        """A run of the flow's steps. As kernels/streamed.py: streamed_loop."""
        if self.backend == "reference":
            raise NotImplementedError(f"flow streamed: {self.never_streams(inputs, buffers)}")
        self._kernels.streamed_loop(
            weights, inputs, buffers, eps=eps, context=context, window=window, steps=steps, arch=self.arch,
            programs=self.programs, workspace=self.workspace,
        )  # fmt: skip

    def never_streams(self, inputs: FlowInputs, buffers: FlowBuffers) -> str:
        """Why a streamed loop is not for these; empty: it is."""
        if self.backend == "reference":
            return "the reference runs op by op; the triton backend has such a kernel"
        return self._kernels.never_streams(inputs, buffers)

    def dit_rope_tables(
        self,
        next_position: Tensor,
        prefix_length: Tensor,
        frequencies: Tensor,
        axes: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        context: int,
        offset: int,
    ) -> None:
        """As kernels/flow.py: dit_rope_tables."""
        arguments = (next_position, prefix_length, frequencies, axes, cos, sin)
        self._kernels.dit_rope_tables(*arguments, context=context, offset=offset)

    def rope_tables(self, positions: Tensor, frequencies: Tensor, axes: Tensor, cos: Tensor, sin: Tensor) -> None:
        """As kernels/embed.py: rope_tables."""
        self._kernels.rope_tables(positions, frequencies, axes, cos, sin)

    def embed(
        self, ids: Tensor, table: Tensor, image_index: Tensor, image_tokens: Tensor, out: Tensor, stats: StatsOut
    ) -> None:
        """As kernels/embed.py: embed."""
        self._kernels.embed(ids, table, image_index, image_tokens, out, stats)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
        """As kernels/embed.py: layer_norm."""
        self._kernels.layer_norm(x, weight, bias, eps, out)

    def quantize(
        self,
        x: Tensor,
        out: Tensor,
        scale: Tensor,
        *,
        norm: InputNorm | None = None,
        col_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """As kernels/quantize.py: quantize."""
        self._kernels.quantize(x, out, scale, norm=norm, col_scale=col_scale, bias=bias)

    def call(self, kind: str, arguments: tuple[Any, ...], options: Mapping[str, Any], tactic: Tactic) -> None:
        """Run the op `kind` with a tactic of the caller's: how tuning tries candidates. Of a loop's stage: the loop."""
        if kind.startswith(LOOP):
            weights, inputs, buffers = arguments
            self._loop(weights, inputs, buffers, options, {kind.removeprefix(LOOP): tactic})
            return
        getattr(self._kernels, kind)(*arguments, **options, tactic=tactic, workspace=self.workspace)

    def refusal(self, kind: str, arguments: tuple[Any, ...], options: Mapping[str, Any], tactic: Tactic) -> str | None:
        """Run as `call` does; why the kernel, the compiler or the chip cannot have this tactic, None if it ran."""
        refusals: tuple[type[Exception], ...] = (ValueError, NotImplementedError, *compiler_faults(self.backend))
        try:
            self.call(kind, arguments, options, tactic)
        except refusals as error:
            return str(error).strip().partition("\n")[0] or type(error).__name__
        return None

    def default(self, kind: str, shape: tuple[int, ...], options: Mapping[str, Any] | None = None) -> Tactic:
        """What runs where the table has no entry: a stated rule, never a guess at run time."""
        return self._kernels.default_tactic(kind, shape, self.arch, 1 if has_8bit_rows(options) else 2)

    def tactic(self, kind: str, shape: Shape, dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> Tactic:
        """That of the table, else the default."""
        if found := self.entry(tactic_key(kind, shape, dtype, options)):
            return found
        default = self.default(kind, shape, options)
        # In float32 keys and values are more than one program of the schedule "whole" holds.
        return replace(default, schedule="tiled") if (kind, dtype) == ("lambda_attention", torch.float32) else default

    def entry(self, key: str) -> Tactic | None:
        """Of the table, for a key or its neighbour; None: the default."""
        return self.tactics.get(key) or self._neighbours.of(key)

    def run(
        self, kind: str, shape: Shape, dtype: torch.dtype, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        """Where every op that has tactics comes through."""
        self.call_tuned(kind, shape, dtype, arguments, options)

    def call_tuned(
        self, kind: str, shape: Shape, dtype: torch.dtype, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Tactic:
        """By the table's tactic, or the default where the table's schedule has not what is asked for, as gates and
        norms of many observations' flows, or a neighbour's tile cannot be, as of more rows. Returns what ran."""
        tactic = self.tactic(kind, shape, dtype, options)
        try:
            self.call(kind, arguments, options, tactic)
        except (NotImplementedError, ValueError) as error:
            own = tactic_key(kind, shape, dtype, options) in self.tactics
            default = self.default(kind, shape, options)
            if tactic == default or (own and isinstance(error, ValueError)):
                raise
            self.call(kind, arguments, options, default)
            return default
        return tactic


def tactic_key(kind: str, shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any] | None = None) -> str:
    """`linear 315x2560x4096 bfloat16`: rows, outputs, inputs (qkv: head_dim too); attention: B, H, M, G, N, D. `int8
    rows`: not only the weight, but its input too has 8 bits. options: of the call."""
    rows = " rows" if has_8bit_rows(options) else ""
    return f"{kind} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}{rows}"


def has_8bit_rows(options: Mapping[str, Any] | None) -> bool:
    """Of a call with these options."""
    return options is not None and options.get("x_scale") is not None


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start there before the one ahead of it has ended."""
    from xr0_engine.kernels.launch import DEPENDENT_LAUNCH_FROM

    return capability(device) >= DEPENDENT_LAUNCH_FROM


def without_dependent_launch() -> AbstractContextManager[None]:
    """Within, kernels start one after the other. Graphs keep how they were captured."""
    from xr0_engine.kernels import launch

    return launch.without_dependent_launch()
