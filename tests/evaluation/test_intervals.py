"""Intervals against first principles: their defining equations, numeric maximisation, coverage counted out exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xr0_engine.evaluation.intervals import (
    Interval,
    count_per_time,
    mcnemar,
    mean_difference,
    mean_of_rates,
    mean_of_values,
    paired_difference,
    wilson,
)

Z95 = 1.959963984540054
# Bounds found by bisection and by a formula agree to rounding.
EQUAL = 1e-9


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 1998 (two-sided intervals for a single proportion), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(successes, trials, low, high):
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (1, 3), (37, 50), (50, 50), (1974, 2000)])
def test_wilson_bounds_are_what_the_score_test_just_accepts(successes, trials):
    found = wilson(successes, trials)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for bound in {found.low, found.high} - {0.0, 1.0}:
        deviation = math.sqrt(bound * (1 - bound) / trials)
        assert abs(found.value - bound) / deviation == pytest.approx(Z95, rel=1e-6)


def test_wilson_covers_as_it_says():
    """Exact coverage over all outcomes of 50 trials, averaged over rates."""
    trials = 50
    intervals = [wilson(count, trials) for count in range(trials + 1)]
    covered = []
    for rate in np.linspace(0.02, 0.98, 97):
        chances = [math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)]
        covered.append(sum(p for p, found in zip(chances, intervals, strict=True) if found.low <= rate <= found.high))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (1, 0), (5, 5), (2, 9), (0, 6), (12, 3), (40, 61)])
def test_mcnemar_counts_coin_throws(only_a, only_b):
    """Against the sum over all outcomes that are no likelier than this one."""
    total = only_a + only_b
    chances = [math.comb(total, count) * 0.5**total for count in range(total + 1)]
    expected = sum(chance for chance in chances if chance <= chances[only_a] * (1 + 1e-12))
    assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, expected))


def test_mcnemar_known_values_and_large_counts():
    assert mcnemar(0, 6) == 0.03125
    assert mcnemar(1, 9) == 22 / 1024
    assert mcnemar(1000, 1200) == pytest.approx(2.19e-5, rel=0.02)
    assert mcnemar(600, 600) == 1.0


@pytest.mark.parametrize(
    ("only_b", "only_a", "pairs"),
    [(12, 2, 50), (0, 0, 20), (3, 0, 10), (0, 3, 10), (10, 10, 40), (30, 0, 30), (1, 0, 1)],
)
def test_paired_difference_solves_the_score_equation(only_b, only_a, pairs):
    """Both bounds against a score statistic whose nuisance rate is found by a search of the likelihood."""
    found = paired_difference(only_b, only_a, pairs)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.value == (only_b - only_a) / pairs
    for bound, sign in ((found.low, 1), (found.high, -1)):
        if abs(bound) < 1 - 1e-6:
            assert _score(only_b, only_a, pairs, bound) == pytest.approx(sign * Z95, abs=2e-3)


def _score(only_b, only_a, pairs, difference):
    """Tango's statistic; the rate of "A alone" by a fine search of the likelihood under this difference."""
    rates = np.linspace(max(0.0, -difference), (1 - difference) / 2, 40_001)[1:-1]
    with np.errstate(divide="ignore"):
        likelihood = (pairs - only_b - only_a) * np.log1p(-(2 * rates + difference))
        likelihood += only_b * np.log(rates + difference) if only_b else 0.0
        likelihood += only_a * np.log(rates) if only_a else 0.0
    likely = rates[np.argmax(likelihood)]
    return (only_b - only_a - pairs * difference) / math.sqrt(pairs * (2 * likely + difference * (1 - difference)))


def test_paired_difference_is_symmetric_and_agrees_with_mcnemar():
    forth, back = paired_difference(12, 2, 50), paired_difference(2, 12, 50)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=EQUAL)
    # The asymptotic test's bound: 0 is just excluded where (b - c)^2 / (b + c) passes the quantile.
    assert paired_difference(13, 4, 100).low > 0
    assert paired_difference(11, 4, 100).low < 0


@pytest.mark.parametrize(("alone_b", "alone_a"), [(0.2, 0.05), (0.1, 0.1), (0.02, 0.3)])
def test_paired_difference_covers_as_it_says(alone_b, alone_a):
    """Exact coverage over all outcomes of 30 pairs."""
    pairs, covered = 30, 0.0
    for b in range(pairs + 1):
        for a in range(pairs + 1 - b):
            ways = math.comb(pairs, b) * math.comb(pairs - b, a)
            chance = ways * alone_b**b * alone_a**a * (1 - alone_a - alone_b) ** (pairs - a - b)
            if chance > 1e-7:
                found = paired_difference(b, a, pairs)
                covered += chance * (found.low <= alone_b - alone_a <= found.high)
    assert 0.93 < covered < 0.98


def test_mean_of_values_as_the_normal_approximation_has_it():
    values = np.random.default_rng(3).choice([0, 1, 2, 3, 4, 5], 1000, p=[0.01, 0.01, 0.02, 0.03, 0.05, 0.88])
    found = mean_of_values(values.tolist(), 5)
    half = Z95 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert found == mean_of_values(values.tolist(), 5)


@pytest.mark.parametrize(("values", "low", "high"), [([5] * 10, 3.6, 5), ([0] * 10, 0, 1.4), ([3], 0.39, 4.8)])
def test_mean_of_equal_values_keeps_a_width(values, low, high):
    found = mean_of_values(values, 5)
    assert found.value == values[0]
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.high == pytest.approx(high, abs=0.1)


def test_mean_difference_is_of_pairs():
    first = np.random.default_rng(1).integers(0, 5, 200)
    found = mean_difference([(value, value + 1) for value in first.tolist()], 5)
    # All differ alike: the width that is left is Wilson's.
    assert found.value == 1.0
    assert 0.2 < found.low < 1 < found.high < 1.8
    back = mean_difference([(value + 1, value) for value in first.tolist()], 5)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    with pytest.raises(ValueError, match="within 0 to 5"):
        mean_difference([(0, 6)], 5)


def test_mean_of_rates():
    suites = [wilson(490, 500), wilson(500, 500), wilson(470, 500), wilson(450, 500)]
    found = mean_of_rates(suites)
    assert found.value == pytest.approx(0.955)
    # Twice the trials by four suites: narrower than any but the perfect suite's.
    assert found.high - found.low < min(suite.high - suite.low for suite in suites if suite.value < 0.95)
    assert mean_of_rates([suites[0]]) == Interval(0.98, pytest.approx(suites[0].low), pytest.approx(suites[0].high))
    assert mean_of_rates([wilson(5, 5), wilson(5, 5)]).low < 0.8


def test_count_per_time_solves_its_equation():
    found = count_per_time(36, 30.0)
    assert found.value == 1.2
    for bound in (found.low, found.high):
        assert abs(36 - bound * 30) / math.sqrt(bound * 30) == pytest.approx(Z95)
    assert count_per_time(0, 30.0).low == 0
    assert count_per_time(0, 30.0).high == pytest.approx(Z95**2 / 30)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: wilson(0, 0), "trials"),
        (lambda: wilson(3, 2), "3 of 2"),
        (lambda: wilson(-1, 2), "-1 of 2"),
        (lambda: wilson(1, 2, confidence=95), "confidence"),
        (lambda: mcnemar(-1, 0), "discordant"),
        (lambda: paired_difference(0, 0, 0), "pairs"),
        (lambda: paired_difference(2, 2, 3), "pairs"),
        (lambda: mean_of_values([], 5), "values"),
        (lambda: mean_of_values([6], 5), "0 to 5"),
        (lambda: mean_of_values([float("nan")], 5), "values"),
        (lambda: mean_of_rates([]), "rates"),
        (lambda: count_per_time(1, 0), "time"),
        (lambda: count_per_time(1, float("inf")), "time"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
