"""The policies: what they compute is the engine's, the golden cases', and reaches every parameter that learns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.support import CPU, GOLDEN, load, make_config, random_inputs
from tests.training.support import SIZES, config_for, language_sample, robot_sample, statistics
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.golden.cases import golden_config, golden_inputs
from xr0_engine.model.weights import read_headers, read_tensor
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import Collator, RobotBatch
from xr0_engine.training.config import FlowConfig
from xr0_engine.training.draws import FlowDraw, draw_flow, micro_batch_generator
from xr0_engine.training.model import (
    ChoicePolicy,
    FlowPolicy,
    build_policy,
    checkpoint_name,
    load_policy,
    model_config,
    repeat_kv,
    set_parameter,
)
from xr0_engine.types import CheckpointError

FLOAT32_MAX_ERROR = 2e-4
"""On values of order 1 to 7: float32 rounding through some ten layers of sums in another order."""
FLOAT32_LOSS_ERROR = 2e-5
"""Relative: losses average thousands of such values."""
TWO_ROWS = ([[(4, 4), (4, 4)], [(6, 2)]], [[2, 3, 4], [1, 2]])


def loaded(config, base):
    start = read_base(base)
    xr0 = model_config(start.config, config)
    policy = build_policy(config, xr0)
    load_policy(policy, config, xr0, start, CPU)
    return policy, xr0


def robot_batch(xr0, base, count=3):
    return Collator(base, xr0, statistics()).robot([robot_sample(number) for number in range(count)])


def golden_policy(model: str, flow: FlowConfig) -> FlowPolicy:
    config = golden_config(json.loads((GOLDEN / f"{model}.json").read_text()))
    policy = FlowPolicy(config, flow)
    stored, _ = read_headers([GOLDEN / f"{model}.weights.safetensors"])
    for name, parameter in policy.named_parameters():
        set_parameter(parameter, read_tensor(stored[checkpoint_name(name)]))
    return policy


def golden_cases():
    for path in sorted(GOLDEN.glob("*.safetensors")):
        if ".weights" not in path.name and path.name.count(".") == 2:
            yield pytest.param(path, id=path.stem)


@pytest.mark.parametrize("path", list(golden_cases()))
def test_golden_training_values_through_the_trainers_own_step(path):
    from safetensors.torch import load_file

    case = load_file(path)
    if "train.loss" not in case:
        pytest.skip("no training values in this case")
    prefix = case["prefix"].shape[1]
    flow = FlowConfig(repeat=1, reweight_errors=True, frequency_weight=1.0, frequency_masked=False)
    policy = golden_policy(path.name.partition(".")[0], flow)
    inputs = golden_inputs(
        case, golden_config(json.loads((GOLDEN / f"{path.name.partition(chr(46))[0]}.json").read_text()))
    )
    batch = RobotBatch(inputs, case["train.action"], case["action_mask"], ("golden",) * len(case["state"]))
    draw = FlowDraw(case["noise"], case["train.t"].flatten(), prefix, torch.zeros(prefix, dtype=torch.bool))
    output = policy(batch, draw)
    suffix = slice(prefix, None)
    difference = (output.velocity - case["train.velocity"])[:, suffix].abs().max()
    assert difference < FLOAT32_MAX_ERROR
    torch.testing.assert_close(output.loss.view(1), case["train.loss_with_freq"], rtol=FLOAT32_LOSS_ERROR, atol=0)
    torch.testing.assert_close(output.parts["mse"].view(1), case["train.loss_mse"], rtol=FLOAT32_LOSS_ERROR, atol=0)
    kv = policy.prefill(inputs)
    is_token = inputs.attention_mask[:, None, :, None]
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        assert ((keys - case[f"kv.{layer}.key"]) * is_token).abs().max() < FLOAT32_MAX_ERROR
        assert ((values - case[f"kv.{layer}.value"]) * is_token).abs().max() < FLOAT32_MAX_ERROR


def test_kv_block_equals_the_engines(base):
    policy, xr0 = loaded(config_for("post_train_sync", base), base)
    inputs = random_inputs(xr0, *TWO_ROWS)
    engine = load(base)
    expected = engine.prefill(inputs, engine.encode_images(inputs))
    kv = policy.prefill(inputs)
    is_token = inputs.attention_mask[:, None, :, None]
    assert ((kv.keys - expected.keys) * is_token).abs().max() < FLOAT32_MAX_ERROR
    assert ((kv.values - expected.values) * is_token).abs().max() < FLOAT32_MAX_ERROR
    assert torch.equal(kv.next_position, expected.next_position)
    assert kv.keys.requires_grad


def test_tables_rounded_as_in_the_released_server_are_the_engines(tmp_path):
    folder = tmp_path / "compat"
    write_checkpoint(folder, make_config(**{**SIZES, "head": {**SIZES["head"], "compat_bf16_time": True}}))
    policy, xr0 = loaded(config_for("finetune_head", folder), folder)
    inputs = random_inputs(xr0, [[(16, 20)]], [[2, 3]])
    with torch.no_grad():
        kv = policy.prefill(inputs)
    model = load(folder)
    expected = model.prefill(inputs, model.encode_images(inputs))
    assert (kv.keys - expected.keys).abs().max() < FLOAT32_MAX_ERROR


@pytest.mark.parametrize(
    "recipe", ["post_train_sync", "post_train_async", "released_async", "training_rtc", "pretrain_dit", "finetune_head"]
)
def test_gradients_reach_what_learns_and_nothing_else(recipe, base):
    policy, xr0 = loaded(config_for(recipe, base), base)
    batch = robot_batch(xr0, base)
    flow = replace(policy.flow, prefix="paper" if policy.flow.prefix != "none" else "none")
    draw = draw_flow(flow, micro_batch_generator(0, 3), *batch.actions.shape)
    policy(batch, draw).loss.backward()
    without = [
        name for name, p in policy.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.any()))
    ]
    # Deep copies of one grey image: an image's rows may be all alike, but none of the parameters is out of the graph.
    assert without == []
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    vlm_learns = any(p.requires_grad for p in policy.vlm.parameters())
    assert vlm_learns == (recipe not in ("pretrain_dit", "finetune_head"))
    assert not policy.vlm.model.language_model.embed_tokens.weight.requires_grad


def test_padding_gives_finite_gradients(base):
    policy, xr0 = loaded(config_for("post_train_sync", base), base)
    inputs = random_inputs(xr0, *TWO_ROWS)
    assert not inputs.attention_mask.all()
    batch = RobotBatch(inputs, torch.randn(2, 6, 32), torch.ones(2, 6, 32), ("a", "b"))
    policy(batch, draw_flow(policy.flow, micro_batch_generator(0, 0), 2, 6, 32)).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters() if p.grad is not None)


def test_one_vlm_pass_serves_all_draws(base):
    """The loss of R draws in one step is the mean of the losses of each draw alone."""
    policy, xr0 = loaded(config_for("post_train_sync", base, "flow.repeat=3"), base)
    batch = robot_batch(xr0, base)
    draw = draw_flow(policy.flow, micro_batch_generator(0, 0), *batch.actions.shape)
    together = policy(batch, draw).loss
    rows = len(batch.actions)
    alone = [
        policy(batch, replace(draw, noise=draw.noise[start : start + rows], t=draw.t[start : start + rows])).loss
        for start in range(0, 3 * rows, rows)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_repeated_rows_are_draw_by_draw(base):
    policy, xr0 = loaded(config_for("post_train_sync", base), base)
    kv = policy.prefill(random_inputs(xr0, *TWO_ROWS))
    twice = repeat_kv(kv, 2)
    assert torch.equal(twice.keys[:, :2], twice.keys[:, 2:])
    assert torch.equal(twice.mask, torch.cat((kv.mask, kv.mask)))
    assert torch.equal(twice.next_position[:, 2:], kv.next_position)


def test_fresh_head_starts_as_the_spec_says(base):
    config = config_for("pretrain_dit", base)
    policy, _ = loaded(config, base)
    again, _ = loaded(config, base)
    other, _ = loaded(replace(config, run=replace(config.run, seed=1)), base)
    kept, _ = loaded(config_for("finetune_head", base), base)
    table = policy.head.dit.layers[0].adaln_table.detach()
    assert torch.equal(table, again.head.dit.layers[0].adaln_table)
    assert not torch.equal(table, other.head.dit.layers[0].adaln_table)
    assert abs(float(table.std()) * table.shape[-1] ** 0.5 - 1) < 0.2
    assert torch.equal(policy.head.dit.layers[0].input_layernorm.weight, torch.ones(64))
    assert torch.equal(kept.head.sink.weight, load(base).head.sink.weight)


@pytest.mark.parametrize("train", ["all", "head"])
def test_a_checkpoint_that_lacks_tensors_is_refused(train, base, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.glob("*.json"):
        if "index" not in file.name:
            (broken / file.name).write_bytes(file.read_bytes())
    tensors = {name: value for file in base.glob("*.safetensors") for name, value in load_file(file).items()}
    del tensors["sink.weight"]
    save_file(tensors, broken / "model.safetensors")
    config = config_for("post_train_sync", broken, f"model.train={train}")
    with pytest.raises(CheckpointError, match=r"missing sink.weight \[1, 64\]"):
        loaded(config, broken)


def test_choice_policy_reads_tokens_behind_the_prompt(base):
    config = config_for("pretrain_vlm", base, "choice.candidates=3", "data.language_every=2")
    policy, xr0 = loaded(config, base)
    assert isinstance(policy, ChoicePolicy)
    batch = robot_batch(xr0, base)
    chunks, scores = policy.candidates(batch)
    assert chunks.shape == (3, 3, 6, 32)
    assert scores.shape == (3, 3)
    # What is behind the prompt leaves the prompt's own keys and values as they are.
    plain = policy.vlm(batch.inputs)
    longer = policy.vlm(batch.inputs, extra=policy.choice.embed(batch.inputs.state))
    tokens = plain.keys.shape[3]
    torch.testing.assert_close(longer.keys[..., :tokens, :], plain.keys)
    assert longer.keys.shape[3] == tokens + 1 + 6 + 1
    policy(batch).loss.backward()
    policy(Collator(base, xr0, statistics()).language([language_sample(0), language_sample(1)])).loss.backward()
    assert [name for name, p in policy.named_parameters() if p.requires_grad and p.grad is None] == []


def test_only_the_closest_candidate_learns_and_every_score(base):
    config = config_for("pretrain_vlm", base, "choice.candidates=3", "data.language_every=2")
    policy, xr0 = loaded(config, base)
    batch = robot_batch(xr0, base, count=1)
    chunks, _ = policy.candidates(batch)
    winner = int((chunks - batch.actions[:, None]).abs().mul(batch.mask[:, None]).sum((2, 3)).argmin())
    policy(batch).loss.backward()
    per_candidate = policy.choice.action_output.weight.grad.view(3, 32, -1).abs().sum((1, 2))
    assert [bool(value > 0) for value in per_candidate] == [place == winner for place in range(3)]
    assert bool((policy.choice.score_output.bias.grad != 0).all())
