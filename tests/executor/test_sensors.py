"""Frames and states of threads of their own: put together what belongs together."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from xr0_engine.executor import Mistimed, SensorsNotReady, Synchronizer
from xr0_engine.robot.decode import ArmPose, BimanualPose
from xr0_engine.types import RobotInfo

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


VIDEOS = RobotInfo(16, 20, 16, ("ego", "wrist"), "plain", history=(4, 2), state_length=4)


class TestVideos:
    """Four frames two control steps apart, at 20 Hz: of 0.3, 0.2, 0.1 and 0 s before."""

    def sensors(self, hz, until_s, since_s=0.0, **limits):
        sensors = Synchronizer(["ego", "wrist"], "go", None, robot=VIDEOS, **limits)
        for tick in range(round(since_s * hz), round(until_s * hz) + 1):
            for view in ("ego", "wrist"):
                sensors.add_frame(view, tick / hz, np.full((2, 2, 3), tick % 256, np.uint8))
            sensors.add_state(tick / hz, np.array([tick, 0.0], np.float32))
        return sensors

    @pytest.mark.parametrize("hz", [20, 60, 240])
    def test_the_frames_of_the_released_rule_at_any_rate_of_the_camera(self, hz):
        observation = self.sensors(hz, until_s=5).observe(5.0).observation
        expected = [round(5 * hz - age * hz / 10) for age in (3, 2, 1, 0)]
        for view in ("ego", "wrist"):
            assert observation.images[view].shape == (4, 2, 2, 3)
            assert observation.images[view][:, 0, 0, 0].tolist() == [tick % 256 for tick in expected]
        assert observation.state[:, 0].tolist() == expected

    def test_the_oldest_is_repeated_where_the_episode_is_younger(self):
        observation = self.sensors(20, until_s=10.15, since_s=10).observe(10.15).observation
        assert observation.images["ego"][:, 0, 0, 0].tolist() == [200, 200, 201, 203]
        assert observation.state[:, 0].tolist() == [200, 200, 201, 203]

    def test_a_reset_begins_an_episode(self):
        sensors = self.sensors(20, until_s=5)
        sensors.reset("Open the drawer.")
        with pytest.raises(SensorsNotReady, match="nothing yet from ego, wrist, state"):
            sensors.observe(5.0)
        for view in ("ego", "wrist"):
            sensors.add_frame(view, 5.05, IMAGE + 7)
        sensors.add_state(5.05, np.zeros(2, np.float32))
        observation = sensors.observe(5.05).observation
        assert (observation.images["ego"] == 7).all()
        assert observation.instruction == "Open the drawer."

    def test_frames_that_are_missing_in_between_are_refused(self):
        sensors = Synchronizer(["ego"], "go", None, max_skew_s=0.02, robot=replace(VIDEOS, state_length=None))
        for time_s in (0.6, 0.7, 0.9, 1.0, 1.1):
            sensors.add_frame("ego", time_s, IMAGE)
            sensors.add_state(time_s, np.zeros(2, np.float32))
        with pytest.raises(
            SensorsNotReady, match=r"ego has nothing of 0\.300 s before; the nearest is 0\.100 s from it"
        ):
            sensors.observe(1.1)

    def test_what_was_dropped_is_not_repeated(self):
        """A stamp of another clock has pushed out what videos reach back to: the oldest is not the episode's first."""
        sensors = self.sensors(240, until_s=5)
        sensors.add_frame("wrist", 100.0, IMAGE)
        with pytest.raises(SensorsNotReady, match=r"wrist has nothing of 0\.300 s before; the nearest is 0\.183 s"):
            sensors.observe(5.0)

    def test_poses_give_their_states(self):
        sensors = Synchronizer(["ego"], "go", None, robot=replace(VIDEOS, views=("ego",), state_length=2))
        for tick in range(20):
            sensors.add_frame("ego", tick / 20, IMAGE)
            sensors.add_state(tick / 20, make_pose(tick))
        snapshot = sensors.observe(0.95)
        expected = np.concatenate([make_pose(17).state(), make_pose(19).state()])
        np.testing.assert_array_equal(snapshot.observation.state, expected)
        assert snapshot.origin.left.position_m[0] == 19
