"""What a call needs in memory: weights by part, tables kept from load, KV block, activations; which cards have it.

Activations are an estimate of the most that a stage of the reference engine holds at once, its results included: the
tensors alive at the widest place of one layer, whose widths a step's own calls tell; of layers in 8 bits also what the
largest of them rounds or widens while it runs. What a library takes for itself is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from xr0_engine.backend import resolve_dtype
from xr0_engine.bench.step.recorder import STAGES, Call, step_calls
from xr0_engine.bench.step.workload import Workload
from xr0_engine.config import ModelConfig
from xr0_engine.model.quantization import Format
from xr0_engine.model.quantized import put_quantized
from xr0_engine.model.weights import inference_shapes
from xr0_engine.model.xr0 import XR0Model

FLOAT32_BYTES = 4
PLACES = {"vlm.model.visual.": "vision", "vlm.model.language_model.": "prefill", "": "flow"}
"""Start of a layer's name -> stage that runs it; the first that fits."""


@dataclass(frozen=True)
class MemoryNeed:
    """All in bytes.

    weights: per part of the model, scales of 8 bits included; kept: the adaLN table and one prompt head's KV; kv_block:
    what the DiT reads; vision_tokens: what prefill reads; activations: per stage, results included.
    """

    weights: Mapping[str, int]
    kept: int
    kv_block: int
    vision_tokens: int
    activations: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Of a whole call, weights included."""
        vision, prefill, flow = (self.activations[stage] for stage in ("vision", "prefill", "flow"))
        return sum(self.weights.values()) + self.kept + max(vision, self.vision_tokens + prefill, self.kv_block + flow)


def memory_need(
    config: ModelConfig, work: Workload, dtype: str, in_8bit: Mapping[str, Format] = MappingProxyType({})
) -> MemoryNeed:
    """dtype: bfloat16, float16 or float32, of all that has no 8 bits. in_8bit: layer -> format of those that have.
    Raises ValueError for another dtype."""
    size, layers = resolve_dtype(dtype).itemsize, config.head.num_layers
    calls = step_calls(config, work)
    tokens, outputs, taps = _image_tokens(calls)
    *_, groups, _, dim = _only(calls, "prefill", "attention").shape
    kv_of_token = 2 * groups * dim
    adaln_table = layers * config.head.flow_steps * 6 * config.head.hidden_size
    rounding = _rounding(config, calls, in_8bit)
    return MemoryNeed(
        weights=weights_bytes(config, dtype, in_8bit),
        kept=size * (adaln_table + config.text.num_layers * work.preamble_tokens * kv_of_token),
        kv_block=size * layers * work.batch * work.tokens * kv_of_token,
        vision_tokens=size * tokens * outputs * (1 + taps),
        activations={
            "vision": _vision(calls, size) + rounding["vision"],
            "prefill": _prefill(calls, layers, size) + rounding["prefill"],
            "flow": _flow(calls, size) + rounding["flow"],
        },
    )


def parameters(config: ModelConfig) -> dict[str, int]:
    """Part of the model -> number of parameters that the engine loads."""
    parts = _parts(config, torch.bfloat16, {})
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def weights_bytes(config: ModelConfig, dtype: str, in_8bit: Mapping[str, Format]) -> dict[str, int]:
    """Part of the model -> what its parameters take. Arguments as memory_need."""
    parts = _parts(config, resolve_dtype(dtype), in_8bit)
    return {name: sum(parameter.nbytes for parameter in part.parameters()) for name, part in parts.items()}


def _parts(config: ModelConfig, dtype: torch.dtype, in_8bit: Mapping[str, Format]) -> dict[str, nn.Module]:
    with torch.device("meta"):
        model = XR0Model(config)
        put_quantized(model, in_8bit)
    model.to(dtype)
    towers = model.vlm.model
    return {"vision tower": towers.visual, "language model": towers.language_model, "action head": model.head}


def _only(calls: Sequence[Call], stage: str, kind: str) -> Call:
    """The first such call of a stage: those of its other layers have the same sizes."""
    return next(call for call in calls if (call.stage, call.kind) == (stage, kind))


def _image_tokens(calls: Sequence[Call]) -> tuple[int, int, int]:
    """Image tokens, their columns, and how many taps of the vision tower there are beside them."""
    last = [call for call in calls if call.stage == "vision"][-1]
    tokens, outputs, _ = last.shape
    return tokens, outputs, last.count - 1


def _vision(calls: Sequence[Call], size: int) -> int:
    patches, _, width, dim = _only(calls, "vision", "qkv").shape
    patch_dim = _only(calls, "vision", "linear").shape[2]
    inner = max(call.shape[1] for call in calls if (call.stage, call.kind) == ("vision", "linear"))
    # Through the whole tower: the patches and their position embeddings. In a block: the residual stream before and
    # after the attention, the normed one; then the inner layer before and after GELU, or Q, K, V, the rotated Q, and
    # K while it is turned in float32 (copied if it was not, halves, joined).
    mlp = size * 2 * inner
    attention = size * 4 * width + FLOAT32_BYTES * width * (2 if size == FLOAT32_BYTES else 3)
    row = size * (patch_dim + 4 * width) + max(mlp, attention)
    tokens, outputs, taps = _image_tokens(calls)
    return patches * (row + 2 * FLOAT32_BYTES * dim) + size * tokens * outputs * taps


def _prefill(calls: Sequence[Call], kept_layers: int, size: int) -> int:
    rows, _, width, _ = _only(calls, "prefill", "qkv").shape
    batch, heads, _, groups, tokens, dim = _only(calls, "prefill", "attention").shape
    inner, q_width, kv_width = _only(calls, "prefill", "swiglu").shape[1] // 2, heads * dim, groups * dim
    # The embeddings, the residual stream before and after the attention, the normed one; gate, up, SiLU of gate, their
    # product; from the attention before: Q, K, V, the rotated Q and the result.
    row = 4 * width + 4 * inner + 3 * q_width + 2 * kv_width
    # One scratch place beside the layers kept.
    cache = (kept_layers + 1) * batch * tokens * 2 * kv_width
    return size * (rows * row + cache) + 2 * FLOAT32_BYTES * rows * dim


def _rounding(config: ModelConfig, calls: Sequence[Call], in_8bit: Mapping[str, Format]) -> dict[str, int]:
    """Stage -> the most that a layer in 8 bits holds beside its input and result: rows while they are rounded and its
    sums, or a copy of its weight, as PyTorch's operators make them (model/quantized.py)."""
    shapes, most = inference_shapes(config, in_8bit), dict.fromkeys(STAGES, 0)
    rows_of = {
        stage: max(call.shape[0] for call in calls if (call.stage, call.kind) == (stage, "linear")) for stage in most
    }
    for layer, format in in_8bit.items():
        outputs, inputs = shapes[f"{layer}.weight"]
        stage = next(stage for start, stage in PLACES.items() if layer.startswith(start))
        rows = rows_of[stage]
        # A weight in float32, and scaled or rounded; on a CPU the sums of three digits, and what joins them.
        if format == "int8-weights":
            held = FLOAT32_BYTES * outputs * max(2 * inputs, 4 * rows)
        else:
            rounded = rows * inputs
            sums = 2 * FLOAT32_BYTES * rows * outputs
            # A library takes int8 padded, float8 widened.
            copy = outputs * inputs * (1 if format == "int8" else FLOAT32_BYTES)
            held = max(rounded * (2 * FLOAT32_BYTES + 1), rounded + sums + copy)
        most[stage] = max(most[stage], held)
    return most


def _flow(calls: Sequence[Call], size: int) -> int:
    rows, _, width, _ = _only(calls, "flow", "qkv").shape
    batch, heads, queries, _, tokens, _ = _only(calls, "flow", "lambda_attention").shape
    inner = _only(calls, "flow", "swiglu").shape[1] // 2
    # The residual stream before and after, the normed and the modulated one; the MLP as in prefill.
    mlp = rows * (4 * width + 4 * inner)
    # The scores, apart and joined, and their softmax in float32, of a float32 copy if they were not; Q, K and V before
    # and after the norms and rotations.
    pairs = batch * heads * queries * (tokens + queries)
    softmax = FLOAT32_BYTES * pairs * (1 if size == FLOAT32_BYTES else 2)
    attention = rows * 10 * width + 2 * pairs
    return max(size * mlp, size * attention + softmax)
