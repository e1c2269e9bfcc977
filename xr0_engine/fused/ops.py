"""The fused ops that the GPU backend's stages are made of: which kernel runs, with which tactic. Alone imports kernels.

Every op writes into buffers that it is given. `triton` runs kernels, on a CUDA GPU or, on a CPU, under
TRITON_INTERPRET=1 in Triton's interpreter and under XR0_EMULATE as compiled for another chip; `reference` is their
oracle, which runs everywhere and shows what a stage is to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from xr0_engine.backend import interpreted
from xr0_engine.env import emulated_arch
from xr0_engine.kernels.arguments import (
    SHARED_LIMIT,
    STATS_COLUMNS,
    FlowBuffers,
    FlowInputs,
    FlowWeights,
    HalfBlock,
    InputNorm,
    Residual,
    StatsOut,
    Tactic,
    Weight,
    Workspace,
)

if TYPE_CHECKING:
    from xr0_engine.kernels.launch import Compiled as Compiled

__all__ = [
    "SHARED_LIMIT",
    "STATS_COLUMNS",
    "FlowBuffers",
    "FlowInputs",
    "FlowWeights",
    "FusedOps",
    "HalfBlock",
    "InputNorm",
    "Residual",
    "Shape",
    "StatsOut",
    "Tactic",
    "Weight",
    "compile_beside",
    "compile_kernels",
    "has_dependent_launch",
    "on_paper",
    "tactic_key",
    "without_dependent_launch",
]

Shape: TypeAlias = tuple[int, ...]
"""As tactic_key has it."""


class FusedOps:
    """The fused ops of one backend, in the order of one stream.

    tactics: key -> tactic, as measured on this GPU; an op without an entry runs with the stated default of its kernel.
    arch: compute capability (90 for an H200) that defaults are chosen for; None is the device's own.
    """

    def __init__(
        self, backend: str, device: torch.device, tactics: Mapping[str, Tactic] | None = None, arch: int | None = None
    ) -> None:
        self.backend, self.tactics = backend, dict(tactics or {})
        self.workspace = Workspace(device)
        self._kernels = _kernels(backend)
        self.arch = arch if arch is not None else _capability(device)

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        col_scale: Tensor | None = None,
        norm: InputNorm | None = None,
        activation: Literal["gelu", "gelu_tanh"] | None = None,
        residual: Residual | None = None,
        stats: StatsOut | None = None,
    ) -> None:
        """(B, M, K) -> (B, M, N), with what comes before and after it. As kernels/linear.py: linear."""
        options = {"bias": bias, "col_scale": col_scale, "norm": norm, "activation": activation, "residual": residual}
        self._run_product("linear", x, weight, (out,), options | {"stats": stats})

    def swiglu(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        col_scale: Tensor | None = None,
        norm: InputNorm | None = None,
    ) -> None:
        """(B, M, K) -> (B, M, F), silu(gate) * up. As kernels/linear.py: swiglu."""
        self._run_product("swiglu", x, weight, (out,), {"bias": bias, "col_scale": col_scale, "norm": norm})

    def qkv(
        self,
        x: Tensor,
        weight: Weight,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        *,
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
        options = {"bias": bias, "col_scale": col_scale, "norm": norm, "q_weight": q_weight, "k_weight": k_weight}
        self._run_product("qkv", x, weight, (q, k, v), options | {"eps": eps, "cos": cos, "sin": sin}, k.shape[-1])

    def _run_product(
        self, kind: str, x: Tensor, weight: Weight, outs: tuple[Tensor | None, ...], options: dict[str, Any], *dim: int
    ) -> None:
        shape = (x.shape[0] * x.shape[1], *weight.data.shape, *dim)
        self.run(kind, shape, weight.data.dtype, (x, weight, *outs), options)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, causal: bool) -> None:
        """As kernels/attention.py: attention."""
        shape = (*q.shape[:3], *k.shape[1:])
        self.run("attention", shape, q.dtype, (q, k, v, out), {"causal": causal})

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
    ) -> None:
        """As kernels/lambda_attention.py: lambda_attention."""
        arguments = (q, k, v, kv_keys, kv_values, begin, end, out)
        shape = (*q.shape[:3], *kv_keys.shape[1:])
        self.run("lambda_attention", shape, q.dtype, arguments, {"window": window, "context": context})

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
        sums: Tensor,
        eps: float,
        out_weight1: Tensor,
        out_weight2: Tensor,
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
    ) -> None:
        """All steps of the flow. As kernels/persistent.py: flow_loop.

        Its stages have the default tiles: those of the table won as kernels of their own. Raises NotImplementedError
        for the reference, which has no such kernel.
        """
        if self.backend == "reference":
            raise NotImplementedError("flow 'persistent': the reference runs op by op; the triton backend has it")
        batch, heads, tokens, dim = buffers.q.shape
        columns, inner = buffers.mixed.shape[-1], buffers.hidden.shape[-1]
        rows, action_rows = batch * tokens, batch * buffers.embedded.shape[1]
        shapes = {
            "qkv": ("qkv", (rows, 3 * heads * dim, columns, dim)),
            "attention": ("lambda_attention", (batch, heads, tokens, *inputs.keys.shape[2:])),
            "out": ("linear", (rows, columns, columns)),
            "gate_up": ("swiglu", (rows, 2 * inner, columns)),
            "down": ("linear", (rows, columns, inner)),
            "tokens": ("linear", (action_rows, columns, columns)),
        }
        tactics = {name: self.default(kind, shape) for name, (kind, shape) in shapes.items()}
        options = {"eps": eps, "context": context, "window": window}
        self._kernels.flow_loop(weights, inputs, buffers, **options, tactics=tactics, workspace=self.workspace)

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

    def call(self, kind: str, arguments: tuple[Any, ...], options: Mapping[str, Any], tactic: Tactic) -> None:
        """Run the op `kind` with a tactic of the caller's: how tuning tries candidates."""
        getattr(self._kernels, kind)(*arguments, **options, tactic=tactic, workspace=self.workspace)

    def refusal(self, kind: str, arguments: tuple[Any, ...], options: Mapping[str, Any], tactic: Tactic) -> str | None:
        """Run as `call` does; why the kernel, the compiler or the chip cannot have this tactic, None if it ran."""
        refusals: tuple[type[Exception], ...] = (ValueError, NotImplementedError, *_compiler_faults(self.backend))
        try:
            self.call(kind, arguments, options, tactic)
        except refusals as error:
            return str(error).strip().partition("\n")[0] or type(error).__name__
        except RuntimeError as error:
            # The compiler's passes have no exception of their own.
            if "PassManager::run failed" not in str(error):
                raise
            return "the compiler failed"
        return None

    def default(self, kind: str, shape: tuple[int, ...]) -> Tactic:
        """What runs where the table has no entry: a stated rule, never a guess at run time."""
        return self._kernels.default_tactic(kind, shape, self.arch)

    def run(
        self, kind: str, shape: Shape, dtype: torch.dtype, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        """Where every op that has tactics comes through: with that of the table for its key, else the default."""
        tactic = self.tactics.get(tactic_key(kind, shape, dtype)) or self.default(kind, shape)
        self.call(kind, arguments, options, tactic)


def tactic_key(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """`linear 315x2560x4096 bfloat16`: rows, outputs, inputs (qkv: head_dim too); attention: B, H, M, G, N, D."""
    return f"{kind} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


def compile_kernels(work: Callable[[], None], arch: int, done: Callable[[int, int], None]) -> list[Compiled]:
    """Compile every kernel variant that work launches, for a chip that need not be here.

    work: runs stages on tensors of the meta device. arch: compute capability. done: called with the number compiled
    and of all. Raises RuntimeError in Triton's interpreter, which hides the kernels from the compiler.
    """
    from xr0_engine.kernels.launch import compile_for, recording, variants

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    with recording() as launches:
        work()
    calls = variants(launches)
    compiled = []
    for number, call in enumerate(calls, 1):
        compiled.append(compile_for(call, arch))
        done(number, len(calls))
    return compiled


def compile_beside(work: Callable[[], None], threads: int) -> None:
    """Compile the kernels that work launches, several at a time, and run none; they are found compiled afterwards.

    work: calls with tactics that are no library's, on a CUDA GPU. What cannot be compiled is left out: its call will
    say why.
    """
    from xr0_engine.kernels.launch import compiling

    with compiling(threads):
        work()


def on_paper() -> AbstractContextManager[object]:
    """Within, kernels whose tensors are on the meta device ask for their scratch memory and run nothing."""
    from xr0_engine.kernels.launch import recording

    return recording()


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start there before the one ahead of it has ended."""
    from xr0_engine.kernels.launch import DEPENDENT_LAUNCH_FROM

    return _capability(device) >= DEPENDENT_LAUNCH_FROM


def without_dependent_launch() -> AbstractContextManager[None]:
    """Within, kernels start one after the other. Graphs keep how they were captured."""
    from xr0_engine.kernels import launch

    return launch.without_dependent_launch()


def _compiler_faults(backend: str) -> tuple[type[Exception], ...]:
    if backend == "reference":
        return ()
    from xr0_engine.kernels.launch import COMPILER_FAULTS

    return COMPILER_FAULTS


def _kernels(backend: str) -> SimpleNamespace:
    if backend == "reference":
        from xr0_engine.kernels import fused_reference

        return SimpleNamespace(**vars(fused_reference), default_tactic=lambda kind, shape, arch: Tactic())
    from xr0_engine.kernels.attention import attention
    from xr0_engine.kernels.embed import embed, layer_norm, rope_tables
    from xr0_engine.kernels.flow import dit_rope_tables, euler_step, start_flow
    from xr0_engine.kernels.lambda_attention import lambda_attention
    from xr0_engine.kernels.linear import linear, swiglu
    from xr0_engine.kernels.persistent import flow_loop
    from xr0_engine.kernels.qkv import qkv

    ops: list[Callable[..., None]] = [linear, swiglu, qkv, attention, lambda_attention, start_flow, euler_step]
    ops += [flow_loop, dit_rope_tables, rope_tables, embed, layer_norm]
    return SimpleNamespace(**{op.__name__: op for op in ops}, default_tactic=_default_tactic)


FEW_PROGRAMS = Tactic(block_m=64, block_n=128, block_k=128, split_k=2)
"""For the interpreter, which runs one program after the other."""


def _default_tactic(kind: str, shape: tuple[int, ...], arch: int) -> Tactic:
    if interpreted():
        return FEW_PROGRAMS
    from xr0_engine.kernels.attention import attention_tactic
    from xr0_engine.kernels.lambda_attention import lambda_tactic
    from xr0_engine.kernels.linear import default_tactic

    if kind == "attention":
        return attention_tactic(shape, arch)
    if kind == "lambda_attention":
        return lambda_tactic(shape, arch)
    return default_tactic(kind, shape[0], shape[1], shape[2], arch)


def _capability(device: torch.device) -> int:
    """90 for an H200, and for the CPU that emulates one; 0 without a GPU."""
    if device.type != "cuda":
        return emulated_arch() or 0 if device.type == "cpu" else 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
