"""Checkpoints of a run: whole or absent, exact, and refused when they do not fit."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

from xr0_engine.training import checkpoint
from xr0_engine.training.checkpoint import Checkpointer, checkpoints
from xr0_engine.training.distributed import world
from xr0_engine.types import CheckpointError


@pytest.fixture(scope="module")
def alone():
    with world() as here:
        yield here


def make(folder, alone, size=8, keep_last=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.1, fused=True)
    return model, optimizer, Checkpointer(folder, alone, model, optimizer, keep_last)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    model(torch.randn(3, model[0].in_features)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_restored_state_goes_on_exactly(tmp_path, alone):
    model, optimizer, saver = make(tmp_path / "c", alone)
    step(model, optimizer, 1)
    saver.save(1, {"step": 1, "data": {"number": 7}})
    saver.wait()
    step(model, optimizer, 2)
    other, its_optimizer, loader = make(tmp_path / "c", alone)
    assert loader.restore(tmp_path / "c" / "step-00000001") == {"step": 1, "data": {"number": 7}}
    step(other, its_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_without_moments_is_told(tmp_path, alone):
    """As earlier versions wrote at a step that they had validated."""
    model, optimizer, saver = make(tmp_path / "c", alone)
    step(model, optimizer, 1)
    saver.save(1, {"step": 1, "data": {}})
    optimizer.state.clear()
    saver.save(2, {"step": 2, "data": {}})
    saver.wait()
    said = r"step-00000002: it holds no moments of the optimiser.*remove this checkpoint to resume from step-00000001"
    with pytest.warns(UserWarning, match=said):
        make(tmp_path / "c", alone)[2].restore(tmp_path / "c" / "step-00000002")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path / "c", alone)[2].restore(tmp_path / "c" / "step-00000001")
    shutil.rmtree(tmp_path / "c" / "step-00000001")
    with pytest.warns(UserWarning, match="the run has no other checkpoint; start it again"):
        make(tmp_path / "c", alone)[2].restore(tmp_path / "c" / "step-00000002")


def test_what_is_written_is_the_state_at_the_call(tmp_path, alone):
    model, _, saver = make(tmp_path / "c", alone, size=2_000_000)
    expected = model[0].weight.detach().clone()
    saver.save(1, {})
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    saver.wait()
    saver.restore(tmp_path / "c" / "step-00000001")
    assert torch.equal(model[0].weight, expected)


def test_the_last_ones_are_kept(tmp_path, alone):
    _, _, saver = make(tmp_path / "c", alone)
    for number in (1, 2, 3, 10):
        saver.save(number, {})
    saver.wait()
    assert [path.name for path in checkpoints(tmp_path / "c")] == ["step-00000003", "step-00000010"]
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_a_write_that_was_cut_off_is_no_checkpoint(tmp_path, alone):
    _, _, saver = make(tmp_path / "c", alone)
    saver.save(1, {})
    saver.wait()
    shutil.copytree(tmp_path / "c" / "step-00000001", tmp_path / "c" / "step-00000002.partial")
    assert [path.name for path in checkpoints(tmp_path / "c")] == ["step-00000001"]
    make(tmp_path / "c", alone)
    assert not (tmp_path / "c" / "step-00000002.partial").exists()


def test_full_disk_is_refused_before_writing(tmp_path, alone, monkeypatch):
    _, _, saver = make(tmp_path / "c", alone)
    saver.save(1, {})
    saver.wait()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(0, 0, 100))
    with pytest.raises(OSError, match=r"has 0.00 GiB free; a checkpoint takes") as caught:
        saver.save(2, {})
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]


def test_a_disk_that_fills_while_writing_leaves_the_earlier_ones(tmp_path, alone, monkeypatch):
    _, _, saver = make(tmp_path / "c", alone)
    saver.save(1, {})
    saver.wait()

    class Full(checkpoint.FileSystemWriter):
        def write_data(self, plan, planner):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "FileSystemWriter", Full)
    saver.save(2, {})
    with pytest.raises(OSError, match=r"step-00000002 could not be written.*(?s:.)*earlier ones are whole"):
        saver.wait()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]


def test_missing_and_reshaped_tensors_are_refused_by_name(tmp_path, alone):
    _, _, saver = make(tmp_path / "c", alone)
    saver.save(1, {})
    saver.wait()
    folder = tmp_path / "c" / "step-00000001"
    bigger, _, loader = make(tmp_path / "other", alone, size=9)
    before = bigger[0].weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"model.0.weight has shape \(4, 8\), expected \(4, 9\)"):
        loader.restore(folder)
    assert torch.equal(bigger[0].weight, before)
    bigger[1].requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"missing model.1.weight; missing optim.1.weight"):
        loader.restore(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="holds no complete training checkpoint"):
        loader.restore(folder)
