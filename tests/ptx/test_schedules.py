"""Results depend neither on the order in which warps and blocks run, nor on when copies arrive, nor on how many run."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from xr0_engine.env import emulated_arch

if emulated_arch() is None:
    pytest.skip("needs XR0_EMULATE=90", allow_module_level=True)

from tests.ptx.families import FAMILIES
from tests.ptx.mutations import run
from tests.ptx.settings import ASYNCHRONOUS

SEEDS = range(12)
SPLIT = ("linear", "linear, 64 rows", "lambda_attention")
"""Whose parts of a sum arrive in any order."""
STREAMED_PROCESSORS = (4, 5, 8, 16)
"""A streamed loop takes as many as its last product's K has parts, or a multiple."""


def results(name, monkeypatch, schedules):
    for schedule in schedules:
        for variable, value in schedule.items():
            monkeypatch.setenv(f"XR0_EMULATE_{variable}", str(value))
        yield run(FAMILIES[name])


def assert_all_equal(found):
    first = next(found)
    for number, other in enumerate(found, 1):
        assert all(torch.equal(own, out) for own, out in zip(first, other, strict=True)), f"schedule {number}"


@pytest.mark.parametrize("name", SPLIT)
def test_36_schedules_are_bit_identical(name, monkeypatch):
    schedules = [
        {"SEED": seed, "ASYNC": asynchronous, "RESIDENT": 1 + 3 * (seed % 4), "QUANTUM": 20 if seed % 2 else 500}
        for seed, asynchronous in product(SEEDS, ASYNCHRONOUS)
    ]
    assert len(schedules) == 36
    assert_all_equal(results(name, monkeypatch, schedules))


@pytest.mark.parametrize("name", ["flow_loop", "streamed_flow"])
def test_loops_are_bit_identical_whatever_the_number_of_processors(name, monkeypatch):
    counts = (1, 3, 8, 16) if name == "flow_loop" else STREAMED_PROCESSORS
    schedules = [{"SEED": seed, "PROCESSORS": count} for count, seed in product(counts, (0, 2, 3))]
    assert_all_equal(results(name, monkeypatch, schedules))
