"""What is shown of the action head's attention is what it computes with, and the labels are the tokens'."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.test_engine_guided import Graphs
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.attention import KINDS, watched
from xr0_engine.model.dit import DiTAttention

SUMS = 1e-5
"""Sums over some hundred weights, float32, of values of order 1."""
FUSED = 1e-4
"""Weights below 1 over a KV block by other sums."""
SIZE = (64, 96)


@pytest.fixture(scope="module", params=[None, 4], ids=["full_causal", "window 4"])
def engine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention") / "tiny"
    init_checkpoint(folder)
    made = Engine.from_pretrained(folder, device="cpu", dtype="float32", backend="reference")
    head = replace(made.config.head, local_window=request.param, position_offset=10 if request.param else 0)
    made.model.head.config = head
    return made


def prefix_of(engine, observation, length):
    return engine.infer(observation, seed=9).actions[:length] if length else None


@pytest.mark.parametrize("length", [0, 3])
def test_weights_times_values_are_what_attention_gives(engine, length):
    observation = engine.example("bimanual", SIZE)
    prefix, given = prefix_of(engine, observation, length), []

    def before(module, arguments):
        x, cos, sin, _, values, _ = arguments
        own = module.heads(x, cos, sin)[2]
        groups = own.shape[1] // values.shape[1]
        given.append([torch.cat((values.repeat_interleave(groups, 1), own), dim=2)[0]])

    def after(module, arguments):
        given[-1].append(arguments[0][0].unflatten(-1, (module.num_heads, module.head_dim)).transpose(0, 1))

    hooks = []
    for module in engine.model.head.modules():
        if isinstance(module, DiTAttention):
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.o_proj.register_forward_pre_hook(lambda _, x, module=module: after(module, x)))
    seen = engine.attention(observation, prefix=prefix, seed=0)
    for hook in hooks:
        hook.remove()
    assert len(given) == seen.weights.shape[0] * seen.weights.shape[1] == 15
    for weights, (values, output) in zip(seen.weights.reshape(15, *seen.weights.shape[2:]), given, strict=True):
        torch.testing.assert_close(torch.from_numpy(weights) @ values, output, rtol=0, atol=SUMS)
    np.testing.assert_allclose(seen.weights.sum(-1), 1, atol=SUMS)


@pytest.mark.parametrize("length", [0, 3])
def test_tokens_are_named(engine, length):
    observation = engine.example("bimanual", SIZE)
    seen = engine.attention(observation, prefix=prefix_of(engine, observation, length), seed=0)
    assert seen.prefix_length == length
    assert seen.keys[-32:] == seen.queries
    kinds = ["sink", "state", *["prefix"] * length, *["action"] * (30 - length)]
    assert [token.kind for token in seen.queries] == kinds
    assert [token.index for token in seen.queries[2:]] == list(range(30))
    # 96 x 64 pixels: 3 x 2 tokens of 32 x 32, in the prompt's order of views.
    images = [token for token in seen.keys if token.kind == "image"]
    places = [(view, row, column) for view in observation.images for row in range(2) for column in range(3)]
    assert [(token.view, token.row, token.column) for token in images] == places
    assert {token.grid for token in images} == {(2, 3)}
    prompt = engine._preprocess([observation])
    cached = seen.keys[: prompt.input_ids.shape[1]]
    assert [token.id for token in cached] == prompt.input_ids[0].tolist()
    assert [token.kind == "image" for token in cached] == (prompt.input_ids[0] == 1004).tolist()
    np.testing.assert_allclose(seen.times, [0, 0.2, 0.4, 0.6, 0.8])


def test_masses_are_shares(engine):
    observation = engine.example("bimanual", SIZE)
    seen = engine.attention(observation, prefix=prefix_of(engine, observation, 3), seed=0)
    np.testing.assert_allclose(sum(seen.mass(kind) for kind in KINDS), 1, atol=SUMS)
    views = sum(seen.mass("image", view=view) for view in observation.images)
    np.testing.assert_allclose(views, seen.mass("image"), atol=SUMS)
    noisy = seen.where("action", of="queries")
    picture = seen.picture("ego", noisy)
    assert picture.shape == (5, 2, 3)
    expected = seen.mass("image", view="ego")[..., noisy].mean((1, 2, 3))
    np.testing.assert_allclose(picture.sum((1, 2)), expected, atol=SUMS)
    with pytest.raises(ValueError, match=r"expected a view with image tokens .* got 'base'"):
        seen.picture("base", noisy)


def test_what_a_query_may_not_see_has_no_weight(engine):
    observation = engine.example("bimanual", SIZE)
    weights = engine.attention(observation, seed=0).weights[..., -32:]
    window = engine.model.head.config.local_window
    for query in range(2, 32):
        behind = query if window is None else window
        assert not weights[..., query, query + 1 :].any()
        assert not weights[..., query, 2 : max(query - behind, 2)].any()
        assert weights[..., query, max(query - behind, 2)].all()


def test_looking_changes_nothing(engine):
    observation = engine.example("bimanual", SIZE)
    before = engine.infer(observation, seed=0).actions
    first, second = (engine.attention(observation, seed=0).weights for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(engine.infer(observation, seed=0).actions, before)
    modules = [module for module in engine.model.head.modules() if isinstance(module, DiTAttention)]
    assert not any(module._forward_pre_hooks for module in modules)
    with pytest.raises(RuntimeError, match="on purpose"), watched(engine.model.head):
        raise RuntimeError("on purpose")
    assert not any(module._forward_pre_hooks for module in modules)


def test_the_fused_backend_shows_the_same(tmp_path):
    init_checkpoint(tmp_path / "tiny")
    plain, other = (Engine.from_pretrained(tmp_path / "tiny", device="cpu", dtype="float32") for _ in range(2))
    fused = Engine(FusedModel(other.model, "reference", TacticTable(""), graphs=False), other._preprocess, "triton")
    observation = plain.example("libero_all", SIZE)
    ours, theirs = plain.attention(observation, seed=0), fused.attention(observation, seed=0)
    assert ours.keys == theirs.keys
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=FUSED)


def test_graphs_show_none(engine):
    exported = Engine(Graphs(engine.model), engine._preprocess, "onnx")
    with pytest.raises(NotImplementedError, match="attention: an export's graphs"):
        exported.attention(engine.example("bimanual", SIZE))
