"""Integer instructions against NumPy, on values at the edges of their types and random ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.machine_support import lanewise, spread

RANDOM = 12
SHIFTS = np.array([0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 65, 200], np.uint32)
TYPES = {
    f"{'u' if kind == np.unsignedinteger else 's'}{bits}": np.dtype(
        f"{'u' if kind == np.unsignedinteger else 'i'}{bits // 8}"
    )
    for bits in (16, 32, 64)
    for kind in (np.unsignedinteger, np.signedinteger)
}


def values(kind: str) -> np.ndarray:
    """The edges of a type, and some between."""
    dtype = TYPES[kind]
    edges = np.iinfo(dtype)
    near = [edges.min, edges.min + 1, 0, 1, 2, 7, edges.max // 2, edges.max - 1, edges.max]
    near += [-1, -2, -7] if edges.min else []
    drawn = np.random.default_rng(0).integers(edges.min, edges.max, RANDOM, dtype=dtype, endpoint=True)
    return np.concatenate([np.array(near, dtype), drawn])


def exact(array: np.ndarray) -> np.ndarray:
    """Python's numbers, which neither overflow nor wrap."""
    return array.astype(object)


def wrapped(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    bits = 8 * dtype.itemsize
    return np.array([number % (1 << bits) for number in numbers], f"u{dtype.itemsize}").view(dtype)


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return a if b == 0 else a - b * quotient(a, b)


@pytest.mark.parametrize("kind", ["s16", "u16"])
def test_halves_are_added_by_themselves(kind):
    """Without a carry from one to the other."""
    a, b = np.random.default_rng(0).choice(values(kind), (2, 2 * 32))
    found = lanewise(f"add.{kind}x2 {{d}}, {{a}}, {{b}};", [a.view(np.uint32), b.view(np.uint32)], np.uint32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found.view(TYPES[kind]), a + b)


BINARY = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "div": lambda a, b, bits: quotient(a, b),
    "rem": lambda a, b, bits: remainder(a, b),
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic(name, kind):
    a, b = spread([values(kind), values(kind)])
    function = np.frompyfunc(lambda x, y: BINARY[name](x, y, 8 * TYPES[kind].itemsize), 2, 1)
    expected = wrapped(function(exact(a), exact(b)), TYPES[kind])
    np.testing.assert_array_equal(lanewise(f"{name}.{kind} {{d}}, {{a}}, {{b}};", [a, b], TYPES[kind]), expected)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["and", "or", "xor", "not", "neg"])
def test_bits(name, bits):
    dtype = TYPES[f"s{bits}"]
    a, b = spread([values(f"s{bits}")] * 2)
    kind = f"s{bits}" if name == "neg" else f"b{bits}"
    if name in ("not", "neg"):
        found, expected = lanewise(f"{name}.{kind} {{d}}, {{a}};", [a], dtype), ~a if name == "not" else 0 - a
    else:
        found = lanewise(f"{name}.{kind} {{d}}, {{a}}, {{b}};", [a, b], dtype)
        expected = {"and": a & b, "or": a | b, "xor": a ^ b}[name]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts_are_clamped(kind):
    bits, signed = int(kind[1:]), kind[0] == "s"
    dtype = TYPES[f"{'s' if signed else 'u'}{bits}"]
    a, b = spread([values(f"{'s' if signed else 'u'}{bits}"), SHIFTS])
    name = "shl" if kind[0] == "b" else "shr"
    clamped = [min(int(each), bits - 1 if signed else bits) for each in b]
    numbers = [x << n if name == "shl" else x >> n for x, n in zip(exact(a), clamped, strict=True)]
    found = lanewise(f"{name}.{kind} {{d}}, {{a}}, {{b}};", [a, b], dtype)
    np.testing.assert_array_equal(found, wrapped(np.array(numbers, object), dtype))


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind):
    bits = int(kind[1:])
    wide = TYPES[f"{kind[0]}{2 * bits}"]
    a, b = spread([values(kind), values(kind)])
    c = np.random.default_rng(1).integers(0, 1 << 30, len(a)).astype(wide)
    exactly = exact(a) * exact(b)
    np.testing.assert_array_equal(
        lanewise(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", [a, b], wide), wrapped(exactly, wide)
    )
    np.testing.assert_array_equal(
        lanewise(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], wide), wrapped(exactly + exact(c), wide)
    )


@pytest.mark.parametrize("kind", ["s16", "s32", "u32", "s64"])
def test_multiply_add(kind):
    a, b, c = spread([values(kind)[::2]] * 3)
    expected = wrapped(exact(a) * exact(b) + exact(c), TYPES[kind])
    np.testing.assert_array_equal(
        lanewise(f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], TYPES[kind]), expected
    )


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_multiply_add_high(kind):
    a, b, c = spread([values(kind)[::2]] * 3)
    expected = wrapped(
        np.array([x * y >> 32 for x, y in zip(exact(a), exact(b), strict=True)], object) + exact(c), TYPES[kind]
    )
    np.testing.assert_array_equal(
        lanewise(f"mad.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], TYPES[kind]), expected
    )


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_absolute(kind):
    (a,) = spread([values(kind)])
    np.testing.assert_array_equal(
        lanewise(f"abs.{kind} {{d}}, {{a}};", [a], TYPES[kind]), wrapped(abs(exact(a)), TYPES[kind])
    )


COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_and_selection(name, kind):
    a, b = spread([values(kind), values(kind)])
    body = f"setp.{name}.{kind} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 7, 3, %p1;"
    np.testing.assert_array_equal(lanewise(body, [a, b], np.uint32), np.where(COMPARISONS[name](a, b), 7, 3))


def field(value: int, start: int, length: int, bits: int, signed: bool) -> int:
    """Of PTX's own description: bits beyond the top are the field's sign, or zero."""
    sign = signed and length > 0 and value >> min(bits - 1, start + length - 1) & 1
    taken = [value >> start + k & 1 if k < length and start + k < bits else int(bool(sign)) for k in range(bits)]
    return sum(bit << k for k, bit in enumerate(taken))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_extraction_of_fields(kind):
    bits = int(kind[1:])
    starts = np.array([0, 1, 5, 31, 32, 63, 64, 255, 256], np.uint32)
    a, b, c = spread([values(f"u{bits}"), starts, np.array([0, 1, 4, 31, 32, 33, 64, 255], np.uint32)])
    expected = [
        field(x, int(y) & 255, int(z) & 255, bits, kind[0] == "s") for x, y, z in zip(exact(a), b, c, strict=True)
    ]
    found = lanewise(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], TYPES[f"u{bits}"])
    np.testing.assert_array_equal(found, np.array(expected, found.dtype))


@pytest.mark.parametrize("bits", [32, 64])
def test_insertion_of_fields(bits):
    dtype = TYPES[f"u{bits}"]
    a, b, c, e = spread(
        [values(f"u{bits}")[::3], values(f"u{bits}")[::4], SHIFTS, np.array([0, 1, 8, 32, 64], np.uint32)]
    )
    expected = []
    for value, into, start, length in zip(exact(a), exact(b), exact(c), exact(e), strict=True):
        mask = ((1 << length) - 1 << start) % (1 << bits)
        expected.append(into & ~mask | value << start & mask)
    found = lanewise(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", [a, b, c, e], dtype)
    np.testing.assert_array_equal(found, np.array(expected, dtype))


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_of_bits(bits):
    (a,) = spread([values(f"u{bits}")])
    text = [format(value, f"0{bits}b") for value in exact(a)]
    for name, expected in (
        (f"popc.b{bits}", [each.count("1") for each in text]),
        (f"clz.b{bits}", [len(each) - len(each.lstrip("0")) for each in text]),
        (f"bfind.u{bits}", [each[::-1].rfind("1") for each in text]),
    ):
        found = lanewise(f"{name} {{d}}, {{a}};", [a], np.int32)
        np.testing.assert_array_equal(found, expected, name)
    reverse = lanewise(f"brev.b{bits} {{d}}, {{a}};", [a], a.dtype)
    np.testing.assert_array_equal(reverse, np.array([int(each[::-1], 2) for each in text], a.dtype))


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0x1B, 0xCA, 0xFF, 0x3C])
def test_logic_of_three(table):
    a, b, c = spread([values("u32")[::2]] * 3)
    expected = np.zeros_like(a)
    for term in range(8):
        if table >> term & 1:
            expected |= (a if term & 4 else ~a) & (b if term & 2 else ~b) & (c if term & 1 else ~c)
    np.testing.assert_array_equal(
        lanewise(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", [a, b, c], np.uint32), expected
    )


def test_permutation_of_bytes():
    selectors = np.array([0x3210, 0x7654, 0x0000, 0x5410, 0x9BDF, 0x8888, 0xC8F1], np.uint32)
    a, b, c = spread([values("u32"), values("u32")[::3], selectors])
    expected = []
    for low, high, selector in zip(exact(a), exact(b), exact(c), strict=True):
        both = (high << 32 | low).to_bytes(8, "little")
        picked = [both[selector >> 4 * k & 7] for k in range(4)]
        signs = [selector >> 4 * k & 8 for k in range(4)]
        expected.append(
            bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in zip(picked, signs, strict=True))
        )
    found = lanewise("prmt.b32 {d}, {a}, {b}, {c};", [a, b, c], np.uint32)
    np.testing.assert_array_equal(found, np.frombuffer(b"".join(expected), np.uint32))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shifts(side, mode):
    a, b, c = spread([values("u32")[::2], values("u32")[::3], SHIFTS])
    expected = []
    for low, high, by in zip(exact(a), exact(b), exact(c), strict=True):
        shift = by & 31 if mode == "wrap" else min(by, 32)
        both = high << 32 | low
        expected.append((both << shift >> 32 if side == "l" else both >> shift) & 0xFFFFFFFF)
    found = lanewise(f"shf.{side}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.uint32)
    np.testing.assert_array_equal(found, np.array(expected, np.uint32))


@pytest.mark.parametrize("kinds", ["s32.s32", "u32.u32", "s32.u32", "u32.s32"])
def test_dot_products_of_bytes(kinds):
    a, b, c = spread([values("u32"), values("u32")[::2], values("s32")[::3]])
    first, second = (
        each.view(np.int8 if kind == "s32" else np.uint8).astype(np.int64)
        for each, kind in zip((a, b), kinds.split("."), strict=True)
    )
    expected = c.astype(np.int64) + (first * second).reshape(-1, 4).sum(1)
    found = lanewise(f"dp4a.{kinds} {{d}}, {{a}}, {{b}}, {{c}};", [a, b, c], np.int32)
    np.testing.assert_array_equal(found, expected.astype(np.int32))
