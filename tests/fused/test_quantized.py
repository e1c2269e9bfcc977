"""Models in 8 bits by our kernels: as the reference computes them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.fused.test_model import MAX_ERROR, TWO_VIEWS, chunk_inputs
from tests.kernels.support import DEVICE
from tests.support import CPU, GOLDEN, make_config, random_inputs
from xr0_engine.bench.measure import ablate
from xr0_engine.bench.step import tune
from xr0_engine.checkpoint import init_checkpoint, write_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.fused import choice
from xr0_engine.fused.choice import Choice, choose, chosen
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.products import refusal_of
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.fused.verdict import Verdict, keep, machine_of, verdicts_on
from xr0_engine.golden.cases import chunk_inputs as golden_chunk
from xr0_engine.golden.cases import golden_config, golden_inputs, load_case
from xr0_engine.model.quantization import RECIPES, format_pairs, formatted_layers, mixed_layers, quantized_layers
from xr0_engine.model.weights import inference_shapes, load_model, read_headers, read_index

OTHER_SIDE = 1.0
"""Of what rounding to 8 bits itself makes of the chunk, root mean square: where rows have 8 bits, a value between two
steps falls to either side by the last bit of what came before, and whoever reads it rounds otherwise. Measured 0.12
with rows of the VLM in 8 bits, 0.54 with the head's too."""
MOST_ROUNDING = 0.15
"""Of the chunk: another model would be further away. float8 makes 0.10 and 0.08 of the narrow golden models', int8 0.03
and 0.04."""


def least_config():
    return make_config(
        text={"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96},
        vision={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "deepstack_layers": (0, 1)},
        head={"num_layers": 2, "hidden_size": 128, "num_kv_heads": 2, "flow_steps": 2, "action_length": 5,
              "local_window": 2, "position_offset": 10},
    )  # fmt: skip


def layers_of(recipe, config):
    return quantized_layers(recipe, inference_shapes(config))


def with_norms_far_from_one(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    model.finish_loading()
    return model


def step_of(model, inputs, chunk):
    return model.sample(model.prefill(inputs, model.encode_images(inputs)), inputs.state, *chunk)


def assert_near(actual, expected, whole, recipe):
    """whole: the chunk in 32 bits."""
    rounding = (expected - whole).norm()
    assert 0 < rounding < MOST_ROUNDING * whole.norm()
    if recipe == "int8-weights":
        torch.testing.assert_close(actual, expected, rtol=0, atol=MAX_ERROR)
    else:
        assert (actual - expected).norm() <= OTHER_SIDE * rounding


def loaded(config, stored, recipe, device):
    """In 8 bits, and in 32."""
    return tuple(
        load_model(config, stored, device, torch.float32, layers) for layers in (layers_of(recipe, config), {})
    )


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_oracles_compute_the_step(tmp_path, recipe):
    """A padded batch of two, a preamble that is kept, pictures of two sizes, in every format."""
    init_checkpoint(tmp_path / "tiny", "tiny")
    config = ModelConfig.load(tmp_path / "tiny")
    models = loaded(config, read_index(tmp_path / "tiny"), recipe, CPU)
    inputs = random_inputs(config, [TWO_VIEWS, TWO_VIEWS], [[3, 4, 5], [1, 2, 2]], 4)
    chunk = chunk_inputs(inputs, config, 2)
    expected, whole = (step_of(with_norms_far_from_one(model), inputs, chunk) for model in models)
    fused = FusedModel(models[0], "reference", TacticTable(""), graphs=False)
    assert_near(fused.step(inputs, *chunk), expected, whole, recipe)
    # The reference shares the weights, and goes on being right: guided flows and kept preambles are its.
    assert_near(step_of(models[0], inputs, chunk), expected, whole, recipe)


@pytest.mark.parametrize("recipe", ["int8-all", "fp8", "int8-weights"])
def test_the_kernels_compute_the_step(tmp_path, recipe):
    pytest.importorskip("triton")
    config = least_config()
    write_checkpoint(tmp_path / "least", config)
    models = loaded(config, read_index(tmp_path / "least"), recipe, DEVICE)
    inputs = random_inputs(config, [[(2, 4)]], [[3, 7]], 4)
    chunk = chunk_inputs(inputs, config, 1)
    expected, whole = (step_of(with_norms_far_from_one(model), inputs, chunk) for model in models)
    # What a table says of the loop is not for weights in 8 bits.
    fused = FusedModel(models[0], "triton", TacticTable("", flow="persistent"), graphs=DEVICE.type == "cuda")
    assert fused.table.flow == "chained"
    assert_near(fused.step(inputs, *chunk), expected, whole, recipe)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden cases are not at {GOLDEN}")
@pytest.mark.parametrize(
    ("name", "case", "recipe"),
    [("grouped", "prefix1", "int8"), ("full_causal", "one_view", "fp8")],
)
def test_the_kernels_compute_golden_models_in_8_bits(name, case, recipe):
    """One step of the flow: interpreted, five take a minute."""
    pytest.importorskip("triton")
    config = golden_config(json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8")))
    config = replace(config, head=replace(config.head, flow_steps=1))
    stored, _ = read_headers([GOLDEN / f"{name}.weights.safetensors"])
    held = load_case(GOLDEN / f"{name}.{case}.safetensors")
    inputs, chunk = golden_inputs(held, config), golden_chunk(held, held["prefix"])
    models = loaded(config, stored, recipe, DEVICE)
    expected, whole = (step_of(model, inputs, chunk) for model in models)
    fused = FusedModel(models[0], "triton", TacticTable(""), graphs=DEVICE.type == "cuda")
    assert_near(fused.step(inputs, *chunk), expected, whole, recipe)


def test_layers_of_one_input_have_one_format():
    config = least_config()
    layers = layers_of("int8", config)
    assert mixed_layers(layers, config.text.num_layers) == []
    attention = "vlm.model.language_model.layers.1.self_attn."
    names = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
    for given in ({**layers, names[0]: "int8-weights"}, {k: v for k, v in layers.items() if k != names[1]}):
        assert mixed_layers(given, config.text.num_layers) == names
        assert "q_proj" in refusal_of(given, config.text.num_layers, 0)
        with pytest.raises(NotImplementedError, match=r"got triton: the kernels multiply .*q_proj"):
            chosen("triton", CPU, config, given)
        assert chosen("reference", CPU, config, given).backend == "reference"
    mlp = {k: v for k, v in layers.items() if k != "dit.layers.0.mlp.up_proj"}
    assert mixed_layers(mlp, config.text.num_layers) == ["dit.layers.0.mlp.gate_proj", "dit.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("recipe", "arch", "words"),
    [("fp8", 80, r"format fp8 .* 8\.9 \(RTX 40"), ("int8", 75, r"format int8 .* 8\.0"), ("fp8", 89, None),
     ("int8", 80, None), ("int8-weights", 75, None), ("fp8", 0, None)],
)  # fmt: skip
def test_a_gpu_without_the_instruction_is_named(monkeypatch, recipe, arch, words):
    config = least_config()
    layers = layers_of(recipe, config)
    monkeypatch.setattr(choice, "capability", lambda device: arch)
    if words is None:
        assert chosen("triton", CPU, config, layers) == Choice("triton", "asked for by name")
    else:
        with pytest.raises(NotImplementedError, match=words):
            chosen("triton", CPU, config, layers)


def test_auto_says_why_it_is_the_reference(monkeypatch, tmp_path):
    init_checkpoint(tmp_path / "tiny", "tiny")
    monkeypatch.setattr(choice, "auto_checks", lambda device: True)
    monkeypatch.setattr(choice, "triton_fault", lambda: None)
    monkeypatch.setattr(choice, "capability", lambda device: 80)
    layers = layers_of("fp8", ModelConfig.load(tmp_path / "tiny"))
    found = choose(CPU, "bfloat16", tmp_path / "tiny", layers, "fp8")
    assert found.backend == "reference"
    assert "8.9" in found.reason


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_format_of_a_part_is_checked(recipe):
    config = least_config()
    names, (vlm, head) = inference_shapes(config), RECIPES[recipe]
    layers = layers_of(recipe, config)
    assert format_pairs(layers) == [(vlm, head)]
    assert formatted_layers((vlm, head), names) == layers
    assert format_pairs({}) == [(None, None)]
    assert format_pairs(formatted_layers((None, head), names)) == [(None, head)]
    # As `auto` leaves them: of the VLM's some weights alone.
    first = next(iter(layers))
    assert format_pairs({**layers, first: "int8-weights"}) == [(each, head) for each in sorted({vlm, "int8-weights"})]


def test_verdicts_of_other_formats_are_others(monkeypatch, tmp_path):
    """And so are those of checkpoints whose layers differ; what was found once is not looked for again."""
    init_checkpoint(tmp_path / "tiny", "tiny")
    asked = []

    def check_now(device, dtype, table, subject):
        asked.append(subject.formats if subject.checkpoint is None else subject.recipe)
        verdict = Verdict("passed", subject.identity(device, dtype, table, config))
        keep(verdict)
        return verdict

    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "auto_checks", lambda device: True)
    monkeypatch.setattr(choice, "triton_fault", lambda: None)
    monkeypatch.setattr(choice, "check_now", check_now)
    config = ModelConfig.load(tmp_path / "tiny")

    def chose(layers, recipe):
        asked.clear()
        assert choose(CPU, "bfloat16", tmp_path / "tiny", layers, recipe).backend == "triton"
        return list(asked)

    weights = layers_of("int8-weights", config)
    assert chose({}, None) == [(None, None), None]
    assert chose(weights, "int8-weights") == [("int8-weights", "int8-weights"), "int8-weights"]
    assert chose(weights, "int8-weights") == []
    of_head = {layer: format for layer, format in weights.items() if layer.startswith("dit.")}
    assert chose(of_head, None) == [(None, "int8-weights"), None]
    assert chose(layers_of("int8", config), "int8") == [("int8", "int8-weights"), "int8"]
    told = {verdict.subject for verdict in verdicts_on(machine_of(CPU))}
    assert "seeded model, bfloat16, int8 and int8-weights" in told
    assert "checkpoint, bfloat16, int8-weights" in told


def test_a_loop_over_weights_in_8_bits_is_refused(tmp_path):
    config = least_config()
    write_checkpoint(tmp_path / "least", config)
    model = load_model(config, read_index(tmp_path / "least"), CPU, torch.float32, layers_of("int8", config))
    fused = FusedModel(model, "reference", TacticTable(""), graphs=False)
    inputs = random_inputs(config, [[(2, 4)]], [[3, 7]], 4)
    session = fused.session(inputs)
    session.update(inputs, *chunk_inputs(inputs, config, 1))
    session.table = replace(session.table, flow="persistent")
    with pytest.raises(NotImplementedError, match="flow persistent: the loop multiplies in 16 bits alone"):
        session.sample()


def test_what_is_tuned_and_ablated_of_it_has_no_loop(tmp_path):
    config = least_config()
    write_checkpoint(tmp_path / "least", config)
    stored = read_index(tmp_path / "least")
    eight, plain = (
        FusedModel(load_model(config, stored, CPU, torch.float32, layers), "reference", TacticTable(""), graphs=False)
        for layers in (layers_of("int8", config), {})
    )
    for model, has_loop in ((eight, False), (plain, True)):
        # What the kernels would have.
        model.backend = "triton"
        assert model.has_loop == has_loop
        assert ("chained flow" in ablate.variants(model)) == has_loop
        assert any("persistent" in name for name in tune._rivals(TacticTable(""), model)) == has_loop
