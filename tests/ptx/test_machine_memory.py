"""Loads, stores and atomic operations of every width, in global and in shared memory; cp.async."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.ptx.machine_floats import decoded, encoded, halves, same, same_codes
from tests.ptx.machine_support import LANES, SETTINGS, compute, execute, lanewise

KINDS = {
    f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}") for kind in "bsu" for bits in (8, 16, 32, 64)
}
REGISTERS = {1: "h", 2: "h", 4: "r", 8: "d"}


def numbers(dtype: np.dtype, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(limits.min, limits.max, shape, dtype, endpoint=True)


VECTORS = [(kind, vec) for kind, dtype in KINDS.items() for vec in (1, 2, 4, 8) if dtype.itemsize * vec <= 32]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("kind", "vec"), VECTORS)
def test_vectors(kind, vec, space):
    """Loaded and stored again, in memory that other lanes' rows lie between."""
    dtype = KINDS[kind]
    given = numbers(dtype, LANES, vec)
    out = np.zeros_like(given)
    values = [f"%{REGISTERS[dtype.itemsize]}{20 + index}" for index in range(vec)]
    vector = "{" + ", ".join(values) + "}" if vec > 1 else values[0]
    suffix = f"{f'v{vec}.' if vec > 1 else ''}{kind}"
    size = dtype.itemsize * vec
    # Lanes in another order than memory.
    body = f"xor.b32 %r10, %r0, 5; mad.wide.u32 %d10, %r10, {size}, %d0; mad.wide.u32 %d11, %r10, {size}, %d1;"
    body += f"ld.global.{suffix} {vector}, [%d10];"
    if space == "shared":
        body += f"mul.lo.s32 %r11, %r10, {size}; st.shared.{suffix} [%r11], {vector}; bar.sync 0;"
        body += f"ld.shared.{suffix} {vector}, [%r11];"
    body += f"st.global.{suffix} [%d11], {vector};"
    compute(body, given, out, shared=LANES * size)
    np.testing.assert_array_equal(out, given)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1:] != "64"])
def test_loads_extend_to_wider_registers(kind):
    given = numbers(KINDS[kind], LANES)
    wide = np.dtype("i8" if kind[0] == "s" else "u8")
    out = np.zeros(LANES, wide)
    body = f"mad.wide.u32 %d10, %r0, {given.itemsize}, %d0; mad.wide.u32 %d11, %r0, 8, %d1;"
    compute(f"{body} ld.global.{kind} %d20, [%d10]; st.global.b64 [%d11], %d20;", given, out)
    np.testing.assert_array_equal(out, given.astype(wide))


def test_parts_of_a_register():
    (given,) = (numbers(np.dtype("u8"), LANES),)
    halves_of = lanewise("{{ mov.b64 {{%r20, %r21}}, {a}; mov.b64 {d}, {{%r21, %r20}}; }}", [given], np.uint64)
    np.testing.assert_array_equal(
        halves_of.view(np.uint32).reshape(-1, 2), given.view(np.uint32).reshape(-1, 2)[:, ::-1]
    )
    words = given.view(np.uint32)
    swapped = lanewise("{{ mov.b32 {{%h20, %h21}}, {a}; mov.b32 {d}, {{%h21, %h20}}; }}", [words], np.uint32)
    np.testing.assert_array_equal(swapped, words << np.uint32(16) | words >> np.uint32(16))


def test_addresses_have_offsets_and_lanes_may_be_off():
    given, out = np.arange(64, dtype=np.uint32), np.full(64, 7, np.uint32)
    body = "mad.wide.u32 %d10, %r0, 4, %d0; mad.wide.u32 %d11, %r0, 4, %d1; setp.lt.u32 %p1, %r0, 9;"
    compute(
        f"{body} @%p1 ld.global.b32 %r10, [%d10+128]; @!%p1 mov.b32 %r10, 3; st.global.b32 [%d11+64], %r10;", given, out
    )
    np.testing.assert_array_equal(out, [7] * 16 + [*range(32, 41)] + [3] * 23 + [7] * 16)


ATOMICS = {
    "add": lambda a, b: a + b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "exch": lambda a, b: b,
    "inc": lambda a, b: np.where(a >= b, 0, a + 1).astype(a.dtype),
    "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - 1).astype(a.dtype),
}


def atomic(instruction: str, before: np.ndarray, values: list[np.ndarray], space: str) -> tuple[np.ndarray, np.ndarray]:
    """(what was there, what is there), each lane on a word of its own. instruction: with {d}, {at}, {a}, {b}."""
    memory, out, size = before.copy(), np.zeros_like(before), before.itemsize
    kind = REGISTERS[size]
    body = "".join(f"mad.wide.u32 %d{10 + i}, %r0, {size}, %d{i};" for i in range(2 + len(values)))
    body += "".join(f"ld.global.b{8 * size} %{kind}{20 + i}, [%d{12 + i}];" for i in range(len(values)))
    at = "[%d10]"
    if space == "shared":
        at = "[%r10]"
        body += f"mul.lo.s32 %r10, %r0, {size}; ld.global.b{8 * size} %{kind}30, [%d10];"
        body += f"st.shared.b{8 * size} [%r10], %{kind}30;"
    body += instruction.format(d=f"%{kind}31", at=at, a=f"%{kind}20", b=f"%{kind}21")
    if space == "shared":
        body += f"ld.shared.b{8 * size} %{kind}30, [%r10]; st.global.b{8 * size} [%d10], %{kind}30;"
    compute(f"{body} st.global.b{8 * size} [%d11], %{kind}31;", memory, out, *values, shared=LANES * size)
    return out, memory


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, kind) for name in ("add", "min", "max") for kind in ("u32", "s32", "u64", "s64")],
        *[(name, kind) for name in ("and", "or", "xor", "exch") for kind in ("b32", "b64")],
        *[(name, "u32") for name in ("inc", "dec")],
    ],
)  # fmt: skip
def test_atomics(name, kind, space):
    given = numbers(KINDS[kind], 2, LANES)
    given[1, ::3] = given[0, ::3]
    given[0, 5] = 0
    found, after = atomic(f"atom.{space}.{name}.{kind} {{d}}, {{at}}, {{a}};", given[0], [given[1]], space)
    np.testing.assert_array_equal(found, given[0])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(after, ATOMICS[name](given[0], given[1]))


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_compare_and_swap(bits, space):
    given = numbers(KINDS[f"u{bits}"], 3, LANES)
    given[1, ::2] = given[0, ::2]
    found, after = atomic(
        f"atom.{space}.cas.b{bits} {{d}}, {{at}}, {{a}}, {{b}};", given[0], [given[1], given[2]], space
    )
    np.testing.assert_array_equal(found, given[0])
    np.testing.assert_array_equal(after, np.where(given[0] == given[1], given[2], given[0]))


@pytest.mark.parametrize("bits", [32, 64])
def test_sums_of_floats(bits):
    given = np.random.default_rng(0).normal(size=(2, LANES)).astype(f"f{bits // 8}")
    found, after = atomic(f"atom.global.gpu.acq_rel.add.f{bits} {{d}}, {{at}}, {{a}};", given[0], [given[1]], "global")
    same(found, given[0])
    same(after, given[0] + given[1])


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_sums_of_pairs(kind):
    codes = np.random.default_rng(0).permutation(halves(kind[:-2], 200))[:128].reshape(2, 64)
    with np.errstate(all="ignore"):
        total = encoded(decoded(codes[0], kind[:-2]).astype(np.float64) + decoded(codes[1], kind[:-2]), kind[:-2])
    given = codes.view(np.uint32)
    found, after = atomic(f"atom.global.add.noftz.{kind} {{d}}, {{at}}, {{a}};", given[0], [given[1]], "global")
    np.testing.assert_array_equal(found, given[0])
    same_codes(after.view(np.uint16), total, kind[:-2])


def test_lanes_and_blocks_add_to_one_word():
    total = np.zeros(1, np.uint32)
    seen = np.zeros(4 * 64, np.uint32)
    body = "atom.global.gpu.relaxed.add.u32 %r10, [%d0], 1; mad.wide.u32 %d10, %r3, 4, %d1; st.global.b32 [%d10], %r10;"
    compute(body, total, seen, blocks=4, warps=2)
    assert total[0] == len(seen)
    np.testing.assert_array_equal(np.sort(seen), np.arange(len(seen)))


def test_red_has_no_result():
    total = np.zeros(1, np.uint32)
    compute("red.global.gpu.release.add.u32 [%d0], 2;", total, blocks=2)
    assert total[0] == 2 * 2 * LANES


@pytest.mark.parametrize("asynchronous", ["waited", "at-once", "random"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies(size, asynchronous):
    """Whole, in part with zeros behind, and nothing but zeros."""
    given, out = numbers(np.dtype("u1"), LANES * size), np.zeros(LANES * size, np.uint8)
    words = size // 4
    kind = "cg" if size == 16 else "ca"
    body = f"mad.wide.u32 %d10, %r0, {size}, %d0; mad.wide.u32 %d11, %r0, {size}, %d1; mul.lo.s32 %r10, %r0, {size};"
    body += f"setp.lt.u32 %p1, %r0, 8; selp.b32 %r11, {size // 2}, {size}, %p1; setp.gt.u32 %p2, %r0, 20;"
    body += f"@!%p2 cp.async.{kind}.shared.global [%r10], [%d10], {size}, %r11;"
    body += f"@%p2 cp.async.{kind}.shared.global [%r10], [%d10], {size}, 0;"
    body += "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    vector = ", ".join(f"%r{20 + k}" for k in range(words))
    suffix = f"v{words}.b32" if words > 1 else "b32"
    body += f"ld.shared.{suffix} {{{vector}}}, [%r10]; st.global.{suffix} [%d11], {{{vector}}};"
    settings = dataclasses.replace(SETTINGS, asynchronous=asynchronous)
    outcome = execute(body, given, out, shared=LANES * size, settings=settings)
    assert not outcome.reports, outcome
    expected = given.reshape(LANES, size).copy()
    expected[:8, size // 2 :] = 0
    expected[21:] = 0
    np.testing.assert_array_equal(out, expected.ravel())


def test_copies_may_ignore_their_source():
    given, out = np.arange(LANES, dtype=np.uint32) + 1, np.zeros(LANES, np.uint32)
    body = (
        "mad.wide.u32 %d10, %r0, 4, %d0; mad.wide.u32 %d11, %r0, 4, %d1; shl.b32 %r10, %r0, 2; setp.gt.u32 %p1, %r0, 3;"
    )
    body += "cp.async.ca.shared.global [%r10], [%d10], 4, %p1; cp.async.wait_all;"
    compute(f"{body} ld.shared.b32 %r11, [%r10]; st.global.b32 [%d11], %r11;", given, out, shared=128)
    np.testing.assert_array_equal(out, [1, 2, 3, 4] + [0] * 28)


def test_memory_that_nobody_wrote_is_poison():
    out = np.zeros((2, LANES), np.uint32)
    body = (
        "mad.wide.u32 %d10, %r0, 4, %d0; shl.b32 %r10, %r0, 2; ld.shared.b32 %r11, [%r10]; st.global.b32 [%d10], %r11;"
    )
    execute(f"{body} st.global.b32 [%d10+128], %r300;", out, shared=128)
    np.testing.assert_array_equal(out[0], np.full(LANES, 0xFFFFFFFF))
    np.testing.assert_array_equal(out[1], np.full(LANES, 0xA5A5A5A5))
