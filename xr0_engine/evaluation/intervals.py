"""How sure a figure is: intervals for rates, differences of paired rates, means and counts; the exact McNemar test.

All are for 95 % unless asked otherwise. None collapses to a point where all trials went alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
# Halvings of an interval no wider than 2: below what a float64 tells apart.
HALVINGS = 60


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds that it lies between; low <= value <= high."""

    value: float
    low: float
    high: float


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """A rate, within 0 to 1, with Wilson's score interval (Journal of the American Statistical Association, 1927).

    Raises ValueError for no trials, or successes outside 0 to trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes: expected 0 to trials, and a trial at least, got {successes} of {trials}")
    return _wilson(successes / trials, trials, confidence)


def _wilson(rate: float, trials: int, confidence: float) -> Interval:
    z = _z(confidence)
    shrink = 1 + z**2 / trials
    middle = (rate + z**2 / (2 * trials)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / shrink
    # Rounding must not put a rate of 0 or 1 outside its own interval.
    return Interval(rate, max(0.0, min(middle - half, rate)), min(1.0, max(middle + half, rate)))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p value, within 0 to 1, of pairs of which only one succeeded, under a fair coin: McNemar's exact test.

    only_a, only_b: in how many pairs A alone, and B alone, succeeded. Raises ValueError for negative ones.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"discordant pairs: expected counts, got {only_a} and {only_b}")
    total, tail, ways = only_a + only_b, 0, 1
    for count in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (total - count) // (count + 1)
    # Whole numbers divide exactly where 2.0 ** total overflows.
    return min(1.0, 2 * tail / 2**total)


def paired_difference(only_b: int, only_a: int, pairs: int, confidence: float = CONFIDENCE) -> Interval:
    """Rate of B minus rate of A over the same trials, within -1 to 1, with Tango's score interval (Statistics in
    Medicine, 1998): the differences that the score test, McNemar's at 0, does not reject.

    only_b, only_a: pairs in which B alone, and A alone, succeeded. Raises ValueError for no pairs, or counts beyond.
    """
    if min(only_a, only_b) < 0 or pairs < 1 or only_a + only_b > pairs:
        raise ValueError(f"pairs: expected at least 1 and no more discordant ones, got {only_b}, {only_a} of {pairs}")
    z = _z(confidence)
    value = (only_b - only_a) / pairs

    def score(difference: float) -> float:
        """How many standard deviations the observed difference lies above this one."""
        # The likeliest rate of "A alone" among those with this difference, the positive root of a square equation.
        linear = (2 * pairs - only_b + only_a) * difference - only_b - only_a
        constant = -only_a * difference * (1 - difference)
        root = math.sqrt(max(0.0, linear**2 - 8 * pairs * constant))
        likely = max(0.0, (root - linear) / (4 * pairs))
        variance = pairs * (2 * likely + difference * (1 - difference))
        distance = only_b - only_a - pairs * difference
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    low = _crossing(lambda difference: score(difference) - z, -1.0, value)
    high = _crossing(lambda difference: score(difference) + z, value, 1.0)
    return Interval(value, low, high)


def mean_of_values(values: Sequence[float], most: float, confidence: float = CONFIDENCE) -> Interval:
    """The mean of values within 0 to most, such as subtasks done of a chain: percentiles of 10,000 bootstrap resamples,
    from a fixed seed.

    Where all values are equal, which no resample can vary, the interval is Wilson's, as of a rate of `most`: too wide
    rather than of no width. Raises ValueError for no values, or values outside 0 to most.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0 or most <= 0 or not ((array >= 0) & (array <= most)).all():
        raise ValueError(f"values: expected some, each within 0 to {most:g}, got {list(values)[:5]}")
    mean = float(array.mean())
    if (array == array[0]).all():
        scaled = _wilson(float(array[0]) / most, array.size, confidence)
        return Interval(mean, min(scaled.low * most, mean), max(scaled.high * most, mean))
    # Chains have few lengths: how often each is drawn is one multinomial.
    kinds, counts = np.unique(array, return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(array.size, counts / array.size, RESAMPLES)
    low, high = np.quantile(drawn @ kinds / array.size, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def mean_difference(pairs: Sequence[tuple[float, float]], most: float, confidence: float = CONFIDENCE) -> Interval:
    """The mean of second minus first over pairs of values within 0 to most, as mean_of_values has it.

    Raises ValueError for no pairs, or values outside.
    """
    if not all(0 <= value <= most for pair in pairs for value in pair):
        raise ValueError(f"pairs: expected values within 0 to {most:g}, got {list(pairs)[:3]}")
    found = mean_of_values([second - first + most for first, second in pairs], 2 * most, confidence)
    return Interval(found.value - most, found.low - most, found.high - most)


def mean_of_rates(rates: Sequence[Interval]) -> Interval:
    """The mean of independent rates, such as of suites: distances to the bounds add up as squares (Zou and Donner,
    Statistics in Medicine, 2008). Raises ValueError for no rates."""
    if not rates:
        raise ValueError("rates: expected at least one, got none")
    count = len(rates)
    value = sum(rate.value for rate in rates) / count
    low = math.sqrt(sum((rate.value - rate.low) ** 2 for rate in rates)) / count
    high = math.sqrt(sum((rate.high - rate.value) ** 2 for rate in rates)) / count
    return Interval(value, max(0.0, value - low), min(1.0, value + high))


def count_per_time(count: int, time: float, confidence: float = CONFIDENCE) -> Interval:
    """Events per unit of time, such as pieces a minute, with the score interval of a Poisson count: as if each came
    independently of the others, which is wider than a steady process has it. Raises ValueError for no time."""
    if count < 0 or not (math.isfinite(time) and time > 0):
        raise ValueError(f"count, time: expected a count and a positive time, got {count} in {time}")
    z = _z(confidence)
    half = z * math.sqrt(count + z**2 / 4)
    low = max(0.0, count + z**2 / 2 - half)
    return Interval(count / time, min(low, count) / time, (count + z**2 / 2 + half) / time)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls becomes negative, by bisection."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
