"""What is kept is bounded, and the one not used for longest goes first."""

from __future__ import annotations

import pytest

from xr0_engine.model.kept import Kept


def test_least_recently_used_goes_before_the_new_one_is_made():
    events = []
    kept = Kept[str, str](2, drop=lambda value: events.append(f"drop {value}"))

    def get(key: str) -> str:
        return kept.get(key, lambda: events.append(f"make {key}") or key)

    for key in "abacb":
        assert get(key) == key
    assert events == ["make a", "make b", "drop b", "make c", "drop a", "make b"]
    assert len(kept) == 2


def test_what_cannot_be_made_is_not_kept():
    kept = Kept[str, str](1)
    with pytest.raises(ZeroDivisionError):
        kept.get("a", lambda: str(1 / 0))
    assert kept.get("a", lambda: "made") == "made"
