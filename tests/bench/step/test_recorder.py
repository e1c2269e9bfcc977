"""What a step writes down of itself: names, shapes, counts, and a family of heads that nobody told it of."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from xr0_engine.bench.step.recorder import META, PaperOps, parts_on_meta, step_calls, step_on_meta
from xr0_engine.bench.step.workload import Workload
from xr0_engine.fused import backends
from xr0_engine.fused.ops import FusedOps, Weight
from xr0_engine.fused.session import FlowSession
from xr0_engine.sizes import published_config, tiny_config

WORK = Workload(((16, 16), (16, 16)), 194, 10)


def test_products_and_attentions_of_the_published_step():
    calls = step_calls(published_config(), WORK)
    assert Counter(call.stage for call in calls) == {"vision": 8, "prefill": 6, "flow": 11}
    products = {(call.stage, call.name): call for call in calls if "attention" not in call.kind}
    assert len(products) == 22
    assert products["prefill", "gate and up"].shape == (194, 2 * 9728, 2560)
    assert products["prefill", "gate and up"].count == 35
    assert products["prefill", "KV, last layer"].count == 1
    assert (products["flow", "QKV"].shape, products["flow", "QKV"].count) == ((12, 3072, 1024, 128), 80)
    # The three that lie within other ops.
    within = {name: (call.shape, call.count) for (stage, name), call in products.items() if stage == "flow"}
    assert within["actions in"] == ((10, 1024, 32), 5)
    assert within["velocity in"] == ((10, 32, 1024), 5)
    assert within["velocity out"] == ((10, 32, 32), 5)


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"mlp_width": 96}, {"state_length": 3}])
def test_another_head_needs_no_other_recorder(change):
    config = tiny_config()
    head = replace(config.head, **change)
    calls = {(call.stage, call.name): call for call in step_calls(replace(config, head=head), WORK)}
    assert calls["flow", "QKV"].count == head.flow_steps * head.num_layers
    assert calls["flow", "gate and up"].shape[1] == 2 * head.intermediate_size
    assert calls["flow", "state in"].shape[0] == head.state_length
    assert calls["flow", "attention"].shape[2] == head.context + WORK.chunk_length


def test_a_module_without_a_label_keeps_its_name():
    parts = parts_on_meta(tiny_config())
    ops = PaperOps(parts.reference)
    x, weight = torch.empty(1, 4, 128, device="meta"), parts.reference.head.t_projector.layers[0].weight
    ops.linear(x, Weight(weight), torch.empty(1, 4, len(weight), device="meta"))
    assert [call.name for call in ops.calls.values()] == ["head.t_projector.layers.0"]


def test_a_preamble_takes_no_rows():
    parts = parts_on_meta(tiny_config())
    ops = PaperOps(parts.reference)
    columns = parts.config.vision.patch_dim
    step_on_meta(parts, replace(WORK, preamble_tokens=15), ops, WORK.tokens, columns)
    rows = {call.shape[0] for call in ops.calls.values() if (call.stage, call.kind) == ("prefill", "swiglu")}
    assert rows == {194 - 15}


@pytest.mark.parametrize(("flow", "launches"), [("layered", 85), ("persistent", 6)])
def test_launches_and_split_combines_of_a_published_flow(flow, launches, monkeypatch):
    """As loops: what begins a flow has 5 launches of its own. Of a loop's stages attention alone is split."""
    pytest.importorskip("triton")
    from xr0_engine.kernels.launch import recording

    monkeypatch.setattr(backends, "interpreted", lambda: False)
    published = published_config()
    # Of the VLM, what the head reads.
    few = {
        "text": replace(published.text, num_layers=16),
        "vision": replace(published.vision, depth=2, deepstack_layers=()),
    }
    parts = parts_on_meta(replace(published, **few))
    with recording() as calls:
        FlowSession(parts.head, FusedOps("triton", META, arch=90), 1, 320, 30, flow=flow).run()
    assert len(calls) == launches
    loops = [call.arguments for call in calls if call.name == "_flow_loop"]
    assert sum(each["last_place"] - each["first_place"] for each in loops) == 80
    for each in loops:
        assert all(each[stage].SPLIT_K == 1 for stage in ("QKV", "OUT", "GATE_UP", "DOWN", "TOKENS"))
