"""What the emulator is for: that a compiled kernel is broken, in whatever way, is noticed (mutations.py)."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from xr0_engine.env import emulated_arch

if emulated_arch() is None:
    pytest.skip("needs XR0_EMULATE=90", allow_module_level=True)

from tests.ptx.families import FAMILIES
from tests.ptx.mutations import HARMLESS, RULES, Outcome, outcomes

SMALL = sorted(FAMILIES.keys() - {"flow_loop"})
"""`make emulate` breaks the loop too, which takes minutes."""
LEAST_NOTICED = 0.3
"""Share of the mutants of a rule of HARMLESS, over all kernels."""
LEAST_NOTICED_ADDRESSES = 0.75
"""Of an address moved on: what is read there may be multiplied by zero, or not stored."""
PLACES = 2
"""Of each rule in each kernel; `python -m tests.ptx.mutations` breaks more."""


@cache
def broken(name: str) -> list[Outcome]:
    return [outcome for outcome in outcomes(FAMILIES[name], PLACES) if outcome.executed]


def least(rule: str) -> float:
    if "bytes on" in rule:
        return LEAST_NOTICED_ADDRESSES
    return LEAST_NOTICED if rule in HARMLESS else 1


@pytest.mark.parametrize("name", SMALL)
def test_every_kernel_can_be_broken(name):
    assert any(outcome.noticed for outcome in broken(name))


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_what_is_broken_is_noticed(rule):
    found = [outcome for name in SMALL for outcome in broken(name) if outcome.rule == rule]
    if not found:
        pytest.skip("no kernel for this chip has such an instruction")
    noticed = sum(outcome.noticed for outcome in found)
    assert noticed >= least(rule) * len(found), Counter(outcome.source for outcome in found if not outcome.noticed)
