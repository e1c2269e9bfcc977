"""A layout that the package does not know: an object and its entry in LAYOUTS are enough for everything else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.executor.support import make_chunk
from xr0_engine.drive.picture import _names, plot_recording
from xr0_engine.drive.policies import Source, from_server
from xr0_engine.drive.run import run
from xr0_engine.executor import Recorder, Settings, read_recording
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.layouts import LAYOUTS, Column, Frame, Layout
from xr0_engine.serve.client import Client
from xr0_engine.serve.monitor import Monitor
from xr0_engine.serve.protocol import PolicyMetadata, RobotInfo
from xr0_engine.training.data.description import describe
from xr0_engine.training.data.samples import DataError
from xr0_engine.types import Observation

PROFILE = """
name: crane
robot_types: [crane_v1]
layout: rail
control_rate_hz: 10
replan_every: null
views: [{key: base, title: Base View}]
"""


@dataclass(frozen=True)
class Place:
    """A trolley on a rail."""

    metres: float

    def state(self):
        return np.array([[self.metres]], np.float32)


class RailFrame(Frame):
    """Column 0 is anchored at the observation's place; column 2, the hook's speed, is not. Column 1 is reserved."""

    def __init__(self):
        super().__init__("rail", 3, delta=[2])

    def absolute(self, actions, origin):
        return super().absolute(actions, origin) + np.array([origin.metres, 0, 0])

    def anchored(self, rows, origin):
        return super().anchored(rows - np.array([origin.metres, 0, 0]), origin)


RAIL = Layout(
    "rail",
    lambda width: RailFrame(),
    described_by=("state", "action"),
    columns=(Column(0, "trolley", "along", "m", "trolley x"), Column(2, "hook", "", "m/s", "hook speed")),
    rest=Place(4.0),
)


class RailPolicy:
    """A metre ahead of where the robot is; the prefix it was given comes first."""

    def __init__(self):
        self.prefixes = []

    def infer(self, observation, prefix=None):
        assert observation.state.tolist() == [[4.0]]
        self.prefixes.append(prefix)
        return make_chunk(np.tile([1.0, 0.0, 0.5], (20, 1)), prefix)


@pytest.fixture
def embodiment(tmp_path, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "rail", RAIL)
    path = tmp_path / "crane.yaml"
    path.write_text(PROFILE, encoding="utf-8")
    return load_embodiment(path)


@pytest.fixture
def recording(embodiment, tmp_path):
    """What the executor makes of the null robot of that layout, and the policy that it asked."""
    policy = RailPolicy()
    views = tuple(view.key for view in embodiment.views)
    source = Source(policy, "a crane", "crane_v1", embodiment.control_rate_hz, views, embodiment.action_layout, 3, 1, 6)
    with Recorder(tmp_path / "run.jsonl", source.title) as recorder:
        run(source, Settings(embodiment.control_rate_hz), 4.0, False, 2, 0, recorder)
    return read_recording(tmp_path / "run.jsonl"), policy


def test_profile_says_its_layout(embodiment):
    assert (embodiment.layout, embodiment.action_layout) == ("rail", RAIL)


def test_executor_commands_it(recording):
    recording, policy = recording
    assert (recording.header["layout"], recording.header["width"]) == ("rail", 3)
    assert {tuple(line["row"]) for line in recording.lines["step"]} == {(5.0, 0.0, 0.5)}
    # Into the frame of a new observation and back.
    assert {tuple(action) for prefix in policy.prefixes[1:] for action in prefix} == {(1.0, 0.0, 0.5)}
    counts = recording.lines["report"][-1]["counts"]
    assert counts["chunks"] >= 2
    assert counts["rejected"] == counts["failed"] == 0


def test_picture_has_its_names(recording, tmp_path):
    assert _names(RAIL, 3) == ["trolley along\n(m)", "column 1", "hook\n(m/s)"]
    plot_recording(recording[0], tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0


def test_status_page_has_its_names(embodiment):
    monitor = Monitor()
    chunk = replace(make_chunk(np.zeros((20, 3))), robot_type="crane_v1")
    timing_ms = {"total_ms": 1.0, "infer_ms": 1.0, "queue_ms": 0.0}
    observation = Observation({}, "go", np.zeros((1, 1), np.float32), "crane_v1")
    monitor.answered(monitor.connected("here"), observation, chunk, timing_ms)
    robots = {"crane_v1": RobotInfo(20, 10.0, None, ("base",), embodiment.layout)}
    assert monitor.snapshot(robots)["latest"]["names"] == ["trolley x", "column 1", "hook speed"]


def test_dataset_is_described_by_its_fields(embodiment, tmp_path):
    path = tmp_path / "xr0.yaml"
    path.write_text("robot_type: crane_v1\nembodiment: crane.yaml\naction: [{columns: 0, from: action}]\n")
    assert describe(path).action[0].columns == slice(0, 1)
    path.write_text("robot_type: crane_v1\nembodiment: crane.yaml\narms: {}\n")
    with pytest.raises(DataError, match="arms: not for layout 'rail' of embodiment 'crane'"):
        describe(path)


def test_unknown_to_others_it_is_refused(recording, embodiment, tmp_path, monkeypatch):
    """A server, or a recording, of a layout that this installation lacks."""
    monkeypatch.delitem(LAYOUTS, "rail")
    with pytest.raises(ValueError, match="layout: expected one of plain, bimanual, mobile, robodojo, got 'rail'"):
        plot_recording(recording[0], tmp_path / "run.png")
    robots = {"crane_v1": RobotInfo(20, 10.0, None, ("base",), "rail")}
    monkeypatch.setattr(Client, "__init__", lambda self, *arguments, **options: None)
    monkeypatch.setattr(Client, "__exit__", lambda self, *arguments: None)
    monkeypatch.setattr(
        Client, "metadata", PolicyMetadata(robots, 3, 1, (0, 6), 1 << 20, 1 << 20, 100.0), raising=False
    )
    with (
        pytest.raises(ValueError, match="layout: expected one of plain, bimanual, mobile, robodojo, got 'rail'"),
        from_server("", "", None),
    ):
        pass
