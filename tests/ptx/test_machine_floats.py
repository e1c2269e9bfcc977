"""Float instructions against NumPy and PyTorch: NaN, infinities, subnormal values, signed zeros among the operands."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.machine_floats import decoded, encoded, floats, flushed, fused, halves, same, same_codes
from tests.ptx.machine_support import lanewise, spread

APPROXIMATE_ULPS = 1
"""NumPy's functions in float64, rounded to float32, differ from the machine's own by a last bit at most."""


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def minimum(a, b):
    """PTX's: a number rather than NaN, -0 before +0."""
    smaller = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, smaller))


def maximum(a, b):
    return -minimum(-a, -b)


def nan_or(function):
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), function(a, b))


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": minimum,
    "max": maximum,
    "min.NaN": nan_or(minimum),
    "max.NaN": nan_or(maximum),
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", [name for name in BINARY if "NaN" not in name])
def test_arithmetic(name, bits):
    a, b = spread([floats(bits, 20), floats(bits, 20)])
    same(lanewise(f"{name}.f{bits} {{d}}, {{a}}, {{b}};", [a, b], a.dtype), BINARY[name](a, b))


@pytest.mark.parametrize("name", ["min.NaN", "max.NaN"])
def test_nan_propagates(name):
    a, b = spread([floats(), floats()])
    same(lanewise(f"{name}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32), BINARY[name](a, b))


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_flushing(name):
    a, b = spread([floats(), floats()])
    found = lanewise(f"{name}.ftz.f32 {{d}}, {{a}}, {{b}};", [a, b], np.float32)
    same(found, flushed(BINARY[name](flushed(a), flushed(b))))


@pytest.mark.parametrize("name", ["div.full.f32", "div.approx.f32", "div.rn.f32", "div.rn.f64"])
def test_division(name):
    a, b = spread([floats(int(name[-2:])), floats(int(name[-2:]))])
    same(lanewise(f"{name} {{d}}, {{a}}, {{b}};", [a, b], a.dtype), a / b)


def test_fused_multiply_add():
    a, b, c = spread([floats(count=10)[::2]] * 3)
    finite = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32)
    for sources in ((a, b, c), tuple(finite)):
        found = lanewise("fma.rn.f32 {d}, {a}, {b}, {c};", list(sources), np.float32)
        same(found, fused(*sources).astype(np.float32))
    found = lanewise("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", [a, b, c], np.float32)
    same(found, flushed(fused(flushed(a), flushed(b), flushed(c)).astype(np.float32)))


def test_fused_multiply_add_keeps_what_a_product_would_lose():
    x = np.full(32, 1 + 2.0**-12, np.float32)
    found = lanewise("fma.rn.f32 {d}, {a}, {a}, {b};", [x, -(x * x)], np.float32)
    np.testing.assert_array_equal(found, np.full(32, 2.0**-24, np.float32))


@pytest.mark.parametrize("bits", [32, 64])
def test_signs(bits):
    (a,) = spread([floats(bits)])
    same(lanewise(f"neg.f{bits} {{d}}, {{a}};", [a], a.dtype), -a)
    same(lanewise(f"abs.f{bits} {{d}}, {{a}};", [a], a.dtype), np.abs(a))
    b = np.roll(a, 3)
    same(lanewise(f"copysign.f{bits} {{d}}, {{a}}, {{b}};", [a, b], a.dtype), np.copysign(b, a))


FUNCTIONS = {
    "sqrt.approx": np.sqrt,
    "sqrt.rn": np.sqrt,
    "rsqrt.approx": lambda a: 1 / np.sqrt(a),
    "rcp.approx": lambda a: 1 / a,
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "sin.approx": np.sin,
    "cos.approx": np.cos,
    "tanh.approx": np.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    (a,) = spread([floats(count=400)])
    if name[:3] in ("sin", "cos"):
        a = np.where(np.abs(a) < 1e4, a, np.float32(1))
    expected = FUNCTIONS[name](a.astype(np.float64)).astype(np.float32)
    found = lanewise(f"{name}.f32 {{d}}, {{a}};", [a], np.float32)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    apart = found.view(np.int32).astype(np.int64) - expected.view(np.int32)
    assert (np.abs(apart)[~np.isnan(expected)] <= APPROXIMATE_ULPS).all()


@pytest.mark.parametrize("name", ["ex2.approx.ftz", "rsqrt.approx.ftz"])
def test_functions_flush(name):
    small = np.resize(np.array([-130.0, -149.0, 1e-40, -1e-40, 2.0, 0.0], np.float32), 32)
    found = lanewise(f"{name}.f32 {{d}}, {{a}};", [small], np.float32)
    expected = FUNCTIONS[name[:-4]](flushed(small).astype(np.float64)).astype(np.float32)
    same(found, flushed(expected))


ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("kind", ["f32", "ftz.f32", "f64", "f16", "bf16"])
def test_comparisons(kind):
    if kind in ("f16", "bf16"):
        sources = spread([halves(kind), halves(kind)])
        a, b = (decoded(each, kind) for each in sources)
    else:
        sources = spread([floats(int(kind[-2:])), floats(int(kind[-2:]))])
        a, b = (flushed(each) if "ftz" in kind else each for each in sources)
    unordered = np.isnan(a) | np.isnan(b)
    expected = {name: function(a, b) for name, function in ORDERED.items()}
    expected["ne"] = ~unordered & (a != b)
    expected |= {f"{name}u": found | unordered for name, found in list(expected.items())}
    expected |= {"num": ~unordered, "nan": unordered}
    for name, wanted in expected.items():
        found = lanewise(f"setp.{name}.{kind} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;", sources, np.uint32)
        np.testing.assert_array_equal(found.astype(bool), wanted, name)


HALF_BINARY = {name: BINARY[name] for name in ("add", "sub", "mul", "min", "max", "min.NaN", "max.NaN")}


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", HALF_BINARY)
def test_halves_and_pairs(name, kind):
    a, b = spread([halves(kind, 20), halves(kind, 20)])
    expected = encoded(HALF_BINARY[name](*(decoded(each, kind).astype(np.float64) for each in (a, b))), kind)
    same_codes(lanewise(f"{name}.{kind} {{d}}, {{a}}, {{b}};", [a, b], np.uint16), expected, kind)
    pairs = [np.concatenate([each, each[::-1]]).view(np.uint32) for each in (a, b)]
    found = lanewise(f"{name}.{kind}x2 {{d}}, {{a}}, {{b}};", pairs, np.uint32)
    same_codes(found.view(np.uint16), np.concatenate([expected, expected[::-1]]), kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_fused_multiply_add_of_halves_rounds_once(kind):
    drawn = np.random.default_rng(0)
    codes = [encoded(drawn.normal(size=1 << 14) * scale, kind) for scale in (1, 1, 30)]
    edges = spread([halves(kind, 0)] * 3)
    for a, b, c in (codes, edges):
        expected = encoded(fused(*(decoded(each, kind) for each in (a, b, c))), kind)
        same_codes(lanewise(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint16), expected, kind)
        positive = np.where(decoded(expected, kind) < 0, 0, expected)
        found = lanewise(f"fma.rn.relu.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint16)
        np.testing.assert_array_equal(np.abs(decoded(found, kind)), np.abs(decoded(positive, kind)))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_signs_and_functions_of_halves(kind):
    (a,) = spread([halves(kind, 300)])
    values = decoded(a, kind).astype(np.float64)
    same_codes(lanewise(f"neg.{kind} {{d}}, {{a}};", [a], np.uint16), a ^ 0x8000, kind)
    same_codes(lanewise(f"abs.{kind} {{d}}, {{a}};", [a], np.uint16), a & 0x7FFF, kind)
    for name, function in (("ex2.approx.ftz" if kind == "bf16" else "ex2.approx", np.exp2), ("tanh.approx", np.tanh)):
        found = decoded(lanewise(f"{name}.{kind} {{d}}, {{a}};", [a], np.uint16), kind)
        expected = decoded(encoded(function(values).astype(np.float32).astype(np.float64), kind), kind)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_pairs_of_float32(name):
    a, b = spread([floats(), floats()])
    found = lanewise(f"{name}.rn.f32x2 {{d}}, {{a}}, {{b}};", [a.view(np.uint64), b.view(np.uint64)], np.uint64)
    same(found.view(np.float32)[: len(a)], BINARY[name](a, b))


def test_fused_pairs_of_float32():
    a, b, c = np.random.default_rng(0).normal(size=(3, 4096)).astype(np.float32)
    found = lanewise("fma.rn.f32x2 {d}, {a}, {b}, {c};", [each.view(np.uint64) for each in (a, b, c)], np.uint64)
    same(found.view(np.float32), fused(a, b, c).astype(np.float32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mixed_precision(kind):
    a, c = spread([halves(kind, 20), floats()])
    wide = decoded(a, kind)
    same(lanewise(f"add.rn.f32.{kind} {{d}}, {{a}}, {{b}};", [a, c], np.float32), wide + c)
    same(lanewise(f"sub.rn.f32.{kind} {{d}}, {{a}}, {{b}};", [a, c], np.float32), wide - c)
    b = np.roll(a, 5)
    found = lanewise(f"fma.rn.f32.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.float32)
    same(found, fused(wide, decoded(b, kind), c).astype(np.float32))
