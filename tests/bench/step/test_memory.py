"""The memory estimate against what torch's allocator saw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support import CPU, random_inputs
from xr0_engine.bench.step.memory import memory_need, parameters
from xr0_engine.bench.step.workload import Workload
from xr0_engine.model.quantization import RECIPES, quantized_layers
from xr0_engine.model.quantized import put_quantized
from xr0_engine.model.weights import inference_shapes
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.sizes import published_config, tiny_config

ESTIMATE = 0.05
"""Masks, positions and what a library keeps are left out of the estimate."""


def peak_bytes(call: Callable[[], object]) -> tuple[object, int]:
    """What a call returns, and the most that was allocated at once in it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


def allocated(dtype: str, recipe: str | None = None):
    """Inputs of the tiny model, the model, and what its stages allocate on a CPU beside their inputs."""
    config = tiny_config()
    inputs = random_inputs(config, [[(16, 20)] * 3], [[20, 5, 5, 30]], preamble_tokens=0)
    with torch.device("meta"):
        model = XR0Model(config)
        put_quantized(model, in_8bit(recipe))
    model.allocate(CPU, getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * (0.02 if parameter.is_floating_point() else 30))
    model.finish_loading()
    noise = torch.zeros(inputs.action_mask.shape)
    # The first call of a case also makes tables that are kept.
    model.encode_images(inputs)
    vision, of_vision = peak_bytes(lambda: model.encode_images(inputs))
    kv, of_prefill = peak_bytes(lambda: model.prefill(inputs, vision))
    nothing = torch.zeros(1, dtype=torch.long)
    _, of_flow = peak_bytes(lambda: model.sample(kv, inputs.state, noise, noise, nothing))
    if dtype == "float32":
        # On the host and in float32 the patches are the caller's own.
        of_vision += inputs.pixel_values.nbytes
    return inputs, model, vision, kv, [of_vision, of_prefill, of_flow]


def in_8bit(recipe: str | None):
    return {} if recipe is None else quantized_layers(recipe, inference_shapes(tiny_config()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_torch_allocates(dtype):
    inputs, _, vision, kv, taken = allocated(dtype)
    need = memory_need(tiny_config(), Workload.of(inputs), dtype)
    assert list(need.activations.values()) == pytest.approx(taken, rel=ESTIMATE)
    assert need.kv_block == kv.keys.nbytes + kv.values.nbytes
    assert need.vision_tokens == sum(part.nbytes for part in (vision.tokens, *vision.deepstack))


@pytest.mark.parametrize("recipe", RECIPES)
def test_8_bits_hold_their_weights_scales_and_what_rounds(recipe):
    """What GPUs hold is more: a CPU rounds rows in blocks, and widens no weights."""
    inputs, model, _, _, taken = allocated("bfloat16", recipe)
    need = memory_need(tiny_config(), Workload.of(inputs), "bfloat16", in_8bit(recipe))
    assert sum(need.weights.values()) == sum(parameter.nbytes for parameter in model.parameters())
    for held, estimate in zip(taken, need.activations.values(), strict=True):
        assert held * (1 - ESTIMATE) <= estimate <= 2 * held


def test_kept_is_the_adaln_table_and_the_preamble():
    config = tiny_config()
    inputs = random_inputs(config, [[(4, 4)]], [[3, 2]], preamble_tokens=4)
    model = XR0Model(config)
    model.allocate(CPU, torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.finish_loading()
    head = model.preamble(inputs)
    need = memory_need(config, Workload.of(inputs), "float32")
    assert need.kept == head.keys.nbytes + head.values.nbytes + model.head.modulation_table().nbytes


def test_published_model():
    counts = parameters(published_config())
    assert counts["action head"] == 278_458_368
    need = memory_need(published_config(), Workload(((16, 20),) * 3, 315, 30), "bfloat16")
    assert need.weights["action head"] == 2 * counts["action head"]
    assert need.peak - sum(need.weights.values()) < 2**28


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"dtype: expected .*'int8'"):
        memory_need(tiny_config(), Workload(((4, 4),), 10, 30), "int8")
