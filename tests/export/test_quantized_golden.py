"""Golden models in 8 bits through ONNX Runtime: as the reference that rounds by the same constants."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from tests.export.test_folder import SPARE_TOKENS
from tests.support import CPU, GOLDEN
from xr0_engine.comparison import ROUNDED_ERROR, relative_rms
from xr0_engine.export.folder import STAGES, write_graphs
from xr0_engine.exported.manifest import ExportCase, Manifest, StaticShapes
from xr0_engine.exported.model import ExportedModel
from xr0_engine.exported.onnx_stage import OnnxStage
from xr0_engine.golden.cases import chunk_inputs, golden_config, golden_inputs, load_case
from xr0_engine.model.quantization import Quantization, quantized_layers
from xr0_engine.model.quantized import module_path, round_by
from xr0_engine.model.weights import QUANTIZED_DTYPES, inference_shapes, load_model, read_headers

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden cases are not at {GOLDEN}")


def run(network, inputs, chunk):
    vision = network.encode_images(inputs)
    kv = network.prefill(inputs, vision)
    tokens = inputs.input_ids.shape[1]
    keys, values = (part[..., -tokens:, :] for part in (kv.keys, kv.values))
    actions = network.sample(kv, inputs.state, *chunk)
    return {"vision": vision.tokens, "keys": keys, "values": values, "actions": actions}


def largest_inputs(model, layers, work):
    """Of each layer, of the head's at each flow step."""
    steps = model.config.head.flow_steps
    seen = {layer: [0.0] * (1 if layer.startswith("vlm.") else steps) for layer in layers}

    def note(layer, module, given, out):
        place = 0 if len(seen[layer]) == 1 else model.head.step
        seen[layer][place] = max(seen[layer][place], float(given[0].abs().max()))

    handles = [model.get_submodule(module_path(layer)).register_forward_hook(partial(note, layer)) for layer in layers]
    work()
    for handle in handles:
        handle.remove()
    return {layer: tuple(values) for layer, values in seen.items()}


@pytest.mark.parametrize(
    ("name", "case", "recipe"), [("grouped", "prefix1", "int8-all"), ("full_causal", "one_view", "fp8-all")]
)
def test_a_golden_model_in_8_bits_through_onnx_runtime(tmp_path, name, case, recipe):
    config = golden_config(json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8")))
    stored, _ = read_headers([GOLDEN / f"{name}.weights.safetensors"])
    held = load_case(GOLDEN / f"{name}.{case}.safetensors")
    inputs, chunk = golden_inputs(held, config), chunk_inputs(held, held["prefix"])
    layers = quantized_layers(recipe, inference_shapes(config))
    whole = load_model(config, stored, CPU, torch.float32)
    # Called one by one: joined layers have no input of their own.
    largest = largest_inputs(whole, layers, lambda: run(whole, inputs, chunk))
    eight = load_model(config, stored, CPU, torch.float32, layers)
    tensors = {n.removeprefix("head."): p.data.contiguous() for n, p in eight.named_parameters()}
    save_file(tensors, tmp_path / "eight.safetensors")
    in_8bit, _ = read_headers([tmp_path / "eight.safetensors"], QUANTIZED_DTYPES)
    batch, tokens = inputs.input_ids.shape
    shapes = StaticShapes(inputs.image_grids, batch, inputs.action_mask.shape[1], (tokens + SPARE_TOKENS,))
    quantization = Quantization(recipe, layers, largest=largest)
    files = write_graphs(config, in_8bit, shapes, "fp32", tmp_path, tuple(STAGES), {}, quantization)
    manifest = Manifest("fp32", 0, ExportCase(name, name, (0, 0), batch), shapes, (), "", "", files, {})
    exported = ExportedModel(
        config, manifest, CPU, "onnx", files, lambda key: OnnxStage(tmp_path / files[key], CPU), {}
    )
    round_by(eight, largest)
    expected, plain = run(eight, inputs, chunk), run(whole, inputs, chunk)
    for quantity, value in run(exported, inputs, chunk).items():
        error = relative_rms(value, expected[quantity])
        # What is left of rounding that falls to either side, and less than what rounding itself makes.
        assert error <= ROUNDED_ERROR[recipe.removesuffix("-all")], quantity
        assert error < relative_rms(expected[quantity], plain[quantity]), quantity
