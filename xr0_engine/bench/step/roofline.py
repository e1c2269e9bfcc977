"""Lower bounds on latency: per operator, the larger of arithmetic over peak and bytes over bandwidth, then summed.

What is counted, per observation batch:

- Operators are the GEMMs and the attentions. What stands between them (norms, rotations, gates, residuals, lookups) is
  taken to run inside a neighbour, and launches cost nothing.
- A GEMM of M rows, K inputs and N outputs takes 2 M N K operations and moves its weights, its input and its whole
  output once. Packed projections are one GEMM: Q, K, V; gate and up, whose M x 2 I result is written before SwiGLU.
- Attention moves its queries, keys, values and result once and takes 4 D operations per head and pair of tokens that
  may see each other: a causal prefill costs half a square. Scores never reach memory.
- Vision: patches with every frame of a temporal patch, as the released code multiplies them; every block, the merger
  and the DeepStack mergers; attention within each image.
- Prefill: all text layers but the last, of which K and V alone. A kept preamble takes no rows, but is attended to.
- Flow: the state's projector once; in each Euler step the action projectors and the DiT, its weights and the KV block
  streamed anew. The adaLN table comes from load time.
- By a recipe of 8 bits (docs/quantization.md) the weights of its layers are 8 bits wide, their float32 scales beside
  them. Where rows are rounded too, on their way into the GEMM, its arithmetic is that of 8 bits. Activations, KV,
  attention and every other layer stay as they are.

A model whose weights fit the processor's cache can beat these bounds: its bytes do not come from memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from xr0_engine.backend import resolve_dtype
from xr0_engine.bench.cases import Setup, describe
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.step.ceilings import HERE, Ceilings, ceilings_for, rates
from xr0_engine.bench.step.memory import FLOAT32_BYTES, memory_need
from xr0_engine.bench.step.recorder import Call, step_calls
from xr0_engine.bench.step.workload import Workload
from xr0_engine.bench.tell.tables import precision
from xr0_engine.config import ModelConfig
from xr0_engine.model.quantization import Format

STAGES = ("vision", "prefill", "flow")


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
    """dtype: of all that has no 8 bits. layers: layer -> format, of those that have (model/quantization.py)."""

    dtype: str
    layers: Mapping[str, Format] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Raises ValueError for an unknown dtype."""
        return resolve_dtype(self.dtype).itemsize

    def linear(self, call: Call) -> Operator:
        """rows x inputs times inputs x outputs."""
        rows, outputs, inputs = call.shape[:3]
        format = self.layers.get(call.layer)
        weight = self.size * inputs * outputs if format is None else outputs * (inputs + FLOAT32_BYTES)
        rounds = format in ("int8", "fp8")
        operations, moved = 2 * rows * inputs * outputs, self.size * rows * (inputs + outputs)
        dtype = str(format) if rounds else self.dtype
        shape = (rows, inputs, outputs)
        return Operator(call.stage, call.name, call.count, operations, weight, moved, dtype, shape)

    def attend(self, call: Call, pairs: int, width: int, elements: int) -> Operator:
        """pairs: of a query and a key that see each other, per head; width: heads x D; elements: moved."""
        return Operator(call.stage, call.name, call.count, 4 * pairs * width, 0, self.size * elements, self.dtype)


def cost(call: Call, precise: Precision) -> Operator:
    """What all runs of a recorded call take, as the module counts them. Raises ValueError for an unknown kind."""
    if call.kind in ("linear", "swiglu", "qkv"):
        return precise.linear(call)
    batch, heads, queries, groups, keys, dim = call.shape
    cached = 2 * batch * groups * keys * dim
    if segments := call.options.get("segments"):
        pairs, moved = sum(rows**2 for rows in segments.lengths), 4 * sum(segments.lengths) * heads * dim
    elif call.kind == "attention":
        hidden = queries * (queries - 1) // 2 if call.options["causal"] else 0
        pairs, moved = batch * (queries * keys - hidden), 2 * batch * heads * queries * dim + cached
    elif call.kind == "lambda_attention":
        # The cached keys and values have the VLM's KV heads; the DiT's own have all heads.
        pairs, moved = batch * queries * (keys + queries), 4 * batch * heads * queries * dim + cached
    else:
        raise ValueError(f"kind: expected an op that has tactics, got {call.kind!r}")
    return precise.attend(call, pairs, heads * dim, moved)


def operators(
    config: ModelConfig, work: Workload, dtype: str, layers: Mapping[str, Format] = MappingProxyType({})
) -> list[Operator]:
    """Every operator of a call, as the module counts them. dtype, layers: as Precision has them. Raises ValueError for
    an unknown dtype."""
    return [cost(call, Precision(dtype, layers)) for call in step_calls(config, work)]


def bounds_ms(found: list[Operator], ceilings: Ceilings) -> dict[str, float]:
    """Stage -> milliseconds at least, and their sum as `total`."""
    stages = {s: 1e3 * sum(op.bound_s(ceilings) for op in found if op.stage == s) for s in STAGES}
    return stages | {"total": sum(stages.values())}


def measure(setup: Setup, chip: str, command: str) -> Result:
    """The bounds of a case on a chip (a key of CHIPS, or HERE), and the memory of a call (memory.py).

    Raises ValueError for what is wrong in setup or chip.
    """
    config, work = Workload.of_case(setup)
    layers, recipe = setup.layers_in_8bit(config)
    found = operators(config, work, setup.dtype, layers)
    ceilings = ceilings_for(chip, setup, {op.dtype for op in found})
    listed = [asdict(op) | {"bound_ms": 1e3 * op.bound_s(ceilings), "limit": op.limit(ceilings)} for op in found]
    return Result(
        kind="roofline",
        command=command,
        environment=environment(setup.prepare() if chip == HERE else "cpu"),
        case=describe(setup, work.tokens, work.chunk_length, recipe),
        boundary="stage",
        backend="none",
        series={},
        facts={
            "chip": ceilings.name,
            "ceilings": asdict(ceilings),
            "bound_ms": bounds_ms(found, ceilings),
            "operators": listed,
            "memory_bytes": memory_need(config, work, setup.dtype, layers).peak,
        },
    )


def show(result: Result, list_operators: bool = False) -> None:
    """A table of 80 columns: stages, or every operator."""
    found, case, ceilings = result.facts["operators"], result.case, result.facts["ceilings"]
    console = Console()
    table = _operator_table(found) if list_operators else _stage_table(found)
    table.title = f"{case['name']}, {case['size']}, batch {case['batch']}, {precision(case)}"
    console.print(table)
    console.print(
        f"{len(case['views'])} views, {case['tokens']} tokens, all computed, chunk of {case['chunk_length']}.\n"
        f"{ceilings['name']}: {rates(ceilings)}; {ceilings['source']}.",
        highlight=False,
    )
    if (memory := result.facts.get("memory_bytes")) is not None:
        console.print(f"Memory of a call, estimated: {memory / 2**30:.2f} GiB with weights.", highlight=False)


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
