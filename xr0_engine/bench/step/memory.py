"""What a call needs in memory: weights by part, tables kept from load, KV block, activations.

Activations are an estimate of the most that a stage of the reference engine holds at once, its results included: the
tensors alive at the widest place of one layer, whose widths a step's own calls tell. What a library takes for itself is
not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from xr0_engine.backend import resolve_dtype
from xr0_engine.bench.step.recorder import Call, step_calls
from xr0_engine.bench.step.workload import Workload
from xr0_engine.config import ModelConfig
from xr0_engine.model.xr0 import XR0Model

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MemoryNeed:
    """All in bytes.

    weights: per part of the model; kept: the adaLN table and one prompt head's KV; kv_block: what the DiT reads;
    vision_tokens: what prefill reads; activations: per stage, results included.
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


def memory_need(config: ModelConfig, work: Workload, dtype: str) -> MemoryNeed:
    """dtype: bfloat16, float16 or float32. Raises ValueError for another."""
    size, layers = resolve_dtype(dtype).itemsize, config.head.num_layers
    calls = step_calls(config, work)
    tokens, outputs, taps = _image_tokens(calls)
    *_, groups, _, dim = _only(calls, "prefill", "attention").shape
    kv_of_token = 2 * groups * dim
    adaln_table = layers * config.head.flow_steps * 6 * config.head.hidden_size
    return MemoryNeed(
        weights={part: size * count for part, count in parameters(config).items()},
        kept=size * (adaln_table + config.text.num_layers * work.preamble_tokens * kv_of_token),
        kv_block=size * layers * work.batch * work.tokens * kv_of_token,
        vision_tokens=size * tokens * outputs * (1 + taps),
        activations={
            "vision": _vision(calls, size),
            "prefill": _prefill(calls, layers, size),
            "flow": _flow(calls, size),
        },
    )


def parameters(config: ModelConfig) -> dict[str, int]:
    """Part of the model -> number of parameters that the engine loads."""
    with torch.device("meta"):
        model = XR0Model(config)
    towers = model.vlm.model
    parts = {"vision tower": towers.visual, "language model": towers.language_model, "action head": model.head}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


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
