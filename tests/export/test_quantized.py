"""Exports of checkpoints in 8 bits: the reference's integers, stages that agree, and what cannot be expressed."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from tests.export.cases import LIBERO as LIBERO_64
from xr0_engine.bench.cases import CASES
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.comparison import ROUNDED_ERROR
from xr0_engine.engine import Engine
from xr0_engine.export.agreement import compare_export, compare_stages, rounding_of
from xr0_engine.export.engines import build_engines
from xr0_engine.export.folder import export_onnx
from xr0_engine.export.inputs import INSTRUCTION, observations
from xr0_engine.exported.manifest import ExportCase
from xr0_engine.exported.model import ExportedModel
from xr0_engine.kernels import reference
from xr0_engine.model.quantization import MOST, QUANTIZATION_FILE, quantized_layers, read_quantization
from xr0_engine.model.quantized import module_path, quantized, round_by, rounded_by
from xr0_engine.model.weights import inference_shapes, load_model, read_index
from xr0_engine.model.xr0 import XR0Model
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


def quantise(source, out, recipe, case):
    """What `xr0 quantize --calibrate` writes, of one moment that is made up."""
    engine = Engine.from_pretrained(source, "cpu", "float32", "reference")
    layers = quantized_layers(recipe, inference_shapes(engine.config))
    observation = engine.example(case.robot_type, case.image_size)
    recorded = engine.infer(observation, seed=0).actions
    alone = layers_alone(engine, layers, [Moment(observation, 0, None, recorded, len(recorded))])
    out.mkdir()
    write_quantized(source, out, recipe, layers, alone.largest)
    return out


@pytest.fixture(scope="module")
def folder(plain):
    return quantise(plain, plain.parent / "eight", "int8", CASE)


@pytest.fixture(scope="module")
def export(folder):
    out = folder.parent / "onnx"
    export_onnx(folder, CASE, "fp32", out)
    return out


@pytest.fixture(scope="module", params=["int8-all", "fp8-all"])
def whole(request, plain):
    """Rows of the action head in 8 bits too: a folder, its recipe, and its export."""
    made = quantise(plain, plain.parent / request.param, request.param, CASE)
    out = plain.parent / f"{request.param}-onnx"
    export_onnx(made, CASE, "fp32", out)
    return made, request.param, out


@pytest.fixture(scope="module", params=["int8-all", "fp8-all"])
def small(request, checkpoint, tmp_path_factory):
    """As `whole`, of a model with one layer in the head and two flow steps."""
    return quantise(checkpoint, tmp_path_factory.mktemp("small") / request.param, request.param, LIBERO_64)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_onnx_runtime_rounds_to_float8_as_the_reference(dtype):
    """Every value that has two neighbours as near, what is beyond the largest, and what is below the least."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat((numbers, between, torch.tensor([449.0, 464.0, 480.0, 6e4, 2.0**-12])))
    # A power of two: nothing but rounding to float8.
    x, scale = torch.cat((x, -x)).to(dtype)[None] / 4, torch.tensor(0.25, dtype=dtype)
    number = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}[dtype]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "rounding",
        [helper.make_tensor_value_info("x", number, list(x.shape))],
        [helper.make_tensor_value_info("y", number, list(x.shape))],
        [
            numpy_helper.from_array(scale.numpy(), "s"),
            helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    ours = rounded_by(x, scale, "fp8").to(dtype) * scale
    assert np.array_equal(y, ours.numpy())
    assert ours.abs().max() == MOST["fp8"] / 4


def test_every_stage_agrees_with_the_reference_that_rounds_alike(export):
    found = list(compare_export(export, None, "cpu", "onnx"))
    assert {comparison.case for comparison in found} >= {"vision", "files"}
    assert all(comparison.passed for comparison in found), found
    # The head multiplies by 8-bit weights in 32 bits: to the last bits of float32.
    assert all(each.error < 1e-5 for each in found if each.case.startswith("flow."))


def test_every_stage_agrees_where_the_head_rounds_rows_too(whole):
    _, recipe, out = whole
    found = list(compare_export(out, None, "cpu", "onnx"))
    assert all(comparison.passed for comparison in found), found
    rounding = {each.case: each.tolerance for each in found}
    assert rounding[next(case for case in rounding if case.startswith("flow."))] == ROUNDED_ERROR[recipe[:-4]]


def compare_by(folder, export, change):
    """Its stages against the reference rounding by constants that were changed."""
    quantization = read_quantization(folder)
    assert quantization is not None
    model = ExportedModel.load(export, "cpu", "onnx")
    preprocess = Preprocessor.load(folder)
    stored = read_index(folder, quantized=True)
    reference_model = load_model(preprocess.config, stored, model.device, model.dtype, quantization.layers, True)
    round_by(reference_model, {layer: change(layer, values) for layer, values in quantization.largest.items()})
    inputs = preprocess(observations(preprocess, CASE, [INSTRUCTION]))
    return list(compare_stages(model, reference_model, inputs, rounding_of(quantization.layers)))


def test_a_wrong_scale_in_one_layer_is_found(export, folder):
    def quarter(layer, values):
        return (values[0] / 4,) if layer == "vlm.model.visual.blocks.0.mlp.linear_fc1" else values

    found = compare_by(folder, export, quarter)
    assert not next(each for each in found if each.quantity == "vision_tokens").passed


def test_the_reference_rounds_each_flow_step_by_its_own_constant(plain):
    engine = Engine.from_pretrained(plain, "cpu", "float32", "reference")
    model, steps = engine.model, engine.config.head.flow_steps
    assert isinstance(model, XR0Model)
    layers = {"dit.layers.1.mlp.down_proj": "int8", "vlm.model.language_model.layers.0.mlp.down_proj": "fp8"}
    asked: dict[str, list[float]] = {layer: [] for layer in layers}
    observation = engine.example(CASE.robot_type, CASE.image_size)
    with quantized(model, layers):
        constants = tuple(1.0 + step for step in range(steps))
        round_by(model, dict(zip(layers, (constants, (9.0,)), strict=True)))
        for layer, seen in asked.items():
            stands_in = model.get_submodule(module_path(layer))
            stands_in.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module.largest()))
        for _ in range(2):
            engine.infer(observation, seed=0)
    head, text = asked.values()
    assert head == [*constants, *constants]
    assert set(text) == {9.0}


def test_the_graph_holds_a_constant_for_each_layer_and_step(whole):
    made, recipe, out = whole
    quantization = read_quantization(made)
    assert quantization is not None
    graph = onnx.load(next(out.glob("flow*.onnx")), load_external_data=False).graph
    constants = {each.name: each for each in graph.initializer}
    nodes = {node.output[0]: node for node in graph.node}
    format = recipe.removesuffix("-all")
    layers = [layer for layer in quantization.layers if layer.startswith("dit.")]
    steps = Preprocessor.load(made).config.head.flow_steps
    seen = 0
    for node in graph.node:
        step, _, rest = node.name.partition(".")
        layer = rest.rpartition(".Gemm.")[0]
        if node.op_type != "Gemm" or layer not in layers:
            continue
        back = nodes[node.input[0]]
        down = nodes[back.input[0]]
        assert (down.op_type, back.op_type) == ("QuantizeLinear", "DequantizeLinear")
        assert down.input[1:] == back.input[1:]
        scale, zero = (constants[name] for name in down.input[1:])
        expected = quantization.largest[layer][int(step.removeprefix("step"))] / MOST[format]
        assert numpy_helper.to_array(scale) == np.float32(expected)
        assert zero.data_type == {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[format]
        seen += 1
    assert seen == len(layers) * steps


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


@needs_builder
def test_an_engine_multiplies_in_8_bits_in_the_flow_too(small, tmp_path):
    graphs = tmp_path / "bf16"
    export_onnx(small, LIBERO_64, "bf16", graphs, stages=("flow",))
    facts = next(iter(build_engines(graphs, "rtx4090", "tensorrt-rtx", ("flow",)).facts.values()))["layers"]
    # Gate and up are one.
    kernels, steps = 4, 2
    assert facts["eight_bit"] == facts["eight_bit_rows"] == kernels * steps
    # Projectors and output layer stay as they are; the state's projector runs once.
    assert facts["products"] == (kernels + 4) * steps + 2
    parts = ("action_projector", "state_projector", "action_output_layer")
    assert set(facts["in_16"]) == {f"{part}.layers.{index}" for part in parts for index in (0, 2)}


@needs_builder
def test_float8_is_not_for_a_gpu_that_lacks_it(small, tmp_path):
    graphs = tmp_path / "bf16"
    export_onnx(small, LIBERO_64, "bf16", graphs, stages=("vision",))
    if small.name == "int8-all":
        assert build_engines(graphs, "a100", stages=("vision",)).facts["vision"]["layers"]["eight_bit_rows"] > 0
        return
    with pytest.raises(NotImplementedError, match=r"vision.onnx holds float8, .*a100 has 8.0: .* recipe int8"):
        build_engines(graphs, "a100", stages=("vision",))
    assert not (graphs / "a100").exists()


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-all"])
def test_an_export_of_what_was_not_compared_is_refused(plain, tmp_path, recipe):
    made, out = tmp_path / recipe, tmp_path / "onnx"
    made.mkdir()
    write_quantized(plain, made, recipe, quantized_layers(recipe, inference_shapes(Preprocessor.load(plain).config)))
    with pytest.raises(CheckpointError, match=r"quantization.json: largest: \d+ layers, .*xr0 quantize --calibrate"):
        export_onnx(made, CASE, "fp32", out)
    assert [each.name for each in tmp_path.iterdir()] == [recipe]


@pytest.mark.parametrize(
    ("layer", "values", "told"),
    [
        ("dit.layers.0.attn.o_proj", [1.0], "expected 2 magnitudes, one for each flow step; got 1"),
        ("dit.layers.0.attn.o_proj", [1.0] * 5, "expected 2 magnitudes, one for each flow step; got 5"),
        ("vlm.model.visual.blocks.0.attn.qkv", [1.0, 2.0], "expected one magnitude; got 2"),
    ],
)
def test_constants_of_another_number_of_steps_are_refused(small, tmp_path, layer, values, told):
    made, out = shutil.copytree(small, tmp_path / "made"), tmp_path / "onnx"
    content = json.loads((made / QUANTIZATION_FILE).read_text())
    content["largest"][layer] = values
    (made / QUANTIZATION_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"quantization.json: largest, {layer}: {told}: make it with"):
        export_onnx(made, LIBERO_64, "fp32", out)
    assert not out.exists()


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
