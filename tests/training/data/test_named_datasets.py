"""Datasets by the name of a function: opened, refused, read by other processes, resumed, seen through their profile."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.training.points import EPISODES, PROFILE, SIDE, TICKS, Points
from xr0_engine.cli import app
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.training.config import DataConfig
from xr0_engine.training.data import sources
from xr0_engine.training.data.check import check
from xr0_engine.training.data.pictures import Drawn
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.stats import compute
from xr0_engine.training.data.stream import Mixture, Stream, validation_samples
from xr0_engine.training.named import is_function
from xr0_engine.training.profiles import check_profiles, check_robot_types, run_profile

HERE = "tests.training.points"
T = 4


def named(function: str) -> Path:
    return Path(f"{HERE}:{function}")


def mixture(*names: str, **settings) -> Mixture:
    return Mixture(tuple(f"{HERE}:{name}" for name in names), **settings)


def stream(*names: str, workers: int = 0) -> Stream:
    return Stream(mixture(*names), 3, seed=0, workers=workers, chunk_length=T, augment=False)


def taken(source: Stream, count: int) -> list[tuple]:
    return [
        (sample.source, sample.actions.tobytes(), sample.images["top"].tobytes())
        for batch in itertools.islice(source, count)
        for sample in batch
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("my.tasks:reach", True),
        ("tasks:reach", True),
        ("/data/tasks:reach", False),
        ("tasks:", False),
        ("tasks.yaml", False),
        ("C:/data", False),
        ("a..b:c", False),
    ],
    ids=lambda value: str(value),
)
def test_what_has_the_form_of_a_function_s_name(text, expected):
    assert is_function(text) == expected


def test_a_dataset_is_what_the_function_returns(tmp_path):
    source = open_source(named("points"))
    assert (source.names, source.lengths) == (Points().names, (TICKS,) * EPISODES)
    sample = next(stream("points"))[0]
    number, tick = (int(part) for part in sample.source.removeprefix("points#").split(":"))
    assert (sample.robot_type, sample.instruction) == ("point", "Go on.")
    np.testing.assert_array_equal(sample.images["top"], np.full((SIDE, SIDE, 3), tick, np.uint8))
    speed = Points().load(number).motion.state(0)
    np.testing.assert_array_equal(sample.state, speed)
    assert sample.mask.sum() == 2 * min(T, TICKS - tick)
    np.testing.assert_allclose(sample.actions[0, :2], speed[0, :2])
    assert [fault for finding in check(named("points"), False, 1) for fault in finding.faults] == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere.tasks:points", "there is no module nowhere: install its package, or name its folder in PYTHONPATH"),
        ("tests.training.nowhere:points", "there is no module tests.training.nowhere: "),
        (f"{HERE}:gone", "has no function 'gone'; marked as dataset: points, "),
        (f"{HERE}:unmarked", r"not marked as a dataset: write @dataset above it \(xr0_engine.training.data.sources"),
        (f"{HERE}:number", r"expected a function that returns a Source .*, a int, lacks description, names"),
        (f"{HERE}:uneven", "lengths: expected 8 whole numbers above 0, one an episode"),
        (f"{HERE}:failing", r"the function failed: KeyError: 'speed' \(.*points.py, line \d+\)"),
        ("failing_at_import:points", r"importing failing_at_import failed: ZeroDivisionError: .*line 1\)"),
        ("needing_more:points", "needing_more needs nowhere, which is not installed"),
    ],
    ids=lambda value: value.replace(f"{HERE}:", "") if ":" in value and " " not in value else "",
)
def test_what_is_no_dataset_is_refused_with_its_name(name, complaint, tmp_path, monkeypatch):
    (tmp_path / "failing_at_import.py").write_text("1 / 0\n")
    (tmp_path / "needing_more.py").write_text("import nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=f"^{name}: .*{complaint}"):
        open_source(Path(name))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("shorter_than_said", "points#0: motion: expected 13 ticks as lengths says, got 12"),
        ("without_view", "points#0: lacks the view 'wrist' of embodiment 'point', it has top"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(name, complaint):
    source = open_source(named(name))
    with pytest.raises(DataError, match=complaint):
        source.load(0)


@pytest.mark.parametrize(
    ("draw", "complaint"),
    [
        (lambda frame: np.zeros((4, 4), np.uint8), "frame 1: expected .height, width, 3. uint8, got .4, 4. uint8"),
        (lambda frame: np.zeros((4, 4, 3)), "float64"),
    ],
    ids=["grey", "float"],
)
def test_what_is_drawn_must_be_a_picture(draw, complaint):
    with pytest.raises(DataError, match=complaint):
        Drawn("here", 2, 10.0, draw).read(1)
    with pytest.raises(DataError, match="here: frame 2: there are frames 0 to 1"):
        Drawn("here", 2, 10.0, draw).read(2)
    assert [Drawn("here", 3, 10.0, draw).nearest(time_s) for time_s in (-1, 0.049, 0.05, 9)] == [0, 0, 1, 2]


def test_other_processes_call_the_function_and_get_the_same():
    """The pictures are drawn by a function within a function, which no process could send to another."""
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(Points().load(0))
    here, there = stream("points"), stream("points", workers=1)
    assert taken(here, 3) == taken(there, 3)


def test_a_process_that_gets_another_dataset_is_refused():
    sent = pickle.dumps(open_source(named("drawn_by_chance")))
    # As in a process that has called nothing yet.
    for cached in (sources._named, sources._call):
        cached.cache_clear()
    with pytest.raises(DataError, match=r"drawn_by_chance: gives another dataset in each process: .*needs a seed"):
        pickle.loads(sent).load(0)


def test_statistics_by_several_processes_are_those_of_one():
    alone, shared = (compute([named("points")], T, 0.25, processes) for processes in (1, 2))
    np.testing.assert_array_equal(alone.std, shared.std)
    assert (alone.robot_type, alone.episodes, alone.windows) == ("point", 6, 72)
    assert (alone.std[:, :2] > 0).all()
    assert not alone.std[:, 2:].any()


@pytest.mark.parametrize(
    ("name", "others", "fits"),
    [
        ("points", "points", True),
        ("points", "other_points", False),
        ("told_points", "told_first_points", True),
        ("points", "told_first_points", False),
    ],
)
def test_a_state_is_of_one_dataset(name, others, fits):
    first, second = stream(name), stream(others)
    next(first)
    if fits:
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.state_dict() == first.state_dict()
        return
    with pytest.raises(ValueError, match="the state is of other datasets"):
        second.load_state_dict(first.state_dict())


def test_weights_and_validation():
    source = stream("points=3", "other_points")
    counts = [sample.state.tobytes() for batch in itertools.islice(source, 40) for sample in batch]
    first = {Points().load(number).motion.state(0).tobytes() for number in range(EPISODES)}
    # 120 draws of which 90 are expected; within five standard deviations.
    assert 66 < sum(state in first for state in counts) < 114
    told = list(validation_samples(mixture("points", validation=(f"{HERE}:other_points=2",)), T, 5))
    assert len(told) == 5
    assert not {sample.state.tobytes() for sample in told} & first


@pytest.mark.parametrize(
    ("robot", "validation", "expected"),
    [
        (["points"], [], PROFILE),
        (["points=2", "other_points"], ["points"], PROFILE),
        (["bridge_points"], [], None),
        (["points", "turned_points"], [], None),
    ],
    ids=["one", "several", "built in", "different"],
)
def test_the_run_sees_through_the_datasets_profile(robot, validation, expected):
    data = DataConfig(
        robot=tuple(f"{HERE}:{name}" for name in robot), validation=tuple(f"{HERE}:{name}" for name in validation)
    )
    assert run_profile(data) == expected
    if expected is not None:
        assert check_profiles(data)[0] == f"{HERE}:{robot[0].partition('=')[0]}: trains on top of profile point"
        with pytest.raises(DataError, match="points: robot type 'point': the statistics are of other;"):
            check_robot_types(data, ["other"])
    if len(robot) > 1 and expected is None:
        with pytest.raises(DataError, match=f"^{HERE}:points: .*no built-in embodiment profile lists 'point'"):
            check_profiles(data)


def test_another_profile_is_held_against_the_dataset_s():
    data = DataConfig(robot=(f"{HERE}:points",), embodiment="libero")
    assert run_profile(data) == load_embodiment("libero")
    with pytest.raises(DataError, match=f"^{HERE}:points: embodiment 'point' has "):
        check_profiles(data)


def test_a_folder_of_such_a_name_is_opened_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks:points").mkdir()
    with pytest.raises(DataError, match="there is no module tasks"):
        open_source(Path("tasks:points"))
    with pytest.raises(DataError, match="holds no episode file"):
        open_source(tmp_path / "tasks:points")


def test_only_datasets_of_files_are_converted(tmp_path):
    result = CliRunner().invoke(app, ["data", "convert", f"{HERE}:points", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert f"{HERE}:points: expected a folder of episode files" in result.output
