"""The actions to come: which chunk gives which step, and what follows when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from xr0_engine.executor import BimanualFrame, PlainFrame
from xr0_engine.executor.timeline import Timeline, coast
from xr0_engine.robot.decode import BIMANUAL_COLUMNS

# The matrix of a turn near pi fixes its axis to the rounding of its entries, 1e-16, times pi, some compositions later.
FLOAT64 = 1e-11


class TestTimeline:
    def rows(self, value, length=6):
        return np.full((length, 1), float(value))

    def test_first_chunk(self):
        timeline = Timeline()
        placement = timeline.place(self.rows(1), first=10, prefix=0, step=10, chunk=1)
        assert (placement.takeover, placement.planned, placement.late) == (10, 6, 0)
        assert [timeline.take(step).index for step in range(10, 16)] == list(range(6))
        assert timeline.take(16) is None
        assert timeline.end is None

    @pytest.mark.parametrize(
        ("first", "prefix", "step", "takeover", "committed", "late", "replaced"),
        [
            pytest.param(12, 3, 14, 15, 3, 0, 1, id="in time: after the prefix"),
            pytest.param(12, 3, 15, 15, 3, 0, 1, id="just in time"),
            pytest.param(12, 0, 14, 14, 0, 2, 2, id="no prefix: two too late"),
            pytest.param(12, 1, 14, 14, 1, 1, 2, id="prefix too short"),
            pytest.param(12, 3, 18, None, 3, 3, 0, id="all too late"),
            pytest.param(12, 6, 13, 16, 4, 0, 0, id="prefix longer than the plan: it gives the rest itself"),
            pytest.param(14, 0, 12, 14, 0, 0, 2, id="observation of a later step"),
        ],
    )
    def test_takeover(self, first, prefix, step, takeover, committed, late, replaced):
        timeline = Timeline()
        timeline.place(self.rows(1), first=10, prefix=0, step=10, chunk=1)
        for executed in range(10, min(step, 16)):
            timeline.take(executed)
        placement = timeline.place(self.rows(2), first, prefix, step, chunk=2)
        assert (placement.takeover, placement.committed, placement.late, placement.replaced) == (
            takeover,
            committed,
            late,
            replaced,
        )
        assert placement.committed + placement.late + placement.planned == 6
        if takeover is not None:
            assert timeline.take(takeover).index == takeover - first
            assert all(timeline.peek(old).chunk == 1 for old in range(step, min(takeover, 16)))

    def test_what_was_told(self):
        timeline = Timeline()
        assert timeline.began is None
        timeline.executed(5, np.array([1.0]))
        timeline.executed(8, np.array([2.0]))
        assert timeline.began == 5
        assert [timeline.in_force(step)[0] for step in (4, 5, 7, 8, 30)] == [1, 1, 1, 2, 2]

    def test_passed_actions_are_returned(self):
        timeline = Timeline()
        timeline.place(self.rows(1), first=0, prefix=0, step=0, chunk=1)
        assert timeline.drop_before(4) == 4
        assert len(timeline) == 2
        assert timeline.clear() == 2


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_coasting(keep):
    plain = PlainFrame(3, [0])
    after = coast(plain, np.array([2.0, 5.0, 7.0]), np.array([1.0, 4.0, 7.0]), keep)
    assert after.tolist() == [2 * keep, 5 + keep, 7]
    rng = np.random.default_rng(4)
    row, before = rng.normal(size=(2, BIMANUAL_COLUMNS))
    frame = BimanualFrame()
    moved = frame.difference(coast(frame, row, before, keep), row)
    np.testing.assert_allclose(moved, keep * frame.difference(row, before), atol=FLOAT64)
