"""The self-check of models in 8 bits: it passes what is right and finds what is broken on purpose."""

from __future__ import annotations

import pytest
import torch

from tests.fused.test_selfcheck import FAULTS, first_fault, seeded
from tests.support import CPU
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.fused.products import Product
from xr0_engine.fused.selfcheck import (
    check,
    checkpoint_model,
    checkpoint_sessions,
    seeded_config,
    seeded_model,
    seeded_sessions,
)
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.quantization import RECIPES
from xr0_engine.model.quantized import QuantizedLinear
from xr0_engine.quantize.make import make


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-weights"])
def test_what_is_right_in_8_bits_passes(recipe, tmp_path):
    model = seeded_model(seeded_config(), CPU, torch.bfloat16, formats=RECIPES[recipe])
    assert first_fault(check(model, seeded_sessions(model.config), "reference", TacticTable(""))) is None
    tiny = tmp_path / "tiny"
    init_checkpoint(tiny)
    make(tiny, tmp_path / "eight", recipe)
    stored = checkpoint_model(tmp_path / "eight", CPU, torch.bfloat16)
    on_the_fly = checkpoint_model(tiny, CPU, torch.bfloat16, recipe)
    for (name, one), (_, other) in zip(stored.named_parameters(), on_the_fly.named_parameters(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one.float(), other.float()), name
    assert any(isinstance(module, QuantizedLinear) for module in stored.modules())
    assert first_fault(check(stored, checkpoint_sessions(stored.config), "reference", TacticTable(""))) is None


def test_a_weight_in_8_bits_without_its_norm_is_found(monkeypatch):
    honest = Product.take

    def take(self, ops, x, scratch, norm=None, col_scale=None, shift=None):
        given = col_scale if col_scale is not None else torch.ones_like(x[0, 0].float())
        return honest(self, ops, x, scratch, norm, given if norm is not None else None, shift)

    monkeypatch.setattr(Product, "take", take)
    model = seeded_model(seeded_config(), CPU, torch.bfloat16, formats=RECIPES["int8"])
    assert first_fault(check(model, seeded_sessions(model.config), "reference", TacticTable(""))) is not None


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        pytest.param(fault, stage, id=name)
        for name, (fault, stage, in_bfloat16) in FAULTS.items()
        # What is 8 bits has no norm that could be folded.
        if in_bfloat16 and "folded" not in name
    ],
)
def test_a_fault_is_found_in_8_bits_too(monkeypatch, fault, stage):
    fault(monkeypatch)
    found = first_fault(seeded(torch.bfloat16, RECIPES["int8-all"]))
    assert found is not None
    assert found.quantity.startswith(stage), found
