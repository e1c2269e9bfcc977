"""The flow as one kernel against the flow op by op, in Triton's interpreter (one program) or compiled (many)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.support import DEVICE
from tests.support import make_config
from xr0_engine.fused.backends import LOOP, LOOP_STAGES
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import FlowInputs, FusedOps, Tactic, tactic_key
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.layers import pack_linears
from xr0_engine.types import KVBlock

pytest.importorskip("triton")

MAX_ERROR = 1e-4
"""float32 through two steps of two layers, with sums in another order, and norms that amplify."""
SPLIT = Tactic(block_m=16, block_n=64, block_k=32, split_k=2)
WHOLE = Tactic(block_m=16, block_n=16, block_k=128, schedule="whole")


XR1 = {"stream_norms": False, "output_width": 48, "action_dim": 20}
"""A head of the other family: no stream norms, and an output layer whose first product is one of its own."""


def make_head(dtype: torch.dtype = torch.float32, columns: int = 64, **variant: Any) -> FusedHead:
    """At the smallest sizes that have every part: 2 heads, which share one of the cache."""
    sizes = {"num_layers": 2, "hidden_size": columns, "head_dim": 32, "num_kv_heads": 1, "flow_steps": 2, **variant}
    text = {"head_dim": sizes["head_dim"], "num_kv_heads": sizes["num_kv_heads"]}
    if sizes["head_dim"] == 64:
        text["mrope_section"] = (12, 10, 10)
    config = make_config(text=text, head=sizes)
    torch.manual_seed(0)
    head = ActionHead(config)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    head.to(DEVICE, dtype)
    pack_linears(head)
    return FusedHead(head.requires_grad_(False))


def make_inputs(head: FusedHead, batch: int, tokens: int = 21) -> FlowInputs:
    """6 actions; of the cached tokens the last row sees all but five, and the rest is NaN."""
    config, dtype = head.config, head.head.sink.weight.dtype
    chunk = (batch, 6, config.action_dim)
    begin, end = torch.zeros(batch, dtype=torch.int32), torch.full((batch,), tokens, dtype=torch.int32)
    begin[-1], end[-1] = 2, tokens - 3
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


ONE_CHIP = pytest.mark.one_chip


@pytest.mark.parametrize(
    ("flow", "tactic", "attention", "programs", "variant"),
    [
        pytest.param("layered", SPLIT, SPLIT, None, {}, id="layered"),
        pytest.param("persistent", SPLIT, SPLIT, 5, {}, id="persistent, 5 programs"),
        pytest.param("persistent", WHOLE, WHOLE, None, {}, id="persistent, K whole", marks=ONE_CHIP),
        pytest.param("persistent", SPLIT, WHOLE, None, {}, id="persistent, keys whole", marks=ONE_CHIP),
        pytest.param("layered", SPLIT, SPLIT, None, XR1, id="xr1, layered"),
        pytest.param("persistent", SPLIT, SPLIT, 5, XR1, id="xr1, persistent, 5 programs"),
        pytest.param("persistent", WHOLE, WHOLE, None, XR1, id="xr1, persistent, K whole", marks=ONE_CHIP),
        pytest.param("persistent", SPLIT, SPLIT, None, {"output_width": 48}, id="wide output", marks=ONE_CHIP),
        pytest.param("persistent", SPLIT, SPLIT, None, {"stream_norms": False}, id="no norms", marks=ONE_CHIP),
    ],
)
def test_loops_compute_the_flow(flow, tactic, attention, programs, variant):
    """A window, a prefix and two rows are those of the whole step in test_fused.py."""
    head, batch = make_head(columns=128 if tactic == WHOLE else 64, **variant), 1
    inputs = make_inputs(head, batch)
    expected = head.run(FusedOps("reference", DEVICE), inputs, head.buffers(batch, 6))
    ops, buffers = FusedOps("triton", DEVICE, programs=programs), head.buffers(batch, 6)
    loop = dict.fromkeys((LOOP + stage for stage in LOOP_STAGES), tactic) | {LOOP + "attention": attention}
    ops.default = lambda kind, shape, *_: loop.get(kind, SPLIT)
    # What a stage leaves unwritten shows.
    for name in ("middle", "middle_sums", "end", "end_sums", "q", "k", "v", "raw", "mixed", "hidden", "embedded", "z"):
        getattr(buffers, name).fill_(torch.nan)
    assert (buffers.wide is not None) == ("output_width" in variant)
    if buffers.wide is not None:
        buffers.wide.fill_(torch.nan)
    chunk = head.run(ops, inputs, buffers, flow=flow)
    torch.testing.assert_close(chunk, expected, rtol=0, atol=MAX_ERROR)
    assert not ops.workspace.counters(4).any(), "the next kernel counts from zero"


STREAMED = {"columns": 256, "head_dim": 64, "num_kv_heads": 2}
"""The smallest head that a streamed loop is for."""
AS_CHAINED = 1.5
"""How many times a chained flow's error a streamed one's may be: both round to bfloat16 at the same places, but for the
norm of the output layer, and add up in other orders. Mean squares of a hundred numbers scatter by a tenth."""


def rms(error: torch.Tensor) -> float:
    return float(error.square().mean().sqrt())


WIDE_AS_THE_STREAMS = {"output_width": 256, "action_dim": 20}


def streamed_head(**variant: Any) -> FusedHead:
    return make_head(torch.bfloat16, **{**STREAMED, **variant})


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("batch", "variant", "cached"),
    [
        pytest.param(1, {}, 21, id="one row"),
        pytest.param(1, {}, 250, id="keys and values that are held"),
        pytest.param(1, {"num_layers": 1}, 470, id="keys and values that come later"),
        pytest.param(2, {"flow_steps": 3, "num_layers": 3}, 21, id="two rows, 3 steps, 3 layers", marks=ONE_CHIP),
        pytest.param(1, {"num_kv_heads": 4, "mlp_width": 256}, 21, id="heads of their own, K whole", marks=ONE_CHIP),
        pytest.param(1, {"mlp_width": 768}, 21, id="three parts of K", marks=ONE_CHIP),
        pytest.param(2, {"stream_norms": False}, 21, id="no norms", marks=ONE_CHIP),
        pytest.param(1, {**WIDE_AS_THE_STREAMS, "stream_norms": False}, 21, id="xr1"),
        pytest.param(1, WIDE_AS_THE_STREAMS, 21, id="wide output", marks=ONE_CHIP),
    ],
)
@pytest.mark.parametrize("programs", [None, 4])
def test_a_streamed_loop_computes_the_flow(batch, variant, cached, programs):
    head = streamed_head(**variant)
    inputs = make_inputs(head, batch, cached)
    inputs = replace(inputs, prefix_length=torch.arange(batch, dtype=torch.int32, device=DEVICE) + 2)
    expected = head.run(FusedOps("reference", DEVICE), inputs, head.buffers(batch, 6))
    ops, buffers = FusedOps("triton", DEVICE, programs=programs), head.buffers(batch, 6)
    for name in ("middle", "middle_sums", "end", "end_sums", "q", "raw", "mixed", "hidden", "embedded", "z"):
        getattr(buffers, name).fill_(torch.nan)
    buffers.fragments.fill_(torch.nan)
    chunk = head.run(ops, inputs, buffers, flow="streamed").clone()
    chained = head.run(FusedOps("triton", DEVICE), inputs, head.buffers(batch, 6))
    assert rms(chunk - expected) < AS_CHAINED * rms(chained - expected)
    assert rms(chained - expected) < rms(expected) / 50
    assert not ops.workspace.counters(4).any(), "the next kernel counts from zero"
    assert torch.equal(head.run(ops, inputs, buffers, flow="streamed"), chunk), "a replay"


@pytest.mark.compiled
def test_a_streamed_loop_takes_over_from_a_chain():
    """From step 1 on, as behind a first step beside the prefill."""
    head, ops = streamed_head(flow_steps=3), FusedOps("triton", DEVICE)
    inputs, buffers = make_inputs(head, 1), head.buffers(1, 6)
    whole = head.run(ops, inputs, head.buffers(1, 6), flow="streamed").clone()
    chained = head.run(ops, inputs, head.buffers(1, 6))
    head.begin(ops, inputs, buffers)
    for index in range(head.config.num_layers):
        head.layer(ops, inputs, buffers, 0, index)
    head.end_step(ops, inputs, buffers, 0)
    rest = head.finish(ops, inputs, buffers, 1, flow="streamed")
    assert 0 < rms(rest - whole) < AS_CHAINED * rms(chained - whole)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("head", "batch", "complaint"),
    [
        pytest.param({"dtype": torch.float32}, 1, "expected bfloat16, got float32", id="dtype"),
        pytest.param({"columns": 128}, 1, "expected 256 to 1024 columns, and a multiple inside; got 128", id="columns"),
        pytest.param({"head_dim": 32}, 1, "expected heads of 64 or 128 columns, got 32", id="heads"),
        pytest.param({"output_width": 64}, 1, "expected an output layer .* of 256 columns, got 64", id="output"),
        pytest.param({}, 5, "expected at most 32 tokens in all, got 40", id="tokens"),
    ],
)
def test_what_a_streamed_loop_is_not_for_is_refused_and_tables_run_chained(head, batch, complaint):
    made = make_head(**{"dtype": torch.bfloat16, **STREAMED, **head})
    ops, inputs, buffers = FusedOps("triton", DEVICE), make_inputs(made, batch), made.buffers(batch, 6)
    with pytest.raises(NotImplementedError, match=f"flow streamed: {complaint}.*; take chained"):
        made.run(ops, inputs, buffers, flow="streamed")
    assert made.way("streamed", ops, inputs, buffers) == "chained"
    assert made.way("persistent", ops, inputs, buffers) == "persistent"
    fitting, few = streamed_head(), FusedOps("triton", DEVICE, programs=3)
    with pytest.raises(NotImplementedError, match="expected at least 4 programs, got 3; take chained"):
        fitting.finish(few, make_inputs(fitting, 1), fitting.buffers(1, 6), 0, flow="streamed")
    fits = fitting.way("streamed", ops, make_inputs(fitting, 1), fitting.buffers(1, 6))
    assert fits == "streamed"


def test_attention_may_finish_the_heads():
    """Where its tactic is "whole", queries and keys come to it as a plain linear layer leaves them."""
    head = make_head()
    inputs, ops, buffers = make_inputs(head, 2), FusedOps("triton", DEVICE), head.buffers(2, 6)
    expected = head.run(FusedOps("reference", DEVICE), inputs, head.buffers(2, 6))
    whole = Tactic(block_m=16, block_n=16, block_k=64, schedule="whole")
    ops.default = lambda kind, shape, *_: whole if shape[-1] == 64 else SPLIT
    ops.tactics[tactic_key("lambda_attention", (*buffers.q.shape[:3], *inputs.keys.shape[2:]), torch.float32)] = whole
    for name in ("middle", "middle_sums", "end", "end_sums", "raw", "mixed", "hidden", "embedded"):
        getattr(buffers, name).fill_(torch.nan)
    torch.testing.assert_close(head.run(ops, inputs, buffers), expected, rtol=0, atol=MAX_ERROR)
    assert not buffers.q.any(), "the op qkv ran"


@pytest.mark.parametrize("variant", [{}, XR1, {"output_width": 48}, {"stream_norms": False}])
def test_the_oracles_compute_what_the_head_does(variant):
    """Op by op, against PyTorch's operators."""
    head = make_head(**variant)
    inputs = make_inputs(head, 2)
    chunk = head.run(FusedOps("reference", DEVICE), inputs, head.buffers(2, 6))
    place = torch.arange(inputs.keys.shape[3], device=DEVICE)
    mask = (place >= inputs.begin[:, None]) & (place < inputs.end[:, None])
    kept = mask[:, None, :, None]
    kv = KVBlock(
        inputs.keys.masked_fill(~kept, 0), inputs.values.masked_fill(~kept, 0), mask, inputs.next_position.long(),
        inputs.action_mask,
    )  # fmt: skip
    plain = head.head
    with torch.no_grad():
        expected = plain.sample(
            kv, inputs.state, inputs.noise, inputs.prefix, inputs.prefix_length, plain.modulation_table()
        )
    torch.testing.assert_close(chunk, expected, rtol=0, atol=MAX_ERROR)


@pytest.mark.compiled
def test_replays_are_bit_identical():
    head = make_head()
    ops, inputs, buffers = FusedOps("triton", DEVICE), make_inputs(head, 2), head.buffers(2, 6)
    chunks = [head.run(ops, inputs, buffers, flow="persistent").clone() for _ in range(20)]
    assert all(torch.equal(chunk, chunks[0]) for chunk in chunks)


@pytest.mark.parametrize("flow", ["persistent", "streamed"])
def test_the_reference_has_no_such_kernel(flow):
    head = make_head()
    with pytest.raises(NotImplementedError, match="runs op by op"):
        head.run(FusedOps("reference", DEVICE), make_inputs(head, 1), head.buffers(1, 6), flow=flow)


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"qkv": WHOLE}, ValueError, "expected 'whole', as tactics.'qkv'. has, got 'tiled'"),
        ({"down": replace(SPLIT, library=True)}, ValueError, "expected one of our own kernels, got the library's"),
        ({"down": replace(SPLIT, schedule="stream")}, NotImplementedError, "expected 'tiled' or 'whole' in a loop"),
        ({"out": replace(WHOLE, block_k=64)}, ValueError, "expected a multiple of 128 for 8 warps, got 64"),
    ],
    ids=["raw heads", "library", "schedule", "depth"],
)
def test_tactics_that_a_loop_cannot_have_are_refused(change, error, complaint):
    head, ops = make_head(columns=128), FusedOps("triton", DEVICE)
    ops.default = lambda kind, shape, *_: change.get(kind.removeprefix(LOOP), SPLIT)
    with pytest.raises(error, match=complaint):
        head.finish(ops, make_inputs(head, 1), head.buffers(1, 6), 0, flow="layered")


def test_a_cache_of_other_strides_is_refused():
    head = make_head()
    inputs = make_inputs(head, 1)
    wider = torch.cat((inputs.values, inputs.values), dim=-1)
    inputs = replace(inputs, values=wider[..., : head.config.head_dim])
    with pytest.raises(ValueError, match="values: expected the strides of keys"):
        head.run(FusedOps("triton", DEVICE), inputs, head.buffers(1, 6), flow="persistent")
