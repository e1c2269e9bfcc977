"""Tensor copies (TMA) against NumPy: boxes of every rank, swizzles, edges, strides, reductions; what maps must be."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch

from tests.ptx.machine_support import SETTINGS, execute, kinds

TYPES = ["u1", "u2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "bf16"]
"""As enum TensorMapType has them."""
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
MAGIC = 0x70616D74
BAR, DATA = 0, 1024


def tensor_map(
    array: np.ndarray, box: tuple[int, ...], swizzle: int = 0, fill_nan: bool = False, kind: str = "",
    element_strides: tuple[int, ...] = (), magic: int = MAGIC, sizes: tuple[int, ...] = (),
) -> np.ndarray:  # fmt: skip
    """As struct TensorMap has it. box, element_strides, sizes: innermost first."""
    rank = array.ndim
    strides = [*array.strides[::-1][1:], 0, 0, 0, 0][:4]
    shape = [*(sizes or array.shape[::-1]), 0, 0, 0, 0, 0][:5]
    boxes, steps = [[*values, 0, 0, 0, 0, 0][:5] for values in (box, element_strides or (1,) * rank)]
    number = TYPES.index(kind or array.dtype.str[1:])
    packed = struct.pack(
        "<Q4Q5I5H5HI4B", array.ctypes.data, *strides, *shape, *boxes, *steps, magic, rank, number, SWIZZLES[swizzle],
        fill_nan,
    )  # fmt: skip
    return np.frombuffer(packed.ljust(128, b"\0"), np.uint8).copy()


def boxed(array: np.ndarray, first: tuple[int, ...], box: tuple[int, ...], fill: float = 0) -> np.ndarray:
    """The part of an array from `first` on, innermost first; what lies outside is `fill`."""
    out = np.full(box[::-1], fill, array.dtype)
    ranges = [
        (max(0, -at), max(0, min(length, size - at)))
        for at, length, size in zip(first, box, array.shape[::-1], strict=True)
    ]
    inner = tuple(slice(low, high) for low, high in ranges[::-1])
    outer = tuple(slice(at + low, at + high) for at, (low, high) in zip(first[::-1], ranges[::-1], strict=True))
    if all(high > low for low, high in ranges):
        out[inner] = array[outer]
    return out


def swizzled(memory: np.ndarray, swizzle: int) -> np.ndarray:
    """Bytes at an offset of 0 in the order in which shared memory has them."""
    place = np.arange(memory.size)
    chunk = place ^ (place >> 7 & (swizzle // 16 - 1 if swizzle else 0)) << 4
    out = np.zeros_like(memory)
    out[chunk] = memory
    return out


def padded(size: int) -> int:
    return -(-size // 1024) * 1024


LOAD = f"""
mov.b32 %r10, {BAR}; mov.b32 %r11, {DATA}; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r10], 1;
bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], BYTES;
@%p1 cp.async.bulk.tensor.RANKd.shared::cta.global.tile.mbarrier::complete_tx::bytes
[%r11], [%d0, {{COORDINATES}}], [%r10];
W: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r10], 0; @!%p5 bra W;
shl.b32 %r12, %r0, 2; mad.wide.u32 %d10, %r0, 4, %d1;
mov.b32 %r13, 0;
NEXT: add.s32 %r14, %r13, %r12; setp.ge.u32 %p2, %r14, BYTES; @%p2 bra END;
ld.shared.b32 %r15, [%r14+{DATA}]; st.global.b32 [%d10], %r15; add.s32 %r13, %r13, 128; add.s64 %d10, %d10, 128;
bra NEXT;
END: mov.b32 %r16, 0;
"""


def load(array: np.ndarray, described: np.ndarray, first: tuple[int, ...], size: int, asynchronous: str = "waited"):
    """(outcome, bytes of shared memory)"""
    text = (
        LOAD.replace("BYTES", str(size))
        .replace("RANK", str(len(first)))
        .replace("COORDINATES", ", ".join(map(str, first)))
    )
    out = np.zeros(size // 4, np.uint32)
    settings = dataclasses.replace(SETTINGS, asynchronous=asynchronous)
    return execute(text, described, out, array, shared=DATA + padded(size), settings=settings), out.view(np.uint8)


def check_load(array: np.ndarray, first: tuple[int, ...], box: tuple[int, ...], swizzle: int = 0) -> None:
    expected = boxed(array, first, box)
    for asynchronous in ("waited", "at-once", "random"):
        outcome, found = load(array, tensor_map(array, box, swizzle), first, expected.nbytes, asynchronous)
        assert not outcome.reports, outcome
        np.testing.assert_array_equal(found, swizzled(expected.reshape(-1).view(np.uint8), swizzle))


def numbers(*shape: int, dtype: str = "u2") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "first", "box"),
    [
        ((64,), (8,), (16,)),
        ((10, 64), (16, 3), (32, 4)),
        ((3, 10, 64), (0, 2, 1), (64, 5, 2)),
        ((2, 3, 4, 16), (8, 1, 0, 1), (8, 2, 3, 1)),
        ((2, 2, 3, 4, 16), (0, 1, 1, 0, 1), (16, 2, 2, 2, 1)),
    ],
    ids=lambda value: "x".join(map(str, value)),
)
def test_ranks(shape, first, box):
    check_load(numbers(*shape), first, box)


@pytest.mark.parametrize("first", [(-8, 0), (56, 0), (0, -2), (0, 8), (-3, -1), (61, 9), (200, 0)], ids=str)
def test_edges_are_zeros(first):
    check_load(numbers(10, 64), first, (16, 4))


@pytest.mark.parametrize("dtype", ["f2", "f4", "bf16"])
def test_edges_may_be_nan(dtype):
    array = numbers(10, 64, dtype="u2" if dtype == "bf16" else dtype)
    described = tensor_map(array, (16, 4), fill_nan=True, kind=dtype)
    outcome, found = load(array, described, (56, 8), 16 * 4 * array.itemsize)
    assert not outcome.reports
    kind = {"f2": torch.float16, "f4": torch.float32, "bf16": torch.bfloat16}[dtype]
    values = torch.from_numpy(found.copy()).view(kind).float().numpy().reshape(4, 16)
    outside = np.ones((4, 16), bool)
    outside[:2, :8] = False
    np.testing.assert_array_equal(np.isnan(values), outside)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzles(swizzle, dtype):
    columns = swizzle // np.dtype(dtype).itemsize
    check_load(numbers(40, 2 * columns, dtype=dtype), (columns // 2, 5), (columns, 24), swizzle)
    check_load(numbers(40, 2 * columns, dtype=dtype), (3 * columns // 2, 30), (columns, 16), swizzle)


def test_the_swizzle_is_the_one_that_wgmma_reads():
    from tests.ptx.test_machine_products import laid_out

    array = numbers(64, 64)
    _, found = load(array, tensor_map(array, (64, 64), 128), (0, 0), array.nbytes)
    memory, _, _ = laid_out(torch.from_numpy(array.view(np.int16)), 128, False)
    np.testing.assert_array_equal(found, memory)


def test_element_strides():
    array = numbers(12, 64, dtype="f4")
    described = tensor_map(array, (16, 8), element_strides=(2, 4))
    outcome, found = load(array, described, (4, 1), 8 * 2 * 4)
    assert not outcome.reports
    np.testing.assert_array_equal(found.view(np.float32).reshape(2, 8), array[1:9:4, 4:20:2])


STORE = f"""
mov.b32 %r11, {DATA}; shl.b32 %r12, %r0, 2; mad.wide.u32 %d10, %r0, 4, %d1; mov.b32 %r13, 0; setp.eq.u32 %p1, %r0, 0;
NEXT: add.s32 %r14, %r13, %r12; setp.ge.u32 %p2, %r14, BYTES; @%p2 bra FILLED;
ld.global.b32 %r15, [%d10]; st.shared.b32 [%r14+{DATA}], %r15; add.s32 %r13, %r13, 128; add.s64 %d10, %d10, 128;
bra NEXT;
FILLED: fence.proxy.async.shared::cta; bar.sync 0;
@%p1 OP [%d0, {{COORDINATES}}], [%r11]; @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;
"""


def store(array: np.ndarray, described: np.ndarray, first: tuple[int, ...], given: np.ndarray, reduction: str = ""):
    op = f"cp.reduce.async.bulk.tensor.{len(first)}d.global.shared::cta.{reduction}.tile.bulk_group"
    if not reduction:
        op = f"cp.async.bulk.tensor.{len(first)}d.global.shared::cta.tile.bulk_group"
    text = (
        STORE.replace("BYTES", str(given.nbytes)).replace("OP", op).replace("COORDINATES", ", ".join(map(str, first)))
    )
    return execute(text, described, given, array, shared=DATA + padded(given.nbytes))


@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize("first", [(0, 0), (64, 3), (96, 8), (-32, -2)], ids=str)
def test_stores_leave_out_what_is_outside(first, swizzle):
    array, given = numbers(10, 128), numbers(4, 64) + np.uint16(1000)
    expected = array.copy()
    rows, columns = np.meshgrid(np.arange(4) + first[1], np.arange(64) + first[0], indexing="ij")
    inside = (rows >= 0) & (rows < 10) & (columns >= 0) & (columns < 128)
    expected[rows[inside], columns[inside]] = given[inside]
    outcome = store(
        array, tensor_map(array, (64, 4), swizzle), first, swizzled(given.reshape(-1).view(np.uint8), swizzle)
    )
    assert not outcome.reports, outcome
    np.testing.assert_array_equal(array, expected)


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*[(name, "f4") for name in ("add",)], *[(name, "f2") for name in ("add", "min", "max")],
     *[(name, dtype) for name in ("add", "min", "max") for dtype in ("u4", "i4", "u8")],
     *[(name, "u4") for name in ("and", "or", "xor")]],
)  # fmt: skip
def test_reductions(name, dtype):
    array, given = numbers(4, 32, dtype=dtype), numbers(2, 16, dtype=dtype)[::-1].copy()
    expected = array.copy()
    expected[1:3, 8:24] = REDUCTIONS[name](expected[1:3, 8:24], given)
    assert not store(array, tensor_map(array, (16, 2)), (8, 1), given.reshape(-1), name).reports
    np.testing.assert_array_equal(array, expected)


def test_bfloat16_sums():
    array, given = (torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    expected = array + given
    words = array.view(torch.int16).numpy().view(np.uint16)
    outcome = store(
        words,
        tensor_map(words, (16, 2), kind="bf16"),
        (0, 0),
        given.view(torch.int16).numpy().view(np.uint16).reshape(-1),
        "add",
    )
    assert not outcome.reports
    assert torch.equal(torch.from_numpy(words.view(np.int16)).view(torch.bfloat16), expected)


@pytest.mark.parametrize(
    ("changes", "box"),
    [
        ({"magic": 1}, (16, 4)),
        ({}, (16, 4, 1)),
        ({"swizzle": 32}, (32, 4)),
        ({}, (12, 4)),
        ({}, (16, 0)),
        ({"element_strides": (1, 9)}, (16, 4)),
    ],
    ids=["no map", "rank", "row longer than the swizzle", "row of 24 bytes", "empty box", "element stride"],
)
def test_maps_that_cannot_be(changes, box):
    array = numbers(10, 64) if len(box) == 2 else numbers(2, 10, 64)
    outcome, _ = load(array, tensor_map(array, box, **changes), (0, 0), 128)
    assert "tensor-map" in kinds(outcome)
    # The copy does not happen, so that nobody ever hears of it.
    assert outcome.status == "deadlock"


def test_a_map_reaches_no_further_than_its_memory():
    array = numbers(10, 64)
    outcome, _ = load(array, tensor_map(array, (16, 4), sizes=(64, 12)), (0, 8), 128)
    assert "global-bounds" in kinds(outcome)
