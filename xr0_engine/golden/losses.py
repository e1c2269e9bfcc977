"""The training losses of golden cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xr0_engine.comparison import FLOAT32_LOSS_ERROR, Comparison, compare, tolerance
from xr0_engine.config import ModelConfig
from xr0_engine.golden.cases import chunk_inputs, golden_inputs
from xr0_engine.model.dit import ActionHead, dit_geometry
from xr0_engine.model.flow import prefix_positions, training_pair
from xr0_engine.model.weights import StoredTensor
from xr0_engine.training.choice_turn import ChoiceTurn
from xr0_engine.training.config import ChoiceConfig, FlowConfig
from xr0_engine.training.draws import FlowDraw, hide_columns
from xr0_engine.training.losses import error_weights, frequency_loss, mse_loss
from xr0_engine.types import KVBlock

CHOICE = ChoiceConfig(action_weight=0.5, score_weight=0.5)
"""What the total of XR-1's cases weighs candidates and scores by."""
LOSSES = {
    "mse": "train.loss_mse",
    "frequency": "train.loss_freq",
    "choice": "train.loss_choice",
    "score": "train.loss_score",
    "loss": "train.loss",
}
"""Our name -> the case's."""


@torch.no_grad()
def verify_training(
    name: str, head: ActionHead, kv: KVBlock, case: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[Comparison]:
    action, noise, prefix_length = case["train.action"], case["noise"], case["prefix"].shape[1]
    lengths = torch.full((len(action),), prefix_length)
    device = head.sink.weight.device
    z, target = training_pair(noise, action, case["train.t"], prefix_positions(lengths, action.shape[1]))
    geometry = dit_geometry(head.config, kv.next_position, kv.mask, lengths.to(device), action.shape[1])
    velocity = head(
        (z.to(device) * kv.action_mask).to(dtype),
        head.context(case["state"].to(device, dtype)),
        head.modulations(case["train.t"].flatten().to(device)),
        head.rope(geometry),
        geometry.mask,
        kv.keys,
        kv.values,
    ).cpu()
    suffix = slice(prefix_length, None)
    velocity, target, mask = velocity[:, suffix], target[:, suffix], case["action_mask"][:, suffix]
    yield compare(name, "velocity", velocity, case["train.velocity"][:, suffix], dtype)
    weights = torch.ones_like(mask)
    if prefix_length:
        given = chunk_inputs(case, action[:, :prefix_length])
        generated = head.sample(kv, case["state"], *given, head.modulation_table()).cpu()
        l1_error = (generated - action)[:, suffix].abs()
        yield compare(name, "L1 error", l1_error, case["train.l1_error"], dtype)
        weights = error_weights(l1_error, mask)
    mse = mse_loss(velocity, target, mask, weights)
    frequency = frequency_loss(velocity, target, mask, weights, masked=False)
    actual = torch.stack((mse, 0.5 * mse, 0.5 * mse + frequency))
    expected = torch.cat([case[f"train.{loss}"] for loss in ("loss_mse", "loss", "loss_with_freq")])
    error = float(((actual - expected) / expected).abs().max())
    yield Comparison(name, "losses", error, tolerance(dtype, FLOAT32_LOSS_ERROR), "relative")


@torch.no_grad()
def verify_joint_training(
    name: str,
    config: ModelConfig,
    flow: FlowConfig,
    stored: Mapping[str, StoredTensor],
    case: dict[str, Tensor],
    turn: ChoiceTurn,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Comparison]:
    """XR-1's four losses and their sum, through the trainer's own step. stored: place of the weights."""
    # Only here is transformers needed.
    from xr0_engine.model.weights import read_tensor
    from xr0_engine.training.batch import RobotBatch
    from xr0_engine.training.model import JointPolicy, checkpoint_name

    policy = JointPolicy(config, flow, CHOICE)
    for parameter_name, parameter in policy.named_parameters():
        parameter.copy_(read_tensor(stored[checkpoint_name(parameter_name)]))
    policy.to(device, dtype)
    policy.vlm.reset_tables()
    action, prefix = case["train.action"], case["prefix"].shape[1]
    hidden = torch.zeros(prefix, dtype=torch.bool)
    if "train.hidden_columns" in case:
        hidden[: len(case["train.hidden_columns"])] = case["train.hidden_columns"].bool()
    batch = RobotBatch(golden_inputs(case, config), action, case["train.action_mask"], (name,), turn).to(device)
    draw = FlowDraw(case["noise"], case["train.t"].flatten(), prefix, hidden)
    kv, candidates, scores = policy.propose(batch)
    output = policy.flow_losses(kv, batch, draw, None)
    assert output.velocity is not None
    behind = slice(prefix, None)
    yield compare(name, "velocity", output.velocity[:, behind], case["train.velocity"][:, behind], dtype)
    within = torch.arange(action.shape[1]) < turn.steps[:, None]
    proposed = candidates.transpose(1, 2).cpu() * within[..., None, None]
    yield compare(name, "candidates", proposed, case["choice.candidates"], dtype)
    yield compare(name, "scores", scores, case["choice.scores"], dtype)
    if prefix:
        lengths = torch.full((len(action),), prefix, device=device)
        geometry = dit_geometry(config.head, kv.next_position, kv.mask, lengths, action.shape[1])
        attends = hide_columns(geometry.mask, hidden, prefix, action.shape[1])
        noise, state = draw.noise.to(device), batch.inputs.state
        generated = policy.generate(kv, state, noise, batch.actions, lengths, attends).cpu()
        yield compare(name, "L1 error", (generated - action)[:, behind].abs(), case["train.l1_error"], dtype)
    parts = policy(batch, draw).parts
    errors = [float((parts[ours].cpu() / case[theirs] - 1).abs()) for ours, theirs in LOSSES.items()]
    yield Comparison(name, "losses", max(errors), tolerance(dtype, FLOAT32_LOSS_ERROR), "relative")


def golden_flow(training: Mapping[str, Any]) -> FlowConfig:
    """XR-1's, of a model's entry `training`."""
    return FlowConfig(
        repeat=1,
        reweight_errors=True,
        frequency_weight=float(training["freq_coefficient"]),
        frequency="selected",
        frequency_excluded=tuple(map(int, training["freq_excluded_dims"])),
    )


def golden_turn(case: Mapping[str, Tensor], tokens: Mapping[str, int], vocab_size: int) -> ChoiceTurn:
    """The turn behind a case's prompts. Raises ValueError unless it is one that the trainer makes."""
    ends, steps = case["choice.condition_end"].tolist(), case["choice.steps"].tolist()
    masks, start, length = case["choice.attention_mask"].bool(), tokens["action_token_start_id"], case["noise"].shape[1]
    if case["choice.input_ids"].min() < 0 or case["choice.input_ids"].max() >= vocab_size:
        raise ValueError(f"choice.input_ids: expected ids from 0 below {vocab_size}")
    turns, places = [], set()
    for row, mask, end, count in zip(case["choice.input_ids"], masks, ends, steps, strict=True):
        turn = row[end:].tolist() if bool(mask[end:].all()) else []
        state = turn.index(tokens["state_token_id"]) if tokens["state_token_id"] in turn else 0
        states = turn.count(tokens["state_token_id"])
        first = turn.index(start) if start in turn else 0
        proposed = [*range(start, start + count), tokens["score_token_id"]]
        # The trainer makes turns of the newest state, and of all of them.
        known = states in (1, case["state"].shape[1]) and turn[state : state + states] == [turn[state]] * states
        if not known or not 0 < state < first or count > length or turn[first : first + count + 1] != proposed:
            raise ValueError(
                f"choice.input_ids: expected {count} action tokens and a score behind a state, or all, from {end} on"
            )
        turns.append((turn, state, first))
        places.add((state, states, first))
    if len(places) != 1:
        raise ValueError(
            f"choice.input_ids: expected states and actions at one place of all turns, got {sorted(places)}"
        )
    ((state, states, first),) = places
    total = first + length + max(len(turn) - first - count for (turn, _, _), count in zip(turns, steps, strict=True))
    ids = torch.zeros(len(turns), total, dtype=torch.long)
    for row, (turn, _, _) in enumerate(turns):
        ids[row, : len(turn)] = torch.tensor(turn)
    return ChoiceTurn(ids, state, first, torch.tensor(steps), states)
