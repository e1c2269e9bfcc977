"""Lower bounds on latency: per operator, the larger of arithmetic over peak and bytes over bandwidth, then summed.

What is counted, per observation batch:

- Operators are the GEMMs and the attentions. What stands between them (norms, rotations, gates, residuals, lookups) is
  taken to run inside a neighbour, and launches cost nothing.
- A GEMM of M rows, K inputs and N outputs takes 2 M N K operations and moves its weights, its input and its whole
  output once. Packed projections are one GEMM: Q, K, V; gate and up, whose M x 2 I result is written before SwiGLU.
- Attention moves its queries, keys, values and result once and takes 4 D operations per head and pair of tokens that
  may see each other: a causal prefill costs half a square. Scores never reach memory.
- Vision: every block, the merger and the DeepStack mergers; attention within each image.
- Prefill: all text layers but the last, of which K and V alone. A kept prompt head takes no rows, but is attended to.
- Flow: the state's projector once; in each Euler step the action projectors and the DiT, its weights and the KV block
  streamed anew. The adaLN table comes from load time.
- In 8 bits the GEMMs' weights and arithmetic are 8 bits wide; activations, KV and attention stay at 16.

A model whose weights fit the processor's cache can beat these bounds: its bytes do not come from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from xr0_engine.config import XR0Config

if TYPE_CHECKING:
    import torch

    from xr0_engine.types import ModelInputs

STAGES = ("vision", "prefill", "flow")
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1, "int8": 1}
"""Bytes of a weight."""
COPIED_BYTES = 2**28
"""Of the copy that measures bandwidth: eight times the largest cache of a common CPU."""
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
MEASURED_ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """What a chip can do at most.

    operations_s: dtype -> operations per second, dense, accumulated in float32 (int32 for int8); bytes_s: memory
    bandwidth; source: datasheet or measured.
    """

    name: str
    operations_s: Mapping[str, float]
    bytes_s: float
    source: str

    def peak(self, dtype: str) -> float:
        """Raises ValueError for a dtype whose peak is not known here."""
        if dtype not in self.operations_s:
            known = ", ".join(self.operations_s)
            raise ValueError(f"dtype: the ceilings of {self.name} are known for {known}; got {dtype!r}")
        return self.operations_s[dtype]


def _chip(name: str, tera_bytes: float, source: str, half: float, **others: float) -> Ceilings:
    """half: bfloat16 and float16, whose peaks are equal; others: dtype -> tera-operations per second."""
    tera = {"bfloat16": half, "float16": half, **others}
    return Ceilings(name, MappingProxyType({d: 1e12 * rate for d, rate in tera.items()}), 1e12 * tera_bytes, source)


CHIPS: Mapping[str, Ceilings] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _chip("a100", 2.039, "datasheet", 312, int8=624),
            _chip("h100", 3.35, "datasheet", 989, fp8=1979, int8=1979),
            _chip("h200", 4.3, "measured", 790),
            _chip("l40s", 0.864, "datasheet", 362, fp8=733, int8=733),
            _chip("rtx4090", 1.0, "datasheet", 165, fp8=330, int8=660),
            _chip("rtx5090", 1.792, "datasheet", 209, fp8=419, int8=838),
        )
    }
)
"""SXM modules with 80 GB (a100, h100) and 141 GB (h200)."""


@dataclass(frozen=True)
class Workload:
    """The sizes of one call that its cost depends on.

    grids: per image (height, width) in patches, of the whole batch; tokens: N, padding included; chunk_length: T;
    head_tokens: leading tokens whose KV is kept from an earlier call.
    """

    grids: tuple[tuple[int, int], ...]
    tokens: int
    chunk_length: int
    batch: int = 1
    head_tokens: int = 0

    @staticmethod
    def of(inputs: ModelInputs) -> Workload:
        """What a call with these inputs costs, its prompt head known."""
        batch, tokens = inputs.input_ids.shape
        return Workload(inputs.image_grids, tokens, inputs.action_mask.shape[1], batch, inputs.head_length)


@dataclass(frozen=True)
class Operator:
    """One operator at one place of the model. count: how often it runs in a call; operations, weight_bytes and
    activation_bytes: of one run; dtype: whose peak bounds the arithmetic."""

    stage: str
    name: str
    count: int
    operations: float
    weight_bytes: float
    activation_bytes: float
    dtype: str

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.activation_bytes

    def bound_s(self, ceilings: Ceilings) -> float:
        """Seconds that all its runs take at least."""
        return self.count * max(self.operations / ceilings.peak(self.dtype), self.num_bytes / ceilings.bytes_s)

    def limit(self, ceilings: Ceilings) -> str:
        """What bounds it: arithmetic or memory."""
        by_arithmetic = self.operations / ceilings.peak(self.dtype) > self.num_bytes / ceilings.bytes_s
        return "arithmetic" if by_arithmetic else "memory"


@dataclass(frozen=True)
class Precision:
    """Bytes per element and dtypes of the two kinds of operator."""

    gemm: str
    attention: str
    weight: int
    activation: int

    @staticmethod
    def of(dtype: str) -> Precision:
        """Raises ValueError for a dtype not in BYTES."""
        if dtype not in BYTES:
            raise ValueError(f"dtype: expected {', '.join(BYTES)}; got {dtype!r}")
        wide = "bfloat16" if BYTES[dtype] == 1 else dtype
        return Precision(dtype, wide, BYTES[dtype], BYTES[wide])

    def linear(self, stage: str, name: str, count: int, rows: int, inputs: int, outputs: int) -> Operator:
        """rows x inputs times inputs x outputs."""
        operations = 2 * rows * inputs * outputs
        moved = self.activation * rows * (inputs + outputs)
        return Operator(stage, name, count, operations, self.weight * inputs * outputs, moved, self.gemm)

    def attend(self, stage: str, name: str, count: int, pairs: int, width: int, elements: int) -> Operator:
        """pairs: of a query and a key that see each other, per head; width: heads x D; elements: moved."""
        return Operator(stage, name, count, 4 * pairs * width, 0, self.activation * elements, self.attention)


def operators(config: XR0Config, work: Workload, dtype: str) -> list[Operator]:
    """Every operator of a call, as the module counts them. dtype: a key of BYTES. Raises ValueError for another."""
    precision = Precision.of(dtype)
    return [*_vision(config, work, precision), *_prefill(config, work, precision), *_flow(config, work, precision)]


def bounds_ms(found: list[Operator], ceilings: Ceilings) -> dict[str, float]:
    """Stage -> milliseconds at least, and their sum as `total`."""
    stages = {s: 1e3 * sum(op.bound_s(ceilings) for op in found if op.stage == s) for s in STAGES}
    return stages | {"total": sum(stages.values())}


def _vision(config: XR0Config, work: Workload, precision: Precision) -> list[Operator]:
    vision = config.vision
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    images = [height * width for height, width in work.grids]
    rows, mergers = sum(images), 1 + len(vision.deepstack_layers)
    tokens = rows // vision.spatial_merge_size**2
    pairs = sum(patches**2 for patches in images)

    def linear(name: str, count: int, of: int, inputs: int, outputs: int) -> Operator:
        return precision.linear("vision", name, count, of, inputs, outputs)

    return [
        linear("patch embedding", 1, rows, vision.patch_dim, width),
        linear("QKV", vision.depth, rows, width, 3 * width),
        precision.attend("vision", "attention", vision.depth, pairs, width, 4 * rows * width),
        linear("output", vision.depth, rows, width, width),
        linear("MLP in", vision.depth, rows, width, vision.intermediate_size),
        linear("MLP out", vision.depth, rows, vision.intermediate_size, width),
        linear("merger in", mergers, tokens, merged, merged),
        linear("merger out", mergers, tokens, merged, vision.out_hidden_size),
    ]


def _prefill(config: XR0Config, work: Workload, precision: Precision) -> list[Operator]:
    text, layers = config.text, config.text.num_layers - 1
    q_width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    own = work.tokens - work.head_tokens
    rows = work.batch * own
    pairs = work.batch * (own * work.head_tokens + own * (own + 1) // 2)
    moved = 2 * rows * q_width + 2 * work.batch * work.tokens * kv_width

    def linear(name: str, count: int, inputs: int, outputs: int) -> Operator:
        return precision.linear("prefill", name, count, rows, inputs, outputs)

    return [
        linear("QKV", layers, text.hidden_size, q_width + 2 * kv_width),
        precision.attend("prefill", "attention", layers, pairs, q_width, moved),
        linear("output", layers, q_width, text.hidden_size),
        linear("gate and up", layers, text.hidden_size, 2 * text.intermediate_size),
        linear("down", layers, text.intermediate_size, text.hidden_size),
        linear("KV, last layer", 1, text.hidden_size, 2 * kv_width),
    ]


def _flow(config: XR0Config, work: Workload, precision: Precision) -> list[Operator]:
    head, size, steps = config.head, config.head.hidden_size, config.head.flow_steps
    queries, inner, runs = 1 + head.state_length + work.chunk_length, 4 * size, steps * head.num_layers
    rows, actions = work.batch * queries, work.batch * work.chunk_length
    pairs = work.batch * queries * (work.tokens + queries)
    # The cached keys and values have the VLM's KV heads; the DiT's own have all heads.
    moved = 4 * rows * size + 2 * work.batch * work.tokens * head.num_kv_heads * head.head_dim

    def linear(name: str, count: int, of: int, inputs: int, outputs: int) -> Operator:
        return precision.linear("flow", name, count, of, inputs, outputs)

    return [
        linear("state in", 1, work.batch * head.state_length, head.state_dim, size),
        linear("state out", 1, work.batch * head.state_length, size, size),
        linear("actions in", steps, actions, head.action_dim, size),
        linear("actions out", steps, actions, size, size),
        linear("QKV", runs, rows, size, 3 * size),
        precision.attend("flow", "attention", runs, pairs, size, moved),
        linear("output", runs, rows, size, size),
        linear("gate and up", runs, rows, size, 2 * inner),
        linear("down", runs, rows, inner, size),
        linear("velocity in", steps, actions, size, head.action_dim),
        linear("velocity out", steps, actions, head.action_dim, head.action_dim),
    ]


def measure_ceilings(device: torch.device, dtype: str) -> Ceilings:
    """What this machine reaches with the libraries at hand: a copy larger than its caches, a large square product.

    dtype: bfloat16, float16 or float32. The best of some rounds, since a ceiling is looked for. Not yet measured on a
    GPU. Raises ValueError for a dtype that torch cannot multiply everywhere.
    """
    import torch

    from xr0_engine.engine import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"dtype: ceilings can be measured for {', '.join(DTYPES)}; got {dtype!r}")
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    product = torch.empty_like(a)
    copy_s = _best_seconds(lambda: target.copy_(source), device)
    matmul_s = _best_seconds(lambda: torch.mm(a, b, out=product), device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Ceilings(name, {dtype: 2 * size**3 / matmul_s}, 2 * COPIED_BYTES / copy_s, "measured")


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    import torch

    best = float("inf")
    for _ in range(1 + MEASURED_ROUNDS):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def ceilings_for(chip: str, device: torch.device, dtype: str) -> Ceilings:
    """Of a chip in CHIPS, or measured on device for `here`. Raises ValueError for an unknown name."""
    if chip == "here":
        return measure_ceilings(device, dtype)
    if chip not in CHIPS:
        raise ValueError(f"chip: expected here, {', '.join(CHIPS)}; got {chip!r}")
    return CHIPS[chip]
