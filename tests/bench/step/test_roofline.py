"""The bounds against the project's own design figures, and against plain counting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support import CPU, random_inputs
from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.results import read, write
from xr0_engine.bench.step import ceilings as ceilings_
from xr0_engine.bench.step import roofline
from xr0_engine.bench.step.ceilings import CHIPS, Ceilings
from xr0_engine.bench.step.roofline import bounds_ms, operators
from xr0_engine.bench.step.workload import Workload
from xr0_engine.model.quantization import RECIPES, quantized_layers
from xr0_engine.model.weights import inference_shapes
from xr0_engine.model.xr0 import XR0Model
from xr0_engine.sizes import published_config, tiny_config

LIBERO = Workload(grids=((16, 16),) * 2, tokens=194, chunk_length=10)
BIMANUAL = Workload(grids=((16, 20),) * 3, tokens=315, chunk_length=30)
"""Token counts with Qwen's own tokenizer."""

DESIGN_MS = {
    "LIBERO, H200 bfloat16": (LIBERO, "h200", None, (0.47, 1.84, 0.65, 2.96)),
    "LIBERO, RTX 4090 bfloat16": (LIBERO, "rtx4090", None, (2.2, 8.5, 2.8, 13.4)),
    "bimanual, H200 bfloat16": (BIMANUAL, "h200", None, (0.85, 2.87, 0.68, 4.40)),
    "bimanual, RTX 4090 bfloat16": (BIMANUAL, "rtx4090", None, (4.0, 13.7, 2.9, 20.6)),
    "bimanual, RTX 4090 FP8": (BIMANUAL, "rtx4090", "fp8", (2.1, 7.0, 1.6, 10.6)),
    "bimanual, RTX 4090 INT8": (BIMANUAL, "rtx4090", "int8", (1.4, 4.8, 1.6, 7.8)),
}
"""The project's design goals: vision, prefill, flow, total, in milliseconds. Counting otherwise would move the goal."""
DESIGN_TOLERANCE = 0.03
"""The figures are rounded to two digits, worth up to 3 % alone."""


def by_recipe(recipe: str | None, config=None):
    config = config or published_config()
    return {} if recipe is None else quantized_layers(recipe, inference_shapes(config))


@pytest.mark.parametrize(("work", "chip", "recipe", "figures"), DESIGN_MS.values(), ids=DESIGN_MS)
def test_design_figures(work, chip, recipe, figures):
    bounds = bounds_ms(operators(published_config(), work, "bfloat16", by_recipe(recipe)), CHIPS[chip])
    assert tuple(bounds) == ("vision", "prefill", "flow", "total")
    assert list(bounds.values()) == pytest.approx(figures, rel=DESIGN_TOLERANCE)


def weight_elements(stage: str) -> int:
    found = [op for op in operators(published_config(), BIMANUAL, "bfloat16") if op.stage == stage]
    steps = published_config().head.flow_steps if stage == "flow" else 1
    return sum(op.count * op.weight_bytes for op in found) // steps // 2


def test_weights_are_the_models():
    with torch.device("meta"):
        model = XR0Model(published_config())
    text, visual = model.vlm.model.language_model, model.vlm.model.visual

    def matrices(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.dim() > 1)

    assert weight_elements("prefill") == matrices(text.layers)
    assert weight_elements("vision") == matrices(visual) - visual.pos_embed.weight.numel()
    every_step = [*(layer.attn for layer in model.head.dit.layers), *(layer.mlp for layer in model.head.dit.layers)]
    every_step += [model.head.action_projector, model.head.action_output_layer]
    # The state's projector runs once in five steps.
    assert weight_elements("flow") == matrices(*every_step) + matrices(model.head.state_projector) // 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_of_its_layers_alone(recipe):
    """Arithmetic of 8 bits where rows are rounded; weights of 8 bits, and scales, of every layer that it names."""
    config, layers = published_config(), by_recipe(recipe)
    plain, eight = (operators(config, LIBERO, "bfloat16", some) for some in ({}, layers))
    vlm, head = RECIPES[recipe]
    arithmetic = {"int8": "int8", "fp8": "fp8", "int8-weights": "bfloat16"}
    shapes = inference_shapes(config)
    for before, after in zip(plain, eight, strict=True):
        ends = after.stage == "flow" and after.name.split()[0] in ("state", "actions", "velocity")
        if ends or after.name in ("attention", "patch embedding"):
            assert after == before
            continue
        _, inputs, outputs = after.shape
        assert after.weight_bytes == outputs * (inputs + 4)
        assert after.dtype == arithmetic[head if after.stage == "flow" else vlm]
        assert (after.operations, after.activation_bytes) == (before.operations, before.activation_bytes)
    saved = sum(op.count * op.weight_bytes for op in plain) - sum(op.count * op.weight_bytes for op in eight)
    last = "vlm.model.language_model.layers.35."
    read = {
        layer: config.head.flow_steps if layer.startswith("dit.") else 1
        for layer in layers
        if not layer.startswith(last) or layer.endswith(("k_proj", "v_proj"))
    }
    taken = {layer: shapes[f"{layer}.weight"] for layer in read}
    assert saved == sum(times * (taken[layer][0] * (taken[layer][1] - 4)) for layer, times in read.items())


def test_operations_are_those_that_torch_counts():
    config = tiny_config()
    inputs = replace(random_inputs(config, [[(4, 6), (4, 4)]], [[3, 2, 5]]), preamble_length=0)
    model = XR0Model(config)
    model.allocate(CPU, torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.finish_loading()
    noise = torch.zeros(inputs.action_mask.shape)
    counted = {}
    for stage in roofline.STAGES:
        # torch counts fused attention on some devices only.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            if stage == "vision":
                vision = model.encode_images(inputs)
            elif stage == "prefill":
                kv = model.prefill(inputs, vision)
            else:
                model.sample(kv, inputs.state, noise, noise, torch.zeros(1, dtype=torch.long))
        counted[stage] = counter.get_total_flops()
    found = operators(config, Workload.of(inputs), "float32")
    ours = {s: sum(op.count * op.operations for op in found if op.stage == s) for s in counted}
    # torch counts a causal attention as a whole square.
    tokens = inputs.input_ids.shape[1]
    causal = next(op for op in found if (op.stage, op.name) == ("prefill", "attention"))
    ours["prefill"] += causal.count * causal.operations * (2 * tokens / (tokens + 1) - 1)
    assert ours == pytest.approx(counted)


def test_kept_head_takes_no_rows_but_is_attended_to():
    config = published_config()
    kept = replace(BIMANUAL, preamble_tokens=15)
    whole, rest = (
        {op.name: op for op in operators(config, w, "bfloat16") if op.stage == "prefill"} for w in (BIMANUAL, kept)
    )
    assert rest["QKV"].operations == whole["QKV"].operations * 300 / 315
    alone = next(
        op
        for op in operators(config, replace(BIMANUAL, tokens=15), "bfloat16")
        if (op.stage, op.name) == ("prefill", "attention")
    )
    assert rest["attention"].operations == whole["attention"].operations - alone.operations


def test_batch_streams_the_weights_once():
    config = published_config()
    one = operators(config, BIMANUAL, "bfloat16")
    four = operators(config, replace(BIMANUAL, batch=4, grids=BIMANUAL.grids * 4), "bfloat16")
    for single, batch in zip(one, four, strict=True):
        assert batch.weight_bytes == single.weight_bytes
        assert batch.activation_bytes == 4 * single.activation_bytes
        assert batch.operations == 4 * single.operations


def test_workload_of_inputs():
    inputs = random_inputs(tiny_config(), [[(4, 6)], [(4, 4)]], [[3, 2], [1, 9]], preamble_tokens=4)
    work = Workload.of(inputs)
    assert work == Workload(((4, 6), (4, 4)), inputs.input_ids.shape[1], 30, batch=2, preamble_tokens=4)


def test_limit_and_bound_of_an_operator():
    ceilings = Ceilings("toy", {"float32": 100.0}, 10.0, "datasheet")
    operator = roofline.Operator("flow", "x", 3, 400.0, 10.0, 10.0, "float32")
    assert operator.limit(ceilings) == "arithmetic"
    assert operator.bound_s(ceilings) == 3 * 4.0
    assert replace(operator, operations=1.0).limit(ceilings) == "memory"
    assert replace(operator, operations=1.0).bound_s(ceilings) == 3 * 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: operators(tiny_config(), LIBERO, "int4"), "dtype: expected .*'int4'", id="dtype"),
        pytest.param(lambda: CHIPS["h200"].peak("fp8"), "h200 are known for bfloat16, float16; got 'fp8'", id="peak"),
        pytest.param(
            lambda: ceilings_.ceilings_for("gtx", Setup(CASES["libero"])), "chip: expected here, .*'gtx'", id="chip"
        ),
        pytest.param(lambda: ceilings_.measure_ceilings(CPU, "fp8"), "measured for .*'fp8'", id="measured"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_measured_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr(ceilings_, "COPIED_BYTES", 1000)
    monkeypatch.setitem(ceilings_.MATMUL_SIZE, "cpu", 10)
    ticks = iter(range(1000))
    monkeypatch.setattr(ceilings_.time, "perf_counter", lambda: 0.5 * next(ticks))
    measured = ceilings_.ceilings_for("here", Setup(CASES["libero"], device="cpu", dtype="float32"))
    assert (measured.bytes_s, measured.operations_s) == (2 * 1000 / 0.5, {"float32": 2 * 10**3 / 0.5})
    assert measured.source == "measured"


def test_ceilings_of_int8_are_measured_too(monkeypatch):
    monkeypatch.setattr(ceilings_, "COPIED_BYTES", 1000)
    monkeypatch.setitem(ceilings_.MATMUL_SIZE, "cpu", 16)
    setup = Setup(CASES["libero"], "tiny", device="cpu", dtype="float32", quantize="int8")
    result = roofline.measure(setup, "here", "")
    assert list(result.facts["ceilings"]["operations_s"]) == ["float32", "int8"]
    with pytest.raises(ValueError, match=r"ceilings can be measured for .*'fp8'"):
        roofline.measure(replace(setup, quantize="fp8"), "here", "")


def test_highest_ceilings():
    one = Ceilings("toy", {"float32": 3.0}, 1.0, "measured")
    other = Ceilings("toy", {"float32": 2.0}, 4.0, "measured")
    assert ceilings_.highest(one, other) == Ceilings("toy", {"float32": 3.0}, 4.0, "measured")


@pytest.mark.parametrize(("case", "expected"), [("libero", LIBERO), ("bimanual", BIMANUAL)])
def test_workload_of_case(case, expected):
    setup = Setup(CASES[case], size="4b")
    assert Workload.of_case(setup) == (published_config(), expected)
    # What a robot's later calls compute: less than the bound of the first.
    kept = Workload.of_case(setup, kept=True)[1]
    assert kept == replace(expected, preamble_tokens=CASES[case].preamble_tokens)
    bounds = [bounds_ms(operators(published_config(), work, "bfloat16"), CHIPS["rtx4090"]) for work in (expected, kept)]
    # Of fewer rows, memory limits more products.
    share = 1 - kept.preamble_tokens / kept.tokens
    assert share * bounds[0]["prefill"] < bounds[1]["prefill"] < bounds[0]["prefill"]
    assert [bound["vision"] for bound in bounds] == [bounds[0]["vision"]] * 2


def test_result_and_its_table(tmp_path, capsys):
    setup = Setup(CASES["bimanual"], size="4b", quantize="fp8")
    measured = roofline.measure(setup, "rtx4090", "xr0 bench roofline")
    write(measured, tmp_path / "roofline.json")
    result = read(tmp_path / "roofline.json")
    assert result.facts["bound_ms"]["total"] == pytest.approx(10.692, abs=5e-4)
    assert sum(op["bound_ms"] for op in result.facts["operators"]) == pytest.approx(result.facts["bound_ms"]["total"])
    assert (result.case["tokens"], result.case["chunk_length"], result.case["recipe"]) == (315, 30, "fp8")
    roofline.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    lines = [line.strip() for line in lines]
    assert next(line for line in lines if line.startswith("total")).split()[-3:-1] == ["10.692", "ms"]


def test_table_of_operators(capsys):
    roofline.show(roofline.measure(Setup(CASES["libero"], size="tiny"), "h200", ""), list_operators=True)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    lines = [line.strip() for line in lines]
    listed = [line for line in lines if line.startswith(("vision: ", "prefill: ", "flow: "))]
    assert len(listed) == len(operators(tiny_config(), LIBERO, "bfloat16"))
