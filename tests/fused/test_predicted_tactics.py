"""Which table counts: what was measured before what a model predicts, and that for a compute capability."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xr0_engine.fused import tactics
from xr0_engine.fused.ops import SHARED_LIMIT, Tactic
from xr0_engine.fused.tactics import TacticTable, predicted_path, read_tactics, tactics_for, write_tactics

KEY = "linear 208x2560x9728 bfloat16"
PREDICTED = TacticTable("sm_90", {KEY: Tactic(64)}, predicted=True)
SHIPPED = Path(tactics.__file__).parent.parent / "tactics"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package's folder of tables, with one predicted for sm_90 in it; the user has none."""
    monkeypatch.setattr(tactics, "gpu_name", lambda device: "toy" if device.type == "cuda" else "")
    monkeypatch.setattr(tactics, "capability", lambda device: 90)
    monkeypatch.setattr(tactics.resources, "files", lambda package: tmp_path / "package")
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "package" / "tactics"
    write_tactics(PREDICTED, predicted_path(folder, 90))
    return folder


def test_a_chip_that_nobody_measured_has_what_is_predicted_for_its_capability(package, monkeypatch):
    assert tactics_for(torch.device("cuda")) == PREDICTED
    monkeypatch.setattr(tactics, "capability", lambda device: 120)
    assert tactics_for(torch.device("cuda")) == TacticTable("toy")


def test_what_was_measured_wins(package):
    measured = TacticTable("toy", {KEY: Tactic(128)})
    write_tactics(measured, package / "toy.json")
    assert tactics_for(torch.device("cuda")) == measured
    own = TacticTable("toy")
    write_tactics(own, tactics.own_folder() / "toy.json")
    assert tactics_for(torch.device("cuda")) == own


def test_a_cpu_that_emulates_the_chip_has_its_table(package, monkeypatch):
    assert tactics_for(torch.device("cpu")) == PREDICTED
    monkeypatch.setattr(tactics, "capability", lambda device: 0)
    assert tactics_for(torch.device("cpu")) == TacticTable("")


def test_where_tactics_come_from_is_told():
    assert PREDICTED.origin == "predicted for sm_90"
    assert TacticTable("toy", {KEY: Tactic()}).origin == "measured on toy"
    assert TacticTable("toy").origin == "stated defaults"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("predicted/*.json")), ids=lambda path: path.stem)
def test_shipped_tables_are_predicted_ones_of_their_capability(path):
    table = read_tactics(path)
    assert table.predicted
    assert table.gpu == path.stem
    assert int(path.stem.removeprefix("sm_")) in SHARED_LIMIT
    assert table.tactics
    assert not any(tactic.library for tactic in table.tactics.values())
