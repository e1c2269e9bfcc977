"""What the emulator is for: that a compiled kernel is broken, in whatever way, is noticed (mutations.py)."""

from __future__ import annotations

import pytest

from xr0_engine.env import emulated_arch

if emulated_arch() is None:
    pytest.skip("needs XR0_EMULATE=90", allow_module_level=True)

from tests.ptx.families import FAMILIES
from tests.ptx.mutations import HARMLESS, outcomes

SMALL = sorted(FAMILIES.keys() - {"flow_loop", "streamed_flow", "linear, tma"})
"""`make emulate` breaks these two as well, at more places and for minutes."""
PLACES = 2
"""Of each rule in each kernel; `python -m tests.ptx.mutations` breaks more."""
LEAST_NOTICED = 0.5
"""Share, of a kernel's mutants by the rules of HARMLESS, some of which change nothing."""


@pytest.mark.one_chip
@pytest.mark.parametrize("name", SMALL)
def test_what_is_broken_is_noticed(name):
    found = [outcome for outcome in outcomes(FAMILIES[name], PLACES) if outcome.executed]
    assert [outcome for outcome in found if not outcome.noticed and outcome.rule not in HARMLESS] == []
    unnoticed = [outcome for outcome in found if not outcome.noticed]
    others = sum(outcome.rule in HARMLESS for outcome in found)
    assert found
    assert len(unnoticed) <= (1 - LEAST_NOTICED) * others, unnoticed
