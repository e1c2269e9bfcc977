"""A moment of fuzzing the readers of bytes; `make fuzz` takes longer."""

from __future__ import annotations

import numpy as np

from tests.serve.fuzz import fuzz, targets


def test_valid_messages_are_read():
    for reader, valid in targets().values():
        for message in valid:
            assert reader(message) is not None


def test_damaged_messages_break_nothing():
    # One seed: a failure here can be repeated.
    counts = fuzz(seconds=2.0, seed=0)
    assert np.all(np.array(list(counts.values())) > 50)
