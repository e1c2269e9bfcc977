"""Episode files of a robot with waist and base: 60 columns, the base's velocity never a difference."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.training.data.fixtures import write_video
from xr0_engine.robot.decode import rotation_exp
from xr0_engine.robot.embodiment import View
from xr0_engine.robot.mobile import MOBILE, ROBODOJO, MobileArm, MobilePose
from xr0_engine.robot.quantiles import read_state
from xr0_engine.robot.views import orient
from xr0_engine.training.data import augment
from xr0_engine.training.data.columns import Timing, motion_of
from xr0_engine.training.data.description import describe
from xr0_engine.training.data.episode import VIEW_NAMES, Episode, load_episode, save_episode
from xr0_engine.training.data.mobile_episode import MobileMotion
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.stats import compute, merge
from xr0_engine.training.data.video import Clip
from xr0_engine.training.data.windows import Windows, chunk_at, prepare

N, JOINTS, T = 10, 7, 4
ACTIVE = [*range(7), *range(8, 15), 16, *range(17, 20)]


def poses(rng: np.random.Generator, joints: int) -> MobilePose:
    def arm() -> MobileArm:
        turns = rotation_exp(np.cumsum(rng.normal(0, 0.05, (N, 3)), axis=0))
        return MobileArm(rng.normal(0, 0.1, (N, 3)), turns, rng.uniform(0, 1, (N, 1)), rng.normal(0, 1, (N, joints)))

    return MobilePose(arm(), arm(), rng.uniform(0, 1, (N, 1)), rng.normal(0, 1, (N, 3)))


def write(folder, number: int = 0, status: str = "success"):
    rng = np.random.default_rng(number)
    clips = {
        view: Clip(write_video(folder / "videos" / f"{number}.{view}.mp4", range(N)), 0.0, N, 30.0)
        for view in VIEW_NAMES
    }
    columns = np.isin(np.arange(60), ACTIVE)
    motion = MobileMotion(poses(rng, JOINTS), poses(rng, 0), MOBILE, columns)
    path = folder / f"episode_{number}.json"
    save_episode(path, Episode(str(path), status, ("Fold it",), clips, motion, 30.0))
    return path, motion


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "xr0.yaml").write_text("robot_type: mobile\n")
    return tmp_path


def test_a_file_comes_back(folder):
    path, motion = write(folder)
    read = load_episode(path, MOBILE).motion
    assert read.columns.tolist() == motion.columns.tolist()
    assert np.flatnonzero(read.columns).tolist() == ACTIVE
    for tick in (0, 7):
        np.testing.assert_allclose(read.actions(tick, T), motion.actions(tick, T), atol=1e-5)
        np.testing.assert_allclose(read.state(tick), motion.state(tick), atol=1e-6)
    assert read.state(3).shape == (1, 60)


def test_columns_are_where_the_layout_has_them(folder):
    path, _ = write(folder)
    raw = json.loads(path.read_text())
    actions, tick = load_episode(path, MOBILE).motion.actions(2, T), 2
    waist, velocity = (np.array(raw["actions"][name]) for name in ("waist_pos", "base_vel"))
    now = raw["proprios"]["waist_pos"][tick][0]
    np.testing.assert_allclose(actions[:, 16], waist[tick : tick + T, 0] - now, atol=1e-6)
    # What the base shall drive at, whatever it drives at now.
    np.testing.assert_allclose(actions[:, 17:20], velocity[tick : tick + T], atol=1e-6)
    gripper = np.array(raw["actions"]["left_gripper_pos"])[tick : tick + T, 0]
    np.testing.assert_allclose(actions[:, 6], gripper - raw["proprios"]["left_gripper_pos"][tick][0], atol=1e-6)
    assert not actions[:, [7, 15, *range(20, 60)]].any()
    absolute = load_episode(path, ROBODOJO).motion
    np.testing.assert_allclose(absolute.actions(2, T)[:, 7], gripper, atol=1e-6)
    assert not absolute.columns[16:20].any()
    state = load_episode(path, MOBILE).motion.state(tick)[0]
    np.testing.assert_allclose(state[:7], raw["proprios"]["left_arm_joint"][tick], atol=1e-6)
    assert state[7] == np.float32(raw["proprios"]["left_gripper_pos"][tick][0])


def test_behind_the_end_the_last_step_is_repeated_and_masked(folder):
    path, _ = write(folder)
    episode = load_episode(path, MOBILE)
    raw = episode.motion.actions(N - 2, T)
    np.testing.assert_array_equal(raw[1:], raw[1][None].repeat(T - 1, 0))
    chunk = chunk_at(episode, N - 2, T)
    assert chunk.mask[:, ACTIVE].all(1).tolist() == [True, True, False, False]
    assert not chunk.actions[2:].any()


def test_parts_that_a_file_lacks_are_not_supervised(folder):
    path, _ = write(folder)
    raw = json.loads(path.read_text())
    del raw["proprios"]["waist_pos"], raw["actions"]["base_vel"], raw["actions"]["left_gripper_pos"]
    # The measured velocity of the base is never needed.
    path.write_text(json.dumps(raw))
    columns = load_episode(path, MOBILE).motion.columns
    assert not columns[[6, 16, 17, 18, 19]].any()
    assert columns[[0, 5, 8, 14]].all()


@pytest.mark.parametrize(
    ("section", "name", "rows", "message"),
    [
        ("actions", "base_vel", [[0.0, 0.0]] * N, r"actions.base_vel: expected shape \(10, 3\), got \(10, 2\)"),
        ("proprios", "waist_pos", [[0.0]] * (N - 1), r"proprios.waist_pos: expected shape \(10, 1\), got \(9, 1\)"),
        ("proprios", "left_arm_joint", [[0.0] * 8] * N, r"left_arm_joint: expected shape \(10, up to 7\)"),
        ("actions", "left_ee_rotm", [[1.0] * 9] * N, "rotation"),
    ],
)
def test_what_is_wrong_is_named(section, name, rows, message, folder):
    path, _ = write(folder)
    raw = json.loads(path.read_text())
    raw[section][name] = rows
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=message):
        load_episode(path, MOBILE)


def test_a_dataset_has_windows_and_invalid_episodes_have_none(folder):
    write(folder, 0)
    write(folder, 1, "invalid")
    source = open_source(folder)
    assert source.description.width == 60
    windows = Windows(source, range(2), T)
    assert len(windows) == N
    sample = windows.sample(4)
    assert sample.actions.shape == sample.mask.shape == (T, 60)
    assert sample.state.shape == (1, 60)
    assert not chunk_at(source.load(1), 0, T).mask.any()


def test_statistics_with_quantiles(folder):
    _, motion = write(folder, 0)
    found = compute([folder], T, 0.0, 1, quantiles=True)
    states = np.concatenate([motion.state(tick) for tick in range(N)]).astype(np.float64)
    chunks = [chunk_at(load_episode(folder / "episode_0.json", MOBILE), tick, T) for tick in range(N)]
    merge(folder / "p.json", found, False)
    told = json.loads((folder / "p.json").read_text())["action_config"]["mobile"]
    assert told["active_columns"] == ACTIVE
    assert np.shape(told["mean"]) == (T, 60)
    assert np.shape(told["action_q01"]) == (1, 60)
    # Released configurations have the states' under these names, beside mean and std.
    assert not {"q01", "q99"} & told.keys()
    values = np.concatenate([chunk.actions[chunk.mask[:, 17], 17] for chunk in chunks])
    found = [told["action_q01"][0][17], told["action_q99"][0][17]]
    np.testing.assert_allclose(found, np.quantile(values, [0.01, 0.99]))
    state = read_state(told["state"])
    assert state.rule == "post_training"
    np.testing.assert_allclose(state.q99, np.quantile(states, 0.99, axis=0), atol=1e-6)
    assert np.abs(state.normalize(states)).max() <= 1
    # Columns without a sensor do not move, and are 0 to the model.
    assert not state.normalize(states)[:, 16:].any()


def test_statistics_without_them_are_as_before(folder):
    write(folder, 0)
    merge(folder / "p.json", compute([folder], T, 0.0, 1), False)
    told = json.loads((folder / "p.json").read_text())["action_config"]["mobile"]
    assert told.keys() == {"mean", "std", "active_columns"}


def test_quantiles_are_the_same_for_any_number_of_processes_and_thinned_evenly(folder, monkeypatch):
    for number in range(3):
        write(folder, number)
    monkeypatch.setattr("xr0_engine.training.data.stats.QUANTILE_ROWS", 40)
    one, three = (compute([folder], T, 0.0, processes, quantiles=True) for processes in (1, 3))
    for pair in ("actions", "states"):
        np.testing.assert_array_equal(getattr(one, pair), getattr(three, pair))
    monkeypatch.undo()
    whole = compute([folder], T, 0.0, 1, quantiles=True)
    assert not np.array_equal(one.states, whole.states)


def test_a_plain_dataset_says_its_width(tmp_path):
    path = tmp_path / "xr0.yaml"
    mapped = "action: [{columns: '0:12', from: action}]\nstate: [{columns: 40, from: s}]\n"
    path.write_text(f"robot_type: robocasa_mg\nwidth: 60\n{mapped}")
    assert describe(path).width == 60
    path.write_text(f"robot_type: robocasa_mg\n{mapped}")
    with pytest.raises(DataError, match=r"state\[0\].columns: expected columns of 0 to 31"):
        describe(path)
    path.write_text("robot_type: mobile\nwidth: 32\n")
    with pytest.raises(DataError, match="width: expected 60, as layout 'mobile' has, got 32"):
        describe(path)


def test_a_plain_datasets_motion_is_as_wide_as_it_says(tmp_path):
    path = tmp_path / "xr0.yaml"
    mapped = "action: [{columns: 50, from: action}]\nstate: [{columns: 40, from: s}]\n"
    path.write_text(f"robot_type: robocasa_mg\nwidth: 60\n{mapped}")
    rows = {"action": np.arange(5.0)[:, None], "s": np.arange(5.0)[:, None] + 7}
    timing = Timing(np.arange(5), np.arange(5) / 20, 20, 20)
    motion = motion_of(describe(path), lambda selector: rows[selector.feature], timing)
    assert np.flatnonzero(motion.columns).tolist() == [50]
    np.testing.assert_array_equal(motion.actions(1, 3)[:, 50], [1, 2, 3])
    assert motion.state(2)[0, 40] == 9
    assert motion.state(2).shape == (1, 60)


def test_lerobot_datasets_of_such_a_layout_are_refused(folder):
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text("{}")
    with pytest.raises(DataError, match="a LeRobot dataset of layout 'mobile' is not read: write episode files"):
        open_source(folder)


def test_without_random_crops_colour_alone_varies(monkeypatch):
    frames = {"base": np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)}
    view = View("base", "Base View", center_crop=0.95)
    expected = orient(frames["base"], view)
    seen = [prepare(frames, [view], np.random.default_rng(seed), random_crop=False)["base"] for seed in range(8)]
    assert len({image.tobytes() for image in seen}) > 2
    monkeypatch.setattr(augment, "PROBABILITY", 0.0)
    for seed in range(8):
        unchanged = prepare(frames, [view], np.random.default_rng(seed), random_crop=False)["base"]
        np.testing.assert_array_equal(unchanged, expected)
