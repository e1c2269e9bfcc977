"""Frames and states of threads of their own: put together what belongs together."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from xr0_engine.executor import Mistimed, SensorsNotReady, Synchronizer
from xr0_engine.robot.decode import ArmPose, BimanualPose

IMAGE = np.zeros((2, 2, 3), np.uint8)


def make_pose(value):
    arm = ArmPose(np.full(3, value), np.eye(3), np.full(6, value), np.array([value]))
    return BimanualPose(arm, arm)


class TestSynchronizer:
    def make(self, **limits):
        return Synchronizer(["ego", "wrist"], "go", "bimanual", **limits)

    def fill(self, sensors, ego=(), wrist=(), states=()):
        for time_s in ego:
            sensors.add_frame("ego", time_s, np.full((2, 2, 3), round(100 * time_s) % 256, np.uint8))
        for time_s in wrist:
            sensors.add_frame("wrist", time_s, np.full((2, 2, 3), round(100 * time_s) % 256, np.uint8))
        for time_s in states:
            sensors.add_state(time_s, make_pose(time_s))

    def test_the_newest_time_that_all_cameras_have_reached(self):
        sensors = self.make()
        self.fill(sensors, [1.00, 1.03, 1.06], [0.98, 1.02], [0.99, 1.00, 1.01, 1.02, 1.03, 1.06])
        snapshot = sensors.observe(1.07)
        assert snapshot.observation.timestamp_s == 1.02
        assert [int(image[0, 0, 0]) for image in snapshot.observation.images.values()] == [103, 102]
        assert snapshot.origin.left.position_m[0] == 1.02
        np.testing.assert_array_equal(snapshot.observation.state, make_pose(1.02).state())

    def test_order_of_arrival_does_not_matter(self):
        rng = np.random.default_rng(0)
        times = np.arange(100, 112) / 100
        ordered, shuffled = self.make(), self.make()
        self.fill(ordered, times, times, times)
        self.fill(shuffled, *(rng.permutation(times) for _ in range(3)))
        assert shuffled.counts["reordered"] > 0
        assert ordered.counts["reordered"] == 0
        a, b = ordered.observe(1.12), shuffled.observe(1.12)
        assert a.observation.timestamp_s == b.observation.timestamp_s == 1.11
        for view in ("ego", "wrist"):
            np.testing.assert_array_equal(a.observation.images[view], b.observation.images[view])

    def test_dropped_frames_are_bridged_until_they_are_stale(self):
        sensors = self.make(max_age_s=0.1)
        self.fill(sensors, [1.0, 1.1, 1.2], [1.0], [1.0, 1.1, 1.2])
        assert sensors.observe(1.09).observation.timestamp_s == 1.0
        with pytest.raises(SensorsNotReady, match=r"wrist is 0\.200 s old"):
            sensors.observe(1.2)

    def test_parts_too_far_apart(self):
        sensors = self.make(max_skew_s=0.02)
        self.fill(sensors, [1.0, 1.1], [1.05], [1.05])
        with pytest.raises(SensorsNotReady, match=r"ego is 0\.050 s from the others"):
            sensors.observe(1.1)
        sensors = self.make(max_skew_s=0.02)
        self.fill(sensors, [1.0], [1.0], [0.9])
        with pytest.raises(SensorsNotReady, match="state"):
            sensors.observe(1.0)

    @pytest.mark.parametrize("missing", ["ego", "wrist", "states"])
    def test_nothing_yet(self, missing):
        sensors = self.make()
        self.fill(sensors, **{name: [1.0] for name in ("ego", "wrist", "states") if name != missing})
        with pytest.raises(SensorsNotReady, match=f"nothing yet from {missing.removesuffix('s')}"):
            sensors.observe(1.0)

    def test_duplicates_and_samples_from_the_future(self):
        sensors = self.make()
        self.fill(sensors, [1.0, 1.0, 900.0], [1.0], [1.0])
        assert sensors.observe(1.0).observation.timestamp_s == 1.0
        assert sensors.counts == {"duplicate": 1, "future": 1}

    @pytest.mark.parametrize(
        ("fill", "complaint"),
        [
            ({"ego": [1.7e9], "wrist": [50.0], "states": [50.0]}, "ego is stamped 1700000000.000 s, .* ahead of"),
            ({"ego": [50.0], "wrist": [50.0], "states": [5e4]}, "state is stamped 50000.000 s, .* ahead of"),
            ({"ego": [50.0], "wrist": [0.05], "states": [50.0]}, "wrist is stamped 0.050 s, 49.9.* s behind"),
        ],
        ids=["time of day", "milliseconds", "milliseconds taken for seconds"],
    )
    def test_a_sensor_on_another_clock_is_told(self, fill, complaint):
        sensors = self.make()
        self.fill(sensors, **fill)
        for _ in range(2):
            with pytest.raises(Mistimed, match=complaint):
                sensors.observe(50.0)

    def test_a_slow_camera_may_be_as_slow_as_allowed(self):
        sensors = self.make(max_age_s=100.0)
        self.fill(sensors, [1.0], [1.0], [1.0])
        assert sensors.observe(50.0).observation.timestamp_s == 1.0

    def test_unknown_view(self):
        with pytest.raises(ValueError, match="view: expected one of ego, wrist, got 'left'"):
            self.make().add_frame("left", 1.0, IMAGE)

    def test_buffers_stay_small_and_threads_may_write(self):
        sensors = self.make()
        threads = [
            threading.Thread(target=lambda view=view: [sensors.add_frame(view, i / 1000, IMAGE) for i in range(2000)])
            for view in ("ego", "wrist")
        ]
        for thread in threads:
            thread.start()
        for i in range(2000):
            sensors.add_state(i / 1000, np.zeros(3))
        for thread in threads:
            thread.join()
        assert sensors.observe(2.0).observation.timestamp_s == 1.999
        assert max(map(len, (*sensors._frames.values(), sensors._states))) <= 400
