"""Tensor cores against PyTorch in float64: every shape and type of mma and wgmma, layouts in shared memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.machine_support import compute

ROUNDING = 2.0**-23
"""Each of k products and sums is rounded to float32 once, relative to the sum of their sizes."""
M, N = 16, 8

FLOATS = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
INTEGERS = {"s8": torch.int8, "u8": torch.uint8}
MMA = [
    *[(8, kind, kind, "f32") for kind in ("bf16", "f16")],
    *[(16, kind, kind, "f32") for kind in ("bf16", "f16")],
    *[(k, "f16", "f16", "f16") for k in (8, 16)],
    *[(k, "tf32", "tf32", "f32") for k in (4, 8)],
    *[(k, a, b, d) for k in (16, 32) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for d in ("f32", "f16")],
    *[(k, a, b, "s32") for k in (16, 32) for a in INTEGERS for b in INTEGERS],
]


def factors(kind: str, *shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind in INTEGERS:
        limits = torch.iinfo(INTEGERS[kind])
        return torch.randint(limits.min, limits.max + 1, shape, generator=generator, dtype=torch.int32).to(
            INTEGERS[kind]
        )
    values = torch.randn(shape, generator=generator)
    if kind == "tf32":
        # The lowest bits are there and must not count.
        return values
    return values.to(FLOATS[kind])


def exact(matrix: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "tf32":
        matrix = (matrix.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return matrix.to(torch.float32).double()


def raw(matrix: torch.Tensor) -> np.ndarray:
    """The bytes of a matrix, row by row, as 32-bit words."""
    return np.frombuffer(matrix.contiguous().view(torch.uint8).numpy().tobytes(), np.uint32).copy()


def fragments(matrix: torch.Tensor) -> np.ndarray:
    """(registers, 32): eight rows of 16 bytes each; the lower half of the rows first, then the next columns."""
    words = raw(matrix).reshape(matrix.shape[0], -1)
    blocks = [
        words[row : row + 8, column : column + 4].reshape(32)
        for column in range(0, words.shape[1], 4)
        for row in range(0, len(words), 8)
    ]
    return np.stack(blocks)


def check(found: np.ndarray, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, kind: str) -> None:
    """found: a b + c. a: (m, k), b: (k, n) in float64."""
    wanted = (a @ b + c.double()).numpy()
    if kind == "s32":
        np.testing.assert_array_equal(found, wanted.astype(np.int64).astype(np.int32))
        return
    size = (a.abs() @ b.abs() + c.double().abs()).numpy()
    step = ROUNDING if kind == "f32" else 2.0**-11
    assert (np.abs(found - wanted) <= (a.shape[1] + 2) * ROUNDING * size + step * np.abs(wanted)).all()


@pytest.mark.parametrize(("k", "a_kind", "b_kind", "sums"), MMA, ids=lambda value: str(value))
def test_mma(k, a_kind, b_kind, sums):
    a, b = factors(a_kind, M, k, seed=1), factors(b_kind, N, k, seed=2)
    dtype = {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[sums]
    c = (torch.randn(M, N, generator=torch.Generator().manual_seed(3)) * 9).to(dtype)
    registers = np.concatenate([fragments(a), fragments(b), accumulators(c)])
    count = [len(fragments(a)), len(fragments(b)), len(accumulators(c))]
    names = [f"%r{10 + index}" for index in range(len(registers))]
    given = [names[: count[0]], names[count[0] : count[0] + count[1]], names[count[0] + count[1] :]]
    results = [f"%r{40 + index}" for index in range(count[2])]
    out = np.zeros((count[2], 32), np.uint32)
    operands = ", ".join("{" + ", ".join(each) + "}" for each in (results, *given))
    body = [f"mad.wide.u32 %d{10 + i}, %r2, 4, %d{i};" for i in range(2)]
    body += [f"ld.global.b32 {name}, [%d10+{128 * index}];" for index, name in enumerate(names)]
    body += [f"mma.sync.aligned.m16n8k{k}.row.col.{sums}.{a_kind}.{b_kind}.{sums} {operands};"]
    body += [f"st.global.b32 [%d11+{128 * index}], {name};" for index, name in enumerate(results)]
    compute("\n".join(body), registers, out)
    check(matrix(out, dtype), exact(a, a_kind), exact(b, b_kind).T, c, sums)


def accumulators(c: torch.Tensor) -> np.ndarray:
    """(registers, 32): two neighbours of a row in two registers, or in one of 16 bits each; then the lower rows."""
    if c.dtype == torch.float16:
        return np.stack([raw(c[:8]), raw(c[8:])])
    words = raw(c).reshape(2, 32, 2)
    return np.concatenate([words[0].T, words[1].T])


def matrix(registers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The 16 x 8 accumulators of registers."""
    if dtype == torch.float16:
        return registers.view(np.float16).reshape(M, N).astype(np.float64)
    numbers = registers.view(np.int32 if dtype == torch.int32 else np.float32).reshape(2, 2, 32)
    return numbers.transpose(0, 2, 1).reshape(M, N).astype(np.float64)


def test_integer_sums_wrap_or_saturate():
    a, b = torch.full((M, 32), 127, dtype=torch.int8), torch.full((N, 32), 127, dtype=torch.int8)
    registers = np.concatenate([fragments(a), fragments(b), np.full((4, 32), 2**31 - 1, np.uint32)])
    names = [f"%r{10 + index}" for index in range(len(registers))]
    operands = ", ".join("{" + ", ".join(each) + "}" for each in (names[:4], names[4:6], names[6:]))
    for suffix, wanted in (("", 2**31 - 1 + 32 * 127 * 127 - 2**32), (".satfinite", 2**31 - 1)):
        out = np.zeros(32, np.int32)
        body = "\n".join(
            ["mad.wide.u32 %d10, %r2, 4, %d0; mad.wide.u32 %d11, %r2, 4, %d1;"]
            + [f"ld.global.b32 {name}, [%d10+{128 * index}];" for index, name in enumerate(names)]
            + [f"mma.sync.aligned.m16n8k32.row.col{suffix}.s32.s8.s8.s32 {{%r40, %r41, %r42, %r43}}, {operands};"]
            + ["st.global.b32 [%d11], %r42;"]
        )
        compute(body, registers, out)
        np.testing.assert_array_equal(out, np.full(32, wanted))


SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}
"""Bytes of a swizzled row -> its number in a matrix descriptor."""


def swizzled(offset: np.ndarray, width: int) -> np.ndarray:
    """Bits 4 to 6 of an address change with bits 7 to 9, as far as a row is wide."""
    return offset ^ (offset >> 7 & (width // 16 - 1 if width else 0)) << 4


def laid_out(matrix: torch.Tensor, width: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """(rows, k) as wgmma reads it from shared memory at 0; the descriptor's leading and stride distances in bytes.

    Rows of 16 bytes or as wide as the swizzle, eight to an atom; along K, or along the rows if transposed. Atoms come
    one behind the other: first along the bytes, then over the lines.
    """
    bytes_of = matrix.contiguous().view(torch.uint8).numpy().reshape(matrix.shape[0], -1)
    size = matrix.element_size()
    if transposed:
        bytes_of = matrix.T.contiguous().view(torch.uint8).numpy().reshape(matrix.shape[1], -1)
    row = width or 16
    lines, length = bytes_of.shape
    across = length // row
    line, byte = np.meshgrid(np.arange(lines), np.arange(length), indexing="ij")
    atom = 8 * row
    offset = (line // 8 * across + byte // row) * atom + line % 8 * row + byte % row
    memory = np.zeros(lines * length, np.uint8)
    memory[swizzled(offset, width)] = bytes_of
    along, between = atom, across * atom
    if transposed and not width:
        along, between = between, along
    assert size in (1, 2, 4)
    return memory, along, between


def descriptor(start: int, along: int, between: int, width: int) -> int:
    return start >> 4 | along >> 4 << 16 | between >> 4 << 32 | SWIZZLES[width] << 62


WGMMA_TYPES = [
    *[(kind, kind, "f32") for kind in ("bf16", "f16", "tf32")],
    ("f16", "f16", "f16"),
    *[(a, b, d) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for d in ("f32", "f16")],
    *[(a, b, "s32") for a in INTEGERS for b in INTEGERS],
]


def wgmma(
    a_kind: str, b_kind: str, sums: str, n: int, width: int = 128, transposed: tuple[int, int] = (0, 0),
    a_in_registers: bool = False, signs: tuple[int, int] = (1, 1),
) -> None:  # fmt: skip
    """One product of 64 x n, with the accumulators that are there, against PyTorch."""
    size = {"tf32": 4, "bf16": 2, "f16": 2}.get(a_kind, 1)
    k = 32 // size
    # Shared memory holds as much of K as a row of the layout, if those go along K.
    columns = [k if each else max(width, 32) // size for each in transposed]
    a, b = factors(a_kind, 64, columns[0], seed=1), factors(b_kind, n, columns[1], seed=2)
    dtype = {"f32": torch.float32, "f16": torch.float16, "s32": torch.int32}[sums]
    c = (torch.randn(64, n, generator=torch.Generator().manual_seed(3)) * 9).to(dtype)
    a_memory, *a_distances = laid_out(a, width, bool(transposed[0]))
    b_memory, *b_distances = laid_out(b, width, bool(transposed[1]))
    b_start = -(-len(a_memory) // 1024) * 1024
    memory = np.zeros(b_start + len(b_memory), np.uint8)
    memory[: len(a_memory)], memory[b_start:] = a_memory, b_memory
    count = n // 4 if sums == "f16" else n // 2
    registers, held = (
        np.ascontiguousarray(np.concatenate([of(each[16 * w : 16 * w + 16]) for w in range(4)], 1))
        for of, each in ((wgmma_accumulators, c), (fragments, a[:, :k]))
    )
    out = np.zeros_like(registers)
    names = [f"%r{100 + index}" for index in range(count)]
    kept = [f"%r{40 + index}" for index in range(4)]
    factor = "{" + ", ".join(kept) + "}" if a_in_registers else "%d20"
    shown = transposed if not a_in_registers else transposed[1:]
    flags = ", ".join(map(str, shown)) if size == 2 else ""
    kinds = f"{sums}.{a_kind}.{b_kind}"
    scale = "".join(f", {sign}" for sign in signs) if sums != "s32" else ""
    body = "\n".join(
        [f"mad.wide.u32 %d{10 + i}, %r0, 4, %d{i};" for i in range(4)]
        + ["mov.u32 %r10, %r0;", "FILL:", f"setp.ge.u32 %p1, %r10, {len(memory) // 4};", "@%p1 bra FILLED;"]
        + ["mad.wide.u32 %d15, %r10, 4, %d0; shl.b32 %r11, %r10, 2; ld.global.b32 %r12, [%d15];"]
        + ["st.shared.b32 [%r11], %r12; add.s32 %r10, %r10, 128; bra FILL;", "FILLED:"]
        + ["fence.proxy.async.shared::cta;", "bar.sync 0;"]
        + [f"ld.global.b32 {name}, [%d11+{512 * index}];" for index, name in enumerate(names)]
        + [f"ld.global.b32 {name}, [%d12+{512 * index}];" for index, name in enumerate(kept)]
        + [f"mov.b64 %d20, {descriptor(0, *a_distances, width)};"]
        + [f"mov.b64 %d21, {descriptor(b_start, *b_distances, width)};"]
        + ["setp.eq.s32 %p2, 0, 0;", "wgmma.fence.sync.aligned;"]
        + [f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{kinds} {{{', '.join(names)}}}, {factor}, %d21, %p2{scale}"]
        + [f"{', ' if flags else ''}{flags};", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
        + [f"st.global.b32 [%d13+{512 * index}], {name};" for index, name in enumerate(names)]
    )
    compute(body, memory.view(np.uint32), registers, held, out, warps=4, shared=len(memory))
    found = np.concatenate([wgmma_matrix(out[:, 32 * w : 32 * w + 32], dtype, n) for w in range(4)])
    sign = signs[0] * signs[1]
    check(found, sign * exact(a[:, :k], a_kind), exact(b[:, :k], b_kind).T, c, sums)


def wgmma_accumulators(c: torch.Tensor) -> np.ndarray:
    """Those of mma, eight columns behind the other."""
    return np.concatenate([accumulators(c[:, j : j + 8]) for j in range(0, c.shape[1], 8)])


def wgmma_matrix(registers: np.ndarray, dtype: torch.dtype, n: int) -> np.ndarray:
    step = 2 if dtype == torch.float16 else 4
    parts = [
        matrix(np.ascontiguousarray(registers[index : index + step]), dtype) for index in range(0, len(registers), step)
    ]
    return np.concatenate(parts, 1)[:, :n]


@pytest.mark.parametrize(("a_kind", "b_kind", "sums"), WGMMA_TYPES, ids=lambda value: str(value))
def test_wgmma_types(a_kind, b_kind, sums):
    wgmma(a_kind, b_kind, sums, 32)
    wgmma(a_kind, b_kind, sums, 16, a_in_registers=True)


@pytest.mark.parametrize("n", [8, 24, 64, 128, 256])
def test_wgmma_widths(n):
    wgmma("bf16", "bf16", "f32", n)


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=["", "A", "B", "A and B"])
def test_wgmma_layouts(width, transposed):
    """n of 64: as wide as the widest swizzle, and as A's rows."""
    wgmma("bf16", "bf16", "f32", 64, width, transposed)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_wgmma_layouts_of_several_atoms(width):
    wgmma("f16", "f16", "f32", 128, width, (0, 1), a_in_registers=True)


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1)])
def test_wgmma_signs(signs):
    wgmma("f16", "f16", "f32", 16, signs=signs)
