"""How far two results may be apart: what is measured, and the tolerances that commands and tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_MAX_ERROR = 2e-4
"""On values of order 1 to 7: float32 rounding through some ten layers of sums in another order."""
FLOAT32_EXPORT_MAX_ERROR = 1e-4
"""Between two float32 implementations on one machine, which differ in the order of sums alone."""
FLOAT32_SEEDED_MAX_ERROR = 1e-3
"""The same through 16 layers of width 1024, five times."""
FLOAT32_LOSS_ERROR = 2e-5
"""Relative: losses average thousands of such values."""
RELATIVE = "relative RMS"
LOW_PRECISION_ROUNDOFFS = 32
"""bfloat16 and float16: root mean square of the difference over that of the value, in unit roundoffs of the type (2^-8
and 2^-11). Each of some hundred results in sequence is rounded, independent errors add as a root, and networks of
random weights amplify. That the errors in float16 are about an eighth of those in bfloat16 shows that rounding is all
there is; what the model computes is settled by float32, where a window or position off by one fails a hundredfold."""

ROUNDED_ERROR = {"int8": 0.05, "fp8": 0.1}
"""Format -> relative RMS between two implementations that round rows by constants. A value between two steps goes to
either by float32's last bit, and is then off by a whole step, in int8 nearly a percent of the largest, in float8 an
eighth of itself; what follows rounds otherwise too, until they are as far apart as rounding takes either from what is
not rounded (3.5 % and 9.8 % at the end of the tiny vision tower). A scale a fourth of the right one in one layer alone
is off by more (13.6 % and 14.6 % at least, in three of the tower's layers)."""


@dataclass(frozen=True)
class Comparison:
    """One quantity of one case. error is measured as `measure` says, and passes if it is at most tolerance."""

    case: str
    quantity: str
    error: float
    tolerance: float
    measure: str

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def compare(
    case: str,
    quantity: str,
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    float32_tolerance: float = FLOAT32_MAX_ERROR,
) -> Comparison:
    actual = actual.float().cpu()
    if actual.shape != expected.shape:
        return Comparison(case, quantity, math.nan, 0.0, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    difference = actual - expected
    if dtype == torch.float32:
        return Comparison(case, quantity, float(difference.abs().max()), float32_tolerance, "max")
    return Comparison(case, quantity, relative_rms(actual, expected), tolerance(dtype, float32_tolerance), RELATIVE)


def compare_rounded(case: str, quantity: str, actual: Tensor, expected: Tensor, tolerance: float) -> Comparison:
    """As compare, of two that round rows by constants, within a tolerance of ROUNDED_ERROR."""
    actual = actual.float().cpu()
    if actual.shape != expected.shape:
        return compare(case, quantity, actual, expected, torch.float32)
    return Comparison(case, quantity, relative_rms(actual, expected), tolerance, RELATIVE)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def tolerance(dtype: torch.dtype, float32_tolerance: float) -> float:
    return float32_tolerance if dtype == torch.float32 else LOW_PRECISION_ROUNDOFFS * torch.finfo(dtype).eps / 2
