"""Published figures: they add up as printed, each has a source, and suites find theirs by name."""

from __future__ import annotations

import pytest

from xr0_engine.evaluation.published import LIBERO_SUITES, OURS, TOTAL, published, throughputs

EVERY = [
    *(("libero", suite) for suite in (*LIBERO_SUITES, "90", TOTAL)),
    ("calvin", "ABCD_D"),
    ("calvin", "ABC_D"),
    ("simpler", "widowx"),
    ("simpler", "google_vm"),
    ("simpler", "google_va"),
    ("aloha", "transfer"),
    ("aloha", "throughput"),
]
# What rounding to a tenth of a per cent, and printing the mean of unrounded figures, can make of a mean of four.
ROUNDING = 0.11
# These are printed so in the source that their parts do not make up their total.
MISPRINTED = ("FLOWER", "EO-1")


@pytest.mark.parametrize(("name", "suite"), EVERY)
def test_every_figure_has_its_source(name, suite):
    found = published(name, suite)
    assert found
    for figure in found:
        source = figure.source
        assert source.url.startswith("https://")
        assert source.place
        assert source.protocol
        assert 2020 <= source.year <= 2026
        assert 0 <= figure.value <= (5 if figure.unit == "tasks in a row" else 100)
    assert len({figure.policy for figure in found}) == len(found)


def test_released_figures():
    """Those that the model's own report claims, first in every list that has them."""
    claimed = {
        ("libero", TOTAL): 98.7,
        ("calvin", "ABCD_D"): 4.80,
        ("calvin", "ABC_D"): 4.75,
        ("simpler", "google_vm"): 85.5,
        ("simpler", "google_va"): 74.7,
        ("simpler", "widowx"): 79.2,
    }
    for (name, suite), value in claimed.items():
        first = published(name, suite)[0]
        assert (first.policy, first.value) == (OURS, value)
    assert [figure.value for figure in throughputs()] == [1.2, 1.0, 1.0]


@pytest.mark.parametrize("suite", [TOTAL, "widowx", "google_vm", "google_va"])
def test_means_are_those_of_their_parts(suite):
    for figure in published("libero" if suite == TOTAL else "simpler", suite):
        if figure.policy not in MISPRINTED:
            assert sum(figure.parts.values()) / 4 == pytest.approx(figure.value, abs=ROUNDING)


@pytest.mark.parametrize("split", ["ABCD_D", "ABC_D"])
def test_lengths_of_chains_are_sums_of_their_positions(split):
    for figure in published("calvin", split):
        shares = list(figure.parts.values())
        assert shares == sorted(shares, reverse=True)
        if figure.policy not in MISPRINTED:
            assert sum(shares) / 100 == pytest.approx(figure.value, abs=0.02)


def test_libero_columns_are_the_totals_parts():
    for column in LIBERO_SUITES:
        by_policy = {figure.policy: figure.value for figure in published("libero", column)}
        assert by_policy == {figure.policy: figure.parts[column] for figure in published("libero", TOTAL)}
        assert published("libero", column)[0].policy == OURS
        rest = [figure.value for figure in published("libero", column)[1:]]
        assert rest == sorted(rest, reverse=True)


@pytest.mark.parametrize(
    ("name", "suite", "same"),
    [("libero", "libero_spatial", "spatial"), ("libero", "libero_10", "10"), ("libero", "Long", "10")],
)
def test_other_names_of_a_suite(name, suite, same):
    assert published(name, suite) == published(name, same)


def test_calvin_without_a_split_has_both():
    both = published("calvin", "D")
    assert len(both) == len(published("calvin", "ABCD_D")) + len(published("calvin", "ABC_D"))
    assert both[0].policy == f"{OURS}, ABCD→D"


@pytest.mark.parametrize(
    ("name", "suite"),
    [("libero", "spatial_object"), ("libero", "nonsense"), ("aloha", TOTAL), ("other", "spatial"), ("calvin", TOTAL)],
)
def test_no_figure_is_made_up(name, suite):
    assert published(name, suite) == ()
