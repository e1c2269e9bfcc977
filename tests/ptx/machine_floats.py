"""Floats of every format at their edges, for tests of the machine, and what they are compared as."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

RANDOM = 40
FORMATS = {"f16": torch.float16, "bf16": torch.bfloat16}


def floats(bits: int = 32, count: int = RANDOM) -> np.ndarray:
    """float32 or float64: edges of the format, values around 1, and any bits at all."""
    dtype = np.dtype(f"f{bits // 8}")
    limits = np.finfo(dtype)
    positive = [0.0, limits.smallest_subnormal, limits.smallest_normal / 3, limits.smallest_normal, 0.5, 1.0, 1.5, 3.0]
    positive += [2.0**31, 2.0**32, 255.5, 65504.0, 65536.0, limits.max, np.inf, 1 - limits.epsneg, 2.5, 1e-7]
    drawn = np.random.default_rng(0)
    random = [drawn.normal(size=count) * 4, drawn.integers(0, 1 << bits, count, f"u{bits // 8}").view(dtype)]
    with np.errstate(over="ignore"):
        edges = np.array(positive, dtype)
        return np.concatenate([edges, -edges, np.array([np.nan], dtype), *(each.astype(dtype) for each in random)])


def halves(kind: str, count: int = RANDOM) -> np.ndarray:
    """Codes of float16 or bfloat16, as 16 bits."""
    names = FORMATS[kind]
    limits = torch.finfo(names)
    edges = [
        0.0,
        1.0,
        1.5,
        0.1,
        3.0,
        250.0,
        limits.max,
        limits.smallest_normal,
        limits.smallest_normal / 4,
        float("inf"),
    ]
    codes = torch.tensor([*edges, *(-each for each in edges), float("nan")]).to(names).view(torch.int16).numpy()
    drawn = np.random.default_rng(0).integers(0, 1 << 16, count).astype(np.uint16)
    return np.concatenate([codes.view(np.uint16), drawn])


def decoded(codes: np.ndarray, kind: str) -> np.ndarray:
    """Their values, in float32."""
    return torch.from_numpy(np.ascontiguousarray(codes).view(np.int16)).view(FORMATS[kind]).float().numpy()


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """float64 values rounded once to a format: its codes."""
    # PyTorch rounds float64 by way of float32; rounding to odd there keeps what the second rounding needs.
    return torch.from_numpy(to_odd(values)).to(FORMATS[kind]).view(torch.int16).numpy().view(np.uint16)


def to_odd(values: np.ndarray) -> np.ndarray:
    """float64 to float32; what is not exact gets an odd last bit."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        inexact = (near.astype(np.float64) != values) & np.isfinite(values) & np.isfinite(near)
        bits = near.view(np.int32).copy()
        even = inexact & (bits & 1 == 0)
        larger = np.abs(values) > np.abs(near.astype(np.float64))
    bits[even] += np.where(larger[even], 1, -1)
    return bits.view(np.float32)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c exactly, to float64 with an odd last bit where it is not exact: rounding that again is rounding once."""
    plain = a.astype(np.float64) * b + c
    result = plain.copy()
    for index in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exactly = Fraction(float(a[index])) * Fraction(float(b[index])) + Fraction(float(c[index]))
        if exactly:
            result[index] = _odd_float64(exactly)
    return result


def _odd_float64(value: Fraction) -> float:
    near = float(value)
    if near == value or np.float64(near).view(np.int64) & 1:
        return near
    return float(np.nextafter(near, np.inf if value > near else -np.inf))


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, signs of zeros too; a NaN is a NaN."""
    both_nan = np.isnan(found) & np.isnan(expected)
    unsigned = f"u{found.dtype.itemsize}"
    wrong = ~both_nan & (found.view(unsigned) != expected.astype(found.dtype).view(unsigned))
    assert not wrong.any(), (np.flatnonzero(wrong)[:8], found[wrong][:8], expected[wrong][:8])


def same_codes(found: np.ndarray, expected: np.ndarray, kind: str) -> None:
    """Of 16-bit formats."""
    same(decoded(found, kind), decoded(expected, kind))


def flushed(values: np.ndarray) -> np.ndarray:
    """.ftz: float32 subnormals are zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), values), values)
