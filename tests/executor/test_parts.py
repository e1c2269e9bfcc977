"""The executor's parts alone: delay, timeline, limits, settings, sensors, report, session."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from tests.executor.support import execute
from xr0_engine.executor import (
    BimanualFrame,
    Limits,
    PlainFrame,
    Recorder,
    SensorsNotReady,
    Settings,
    Synchronizer,
    SystemClock,
    read_session,
)
from xr0_engine.executor.delay import DelayEstimator, delay_steps
from xr0_engine.executor.limits import Limiter
from xr0_engine.executor.report import BINS_PER_DECADE, COUNTS, Histogram
from xr0_engine.executor.timeline import Timeline
from xr0_engine.robot.decode import ArmPose, BimanualPose, bimanual_state

IMAGE = np.zeros((2, 2, 3), np.uint8)
HEADER = '{"kind": "session", "version": 1, "title": "", "settings": {}, "layout": "plain", "width": 3}\n'


class TestDelay:
    @pytest.mark.parametrize(
        ("delay_s", "rate_hz", "steps"),
        [(0.08, 30, 3), (0.1, 30, 3), (3 / 30, 30, 3), (0.0, 30, 0), (0.101, 30, 4), (0.08, 200, 16)],
    )
    def test_steps_are_rounded_up(self, delay_s, rate_hz, steps):
        assert delay_steps(delay_s, rate_hz) == steps

    def test_warm_up_is_left_out(self):
        delay = DelayEstimator()
        delay.add(12.0)
        assert delay.seconds is None
        delay.add(0.1)
        assert delay.seconds == 0.1

    def test_outliers_are_left_out_but_the_longest_usual_delay_counts(self):
        delay = DelayEstimator(expected_s=1.0)
        for seconds in [5.0, 0.1, 0.12, 0.09, 2.0, 0.1]:
            delay.add(seconds)
        assert delay.seconds == 0.12

    def test_a_lasting_change_is_believed(self):
        delay = DelayEstimator()
        for seconds in [1.0] + [0.1] * 20 + [0.5] * 11:
            delay.add(seconds)
        assert delay.seconds == 0.5

    def test_what_is_expected_counts_until_it_is_measured(self):
        delay = DelayEstimator(expected_s=0.07)
        assert delay.steps(30) == 3
        delay.add(1.0)
        assert delay.seconds == 0.07
        delay.add(0.2)
        assert delay.seconds == 0.2
        assert DelayEstimator().steps(30) is None


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

    def test_rotations_have_no_range(self):
        with pytest.raises(ValueError, match="rotation"):
            self.limiter(BimanualFrame(), high=np.ones(32))


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
        np.testing.assert_array_equal(snapshot.observation.state, bimanual_state(make_pose(1.02)))

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


class TestHistogram:
    def test_percentiles_are_exact_to_a_bin(self):
        histogram = Histogram()
        times = np.random.default_rng(0).exponential(2e-3, 10_000)
        for time_s in times:
            histogram.add(time_s)
        for percent in (50, 99, 99.9):
            exact = np.percentile(times, percent)
            assert exact <= histogram.percentile_s(percent) * 1.001 <= exact * 10 ** (1 / BINS_PER_DECADE) * 1.01
        assert histogram.maximum_s == times.max()
        assert sum(histogram.to_json()["bins_ms"].values()) == 10_000

    @pytest.mark.parametrize("time_s", [0.0, -1e-9, 1e9], ids=["zero", "negative", "huge"])
    def test_extremes_have_a_bin(self, time_s):
        histogram = Histogram()
        histogram.add(time_s)
        assert histogram.count == 1
        assert Histogram().percentile_s(99) == 0


class TestSession:
    def test_a_session_is_read_back(self, tmp_path):
        path = tmp_path / "run.jsonl"
        with Recorder(path, "a test") as recorder:
            report, robot, policy = execute(recorder=recorder)
        session = read_session(path)
        lines = session.lines
        assert session.header["title"] == "a test"
        assert len(lines["chunk"]) == report.counts["chunks"]
        assert len(lines["inference"]) == report.counts["inferences"] == len(policy.calls)
        np.testing.assert_array_equal([line["row"] for line in lines["step"]], robot.rows)
        assert [line["step"] for line in lines["step"]] == robot.steps.tolist()
        assert lines["report"][0]["counts"] == dict(report.counts)
        assert set(COUNTS) <= set(report.counts)

    def test_a_crash_leaves_all_but_the_end(self, tmp_path):
        path = tmp_path / "run.jsonl"
        with Recorder(path, "") as recorder:
            execute(recorder=recorder)
        whole = read_session(path)
        path.write_text(path.read_text() + '{"kind": "step", "st')
        assert read_session(path) == whole

    def test_nothing_is_overwritten(self, tmp_path):
        path = tmp_path / "run.jsonl"
        path.write_text("precious")
        with pytest.raises(FileExistsError):
            Recorder(path, "")
        assert path.read_text() == "precious"

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "empty"),
            ('{"kind": "session", "version": 99}\n', "version 1"),
            ('{"a": 1}\n', "version 1"),
            ("[1]\n", "object"),
            ('{"kind": "session", "version": 1}\n', "line 1: session lacks layout, settings, title, width"),
            (HEADER + '{"kind": "dance"}\n', "line 2: expected one of"),
            (HEADER + '{"kind": "clock"}\n', "line 2: clock lacks time_s"),
            (HEADER + "nonsense\n", "line 2: not valid JSON"),
        ],
        ids=["empty", "version", "no session", "list", "header", "kind", "field", "json"],
    )
    def test_other_files_are_refused(self, tmp_path, text, complaint):
        path = tmp_path / "run.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            read_session(path)


def test_system_clock_sleeps_at_least_so_long():
    clock = SystemClock()
    due = clock.now() + 0.02
    clock.sleep_until(due)
    assert clock.now() >= due
    clock.sleep_until(due)


def test_report_is_json():
    report, _, _ = execute()
    assert json.loads(json.dumps(report.to_json()))["ended"] == "time"
