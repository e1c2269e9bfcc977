"""What a call needs in memory: weights by part, tables kept from load, KV block, activations.

Activations are an estimate of the most that a stage of the reference engine holds at once, its results included: the
tensors alive at the widest place of one layer. What a library takes for itself is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from xr0_engine.backend import resolve_dtype
from xr0_engine.bench.step.roofline import FLOAT32_BYTES, Workload
from xr0_engine.config import XR0Config
from xr0_engine.model.xr0 import XR0Model


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


def memory_need(config: XR0Config, work: Workload, dtype: str) -> MemoryNeed:
    """dtype: bfloat16, float16 or float32. Raises ValueError for another."""
    size, text, head = resolve_dtype(dtype).itemsize, config.text, config.head
    image_tokens = sum(height * width for height, width in work.grids) // config.vision.spatial_merge_size**2
    adaln_table = head.num_layers * head.flow_steps * 6 * head.hidden_size
    kv_of_token = 2 * text.num_kv_heads * text.head_dim
    return MemoryNeed(
        weights={part: size * count for part, count in parameters(config).items()},
        kept=size * (adaln_table + text.num_layers * work.preamble_tokens * kv_of_token),
        kv_block=size * head.num_layers * work.batch * work.tokens * kv_of_token,
        vision_tokens=size * image_tokens * text.hidden_size * (1 + len(config.vision.deepstack_layers)),
        activations={
            "vision": _vision(config, work, size),
            "prefill": _prefill(config, work, size),
            "flow": _flow(config, work, size),
        },
    )


def parameters(config: XR0Config) -> dict[str, int]:
    """Part of the model -> number of parameters that the engine loads."""
    with torch.device("meta"):
        model = XR0Model(config)
    towers = model.vlm.model
    parts = {"vision tower": towers.visual, "language model": towers.language_model, "action head": model.head}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def _vision(config: XR0Config, work: Workload, size: int) -> int:
    vision = config.vision
    width = vision.hidden_size
    patches = sum(height * width for height, width in work.grids)
    # Through the whole tower: the patches and their position embeddings. In a block: the residual stream before and
    # after the attention, the normed one; then the inner layer before and after GELU, or Q, K, V, the rotated Q, and
    # K while it is turned in float32 (copied if it was not, halves, joined).
    mlp = size * 2 * vision.intermediate_size
    attention = size * 4 * width + FLOAT32_BYTES * width * (2 if size == FLOAT32_BYTES else 3)
    row = size * (vision.patch_dim + 4 * width) + max(mlp, attention)
    taps = patches // vision.spatial_merge_size**2 * vision.out_hidden_size * len(vision.deepstack_layers)
    rotary = 2 * FLOAT32_BYTES * width // vision.num_heads
    return patches * (row + rotary) + size * taps


def _prefill(config: XR0Config, work: Workload, size: int) -> int:
    text = config.text
    rows = work.batch * (work.tokens - work.preamble_tokens)
    q_width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    # The embeddings, the residual stream before and after the attention, the normed one; gate, up, SiLU of gate, their
    # product; from the attention before: Q, K, V, the rotated Q and the result.
    row = 4 * text.hidden_size + 4 * text.intermediate_size + 3 * q_width + 2 * kv_width
    # One scratch place beside the layers kept.
    cache = (config.head.num_layers + 1) * work.batch * work.tokens * 2 * kv_width
    return size * (rows * row + cache) + 2 * FLOAT32_BYTES * rows * text.head_dim


def _flow(config: XR0Config, work: Workload, size: int) -> int:
    head = config.head
    queries = 1 + head.state_length + work.chunk_length
    rows = work.batch * queries
    # The residual stream before and after, the normed and the modulated one; the MLP as in prefill.
    mlp = rows * (4 + 4 * 4) * head.hidden_size
    # The scores, apart and joined, and their softmax in float32, of a float32 copy if they were not; Q, K and V before
    # and after the norms and rotations.
    pairs = work.batch * head.num_heads * queries * (work.tokens + queries)
    softmax = FLOAT32_BYTES * pairs * (1 if size == FLOAT32_BYTES else 2)
    attention = rows * 10 * head.hidden_size + 2 * pairs
    return max(size * mlp, size * attention + softmax)
