"""How much scratch memory a session's kernels take: measured on paper, before a CUDA graph keeps its addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from xr0_engine.fused.ops import FlowBuffers, FlowInputs, FlowWeights, FusedOps, Tactic
from xr0_engine.fused.paper import recording

META = torch.device("meta")


class PaperTwin(FusedOps):
    """Calls what `ops` would run on twins of its tensors that have no memory: its own workspace grows as theirs must.

    Ops that take no workspace are left out.
    """

    def __init__(self, ops: FusedOps) -> None:
        super().__init__(ops.backend, META, ops.tactics, ops.arch, ops.programs, ops.kept)

    def call(self, kind: str, arguments: tuple[Any, ...], options: Mapping[str, Any], tactic: Tactic) -> None:
        # flash-attn has scratch memory of its own, and nothing to run on the meta device.
        if not tactic.flash:
            super().call(kind, _twin(arguments), _twin(options), tactic)

    def flow_loop(self, weights: FlowWeights, inputs: FlowInputs, buffers: FlowBuffers, **options: Any) -> None:
        super().flow_loop(_twin(weights), _twin(inputs), _twin(buffers), **options)

    def streamed_loop(self, weights: FlowWeights, inputs: FlowInputs, buffers: FlowBuffers, **options: Any) -> None:
        super().streamed_loop(_twin(weights), _twin(inputs), _twin(buffers), **options)

    def _nothing(self, *arguments: Any, **options: Any) -> None: ...

    start_flow = euler_step = dit_rope_tables = rope_tables = embed = layer_norm = quantize = _nothing


def reserve(ops: FusedOps, *works: Callable[[FusedOps], None]) -> None:
    """Give ops scratch memory for every one of works, each called with the ops to run on, for good."""
    # The oracles have none.
    if ops.backend == "reference":
        return
    twin = PaperTwin(ops)
    with recording():
        for work in works:
            work(twin)
    ops.workspace.reserve(*twin.workspace.size)


def _twin(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, Mapping):
        return {name: _twin(each) for name, each in value.items()}
    if isinstance(value, tuple):
        twins = map(_twin, value)
        return type(value)(*twins) if hasattr(value, "_fields") else tuple(twins)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(cast(Any, value), **{each.name: _twin(getattr(value, each.name)) for each in fields(value)})
    return value
