"""Limits of each column."""

from __future__ import annotations

import numpy as np
import pytest

from xr0_engine.executor import BimanualFrame, Limits, PlainFrame
from xr0_engine.executor.limits import Limiter


class TestLimits:
    def limiter(self, frame=None, **bounds):
        frame = frame or PlainFrame(2, ())
        base = {name: np.full(frame.width, np.inf) for name in ("high", "velocity", "jump")}
        base["low"] = -base["high"]
        return Limiter(Limits(**{**base, **bounds}), frame)

    def test_position(self):
        limiter = self.limiter(low=np.array([-1, -np.inf]), high=np.array([1, 2]))
        command, clipped = limiter(np.array([-3.0, -3.0]), 0.0)
        assert (command.tolist(), clipped) == ([-1, -3], ["position"])
        assert limiter(np.array([0.5, 2.0]), 1.0)[1] == []
        assert limiter.clipped == {"position": 1}

    def test_velocity_counts_the_time_since_the_last_command(self):
        limiter = self.limiter(velocity=np.array([1.0, np.inf]))
        limiter(np.array([0.0, 0.0]), 0.0)
        assert limiter(np.array([9.0, 9.0]), 0.1)[0] == pytest.approx([0.1, 9])
        assert limiter(np.array([9.0, 9.0]), 0.6)[0] == pytest.approx([0.6, 9])
        assert limiter.clipped == {"velocity": 2}

    def test_jump_does_not(self):
        limiter = self.limiter(jump=np.array([0.2, np.inf]))
        limiter(np.array([0.0, 0.0]), 0.0)
        assert limiter(np.array([-9.0, 9.0]), 60.0)[0] == pytest.approx([-0.2, 9])
        assert limiter.clipped == {"jump": 1}

    def test_first_command_is_measured_from_where_the_robot_stands(self):
        limiter = self.limiter(velocity=np.array([1.0, 1.0]))
        limiter.start(np.array([5.0, 5.0]), 0.0)
        assert limiter(np.array([0.0, 5.0]), 0.1)[0] == pytest.approx([4.9, 5])

    def test_after_a_clock_jump_one_period_has_passed(self):
        limiter = self.limiter(velocity=np.array([1.0, 1.0]))
        limiter(np.array([0.0, 0.0]), 1000.0)
        limiter.clock_jumped(5.0)
        assert limiter(np.array([9.0, 0.0]), 5.1)[0] == pytest.approx([0.1, 0])

    def test_rotations_turn_no_faster_than_allowed(self):
        frame = BimanualFrame()
        limiter = self.limiter(frame, velocity=np.full(32, 1.0))
        row = np.zeros(32)
        row[5] = 3.1
        limiter(row, 0.0)
        # The short way to -3.1 leads over pi.
        command, _ = limiter(-row, 0.05)
        np.testing.assert_allclose(frame.difference(command, row)[5], 0.05, atol=1e-9)

    @pytest.mark.parametrize(
        ("bounds", "complaint"),
        [
            ({"low": np.zeros(3)}, "high"),
            ({"high": np.array([np.nan, 0])}, "high"),
            ({"low": np.array([1.0, 0]), "high": np.zeros(2)}, "low"),
            ({"velocity": np.array([1.0, 0])}, "velocity"),
            ({"jump": np.array([-1.0, 1])}, "jump"),
        ],
        ids=["shape", "nan", "low above high", "no velocity", "negative jump"],
    )
    def test_wrong_limits(self, bounds, complaint):
        with pytest.raises(ValueError, match=complaint):
            self.limiter(**bounds)

    def test_limits_of_another_width(self):
        with pytest.raises(ValueError, match="2 columns, got 3"):
            Limiter(Limits.none(3), PlainFrame(2, ()))

    @pytest.mark.parametrize("bound", ["velocity", "jump"])
    def test_what_has_two_values_moves_at_once_or_not(self, bound):
        frame = PlainFrame(2, (), [1])
        with pytest.raises(ValueError, match=f"no {bound} limit on a column of held_columns"):
            self.limiter(frame, **{bound: np.array([1.0, 1.0])})
        limiter = self.limiter(frame, **{bound: np.array([1.0, np.inf])})
        limiter(np.array([0.0, -1.0]), 0.0)
        assert limiter(np.array([0.0, 1.0]), 0.01)[0].tolist() == [0.0, 1.0]

    def test_rotations_have_no_range(self):
        with pytest.raises(ValueError, match="rotation"):
            self.limiter(BimanualFrame(), high=np.ones(32))
