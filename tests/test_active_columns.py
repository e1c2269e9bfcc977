"""Columns that statistics name are the model's, whatever their standard deviation (spec section 3.3)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.engine import Engine

BOTH_ARMS = [*range(13), *range(14, 27)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("active") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


def with_bimanual_statistics(folder, target, change, **config):
    """A copy whose bimanual statistics and config.json are changed."""
    copy = shutil.copytree(folder, target)
    file = copy / "preprocessor_config.json"
    raw = json.loads(file.read_text())
    change(raw["action_config"]["bimanual"])
    file.write_text(json.dumps(raw))
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return Engine.from_pretrained(copy, device="cpu", dtype="float32")


def test_named_columns_are_seen_and_set_whatever_the_statistics(folder, engine, tmp_path):
    """A left arm that stood still in the data, reserved columns of std 1: the model works as if neither were so."""

    def odd(entry):
        for row in entry["std"]:
            row[:13] = [0.0] * 13
            for column in set(range(32)) - set(BOTH_ARMS):
                row[column] = 1.0
        entry["active_columns"] = BOTH_ARMS

    example = engine.example("bimanual")
    own = with_bimanual_statistics(folder, tmp_path / "odd", odd, std_epsilon=1e-6)
    inputs = own._preprocess([example])
    assert np.flatnonzero(inputs.action_mask[0].amin(0)).tolist() == BOTH_ARMS
    chunk, usual = (each.infer(example, seed=0) for each in (own, engine))
    np.testing.assert_array_equal(chunk.normalized, usual.normalized)
    assert np.flatnonzero(chunk.active_columns).tolist() == BOTH_ARMS
    statistics = own.statistics["bimanual"]
    np.testing.assert_array_equal(chunk.actions[:, 13], 0)
    np.testing.assert_array_equal(chunk.actions[:, 27:], 0)
    # A still column keeps to its mean, but for the epsilon.
    np.testing.assert_allclose(chunk.actions[:, :13], statistics.mean[:, :13], atol=1e-5)

    def hub(entry):
        odd(entry)
        del entry["active_columns"]

    by_rule = with_bimanual_statistics(folder, tmp_path / "hub", hub, std_epsilon=1e-6)
    assert np.flatnonzero(by_rule.infer(example, seed=0).active_columns).tolist() == list(range(13, 32))


def test_inspect_tells_of_statistics_without_named_columns(folder, tmp_path):
    def still(entry):
        for row in entry["std"]:
            row[:13] = [0.0] * 13

    with_bimanual_statistics(folder, tmp_path / "still", still)
    report = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "still"), "--json"]).stdout)
    (note,) = report["notes"]
    assert note.startswith("bimanual: its statistics name no active_columns, so those that move are used: [14, 15,")
    usual = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert json.loads(usual.stdout)["notes"] == []
