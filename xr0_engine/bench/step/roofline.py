"""Lower bounds on latency: per operator, the larger of arithmetic over peak and bytes over bandwidth, then summed.

What is counted, per observation batch:

- Operators are the GEMMs and the attentions. What stands between them (norms, rotations, gates, residuals, lookups) is
  taken to run inside a neighbour, and launches cost nothing.
- A GEMM of M rows, K inputs and N outputs takes 2 M N K operations and moves its weights, its input and its whole
  output once. Packed projections are one GEMM: Q, K, V; gate and up, whose M x 2 I result is written before SwiGLU.
- Attention moves its queries, keys, values and result once and takes 4 D operations per head and pair of tokens that
  may see each other: a causal prefill costs half a square. Scores never reach memory.
- Vision: every block, the merger and the DeepStack mergers; attention within each image.
- Prefill: all text layers but the last, of which K and V alone. A kept preamble takes no rows, but is attended to.
- Flow: the state's projector once; in each Euler step the action projectors and the DiT, its weights and the KV block
  streamed anew. The adaLN table comes from load time.
- In 8 bits the GEMMs' weights and arithmetic are 8 bits wide; activations, KV and attention stay at 16.

A model whose weights fit the processor's cache can beat these bounds: its bytes do not come from memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xr0_engine.bench.cases import Setup, describe
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.step.ceilings import HERE, Ceilings, ceilings_for, rates
from xr0_engine.checkpoint import ROBOTS, SIZES
from xr0_engine.config import VisionConfig, XR0Config
from xr0_engine.model.weights import resolve_checkpoint
from xr0_engine.robot.normalize import load_statistics, select_robot_type
from xr0_engine.robot.preprocess import orient, smart_resize
from xr0_engine.types import ModelInputs

STAGES = ("vision", "prefill", "flow")
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1, "int8": 1}
"""Bytes of a weight."""
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Workload:
    """The sizes of one call that its cost depends on.

    grids: per image (height, width) in patches, of the whole batch; tokens: N, padding included; chunk_length: T;
    preamble_tokens: leading tokens whose KV is kept from an earlier call.
    """

    grids: tuple[tuple[int, int], ...]
    tokens: int
    chunk_length: int
    batch: int = 1
    preamble_tokens: int = 0

    @staticmethod
    def of(inputs: ModelInputs) -> Workload:
        """What a call with these inputs costs, its prompt head known."""
        batch, tokens = inputs.input_ids.shape
        return Workload(inputs.image_grids, tokens, inputs.action_mask.shape[1], batch, inputs.preamble_length)

    @staticmethod
    def of_case(setup: Setup) -> tuple[XR0Config, Workload]:
        """The case's nominal sizes, nothing kept, and the configuration. No weights are made or read.

        Raises ValueError for an unknown size, CheckpointError for a checkpoint that cannot be used.
        """
        case = setup.case
        if setup.checkpoint is None:
            config, chunk_length = config_of_size(setup.size), ROBOTS[case.robot_type][0]
        else:
            folder = resolve_checkpoint(setup.checkpoint)
            config = XR0Config.load(folder)
            statistics = load_statistics(folder, config.head.action_dim, config.std_epsilon)
            chunk_length = statistics[select_robot_type(statistics, case.robot_type)].chunk_length
        image = np.empty((*case.image_size, 3), np.uint8)
        grids = [_grid(orient(image, view), config.vision) for view in case.embodiment.views]
        return config, Workload(tuple(grids) * case.batch, case.tokens, chunk_length, case.batch)


@dataclass(frozen=True)
class Operator:
    """One operator at one place of the model.

    count: how often it runs in a call; operations, weight_bytes, activation_bytes: of one run; dtype: whose peak bounds
    the arithmetic; shape: of a GEMM (rows, inputs, outputs), of others empty.
    """

    stage: str
    name: str
    count: int
    operations: float
    weight_bytes: float
    activation_bytes: float
    dtype: str
    shape: tuple[int, ...] = ()

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
        shape = (rows, inputs, outputs)
        return Operator(stage, name, count, operations, self.weight * inputs * outputs, moved, self.gemm, shape)

    def attend(self, stage: str, name: str, count: int, pairs: int, width: int, elements: int) -> Operator:
        """pairs: of a query and a key that see each other, per head; width: heads x D; elements: moved."""
        return Operator(stage, name, count, 4 * pairs * width, 0, self.activation * elements, self.attention)


def config_of_size(size: str) -> XR0Config:
    """Raises ValueError for a size not in SIZES."""
    if size not in SIZES:
        raise ValueError(f"size: expected {', '.join(SIZES)}; got {size!r}")
    return SIZES[size]()


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
    own = work.tokens - work.preamble_tokens
    rows = work.batch * own
    pairs = work.batch * (own * work.preamble_tokens + own * (own + 1) // 2)
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


def _grid(image: np.ndarray, vision: VisionConfig) -> tuple[int, int]:
    height, width = image.shape[:2]
    height, width = smart_resize(height, width, vision.patch_size * vision.spatial_merge_size)
    return height // vision.patch_size, width // vision.patch_size


def measure(setup: Setup, chip: str, command: str) -> Result:
    """The bounds of a case on a chip (a key of CHIPS, or HERE).

    setup.dtype: a key of BYTES. Raises ValueError for what is wrong in setup or chip.
    """
    config, work = Workload.of_case(setup)
    found = operators(config, work, setup.dtype)
    ceilings = ceilings_for(chip, setup)
    listed = [asdict(op) | {"bound_ms": 1e3 * op.bound_s(ceilings), "limit": op.limit(ceilings)} for op in found]
    return Result(
        kind="roofline",
        command=command,
        environment=environment(setup.prepare() if chip == HERE else "cpu"),
        case=describe(setup, work.tokens, work.chunk_length),
        boundary="stage",
        backend="none",
        series={},
        facts={
            "chip": ceilings.name,
            "ceilings": asdict(ceilings),
            "bound_ms": bounds_ms(found, ceilings),
            "operators": listed,
        },
    )


def show(result: Result, list_operators: bool = False) -> None:
    """A table of 80 columns: stages, or every operator."""
    found, case, ceilings = result.facts["operators"], result.case, result.facts["ceilings"]
    console = Console()
    table = _operator_table(found) if list_operators else _stage_table(found)
    table.title = f"{case['name']}, {case['size']}, batch {case['batch']}, {case['dtype']}"
    console.print(table)
    console.print(
        f"{len(case['views'])} views, {case['tokens']} tokens, all computed, chunk of {case['chunk_length']}.\n"
        f"{ceilings['name']}: {rates(ceilings)}; {ceilings['source']}.",
        highlight=False,
    )


def _stage_table(found: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("stage", "GOP", "GB", "bound", "by memory")
    for stage in (*STAGES, "total"):
        part = [op for op in found if stage in (op["stage"], "total")]
        by_memory = sum(op["bound_ms"] for op in part if op["limit"] == "memory")
        table.add_row(stage, *_sums(part), f"{by_memory / sum(op['bound_ms'] for op in part):.0%}")
    return table


def _operator_table(found: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("operator", "runs", "GOP", "GB", "bound", "by")
    for stage in STAGES:
        for op in (op for op in found if op["stage"] == stage):
            table.add_row(f"{stage}: {op['name']}", str(op["count"]), *_sums([op]), op["limit"])
    table.add_row("total", "", *_sums(found), "")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _sums(part: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    operations = sum(op["count"] * op["operations"] for op in part)
    moved = sum(op["count"] * (op["weight_bytes"] + op["activation_bytes"]) for op in part)
    return f"{operations / 1e9:.2f}", f"{moved / 1e9:.3f}", f"{sum(op['bound_ms'] for op in part):.3f} ms"
