"""What driving needs: a checkpoint, and something to draw the simulation with."""

from __future__ import annotations

import pytest

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.sim import choose_renderer


@pytest.fixture(scope="session")
def renderer():
    pytest.importorskip("gym_aloha")
    try:
        choose_renderer()
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder
