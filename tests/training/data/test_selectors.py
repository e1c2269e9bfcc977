"""Columns of a LeRobot feature, picked by position or by name, whatever way the names are written."""

from __future__ import annotations

import pytest

from xr0_engine.training.data.description import Selector
from xr0_engine.training.data.lerobot import column_names
from xr0_engine.training.data.samples import DataError


@pytest.mark.parametrize(
    ("text", "columns"),
    [("f", [0, 1, 2, 3]), ("f[1:3]", [1, 2]), ("f[2:]", [2, 3]), ("f[b, d]", [1, 3]), ("f[3, a]", [3, 0])],
    ids=str,
)
def test_selectors(text, columns):
    assert Selector.parse(text, "x").columns(["a", "b", "c", "d"], 4) == columns


@pytest.mark.parametrize(
    ("names", "pick", "complaint"),
    [
        (["a", "b", "a", "c"], "f[a]", r"f\[a\]: may be any of the columns 0, 2"),
        (["3", "1", "0", "2"], "f[3]", "may be any of the columns 0, 3, by position or by name"),
        (["a", "b", "c"], "f[b]", "4 columns and 3 names: pick by position"),
    ],
    ids=["twice", "a number", "too few"],
)
def test_ambiguous_names_are_refused(names, pick, complaint):
    with pytest.raises(DataError, match=complaint):
        Selector.parse(pick, "x").columns(names, 4)


def test_numbers_as_names_of_their_own_columns():
    assert Selector.parse("f[2, 0]", "x").columns(["0", "1", "2"], 3) == [2, 0]


@pytest.mark.parametrize(
    "names",
    [
        ["x", "y", "grip"],
        {"motors": ["x", "y", "grip"]},
        [["x", "y", "grip"]],
        {"left": ["x", "y"], "right": ["grip"]},
        {"grip": 2, "x": 0, "y": 1},
        {"axes": {"grip": 2, "x": 0, "y": 1}},
    ],
    ids=["list", "group", "list in a list", "groups", "positions", "positions in a group"],
)
def test_names_as_datasets_write_them(names):
    assert column_names(names) == ["x", "y", "grip"]


@pytest.mark.parametrize("names", [None, [], {}, "motors", {"x": None}], ids=str)
def test_no_names(names):
    assert column_names(names) == []
