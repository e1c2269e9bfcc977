"""Small checkpoints and exports of them, each made once for all tests that read it."""

from __future__ import annotations

import pytest
import torch

from tests.export.cases import LIBERO, write_video_checkpoint
from tests.support import make_config
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.export.folder import export_onnx


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """These models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Smaller than tiny: two text layers, one of the action head, two flow steps."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    config = make_config(
        text={"num_layers": 2}, vision={"depth": 2, "deepstack_layers": (0,)}, head={"num_layers": 1, "flow_steps": 2}
    )
    write_checkpoint(folder, config)
    return folder


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """All stages in float32; not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "fp32"
    export_onnx(checkpoint, LIBERO, "fp32", folder)
    return folder


@pytest.fixture(scope="session")
def video_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "videos"
    write_video_checkpoint(folder)
    return folder
