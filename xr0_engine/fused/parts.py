"""A loaded model's parts for the fused ops, and how they are to run: what sessions are made of."""

from __future__ import annotations

from dataclasses import replace

import torch

from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import FusedOps
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.fused.vlm import FusedText, FusedVision
from xr0_engine.model.xr0 import XR0Model


class FusedParts:
    """Shares a loaded model's weights; makes their layout the kernels' own, which the model itself understands too.

    backend: of FusedOps. table: the tactics to run with. graphs: capture and replay (a CUDA GPU), or run op by op.
    """

    def __init__(self, model: XR0Model, backend: str, table: TacticTable, graphs: bool) -> None:
        self.reference, self.config = model, model.config
        self.backend, self.graphs = backend, graphs
        towers = model.vlm.model
        with torch.inference_mode():
            self.vision, self.text = FusedVision(towers.visual), FusedText(towers.language_model)
            self.head = FusedHead(model.head)
        self.table = table if self.head.has_loop else replace(table, flow="chained")

    @property
    def has_loop(self) -> bool:
        """Whether the flow may run as one kernel: the reference has none, and a head in 8 bits is not its."""
        return self.backend == "triton" and self.head.has_loop

    @property
    def device(self) -> torch.device:
        return self.reference.device

    @property
    def dtype(self) -> torch.dtype:
        return self.reference.dtype

    def ops(self, table: TacticTable | None = None) -> FusedOps:
        """Fused ops for one stream, with scratch memory of their own. table: None is the model's."""
        table = table or self.table
        return FusedOps(self.backend, self.device, table.tactics, programs=table.programs, kept=table.kept)
