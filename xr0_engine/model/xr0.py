"""The whole network: images and tokens -> KV block -> normalised action chunk, on one device, by reference ops."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from xr0_engine.config import ModelConfig
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.flow import Guidance, Trace, bend, prefix_positions
from xr0_engine.model.kept import Kept
from xr0_engine.model.layers import pack_linears
from xr0_engine.model.network import (
    Grids,
    Mark,
    Network,
    block_by_stages,
    full_buffer,
    own_arithmetic,
    own_gradients,
    step_by_stages,
    unmarked,
    whole_patches,
)
from xr0_engine.model.vlm import VLM, Preamble
from xr0_engine.types import KVBlock, ModelInputs, VisionTokens

MAX_KEPT_PREAMBLES = 16


class XR0Model(nn.Module):
    """A Network over loaded weights. weights.py allocates and fills it; `finish_loading` makes what depends on them.

    tells_bend: whether sampling keeps the flow's steps, which it makes anyway, and their bend for take_bend.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vlm = VLM(config)
        self.head = ActionHead(config)
        self.tells_bend = False
        self._bend: Tensor | None = None
        self._modulations: Tensor | None = None
        self._preambles: Kept[tuple[int, ...], Preamble] = Kept(MAX_KEPT_PREAMBLES)

    @property
    def device(self) -> torch.device:
        return self.head.sink.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.sink.weight.dtype

    # What is made in inference mode, a caller's too, has no gradient to be asked for.
    @torch.inference_mode(False)
    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Uninitialised storage in its final place, packed; every element must then be loaded."""
        self.to(dtype)
        self.to_empty(device=device)
        pack_linears(self)
        self.requires_grad_(False)
        self.eval()

    @own_arithmetic
    def finish_loading(self) -> None:
        """Make the adaLN table of all layers and steps: the time MLP never runs again."""
        self._modulations = self.head.modulation_table()

    def patch_buffer(self, grids: Grids) -> Tensor:
        return full_buffer(self.config.vision, grids, self.dtype)

    @own_arithmetic
    def encode_images(self, inputs: ModelInputs) -> VisionTokens:
        patches = whole_patches(inputs.pixel_values.to(self.device, self.dtype), self.config.vision)
        return self.vlm.model.visual(patches, inputs.image_grids)

    @own_arithmetic
    def prefill(self, inputs: ModelInputs, vision: VisionTokens) -> KVBlock:
        language = self.vlm.model.language_model
        is_image = inputs.input_ids == self.config.tokens.image
        if int(is_image.sum()) != len(vision.tokens):
            raise ValueError(f"input_ids hold {int(is_image.sum())} image tokens, the images give {len(vision.tokens)}")

        preamble = None if inputs.preamble_length == 0 else self.preamble(inputs)
        start = 0 if preamble is None else int((~inputs.attention_mask).sum(1).min()) + len(preamble)
        image_index = is_image[:, start:].flatten().nonzero().squeeze(1).to(self.device)
        x = language.embed_tokens(inputs.input_ids[:, start:].to(self.device))
        x.view(-1, x.shape[-1])[image_index] = vision.tokens
        mask = inputs.attention_mask.to(self.device)
        positions = inputs.position_ids.to(self.device)
        keys, values = language(
            x, positions[..., start:], mask, self.config.head.num_layers, image_index, vision.deepstack, preamble
        )
        next_position = positions.masked_fill(~mask, -1).amax(-1) + 1
        return KVBlock(keys, values, mask, next_position, inputs.action_mask.to(self.device, torch.float32))

    @own_arithmetic
    def sample(
        self, kv: KVBlock, state: Tensor, noise: Tensor, prefix: Tensor, prefix_length: Tensor, trace: Trace = None
    ) -> Tensor:
        assert self._modulations is not None, "finish_loading was not called"
        if not self.tells_bend:
            return self.head.sample(kv, state, noise, prefix, prefix_length, self._modulations, trace)
        steps: list[Tensor] = []
        chunk = self.head.sample(kv, state, noise, prefix, prefix_length, self._modulations, steps)
        given = prefix_positions(prefix_length.to(chunk.device), chunk.shape[1])
        self._bend = bend(steps, given, kv.action_mask)
        if trace is not None:
            trace.extend(steps)
        return chunk

    @own_gradients
    def sample_guided(
        self, kv: KVBlock, state: Tensor, noise: Tensor, guidance: Guidance, trace: Trace = None
    ) -> Tensor:
        """As sample, without a prefix, drawn toward a guide (on the host): each step runs the head backward too."""
        assert self._modulations is not None, "finish_loading was not called"
        kv = KVBlock(*(getattr(kv, field.name).clone() for field in fields(kv)))
        guidance = Guidance(guidance.target.to(self.device), guidance.weights.to(self.device))
        nothing = torch.zeros(len(noise), dtype=torch.long, device="cpu")
        table = self._modulations.clone()
        return self.head.sample(kv, state, noise, noise, nothing, table, trace, guidance=guidance)

    def step_guided(
        self, network: Network, inputs: ModelInputs, noise: Tensor, guidance: Guidance, mark: Mark = unmarked
    ) -> Tensor:
        """As step, drawn toward a guide. network: what runs the stages before the flow, over these weights."""
        chunk = self.sample_guided(block_by_stages(network, inputs, mark), inputs.state, noise, guidance)
        mark("flow")
        return chunk

    def step(
        self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor, mark: Mark = unmarked
    ) -> Tensor:
        return step_by_stages(self, inputs, noise, prefix, prefix_length, mark)

    def take_bend(self) -> list[float] | None:
        """flow.bend of each row that was sampled last, once; None if it was not to be told, or guided."""
        told, self._bend = self._bend, None
        return None if told is None else told.tolist()

    def preamble(self, inputs: ModelInputs) -> Preamble:
        """The kept KV of the batch's common first tokens (at least one), computed on first use."""
        pad = int((~inputs.attention_mask[0]).sum())
        ids = inputs.input_ids[0, pad : pad + inputs.preamble_length]
        return self._preambles.get(tuple(ids.tolist()), lambda: self._make_preamble(ids))

    def forget_preambles(self) -> None:
        """For whoever changes weights: what was computed with others is computed anew."""
        self._preambles = Kept(MAX_KEPT_PREAMBLES)

    @own_arithmetic
    def _make_preamble(self, ids: Tensor) -> Preamble:
        language = self.vlm.model.language_model
        x = language.embed_tokens(ids.to(self.device))[None]
        positions = torch.arange(len(ids), device=self.device).expand(3, 1, -1)
        mask = torch.ones(1, len(ids), dtype=torch.bool, device=self.device)
        keys, values = language(x, positions, mask, self.config.text.num_layers)
        return Preamble(keys[:, 0], values[:, 0])


def tell_bend(network: Network) -> bool:
    """From now on its engine's chunks say their bend. Whether they do: sampled op by op, as the steps are there then;
    what runs as a graph leaves none behind, and is not slowed down for it."""
    if isinstance(network, XR0Model):
        network.tells_bend = True
    return isinstance(network, XR0Model)


def bends_of(network: Network, rows: int) -> list[float | None]:
    """The bend of each row of the network's last call, None where it does not tell."""
    told = network.take_bend() if isinstance(network, XR0Model) else None
    return [None] * rows if told is None else list(told)
