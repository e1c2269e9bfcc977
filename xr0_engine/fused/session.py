"""The buffers of one case and its CUDA graphs: of a whole step, and of the flow alone on a KV block that was kept.

Everything but the case - prompt, images, noise, prefix, state, lengths - is device input: it recaptures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.fused.graph import Graph, wait_for_stream
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import Flow, FlowInputs, FusedOps
from xr0_engine.fused.parts import FusedParts
from xr0_engine.fused.prompts import SessionKey, right_padded, visible_range
from xr0_engine.fused.sizing import reserve
from xr0_engine.fused.staging import Staging
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.flow import Trace
from xr0_engine.types import KVBlock, ModelInputs, VisionTokens

PARTS = ("step", "vision", "prefill", "flow")
"""What a session replays: the whole step, or one stage."""


class Session:
    """The buffers of one case, and its graphs. chunk: (B, T, A) float32, where a step leaves its result.

    vision_free: on a GPU, the event behind what was queued last of all that reads or writes the vision's buffers.
    """

    def __init__(
        self,
        model: FusedParts,
        key: SessionKey,
        inputs: ModelInputs,
        table: TacticTable | None = None,
        graphs: bool | None = None,
    ) -> None:
        """inputs: of this case; their preamble's keys and values are kept. table, graphs: None is the model's.

        Raises ValueError for pixel_values that have other columns than patches.
        """
        model.config.vision.frames_of(key.patch_columns)
        self.model, self.key = model, key
        self.table = model.table if table is None else table
        self.graphs = model.graphs if graphs is None else graphs
        self._graphs: dict[str, Graph] = {}
        self.staging = Staging(_fields(model.config, key, model.dtype), model.device)
        on_device = self.staging.device
        patches = sum(height * width for height, width in key.grids)
        self.patches = torch.zeros(patches, key.patch_columns, dtype=model.dtype, device=model.device)
        self.ops, self.flow_ops = model.ops(self.table), model.ops(self.table)
        self.vision = model.vision.buffers(key.grids)
        self.text = model.text.buffers(key.batch, key.tokens, len(key.preamble))
        self.flow = model.head.buffers(key.batch, key.chunk_length)
        if key.preamble:
            kept = model.reference.preamble(inputs)
            self.text.keys[..., : len(key.preamble), :] = kept.keys[:, None]
            self.text.values[..., : len(key.preamble), :] = kept.values[:, None]
        self._first_read = model.config.first_read_layer
        self.flow_inputs = FlowInputs(
            keys=self.text.keys[self._first_read :],
            values=self.text.values[self._first_read :],
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
        reserve(self.ops, self._encode, self._prefill)
        # The flow that begins beside the prefill is chained, whatever the table says.
        flows: set[Flow] = {self.way} | ({"chained"} if self.overlapped else set())
        reserve(self.flow_ops, *(partial(self._sample, flow=flow) for flow in flows))
        self.vision_free = torch.cuda.Event() if model.device.type == "cuda" else None
        self._note_vision()

    @property
    def way(self) -> Flow:
        """How the flow runs behind the prefill: as the table has it, where that is for these sizes."""
        return self.model.head.way(self.table.flow, self.flow_ops, self.flow_inputs, self.flow)

    # Here too: buffers that were made in inference mode can be written in it alone.
    @torch.inference_mode()
    def update(self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor) -> None:
        """Everything that changes, to the device: the patches from where they were made, the rest in one transfer.

        Raises ValueError for pixel_values of another shape than the session's.
        """
        self.update_patches(inputs)
        self.update_rest(inputs, noise, prefix, prefix_length)

    @torch.inference_mode()
    def update_patches(self, inputs: ModelInputs) -> None:
        """What the vision reads. As update."""
        if inputs.pixel_values.shape != self.patches.shape:
            given = tuple(inputs.pixel_values.shape)
            raise ValueError(f"pixel_values: expected shape {tuple(self.patches.shape)}, got {given}")
        self.patches.copy_(inputs.pixel_values, non_blocking=True)

    @torch.inference_mode()
    def update_rest(self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor) -> None:
        """What the prefill and the flow read. As update."""
        self._upload(
            inputs,
            state=inputs.state,
            action_mask=inputs.action_mask,
            noise=noise,
            prefix=prefix,
            prefix_length=prefix_length,
        )

    @torch.inference_mode()
    def prefill_with(self, inputs: ModelInputs, vision: VisionTokens) -> None:
        """The KV block of image tokens that the caller has, op by op."""
        self._upload(inputs)
        self.vision.tokens.copy_(vision.tokens)
        for own, given in zip(self.vision.deepstack, vision.deepstack, strict=True):
            own.copy_(given)
        self.prefill()
        self._note_vision()

    def chunk_on_host(self) -> Tensor:
        """A copy of the chunk, which is there once the current stream is."""
        copy = torch.empty(self.chunk.shape, pin_memory=self.chunk.is_cuda)
        return copy.copy_(self.chunk, non_blocking=True)

    def _upload(self, inputs: ModelInputs, **fields: Tensor) -> None:
        self.staging.wait()
        prompts = {
            name: torch.from_numpy(value)
            for name, value in vars(right_padded(inputs, self.key, self.model.config)).items()
        }
        for name, value in (prompts | fields).items():
            self.staging.host[name].copy_(value)
        self.staging.upload()

    @property
    def overlapped(self) -> int:
        """Beside how many of the VLM's last layers the flow's first step runs; none without a GPU's streams."""
        if self.model.device.type != "cuda":
            return 0
        layers = self.model.head.config.num_layers
        return layers if self.table.overlap is True else min(self.table.overlap, layers)

    def replay(self, part: str = "step") -> None:
        """The whole step on what was uploaded last, or one stage of PARTS on what the stages before it left.

        The graph of each is captured the first time.
        """
        if self.graphs:
            self.graph(part).replay()
        else:
            self._work(part)()
        if part != "flow":
            self._note_vision()

    def _note_vision(self) -> None:
        if self.vision_free is not None:
            self.vision_free.record(torch.cuda.current_stream(self.model.device))

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
        if self.overlapped:
            self._prefill_beside_flow(self.overlapped)
        else:
            self.prefill()
            self.sample()

    @torch.inference_mode()
    def encode(self) -> None:
        self._encode(self.ops)

    @torch.inference_mode()
    def prefill(self) -> None:
        self._prefill(self.ops)

    @torch.inference_mode()
    def sample(self) -> None:
        self._sample(self.flow_ops, self.way)

    def close(self) -> None:
        """Wait for the work queued on the current stream and for the last replays, and free the graphs.

        The buffers may be freed then; a later replay captures anew.
        """
        wait_for_stream(self.model.device)
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _encode(self, ops: FusedOps) -> None:
        self.model.vision.run(ops, self.patches, self.vision)

    def _sample(self, ops: FusedOps, flow: Flow) -> None:
        self.model.head.run(ops, self.flow_inputs, self.flow, flow=flow)

    def _prefill(self, ops: FusedOps, layer_done: Callable[[int], None] = lambda index: None) -> None:
        on_device = self.staging.device
        self.model.text.run(
            ops, on_device["ids"], on_device["positions"], on_device["image_index"], self.vision.tokens[0],
            tuple(tap[0] for tap in self.vision.deepstack), self.text, layer_done,
        )  # fmt: skip

    def _prefill_beside_flow(self, layers: int) -> None:
        """Layer i of the flow's first step starts when the VLM layer that it reads has left its keys and values, and
        none before the last `layers` of the VLM: sooner, they only wait, and are in the way of its own kernels."""
        head, first = self.model.head, self._first_read
        begin = head.config.num_layers - layers
        main, side = torch.cuda.current_stream(self.model.device), self._side_stream

        def chase(index: int) -> None:
            last = index - first
            if last >= begin:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    for layer in range(0 if last == begin else last, last + 1):
                        head.layer(self.flow_ops, self.flow_inputs, self.flow, 0, layer)

        side.wait_stream(main)
        try:
            with torch.cuda.stream(side):
                head.begin(self.flow_ops, self.flow_inputs, self.flow)
            self._prefill(self.ops, chase)
        finally:
            # After a failure too: a capture ends cleanly, and buffers are used again, only when all of it is joined.
            main.wait_stream(side)
        head.end_step(self.flow_ops, self.flow_inputs, self.flow, 0)
        head.finish(self.flow_ops, self.flow_inputs, self.flow, 1)

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.model.device)


class FlowSession:
    """The flow alone, on KV blocks that were kept: static buffers for one batch, bucket and chunk length.

    graphs: capture and replay (a CUDA GPU), or run op by op. way: how the flow runs: as asked for, where that is for
    these sizes.
    """

    def __init__(
        self,
        head: FusedHead,
        ops: FusedOps,
        batch: int,
        tokens: int,
        chunk_length: int,
        *,
        graphs: bool = False,
        flow: Flow = "chained",
    ) -> None:
        config, sink = head.config, head.head.sink.weight

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=sink.device)

        cache = (config.num_layers, batch, config.num_kv_heads, tokens, config.head_dim)
        chunk = (batch, chunk_length, config.action_dim)
        self.inputs = FlowInputs(
            keys=zeros(*cache, dtype=sink.dtype),
            values=zeros(*cache, dtype=sink.dtype),
            begin=zeros(batch, dtype=torch.int32),
            end=zeros(batch, dtype=torch.int32),
            next_position=zeros(3, batch, dtype=torch.int32),
            state=zeros(batch, config.state_length, config.state_dim, dtype=sink.dtype),
            noise=zeros(*chunk),
            prefix=zeros(*chunk),
            prefix_length=zeros(batch, dtype=torch.int32),
            action_mask=zeros(*chunk),
        )
        self._buffers, self._ops, self._head = head.buffers(batch, chunk_length), ops, head
        self.way, self._graphs = head.way(flow, ops, self.inputs, self._buffers), graphs
        self._graph: Graph | None = None
        if graphs:
            # As it is to run and, for a trace, as a chain, whichever comes first.
            ways: set[Flow] = {self.way, "chained"}
            reserve(ops, *(partial(self._run, flow=way) for way in ways))

    @torch.inference_mode()
    def sample(
        self, kv: KVBlock, state: Tensor, noise: Tensor, prefix: Tensor, prefix_length: Tensor, trace: Trace = None
    ) -> Tensor:
        """As Network.sample; with a trace op by op. Raises ValueError if a row's tokens have a gap between them."""
        begin, end = visible_range(kv.mask)
        tokens, held = kv.mask.shape[1], self.inputs
        for target, value in (
            (held.keys[..., :tokens, :], kv.keys),
            (held.values[..., :tokens, :], kv.values),
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
        if trace is not None or not self._graphs:
            self.run(trace)
        else:
            if self._graph is None:
                self._graph = Graph(self.run, held.keys.device, f"flow {held.keys.shape[1]}x{held.keys.shape[3]}")
            self._graph.replay()
        return self._buffers.z[self._head.steps % 2].clone()

    def close(self) -> None:
        """As Session.close."""
        wait_for_stream(self.inputs.keys.device)
        if self._graph is not None:
            self._graph.close()
        self._graph = None

    @torch.inference_mode()
    def run(self, trace: Trace = None) -> None:
        """Op by op; with a trace, which nothing else leaves, as a chain of kernels."""
        self._run(self._ops, self.way if trace is None else "chained", trace)

    def _run(self, ops: FusedOps, flow: Flow, trace: Trace = None) -> None:
        self._head.run(ops, self.inputs, self._buffers, trace, flow=flow)


def _fields(config: ModelConfig, key: SessionKey, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is uploaded for a step: name -> shape and dtype."""
    head = config.head
    batch, own = key.batch, key.tokens - len(key.preamble)
    chunk = (batch, key.chunk_length, head.action_dim)
    return {
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
