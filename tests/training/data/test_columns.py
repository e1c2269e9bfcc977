"""What the columns of a dataset hold: steps, targets, two values, angles that wrap; at the robot's rate."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.data.fixtures import write_video
from xr0_engine.robot.decode import LEFT, RIGHT
from xr0_engine.training.data.columns import Timing, motion_of
from xr0_engine.training.data.description import describe
from xr0_engine.training.data.motion import resampled_ticks
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source

# Sums and differences of float64 numbers of about 1.
EXACT = 1e-9
# Columns of a parquet file are float32.
FLOAT32 = 1e-5
RATES = [(30, 10), (10, 20), (30, 20), (50, 30), (24, 30), (30, 30)]
VIDEO = "observation.images.front"


def write_profile(folder, rate_hz=30, layout="plain", **more):
    views = [{"key": "base", "title": "Base View"}]
    profile = {
        "name": "arm",
        "robot_types": ["arm"],
        "layout": layout,
        "control_rate_hz": rate_hz,
        "replan_every": None,
    }
    (folder / "arm.yaml").write_text(yaml.safe_dump({**profile, "views": views, **more}))


def described(folder, action, rate_hz=30, **profile):
    write_profile(folder, rate_hz, **profile)
    facts = {
        "robot_type": "arm",
        "embodiment": "arm.yaml",
        "views": {"base": VIDEO},
        "state": [{"columns": "0:2", "from": "observation.state"}],
        "action": action,
    }
    (folder / "xr0.yaml").write_text(yaml.safe_dump(facts))
    return describe(folder / "xr0.yaml")


def motion(description, action, state=None, fps=30):
    """action, state: (N, k), the features of those names."""
    features = {"action": action, "observation.state": np.zeros((len(action), 2)) if state is None else state}

    def pick(selector):
        values = features[selector.feature]
        return values[:, selector.columns([], values.shape[1])].astype(np.float64)

    rate_hz = description.embodiment.control_rate_hz
    ticks = resampled_ticks(len(action), fps, rate_hz)
    return motion_of(description, pick, Timing(ticks, np.arange(len(action)) / fps, fps, rate_hz))


@pytest.mark.parametrize(("fps", "rate_hz"), RATES, ids=str)
def test_steps_add_up_to_the_recorded_motion(tmp_path, fps, rate_hz):
    rng = np.random.default_rng(fps)
    steps = rng.normal(size=(2 * fps + 1, 2))
    description = described(tmp_path, [{"columns": "0:2", "from": "action", "kind": "step"}], rate_hz)
    made = motion(description, steps, fps=fps).actions(0, 2 * rate_hz)[:, :2]
    # After every tick that is at a row's time, the robot is where it was.
    place = np.vstack([np.zeros(2), np.cumsum(steps, axis=0)])
    reached = np.vstack([np.zeros(2), np.cumsum(made, axis=0)])
    for second in (0.5, 1.0, 2.0):
        row, tick = second * fps, second * rate_hz
        if row == int(row) and tick == int(tick):
            np.testing.assert_allclose(reached[int(tick)], place[int(row)], atol=EXACT)


def test_no_tick_takes_more_than_its_share(tmp_path):
    description = described(tmp_path, [{"columns": "0:2", "from": "action", "kind": "step"}], 50)
    made = motion(description, np.full((31, 2), 0.05), fps=30).actions(0, 50)[:, 0]
    np.testing.assert_allclose(made, 0.05 * 30 / 50, atol=EXACT)


def test_steps_stay_as_they_are_beside_rows_that_are_missing(tmp_path):
    description = described(tmp_path, [{"columns": "0:2", "from": "action", "kind": "step"}])
    times_s = np.delete(np.arange(21), [8, 9]) / 30
    steps = np.random.default_rng(0).normal(size=(19, 2))
    made = motion_of(description, lambda selector: steps, Timing(np.arange(19), times_s, 30, 30))
    np.testing.assert_array_equal(made.actions(0, 19)[:, :2], steps)


def test_targets_and_two_values_are_taken_nearest(tmp_path):
    entries = [
        {"columns": 0, "from": "action[0]", "kind": "absolute"},
        {"columns": 6, "from": "action[1]", "kind": "two_valued"},
    ]
    rows = np.stack([np.arange(21.0), np.where(np.arange(21) % 5 < 2, 1.0, -1.0)], axis=1)
    actions = motion(described(tmp_path, entries, 45), rows).actions(0, 31)
    nearest = resampled_ticks(21, 30, 45)
    np.testing.assert_array_equal(actions[:, 0], rows[nearest, 0])
    np.testing.assert_array_equal(actions[:, 6], rows[nearest, 1])
    assert set(actions[:, 6]) == {1.0, -1.0}


@pytest.mark.parametrize("unit", [2 * np.pi, 360.0], ids=["radians", "degrees"])
@pytest.mark.parametrize("anchored", [False, True], ids=["absolute", "minus"])
def test_an_angle_that_wraps_goes_on_from_the_observation(tmp_path, unit, anchored):
    turns = np.linspace(0, 2.3, 90)
    wrapped = unit * (np.mod(turns + 0.5, 1) - 0.5)
    measured = unit * (np.mod(turns - 0.02 + 0.5, 1) - 0.5)
    entry = {"columns": 0, "from": "action[0]", "kind": "periodic", "period": float(unit)}
    entry |= {"minus": "observation.state[0]"} if anchored else {}
    description = described(tmp_path, [entry], 15)
    path = motion(description, np.stack([wrapped] * 2, 1), np.stack([measured] * 2, 1))
    rows = resampled_ticks(90, 30, 15)
    for tick in range(len(path) - 12):
        targets = path.actions(tick, 12)[:, 0]
        np.testing.assert_allclose(
            targets - targets[0], unit * (turns[rows[tick : tick + 12]] - turns[rows[tick]]), atol=1e-6
        )
        assert targets[0] == pytest.approx(0.02 * unit if anchored else wrapped[rows[tick]], abs=1e-6)
        # The state is what the robot reports.
        assert path.state(tick)[0, 0] == np.float32(measured[rows[tick]])


def test_joints_of_an_arm_may_wrap(tmp_path):
    turns = np.linspace(0.3, 1.4, 40)
    joints = np.pi * (2 * np.mod(turns[:, None] + np.zeros(6) + 0.5, 1) - 1)
    measured = np.pi * (2 * np.mod(turns[:, None] - 0.01 + np.zeros(6) + 0.5, 1) - 1)
    write_profile(tmp_path, layout="bimanual")
    part = {"state": "observation.state", "action": "action", "kind": "periodic"}
    facts = {"robot_type": "arm", "embodiment": "arm.yaml", "arms": {"right": {"joints": part}}}
    (tmp_path / "xr0.yaml").write_text(yaml.safe_dump(facts))
    path = motion(describe(tmp_path / "xr0.yaml"), joints, measured)
    for tick in range(30):
        actions = path.actions(tick, 10)
        moved = 2 * np.pi * (turns[tick : tick + 10] - turns[tick] + 0.01)
        np.testing.assert_allclose(actions[:, RIGHT.joints], np.stack([moved] * 6, 1), atol=EXACT)
        assert not actions[:, LEFT.joints].any()
        assert path.state(tick)[0, RIGHT.joints] == pytest.approx(measured[tick])


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        pytest.param({"kind": "two_valued"}, r"action\[0\], column 0: kind two_valued: .*got 40", id="more than two"),
        pytest.param({"kind": "periodic"}, r"one period of 6.28319, got -180 to 180: .*360 for degrees", id="degrees"),
    ],
)
def test_values_that_are_not_of_their_kind(tmp_path, entry, complaint):
    values = np.stack([np.linspace(-180, 180, 40)] * 2, 1)
    with pytest.raises(DataError, match=complaint):
        motion(described(tmp_path, [{"columns": "0:2", "from": "action", **entry}]), values)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"kind": "delta"}, r"action\[0\].kind: expected one of absolute, step, two_valued, periodic, got 'delta'"),
        ({"kind": None}, r"action\[0\].kind: expected one of"),
        ({"kind": "step", "minus": "observation.state"}, r"action\[0\].minus: expected none beside `kind: step`"),
        ({"kind": "two_valued", "minus": "observation.state"}, "none beside `kind: two_valued`"),
        ({"period": 360}, r"action\[0\].period: expected only beside `kind: periodic`"),
        ({"kind": "periodic", "period": 0}, r"action\[0\].period: expected a number above 0, got 0"),
        ({"kind": "periodic", "period": "360"}, "period: expected a number above 0, got '360'"),
    ],
    ids=["unknown", "null", "step and minus", "two values and minus", "period alone", "no period", "text"],
)
def test_wrong_kinds_are_refused(tmp_path, entry, complaint):
    with pytest.raises(DataError, match=complaint):
        described(tmp_path, [{"columns": "0:2", "from": "action", **entry}])


@pytest.mark.parametrize("kind", ["step", "two_valued"])
def test_arms_hold_targets(tmp_path, kind):
    write_profile(tmp_path, layout="bimanual")
    part = {"state": "observation.state", "action": "action", "kind": kind}
    facts = {"robot_type": "arm", "embodiment": "arm.yaml", "arms": {"left": {"joints": part}}}
    (tmp_path / "xr0.yaml").write_text(yaml.safe_dump(facts))
    with pytest.raises(DataError, match=r"arms.left.joints.kind: expected one of absolute, periodic"):
        describe(tmp_path / "xr0.yaml")


class TestProfile:
    """What a profile says of its columns need not be said again, and may not be contradicted."""

    STEPS = ([0, 1], [6])

    def described(self, folder, entry, steps, two_valued):
        columns = {"step_columns": steps, "two_valued_columns": two_valued}
        return described(folder, [{"from": "action", **entry}], **{k: v for k, v in columns.items() if v is not None})

    def test_is_asked_where_the_dataset_does_not_say(self, tmp_path):
        description = self.described(tmp_path, {"columns": "0:8"}, *self.STEPS)
        kinds = [description.kind(description.action[0], column) for column in range(8)]
        assert kinds == ["step", "step", "absolute", "absolute", "absolute", "absolute", "two_valued", "absolute"]
        description = self.described(tmp_path, {"columns": "0:8"}, None, [6])
        kinds = [description.kind(description.action[0], column) for column in range(8)]
        assert kinds == [None] * 6 + ["two_valued", None]

    @pytest.mark.parametrize(
        ("entry", "column"),
        [
            ({"columns": "0:2", "kind": "absolute"}, 0),
            ({"columns": "1:3", "kind": "step"}, 2),
            ({"columns": 6, "kind": "periodic"}, 6),
            ({"columns": "6:8", "kind": "two_valued"}, 7),
        ],
        ids=["a step called a target", "a target called a step", "two values called an angle", "an angle called two"],
    )
    def test_is_not_contradicted(self, tmp_path, entry, column):
        match = (
            rf"action\[0\].kind: {entry['kind']} for column {column}, but embodiment 'arm' says step_columns \(0, 1\)"
        )
        with pytest.raises(DataError, match=match):
            self.described(tmp_path, entry, *self.STEPS)
        self.described(tmp_path, entry, None, None)

    @pytest.mark.parametrize("entry", [{"columns": 6, "kind": "absolute"}, {"columns": 2, "kind": "periodic"}], ids=str)
    def test_agrees_with_what_it_does_not_exclude(self, tmp_path, entry):
        assert self.described(tmp_path, entry, *self.STEPS).action[0].kind == entry["kind"]

    def test_of_steps_is_told_of_a_minus(self, tmp_path, caplog):
        self.described(tmp_path, {"columns": "0:2", "minus": "observation.state"}, *self.STEPS)
        assert "action[0]: `minus` beside column 0" in caplog.text


def write_dataset(folder, fps, steps):
    """One episode of a robot whose actions are its steps."""
    count = len(steps)
    lists = {
        name: pa.array(values.astype(np.float32).tolist(), pa.list_(pa.float32()))
        for name, values in (("observation.state", np.cumsum(steps, axis=0) - steps), ("action", steps))
    }
    numbers = np.arange(count)
    times = {"timestamp": (numbers / fps).astype(np.float32), "frame_index": numbers, "index": numbers}
    table = pa.table({**lists, **times, "episode_index": np.zeros(count, int), "task_index": np.zeros(count, int)})
    path = folder / "data/chunk-000/episode_000000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table, path)
    write_video(folder / f"videos/chunk-000/{VIDEO}/episode_000000.mp4", range(count), fps)
    column = {"dtype": "float32", "shape": [2], "names": None}
    video = {"dtype": "video", "shape": [32, 80, 3], "names": ["height", "width", "channels"]}
    info = {
        "codebase_version": "v2.1",
        "fps": fps,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {"observation.state": column, "action": column, VIDEO: video},
    }
    (folder / "meta").mkdir()
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text(json.dumps({"episode_index": 0, "tasks": ["Go."], "length": count}))
    (folder / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "Go."}))


@pytest.mark.parametrize("said_by", ["the dataset", "the profile"])
def test_a_dataset_of_steps_at_another_rate(tmp_path, said_by):
    write_dataset(tmp_path, 30, np.full((61, 2), 0.01))
    kind = {"kind": "step"} if said_by == "the dataset" else {}
    profile = {} if kind else {"step_columns": [0, 1]}
    described(tmp_path, [{"columns": "0:2", "from": "action", **kind}], 10, **profile)
    path = open_source(tmp_path).load(0).motion
    moved = path.state(len(path) - 1) - path.state(0)
    np.testing.assert_allclose(path.actions(0, len(path) - 1)[:, :2].sum(axis=0), moved[0, :2], atol=FLOAT32)


@pytest.mark.parametrize(
    ("entries", "column"),
    [
        ([{"columns": "0:2", "from": "action"}], 0),
        ([{"columns": 0, "from": "action[0]", "kind": "step"}, {"columns": 6, "from": "action[1]"}], 6),
    ],
    ids=["all", "one of them"],
)
def test_columns_of_no_kind_are_refused_at_another_rate(tmp_path, entries, column):
    write_dataset(tmp_path, 30, np.full((5, 2), 0.01))
    described(tmp_path, entries, 10)
    with pytest.raises(DataError, match=rf"30 Hz, and embodiment 'arm' acts at 10 Hz: column {column} needs a `kind`"):
        open_source(tmp_path)
    described(tmp_path, entries, 30)
    assert len(open_source(tmp_path).load(0).motion) == 5


def test_anchored_targets_need_no_kind(tmp_path):
    write_dataset(tmp_path, 30, np.full((5, 2), 0.01))
    described(tmp_path, [{"columns": "0:2", "from": "action", "minus": "observation.state"}], 15)
    assert open_source(tmp_path).lengths == [3]
