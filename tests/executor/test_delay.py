"""The delay to plan with."""

from __future__ import annotations

import pytest

from xr0_engine.executor.delay import DelayEstimator, delay_steps


class TestDelay:
    @pytest.mark.parametrize(
        ("delay_s", "rate_hz", "steps"),
        [(0.08, 30, 3), (0.1, 30, 3), (3 / 30, 30, 3), (0.0, 30, 0), (0.101, 30, 4), (0.08, 200, 16)],
    )
    def test_steps_are_rounded_up(self, delay_s, rate_hz, steps):
        assert delay_steps(delay_s, rate_hz) == steps

    def test_warm_up_is_left_out(self):
        delay = DelayEstimator()
        delay.add(12.0)
        assert delay.seconds is None
        delay.add(0.1)
        assert delay.seconds == 0.1

    def test_outliers_are_left_out_but_the_longest_usual_delay_counts(self):
        delay = DelayEstimator(expected_s=1.0)
        for seconds in [5.0, 0.1, 0.12, 0.09, 2.0, 0.1]:
            delay.add(seconds)
        assert delay.seconds == 0.12

    def test_a_lasting_change_is_believed(self):
        delay = DelayEstimator()
        for seconds in [1.0] + [0.1] * 20 + [0.5] * 11:
            delay.add(seconds)
        assert delay.seconds == 0.5

    def test_what_is_expected_counts_until_it_is_measured(self):
        delay = DelayEstimator(expected_s=0.07)
        assert delay.steps(30) == 3
        delay.add(1.0)
        assert delay.seconds == 0.07
        delay.add(0.2)
        assert delay.seconds == 0.2
        assert DelayEstimator().steps(30) is None
