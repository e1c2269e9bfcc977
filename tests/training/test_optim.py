"""Weight decay's exceptions and the schedule."""

from __future__ import annotations

import pytest
import torch

from tests.support import make_config
from xr0_engine.model.dit import ActionHead
from xr0_engine.training.config import OptimConfig
from xr0_engine.training.optim import decays, learning_rate, make_optimizer


def test_biases_norms_and_adaln_tables_do_not_decay():
    with torch.device("meta"):
        head = ActionHead(make_config())
    kept = {name for name, p in head.named_parameters() if not decays(name, p)}
    assert kept == {
        name for name, _ in head.named_parameters() if name.endswith(("bias", "adaln_table")) or "norm" in name
    }
    optimizer = make_optimizer(head, OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(head.parameters()))


def test_frozen_parameters_are_left_out():
    head = ActionHead(make_config()).requires_grad_(False)
    head.sink.requires_grad_(True)
    groups = make_optimizer(head, OptimConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 0]


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 5e-7 + (1e-4 - 5e-7) / 2_000),
        (999, (1e-4 + 5e-7) / 2),
        (1_999, 1e-4),
        (2_000, 1e-4),
        (29_999, 5e-7),
        (40_000, 5e-7),
    ],
)
def test_schedule(step, rate):
    assert learning_rate(OptimConfig(), step) == pytest.approx(rate, rel=1e-6)


def test_schedule_falls_along_a_cosine():
    config = OptimConfig(steps=101, warmup_steps=0, peak_lr=1.0, min_lr=0.0)
    assert learning_rate(config, 50) == pytest.approx(0.5)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates == sorted(rates, reverse=True)
