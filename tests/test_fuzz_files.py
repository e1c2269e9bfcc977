"""A moment of damaged files; `python -m tests.fuzz_files SECONDS` takes longer, and all formats."""

from __future__ import annotations

import os
import random
from itertools import islice

import numpy as np
import pytest

from tests import file_formats
from tests.damage import damaged
from tests.fuzz_files import MISTAKES, cases, fuzz


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A run has one of its own, which is gone afterwards."""
    monkeypatch.setenv("XR0_CACHE", str(tmp_path))


def test_damage_follows_from_its_number():
    content = b'{"a": [1, 2, {"b": "c"}], "d": 0.5}'
    made = [[damaged(content, "x.json", random.Random(n)) for n in range(50)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 40


def test_every_format_has_its_turn():
    found = list(islice(cases(0, {"a": 3, "b": 1}, {"a": ("x", "y"), "b": ("z",)}), 40))
    assert [sum(case.format == name for case in found) for name in ("a", "b")] == [30, 10]
    assert {case.file for case in found} == {"x", "y", "z"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_damaged_files_are_taken_or_refused(jobs):
    # One seed: a failure here can be repeated.
    counts, mistakes = fuzz(1.5, 0, "statistics", jobs)
    assert not mistakes
    assert counts["statistics"].total() > 10
    assert all(not counts["statistics"][mistake] for mistake in MISTAKES)
    assert counts["statistics"]["refused"] > 0


def test_mistakes_are_counted_and_a_new_process_goes_on(monkeypatch):
    """Of a reader that raises what nobody tells, ends its process, or gives no finite actions."""

    def read(folder):
        content = (folder / "n").read_bytes()
        if content == b"valid":
            return None
        if not content:
            os._exit(3)
        if len(content) % 2:
            raise KeyError("bug")
        return np.array([np.nan])

    known = {"x": file_formats.Format(lambda folder: (folder / "n").write_bytes(b"valid"), read, ("n",))}
    monkeypatch.setattr(file_formats, "formats", lambda: known)
    counts, mistakes = fuzz(3.0, 0, None, 2)
    assert counts["x"]["not finite"] > 0
    assert {mistake["outcome"] for mistake in mistakes} == {"traceback", "not finite"}
    told = " ".join(mistake["detail"] for mistake in mistakes)
    assert "KeyError" in told
    assert "the process ended: 768" in told


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"format: expected one of checkpoint, .*, got 'nonsense'"):
        fuzz(1, 0, "nonsense")
