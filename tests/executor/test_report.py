"""Reports: percentiles of times, and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.executor.support import execute
from xr0_engine.executor.report import BINS_PER_DECADE, Histogram


class TestHistogram:
    def test_percentiles_are_exact_to_a_bin(self):
        histogram = Histogram()
        times = np.random.default_rng(0).exponential(2e-3, 10_000)
        for time_s in times:
            histogram.add(time_s)
        for percent in (50, 99, 99.9):
            exact = np.percentile(times, percent)
            assert exact <= histogram.percentile_s(percent) * 1.001 <= exact * 10 ** (1 / BINS_PER_DECADE) * 1.01
        assert histogram.maximum_s == times.max()
        assert sum(histogram.to_json()["bins_ms"].values()) == 10_000

    @pytest.mark.parametrize("time_s", [0.0, -1e-9, 1e9], ids=["zero", "negative", "huge"])
    def test_extremes_have_a_bin(self, time_s):
        histogram = Histogram()
        histogram.add(time_s)
        assert histogram.count == 1
        assert Histogram().percentile_s(99) == 0


def test_report_is_json():
    report, _, _ = execute()
    assert json.loads(json.dumps(report.to_json()))["ended"] == "time"
