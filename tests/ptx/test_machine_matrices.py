"""ldmatrix, stmatrix and movmatrix: which lane has which element of which matrix."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.machine_support import compute

ROW = 16
"""Bytes of a matrix's row."""


def matrices(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)


def registers_of(matrix: np.ndarray) -> np.ndarray:
    """Lane 4 r + c has elements 2 c and 2 c + 1 of row r."""
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(32)


def rows_apart(count: int) -> np.ndarray:
    """Each lane's address of a row: rows anywhere, none beside its neighbour."""
    return (np.random.default_rng(1).permutation(8 * 4)[: 8 * count] * 2 * ROW).astype(np.uint32)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    given, places, suffix = matrices(count), rows_apart(count), ".trans" if transposed else ""
    memory = np.zeros(32 * 2 * ROW // 2, np.uint16)
    for row, address in zip(given.reshape(-1, 8), places, strict=True):
        memory[address // 2 : address // 2 + 8] = row
    addresses = np.full(32, 1 << 20, np.uint32)
    addresses[: len(places)] = places
    out = np.zeros((count, 32), np.uint32)
    names = [f"%r{20 + index}" for index in range(count)]
    body = "\n".join(
        [
            "mad.wide.u32 %d10, %r0, 4, %d0; mad.wide.u32 %d11, %r0, 4, %d1; mad.wide.u32 %d12, %r0, 4, %d2;",
            "shl.b32 %r10, %r0, 2;",
        ]
        + [
            f"ld.global.b32 %r11, [%d10+{128 * k}]; st.shared.b32 [%r10+{128 * k}], %r11;"
            for k in range(len(memory) // 64)
        ]
        + ["bar.sync 0; ld.global.b32 %r12, [%d11];"]
        + [f"ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{', '.join(names)}}}, [%r12];"]
        + [f"st.global.b32 [%d12+{128 * k}], {name};" for k, name in enumerate(names)]
    )
    compute(body, memory, addresses, out, shared=memory.nbytes)
    expected = [registers_of(each.T if transposed else each) for each in given]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, transposed):
    given, places, suffix = matrices(count), rows_apart(count), ".trans" if transposed else ""
    held = np.stack([registers_of(each) for each in given])
    addresses = np.full(32, 1 << 20, np.uint32)
    addresses[: len(places)] = places
    out = np.zeros((8 * count, 8), np.uint16)
    names = [f"%r{20 + index}" for index in range(count)]
    body = "\n".join(
        ["mad.wide.u32 %d10, %r0, 4, %d0; mad.wide.u32 %d11, %r0, 4, %d1; mad.wide.u32 %d12, %r0, 16, %d2;"]
        + [f"ld.global.b32 {name}, [%d10+{128 * k}];" for k, name in enumerate(names)]
        + ["ld.global.b32 %r12, [%d11];"]
        + [f"stmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 [%r12], {{{', '.join(names)}}};"]
        + [f"bar.sync 0; setp.lt.u32 %p1, %r0, {8 * count};"]
        + ["@%p1 ld.shared.v4.b32 {%r30, %r31, %r32, %r33}, [%r12];"]
        + ["@%p1 st.global.v4.b32 [%d12], {%r30, %r31, %r32, %r33};"]
    )
    compute(body, held, addresses, out, shared=32 * 2 * ROW)
    expected = [each.T if transposed else each for each in given]
    np.testing.assert_array_equal(out, np.concatenate(expected))
