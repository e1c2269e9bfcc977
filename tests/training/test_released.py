"""The released training code's losses and gradients, on batches that went through it (spec section 4.1)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from tests.support import CPU, GOLDEN
from xr0_engine.config import ModelConfig
from xr0_engine.robot.normalize import load_statistics
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.robot.prompt import PromptTokenizer
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import RobotBatch
from xr0_engine.training.config import override
from xr0_engine.training.draws import FlowDraw
from xr0_engine.training.model import build_policy, load_policy, model_config
from xr0_engine.training.recipes import released_async
from xr0_engine.types import Observation

RELEASED = GOLDEN.parent / "golden_released"
CASES = sorted(RELEASED.glob("*.safetensors"))
LOSS_ERROR = 2e-6
"""Relative. Both in float32: a few roundings of sums of thousands."""
GRADIENT_ERROR = 2e-5
"""Relative, of each parameter's norm: float32 sums in another order through VLM, DiT and five sampling steps."""

pytestmark = pytest.mark.skipif(not CASES, reason=f"the released code's cases are not at {RELEASED}")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_losses_and_gradients_are_the_released_codes(path):
    with safe_open(path, "pt") as file:
        facts, case = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix = int(facts["prefix_length"])
    run = override(released_async(), [f"model.checkpoint={RELEASED / 'checkpoint'}", "model.dtype=float32"])
    if facts["frequency"] == "False":
        run = override(run, ["flow.frequency_weight=0"])
    base = read_base(run.model.checkpoint)
    xr0 = model_config(base.config, run)
    policy = build_policy(run, xr0)
    load_policy(policy, run, xr0, base, CPU)

    draw = FlowDraw(case["noise"], case["t"], prefix, case["hidden"].bool())
    output = policy(_batch(facts, case, base.folder, xr0), draw)
    output.loss.backward()
    terms = {"loss": "loss", "mse": "loss_mse", "frequency": "loss_freq"}
    for name, value in output.parts.items():
        torch.testing.assert_close(value.view(1), case[terms[name]], rtol=LOSS_ERROR, atol=0)
    norms = {name: p.grad.norm() for name, p in policy.named_parameters() if p.grad is not None}
    expected = {name: case[f"gradient_norm.{name.removeprefix('head.')}"] for name in norms}
    assert len(expected) == sum(name.startswith("gradient_norm.") for name in case)
    for name, norm in norms.items():
        torch.testing.assert_close(norm.view(1), expected[name], rtol=GRADIENT_ERROR, atol=0, msg=name)


def _batch(facts, case, folder, xr0: ModelConfig) -> RobotBatch:
    statistics = load_statistics(folder, xr0.head.action_dim, xr0.std_epsilon)
    instructions = json.loads(facts["instructions"])
    observations = [
        Observation(
            {name.split(".")[2]: case[name].numpy() for name in case if name.startswith(f"images.{number}.")},
            instruction,
            case["state"][number].numpy(),
            "bimanual",
        )
        for number, instruction in enumerate(instructions)
    ]
    inputs = Preprocessor(xr0, PromptTokenizer.load(folder, xr0.tokens), statistics)(observations)
    return RobotBatch(inputs, case["action"], case["action_mask"], tuple(instructions))
