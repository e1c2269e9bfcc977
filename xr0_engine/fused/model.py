"""The network on the GPU backend: Network's face over fused ops, static buffers and CUDA graphs.

A session holds the buffers of one case (batch, image sizes, prompt bucket, kept preamble, chunk length) and its graphs.
The number of sessions is bounded; the one used least recently goes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xr0_engine.fused.lookahead import Launched, Lookahead
from xr0_engine.fused.parts import FusedParts
from xr0_engine.fused.prompts import SessionKey, bucket, left_padded, session_key
from xr0_engine.fused.session import FlowSession, Session
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.flow import Trace
from xr0_engine.model.kept import Kept
from xr0_engine.model.network import Grids, Mark, Network, own_arithmetic, unmarked
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.robot.patches import made_on
from xr0_engine.types import KVBlock, ModelInputs, VisionTokens

MAX_SESSIONS = 8


class FusedModel(FusedParts):
    """A Network: `step` replays a graph, its stages run op by op. lookahead: where the table has it, of a GPU."""

    def __init__(self, model: XR0Model, backend: str, table: TacticTable, graphs: bool) -> None:
        super().__init__(model, backend, table, graphs)
        self._sessions: Kept[SessionKey, Session] = Kept(MAX_SESSIONS, Session.close)
        self._flows: Kept[tuple[int, int, int], FlowSession] = Kept(MAX_SESSIONS, FlowSession.close)
        self.lookahead = Lookahead(self.device) if table.ahead and self.device.type == "cuda" else None

    def patch_buffer(self, grids: Grids) -> Tensor:
        """One frame's patches in the model's dtype: on the GPU where they can be made there, else for it to copy."""
        vision, place = self.config.vision, made_on(self.device, self.config.vision.patch_size)
        shape = (sum(height * width for height, width in grids), vision.frame_dim)
        pinned = place.type != self.device.type
        return torch.empty(shape, dtype=self.dtype, device=place, pin_memory=pinned)

    @own_arithmetic
    def encode_images(self, inputs: ModelInputs) -> VisionTokens:
        buffers = self.vision.buffers(inputs.image_grids)
        self.vision.run(self.ops(), inputs.pixel_values.to(self.device, self.dtype), buffers)
        return VisionTokens(buffers.tokens[0], tuple(tap[0] for tap in buffers.deepstack))

    @own_arithmetic
    def prefill(self, inputs: ModelInputs, vision: VisionTokens) -> KVBlock:
        """As Network.prefill; the block lies as the inputs do, padded on the left."""
        session = self.session(inputs)
        session.prefill_with(inputs, vision)
        mask = inputs.attention_mask.to(self.device)
        keys, values = (left_padded(t, mask) for t in (session.flow_inputs.keys, session.flow_inputs.values))
        next_position = session.flow_inputs.next_position.long()
        return KVBlock(keys, values, mask, next_position, inputs.action_mask.to(self.device, torch.float32))

    @own_arithmetic
    def sample(
        self, kv: KVBlock, state: Tensor, noise: Tensor, prefix: Tensor, prefix_length: Tensor, trace: Trace = None
    ) -> Tensor:
        """As Network.sample. Raises ValueError if a row's tokens have a gap between them."""
        batch, tokens = kv.mask.shape
        key = (batch, bucket(tokens), noise.shape[1])

        def make() -> FlowSession:
            return FlowSession(self.head, self.ops(), *key, graphs=self.graphs, flow=self.table.flow)

        return self._flows.get(key, make).sample(kv, state, noise, prefix, prefix_length, trace)

    @own_arithmetic
    def step(
        self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor, mark: Mark = unmarked
    ) -> Tensor:
        """As Network.step; two uploads, patches and the rest, and one graph."""
        session = self.session(inputs)
        session.update(inputs, noise, prefix, prefix_length)
        session.replay()
        mark("step")
        return session.chunk

    def launch(self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor) -> Launched:
        """As step, bit by bit, but waits for nothing: the next launch's vision runs beside this one's flow. For a model
        with lookahead."""
        assert self.lookahead is not None
        return self.lookahead.launch(self.session(inputs), inputs, noise, prefix, prefix_length)

    def session(self, inputs: ModelInputs) -> Session:
        """The buffers and graphs for these inputs, made on first use."""
        key = session_key(inputs)
        return self._sessions.get(key, lambda: Session(self, key, inputs))


def reference_of(network: Network, what: str) -> XR0Model:
    """The network by PyTorch's operators, of the same weights: itself, or what a FusedModel was made of. Raises
    NotImplementedError that names what it is for if there is none."""
    reference = network.reference if isinstance(network, FusedModel) else network
    if not isinstance(reference, XR0Model):
        raise NotImplementedError(
            f"{what}: an export's graphs have no gradients, and no attention to show; load the checkpoint that was "
            "exported, with Engine.from_pretrained"
        )
    return reference
