"""Every op and GEMM of the model alone, at a case's shapes, beside its bound on this machine.

Weights and inputs come from memory in every call, as they do in a robot's control loop: the caches are overwritten
before the clock starts. A kernel must agree with a plain restatement in float64 before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xr0_engine.backend import resolve_backend, resolve_dtype
from xr0_engine.bench.cases import Setup, describe
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.step.ceilings import COPIED_BYTES, Ceilings, highest, measure_ceilings, rates
from xr0_engine.bench.step.memory import FLOAT32_BYTES
from xr0_engine.bench.step.recorder import STAGES, Call, step_calls
from xr0_engine.bench.step.roofline import Operator, Precision, cost, operators
from xr0_engine.bench.step.workload import Workload
from xr0_engine.bench.tell.tables import footer, number
from xr0_engine.bench.timing import CallTimer, run
from xr0_engine.config import ModelConfig
from xr0_engine.kernels import reference

GATE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
"""Relative RMS against float64: some roundings of operands and result; sums in float32."""
NORM_EPS = 1e-6
Random = Callable[..., Tensor]
"""A shape -> standard normal numbers, in the precision and on the device to be measured."""


@dataclass(frozen=True)
class Kernel:
    """One op at one shape. call: what is timed; exact: the same in float64, on the same inputs."""

    call: Callable[[], Tensor]
    exact: Callable[[], Tensor]


@dataclass(frozen=True)
class KernelSpec:
    """A kernel before its inputs exist. cost: of one call, as roofline.py counts; shape: for people."""

    cost: Operator
    shape: str
    make: Callable[[Random], Kernel]

    @property
    def name(self) -> str:
        return f"{self.cost.stage}: {self.cost.name}"

    def bound_ms(self, ceilings: Ceilings) -> float:
        return 1e3 * replace(self.cost, count=1).bound_s(ceilings)


def kernel_specs(config: ModelConfig, work: Workload, dtype: str) -> list[KernelSpec]:
    """Every kernel of a call, each shape once per place in the model, products first.

    Raises ValueError for an unknown dtype.
    """
    resolve_dtype(dtype)
    precision = Precision(dtype)
    calls = step_calls(config, work)
    specs = [_spec(call, cost(call, precision)) for call in calls]
    # Whole ones: the last layer of the VLM has no queries.
    for call in (call for call in calls if call.kind == "qkv" and call.arguments[2] is not None):
        specs += _around(call, precision)
    unique = {(spec.name, spec.shape): spec for spec in specs}
    return sorted(unique.values(), key=lambda spec: (STAGES.index(spec.cost.stage), not spec.cost.shape))


def random_tensors(device: torch.device, dtype: str) -> Random:
    """Always the same numbers, in the order of the calls."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, resolve_dtype(dtype))


def overwrite_caches(device: torch.device) -> Callable[[], None]:
    """What to call before a kernel is timed. It returns when the device is done. Not yet measured on a GPU."""
    scratch = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)

    def overwrite() -> None:
        scratch.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return overwrite


@torch.inference_mode()
def check(name: str, kernel: Kernel, dtype: str) -> float:
    """Relative RMS against float64. Raises RuntimeError past GATE[dtype]."""
    exact = kernel.exact()
    error = float((kernel.call().double() - exact).norm() / exact.norm())
    if not error < GATE[dtype]:
        raise RuntimeError(f"nothing was timed: {name} is off by {error:.1e}, more than {GATE[dtype]:.0e}")
    return error


def _spec(call: Call, cost: Operator) -> KernelSpec:
    """A recorded product or attention, as the reference computes it."""
    if cost.shape:
        return KernelSpec(cost, "x".join(map(str, cost.shape)), _gemm(cost.shape))
    batch, heads, queries, _, keys, _ = call.shape
    if call.kind == "lambda_attention":
        return KernelSpec(cost, f"{heads}x{queries}x{keys + queries}", _over_cache(call.shape))
    if call.options["causal"]:
        return KernelSpec(cost, f"{heads}x{queries}^2", _causal(call.shape))
    return KernelSpec(cost, f"{batch}x{heads}x{queries}^2", _over_images(call.shape))


def _gemm(shape: tuple[int, ...]) -> Callable[[Random], Kernel]:
    rows, inputs, outputs = shape

    def make(random: Random) -> Kernel:
        x, weight = random(rows, inputs), random(outputs, inputs) / math.sqrt(inputs)
        return Kernel(lambda: F.linear(x, weight), lambda: x.double() @ weight.double().T)

    return make


def _over_images(shape: tuple[int, ...]) -> Callable[[Random], Kernel]:
    images, heads, patches, _, _, dim = shape

    def make(random: Random) -> Kernel:
        q, k, v = (random(images, patches, heads, dim).transpose(1, 2) for _ in range(3))
        everything = torch.ones(1, dtype=torch.bool, device=q.device)
        return Kernel(lambda: reference.attention(q, k, v), lambda: _exact_attention(q, k, v, everything))

    return make


def _causal(shape: tuple[int, ...]) -> Callable[[Random], Kernel]:
    batch, heads, own, groups, _, dim = shape

    def make(random: Random) -> Kernel:
        q = random(batch, heads, own, dim)
        k, v = (random(batch, groups, own, dim) for _ in range(2))
        mask = torch.ones(own, own, dtype=torch.bool, device=q.device).tril()
        return Kernel(lambda: reference.attention(q, k, v, causal=True), lambda: _exact_attention(q, k, v, mask))

    return make


def _over_cache(shape: tuple[int, ...]) -> Callable[[Random], Kernel]:
    batch, heads, queries, groups, cached, dim = shape

    def make(random: Random) -> Kernel:
        q, k, v = (random(batch, heads, queries, dim) for _ in range(3))
        keys, values = (random(batch, groups, cached, dim) for _ in range(2))
        mask = torch.ones(queries, cached + queries, dtype=torch.bool, device=q.device).tril(cached)
        mask = mask.expand(batch, 1, -1, -1)

        def join(kept: Tensor, mine: Tensor) -> Tensor:
            return torch.cat((kept.repeat_interleave(heads // groups, 1), mine), 2)

        def exact() -> Tensor:
            return _exact_attention(q, join(keys, k), join(values, v), mask)

        return Kernel(lambda: reference.lambda_attention(q, k, v, keys, values, mask), exact)

    return make


def _around(qkv: Call, precision: Precision) -> list[KernelSpec]:
    """What the reference computes around a product of queries, keys and values: norms and the rotation."""
    rows, _, inputs, dim = qkv.shape
    heads, stage, options = qkv.arguments[2].shape[1], qkv.stage, qkv.options

    def norm(name: str, *shape: int) -> KernelSpec:
        elements, width = math.prod(shape), shape[-1]
        moved = precision.size * 2 * elements
        cost = Operator(stage, name, 1, 4 * elements, precision.size * width, moved, precision.dtype)

        def make(random: Random) -> Kernel:
            x, weight = random(*shape), 1 + 0.1 * random(width)
            return Kernel(lambda: reference.rms_norm(x, weight, NORM_EPS), lambda: _exact_norm(x, weight))

        return KernelSpec(cost, "x".join(map(str, shape)), make)

    def rotate() -> KernelSpec:
        elements = rows * heads * dim
        moved = precision.size * 2 * elements + FLOAT32_BYTES * 2 * rows * dim
        cost = Operator(stage, "rotate Q", 1, 6 * elements, 0, moved, precision.dtype)

        def make(random: Random) -> Kernel:
            x, angles = random(rows, heads, dim), random(rows, 1, dim // 2).float()
            cos, sin = (torch.cat((table, table), -1) for table in (angles.cos(), angles.sin()))
            return Kernel(lambda: reference.rotate(x, cos, sin), lambda: _exact_rotation(x, cos, sin))

        return KernelSpec(cost, f"{rows}x{heads}x{dim}", make)

    of_rows = [norm("norm", rows, inputs)] if options["norm"].kind != "layer" else []
    of_heads = [norm("norm of Q", rows, heads, dim)] if options.get("q_weight") is not None else []
    return [*of_rows, *of_heads, rotate()]


def _exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight.double()


def _exact_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    pair = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pair * torch.complex(cos[..., :half].double(), sin[..., :half].double())
    return torch.cat((turned.real, turned.imag), -1)


def measure(setup: Setup, rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did.

    Raises ValueError for what is wrong in setup, NotImplementedError for a backend that this machine lacks,
    RuntimeError for a kernel that computes something else.
    """
    backend = resolve_backend(setup.backend)
    device = setup.prepare()
    config, work = Workload.of_case(setup)
    specs, counted = kernel_specs(config, work, setup.dtype), operators(config, work, setup.dtype)
    random = random_tensors(device, setup.dtype)
    kernels = {spec.name: spec.make(random) for spec in specs}
    errors = {name: check(name, kernel, setup.dtype) for name, kernel in kernels.items()}
    ceilings = measure_ceilings(device, setup.dtype)
    timer, overwrite = CallTimer(device), overwrite_caches(device)

    def one_round() -> dict[str, float]:
        times = {}
        for name, kernel in kernels.items():
            overwrite()
            times[name] = timer(kernel.call)
        return times

    with torch.inference_mode():
        series, reason = run({backend: one_round}, rounds)
    if reason is None:
        ceilings = highest(ceilings, measure_ceilings(device, setup.dtype))
    result = Result(
        kind="kernels",
        command=command,
        environment=environment(device),
        case=describe(setup, work.tokens, work.chunk_length),
        boundary="kernel",
        backend=backend,
        series=series,
        facts={
            "chip": ceilings.name,
            "ceilings": asdict(ceilings),
            "bound_ms": {spec.name: spec.bound_ms(ceilings) for spec in specs},
            "shapes": {spec.name: spec.shape for spec in specs},
            # Runs in a step, of those that the bound counts; what stands between them is not counted.
            "counts": {spec.name: spec.cost.count for spec in specs if spec.cost in counted},
            "error_against_float64": errors,
        },
        complete=reason is None,
    )
    return result, reason


def show(result: Result) -> None:
    """A table of 80 columns."""
    case, ceilings = result.case, result.facts["ceilings"]
    table = Table(title=f"{case['name']}, {case['size']}, batch {case['batch']}, {case['dtype']}", box=None)
    table.add_column("kernel")
    for column in ("shape", "us p50", "us bound", "of bound"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, samples in result.series[result.backend].items():
        median, bound = float(np.median(samples)), result.facts["bound_ms"][name]
        times = number(1e3 * median), number(1e3 * bound)
        table.add_row(name, result.facts["shapes"][name], *times, f"{bound / median:.0%}")
    console = Console()
    console.print(table)
    console.print(
        f"Bounds of ceilings measured here: {rates(ceilings)}. Caches are overwritten before every call.",
        highlight=False,
    )
    console.print(footer(result), markup=False, highlight=False)
