"""The flow as one kernel against the flow op by op, in Triton's interpreter (one program) or compiled (many)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.support import DEVICE
from tests.support import make_config
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import FlowInputs, FusedOps, Tactic
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.layers import pack_linears

pytest.importorskip("triton")

MAX_ERROR = 1e-4
"""float32 through two steps of two layers, with sums in another order, and norms that amplify."""
SPLIT = Tactic(block_m=16, block_n=64, block_k=32, split_k=2)


def make_head(dtype: torch.dtype = torch.float32) -> FusedHead:
    """At the smallest sizes that have every part: 2 heads, which share one of the cache."""
    sizes = {"num_layers": 2, "hidden_size": 64, "head_dim": 32, "num_kv_heads": 1, "flow_steps": 2}
    text = {"head_dim": sizes["head_dim"], "num_kv_heads": sizes["num_kv_heads"]}
    config = make_config(text=text, head=sizes)
    torch.manual_seed(0)
    head = ActionHead(config)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    head.to(DEVICE, dtype)
    pack_linears(head)
    return FusedHead(head.requires_grad_(False))


def make_inputs(head: FusedHead, batch: int) -> FlowInputs:
    """6 actions; of 21 cached tokens the last row sees some, and the rest is NaN."""
    config, tokens, dtype = head.config, 21, head.head.sink.weight.dtype
    chunk = (batch, 6, config.action_dim)
    begin, end = torch.zeros(batch, dtype=torch.int32), torch.full((batch,), tokens, dtype=torch.int32)
    begin[-1], end[-1] = 2, 18
    place = torch.arange(tokens)
    outside = ((place < begin[:, None]) | (place >= end[:, None]))[:, None, :, None]
    keys, values = torch.randn(2, config.num_layers, batch, config.num_kv_heads, tokens, config.head_dim).masked_fill(
        outside, torch.nan
    )
    mask = torch.ones(chunk)
    mask[..., -2:] = 0
    inputs = FlowInputs(
        keys=keys.to(dtype),
        values=values.to(dtype),
        begin=begin,
        end=end,
        next_position=torch.tensor([[9], [7], [7]], dtype=torch.int32).repeat(1, batch),
        state=torch.randn(batch, config.state_length, config.state_dim).to(dtype),
        noise=torch.randn(chunk),
        prefix=torch.randn(chunk),
        prefix_length=torch.zeros(batch, dtype=torch.int32),
        action_mask=mask,
    )
    return FlowInputs(**{name: value.to(DEVICE) for name, value in vars(inputs).items()})


def test_one_kernel_computes_the_flow_with_split_sums():
    """A window, a prefix and two rows are those of the whole step in test_fused.py."""
    head, batch = make_head(), 1
    inputs = make_inputs(head, batch)
    expected = head.run(FusedOps("reference", DEVICE), inputs, head.buffers(batch, 6))
    ops, buffers = FusedOps("triton", DEVICE), head.buffers(batch, 6)
    ops.default = lambda kind, shape: SPLIT
    # What a stage leaves unwritten shows.
    for name in ("middle", "middle_sums", "end", "end_sums", "q", "k", "v", "mixed", "hidden", "embedded", "z"):
        getattr(buffers, name).fill_(torch.nan)
    chunk = head.run(ops, inputs, buffers, persistent=True)
    torch.testing.assert_close(chunk, expected, rtol=0, atol=MAX_ERROR)
    assert not ops.workspace.counters(4).any(), "the next kernel counts from zero"


@pytest.mark.compiled
def test_replays_are_bit_identical():
    head = make_head()
    ops, inputs, buffers = FusedOps("triton", DEVICE), make_inputs(head, 2), head.buffers(2, 6)
    chunks = [head.run(ops, inputs, buffers, persistent=True).clone() for _ in range(20)]
    assert all(torch.equal(chunk, chunks[0]) for chunk in chunks)


def test_the_reference_has_no_such_kernel():
    head = make_head()
    with pytest.raises(NotImplementedError, match="runs op by op"):
        head.run(FusedOps("reference", DEVICE), make_inputs(head, 1), head.buffers(1, 6), persistent=True)


def test_a_cache_of_other_strides_is_refused():
    head = make_head()
    inputs = make_inputs(head, 1)
    wider = torch.cat((inputs.values, inputs.values), dim=-1)
    inputs = replace(inputs, values=wider[..., : head.config.head_dim])
    with pytest.raises(ValueError, match="values: expected the strides of keys"):
        head.run(FusedOps("triton", DEVICE), inputs, head.buffers(1, 6), persistent=True)
