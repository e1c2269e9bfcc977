"""The flow of XR-1's golden cases by our kernels, from the KV blocks that they hold; whole steps, XR-0's too, are
compiled and emulated in tests/ptx/test_golden.py."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.kernels.support import DEVICE
from tests.support import GOLDEN
from xr0_engine.comparison import FLOAT32_MAX_ERROR
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import FusedOps
from xr0_engine.fused.session import FlowSession
from xr0_engine.golden.cases import chunk_inputs, golden_config
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.layers import pack_linears
from xr0_engine.model.weights import head_shapes
from xr0_engine.types import KVBlock

pytest.importorskip("triton")

XR1 = GOLDEN.parent / "golden_xr1"


@pytest.mark.skipif(not XR1.is_dir(), reason=f"the golden cases are not at {XR1}")
@pytest.mark.parametrize(("model", "case"), [("xr1_post", "prefix4_two_views"), ("xr1_video", "padded_batch2")])
def test_kernels_compute_the_flow(model, case):
    config = golden_config(json.loads((XR1 / f"{model}.json").read_text(encoding="utf-8")))
    weights = load_file(XR1 / f"{model}.weights.safetensors")
    held = load_file(XR1 / f"{model}.{case}.safetensors")
    head = ActionHead(config)
    head.load_state_dict({name: weights[name] for name in head_shapes(head)})
    pack_linears(head.requires_grad_(False).to(DEVICE))
    layers, mask = range(config.head.num_layers), held["attention_mask"].bool()
    kv = KVBlock(
        keys=torch.stack([held[f"kv.{layer}.key"] for layer in layers]),
        values=torch.stack([held[f"kv.{layer}.value"] for layer in layers]),
        mask=mask,
        next_position=held["vlm_position_ids"].masked_fill(~mask, -1).amax(-1) + 1,
        action_mask=held["action_mask"],
    )
    batch, tokens = mask.shape
    session = FlowSession(FusedHead(head), FusedOps("triton", DEVICE), batch, tokens, held["noise"].shape[1])
    trace: list[torch.Tensor] = []
    actions = session.sample(kv, held["state"], *chunk_inputs(held, held["prefix"]), trace)
    torch.testing.assert_close(torch.stack(trace).cpu(), held["flow_trace"], rtol=0, atol=FLOAT32_MAX_ERROR)
    torch.testing.assert_close(actions.cpu(), held["actions"], rtol=0, atol=FLOAT32_MAX_ERROR)
