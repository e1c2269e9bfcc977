"""Statistics against plain NumPy over every window, and whose statistics they replace."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.training.data.fixtures import write_dataset, write_episode
from xr0_engine.robot.normalize import load_statistics
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source, split
from xr0_engine.training.data.stats import Moments, Statistics, compute, merge
from xr0_engine.training.data.windows import Windows

T = 6
# float64 sums in another order.
EXACT = 1e-12
# The windows are float32.
WINDOWS = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("stats"), (12, 7, 9, 3), {1: "invalid"})


@pytest.mark.parametrize("fraction", [0.0, 0.3], ids=["all", "without validation"])
def test_mean_and_std_of_every_training_window(folder, fraction):
    statistics = compute([folder], T, fraction, 1)
    source = open_source(folder)
    windows = Windows(source, split(source, fraction)[0], T)
    samples = [windows.sample(index) for index in range(len(windows))]
    actions = np.ma.array([s.actions for s in samples], mask=[~s.mask for s in samples], dtype=np.float64)
    assert (statistics.windows, statistics.robot_type) == (len(windows), "bimanual")
    np.testing.assert_allclose(statistics.mean, actions.mean(axis=0).filled(0), atol=WINDOWS)
    np.testing.assert_allclose(statistics.std, actions.std(axis=0).filled(0), atol=WINDOWS)
    assert np.flatnonzero((statistics.std > 0).any(axis=0)).tolist() == [*range(13), *range(14, 27)]


def test_number_of_processes_changes_nothing(folder):
    one, two = (compute([folder], T, 0.0, processes) for processes in (1, 2))
    np.testing.assert_array_equal(one.mean, two.mean)
    np.testing.assert_array_equal(one.std, two.std)


def test_moments_of_a_large_offset_do_not_cancel():
    """Naive sums of squares would lose all digits here: 1e8 squared is 1e16."""
    rng = np.random.default_rng(0)
    values = 1e8 + rng.normal(0, 1e-3, (40, 2, 32))
    mask = rng.random(values.shape) < 0.8
    parts = [Moments.of(values[begin : begin + 7], mask[begin : begin + 7]) for begin in range(0, 40, 7)]
    total = sum(parts[1:], parts[0])
    expected = np.ma.array(values, mask=~mask)
    np.testing.assert_allclose(total.mean, expected.mean(axis=0), rtol=EXACT)
    # 1e8 has a spacing of 1.5e-8 in float64.
    np.testing.assert_allclose(total.std, expected.std(axis=0), atol=1e-7)


def test_datasets_of_one_robot_count_together(folder, tmp_path):
    other = write_dataset(tmp_path / "other", (8, 15))
    parts = [[folder], [other], [folder, other]]
    first, second, both = (compute(paths, T, 0.0, 1) for paths in parts)
    assert (both.windows, both.episodes) == (first.windows + second.windows, first.episodes + second.episodes)
    # Every window has its first step, so the means of that row weigh as the windows do.
    expected = (first.mean[0] * first.windows + second.mean[0] * second.windows) / both.windows
    np.testing.assert_allclose(both.mean[0], expected, atol=EXACT)


def test_datasets_of_several_robots_are_refused(folder, tmp_path):
    (tmp_path / "b.yaml").write_text(f"dataset: {folder}\nrobot_type: b\nembodiment: bimanual\n")
    with pytest.raises(ValueError, match="expected one robot type, got b, bimanual"):
        compute([folder, tmp_path / "b.yaml"], T, 0.0, 1)


def test_no_episode_is_as_long_as_the_chunk(folder):
    with pytest.raises(DataError, match="no episode has the 13 steps"):
        compute([folder], 13, 0.0, 1)


@pytest.fixture
def statistics() -> Statistics:
    std = np.zeros((T, 32))
    std[:, :7] = 0.5
    return Statistics("arm", np.ones((T, 32)), std, 100, 3)


def test_merge_makes_what_the_engine_reads(tmp_path, statistics):
    merge(tmp_path / "preprocessor_config.json", statistics, False)
    read = load_statistics(tmp_path, 32, 0.0)["arm"]
    np.testing.assert_array_equal(read.mean, statistics.mean)
    assert np.flatnonzero(read.action_mask[0]).tolist() == list(range(7))


def test_merge_leaves_the_rest_of_the_file(tmp_path, statistics):
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"patch_size": 16, "action_config": {"other": {"mean": [[1]], "std": [[2]]}}}))
    merge(file, statistics, False)
    raw = json.loads(file.read_text())
    assert raw["patch_size"] == 16
    assert raw["action_config"]["other"] == {"mean": [[1]], "std": [[2]]}
    assert set(raw["action_config"]) == {"arm", "other"}


def test_same_robot_is_replaced_only_if_asked(tmp_path, statistics):
    file = tmp_path / "p.json"
    merge(file, statistics, False)
    newer = replace(statistics, mean=statistics.mean * 2)
    with pytest.raises(ValueError, match="has statistics of 'arm' already: --replace"):
        merge(file, newer, False)
    merge(file, newer, True)
    assert json.loads(file.read_text())["action_config"]["arm"]["mean"][0][0] == 2


@pytest.mark.parametrize("replace_it", [False, True])
@pytest.mark.parametrize(
    ("shape", "columns", "complaint"),
    [((T + 1, 32), range(7), "chunks of 6 steps there, these have 7"), ((T, 32), range(8), r"columns \[7\] move")],
    ids=["another length", "another robot"],
)
def test_another_robot_or_length_is_never_replaced(tmp_path, statistics, shape, columns, complaint, replace_it):
    file = tmp_path / "p.json"
    merge(file, statistics, False)
    before = file.read_text()
    std = np.zeros(shape)
    std[:, list(columns)] = 1
    with pytest.raises(ValueError, match=complaint):
        merge(file, replace(statistics, mean=np.zeros(shape), std=std), replace_it)
    assert file.read_text() == before


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"action_config": 3}', '{"action_config": {"arm": {}}}'],
    ids=["cut off", "list", "no mapping", "no std"],
)
def test_file_that_is_something_else_is_left_alone(tmp_path, statistics, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=r"p\.json"):
        merge(tmp_path / "p.json", statistics, True)
    assert (tmp_path / "p.json").read_text() == content


def test_episodes_whose_motion_cannot_be_read_are_left_out_if_told(tmp_path):
    write_dataset(tmp_path / "set", (12, 7, 9))
    whole = compute([write_dataset(tmp_path / "whole", (12, 7))], T, 0.0, 1)
    broken = tmp_path / "set" / "episode_002.json"
    broken.write_text(broken.read_text()[:-9])
    with pytest.raises(DataError, match=r"episode_002\.json"):
        compute([tmp_path / "set"], T, 0.0, 1)
    rest = compute([tmp_path / "set"], T, 0.0, 1, skip_broken=True)
    assert (rest.windows, rest.episodes) == (whole.windows, 2)
    np.testing.assert_array_equal(rest.mean, whole.mean)


def test_episodes_without_a_task_are_left_out_if_told(tmp_path):
    write_dataset(tmp_path / "set", (12, 7))
    whole = compute([tmp_path / "set"], T, 0.0, 1)
    path = write_episode(tmp_path / "set", 2, 9, instructions=("Fold it.",))
    path.write_text(path.read_text().replace("Fold it.", "<image>"))
    assert compute([tmp_path / "set"], T, 0.0, 1).episodes == 3
    rest = compute([tmp_path / "set"], T, 0.0, 1, skip_broken=True)
    assert (rest.windows, rest.episodes) == (whole.windows, 2)


BOTH_ARMS = (*range(13), *range(14, 27))


def edit_episodes(folder, change):
    for file in folder.glob("episode_*.json"):
        raw = json.loads(file.read_text())
        change(raw)
        file.write_text(json.dumps(raw))
    return folder


def hold_the_left_arm(raw):
    for side in ("proprios", "actions"):
        for name in raw[side]:
            if name.startswith("left_"):
                raw[side][name] = [raw["proprios"][name][0]] * len(raw[side][name])


def drop_the_right_joints(raw):
    for side in ("proprios", "actions"):
        del raw[side]["right_arm_joint"]


def test_an_arm_that_stands_still_is_active(tmp_path, folder):
    """As in the post-training code: the columns are the layout's, whatever their std."""
    still = compute([edit_episodes(write_dataset(tmp_path / "still"), hold_the_left_arm)], T, 0.0, 1)
    assert np.flatnonzero((still.std > 1e-5).any(axis=0)).tolist() == [*range(14, 27)]
    assert still.active_columns == BOTH_ARMS == compute([folder], T, 0.0, 1).active_columns
    merge(tmp_path / "preprocessor_config.json", still, False)
    read = load_statistics(tmp_path, 32, 1e-6)["bimanual"]
    assert np.flatnonzero(read.action_mask.all(0)).tolist() == list(BOTH_ARMS)
    assert not read.action_mask[:, [13, 27, 28, 29, 30, 31]].any()


def test_what_no_episode_reports_is_not_active(tmp_path):
    without = edit_episodes(write_dataset(tmp_path / "without"), drop_the_right_joints)
    whole = write_dataset(tmp_path / "whole", (8,))
    assert compute([without], T, 0.0, 1).active_columns == (*range(13), *range(14, 21))
    assert compute([without, whole], T, 0.0, 1).active_columns == BOTH_ARMS


def test_one_robot_may_stand_still_in_one_set_and_move_in_another(tmp_path, folder):
    file = tmp_path / "p.json"
    merge(file, compute([edit_episodes(write_dataset(tmp_path / "still"), hold_the_left_arm)], T, 0.0, 1), False)
    merge(file, compute([folder], T, 0.0, 1), True)
    fewer = compute([edit_episodes(write_dataset(tmp_path / "without"), drop_the_right_joints)], T, 0.0, 1)
    with pytest.raises(ValueError, match=r"another robot there, columns \[21, 22, 23, 24, 25, 26\] move"):
        merge(file, fewer, True)


def test_older_files_name_no_columns(tmp_path, folder, statistics):
    assert statistics.active_columns is None
    merge(tmp_path / "plain.json", statistics, False)
    assert "active_columns" not in json.loads((tmp_path / "plain.json").read_text())["action_config"]["arm"]
    file, newer = tmp_path / "p.json", compute([folder], T, 0.0, 1)
    merge(file, replace(newer, active_columns=None), False)
    merge(file, newer, True)
    assert json.loads(file.read_text())["action_config"]["bimanual"]["active_columns"] == list(BOTH_ARMS)
