"""The fused path against the plain one, in float32: same weights, same inputs, another layout and other ops."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.support import DEVICE
from tests.support import load, make_config, random_inputs
from xr0_engine.checkpoint import init_checkpoint, write_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.prompts import right_padded, session_key
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.weights import load_model, read_index

MAX_ERROR = 2e-4
"""float32 through some ten layers, with norms folded into weights and sums in another order."""
TWO_VIEWS = [(4, 4), (4, 6)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused") / "tiny"
    init_checkpoint(folder, "tiny")
    model = load(folder)
    # Norm weights of ones would hide a fold that was forgotten.
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.finish_loading()
    return model


def fused_of(plain, **head) -> tuple[FusedModel, object]:
    model = copy.deepcopy(plain)
    if head:
        model.config = replace(model.config, head=replace(model.config.head, **head))
        model.head.config = model.config.head
    for part in model.modules():
        if hasattr(part, "pack"):
            part.pack()
    original = copy.deepcopy(model)
    return FusedModel(model, "reference", TacticTable(""), graphs=False), original


@pytest.mark.parametrize(
    ("batch", "flow"), [(1, "chained"), (2, "persistent")], ids=["one row", "padded batch, persistent flow"]
)
def test_the_kernels_compute_the_step(tmp_path, batch, flow):
    """All kernels in sequence, in Triton's interpreter or compiled, at the smallest sizes that have every part."""
    pytest.importorskip("triton")
    config = make_config(
        text={"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96},
        vision={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "deepstack_layers": (0, 1)},
        head={"num_layers": 2, "hidden_size": 128, "num_kv_heads": 2, "flow_steps": 2, "action_length": 5,
              "local_window": 2, "position_offset": 10},
    )  # fmt: skip
    write_checkpoint(tmp_path / "least", config)
    model = load_model(config, read_index(tmp_path / "least"), DEVICE, torch.float32)
    inputs = random_inputs(config, [[(2, 4)]] * batch, [[3, 7], [1, 2]][:batch], 4)
    chunk = chunk_inputs(inputs, config, 1)
    expected = model.sample(model.prefill(inputs, model.encode_images(inputs)), inputs.state, *chunk)
    fused = FusedModel(model, "triton", TacticTable("", flow=flow), graphs=DEVICE.type == "cuda")
    torch.testing.assert_close(fused.step(inputs, *chunk), expected, rtol=0, atol=MAX_ERROR)


def chunk_inputs(inputs, config, prefix_length):
    batch, length = inputs.action_mask.shape[:2]
    rng = np.random.default_rng(1)
    noise, prefix = (
        torch.from_numpy(rng.standard_normal((batch, length, config.head.action_dim)).astype(np.float32))
        for _ in range(2)
    )
    return noise, prefix, torch.full((batch,), prefix_length)


def inputs_of(config: ModelConfig, batch: int, preamble_tokens: int):
    texts = [[3, 2, 5], [1, 2, 9], [4, 2, 1]][:batch]
    return random_inputs(config, [TWO_VIEWS] * batch, texts, preamble_tokens)


@pytest.mark.parametrize("preamble_tokens", [0, 4], ids=["no kept preamble", "kept preamble"])
@pytest.mark.parametrize("batch", [1, 3], ids=["one row", "padded batch"])
def test_stages_agree(plain, batch, preamble_tokens):
    fused, model = fused_of(plain)
    inputs = inputs_of(model.config, batch, preamble_tokens)
    vision, expected_vision = fused.encode_images(inputs), model.encode_images(inputs)
    torch.testing.assert_close(vision.tokens, expected_vision.tokens, rtol=0, atol=MAX_ERROR)
    for tap, expected in zip(vision.deepstack, expected_vision.deepstack, strict=True):
        torch.testing.assert_close(tap, expected, rtol=0, atol=MAX_ERROR)
    kv, expected_kv = fused.prefill(inputs, expected_vision), model.prefill(inputs, expected_vision)
    visible = inputs.attention_mask[:, None, :, None]
    for actual, expected in ((kv.keys, expected_kv.keys), (kv.values, expected_kv.values)):
        torch.testing.assert_close(actual, expected * visible, rtol=0, atol=MAX_ERROR)
    assert torch.equal(kv.next_position, expected_kv.next_position)
    assert torch.equal(kv.mask, expected_kv.mask)
    chunk = chunk_inputs(inputs, model.config, 2)
    actual, expected = (m.sample(expected_kv, inputs.state, *chunk) for m in (fused, model))
    torch.testing.assert_close(actual, expected, rtol=0, atol=MAX_ERROR)


@pytest.mark.parametrize("prefix_length", [0, 1, 5])
@pytest.mark.parametrize(
    "mode", [{"local_window": 4, "position_offset": 10}, {"local_window": None, "position_offset": 0}],
    ids=["windowed", "causal"],
)  # fmt: skip
def test_whole_step_agrees_call_after_call(plain, mode, prefix_length):
    fused, model = fused_of(plain, **mode)
    for batch, seed_text in ((2, 1), (2, 4), (1, 2)):
        inputs = random_inputs(model.config, [TWO_VIEWS] * batch, [[3, 2, seed_text], [1, 2, 9]][:batch], 4, seed_text)
        chunk = chunk_inputs(inputs, model.config, prefix_length)
        expected = model.sample(model.prefill(inputs, model.encode_images(inputs)), inputs.state, *chunk)
        torch.testing.assert_close(fused.step(inputs, *chunk), expected, rtol=0, atol=MAX_ERROR)


def test_rounded_tables_are_the_plain_models(tmp_path):
    write_checkpoint(tmp_path / "compat", make_config(head={"compat_bf16_time": True}))
    fused, model = fused_of(load(tmp_path / "compat"))
    inputs = inputs_of(model.config, 1, 0)
    vision, expected = fused.encode_images(inputs), model.encode_images(inputs)
    torch.testing.assert_close(vision.tokens, expected.tokens, rtol=0, atol=MAX_ERROR)
    keys, expected_keys = (each.prefill(inputs, expected).keys for each in (fused, model))
    torch.testing.assert_close(keys, expected_keys, rtol=0, atol=MAX_ERROR)


def test_folding_leaves_the_plain_model_what_it_was(plain):
    fused, model = fused_of(plain)
    inputs = inputs_of(model.config, 2, 4)
    expected, actual = model.encode_images(inputs), fused.reference.encode_images(inputs)
    torch.testing.assert_close(actual.tokens, expected.tokens, rtol=0, atol=MAX_ERROR)
    before, after = (m.prefill(inputs, expected) for m in (model, fused.reference))
    torch.testing.assert_close(after.keys, before.keys, rtol=0, atol=MAX_ERROR)


def test_prompts_of_a_bucket_share_a_session_and_the_number_of_sessions_is_bounded(plain, monkeypatch):
    monkeypatch.setattr("xr0_engine.fused.model.MAX_SESSIONS", 2)
    fused, model = fused_of(plain)
    short, longer = (random_inputs(model.config, [TWO_VIEWS], [[3, 2, n]], 4) for n in (2, 3))
    assert fused.session(short) is fused.session(longer)
    first = fused.session(short)
    for views in ([(4, 4)], [(4, 8)]):
        fused.session(random_inputs(model.config, [views], [[3, 2]], 4))
    assert fused.session(short) is not first


def test_a_session_that_a_step_made_is_updated_outside_of_one(plain):
    fused, model = fused_of(plain)
    inputs = inputs_of(model.config, 1, 4)
    chunk, other = (chunk_inputs(inputs, model.config, length) for length in (0, 3))
    fused.step(inputs, *chunk)
    session = fused.session(inputs)
    session.update(inputs, *other)
    session.replay()
    actual = session.chunk.clone()
    assert torch.equal(fused.step(inputs, *other), actual)
    assert not torch.equal(fused.step(inputs, *chunk), actual)


def test_trace_starts_with_the_noise_and_ends_with_the_chunk(plain):
    fused, model = fused_of(plain)
    inputs = inputs_of(model.config, 1, 0)
    kv = model.prefill(inputs, model.encode_images(inputs))
    noise, prefix, length = chunk_inputs(inputs, model.config, 0)
    trace: list[torch.Tensor] = []
    chunk = fused.sample(kv, inputs.state, noise, prefix, length, trace)
    assert len(trace) == model.config.head.flow_steps + 1
    assert torch.equal(trace[0], noise)
    assert torch.equal(trace[-1], chunk)


def test_a_kept_block_is_sampled_as_the_table_says_and_traced_as_a_chain(plain):
    fused, model = fused_of(plain)
    fused.table = TacticTable("", flow="persistent")
    inputs = inputs_of(model.config, 1, 0)
    kv = model.prefill(inputs, model.encode_images(inputs))
    chunk = chunk_inputs(inputs, model.config, 2)
    # The oracles have no such kernel, and say so.
    with pytest.raises(NotImplementedError, match="a flow as one kernel"):
        fused.sample(kv, inputs.state, *chunk)
    expected = model.sample(kv, inputs.state, *chunk)
    torch.testing.assert_close(fused.sample(kv, inputs.state, *chunk, []), expected, rtol=0, atol=MAX_ERROR)


def test_a_kv_block_with_a_gap_is_refused(plain):
    fused, model = fused_of(plain)
    inputs = inputs_of(model.config, 1, 0)
    kv = model.prefill(inputs, model.encode_images(inputs))
    mask = kv.mask.clone()
    mask[0, 5] = False
    with pytest.raises(ValueError, match="one run of visible tokens"):
        fused.sample(replace(kv, mask=mask), inputs.state, *chunk_inputs(inputs, model.config, 0))


def test_prompts_are_moved_to_the_left(plain):
    config = make_config()
    inputs = inputs_of(config, 2, 4)
    key = session_key(inputs)
    prompts = right_padded(inputs, key, config)
    assert key.tokens % 32 == 0
    assert prompts.lengths.tolist() == inputs.attention_mask.sum(1).tolist()
    for row, length in enumerate(prompts.lengths):
        kept = inputs.input_ids[row, inputs.attention_mask[row]][4:]
        assert prompts.ids[row, : length - 4].tolist() == kept.tolist()
        assert not prompts.ids[row, length - 4 :].any()
    used = prompts.image_index[prompts.image_index >= 0]
    assert used.tolist() == list(range(len(used)))
