"""Every kernel family at the smallest sizes that have all its parts: what mutations break, and schedules vary.

Each runs behind a neighbour that writes what it reads, or reads what it writes, so that a dependent launch has
something to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from tests.fused.test_head import SPLIT, make_head, make_inputs, streamed_head
from tests.kernels.products import EPS, Product, statistics
from xr0_engine.env import emulated_arch
from xr0_engine.fused.ops import FusedOps
from xr0_engine.kernels import reference
from xr0_engine.kernels.arguments import InputNorm, Residual, StatsOut, Tactic, Weight, Workspace
from xr0_engine.kernels.attention import attention
from xr0_engine.kernels.embed import embed, layer_norm, rope_tables
from xr0_engine.kernels.flow import dit_rope_tables, euler_step, start_flow
from xr0_engine.kernels.lambda_attention import lambda_attention
from xr0_engine.kernels.linear import linear, swiglu
from xr0_engine.kernels.qkv import qkv
from xr0_engine.kernels.quantize import quantize

CPU = torch.device("cpu")
DTYPE = torch.bfloat16
WHOLE_WARPGROUP = Tactic(64, 64, 64, split_k=2, warps=4, stages=3)
"""Products of 64 rows are wgmma on sm_90."""
BULK = Tactic(128, 64, 64, split_k=4, warps=4, stages=3, schedule="tma")
"""Tiles that come by TMA, each shared by two programs; of 72 rows 64 are the MMA's rows, the rest among 16 columns."""
SWAPPED = Tactic(128, 64, 64, split_k=4, warps=4, stages=3, schedule="swapped")
"""The weight's rows are the MMA's, each tile cut for two programs; 72 rows are the columns of two products."""
GROUPS = replace(SWAPPED, schedule="warpgroups")
"""The same by warpgroups and TMA."""
SKINNY = Tactic(16, 64, 64, split_k=2, warps=4, stages=3)
"""Products of few rows: mma.sync everywhere."""
STREAM = Tactic(128, 64, 64, split_k=3, warps=4, stages=3, schedule="stream")
"""Pieces of 16 and 64 rows, blocks of K shared out over three programs."""
WHOLE = Tactic(16, 16, 128, split_k=2, warps=4, stages=2, schedule="whole")
"""A flow step's products: two steps of K, each over four warps, behind two programs."""
SPLIT_KEYS = Tactic(32, 32, split_k=2, warps=4, stages=2)
WHOLE_KEYS = Tactic(16, 16, warps=4, stages=2, schedule="whole")
"""A flow step's attention: two steps of 64 keys, each over four warps; of 20 queries the own keys are two as well."""


@dataclass(frozen=True)
class Family:
    """kernel: the name of its Triton function. run: launches it, on the same inputs each time; returns its outputs."""

    kernel: str
    run: Callable[[], tuple[Tensor, ...]]


def _writer(x: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A tensor like x, and the kernel ahead that fills it with x normalised: who reads it has to wait."""
    rows = x.reshape(1, -1, x.shape[-1]).contiguous()
    out, ones = torch.full_like(rows, torch.nan), torch.ones(x.shape[-1], dtype=DTYPE)
    return out.view(x.shape), lambda: layer_norm(rows, ones, ones, EPS, out)


def _reader(target: Tensor) -> Callable[[], None]:
    """The kernel ahead, which reads what is to be written."""
    rows, ones = target.view(1, -1, target.shape[-1]), torch.ones(target.shape[-1])
    out = torch.empty_like(rows)
    return lambda: layer_norm(rows, ones, ones, EPS, out)


COUNTERS = 64


def _workspace() -> Workspace:
    """Large enough: where PyTorch has to clear more, the launches before are waited for."""
    workspace = Workspace(CPU)
    workspace.reserve(1 << 17, COUNTERS)
    return workspace


def _outputs(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def _linear(tactic: Tactic, rows: int = 80, inputs: int = 320) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    columns = 128
    product = Product.make((1, rows, inputs, columns), DTYPE, "rms", bias=True)
    stream, sums = torch.randn(1, rows, columns), torch.zeros(columns // min(64, tactic.block_n), 1, rows, 2)
    out = _outputs(1, rows, columns, dtype=torch.float32)
    (x, ahead), workspace = _writer(product.x), _workspace()
    ahead()
    linear(
        x, product.weight, out, **product.arguments, residual=Residual(stream), stats=StatsOut(sums), tactic=tactic,
        workspace=workspace,
    )  # fmt: skip
    return out, sums, workspace.counters(COUNTERS)


def _linear_of_8_bits() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, data = torch.randn(1, 40, 192), torch.randn(128, 192)
    weight, out, workspace = (
        Weight(*reference.quantize_rows(data, torch.int8)),
        _outputs(1, 40, 128, dtype=torch.float32),
        _workspace(),
    )
    rows, round_rows = _rounding(x)
    round_rows()
    linear(rows[0], weight, out, x_scale=rows[1], tactic=SKINNY, workspace=workspace)
    return out, workspace.counters(COUNTERS)


def _quantize() -> tuple[Tensor, ...]:
    rows, round_rows = _rounding(torch.randn(1, 5, 200, generator=torch.Generator().manual_seed(0)))
    round_rows()
    return rows


def _rounding(x: Tensor) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
    """Rows in 8 bits with their scales, and what makes them of what a kernel ahead writes. What the host computes comes
    before: it would wait for that kernel."""
    (given, ahead), columns = _writer(x.to(DTYPE)), x.shape[-1]
    out, scale = torch.zeros(x.shape, dtype=torch.int8), _outputs(*x.shape[:2], dtype=torch.float32)
    norm, col_scale = InputNorm(statistics(x), EPS), torch.linspace(0.5, 1.5, columns)

    def round_rows() -> None:
        ahead()
        quantize(given, out, scale, norm=norm, col_scale=col_scale)

    return (out, scale), round_rows


def _swiglu() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    product = Product.make((1, 40, 192, 256), DTYPE, "rms", col_scale=True)
    out, (x, ahead), workspace = _outputs(1, 40, 128), _writer(product.x), _workspace()
    tactic = Tactic(16, 32, 64, split_k=2, warps=4, stages=3)
    ahead()
    swiglu(x, product.weight, out, **product.arguments, tactic=tactic, workspace=workspace)
    return out, workspace.counters(COUNTERS)


def _qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    rows, heads, dim = 40, 2, 64
    product = Product.make((1, rows, 192, 3 * heads * dim), DTYPE, "double_rms", bias=True, col_scale=True)
    q, k, v = (_outputs(1, heads, rows, dim) for _ in range(3))
    angles, norms = torch.randn(1, rows, dim // 2), torch.rand(2, dim).to(DTYPE)
    cos, sin = angles.cos(), angles.sin()
    (x, ahead), workspace = _writer(product.x), _workspace()
    ahead()
    qkv(
        x, product.weight, q, k, v, **product.arguments, q_weight=norms[0], k_weight=norms[1], eps=EPS, cos=cos,
        sin=sin, tactic=SKINNY, workspace=workspace,
    )  # fmt: skip
    return q, k, v, workspace.counters(COUNTERS)


def _attention() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 70, 64).to(DTYPE)
    out, (q, ahead) = _outputs(1, 70, 256), _writer(torch.randn(1, 4, 70, 64).to(DTYPE))
    tactic, workspace = Tactic(64, 32, warps=4, stages=2), _workspace()
    ahead()
    attention(q, k, v, out, causal=True, tactic=tactic, workspace=workspace)
    return (out,)


def _lambda_attention(tactic: Tactic, queries: int = 12) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, queries, 64).to(DTYPE)
    keys, values = torch.randn(2, 1, 1, 75, 64).to(DTYPE)
    begin, end = torch.tensor([3], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    out, (q, ahead), workspace = _outputs(1, queries, 128), _writer(q), _workspace()
    ahead()
    lambda_attention(q, k, v, keys, values, begin, end, out, window=4, context=2, tactic=tactic, workspace=workspace)
    return out, workspace.counters(COUNTERS)


def _chunk() -> tuple[Tensor, Tensor, Tensor]:
    """z, prefix_length, action_mask of 10 actions of 32 columns."""
    mask = torch.ones(1, 10, 32)
    mask[..., -3:] = 0
    return torch.randn(1, 10, 32), torch.tensor([3], dtype=torch.int32), mask


def _start_flow() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    noise, length, mask = _chunk()
    z, hidden = torch.zeros(1, 10, 32), _outputs(1, 10, 160)
    prefix, in_weight, ahead = torch.randn(1, 10, 32), torch.randn(160, 32).to(DTYPE), _reader(z)
    ahead()
    start_flow(noise, prefix, length, mask, in_weight, z, hidden)
    return z, hidden


def _euler_step() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    z, length, mask = _chunk()
    stream = torch.randn(1, 10, 160)
    weight1, weight2 = (torch.randn(32, 160) / 16).to(DTYPE), (torch.randn(32, 32) / 8).to(DTYPE)
    in_weight, sums = torch.randn(160, 32).to(DTYPE), statistics(stream)
    z_next, hidden = torch.zeros(1, 10, 32), _outputs(1, 10, 160)
    ahead = _reader(z_next)
    ahead()
    euler_step(
        stream, sums, EPS, weight1, weight2, z, z_next, length, mask, 0.2, in_weight, hidden
    )  # fmt: skip
    return z_next, hidden


def _embed() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    table, (image_tokens, ahead) = torch.randn(11, 200).to(DTYPE), _writer(torch.randn(4, 200).to(DTYPE))
    ids = torch.randint(0, 11, (1, 6), dtype=torch.int32)
    index = torch.tensor([[-1, 0, 3, -1, 2, -1]], dtype=torch.int32)
    out, sums = _outputs(1, 6, 200), torch.zeros(4, 1, 6, 2)
    ahead()
    embed(ids, table, index, image_tokens, out, StatsOut(sums))
    return out, sums


def _tables(cos: Tensor, sin: Tensor, run: Callable[..., None], *arguments: Tensor, **rest: int) -> tuple[Tensor, ...]:
    half = cos.shape[-1]
    frequencies = 5e6 ** -torch.linspace(0, 1, half)
    axes = torch.arange(half, dtype=torch.int32) % 3
    ahead = _reader(cos)
    ahead()
    run(*arguments, frequencies, axes, cos, sin, **rest)
    return cos, sin


def _rope_tables() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    positions = torch.randint(0, 9000, (3, 1, 19), dtype=torch.int32)
    return _tables(*torch.zeros(2, 1, 19, 20), rope_tables, positions)


def _dit_rope_tables() -> tuple[Tensor, ...]:
    base, length = torch.tensor([[90], [80], [85]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    return _tables(*torch.zeros(2, 1, 12, 20), dit_rope_tables, base, length, context=2, offset=0)


def _layer_norm() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    (x, ahead), ones = _writer(torch.randn(1, 5, 200).to(DTYPE)), torch.ones(200, dtype=DTYPE)
    out = _outputs(1, 5, 200)
    ahead()
    layer_norm(x, ones, ones, EPS, out)
    return (out,)


def _flow_loop() -> tuple[Tensor, ...]:
    head = make_head(DTYPE)
    torch.manual_seed(0)
    inputs, buffers = make_inputs(head, 1), head.buffers(1, 6)
    ops = FusedOps("triton", CPU)
    ops.default = lambda kind, shape, *_: SPLIT  # type: ignore[method-assign]
    chunk = head.run(ops, inputs, buffers, flow="persistent")
    return chunk, ops.workspace.counters(ops.workspace.size[1])


def _streamed_flow() -> tuple[Tensor, ...]:
    head = streamed_head()
    torch.manual_seed(0)
    inputs, buffers = make_inputs(head, 1), head.buffers(1, 6)
    ops = FusedOps("triton", CPU)
    chunk = head.run(ops, inputs, buffers, flow="streamed")
    return chunk, ops.workspace.counters(ops.workspace.size[1])


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "linear": Family("_linear", lambda: _linear(SKINNY)),
        "linear, 64 rows": Family("_linear", lambda: _linear(WHOLE_WARPGROUP)),
        "linear, stream": Family("_wide", lambda: _linear(STREAM)),
        "linear, 8 bits": Family("_linear", _linear_of_8_bits),
        "linear, whole": Family("_whole_linear", lambda: _linear(WHOLE, 12, 512)),
        **(
            {}
            if (emulated_arch() or 0) < 90
            else {"linear, tma": Family("_bulk_product", lambda: _linear(BULK, 72, 640))}
        ),
        "linear, swapped": Family("_swapped", lambda: _linear(SWAPPED, 72, 640)),
        **(
            {"linear, warpgroups": Family("_swapped", lambda: _linear(GROUPS, 72, 640))}
            if emulated_arch() == 90
            else {}
        ),
        "swiglu": Family("_swiglu", _swiglu),
        "qkv": Family("_qkv", _qkv),
        "attention": Family("_attention", _attention),
        "lambda_attention": Family("_lambda_attention", lambda: _lambda_attention(SPLIT_KEYS)),
        "lambda_attention, whole": Family("_whole_attention", lambda: _lambda_attention(WHOLE_KEYS, 20)),
        "start_flow": Family("_start_flow", _start_flow),
        "euler_step": Family("_euler_step", _euler_step),
        "embed": Family("_embed", _embed),
        "rope_tables": Family("_rope_tables", _rope_tables),
        "dit_rope_tables": Family("_dit_rope_tables", _dit_rope_tables),
        "layer_norm": Family("_layer_norm", _layer_norm),
        "quantize": Family("_quantize", _quantize),
        "flow_loop": Family("_flow_loop", _flow_loop),
        "streamed_flow": Family("_streamed_flow", _streamed_flow),
    }
)
