"""A moment of damaged files; `python -m tests.fuzz_files SECONDS` takes longer, and all formats."""

from __future__ import annotations

import random
from itertools import islice

from tests.damage import damaged
from tests.fuzz_files import MISTAKES, cases, fuzz


def test_damage_follows_from_its_number():
    content = b'{"a": [1, 2, {"b": "c"}], "d": 0.5}'
    made = [[damaged(content, "x.json", random.Random(n)) for n in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 40


def test_every_format_has_its_turn():
    found = list(islice(cases(0, {"a": 3, "b": 1}, {"a": ("x", "y"), "b": ("z",)}), 40))
    assert [sum(case.format == name for case in found) for name in ("a", "b")] == [30, 10]
    assert {case.file for case in found} == {"x", "y", "z"}


def test_damaged_files_are_taken_or_refused():
    # One seed: a failure here can be repeated.
    counts, mistakes = fuzz(1.5, 0, "statistics")
    assert not mistakes
    assert counts["statistics"].total() > 10
    assert all(not counts["statistics"][mistake] for mistake in MISTAKES)
    assert counts["statistics"]["refused"] > 0
