"""The network on the GPU backend: XR0Model's interface over fused ops, static buffers and CUDA graphs.

A session holds the buffers of one case (batch, image sizes, prompt bucket, kept preamble, chunk length) and its graphs.
Everything else - prompt, images, noise, prefix, state, lengths - is device input, copied in one transfer: it recaptures
nothing. The number of sessions is bounded; the one used least recently goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from xr0_engine.config import XR0Config
from xr0_engine.fused.graph import Graph
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import FlowInputs, FusedOps
from xr0_engine.fused.staging import Staging
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.fused.vlm import FusedText, FusedVision
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.types import KVBlock, ModelInputs, VisionTokens

PROMPT_BUCKET = 32
"""Prompts are padded to a multiple of so many tokens: one captured graph serves all instructions of a bucket."""
MAX_SESSIONS = 8
PARTS = ("step", "vision", "prefill", "flow")
"""What a session replays: the whole step, or one stage."""


@dataclass(frozen=True)
class SessionKey:
    """What buffers and graphs are made for. head: ids of the prompt's kept first tokens; tokens: N, head included."""

    batch: int
    grids: tuple[tuple[int, int], ...]
    tokens: int
    head: tuple[int, ...]
    chunk_length: int


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts padded on the right: what of ModelInputs changes from call to call, as int32 arrays.

    ids, image_index: (B, M); positions: (3, B, M); next_position: (3, B); lengths: (B,), head included.
    """

    ids: np.ndarray
    image_index: np.ndarray
    positions: np.ndarray
    next_position: np.ndarray
    lengths: np.ndarray


class FusedModel:
    """Shares a loaded model's weights; makes their layout the kernels' own, which the model itself understands too.

    backend: of FusedOps. table: the tactics to run with. graphs: capture and replay (a CUDA GPU), or run op by op.
    """

    def __init__(self, model: XR0Model, backend: str, table: TacticTable, graphs: bool) -> None:
        self.reference, self.config = model, model.config
        self.table, self.backend, self.graphs = table, backend, graphs
        language = model.vlm.model.language_model
        with torch.inference_mode():
            self.vision, self.text, self.head = (
                FusedVision(model.vlm.model.visual),
                FusedText(language),
                FusedHead(model.head),
            )
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self._flows: OrderedDict[tuple[int, int, int], FlowSession] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.reference.device

    @property
    def dtype(self) -> torch.dtype:
        return self.reference.dtype

    def ops(self) -> FusedOps:
        """Fused ops for one stream, with scratch memory of their own."""
        return FusedOps(self.backend, self.device, self.table.tactics)

    @torch.inference_mode()
    def encode_images(self, inputs: ModelInputs) -> VisionTokens:
        """As XR0Model.encode_images, op by op."""
        buffers = self.vision.buffers(inputs.image_grids)
        self.vision.run(self.ops(), inputs.pixel_values.to(self.device, self.dtype), buffers)
        return VisionTokens(buffers.tokens[0], tuple(tap[0] for tap in buffers.deepstack))

    @torch.inference_mode()
    def prefill(self, inputs: ModelInputs, vision: VisionTokens) -> KVBlock:
        """As XR0Model.prefill, op by op; the block lies as the inputs do, padded on the left."""
        session = self.session(inputs)
        session.prefill_with(inputs, vision)
        mask = inputs.attention_mask.to(self.device)
        keys, values = (_left_padded(t, mask) for t in (session.flow_inputs.keys, session.flow_inputs.values))
        next_position = session.flow_inputs.next_position.long()
        return KVBlock(keys, values, mask, next_position, inputs.action_mask.to(self.device, torch.float32))

    @torch.inference_mode()
    def sample(
        self,
        kv: KVBlock,
        state: Tensor,
        noise: Tensor,
        prefix: Tensor,
        prefix_length: Tensor,
        trace: list[Tensor] | None = None,
    ) -> Tensor:
        """As XR0Model.sample, from a kept KV block. Raises ValueError if a row's tokens have a gap between them.

        With a trace, and where there are no graphs, op by op.
        """
        if trace is not None or not self.graphs:
            return sample_fused(self.head, self.ops(), kv, state, noise, prefix, prefix_length, trace)
        batch, tokens = kv.mask.shape
        key = (batch, _bucket(tokens), noise.shape[1])
        if key not in self._flows:
            if len(self._flows) >= MAX_SESSIONS:
                self._flows.popitem(last=False)[1].close()
            self._flows[key] = FlowSession(self, *key)
        self._flows.move_to_end(key)
        return self._flows[key].sample(kv, state, noise, prefix, prefix_length)

    @torch.inference_mode()
    def step(self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor) -> Tensor:
        """The whole step, patches to chunk: (B, T, A) float32 on the device, which the next call overwrites.

        noise, prefix: (B, T, A) float32; prefix_length: (B,).
        """
        session = self.session(inputs)
        session.update(inputs, noise, prefix, prefix_length)
        session.replay()
        return session.chunk

    @torch.inference_mode()
    def step_ahead(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        prefix: Tensor,
        prefix_length: Tensor,
        upcoming: Callable[[], ModelInputs],
    ) -> tuple[Tensor, ModelInputs]:
        """As step; the next call's inputs are prepared on the host, and their images encoded, under this call's flow.

        upcoming: makes the next call's inputs. Returns the chunk and these inputs: when they, the same object, are what
        is stepped next, their images are encoded already. Inputs of another session are encoded when their time comes.
        """
        session = self.session(inputs)
        session.update(inputs, noise, prefix, prefix_length)
        session.replay_to_prefill()
        following = session.flow_beside(upcoming)
        return session.chunk, following

    def session(self, inputs: ModelInputs) -> Session:
        """The buffers and graphs for these inputs, made on first use."""
        key = session_key(inputs)
        if key not in self._sessions:
            if len(self._sessions) >= MAX_SESSIONS:
                self._sessions.popitem(last=False)[1].close()
            self._sessions[key] = Session(self, key, inputs)
        self._sessions.move_to_end(key)
        return self._sessions[key]


class Session:
    """The buffers of one case, and its graphs. chunk: (B, T, A) float32, where a step leaves its result."""

    def __init__(self, model: FusedModel, key: SessionKey, inputs: ModelInputs) -> None:
        self.model, self.key = model, key
        self._graphs: dict[str, Graph] = {}
        self._encoded: ModelInputs | None = None
        self._ahead = Staging({"patches": _fields(model.config, key, model.dtype)["patches"]}, model.device)
        self.staging = Staging(_fields(model.config, key, model.dtype), model.device)
        on_device = self.staging.device
        self.ops, self.flow_ops = model.ops(), model.ops()
        self.vision = model.vision.buffers(key.grids)
        self.text = model.text.buffers(key.batch, key.tokens, len(key.head))
        self.flow = model.head.buffers(key.batch, key.chunk_length)
        if key.head:
            kept = model.reference.preamble(inputs)
            self.text.keys[..., : len(key.head), :] = kept.keys[:, None]
            self.text.values[..., : len(key.head), :] = kept.values[:, None]
        first = model.config.text.num_layers - model.config.head.num_layers
        self.flow_inputs = FlowInputs(
            keys=self.text.keys[first:],
            values=self.text.values[first:],
            begin=torch.zeros(key.batch, dtype=torch.int32, device=model.device),
            end=on_device["lengths"],
            next_position=on_device["next_position"],
            state=on_device["state"],
            noise=on_device["noise"],
            prefix=on_device["prefix"],
            prefix_length=on_device["prefix_length"],
            action_mask=on_device["action_mask"],
        )
        self.chunk = self.flow.z[model.head.steps % 2]

    def update(self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor) -> None:
        """Everything that changes, to the device in one transfer."""
        host = self.staging.host
        self.staging.wait()
        self._stage(right_padded(inputs, self.key, self.model.config))
        if self._encoded is not inputs:
            self._encoded = None
            host["patches"].copy_(inputs.pixel_values)
        for name, value in (
            ("state", inputs.state),
            ("action_mask", inputs.action_mask),
            ("noise", noise),
            ("prefix", prefix),
            ("prefix_length", prefix_length),
        ):
            host[name].copy_(value)
        self._upload()

    @torch.inference_mode()
    def prefill_with(self, inputs: ModelInputs, vision: VisionTokens) -> None:
        """The KV block of image tokens that the caller has, op by op."""
        self.staging.wait()
        self._stage(right_padded(inputs, self.key, self.model.config))
        self._upload()
        self._encoded = None
        self.vision.tokens.copy_(vision.tokens)
        for own, given in zip(self.vision.deepstack, vision.deepstack, strict=True):
            own.copy_(given)
        self.prefill()

    def _stage(self, prompts: Prompts) -> None:
        for name, value in vars(prompts).items():
            self.staging.host[name].copy_(torch.from_numpy(value))

    def _upload(self) -> None:
        """Behind what may still read the inputs: images that are being encoded ahead."""
        if self.model.graphs:
            torch.cuda.current_stream().wait_stream(self._side_stream)
        self.staging.upload()

    def replay(self, part: str = "step") -> None:
        """The whole step on what was uploaded last, or one stage of PARTS on what the stages before it left.

        The graph of each is captured the first time.
        """
        if part == "step" and self._encoded is not None:
            self.replay_to_prefill()
            part = "flow"
        if self.model.graphs:
            self.graph(part).replay()
        else:
            self._work(part)()

    def replay_to_prefill(self) -> None:
        """The step up to the KV block, without the images if they were encoded ahead."""
        if self._encoded is None:
            self.replay("vision")
        self._encoded = None
        self.replay("prefill")

    def flow_beside(self, upcoming: Callable[[], ModelInputs]) -> ModelInputs:
        """The flow, and beside it the images of the next call, if its inputs belong to this session."""
        prefilled = torch.cuda.Event() if self.model.graphs else None
        if prefilled is not None:
            prefilled.record()
        self.replay("flow")
        following = upcoming()
        if session_key(following) != self.key:
            return following
        self._ahead.wait()
        self._ahead.host["patches"].copy_(following.pixel_values)
        if prefilled is None:
            self._encode_ahead()
        else:
            with torch.cuda.stream(self._side_stream):
                self._side_stream.wait_event(prefilled)
                self._encode_ahead()
        self._encoded = following
        return following

    def _encode_ahead(self) -> None:
        self._ahead.upload()
        self.staging.device["patches"].copy_(self._ahead.device["patches"])
        self.replay("vision")

    def graph(self, part: str = "step") -> Graph:
        """The captured graph of a part. Raises NotImplementedError where there is no CUDA GPU."""
        if part not in self._graphs:
            name = f"{part} {self.key.batch}x{self.key.tokens}"
            self._graphs[part] = Graph(self._work(part), self.model.device, name)
        return self._graphs[part]

    def _work(self, part: str) -> Callable[[], None]:
        return {"step": self.run, "vision": self.encode, "prefill": self.prefill, "flow": self.sample}[part]

    @torch.inference_mode()
    def run(self) -> None:
        """The whole step, op by op."""
        self.encode()
        if self.model.table.overlap and self.model.device.type == "cuda":
            self._prefill_beside_flow()
        else:
            self.prefill()
            self.sample()

    @torch.inference_mode()
    def encode(self) -> None:
        self.model.vision.run(self.ops, self.staging.device["patches"], self.vision)

    @torch.inference_mode()
    def prefill(self) -> None:
        self._prefill(lambda index: None)

    @torch.inference_mode()
    def sample(self) -> None:
        persistent = self.model.table.flow == "persistent"
        self.model.head.run(self.flow_ops, self.flow_inputs, self.flow, persistent=persistent)

    def close(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _prefill(self, layer_done) -> None:  # type: ignore[no-untyped-def]
        on_device = self.staging.device
        self.model.text.run(
            self.ops, on_device["ids"], on_device["positions"], on_device["image_index"], self.vision.tokens[0],
            tuple(tap[0] for tap in self.vision.deepstack), self.text, layer_done,
        )  # fmt: skip

    def _prefill_beside_flow(self) -> None:
        """Layer i of the flow's first step starts when VLM layer L - 16 + i has left its keys and values."""
        head, first = self.model.head, self.model.config.text.num_layers - self.model.config.head.num_layers
        main, side = torch.cuda.current_stream(), self._side_stream
        side.wait_stream(main)
        with torch.cuda.stream(side):
            head.begin(self.flow_ops, self.flow_inputs, self.flow)

        def chase(index: int) -> None:
            if index >= first:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    head.layer(self.flow_ops, self.flow_inputs, self.flow, 0, index - first)

        self._prefill(chase)
        main.wait_stream(side)
        head.end_step(self.flow_ops, self.flow_inputs, self.flow, 0)
        head.finish(self.flow_ops, self.flow_inputs, self.flow, 1)

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.model.device)


class FlowSession:
    """The flow alone, on KV blocks that were kept: static buffers and a graph for one batch, bucket and length."""

    def __init__(self, model: FusedModel, batch: int, tokens: int, chunk_length: int) -> None:
        head, device = model.config.head, model.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        cache = (head.num_layers, batch, head.num_kv_heads, tokens, head.head_dim)
        chunk = (batch, chunk_length, head.action_dim)
        self.inputs = FlowInputs(
            keys=zeros(*cache, dtype=model.dtype),
            values=zeros(*cache, dtype=model.dtype),
            begin=zeros(batch, dtype=torch.int32),
            end=zeros(batch, dtype=torch.int32),
            next_position=zeros(3, batch, dtype=torch.int32),
            state=zeros(batch, head.state_length, head.state_dim, dtype=model.dtype),
            noise=zeros(*chunk),
            prefix=zeros(*chunk),
            prefix_length=zeros(batch, dtype=torch.int32),
            action_mask=zeros(*chunk),
        )
        self._buffers, self._ops, self._head = model.head.buffers(batch, chunk_length), model.ops(), model.head
        self._persistent = model.table.flow == "persistent"
        self._graph = Graph(self._run, device, f"flow {batch}x{tokens}")

    def sample(self, kv: KVBlock, state: Tensor, noise: Tensor, prefix: Tensor, prefix_length: Tensor) -> Tensor:
        begin, end = _visible_range(kv.mask)
        tokens, held = kv.mask.shape[1], self.inputs
        held.keys[..., :tokens, :].copy_(kv.keys)
        held.values[..., :tokens, :].copy_(kv.values)
        for target, value in (
            (held.begin, begin),
            (held.end, end),
            (held.next_position, kv.next_position),
            (held.state, state),
            (held.noise, noise),
            (held.prefix, prefix),
            (held.prefix_length, prefix_length),
            (held.action_mask, kv.action_mask),
        ):
            target.copy_(value)
        self._graph.replay()
        return self._buffers.z[self._head.steps % 2].clone()

    def close(self) -> None:
        self._graph.close()

    @torch.inference_mode()
    def _run(self) -> None:
        self._head.run(self._ops, self.inputs, self._buffers, persistent=self._persistent)


@torch.inference_mode()
def sample_fused(
    head: FusedHead,
    ops: FusedOps,
    kv: KVBlock,
    state: Tensor,
    noise: Tensor,
    prefix: Tensor,
    prefix_length: Tensor,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """One chunk per row of a KV block, op by op: (B, T, A) float32. As ActionHead.sample."""
    weight = head.head.sink.weight
    device, dtype = weight.device, weight.dtype
    begin, end = _visible_range(kv.mask)

    def moved(value: Tensor, to: torch.dtype) -> Tensor:
        return value.to(device, to).contiguous()

    inputs = FlowInputs(
        keys=kv.keys,
        values=kv.values,
        begin=begin,
        end=end,
        next_position=moved(kv.next_position, torch.int32),
        state=moved(state, dtype),
        noise=moved(noise, torch.float32),
        prefix=moved(prefix, torch.float32),
        prefix_length=moved(prefix_length, torch.int32),
        action_mask=moved(kv.action_mask, torch.float32),
    )
    return head.run(ops, inputs, head.buffers(*noise.shape[:2]), trace)


def session_key(inputs: ModelInputs) -> SessionKey:
    batch, columns = inputs.attention_mask.shape
    longest = int(inputs.attention_mask.sum(1).max())
    pad = columns - int(inputs.attention_mask[0].sum())
    head = inputs.input_ids[0, pad : pad + inputs.preamble_length]
    return SessionKey(
        batch=batch,
        grids=inputs.image_grids,
        tokens=_bucket(longest),
        head=tuple(head.tolist()),
        chunk_length=inputs.action_mask.shape[1],
    )


def _bucket(tokens: int) -> int:
    return -(-tokens // PROMPT_BUCKET) * PROMPT_BUCKET


def right_padded(inputs: ModelInputs, key: SessionKey, config: XR0Config) -> Prompts:
    """Prompts padded on the left, as ModelInputs has them, to the session's layout, without the kept preamble.

    Raises ValueError if image tokens and images do not match.
    """
    ids, mask = inputs.input_ids.numpy(), inputs.attention_mask.numpy()
    positions = inputs.position_ids.numpy()
    head, own = len(key.head), key.tokens - len(key.head)
    out = Prompts(
        ids=np.zeros((key.batch, own), np.int32),
        image_index=np.full((key.batch, own), -1, np.int32),
        positions=np.zeros((3, key.batch, own), np.int32),
        next_position=np.zeros((3, key.batch), np.int32),
        lengths=mask.sum(1).astype(np.int32),
    )
    images = 0
    for row, keep in enumerate(mask):
        kept_ids, kept_positions = ids[row, keep], positions[:, row, keep]
        count = len(kept_ids) - head
        out.ids[row, :count] = kept_ids[head:]
        out.positions[:, row, :count] = kept_positions[:, head:]
        out.next_position[:, row] = kept_positions.max(1) + 1
        slots = np.flatnonzero(kept_ids[head:] == config.tokens.image)
        out.image_index[row, slots] = np.arange(images, images + len(slots))
        images += len(slots)
    expected = sum(height * width for height, width in key.grids) // config.vision.spatial_merge_size**2
    if images != expected:
        raise ValueError(f"input_ids hold {images} image tokens, the images give {expected}")
    return out


def _fields(config: XR0Config, key: SessionKey, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is uploaded for a step: name -> shape and dtype."""
    head, vision = config.head, config.vision
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = sum(height * width for height, width in key.grids)
    batch, own = key.batch, key.tokens - len(key.head)
    chunk = (batch, key.chunk_length, head.action_dim)
    return {
        "patches": ((patches, patch_dim), dtype),
        "ids": ((batch, own), torch.int32),
        "image_index": ((batch, own), torch.int32),
        "positions": ((3, batch, own), torch.int32),
        "next_position": ((3, batch), torch.int32),
        "lengths": ((batch,), torch.int32),
        "state": ((batch, head.state_length, head.state_dim), dtype),
        "noise": (chunk, torch.float32),
        "prefix": (chunk, torch.float32),
        "prefix_length": ((batch,), torch.int32),
        "action_mask": (chunk, torch.float32),
    }


def _left_padded(cache: Tensor, mask: Tensor) -> Tensor:
    """(L, B, G, tokens, D) padded on the right -> (L, B, G, N, D) as mask (B, N) has it; padding is zero."""
    source = (mask.cumsum(1) - 1).clamp(min=0)
    index = source[None, :, None, :, None].expand(len(cache), -1, cache.shape[2], -1, cache.shape[4])
    return cache.gather(3, index) * mask[:, None, :, None]


def _visible_range(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) bool -> first visible token and one past the last, (B,) int32 each. Raises ValueError for gaps."""
    count, begin = mask.sum(1), mask.int().argmax(1)
    column = torch.arange(mask.shape[1], device=mask.device)
    end = begin + count
    if not bool((mask == ((column >= begin[:, None]) & (column < end[:, None]))).all()):
        raise ValueError("mask: expected one run of visible tokens in each row, got a gap")
    return begin.int(), end.int()
