"""Settings: every wrong one names its field."""

from __future__ import annotations

import pytest

from xr0_engine.executor import Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "fast"),
        ("starvation", "panic"),
        ("rate_hz", 0.0),
        ("rate_hz", float("nan")),
        ("rate_hz", 2000.0),
        ("commands_per_action", 0),
        ("commands_per_action", 50),
        ("trigger", 0),
        ("trigger", "soon"),
        ("execute", 0),
        ("margin", -1),
        ("max_prefix", 1.5),
        ("expected_delay_s", -0.1),
        ("expected_delay_s", float("inf")),
        ("hang_s", 0.0),
        ("retry_s", -1.0),
    ],
)
def test_wrong_settings_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        Settings(**{"rate_hz": 30.0, field: value})


def test_async_needs_a_policy_that_knows_prefixes():
    with pytest.raises(ValueError, match="mode: async needs a policy trained with prefixes"):
        Settings(30.0, max_prefix=0)
    for mode in ("sync", "naive_async"):
        Settings(30.0, mode, max_prefix=0)


def test_delay_that_needs_a_longer_prefix_than_trained_is_refused():
    with pytest.raises(ValueError, match=r"prefix of 7 actions.*at most 6"):
        Settings(rate_hz=30, expected_delay_s=0.2, margin=1)
    Settings(rate_hz=30, expected_delay_s=0.2, margin=0)
    Settings(rate_hz=30, expected_delay_s=0.2, margin=1, mode="naive_async")
