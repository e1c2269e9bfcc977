"""A step's fused ops, written down by the step itself: on paper, from sizes alone, or while it runs.

Whoever counts, times or compiles what a step is made of takes it from here: none of them knows how a network is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from xr0_engine.bench.step.workload import Workload
from xr0_engine.config import ModelConfig
from xr0_engine.fused.backends import LOOP, loop_shapes
from xr0_engine.fused.ops import Flow, FlowBuffers, FlowInputs, FlowWeights, FusedOps, Shape, Weight, tactic_key
from xr0_engine.fused.parts import FusedParts
from xr0_engine.fused.session import FlowSession
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.layers import PackedLinears, pack_linears
from xr0_engine.model.xr0 import XR0Model

META = torch.device("meta")
STAGES = ("vision", "prefill", "flow")
WRITTEN = {"linear": (2,), "swiglu": (2,), "qkv": (2, 3, 4), "attention": (3,), "lambda_attention": (7,)}
"""Kind -> which of its arguments it writes."""
LOOP_READS = ("state_hidden", "cos", "sin", "scratch", "fragments")
"""Buffers that no flow loop with tactics writes; the last are a streamed one's."""
LOOP_HANDS_ON = ("start", "start_sums", "end", "end_sums", "z")
"""Buffers that one launch of a flow loop takes over from the one ahead."""
LOOP_SCRATCH = ("q", "k", "v", "raw", "mixed", "hidden", "embedded", "wide")
"""Buffers that only stages of one launch hand to each other, some of them or others."""
LABELS = {
    "patch_embed.proj": "patch embedding",
    **dict.fromkeys(("attn.qkv", "attn.qkv_proj", "self_attn"), "QKV"),
    **dict.fromkeys(("attn.proj", "attn.o_proj", "self_attn.o_proj"), "output"),
    "mlp.linear_fc1": "MLP in",
    "mlp.linear_fc2": "MLP out",
    **dict.fromkeys(("merger.linear_fc1", "deepstack_merger_list.*.linear_fc1"), "merger in"),
    **dict.fromkeys(("merger.linear_fc2", "deepstack_merger_list.*.linear_fc2"), "merger out"),
    "mlp": "gate and up",
    "mlp.down_proj": "down",
    "state_projector.layers.0": "state in",
    "state_projector.layers.2": "state out",
    "action_projector.layers.0": "actions in",
    "action_projector.layers.2": "actions out",
    "action_output_layer.layers.0": "velocity in",
    "action_output_layer.layers.2": "velocity out",
}
"""End of the name of the module whose weight an op reads -> what people call the op."""


@dataclass
class Call:
    """Calls of one kind and shape: the first one's arguments, and how often there are such calls in a step.

    shape: as tactic_key has it. stage, name: where in the model; layer: whose weight it reads, by its name in a
    checkpoint, one of several that are one product; empty where that was not asked.
    """

    kind: str
    shape: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    count: int = 0
    stage: str = ""
    name: str = ""
    layer: str = ""

    def written(self) -> list[Tensor]:
        if self.kind.startswith(LOOP):
            buffers = self.arguments[2]._asdict()
            return [tensor for name, tensor in buffers.items() if name not in LOOP_READS and tensor is not None]
        outputs = [self.arguments[place] for place in WRITTEN[self.kind]]
        stats = self.options.get("stats")
        if stats is not None:
            # The second of the two sums is left alone where nobody asks for it.
            outputs.append(stats.sums if stats.centred or stats.weight is not None else stats.sums[..., :1])
        return [output for output in outputs if output is not None]

    def scratch(self) -> set[int]:
        """Addresses of what is written and is no result."""
        if not self.kind.startswith(LOOP):
            return set()
        return {it.data_ptr() for name in LOOP_SCRATCH if (it := getattr(self.arguments[2], name)) is not None}

    def read_and_written(self) -> set[int]:
        """Addresses of outputs that are inputs too: the residual stream, what launches of a flow loop hand on."""
        if self.kind.startswith(LOOP):
            return {getattr(self.arguments[2], name).data_ptr() for name in LOOP_HANDS_ON}
        residual = self.options.get("residual")
        return set() if residual is None else {residual.x.data_ptr()}


class RecordingOps(FusedOps):
    """Runs as FusedOps, with defaults alone, and keeps each key's first call, and all of them in their order.

    sequence: key -> call, one entry for each; a launch of a flow loop has the keys of all stages that run in it.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        super().__init__(backend, device)
        self.calls: dict[str, Call] = {}
        self.sequence: list[dict[str, Call]] = []

    def run(
        self, kind: str, shape: Shape, dtype: torch.dtype, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        self._keep({tactic_key(kind, shape, dtype, options): Call(kind, shape, arguments, options)})
        super().run(kind, shape, dtype, arguments, options)

    def flow_loop(self, weights: FlowWeights, inputs: FlowInputs, buffers: FlowBuffers, **options: Any) -> None:
        """Of the next step's tokens, which end a step, a launch has a call only if there are some."""
        steps, layers, _ = weights.attention.scale.shape
        first, last = options["places"]
        has_tokens = first // layers < min(last // layers, steps - 1)
        self._keep(
            {
                tactic_key(LOOP + stage, shape, buffers.q.dtype): Call(
                    LOOP + stage, shape, (weights, inputs, buffers), options
                )
                for stage, shape in loop_shapes(inputs, buffers).items()
                if stage != "tokens" or has_tokens
            }
        )
        super().flow_loop(weights, inputs, buffers, **options)

    def _keep(self, calls: dict[str, Call]) -> None:
        self.sequence.append(calls)
        for key, call in calls.items():
            self.calls.setdefault(key, call).count += 1


class StagedOps(FusedOps):
    """Is told by step_on_meta what is being run. stage: of STAGES."""

    stage = ""


class PaperOps(StagedOps):
    """Computes nothing, and keeps what is called for which weight of the model, in order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("reference", META)
        self.calls: dict[tuple[Any, ...], Call] = {}
        self._layers, self._owners = _layers(model), _owners(model)

    def run(
        self, kind: str, shape: Shape, dtype: torch.dtype, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        name = self._label(arguments[1].data) if isinstance(arguments[1], Weight) else "attention"
        if kind == "qkv" and arguments[2] is None:
            name = "KV, last layer"
        layer = self._layers[_storage(arguments[1].data)] if isinstance(arguments[1], Weight) else ""
        self._write(name, kind, shape, arguments, options, layer)

    def start_flow(self, *arguments: Any, **options: Any) -> None:
        """The product within: of the first input with the action projector."""
        noise, weight = arguments[0], arguments[4]
        self._product(self._label(weight), noise, weight)

    def euler_step(self, *arguments: Any, **options: Any) -> None:
        """The products within: of the output layer and, before another step, of its input."""
        x, first, second, z, in_weight = (arguments[place] for place in (0, 3, 4, 5, 10))
        if second is None:
            self._product(LABELS["action_output_layer.layers.2"], x, first)
        else:
            self._product(LABELS["action_output_layer.layers.0"], x, first)
            self._product(LABELS["action_output_layer.layers.2"], z, second)
        if in_weight is not None:
            self._product(self._label(in_weight), z, in_weight)

    def _nothing(self, *arguments: Any, **options: Any) -> None: ...

    embed = rope_tables = dit_rope_tables = layer_norm = quantize = _nothing

    def _product(self, name: str, x: Tensor, weight: Tensor) -> None:
        """x: (B, M, any columns) of rows that are multiplied with weight (N, K)."""
        shape, layer = (x.shape[0] * x.shape[1], *weight.shape), self._layers.get(_storage(weight), "")
        self._write(name, "linear", shape, (x, Weight(weight)), {}, layer)

    def _write(
        self, name: str, kind: str, shape: Shape, arguments: tuple[Any, ...], options: Mapping[str, Any], layer: str
    ) -> None:
        call = Call(kind, shape, arguments, options, 0, self.stage, name, layer)
        self.calls.setdefault((self.stage, name, kind, shape), call).count += 1

    def _label(self, weight: Tensor) -> str:
        """A module that LABELS does not know keeps its own name, without the numbers of its layers."""
        parts = re.sub(r"\.\d+(?=\.)", ".*", self._owners[_storage(weight)]).split(".")
        ends = (".".join(parts[begin:]) for begin in range(len(parts)))
        return next((LABELS[end] for end in ends if end in LABELS), ".".join(part for part in parts if part != "*"))


def _storage(tensor: Tensor) -> int:
    """What views of one tensor have in common, on the meta device too."""
    return tensor.untyped_storage()._cdata


def _layers(model: nn.Module) -> dict[int, str]:
    """Storage of a weight -> name of its layer in a checkpoint, one of them where several share it."""
    names = ((_storage(weight), name.rpartition(".")[0]) for name, weight in model.named_parameters())
    return {storage: name.removeprefix("head.") for storage, name in names}


def _owners(model: nn.Module) -> dict[int, str]:
    """Storage of a weight -> name of the module that multiplies with it."""
    owners = {_storage(weight): name.rpartition(".")[0] for name, weight in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinears) and module.packed is not None:
            owners[_storage(module.packed)] = name
    return owners


def parts_on_meta(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> FusedParts:
    """A network that has shapes alone."""
    with META:
        model = XR0Model(config).to(dtype).eval().requires_grad_(False)
    pack_linears(model)
    return FusedParts(model, "reference", TacticTable(""), graphs=False)


def step_on_meta(
    parts: FusedParts, work: Workload, ops: FusedOps, tokens: int, patch_columns: int, flow: Flow = "chained"
) -> None:
    """Call the ops of a whole step, prompts of `tokens` tokens. ops: StagedOps are told the stages.

    patch_columns: patch_dim, as the released code multiplies patches, or frame_dim, as the engine does.
    """
    dtype, batch = parts.dtype, work.batch

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def begin(stage: str) -> None:
        if isinstance(ops, StagedOps):
            ops.stage = stage

    begin("vision")
    images = parts.vision.buffers(work.grids)
    patches = sum(height * width for height, width in work.grids)
    parts.vision.run(ops, empty(patches, patch_columns), images)
    begin("prefill")
    prompt, own = parts.text.buffers(batch, tokens, work.preamble_tokens), (batch, tokens - work.preamble_tokens)
    ids, index, positions = (empty(*shape, dtype=torch.int32) for shape in (own, own, (3, *own)))
    parts.text.run(ops, ids, positions, index, images.tokens[0], tuple(tap[0] for tap in images.deepstack), prompt)
    begin("flow")
    FlowSession(parts.head, ops, batch, tokens, work.chunk_length, flow=flow).run()


@lru_cache(maxsize=8)
def step_calls(config: ModelConfig, work: Workload) -> tuple[Call, ...]:
    """What a step calls, kind by kind in the order of first appearance, prompts of exactly work.tokens tokens."""
    parts = parts_on_meta(config)
    ops = PaperOps(parts.reference)
    step_on_meta(parts, work, ops, work.tokens, config.vision.patch_dim)
    return tuple(ops.calls.values())
