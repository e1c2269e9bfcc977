"""Exports of checkpoints in 8 bits: the reference's integers, stages that agree, and what cannot be expressed."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from xr0_engine.bench.cases import CASES
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.export.agreement import compare_export, compare_stages
from xr0_engine.export.engines import build_engines
from xr0_engine.export.folder import export_onnx
from xr0_engine.export.inputs import INSTRUCTION, observations
from xr0_engine.exported.manifest import ExportCase
from xr0_engine.exported.model import ExportedModel
from xr0_engine.kernels import reference
from xr0_engine.model.quantization import quantized_layers, read_quantization
from xr0_engine.model.quantized import round_by
from xr0_engine.model.weights import inference_shapes, load_model, read_index
from xr0_engine.quantize.fidelity import layers_alone
from xr0_engine.quantize.folder import write_quantized
from xr0_engine.quantize.samples import Moment
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.types import CheckpointError

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)
SAME_SUMS = 1e-6
"""Of the largest: equal integers, and two scales that are multiplied in another order."""
LIBERO = CASES["libero"]
CASE = ExportCase(LIBERO.name, LIBERO.robot_type, LIBERO.image_size, LIBERO.batch, LIBERO.profile)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def folder(plain):
    engine = Engine.from_pretrained(plain, "cpu", "float32", "reference")
    layers = quantized_layers("int8", inference_shapes(engine.config))
    observation = engine.example(CASE.robot_type, CASE.image_size)
    recorded = engine.infer(observation, seed=0).actions
    alone = layers_alone(engine, layers, [Moment(observation, 0, None, recorded, len(recorded))])
    out = plain.parent / "eight"
    out.mkdir()
    write_quantized(plain, out, "int8", layers, alone.largest)
    return out


@pytest.fixture(scope="module")
def export(folder):
    out = folder.parent / "onnx"
    export_onnx(folder, CASE, "fp32", out)
    return out


def test_onnx_runtime_has_the_reference_s_integers_and_sums():
    generator = torch.Generator().manual_seed(0)
    rows, columns, outputs = 64, 2000, 96
    x, w = (torch.randn(*shape, generator=generator) for shape in ((rows, columns), (outputs, columns)))
    weight, scales = reference.quantize_rows(w, torch.int8)
    # What is beyond the largest that was seen is cut off.
    scale = x.abs().max() / 2 / 127
    constants = {"s": scale, "z": torch.tensor(0, dtype=torch.int8), "w": weight, "ws": scales}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        helper.make_node("Gemm", ["d", "wd"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, columns])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs]),
            helper.make_tensor_value_info("q", TensorProto.INT8, [rows, columns]),
        ],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, q = session.run(None, {"x": x.numpy()})
    ours = reference.quantize_by(x, scale)
    assert np.array_equal(q, ours.numpy())
    assert {ours.min().item(), ours.max().item()} == {-128, 127}
    expected = reference.product_8bit(ours, scale.expand(rows), weight, scales).numpy()
    assert np.abs(y - expected).max() <= SAME_SUMS * np.abs(expected).max()


def test_every_stage_agrees_with_the_reference_that_rounds_alike(export):
    found = list(compare_export(export, None, "cpu", "onnx"))
    assert {comparison.case for comparison in found} >= {"vision", "files"}
    assert all(comparison.passed for comparison in found), found
    # The head multiplies by 8-bit weights in 32 bits: to the last bits of float32.
    assert all(each.error < 1e-5 for each in found if each.case.startswith("flow."))


def test_a_wrong_scale_in_one_layer_is_found(export, folder):
    quantization = read_quantization(folder)
    assert quantization is not None
    model = ExportedModel.load(export, "cpu", "onnx")
    preprocess = Preprocessor.load(folder)
    stored = read_index(folder, quantized=True)
    reference_model = load_model(preprocess.config, stored, model.device, model.dtype, quantization.layers, True)
    layer = "vlm.model.visual.blocks.0.mlp.linear_fc1"
    round_by(reference_model, {**quantization.largest, layer: quantization.largest[layer] / 4})
    inputs = preprocess(observations(preprocess, CASE, [INSTRUCTION]))
    found = list(compare_stages(model, reference_model, inputs, rounds=True))
    assert not next(each for each in found if each.quantity == "vision_tokens").passed


def test_layers_that_share_an_input_round_it_once(export):
    graph = onnx.load(next(export.glob("prefill*.onnx")), load_external_data=False).graph
    rounded = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == len(set(rounded))
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0].endswith(".weight")]
    assert len(weights) == sum(node.op_type == "Gemm" for node in graph.node) > len(rounded)
    types = {initializer.name: initializer.data_type for initializer in graph.initializer}
    assert {types[node.input[0]] for node in weights} == {TensorProto.INT8}


@needs_builder
def test_an_engine_multiplies_in_8_bits_where_rows_have_them(folder):
    graphs = folder.parent / "fp16"
    export_onnx(folder, CASE, "fp16", graphs, stages=("vision", "flow"))
    facts = build_engines(graphs, "rtx4090", "tensorrt-rtx", ("vision", "flow")).facts
    vision, flow = facts["vision"]["layers"], next(each["layers"] for key, each in facts.items() if "flow" in key)
    # All but the embedding of patches.
    assert vision["eight_bit_rows"] == vision["eight_bit"] == vision["products"] - 1
    # Widened by kernels of their own.
    assert flow["products"] > flow["eight_bit"] == 0


def test_what_an_export_cannot_express_is_refused(plain, tmp_path):
    config_shapes = inference_shapes(Preprocessor.load(plain).config)
    for recipe, largest, reason in (("fp8", {}, "float8 are not exported"), ("int8", {}, "xr0 quantize --calibrate")):
        out = tmp_path / recipe
        out.mkdir()
        write_quantized(plain, out, recipe, quantized_layers(recipe, config_shapes), largest)
        with pytest.raises(CheckpointError, match=reason):
            export_onnx(out, CASE, "fp32", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_scale_that_float16_has_not_is_refused(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "tiny-weights")
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    name = "dit.layers.0.attn.o_proj.weight_scale"
    tensors[name][3] = 1e-9
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"dit.layers.0.attn.o_proj.weight_scale: a scale of 1e-09"):
        export_onnx(out, CASE, "fp16", tmp_path / "onnx", stages=("flow",))
    export_onnx(out, CASE, "fp32", tmp_path / "onnx", stages=("flow",))


@pytest.mark.parametrize("stage", ["vision", "prefill"])
def test_8_bit_weights_alone_are_exact(plain, tmp_path, stage):
    out = tmp_path / "weights"
    out.mkdir()
    shapes = inference_shapes(Preprocessor.load(plain).config)
    write_quantized(plain, out, "int8-weights", quantized_layers("int8-weights", shapes))
    export_onnx(out, CASE, "fp32", tmp_path / "onnx", stages=(stage,))
    found = list(compare_export(tmp_path / "onnx", None, "cpu", "onnx"))
    assert len(found) > 2
    assert all(comparison.passed for comparison in found), found
