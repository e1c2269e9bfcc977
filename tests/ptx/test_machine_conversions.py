"""Conversions against NumPy and PyTorch: every rounding, saturation, formats of 8 bits and less."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.ptx.machine_floats import decoded, encoded, floats, flushed, halves, same, same_codes
from tests.ptx.machine_support import LANES, lanewise, spread

INTEGERS = {
    f"{kind}{bits}": np.dtype(f"{'u' if kind == 'u' else 'i'}{bits // 8}") for kind in "us" for bits in (8, 16, 32, 64)
}
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
WIDE = {8: 8, 4: 4, 2: 2, 1: 2}
"""Bytes of an integer -> of the register that holds it."""


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def integers(kind: str) -> np.ndarray:
    """As registers hold them, with other bits above the value."""
    limits = np.iinfo(INTEGERS[kind])
    drawn = np.random.default_rng(0).integers(limits.min, limits.max, 20, INTEGERS[kind], endpoint=True)
    near = np.array([0, 1, 2, limits.min, limits.min + 1, limits.max - 1, limits.max], INTEGERS[kind])
    values = np.resize(np.concatenate([near, drawn]), LANES)
    if values.itemsize > 1:
        return values
    return values.view(np.uint8) + np.uint16(0xA500)


def value(kind: str, registers: np.ndarray) -> list[int]:
    return [int(each) for each in registers.astype(INTEGERS[kind])]


def to_kind(numbers: list[int], kind: str) -> np.ndarray:
    bits = 8 * INTEGERS[kind].itemsize
    return np.array([number % (1 << bits) for number in numbers], f"u{bits // 8}").view(INTEGERS[kind])


def convert(name: str, sources: list[np.ndarray], kind: str) -> np.ndarray:
    """To an integer, which is extended in its register by its type."""
    size = WIDE[INTEGERS[kind].itemsize]
    found = lanewise(f"{name} {{d}}, {{a}};", sources, f"{'u' if kind[0] == 'u' else 'i'}{size}")
    np.testing.assert_array_equal(found, found.astype(INTEGERS[kind]))
    return found.astype(INTEGERS[kind])


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_among_integers(target, source):
    registers = integers(source)
    numbers = value(source, registers)
    np.testing.assert_array_equal(convert(f"cvt.{target}.{source}", [registers], target), to_kind(numbers, target))
    limits = np.iinfo(INTEGERS[target])
    clamped = [min(max(number, limits.min), limits.max) for number in numbers]
    np.testing.assert_array_equal(convert(f"cvt.sat.{target}.{source}", [registers], target), to_kind(clamped, target))


@pytest.mark.parametrize("source", ["f32", "ftz.f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_floats_to_integers(rounding, source):
    registers, numbers = _floats(source)
    rounded = ROUNDINGS[rounding](numbers.astype(np.float64))
    flush, _, kind = source.rpartition(".")
    for target in INTEGERS:
        limits = np.iinfo(INTEGERS[target])
        wanted = [
            0
            if math.isnan(each)
            else limits.max
            if each > limits.max
            else limits.min
            if each < limits.min
            else int(each)
            for each in rounded
        ]
        name = f"cvt.{rounding}{'.ftz' if flush else ''}.{target}.{kind}"
        np.testing.assert_array_equal(convert(name, [registers], target), to_kind(wanted, target), name)


def _floats(source: str) -> tuple[np.ndarray, np.ndarray]:
    """As registers hold them, and their values."""
    if source in ("f16", "bf16"):
        (registers,) = spread([halves(source, 200)])
        return registers, decoded(registers, source)
    (registers,) = spread([floats(int(source[-2:]), 200)])
    return registers, flushed(registers) if "ftz" in source else registers


@pytest.mark.parametrize("kind", ["f32", "ftz.f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_to_integral_floats(rounding, kind):
    registers, numbers = _floats(kind)
    flush, _, plain = kind.rpartition(".")
    found = lanewise(
        f"cvt.{rounding}{'.ftz' if flush else ''}.{plain}.{plain} {{d}}, {{a}};", [registers], registers.dtype
    )
    expected = ROUNDINGS[rounding](numbers)
    if plain in ("f16", "bf16"):
        same_codes(found, encoded(expected.astype(np.float64), plain), plain)
    else:
        same(found, expected)


@pytest.mark.parametrize("target", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_floats(source, target):
    registers = integers(source)
    numbers = np.array(value(source, registers), object)
    if target in ("f16", "bf16"):
        found = lanewise(f"cvt.rn.{target}.{source} {{d}}, {{a}};", [registers], np.uint16)
        # Integers of more than 53 bits are rounded twice in the reference; none here lies at a tie of so few bits.
        same_codes(found, encoded(numbers.astype(np.float64), target), target)
        return
    found = lanewise(f"cvt.rn.{target}.{source} {{d}}, {{a}};", [registers], f"f{int(target[1:]) // 8}")
    dtype = np.int64 if source[0] == "s" else np.uint64
    same(found, numbers.astype(dtype).astype(found.dtype))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_all_halves_to_float32(kind):
    codes = np.arange(1 << 16, dtype=np.uint16)
    same(lanewise(f"cvt.f32.{kind} {{d}}, {{a}};", [codes], np.float32), decoded(codes, kind))
    same(lanewise(f"cvt.f64.{kind} {{d}}, {{a}};", [codes], np.float64), decoded(codes, kind).astype(np.float64))


def toward_zero(values: np.ndarray, kind: str) -> np.ndarray:
    """The code next to zero that is no further from it."""
    codes = encoded(values.astype(np.float64), kind)
    away = np.abs(decoded(codes, kind)) > np.abs(values)
    return np.where(away & ~np.isnan(values), codes - 1, codes).astype(np.uint16)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float32_to_halves(kind):
    ties = decoded(np.arange(0, 1 << 15, 37, dtype=np.uint16), kind)
    between = np.concatenate([ties + np.spacing(ties) * 0, (ties[1:].astype(np.float64) + ties[:-1]) / 2]).astype(
        np.float32
    )
    near = decoded(np.arange(1 << 8, dtype=np.uint16), kind)
    halfway = ((near[1:].astype(np.float64) + near[:-1]) / 2).astype(np.float32)
    (a,) = spread([np.concatenate([floats(count=4000), between, halfway, np.nextafter(halfway, 1), -halfway])])
    nearest = encoded(a.astype(np.float64), kind)
    same_codes(lanewise(f"cvt.rn.{kind}.f32 {{d}}, {{a}};", [a], np.uint16), nearest, kind)
    same_codes(lanewise(f"cvt.rz.{kind}.f32 {{d}}, {{a}};", [a], np.uint16), toward_zero(a, kind), kind)
    b = np.roll(a, 7)
    for rounding, codes in (("rn", nearest), ("rz", toward_zero(a, kind))):
        found = lanewise(f"cvt.{rounding}.{kind}x2.f32 {{d}}, {{a}}, {{b}};", [a, b], np.uint32).view(np.uint16)
        same_codes(found[0::2], np.roll(codes, 7), kind)
        same_codes(found[1::2], codes, kind)
    relu = lanewise(f"cvt.rn.relu.{kind}x2.f32 {{d}}, {{a}}, {{b}};", [a, b], np.uint32).view(np.uint16)[1::2]
    # Zeros of a negative sign become positive; NaN stays.
    same_codes(relu, np.where(np.signbit(a) & ~np.isnan(a), 0, nearest).astype(np.uint16), kind)


def test_between_halves():
    codes = np.arange(1 << 16, dtype=np.uint16)
    same_codes(
        lanewise("cvt.rn.bf16.f16 {d}, {a};", [codes], np.uint16),
        encoded(decoded(codes, "f16").astype(np.float64), "bf16"),
        "bf16",
    )
    same_codes(
        lanewise("cvt.rn.f16.bf16 {d}, {a};", [codes], np.uint16),
        encoded(decoded(codes, "bf16").astype(np.float64), "f16"),
        "f16",
    )


def test_float32_and_float64():
    (a,) = spread([floats(64, 400)])
    near = a.astype(np.float32)
    up = np.where(near.astype(np.float64) < a, np.nextafter(near, np.float32(np.inf)), near)
    down = np.where(near.astype(np.float64) > a, np.nextafter(near, np.float32(-np.inf)), near)
    zero = np.where(a > 0, down, up)
    for rounding, expected in (("rn", near), ("rp", up), ("rm", down), ("rz", zero)):
        same(lanewise(f"cvt.{rounding}.f32.f64 {{d}}, {{a}};", [a], np.float32), expected)
    (b,) = spread([floats()])
    same(lanewise("cvt.f64.f32 {d}, {a};", [b], np.float64), b.astype(np.float64))
    same(
        lanewise("cvt.sat.f32.f32 {d}, {a};", [b], np.float32),
        np.where(b > 0, np.minimum(b, np.float32(1)), np.float32(0)),
    )


def test_tf32():
    (a,) = spread([floats(count=1000)])
    bits, finite = a.view(np.uint32), np.isfinite(a)
    tie = np.uint32(1 << 12)
    cut = np.uint32(0xFFFFE000)
    away = np.where(finite, bits + tie & cut, bits).view(np.float32)
    even = np.where(finite, bits + tie - 1 + (bits >> np.uint32(13) & 1) & cut, bits).view(np.float32)
    same(lanewise("cvt.rna.tf32.f32 {d}, {a};", [a], np.float32), away)
    same(lanewise("cvt.rn.tf32.f32 {d}, {a};", [a], np.float32), even)


EIGHT = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}


def eight_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Saturated to what is finite."""
    limit = torch.finfo(EIGHT[kind]).max
    clamped = torch.from_numpy(values).clamp(-limit, limit)
    return clamped.to(EIGHT[kind]).view(torch.uint8).numpy()


def same_eight(found: np.ndarray, expected: np.ndarray, kind: str) -> None:
    values = [
        torch.from_numpy(np.ascontiguousarray(each)).view(EIGHT[kind]).float().numpy() for each in (found, expected)
    ]
    same(*values)


@pytest.mark.parametrize("kind", EIGHT)
def test_eight_bit_floats(kind):
    codes = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(codes.view(np.uint8)).view(EIGHT[kind]).float().numpy()
    found = lanewise(f"cvt.rn.f16x2.{kind} {{d}}, {{a}};", [codes], np.uint32)
    same_codes(found.view(np.uint16), encoded(values.astype(np.float64), "f16"), "f16")
    ties = np.unique(values[np.isfinite(values)]).astype(np.float64)
    between = ((ties[1:] + ties[:-1]) / 2).astype(np.float32)
    (a,) = spread([np.concatenate([floats(count=2000), values[:512], between, np.nextafter(between, 9)])])
    b = np.roll(a, 3)
    found = lanewise(f"cvt.rn.satfinite.{kind}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.uint16).view(np.uint8)
    same_eight(found[1::2], eight_bits(a, kind), kind)
    same_eight(found[0::2], eight_bits(b, kind), kind)
    relu = lanewise(f"cvt.rn.satfinite.relu.{kind}.f32 {{d}}, {{a}}, {{b}};", [a, b], np.uint16).view(np.uint8)[1::2]
    positive = np.where(np.isnan(a), a, np.maximum(a, 0))
    same_eight(relu & 0x7F, eight_bits(positive, kind) & 0x7F, kind)
    pairs = np.resize(halves("f16", 2000), 2048)
    found = lanewise(f"cvt.rn.satfinite.{kind}.f16x2 {{d}}, {{a}};", [pairs.view(np.uint32)], np.uint16).view(np.uint8)
    same_eight(found, eight_bits(decoded(pairs, "f16"), kind), kind)


SMALL = {"e2m3x2": (2, 3, 1), "e3m2x2": (3, 2, 3), "e2m1x2": (2, 1, 1)}
"""Bits of the exponent and of the mantissa, bias; there is neither infinity nor NaN."""


def small_values(kind: str) -> np.ndarray:
    exponent, mantissa, bias = SMALL[kind]
    codes = range(1 << exponent + mantissa)
    steps = [(code % (1 << mantissa), code >> mantissa) for code in codes]
    return np.array([(part + (1 << mantissa) * (up > 0)) * 2.0 ** (max(up, 1) - bias - mantissa) for part, up in steps])


def small_code(value: float, kind: str) -> int:
    """The nearest, of two as near the even one; NaN is the largest."""
    positive = small_values(kind)
    sign = len(positive) if math.copysign(1, value) < 0 and not math.isnan(value) else 0
    if math.isnan(value):
        return len(positive) - 1
    distance = np.abs(positive - min(abs(value), positive[-1]))
    nearest = np.flatnonzero(distance == distance.min())
    return sign + int(nearest[0] if len(nearest) == 1 else nearest[nearest % 2 == 0][0])


@pytest.mark.parametrize("kind", SMALL)
def test_floats_of_six_and_four_bits(kind):
    bits = 1 + sum(SMALL[kind][:2])
    step, size = (4, np.uint8) if bits == 4 else (8, np.uint16)
    positive = small_values(kind)
    between = (positive[1:] + positive[:-1]) / 2
    (a,) = spread([np.concatenate([floats(count=200), positive, -positive, between, -between]).astype(np.float32)])
    b = np.roll(a, 5)
    if bits == 4:
        # There are no registers of 8 bits: the result is moved out of one by its wider neighbour.
        name = "{{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, {a}, {b}; cvt.u16.u8 {d}, t; }}"
        found = lanewise(name, [a, b], np.uint16)
    else:
        found = lanewise(f"cvt.rn.satfinite.{kind}.f32 {{d}}, {{a}}, {{b}};", [a, b], size)
    expected = [small_code(x, kind) << step | small_code(y, kind) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(found, expected)
    signed = np.concatenate([positive, -positive])
    codes = np.resize(np.arange(len(signed)), (len(signed), len(signed)))
    both = (codes.ravel() << step | codes.T.ravel()).astype(np.uint16)
    name = f"cvt.rn.f16x2.{kind} {{d}}, {{a}};"
    if bits == 4:
        name = "{{ .reg .b8 t; cvt.u8.u16 t, {a}; cvt.rn.f16x2.e2m1x2 {d}, t; }}"
    found = lanewise(name, [np.resize(both, -(-len(both) // LANES) * LANES)], np.uint32).view(np.uint16)[
        : 2 * len(both)
    ]
    same_codes(found[0::2], encoded(signed[codes.T.ravel()], "f16"), "f16")
    same_codes(found[1::2], encoded(signed[codes.ravel()], "f16"), "f16")


def test_exponents_alone():
    codes = np.arange(256, dtype=np.uint16)
    found = lanewise("cvt.rn.bf16x2.ue8m0x2 {d}, {a};", [codes << 8 | codes], np.uint32).view(np.uint16)
    expected = np.where(codes == 255, np.nan, 2.0 ** (codes.astype(np.float64) - 127))
    same_codes(found[1::2], encoded(expected, "bf16"), "bf16")
    (a,) = spread([np.abs(floats(count=500))])
    for rounding, function in (("rz", np.floor), ("rp", np.ceil)):
        found = lanewise(f"cvt.{rounding}.satfinite.ue8m0x2.f32 {{d}}, {{a}}, {{a}};", [a], np.uint16)
        power = np.clip(function(np.log2(a.astype(np.float64))) + 127, 0, 254)
        wanted = np.where(np.isnan(a), 255, np.where(a == 0, 0, power)).astype(np.uint16)
        np.testing.assert_array_equal(found, wanted << 8 | wanted)
