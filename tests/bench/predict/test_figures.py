"""Every figure is a range with a source, and every chip has all of them."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from xr0_engine.bench.predict.figures import CHIPS, Range, find_chip
from xr0_engine.bench.step.ceilings import CHIPS as CEILINGS
from xr0_engine.fused.ops import SHARED_LIMIT


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_ranges_with_sources(name):
    for figure, found in asdict(CHIPS[name].figures).items():
        told = Range(*found)
        assert 0 < told.low <= told.central <= told.high, figure
        assert told.source, figure


@pytest.mark.parametrize("name", CHIPS)
def test_datasheets_peak_is_that_of_the_ceilings(name):
    chip = CHIPS[name]
    rate = chip.mma_cycle * chip.processors * chip.figures.clock_hz.high
    assert rate == pytest.approx(chip.ceilings.peak("bfloat16"), rel=0.4)
    # h200's ceiling is what a library reached, not the datasheet's.
    assert rate >= 0.99 * chip.ceilings.peak("bfloat16")


def test_every_chip_of_the_bounds_and_every_compute_capability_is_there():
    assert set(CEILINGS) <= set(CHIPS)
    assert {chip.arch for chip in CHIPS.values()} == set(SHARED_LIMIT)


def test_settings_change_one_figure_at_a_time():
    centre, *others = CHIPS["h200"].settings()
    assert len(others) == 2 * len(centre)
    assert all(sum(other[name] != centre[name] for name in centre) <= 1 for other in others)


def test_unknown_chip_is_refused_by_name():
    with pytest.raises(ValueError, match=r"chip: expected a100, .*; got 'v100'"):
        find_chip("v100")
