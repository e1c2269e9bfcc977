"""A run's profile and its datasets: they are trained on the profile's views; what does not fit is refused at first."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import yaml

from tests.training.data.fixtures import write_dataset
from tests.training.data.test_lerobot import PLAIN, describe, write_v2
from tests.training.support import config_for
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.training.config import DataConfig
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.stats import compute
from xr0_engine.training.data.stream import Mixture, Stream, validation_samples
from xr0_engine.training.profiles import check_profiles, check_robot_types
from xr0_engine.training.start import start_run

LENGTH = 4


def write_profile(path, of, keys, **changes):
    """The built-in profile with these of its views, and changes."""
    profile = load_embodiment(of)
    kept = [asdict(view) for view in profile.views if view.key in keys]
    path.write_text(yaml.safe_dump(_lists({**asdict(profile), "name": path.stem, "views": kept, **changes})))
    return path


def _lists(value):
    if isinstance(value, dict):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("episodes"), (9, 7))


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot") / "set"
    write_v2(folder)
    describe(folder, PLAIN)
    return folder


@pytest.mark.parametrize(("dataset", "of", "view"), [("episodes", "bimanual", "ego"), ("lerobot", "libero", "base")])
def test_the_run_s_profile_says_which_cameras_are_trained_on(dataset, of, view, request, tmp_path):
    folder = request.getfixturevalue(dataset)
    profile = write_profile(tmp_path / "narrow.yaml", of, [view])
    mixture = Mixture((str(folder),), validation_fraction=0.5, embodiment=load_embodiment(profile))
    trained = next(Stream(mixture, 2, 0, chunk_length=LENGTH, augment=False))
    held_out = list(validation_samples(mixture, LENGTH, 2))
    assert {tuple(sample.images) for sample in (*trained, *held_out)} == {(view,)}
    other = Mixture((str(folder),), validation=(str(folder),), embodiment=load_embodiment(profile))
    assert {tuple(sample.images) for sample in validation_samples(other, LENGTH, 2)} == {(view,)}

    (line,) = check_profiles(DataConfig(robot=(f"{folder}=2",), embodiment=str(profile)))
    assert line.startswith(f"{folder}: trains on {view} of profile narrow; left out: ")
    others = [each.key for each in load_embodiment(of).views if each.key != view]
    assert line.endswith(", ".join(others))


def test_without_a_profile_of_the_run_it_is_the_built_in_one(episodes):
    (line,) = check_profiles(DataConfig(robot=(str(episodes),)))
    assert line == f"{episodes}: trains on ego, left_wrist, right_wrist of profile bimanual"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"control_rate_hz": 10},
            r"'libero' has control_rate_hz 20, the run's profile 'narrow' has 10: choose another",
        ),
        ({"step_columns": []}, r"has step_columns \(0, 1, 2, 3, 4, 5\), the run's profile 'narrow' has \(\)"),
        (
            {"views": [{"key": "base", "title": "A"}, {"key": "top", "title": "B"}]},
            r"'narrow' has the view 'top', the dataset maps base, left_wrist: map it in xr0\.yaml, or choose",
        ),
    ],
    ids=["rate", "columns", "view"],
)
def test_profile_that_the_dataset_does_not_fit(changes, complaint, lerobot, tmp_path):
    profile = write_profile(tmp_path / "narrow.yaml", "libero", ["base"], **changes)
    for refused in (
        lambda: check_profiles(DataConfig(robot=(str(lerobot),), embodiment=str(profile))),
        lambda: open_source(lerobot, embodiment=load_embodiment(profile)),
    ):
        with pytest.raises(DataError, match=f"set: .*{complaint}"):
            refused()


def test_episode_files_that_lack_a_view_of_the_profile(episodes):
    wide = load_embodiment("bimanual")
    top = replace(wide.views[0], key="top", title="Top View")
    with pytest.raises(DataError, match=r"lacks the view 'top' of .*, it has ego, left_wrist, right_wrist: choose"):
        open_source(episodes, embodiment=replace(wide, views=(*wide.views, top)))


def test_a_profile_of_the_dataset_that_the_run_would_not_choose(lerobot, tmp_path):
    """The trainer takes the built-in profile of a robot type, or the run's: not silently another than the dataset's."""
    write_profile(tmp_path / "mine.yaml", "libero", ["base", "left_wrist"])
    stated = tmp_path / "set.yaml"
    facts = {**PLAIN, "dataset": str(lerobot), "embodiment": "mine.yaml"}
    stated.write_text(yaml.safe_dump(facts))
    with pytest.raises(
        DataError, match=r"set\.yaml: its profile 'mine' is not the built-in one .* 'libero': say which"
    ):
        check_profiles(DataConfig(robot=(str(stated),)))
    stated.write_text(yaml.safe_dump({**facts, "robot_type": "mine"}))
    with pytest.raises(DataError, match=r"set\.yaml: .*no built-in embodiment profile lists 'mine'.*data\.embodiment"):
        check_profiles(DataConfig(robot=(str(stated),)))
    mine = DataConfig(robot=(str(stated),), embodiment=str(tmp_path / "mine.yaml"))
    assert "trains on base, left_wrist of profile mine" in check_profiles(mine)[0]


def test_what_does_not_fit_is_refused_before_anything_is_loaded(episodes, lerobot, tmp_path):
    config = config_for(
        "finetune_head", tmp_path / "no-checkpoint", f"data.robot={lerobot}", "data.statistics=none.json"
    )
    for name, complaint in (("bimanual", "has layout 'plain', the run's profile"), ("nowhere", "data.embodiment: ")):
        with pytest.raises(ValueError, match=complaint):
            start_run(replace(config, data=replace(config.data, embodiment=name)), tmp_path / "run")
    with pytest.raises(DataError, match="robot type 'bimanual': the statistics are of libero_all; give"):
        check_robot_types(DataConfig(robot=(str(episodes),)), ["libero_all"])
    assert not (tmp_path / "run").exists()


def test_a_run_on_one_of_three_cameras(base, episodes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_profile(tmp_path / "ego.yaml", "bimanual", ["ego"])
    made = compute([episodes], LENGTH, 0.5, 1)
    table = {"mean": made.mean.tolist(), "std": made.std.tolist()}
    (tmp_path / "statistics.json").write_text(json.dumps({"action_config": {"bimanual": table}}))
    short = ("data.batch_size=2", "data.workers=0", "data.validation_samples=2", "optim.steps=1")
    paths = (f"data.robot={episodes}", "data.statistics=statistics.json", "data.embodiment=ego.yaml")
    start_run(config_for("finetune_head", base, f"data.chunk_length={LENGTH}", *paths, *short), tmp_path / "run")
    told = f"{episodes}: trains on ego of profile ego; left out: left_wrist, right_wrist"
    assert capsys.readouterr().out.count(told) == 1
    # It can be resumed from any folder.
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["embodiment"] == str(tmp_path / "ego.yaml")
