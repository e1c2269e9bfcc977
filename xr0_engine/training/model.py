"""What is trained: the VLM of transformers with the engine's own action head, or with Choice Policies' heads.

Parameters keep the checkpoint's names (`vlm.model.*`, and the head's behind `head.`), so weights.py maps both ways.
Shape legend: B batch, R draws per sample, M = R B rows, T actions, A columns, S state columns, N candidates, C hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from xr0_engine.backend import resolve_dtype
from xr0_engine.config import ModelConfig
from xr0_engine.family import FAMILIES
from xr0_engine.model import choice as choice_model
from xr0_engine.model.dit import ActionHead, Projector, dit_geometry
from xr0_engine.model.flow import prefix_positions, training_pair
from xr0_engine.model.weights import read_tensor
from xr0_engine.training.base import Base, fresh_head
from xr0_engine.training.batch import IGNORED, LanguageBatch, RobotBatch
from xr0_engine.training.choice_turn import TurnHeads, fresh_turn_heads
from xr0_engine.training.config import ChoiceConfig, FlowConfig, TrainConfig
from xr0_engine.training.counts import Counts
from xr0_engine.training.draws import FlowDraw, hide_columns, longest_prefix
from xr0_engine.training.lora import fresh_adapters, put_adapters
from xr0_engine.training.losses import (
    choice_losses,
    error_weights,
    frequency_loss,
    mse_loss,
    next_token_loss,
    spectrum_loss,
    spectrum_selection,
)
from xr0_engine.training.vlm import TrainableVLM, VLMOutput, next_position
from xr0_engine.types import KVBlock, ModelInputs

PROPOSALS = "proposals."
"""Before the names of JointPolicy's parameters that training alone has."""
STD_EPSILON = 1e-6
"""Added to std by the post-training code (spec section 3.3)."""


class StepOutput(NamedTuple):
    """What a forward pass gives: a tuple, since FSDP looks for tensors in those.

    loss: scalar with gradient; parts: its terms, scalars, detached, by name.
    square_error, supervised: (M, T, A) in flow matching, the unweighted squared error of the velocity where it is
    supervised, and where that is; None otherwise.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    velocity: Tensor | None = None
    square_error: Tensor | None = None
    supervised: Tensor | None = None


class FlowPolicy(nn.Module):
    """The VLM and the DiT that reads its KV cache, trained by flow matching."""

    def __init__(self, config: ModelConfig, flow: FlowConfig) -> None:
        super().__init__()
        self.vlm = TrainableVLM(config)
        self.head = ActionHead(config)
        self.flow = flow

    def forward(self, batch: RobotBatch, draw: FlowDraw, counts: Counts | None = None) -> StepOutput:
        """The post-training loss of one micro-batch (spec section 4.1); counts: of the step that it is a part of."""
        return self.flow_losses(self.prefill(batch.inputs), batch, draw, counts)

    def flow_losses(self, kv: KVBlock, batch: RobotBatch, draw: FlowDraw, counts: Counts | None) -> StepOutput:
        """kv: of the batch's rows, each of which serves all of its draws."""
        rows = len(draw.t) // len(batch.actions)
        kv = repeat_kv(kv, rows)
        state = batch.inputs.state.repeat(rows, 1, 1)
        action, supervised = (part.repeat(rows, 1, 1) for part in (batch.actions, batch.mask))
        return self.losses(kv, state, action, supervised, draw, counts)

    def prefill(self, inputs: ModelInputs) -> KVBlock:
        """As the engine's, with gradients where the VLM is trained."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.vlm.parameters())
        with torch.set_grad_enabled(learns):
            return self.knowledge(self.vlm(inputs), inputs)

    def knowledge(self, out: VLMOutput, inputs: ModelInputs) -> KVBlock:
        """out: of the prompt's tokens."""
        dtype = self.head.sink.weight.dtype
        return KVBlock(
            out.keys.to(dtype), out.values.to(dtype), inputs.attention_mask, next_position(inputs), inputs.action_mask
        )

    def losses(
        self,
        kv: KVBlock,
        state: Tensor,
        action: Tensor,
        supervised: Tensor,
        draw: FlowDraw,
        counts: Counts | None = None,
    ) -> StepOutput:
        """kv of M rows; state: (M, state_length, S); action, supervised: (M, T, A)."""
        config, head, prefix = self.flow, self.head, draw.prefix_length
        rows, length, _ = action.shape
        noise, t = draw.noise.to(action.device), draw.t.to(action.device)
        lengths = torch.full((rows,), prefix, device=action.device)
        z, target = training_pair(noise, action, t[:, None, None], prefix_positions(lengths, length))
        geometry = dit_geometry(head.config, kv.next_position, kv.mask, lengths, length)
        attends = hide_columns(geometry.mask, draw.hidden, prefix, length)
        dtype = head.sink.weight.dtype
        velocity = head(
            (z * kv.action_mask).to(dtype),
            head.context(state.to(dtype)),
            head.modulations(t),
            head.rope(geometry),
            attends,
            kv.keys,
            kv.values,
        ).float()

        behind = slice(prefix, None)
        weights = torch.ones_like(action[:, behind])
        mask = supervised[:, behind]
        if prefix and config.reweight_errors:
            # The errors are those of the model that the step trains: it sees no more of the prefix here than there.
            generated = self.generate(kv, state, noise, action, lengths, attends)
            weights = error_weights((generated - action)[:, behind].abs(), mask)
        elements, drawn, bins = (counts.elements, counts.rows, counts.bins) if counts else (None, None, None)
        mse = mse_loss(velocity[:, behind], target[:, behind], mask, weights, elements)
        loss = config.mse_weight * mse
        parts = {"mse": mse.detach()}
        if config.frequency_weight:
            pair = velocity[:, behind], target[:, behind]
            if config.frequency == "selected":
                selected = spectrum_selection(mask, config.frequency_excluded)
                frequency = spectrum_loss(*pair, selected, weights, bins)
            else:
                frequency = frequency_loss(*pair, mask, weights, config.frequency_masked, drawn)
            loss = loss + config.frequency_weight * frequency
            parts["frequency"] = frequency.detach()
        counted = supervised.clone()
        counted[:, :prefix] = 0
        square_error = (velocity - target).detach() ** 2 * counted
        return StepOutput(loss, parts | {"loss": loss.detach()}, velocity.detach(), square_error, counted)

    @torch.no_grad()
    def generate(
        self,
        kv: KVBlock,
        state: Tensor,
        noise: Tensor,
        prefix: Tensor,
        prefix_length: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Sampling as the engine does it; mask: as ActionHead.sample's. Returns (M, T, A) float32."""
        # Without gradients the KV block is read as it is: nothing of it may be recorded.
        plain = replace(kv, keys=kv.keys.detach(), values=kv.values.detach())
        table = self.head.modulation_table()
        return self.head.sample(plain, state, noise, prefix, prefix_length, table, mask=mask)

    @torch.no_grad()
    def predict(self, batch: RobotBatch, noise: Tensor) -> Tensor:
        """Chunks without prefix, K of each sample, for one pass of the VLM. noise: (K, B, T, A).

        Returns (K, B, T, A) float32, the model's units.
        """
        kv, state = self.prefill(batch.inputs), batch.inputs.state
        none = torch.zeros(noise.shape[1], dtype=torch.long)
        return torch.stack([self.generate(kv, state, one, torch.zeros_like(one), none) for one in noise])


class JointPolicy(FlowPolicy):
    """The same, where the VLM proposes and scores chunks in a turn behind the prompt (spec section 8).

    The DiT never sees the turn: its knowledge ends with the prompt, which the turn cannot change, as the VLM is causal.
    """

    def __init__(self, config: ModelConfig, flow: FlowConfig, choice: ChoiceConfig) -> None:
        super().__init__(config, flow)
        self.proposals = TurnHeads(config)
        self.choice = choice

    def forward(self, batch: RobotBatch, draw: FlowDraw, counts: Counts | None = None) -> StepOutput:
        kv, candidates, scores = self.propose(batch)
        output = self.flow_losses(kv, batch, draw, counts)
        samples = counts.samples if counts else None
        winner, regression = choice_losses(candidates, scores, batch.actions, batch.mask, samples)
        loss = output.loss + self.choice.action_weight * winner + self.choice.score_weight * regression
        parts = {"choice": winner.detach(), "score": regression.detach(), "loss": loss.detach()}
        return output._replace(loss=loss, parts=output.parts | parts)

    def propose(self, batch: RobotBatch) -> tuple[KVBlock, Tensor, Tensor]:
        """The DiT's knowledge, candidates (B, N, T, A) and scores (B, N), of one pass. Raises ValueError for a batch
        without turns."""
        inputs, turn = batch.inputs, batch.turn
        if turn is None:
            raise ValueError("batch: expected one with choice turns")
        embeds = self.vlm.model.language_model.embed_tokens(turn.ids)
        out = self.vlm(inputs, self.proposals.embed(embeds, turn, inputs.state))
        prompt = inputs.input_ids.shape[1]
        of_prompt = replace(out, keys=out.keys[..., :prompt, :], values=out.values[..., :prompt, :])
        read = self.proposals.read(out.hidden[:, prompt:], turn, batch.actions.shape[1])
        kv = self.knowledge(of_prompt, inputs)
        # In training, unlike in sampling, the released code hides from the DiT what is behind an episode's end.
        return replace(kv, action_mask=batch.mask), *read


class ChoiceHeads(nn.Module):
    """What Choice Policies add to the VLM: tokens behind the prompt, and the layers that read them out."""

    def __init__(self, config: ModelConfig, candidates: int, length: int) -> None:
        super().__init__()
        size, head = config.text.hidden_size, config.head
        self.candidates, self.width = candidates, head.action_dim
        self.state_projector = Projector(head.state_dim, size, size)
        self.tokens = nn.Parameter(torch.empty(length + 1, size))
        self.action_output = nn.Linear(size, candidates * head.action_dim)
        self.score_output = nn.Linear(size, candidates)

    def embed(self, state: Tensor) -> Tensor:
        """(B, state_length, S) -> the tokens [state, A_1 .. A_T, S], (B, state_length + T + 1, C)."""
        learned = self.tokens.expand(len(state), -1, -1)
        return torch.cat((self.state_projector(state.to(learned.dtype)), learned), dim=1)

    def read(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T + 1, C), what the VLM made of [A_i] and [S] -> candidates (B, N, T, A) and scores (B, N), float32."""
        chunks = self.action_output(hidden[:, :-1]).unflatten(-1, (self.candidates, self.width)).transpose(1, 2)
        return chunks.float(), self.score_output(hidden[:, -1]).float()


class ChoicePolicy(nn.Module):
    """The VLM with Choice Policies, co-trained with next-token prediction (spec section 4.2, step 1)."""

    def __init__(self, config: ModelConfig, choice: ChoiceConfig, length: int) -> None:
        super().__init__()
        self.vlm = TrainableVLM(config)
        self.choice = ChoiceHeads(config, choice.candidates, length)
        self.config, self.length = choice, length

    def forward(self, batch: RobotBatch | LanguageBatch, counts: Counts | None = None) -> StepOutput:
        """The loss of one micro-batch; counts: of the step that it is a part of."""
        if isinstance(batch, LanguageBatch):
            return self._language(batch, counts)
        return self._robot(batch, counts)

    def candidates(self, batch: RobotBatch) -> tuple[Tensor, Tensor]:
        """(B, N, T, A) chunks in the model's units and (B, N) scores, the L1 that each expects of itself."""
        out = self.vlm(batch.inputs, extra=self.choice.embed(batch.inputs.state))
        return self.choice.read(out.hidden[:, -(self.length + 1) :])

    def _robot(self, batch: RobotBatch, counts: Counts | None) -> StepOutput:
        samples = counts.samples if counts else None
        winner, regression = choice_losses(*self.candidates(batch), batch.actions, batch.mask, samples)
        loss = winner + self.config.score_weight * regression
        return StepOutput(loss, {"winner_l1": winner.detach(), "score": regression.detach(), "loss": loss.detach()})

    def _language(self, batch: LanguageBatch, counts: Counts | None) -> StepOutput:
        hidden = self.vlm(batch.inputs).hidden[:, :-1]
        labels = batch.labels[:, 1:]
        # The vocabulary is wide: only positions that count reach it.
        spoken = labels != IGNORED
        tokens = counts.tokens if counts else None
        next_token = next_token_loss(self.vlm.logits(hidden[spoken]), labels[spoken], tokens)
        return StepOutput(self.config.language_weight * next_token, {"next_token": next_token.detach()})

    @torch.no_grad()
    def predict(self, batch: RobotBatch, noise: Tensor) -> Tensor:
        """The candidate that the scores choose, (1, B, T, A) float32, the model's units. noise is not used."""
        chunks, scores = self.candidates(batch)
        return chunks[torch.arange(len(chunks)), scores.argmin(1)][None]


Policy = FlowPolicy | ChoicePolicy


def repeat_kv(kv: KVBlock, times: int) -> KVBlock:
    """The block for `times` draws, one after the other: the VLM ran once for all of them."""
    return KVBlock(
        kv.keys.repeat(1, times, 1, 1, 1),
        kv.values.repeat(1, times, 1, 1, 1),
        kv.mask.repeat(times, 1),
        kv.next_position.repeat(1, times),
        kv.action_mask.repeat(times, 1, 1),
    )


def model_config(base: ModelConfig, config: TrainConfig) -> ModelConfig:
    """The checkpoint's config with what the recipe says about action head and prompt: trained so, and saved so.

    Raises ValueError for a recipe of the other family.
    """
    if base.family != config.family:
        raise ValueError(
            f"model.checkpoint: recipe {config.recipe} trains {FAMILIES[config.family].title}, the checkpoint is of "
            f"{FAMILIES[base.family].title}: take a recipe of that model (docs/training.md), or another checkpoint"
        )
    choices = FAMILIES[base.family].choices
    if config.objective == "joint" and config.choice.candidates != choices:
        raise ValueError(f"choice.candidates: expected {choices}, as the family has; got {config.choice.candidates}")
    head = replace(
        base.head,
        local_window=config.model.local_window,
        position_offset=config.model.position_offset,
        max_prefix=longest_prefix(config.flow, config.data.chunk_length),
        action_length=config.data.chunk_length,
    )
    return replace(base, head=head, std_epsilon=STD_EPSILON, normalize_instruction=config.data.normalize_instruction)


def build_policy(config: TrainConfig, xr0: ModelConfig) -> Policy:
    """The policy on the meta device, with what shall not learn frozen: shard it, then materialise and load it."""
    with torch.device("meta"):
        policy: Policy
        if config.objective == "choice":
            policy = ChoicePolicy(xr0, config.choice, config.data.chunk_length)
        elif config.objective == "joint":
            policy = JointPolicy(xr0, config.flow, config.choice)
        else:
            policy = FlowPolicy(xr0, config.flow)
    if isinstance(policy, FlowPolicy) and not isinstance(policy, JointPolicy):
        for module in policy.vlm.behind_the_last_keys():
            module.requires_grad_(False)
        if config.model.train == "head":
            policy.vlm.requires_grad_(False)
    if not config.model.train_text_embeddings:
        policy.vlm.model.language_model.embed_tokens.requires_grad_(False)
    if config.lora.rank:
        put_adapters(policy, config.lora)
    if config.model.offload_frozen:
        policy.vlm.offload_frozen(policy, resolve_dtype(config.model.dtype))
    if config.model.checkpoint_activations and any(p.requires_grad for p in policy.vlm.model.visual.parameters()):
        policy.vlm.model.visual.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.model.checkpoint_language and config.model.train != "head":
        policy.vlm.recompute_language()
    return policy


def load_policy(policy: Policy, config: TrainConfig, xr0: ModelConfig, base: Base, device: torch.device) -> None:
    """Materialise a policy of build_policy on the device and fill it from the base, sharded or not.

    Heads that the base does not give start anew, from the run's seed. Raises ValueError if the recipe wants an action
    head that the base does not have.
    """
    if isinstance(policy, FlowPolicy) and not (base.has_head or config.model.fresh_head):
        raise ValueError(
            f"model.checkpoint: {base.folder} is a VLM without an action head; expected an XR-0 checkpoint, the recipe "
            "pretrain_vlm, or model.fresh_head=true"
        )
    policy.to_empty(device=device)
    policy.vlm.reset_tables()
    fresh = {**_fresh_heads(policy, config, xr0, base), **fresh_adapters(policy, config.run.seed)}

    def value(name: str) -> Tensor:
        return fresh[name] if name in fresh else read_tensor(base.stored[checkpoint_name(name)])

    for name, parameter in policy.named_parameters():
        set_parameter(parameter, value(name))
    if policy.vlm.host is not None:
        policy.vlm.host.fill(value, device)


def checkpoint_name(name: str) -> str:
    """A policy's parameter name -> the checkpoint's."""
    if name.startswith(PROPOSALS):
        return choice_model.checkpoint_name(name.removeprefix(PROPOSALS))
    return name.removeprefix("head.")


def set_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Fill a parameter; each process keeps its shard."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            value = value.to(parameter.device, parameter.dtype)
            # Every process has read the same values: no one needs to send them.
            shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(value)


def _fresh_heads(policy: Policy, config: TrainConfig, xr0: ModelConfig, base: Base) -> Mapping[str, Tensor]:
    """New weights, by parameter name: of the DiT if the recipe wants it new; of Choice Policies' heads where the base
    has none, as XR-0's never has."""
    if isinstance(policy, FlowPolicy):
        head = fresh_head(xr0, config.run.seed) if config.model.fresh_head else {}
        fresh = {f"head.{name}": value for name, value in head.items()}
        if isinstance(policy, JointPolicy) and not choice_model.choice_shapes(xr0).keys() <= base.stored.keys():
            fresh |= {f"{PROPOSALS}{name}": value for name, value in fresh_turn_heads(xr0, config.run.seed).items()}
        return fresh
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        heads = ChoiceHeads(xr0, config.choice.candidates, config.data.chunk_length)
        nn.init.normal_(heads.tokens, std=0.02)
    return {f"choice.{name}": p.detach() for name, p in heads.named_parameters()}
