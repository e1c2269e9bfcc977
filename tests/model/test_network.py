"""One face of a network: three implementations, the same arguments, the same chunk."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from tests.support import load, random_inputs
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.exported.model import ExportedModel
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.network import Network, step_by_stages
from xr0_engine.model.xr0 import XR0Model

MAX_ERROR = 2e-4
"""float32, with norms folded into weights and sums in another order."""
METHODS = ("patch_buffer", "encode_images", "prefill", "sample", "step")


@pytest.mark.parametrize("network", [XR0Model, FusedModel, ExportedModel])
@pytest.mark.parametrize("method", METHODS)
def test_arguments_are_the_same(network, method):
    ours, stated = (
        [(each.name, each.default) for each in inspect.signature(getattr(owner, method)).parameters.values()]
        for owner in (network, Network)
    )
    assert ours == stated


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks") / "tiny"
    init_checkpoint(folder, "tiny")
    plain = load(folder)
    shared = copy.deepcopy(plain)
    for part in shared.modules():
        if hasattr(part, "pack"):
            part.pack()
    return plain, FusedModel(shared, "reference", TacticTable(""), graphs=False)


def test_a_step_is_its_stages_in_a_row(networks):
    plain, fused = networks
    inputs = random_inputs(plain.config, [[(4, 4), (4, 6)]], [[3, 2, 5]])
    noise = torch.randn(inputs.action_mask.shape, generator=torch.Generator().manual_seed(0))
    chunk = noise, torch.zeros_like(noise), torch.zeros(1, dtype=torch.long)
    marks: list[str] = []
    expected = step_by_stages(plain, inputs, *chunk, marks.append)
    assert marks == ["vision", "prefill", "flow"]
    for network, stages in ((plain, ["vision", "prefill", "flow"]), (fused, ["step"])):
        marks.clear()
        torch.testing.assert_close(network.step(inputs, *chunk, marks.append), expected, rtol=0, atol=MAX_ERROR)
        assert marks == stages
