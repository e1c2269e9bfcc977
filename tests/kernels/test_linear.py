"""Fused linear and gated layers against their oracle, and the oracle against the textbook."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.products import EPS, LIBRARY, SPLIT, STREAM, TACTICS, Product, statistics, workspace
from tests.kernels.support import ARCHS, DEVICE, DTYPES, Frame, assert_close, randn
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import SHARED_LIMIT, STATS_COLUMNS, InputNorm, Residual, StatsOut, Tactic, Weight
from xr0_engine.kernels.linear import PROCESSORS, default_tactic, linear, swiglu
from xr0_engine.kernels.product import MOST_WASTE, row_pieces

SHAPES = [
    pytest.param((1, 12, 128, 192), id="1x12, 128 to 192"),
    pytest.param((2, 5, 100, 72), id="2x5, 100 to 72"),
    pytest.param((3, 6, 40, 136), id="3x6, 40 to 136"),
    pytest.param((1, 1, 256, 64), id="1x1, 256 to 64"),
]
SMALL = (2, 5, 72, 40)
LEAST_BUSY = 0.6
"""Share of the processors' time, in whole waves of programs of many rows."""

# The combinations that the model uses: what stands before the product, and what follows it.
USES = {
    "plain": {},
    "patch embedding": {"bias": True, "residual": "plain", "stats": "centred"},
    "vision fc1": {"kind": "layer", "bias": True, "activation": "gelu_tanh"},
    "merger fc1": {"kind": "layer", "bias": True, "activation": "gelu"},
    "vision fc2": {"bias": True, "residual": "plain", "stats": "centred"},
    "deepstack": {"residual": "extra", "stats": "plain"},
    "middle of the dit": {"residual": "gated", "stats": "weighted"},
    "end of a dit layer": {"residual": "normed", "stats": "weighted"},
    "dit input": {"kind": "double_rms", "bias": True, "col_scale": True},
    "rms norm": {"kind": "rms", "col_scale": True},
    "layer norm, columns scaled": {"kind": "layer", "bias": True, "col_scale": True},
}


def make_residual(kind, batch, rows, outputs, dtype):
    if kind is None:
        return None
    x = randn(batch, rows, outputs, dtype=dtype)
    if kind == "extra":
        index = torch.full((batch, rows + 2), -1, dtype=torch.int32, device=DEVICE)[:, :rows]
        index[:, ::2] = torch.arange(index[:, ::2].numel(), dtype=torch.int32, device=DEVICE).view(batch, -1).flip(0)
        return Residual(x, extra=randn(batch * rows, outputs, dtype=dtype), extra_index=index)
    gate = None if kind == "plain" else randn(outputs)
    if kind == "normed":
        return Residual(x, gate, statistics(x), 1 + 0.2 * randn(outputs), EPS)
    return Residual(x, gate)


def textbook(product, residual, activation, dtype):
    """In dtype throughout."""
    y = product.textbook(dtype)
    if activation is not None:
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual is not None:
        base = residual.x.to(dtype)
        if residual.sums is not None:
            base = F.rms_norm(base, base.shape[-1:], residual.weight.to(dtype), residual.eps)
        y = base + (y if residual.gate is None else residual.gate.to(dtype) * y)
        if residual.extra is not None:
            given = (residual.extra_index >= 0)[..., None]
            y = y + torch.where(given, residual.extra.to(dtype)[residual.extra_index.long()], 0)
    return y


def run_oracle(product, epilogue, stats_options, tactic=TACTICS[0].values[0]):
    """linear of the oracle in float32: (out, sums)."""
    batch, rows, outputs = *product.x.shape[:2], product.weight.data.shape[0]
    out = torch.empty(batch, rows, outputs, device=DEVICE)
    sums = torch.zeros(-(-outputs // STATS_COLUMNS), batch, rows, 2, device=DEVICE)
    stats = StatsOut(sums, **stats_options)
    arguments = {**product.arguments, **epilogue, "stats": stats, "tactic": tactic, "workspace": workspace()}
    fused_reference.linear(product.x, product.weight, out, **arguments)
    return out, sums


def make_case(shape, dtype, use, x_dtype=None):
    """(product, epilogue, options of StatsOut) of one of USES."""
    torch.manual_seed(0)
    batch, rows, _, outputs = shape
    before = {key: use[key] for key in ("kind", "bias", "col_scale") if key in use}
    product = Product.make(shape, dtype, **before, x_dtype=x_dtype)
    residual = make_residual(use.get("residual"), batch, rows, outputs, x_dtype or dtype)
    stats_weight = 1 + 0.2 * randn(outputs) if use.get("stats") == "weighted" else None
    stats_options = {"weight": stats_weight, "centred": use.get("stats") == "centred"}
    return product, {"residual": residual, "activation": use.get("activation")}, stats_options


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_oracle_is_the_textbook(use):
    product, epilogue, stats_options = make_case((2, 5, 100, 130), torch.float32, use)
    out, sums = run_oracle(product, epilogue, stats_options)
    expected = textbook(product, **epilogue, dtype=torch.float64)
    assert_close(out, expected.float())
    for slot, part in zip(sums, expected.split(STATS_COLUMNS, dim=-1), strict=True):
        first, second = part.square().sum(-1), torch.zeros(2, 5, dtype=torch.float64, device=DEVICE)
        if stats_options["centred"]:
            first, second = part.shape[-1] * part.var(-1, correction=0), part.sum(-1)
        assert_close(slot[..., 0], first.float())
        if stats_options["weight"] is None:
            assert_close(slot[..., 1], second.float())
    if stats_options["weight"] is not None:
        assert_close(sums[..., 1].sum(0), (stats_options["weight"] * expected).square().sum(-1).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_linear(use, tactic, dtype):
    check_linear(SMALL, dtype, use, tactic)


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float16"])
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_shapes(shape, tactic, dtype):
    check_linear(shape, dtype, USES["dit input"] | USES["end of a dit layer"], tactic)


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float32"])
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
@pytest.mark.parametrize("use", ["dit input", "end of a dit layer"])
def test_linear_of_a_float32_stream(use, tactic, dtype):
    check_linear(SMALL, dtype, USES[use], tactic, x_dtype=torch.float32)


def check_linear(shape, dtype, use, tactic, x_dtype=None, adjacent=False):
    """adjacent: whether the batches of x follow each other."""
    product, epilogue, stats_options = make_case(shape, dtype, use, x_dtype)
    if adjacent:
        product = replace(product, x=product.x.contiguous())
    batch, rows, _, outputs = shape
    out = Frame(batch, rows, outputs, dtype=x_dtype or dtype)
    sums = Frame(-(-outputs // STATS_COLUMNS), batch, rows, 2)
    stats = StatsOut(sums.view, **stats_options) if "stats" in use else None
    if use.get("stats") == "plain":
        sums.view[..., 1] = 0
    arguments = {**product.arguments, **epilogue, "stats": stats, "tactic": tactic, "workspace": workspace()}
    linear(product.x, product.weight, out.view, **arguments)
    exact, _ = run_oracle(product, epilogue, stats_options)
    plain = textbook(product, **epilogue, dtype=dtype)
    assert_close(out.result(), exact, None if dtype == torch.float32 else plain)
    if stats is not None:
        # They are those of the rows as they stand in out.
        written = torch.zeros_like(sums.view)
        fused_reference.write_stats(out.result().float(), StatsOut(written, **stats_options))
        assert_close(sums.result(), written)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
@pytest.mark.parametrize("kind", ["rms", "layer", "double_rms"])
def test_swiglu(kind, tactic, dtype):
    check_swiglu(SMALL, kind, tactic, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tactic", TACTICS)
def test_swiglu_of_more_rows_than_a_tile(tactic, dtype):
    check_swiglu((1, 17, 64, 144), None, tactic, dtype)


def check_swiglu(shape, kind, tactic, dtype):
    torch.manual_seed(0)
    batch, rows, _, outputs = shape
    product = Product.make(shape, dtype, kind, bias=kind != "rms", col_scale=kind == "double_rms")
    out, exact = Frame(batch, rows, outputs // 2, dtype=dtype), torch.empty(batch, rows, outputs // 2, device=DEVICE)
    for run, target in ((swiglu, out.view), (fused_reference.swiglu, exact)):
        run(product.x, product.weight, target, **product.arguments, tactic=tactic, workspace=workspace())

    def gated(dtype):
        gate, up = product.textbook(dtype).chunk(2, dim=-1)
        return F.silu(gate) * up

    assert_close(exact, gated(torch.float64).float(), gated(dtype))
    assert_close(out.result(), exact, None if dtype == torch.float32 else gated(dtype))


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float32"])
@pytest.mark.parametrize("tactic", [SPLIT, TACTICS[0], STREAM])
@pytest.mark.parametrize("op", ["linear", "swiglu"])
def test_eight_bit_weights(op, tactic, dtype):
    torch.manual_seed(0)
    product = Product.make(SMALL, dtype, "rms", bias=True)
    data = torch.randint(-127, 128, product.weight.data.shape, dtype=torch.int8, device=DEVICE)
    product = replace(product, weight=Weight(data, 0.001 + 0.001 * torch.rand(len(data), device=DEVICE)))
    columns = len(data) // (2 if op == "swiglu" else 1)
    out, exact = Frame(2, 5, columns, dtype=dtype), torch.empty(2, 5, columns, device=DEVICE)
    for run, target in ((globals()[op], out.view), (getattr(fused_reference, op), exact)):
        run(product.x, product.weight, target, **product.arguments, tactic=tactic, workspace=workspace())
    plain = product.textbook(dtype)
    if op == "swiglu":
        plain = F.silu(plain[..., :columns]) * plain[..., columns:]
    assert_close(out.result(), exact, plain)


# The interpreter tells of infinite exponentials and cubes, which are as they should be.
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "bfloat16"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_of_large_numbers(activation, dtype):
    """As float32 holds them before the result is rounded: nothing of theirs is infinite or not a number."""
    large = torch.tensor([0.0, 60.0, 88.0, 89.0, 300.0, 1e4, 6.5e4, 1e13, 1e15], device=DEVICE)
    y = torch.cat((-large, large[: 9 if dtype == torch.float32 else 7]))
    x, data = torch.zeros(1, 1, 32, dtype=dtype, device=DEVICE), torch.zeros(len(y), 32, dtype=dtype, device=DEVICE)
    out, run = Frame(1, 1, len(y), dtype=dtype), {"tactic": TACTICS[0].values[0], "workspace": workspace()}
    if activation == "silu":
        weight, bias = Weight(data.repeat(2, 1)), torch.cat((y, torch.ones_like(y)))
        swiglu(x, weight, out.view, bias=bias, **run)
        exact = F.silu(y.double())
    else:
        linear(x, Weight(data), out.view, bias=y, activation=activation, **run)
        exact = F.gelu(y.double(), approximate="tanh" if activation == "gelu_tanh" else "none")
    torch.testing.assert_close(out.result()[0, 0], exact.to(dtype))


@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY, STREAM])
@pytest.mark.parametrize("rows_of", ["some rows", "one row repeated", "one batch repeated"])
def test_views_of_x(rows_of, tactic):
    torch.manual_seed(0)
    whole = randn(3, 7, 40)
    sums = statistics(whole)
    x, sums = {
        "some rows": (whole[:, 2:], sums[:, :, 2:]),
        "one row repeated": (whole[:, :1].expand(3, 5, 40), sums[:, :, :1].expand(-1, 3, 5, 2)),
        "one batch repeated": (whole[:1].expand(3, 7, 40), sums[:, :1].expand(-1, 3, 7, 2)),
    }[rows_of]
    weight, out = Weight(randn(40, 40)), Frame(*x.shape[:2], 40)
    exact = torch.empty(out.shape, device=DEVICE)
    for run, target in ((linear, out.view), (fused_reference.linear, exact)):
        run(x, weight, target, norm=InputNorm(sums, EPS), tactic=tactic, workspace=workspace())
    assert_close(out.result(), exact)


def test_split_sums_repeat_bit_for_bit_and_leave_counters_zero():
    torch.manual_seed(0)
    x, weight, scratch = randn(2, 4, 80), Weight(randn(72, 80)), workspace()
    outs = [torch.empty(2, 4, 72, device=DEVICE) for _ in range(2)]
    for out in outs:
        linear(x, weight, out, tactic=Tactic(16, 64, 16, split_k=5), workspace=scratch)
    assert torch.equal(*outs)
    assert not scratch.counters(2).any()


@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY, STREAM])
def test_output_in_place_of_the_residual(tactic):
    torch.manual_seed(0)
    x, weight, stream = randn(2, 9, 40), Weight(randn(72, 40)), randn(2, 9, 72)
    expected = stream + x @ weight.data.T
    linear(x, weight, stream, residual=Residual(stream), tactic=tactic, workspace=workspace())
    assert_close(stream, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"out": torch.empty(1, 2, 65)}, r"out: expected shape \(1, 2, 64\), got", id="out"),
        pytest.param({"bias": torch.empty(63)}, r"bias: expected shape \(64,\), got \(63,\)", id="bias"),
        pytest.param({"col_scale": torch.empty(64)}, r"col_scale: expected shape \(32,\)", id="col_scale"),
        pytest.param({"weight": Weight(torch.empty(64, 31))}, r"weight.data: expected shape \(64, 32\)", id="weight"),
        pytest.param(
            {"weight": Weight(torch.empty(64, 32, dtype=torch.int8))},
            "weight.scale: expected for torch.int8",
            id="scale",
        ),
        pytest.param({"norm": InputNorm(torch.empty(3, 1, 2, 2), EPS)}, "norm.sums: expected 1, 1, 2 slots", id="sums"),
        pytest.param({"norm": InputNorm(torch.empty(1, 1, 2, 2), EPS, "layer")}, "column_sums: expected", id="layer"),
        pytest.param({"residual": Residual(torch.empty(1, 3, 64))}, "residual.x: expected shape", id="residual"),
        pytest.param(
            {"residual": Residual(torch.empty(1, 2, 64), weight=torch.empty(64))}, "residual.sums", id="half a norm"
        ),
        pytest.param(
            {"residual": Residual(torch.empty(1, 2, 64), extra=torch.empty(4, 64))}, "extra_index", id="half an extra"
        ),
        pytest.param({"stats": StatsOut(torch.empty(3, 1, 2, 2))}, "stats.sums: expected 1, 2, 4 slots", id="stats"),
        pytest.param(
            {"stats": StatsOut(torch.empty(1, 1, 2, 2)), "tactic": Tactic(16, 32, 32)}, "multiple of 64", id="slots"
        ),
        pytest.param(
            {"stats": StatsOut(torch.empty(1, 1, 2, 2), torch.empty(64), centred=True)},
            "stats.weight: expected None for centred sums",
            id="two kinds of stats",
        ),
        pytest.param({"tactic": Tactic(24, 64, 32)}, "tactic.block_m: expected a power of two", id="tile"),
        pytest.param({"tactic": Tactic(16, 64, 32, split_k=0)}, "tactic.split_k: expected at least 1", id="split"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "x": torch.empty(1, 2, 32),
        "weight": Weight(torch.empty(64, 32)),
        "out": torch.empty(1, 2, 64),
        "tactic": Tactic(16, 64, 32),
        "workspace": workspace(),
    }
    with pytest.raises(ValueError, match=message):
        linear(**{**arguments, **change})


def test_swiglu_needs_gate_and_up():
    x, out = torch.empty(1, 2, 32), torch.empty(1, 2, 64)
    with pytest.raises(ValueError, match=r"weight\.data: expected 128 rows for out's 64, got 64"):
        swiglu(x, Weight(torch.empty(64, 32)), out, tactic=Tactic(16, 64, 32), workspace=workspace())


def test_library_refuses_eight_bits():
    weight = Weight(torch.empty(64, 32, dtype=torch.int8), torch.empty(64))
    with pytest.raises(NotImplementedError, match="library"):
        linear(torch.empty(1, 2, 32), weight, torch.empty(1, 2, 64), tactic=Tactic(library=True), workspace=workspace())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [1, 12, 32, 33, 64])
@pytest.mark.parametrize(
    ("kind", "n", "k"),
    [("linear", 1024, 1024), ("linear", 1024, 4096), ("swiglu", 8192, 1024), ("qkv", 3072, 1024), ("linear", 32, 72)],
)
def test_default_tactic_of_few_rows(kind, n, k, rows, arch):
    tactic = default_tactic(kind, rows, n, k, arch)
    width = {"linear": tactic.block_n, "swiglu": 2 * tactic.block_n, "qkv": 128}[kind]
    blocks = -(-k // tactic.block_k)
    assert tactic.block_m >= rows, "the weight is read once"
    assert blocks % tactic.split_k == 0, "no split is empty"
    programs = -(-n // width) * tactic.split_k
    assert programs <= PROCESSORS[arch]
    assert programs >= PROCESSORS[arch] / 2 or tactic.split_k == blocks


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [65, 208, 320, 512, 960, 2520])
@pytest.mark.parametrize(
    ("kind", "n", "k"),
    [("linear", 2560, 4096), ("linear", 2560, 9728), ("swiglu", 19456, 2560), ("qkv", 6144, 2560), ("qkv", 2048, 2560)],
)
def test_default_tactic_of_many_rows(kind, n, k, rows, arch):
    tactic = default_tactic(kind, rows, n, k, arch)
    assert tactic.schedule == "stream"
    pieces, width = row_pieces(rows, tactic.block_m), {"swiglu": 2 * tactic.block_n}.get(kind, tactic.block_n)
    groups, tiles = -(-rows // sum(pieces)), -(-rows // sum(pieces)) * -(-n // width)
    # Of 65 rows no multiple of 16 wastes less.
    assert groups * sum(pieces) - rows <= MOST_WASTE * groups * sum(pieces) or rows == 65
    programs, processors = tiles if tactic.split_k == 1 else tactic.split_k, PROCESSORS[arch]
    assert programs / (-(-programs // processors) * processors) >= LEAST_BUSY


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rows", [12, 64, 194, 512])
@pytest.mark.parametrize(
    ("kind", "n", "k"),
    [("linear", 2560, 4096), ("linear", 2560, 9728), ("swiglu", 19456, 2560), ("qkv", 6144, 2560), ("linear", 32, 72)],
)
def test_default_tactic_of_8_bit_factors(kind, n, k, rows, arch):
    tactic = default_tactic(kind, rows, n, k, arch, factor_bytes=1)
    assert tactic.schedule == ("tiled" if rows <= 64 else "stream")
    height = tactic.block_m if rows <= 64 else sum(row_pieces(rows, tactic.block_m))
    width = {"swiglu": 2 * tactic.block_n}.get(kind, tactic.block_n)
    # One stage of factors that products of warps read is in registers.
    held = tactic.stages - (rows > 64 and arch != 90)
    assert held * (height + width) * tactic.block_k <= SHARED_LIMIT[arch]
    assert tactic.block_k >= 32


def test_default_tactic_of_an_unknown_chip():
    with pytest.raises(ValueError, match="arch: expected one of 80, 86, 89"):
        default_tactic("linear", 12, 1024, 1024, 75)
