"""Action statistics: the inverse pair, the mask, and every fault of preprocessor_config.json named."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from xr0_engine.robot.normalize import ActionStatistics, load_statistics, select_robot_type
from xr0_engine.types import CheckpointError

WIDTH = 5
# Two roundings of values near 10 in float32, whose spacing there is 1e-6.
ROUND_TRIP_TOLERANCE = 1e-5


def statistics(length=4, epsilon=0.0, still=(3,)):
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2, (length, WIDTH)).astype(np.float32)
    std[:, list(still)] = 0
    return ActionStatistics(rng.normal(size=(length, WIDTH)).astype(np.float32), std, epsilon)


def config_file(folder, action_config):
    (folder / "preprocessor_config.json").write_text(json.dumps({"action_config": action_config}), encoding="utf-8")


def table(value=1.0, length=3, width=WIDTH):
    return [[value] * width for _ in range(length)]


@pytest.mark.parametrize("epsilon", [0.0, 1e-6], ids=["hub", "post-training"])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_inverse_pair(epsilon, rows):
    stats = statistics(epsilon=epsilon)
    actions = np.random.default_rng(1).normal(size=(rows, WIDTH)).astype(np.float32) * 10
    back = stats.denormalize(stats.normalize(actions))
    active = stats.action_mask[:rows] > 0
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[active], actions[active], atol=ROUND_TRIP_TOLERANCE)
    np.testing.assert_array_equal(back[~active], stats.mean[:rows][~active])


def test_formulas_of_the_released_code():
    normalized = np.random.default_rng(2).normal(size=(4, WIDTH)).astype(np.float32)
    hub, trained = statistics(epsilon=0.0), statistics(epsilon=1e-6)
    np.testing.assert_array_equal(hub.denormalize(normalized), normalized * hub.std + hub.mean)
    np.testing.assert_array_equal(
        trained.denormalize(normalized), normalized * (trained.std + np.float32(1e-6)) + trained.mean
    )


@pytest.mark.parametrize("epsilon", [0.0, 1e-6], ids=["hub", "post-training"])
def test_still_columns_normalise_to_zero_without_a_warning(epsilon):
    stats = statistics(epsilon=epsilon)
    with np.errstate(all="raise"):
        normalized = stats.normalize(np.full((4, WIDTH), 100, dtype=np.float32))
    np.testing.assert_array_equal(normalized[:, 3], 0)
    assert (normalized[:, :3] > 0).all()


def robodojo(**entry):
    std = [[0.5, 1e-5, 0.0, 2.0, 0.0]] * 3
    told = {"mean": table(0.25), "std": std, "rule": "robodojo", "active_columns": [0, 1, 2, 3]}
    return {"action_config": {"robodojo": told | entry}}


def test_robodojos_still_columns_pass_unchanged_both_ways(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(robodojo()))
    stats = load_statistics(tmp_path, WIDTH, 1e-6, double=True)["robodojo"]
    actions = np.random.default_rng(3).normal(size=(3, WIDTH))
    normalized = stats.normalize(actions)
    for column in (1, 2):
        np.testing.assert_array_equal(normalized[:, column], actions[:, column].astype(np.float32))
        np.testing.assert_array_equal(stats.denormalize(actions)[:, column], actions[:, column].astype(np.float32))
    np.testing.assert_allclose(normalized[:, 0], (actions[:, 0] - 0.25) / (0.5 + 1e-6), rtol=1e-6)
    # Column 4 is none of the robot's: 0 both ways, as the mask has it at all steps.
    np.testing.assert_array_equal(stats.action_mask, [[1, 1, 1, 1, 0]] * 3)
    assert not normalized[:, 4].any()
    assert not stats.denormalize(actions)[:, 4].any()
    assert stats.to_json() == robodojo()["action_config"]["robodojo"]


@pytest.mark.parametrize(
    ("entry", "double", "fault"),
    [
        ({"active_columns": None}, True, "active_columns: missing; rule robodojo goes by them"),
        ({"rule": "mine"}, True, "rule: expected robodojo or none, got 'mine'"),
        ({}, False, "rule: expected none, as config.json describes Xiaomi-Robotics-0"),
        ({"rule": None, "quantile_columns": [0]}, True, "quantile_columns: expected with rule robodojo alone"),
        ({"quantile_columns": [0]}, True, "quantile_columns: action_q01 and action_q99 missing"),
        ({"q01": table(0), "q99": table(1)}, True, r"q01 and q99 beside .* put those of states into `state`"),
        (
            {"q01": table(0), "q99": table(1), "quantile_columns": [0], "state": {}},
            True,
            "q01 and q99 beside .* call those of actions action_q01 and action_q99, or leave them out: states",
        ),
    ],
    ids=["columns", "rule", "family", "no rule", "no quantiles", "whose", "older names"],
)
def test_rules_of_actions_that_are_no_robodojos(tmp_path, entry, double, fault):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(robodojo(**entry)))
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: robot type 'robodojo': {fault}"):
        load_statistics(tmp_path, WIDTH, 1e-6, double)


def test_quantiles_of_actions_that_older_files_have_beside_those_of_states_are_left_alone(tmp_path):
    """`xr0 data stats --quantiles` wrote them so: nothing goes by them."""
    state = {"rule": "post_training", "q01": [-1.0] * WIDTH, "q99": [1.0] * WIDTH}
    entry = {"mean": table(), "std": table(), "q01": table(7, 1), "q99": table(9, 1), "state": state}
    config_file(tmp_path, {"mobile": entry})
    found = load_statistics(tmp_path, WIDTH, 1e-6, double=True)["mobile"]
    assert found.quantiles is None
    assert found.state.to_json() == state


def test_plain_quantiles_are_nothing_to_a_family_without_them(tmp_path):
    config_file(tmp_path, {"a": {"mean": table(1), "std": table(2), "q01": table(7, 1), "q99": table(9, 1)}})
    found = load_statistics(tmp_path, WIDTH, 0.0)["a"]
    assert (found.quantiles, found.state) == (None, None)
    np.testing.assert_array_equal(found.denormalize(np.ones((3, WIDTH))), 3)


def test_mask_starts_above_the_threshold():
    std = np.array([[0, 1e-5, 1.1e-5, 1, 2]], dtype=np.float32)
    stats = ActionStatistics(np.zeros_like(std), std, 0.0)
    np.testing.assert_array_equal(stats.action_mask, [[0, 0, 1, 1, 1]])
    assert stats.action_mask.dtype == np.float32
    assert stats.chunk_length == 1


def test_rows_are_those_of_the_chunk():
    mean = np.arange(4, dtype=np.float32)[:, None].repeat(WIDTH, 1)
    stats = ActionStatistics(mean, np.ones_like(mean), 0.0)
    np.testing.assert_array_equal(stats.normalize(np.zeros((2, WIDTH))), -mean[:2])
    np.testing.assert_array_equal(stats.denormalize(np.zeros((3, 2, WIDTH), np.float32)), [mean[:2]] * 3)


@pytest.mark.parametrize("shape", [(5, WIDTH), (4, WIDTH - 1), (WIDTH,)], ids=["too long", "too narrow", "one row"])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"expected shape \(up to 4, 5\), got"):
        statistics().normalize(np.zeros(shape))


def test_load(tmp_path):
    config_file(
        tmp_path, {"a": {"mean": table(1), "std": table(2), "count": 7}, "b": {"mean": table(), "std": table(0)}}
    )
    loaded = load_statistics(tmp_path, WIDTH, 1e-6)
    assert list(loaded) == ["a", "b"]
    assert loaded["a"].mean.dtype == loaded["a"].std.dtype == np.float32
    assert (loaded["a"].chunk_length, loaded["a"].epsilon) == (3, 1e-6)
    np.testing.assert_array_equal(loaded["a"].std, 2)
    np.testing.assert_array_equal(loaded["b"].action_mask, 0)


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ([], "expected a mapping with mean and std"),
        ({"mean": table()}, "expected a mapping with mean and std"),
        ({"mean": [[1.0] * WIDTH, [1.0]], "std": table()}, "mean is ragged"),
        ({"mean": table(), "std": table(width=4)}, r"std: expected shape \(T, 5\), got \(3, 4\)"),
        ({"mean": [table()], "std": [table()]}, "mean: row 0: expected finite numbers, got"),
        ({"mean": [], "std": []}, r"mean: expected shape \(T, 5\), got \(0, 0\)"),
        ({"mean": table(length=2), "std": table()}, "mean has 2 timesteps, std has 3"),
        ({"mean": table(), "std": table(1e300)}, "std: expected values up to 1e\\+09, got 1e\\+300"),
        ({"mean": table(-3e38), "std": table()}, "mean: expected values up to"),
        ({"mean": table(length=1025), "std": table()}, "mean: expected at most 1024 timesteps, got 1025"),
        ({"mean": table(), "std": table(-1.0)}, "std holds a negative value"),
        ({"mean": table("1"), "std": table()}, "mean: row 0: expected finite numbers, got '1'"),
        ({"mean": table(True), "std": table()}, "mean: row 0: expected finite numbers, got True"),
        ({"mean": None, "std": table()}, "mean: expected a table of numbers"),
    ],
    ids=[
        "list", "no std", "ragged", "narrow", "extra axis", "empty", "lengths", "overflow", "large mean", "long",
        "negative", "text", "flag", "null",
    ],
)  # fmt: skip
def test_faulty_statistics(tmp_path, raw, fault):
    config_file(tmp_path, {"good": {"mean": table(), "std": table()}, "bad": raw})
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: robot type 'bad': {fault}"):
        load_statistics(tmp_path, WIDTH, 0.0)


def test_all_faulty_robot_types_in_one_error(tmp_path):
    config_file(tmp_path, {"first": {}, "second": {"mean": table(), "std": table(-1)}})
    with pytest.raises(CheckpointError, match=r"'first': .*; robot type 'second': std holds a negative"):
        load_statistics(tmp_path, WIDTH, 0.0)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"action_config": {}}', '{"action_config": [1]}'])
def test_faulty_file(tmp_path, content):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load_statistics(tmp_path, WIDTH, 0.0)


def test_select_robot_type():
    one, two = {"a": statistics()}, {"b": statistics(), "a": statistics()}
    assert select_robot_type(one, None) == "a"
    assert select_robot_type(two, "b") == "b"
    with pytest.raises(ValueError, match="expected one of a, b, got None"):
        select_robot_type(two, None)
    unknown_types: list[Any] = ["c", 3, ["a"]]
    for unknown in unknown_types:
        with pytest.raises(ValueError, match="expected one of a, b, got"):
            select_robot_type(two, unknown)


COLUMNS = (0, 2, 3)


def named(epsilon=1e-6, columns=COLUMNS, still=(3,)):
    """Column 3 is active and does not move; column 1 moves and is not active."""
    plain = statistics(epsilon=epsilon, still=still)
    return ActionStatistics(plain.mean, plain.std, plain.epsilon, columns)


def test_named_columns_are_active_whatever_their_std():
    np.testing.assert_array_equal(named().action_mask, [[1, 0, 1, 1, 0]] * 4)
    assert named().action_mask.dtype == np.float32


def test_formulas_of_the_post_training_code():
    """`(a - mean) / (std + 1e-6)` and back on the named columns, 0 on the others."""
    stats, epsilon = named(), np.float32(1e-6)
    values = np.random.default_rng(2).normal(size=(4, WIDTH)).astype(np.float32)
    normalized, actions = stats.normalize(values), stats.denormalize(values)
    for column in range(WIDTH):
        scale, mean = stats.std[:, column] + epsilon, stats.mean[:, column]
        is_active = column in COLUMNS
        np.testing.assert_array_equal(normalized[:, column], is_active * ((values[:, column] - mean) / scale))
        np.testing.assert_array_equal(actions[:, column], is_active * (values[:, column] * scale + mean))
    # A chunk's first rows, or several chunks at once.
    np.testing.assert_array_equal(stats.denormalize(values[None, :2]), actions[None, :2])


def test_a_still_column_decodes_to_its_value():
    stats = named()
    back = stats.denormalize(stats.normalize(stats.mean))
    np.testing.assert_array_equal(back[:, 3], stats.mean[:, 3])


@pytest.mark.parametrize("epsilon", [1e-6, 0.0], ids=["post-training", "hub"])
def test_named_columns_are_read_and_written(tmp_path, epsilon):
    stats = named(epsilon, still=())
    config_file(tmp_path, {"a": {**stats.to_json(), "active_columns": [3, 0, 2]}, "b": statistics().to_json()})
    loaded = load_statistics(tmp_path, WIDTH, epsilon)
    assert loaded["a"].active_columns == COLUMNS
    assert loaded["a"].to_json() == stats.to_json()
    assert loaded["b"].active_columns is None
    assert "active_columns" not in loaded["b"].to_json()


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ([], "expected numbers from 0 to 4, each once, got none"),
        ([0, 5], r"expected numbers from 0 to 4, each once, got \[0, 5\]"),
        ([-1], r"expected numbers from 0 to 4, each once, got \[-1\]"),
        ([1, 1], r"expected numbers from 0 to 4, each once, got \[1, 1\]"),
        ([1.0], "expected a list of column numbers"),
        ([True], "expected a list of column numbers"),
        (["1"], "expected a list of column numbers"),
        (3, "expected a list of column numbers, got 3"),
        ({"0": 1}, "expected a list of column numbers"),
    ],
    ids=["none", "above", "below", "twice", "float", "bool", "text", "number", "mapping"],
)
def test_faulty_columns(tmp_path, columns, fault):
    config_file(tmp_path, {"bad": {"mean": table(), "std": table(), "active_columns": columns}})
    with pytest.raises(CheckpointError, match=f"robot type 'bad': active_columns: {fault}"):
        load_statistics(tmp_path, WIDTH, 0.0)


def test_a_named_column_that_nothing_can_be_divided_by_is_refused(tmp_path):
    std = table()
    std[1][2] = std[2][4] = 0.0
    config_file(tmp_path, {"bad": {"mean": table(), "std": std, "active_columns": [0, 2, 4]}})
    with pytest.raises(CheckpointError, match=r"active columns \[2, 4\] have std 0, and epsilon is 0 too.*std_epsilon"):
        load_statistics(tmp_path, WIDTH, 0.0)
    assert load_statistics(tmp_path, WIDTH, 1e-6)["bad"].active_columns == (0, 2, 4)
