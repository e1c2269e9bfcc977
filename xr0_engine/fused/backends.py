"""The kernels of a backend, what its ops run with where nothing was measured, and how a flow's steps may run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal, TypeAlias

import torch

from xr0_engine.backend import interpreted
from xr0_engine.env import emulated_arch
from xr0_engine.kernels.arguments import FlowBuffers, FlowInputs, Tactic

Shape: TypeAlias = tuple[int, ...]
"""As tactic_key has it."""

Flow = Literal["chained", "layered", "persistent", "streamed"]
"""The steps of the flow as a chain of kernels, as one kernel for each layer of each step, as one kernel, or as one
whose weights stream ahead of its barriers."""

LOOP = "flow_loop."
"""How the kinds of a flow loop's stages begin: their tactics are apart from those of the ops themselves."""
LOOP_STAGES = {
    "qkv": "qkv",
    "attention": "lambda_attention",
    "out": "linear",
    "gate_up": "swiglu",
    "down": "linear",
    "tokens": "linear",
    "wide": "linear",
}
"""Stage of a flow loop -> the kind of op that it is. The last is of wide output layers alone."""


def loop_shapes(inputs: FlowInputs, buffers: FlowBuffers) -> dict[str, Shape]:
    """Of a flow loop's stages, as their keys have them."""
    batch, heads, tokens, dim = buffers.q.shape
    columns, inner = buffers.mixed.shape[-1], buffers.hidden.shape[-1]
    rows, action_rows = batch * tokens, batch * buffers.embedded.shape[1]
    wide = {} if buffers.wide is None else {"wide": (action_rows, buffers.wide.shape[-1], columns)}
    return {
        "qkv": (rows, 3 * heads * dim, columns, dim),
        "attention": (batch, heads, tokens, *inputs.keys.shape[2:]),
        "out": (rows, columns, columns),
        "gate_up": (rows, 2 * inner, columns),
        "down": (rows, columns, inner),
        "tokens": (action_rows, columns, columns),
        **wide,
    }


def compiler_faults(backend: str) -> tuple[type[Exception], ...]:
    if backend == "reference":
        return ()
    from xr0_engine.kernels.launch import COMPILER_FAULTS

    return COMPILER_FAULTS


def kernels_of(backend: str) -> SimpleNamespace:
    if backend == "reference":
        from xr0_engine.kernels import fused_reference

        return SimpleNamespace(**vars(fused_reference), default_tactic=lambda *_: Tactic())
    from xr0_engine.kernels.attention import attention
    from xr0_engine.kernels.embed import embed, layer_norm, rope_tables
    from xr0_engine.kernels.flow import dit_rope_tables, euler_step, start_flow
    from xr0_engine.kernels.lambda_attention import lambda_attention
    from xr0_engine.kernels.linear import linear, swiglu
    from xr0_engine.kernels.persistent import flow_loop
    from xr0_engine.kernels.qkv import qkv
    from xr0_engine.kernels.quantize import quantize
    from xr0_engine.kernels.streamed import never_streams, streamed_loop

    ops: list[Callable[..., None]] = [linear, swiglu, qkv, attention, lambda_attention, start_flow, euler_step]
    ops += [flow_loop, streamed_loop, dit_rope_tables, rope_tables, embed, layer_norm, quantize]
    return SimpleNamespace(
        **{op.__name__: op for op in ops}, default_tactic=_default_of_ours, never_streams=never_streams
    )


FEW_PROGRAMS = Tactic(block_m=64, block_n=128, block_k=128, split_k=2)
"""For the interpreter, which runs one program after the other."""


def _default_of_ours(kind: str, shape: Shape, arch: int, factor_bytes: int) -> Tactic:
    if interpreted():
        return FEW_PROGRAMS
    from xr0_engine.kernels.attention import attention_tactic
    from xr0_engine.kernels.lambda_attention import lambda_tactic, split_lambda_tactic
    from xr0_engine.kernels.linear import default_tactic
    from xr0_engine.kernels.loop import WIDE, loop_tactic, wide_tactic
    from xr0_engine.kernels.whole import whole_tactic

    stage, is_wide = kind.startswith(LOOP), kind == LOOP + WIDE
    kind = LOOP_STAGES[kind.removeprefix(LOOP)] if stage else kind
    if kind == "attention":
        return attention_tactic(shape, arch)
    if kind == "lambda_attention":
        return loop_tactic(kind, shape, split_lambda_tactic(shape, arch)) if stage else lambda_tactic(shape, arch)
    rows, n, k = shape[:3]
    tiled = default_tactic(kind, rows, n, k, arch, factor_bytes)
    if factor_bytes == 1:
        return tiled
    if stage:
        return wide_tactic(tiled) if is_wide else loop_tactic(kind, shape, tiled)
    return whole_tactic(kind, rows, n, k, arch) or tiled


def capability(device: torch.device) -> int:
    """90 for an H200, and for the CPU that emulates one; 0 without a GPU."""
    if device.type != "cuda":
        return emulated_arch() or 0 if device.type == "cpu" else 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
