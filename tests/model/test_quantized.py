"""Layers in 8 bits: exact sums, rows and weights within half a step, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.engine import Engine
from xr0_engine.kernels import reference
from xr0_engine.model.quantization import QUANTIZATION_FILE, RECIPES, quantized_layers, read_quantization
from xr0_engine.model.quantized import QuantizedLinear
from xr0_engine.model.weights import inference_shapes, read_index
from xr0_engine.types import CheckpointError

RELATIVE_STEP = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4}
"""Of the largest of a row, and of each value: half of what lies between neighbours."""
COSINE = {"int8": 0.9999, "fp8": 0.999, "int8-weights": 0.9999, "int8-all": 0.9999, "fp8-all": 0.999}
"""Of the chunks of the random tiny model in 32 and in 8 bits: measured 0.99996, 0.99956, 0.99997, 0.99995, 0.99928."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(out, "tiny")
    return out


def ints(*shape, seed=0):
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("has_instructions", [False, True], ids=["by float32", "by the processor"])
@pytest.mark.parametrize("columns", [1, 1024, 1025, 9728])
def test_sums_of_int8_are_exact(columns, has_instructions, monkeypatch):
    monkeypatch.setattr(reference, "_multiplies_int8", lambda: has_instructions)
    q, weight = ints(5, columns), ints(7, columns, seed=1)
    # The worst case for float32: all of one sign, odd.
    q[0], weight[0] = 127, 127
    assert torch.equal(reference.integer_product(q, weight).long(), q.long() @ weight.long().t())


@pytest.mark.skipif(not reference._multiplies_int8(), reason="this processor does not multiply int8")
@pytest.mark.parametrize(("dtype", "exponents"), [(torch.bfloat16, 14), (torch.float16, 11)], ids=str)
def test_rows_in_16_bits_times_8_bit_weights_are_exact(dtype, exponents):
    """Of values that are no further apart than the digits reach; more rows than are multiplied at a time."""
    random = torch.Generator().manual_seed(0)
    rows = reference.ROWS_OF_DIGITS + 5
    sizes = 2.0 ** -torch.randint(0, exponents, (rows, 200), generator=random)
    x = ((1 + torch.rand(rows, 200, generator=random)) * sizes * 100).to(dtype)
    x[::2] *= -1
    x[0] = 0
    weight, scale = ints(7, 200), torch.full((7,), 0.25)
    expected = 0.25 * (x.double() @ weight.double().t())
    y = reference.product_8bit_weight(x, weight, scale)
    # Three sums of digits are joined in float32.
    assert (y - expected).abs().max() <= 2**-22 * expected.abs().max()
    assert torch.equal(y[0], torch.zeros(7))


@pytest.mark.skipif(not reference._multiplies_int8(), reason="this processor does not multiply int8")
def test_a_row_whose_values_are_far_apart_is_as_exact_as_in_float32():
    x = torch.randn(9, 300).bfloat16() * 2.0 ** -torch.arange(300.0)[None, :].clamp(max=60)
    x, weight = x.bfloat16(), ints(5, 300)
    expected = x.double() @ weight.double().t()
    y = reference.product_8bit_weight(x, weight, torch.ones(5))
    assert (y - expected).abs().max() <= 2**-22 * 127 * 300 * x.abs().max().double()


@pytest.mark.parametrize("dtype", list(RELATIVE_STEP), ids=str)
def test_rows_are_rounded_in_blocks_as_they_are_at_once(dtype, monkeypatch):
    x = torch.randn(3, 7, 50)
    whole = reference.quantize_rows(x, dtype)
    monkeypatch.setattr(reference, "BLOCK", 120)
    for part, expected in zip(reference.quantize_rows(x, dtype), whole, strict=True):
        assert torch.equal(part.float(), expected.float())


@pytest.mark.parametrize("dtype", list(RELATIVE_STEP), ids=str)
def test_a_row_is_rounded_to_nearest_by_a_scale_of_its_own(dtype):
    x = torch.randn(6, 50) * torch.tensor([1e-3, 1.0, 1e4, 1e-30, 1.0, 0.0])[:, None]
    q, scale = reference.quantize_rows(x, dtype)
    largest = x.abs().amax(1)
    assert torch.equal(q.float().abs().amax(1)[:5], torch.full((5,), reference.MOST[dtype]))
    step = RELATIVE_STEP[dtype] * (largest[:, None] if dtype == torch.int8 else x.abs() + largest[:, None] * 2**-9)
    assert ((q.float() * scale[:, None] - x).abs() <= 1.01 * step).all()
    assert torch.equal(q[5].float(), torch.zeros(50))


def test_half_a_step_goes_to_the_even_neighbour():
    q, _ = reference.quantize_rows(torch.tensor([[0.5, 1.5, -2.5, 127.0]]), torch.int8)
    assert q.tolist() == [[0, 2, -2, 127]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", ["int8", "int8-weights"])
def test_what_is_not_finite_stays_so(value, format):
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    x[1, 3] = value
    layer = QuantizedLinear(nn.Linear(8, 4).bfloat16(), format)
    layer.take(torch.randn(4, 8))
    y = layer(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("format", ["int8", "fp8", "int8-weights"])
def test_a_layer_in_8_bits_is_near_the_one_in_32(format):
    linear, x = nn.Linear(256, 64), torch.randn(3, 5, 256)
    layer = QuantizedLinear(linear, format)
    layer.take(linear.weight.detach())
    apart = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert 0 < apart < {"int8": 0.015, "fp8": 0.05, "int8-weights": 0.01}[format]


def test_nothing_overflows_that_did_not_in_16_bits():
    """Integers times what they are multiplied with are larger than the product; float16 ends at 65504."""
    linear, x = nn.Linear(2560, 32, bias=False), torch.full((1, 2560), 8.0)
    linear.weight.data.fill_(1e-3)
    layer = QuantizedLinear(linear, "int8-weights")
    layer.take(linear.weight.detach())
    assert layer(x.half()).isfinite().all()
    assert layer(x.half())[0, 0] == pytest.approx(20.48, rel=0.01)


def test_a_loaded_layer_is_not_cast():
    layer = QuantizedLinear(nn.Linear(8, 4), "fp8")
    with pytest.raises(TypeError, match="load it anew"):
        layer.to(torch.bfloat16)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_an_engine_quantises_as_it_loads(folder, recipe):
    plain = Engine.from_pretrained(folder, "cpu", "float32")
    engine = Engine.from_pretrained(folder, "cpu", "float32", quantize=recipe)
    observation = plain.example("libero_all", (64, 64))
    expected, actual = (each.infer(observation, seed=0).actions.ravel() for each in (plain, engine))
    assert not np.array_equal(expected, actual)
    assert expected @ actual >= COSINE[recipe] * np.linalg.norm(expected) * np.linalg.norm(actual)
    vlm, head = RECIPES[recipe]
    formats = {
        path: module.format for path, module in engine.model.named_modules() if isinstance(module, QuantizedLinear)
    }
    assert formats["vlm.model.language_model.layers.0.mlp.down_proj"] == vlm
    assert formats["head.dit.layers.0.attn.qkv_proj"] == head
    assert len(formats) == len(quantized_layers(recipe, inference_shapes(ModelConfig.load(folder))))


def test_wrong_arguments(folder):
    with pytest.raises(ValueError, match="expected one of int8, fp8, int8-weights, int8-all, fp8-all, got 'int4'"):
        Engine.from_pretrained(folder, "cpu", quantize="int4")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 1}, "version: expected 2, got 1: make the folder anew"),
        ({"layers": {"dit.layers.0.attn.o_proj": "int4"}}, "expected one of int8, fp8, int8-weights, got 'int4'"),
        ({"layers": {"sink": "int8"}}, "names of layers that can be quantised, got 'sink'"),
        ({"layers": []}, "layers"),
        ({"layers": {}}, "layers: expected at least one"),
        ({"largest": {"sink": [1.0]}}, "largest: expected quantised layers, got 'sink'"),
        ({"layers": {"dit.layers.0.attn.o_proj": "int8"}, "largest": {"dit.layers.0.attn.o_proj": 1.0}}, "a list of"),
        ({"layers": {"dit.layers.0.attn.o_proj": "int8"}, "largest": {"dit.layers.0.attn.o_proj": []}}, "a list of"),
        ({"layers": {"dit.layers.0.attn.o_proj": "fp8"}, "largest": {"dit.layers.0.attn.o_proj": [1, 0]}}, "above 0"),
        ({"recipe": 3}, "recipe"),
    ],
    ids=str,
)
def test_a_file_of_another_kind_is_refused(tmp_path, change, reason):
    told = {
        "version": 2,
        "recipe": "int8",
        "source": "x",
        "source_sha256": "0",
        "layers": {"dit.layers.0.attn.o_proj": "int8"},
    } | change
    (tmp_path / QUANTIZATION_FILE).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=reason) as refused:
        read_quantization(tmp_path)
    assert QUANTIZATION_FILE in str(refused.value)


def test_who_needs_the_weights_themselves_is_told_so(tmp_path):
    told = {
        "version": 2,
        "recipe": "int8",
        "source": "mine",
        "source_sha256": "0",
        "layers": {"dit.layers.0.attn.o_proj": "int8"},
    }
    (tmp_path / QUANTIZATION_FILE).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"is quantised \(recipe int8\).*mine"):
        read_index(tmp_path)
