"""A checkpoint in 8 bits: what the folder holds, what is compared, what a gate refuses, what `auto` leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import xr0_engine
from xr0_engine.cli import app
from xr0_engine.engine import Engine
from xr0_engine.model.quantization import (
    QUANTIZATION_FILE,
    Format,
    mixed_layers,
    quantized_layers,
    read_quantization,
)
from xr0_engine.model.quantized import QuantizedLinear, quantized, rounded
from xr0_engine.model.weights import inference_shapes
from xr0_engine.quantize.fidelity import Fidelity, Spread, as_exported, compare, layers_alone
from xr0_engine.quantize.folder import write_quantized
from xr0_engine.quantize.gate import Gate
from xr0_engine.quantize.make import make
from xr0_engine.quantize.report import JSON_FILE, PAGE_FILE
from xr0_engine.quantize.samples import PREFIX, Moment
from xr0_engine.quantize.search import search
from xr0_engine.training.base import read_base
from xr0_engine.types import CheckpointError, FileError

POLICY = Path(xr0_engine.__file__).parent / "drive" / "aloha_transfer" / "policy"
FEW = 2


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(POLICY, "cpu", "float32", "reference")


@pytest.fixture(scope="module")
def layers(engine) -> dict[str, Format]:
    return quantized_layers("int8", inference_shapes(engine.config))


@pytest.fixture(scope="module")
def moments(engine):
    rng = np.random.default_rng(0)
    observation = engine.example()
    recorded = engine.infer(observation, seed=9).actions
    first = Moment(observation, 0, None, recorded, len(recorded))
    state = observation.state + rng.normal(0, 0.01, observation.state.shape).astype(np.float32)
    other = type(observation)(observation.images, observation.instruction, state, observation.robot_type)
    return [first, Moment(other, 1, recorded[:PREFIX], recorded, 12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("quantised") / "eight"
    assert make(POLICY, out, "int8") is None
    return out


def test_the_folder_loads_as_the_same_engine_that_is_quantised_while_it_loads(folder, engine):
    stored = Engine.from_pretrained(folder, "cpu", "float32", "reference")
    now = Engine.from_pretrained(POLICY, "cpu", "float32", "reference", quantize="int8")
    observation = stored.example()
    chunks = [each.infer(observation, seed=3).actions for each in (stored, now, engine)]
    assert np.array_equal(chunks[0], chunks[1])
    assert not np.array_equal(chunks[0], chunks[2])
    assert stored.backend_reason == "asked for by name"
    size, before = (sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (folder, POLICY))
    assert size < 0.62 * before


def test_the_folder_tells_what_it_was_made_of(folder):
    told = read_quantization(folder)
    assert told is not None
    assert (told.recipe, told.source) == ("int8", "policy")
    recorded = json.loads((POLICY.parents[2] / "evaluation/results/aloha-demo-sync/run.json").read_text())
    assert told.source_sha256 == recorded["policy"]["checkpoint"]


def test_within_a_context_a_model_is_in_8_bits_and_then_as_it_was(engine, layers, folder):
    observation = engine.example()
    before = engine.infer(observation, seed=1).actions
    with quantized(engine.model, layers):
        inside = engine.infer(observation, seed=1).actions
    assert np.array_equal(engine.infer(observation, seed=1).actions, before)
    stored = Engine.from_pretrained(folder, "cpu", "float32", "reference")
    assert np.array_equal(inside, stored.infer(observation, seed=1).actions)


def test_the_comparison_finds_what_was_changed(engine, layers, moments):
    fidelity = compare(engine, layers, moments)
    assert fidelity.moments == FEW
    assert 0.999 < fidelity.cosine.worst < 1
    assert set(fidelity.units) == {"mm", "mrad", "robot units"}
    assert set(fidelity.seam) == {"16 bit", "8 bit", "recorded"}
    parts = {name: spread.mean for name, spread in fidelity.stages.items() if name.startswith("chunk, ")}
    assert all(0 < value < fidelity.stages["chunk"].mean * 2 for value in parts.values())
    none = compare(engine, {}, moments)
    assert none.cosine.worst == pytest.approx(1, abs=1e-12)
    assert none.error.worst == none.stages["chunk"].worst == 0
    # Nothing before the head: what it reads is what it was.
    head = compare(engine, {name: each for name, each in layers.items() if name.startswith("dit.")}, moments)
    assert head.stages["keys for layer 0 of the head"].worst == 0
    assert head.stages["chunk, VLM alone in 8 bit"].worst == 0
    assert head.stages["chunk, head alone in 8 bit"].mean == head.stages["chunk"].mean


def test_each_layer_is_judged_by_itself(engine, layers, moments):
    alone = layers_alone(engine, layers, moments[:1])
    errors = alone.errors
    assert alone.largest.keys() == layers.keys()
    # One for each flow step in the action head, whose ranges differ.
    for layer, values in alone.largest.items():
        assert len(values) == (1 if layer.startswith("vlm.") else engine.config.head.flow_steps)
    assert len(set(alone.largest["dit.layers.0.attn.qkv_proj"])) == engine.config.head.flow_steps
    # The last language layer's keys and values alone are computed.
    assert errors.keys() == layers.keys()
    assert all(0 < spread.mean < 0.03 for spread in errors.values())
    assert not any(isinstance(module, QuantizedLinear) for module in engine.model.modules())


def test_what_an_export_rounds_by_is_judged_too(engine, layers, moments):
    largest = layers_alone(engine, layers, moments).largest
    told = as_exported(engine, layers, largest, moments)
    assert told is not None
    assert 0.99 < told.worst <= told.mean < 1
    # Constants a tenth as large cut nearly everything off.
    cut = {layer: tuple(value / 10 for value in values) for layer, values in largest.items()}
    worse = as_exported(engine, layers, cut, moments)
    assert worse is not None
    assert worse.mean < told.worst
    weights: dict[str, Format] = dict.fromkeys(layers, "int8-weights")
    assert as_exported(engine, weights, largest, moments) is None
    assert not any(isinstance(module, QuantizedLinear) for module in engine.model.modules())


def test_inspect_tells_the_recipe_and_what_it_takes(folder):
    told = []
    for each in (folder, POLICY):
        result = CliRunner().invoke(app, ["inspect", "--json", str(each)])
        assert result.exit_code == 0, result.output
        told.append(json.loads(result.output))
    eight, plain = told
    assert eight["quantization"]["recipe"] == "int8"
    assert plain["quantization"] is None
    assert eight["parameters"]["action head"] == plain["parameters"]["action head"]
    assert eight["memory_bytes"]["bfloat16"] < plain["memory_bytes"]["bfloat16"]
    assert "recipe int8: " in CliRunner().invoke(app, ["inspect", str(folder)]).output


def made_up(cosine=(0.9999, 0.999), seam=(1.0, 1.0), mm=1.0):
    return Fidelity(
        4, Spread(*cosine), Spread(0.01, 0.02), {"mm": Spread(mm / 2, mm)}, {},
        {"16 bit": Spread(seam[0], 1), "8 bit": Spread(seam[1], 1)}, {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "fidelity", "missed"),
    [
        (Gate(), made_up(), []),
        (Gate(), made_up(cosine=(0.9989, 0.998)), ["mean_cosine"]),
        (Gate(), made_up(cosine=(0.9995, 0.994)), ["least_cosine"]),
        (Gate(), made_up(cosine=(float("nan"), 0.999)), ["mean_cosine"]),
        (Gate(), made_up(seam=(1.0, 1.2)), ["seam"]),
        (Gate(mm=0.5, mrad=3), made_up(), ["mm 1", "mrad: the robot's layout"]),
        (Gate(error=0.01), made_up(), ["error 0.02"]),
    ],
    ids=str,
)
def test_a_gate_names_what_is_missed(gate, fidelity, missed):
    found = gate.missed(fidelity)
    assert len(found) == len(missed)
    assert all(actual.startswith(expected) for actual, expected in zip(found, missed, strict=True))


@pytest.mark.parametrize("content", ['{"cosine": 1}', '{"mm": "few"}', "[]", "{"])
def test_a_gate_file_with_something_else_is_refused(tmp_path, content):
    file = tmp_path / "gate.json"
    file.write_text(content)
    with pytest.raises(FileError, match=r"gate\.json"):
        Gate.load(file)


def test_auto_gives_back_no_more_than_it_has_to(engine, layers, moments):
    whole = compare(engine, layers, moments)
    assert search(engine, layers, moments, Gate(0, 0, None)).left == {}
    asked = Gate(0, 0, None, error=whole.error.worst * 0.7)
    found = search(engine, layers, moments, asked)
    assert not asked.missed(found.fidelity)
    assert compare(engine, found.layers, moments).error == found.fidelity.error
    assert len(found.left) > 0
    # The kernels take what it finds.
    assert mixed_layers(found.layers, engine.config.text.num_layers) == []
    # One less, in the order that it goes by, would not have been enough.
    least = min(count for count, missed in found.tried if not missed)
    assert any(count == least - 1 and missed for count, missed in found.tried)
    with pytest.raises(ValueError, match="asks for more than rounding allows"):
        search(engine, layers, moments, Gate(error=0.0))


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """A second of one recorded episode, through the policy's own view."""
    pytest.importorskip("gym_aloha")
    from xr0_engine.training.data.record import Settings, record

    out = tmp_path_factory.mktemp("recorded") / "episodes"
    record(out, 1, 90_000, Settings(width=320, height=240, views=("ego",), seconds=1.0), 1)
    return out


def test_the_command_compares_writes_and_tells(tmp_path, episodes):
    out = tmp_path / "eight"
    words = ["quantize", str(POLICY), "--calibrate", str(episodes), "--moments", "3", "--dtype", "float32"]
    result = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "cosine of the chunks" in result.output
    told = json.loads((out / JSON_FILE).read_text())
    assert told["moments"] == 3
    assert told["bytes_after"] < 0.62 * told["bytes_before"]
    assert told["missed"] == []
    # One in two moments has a prefix, the first has none.
    assert set(told["seam"]) == {"16 bit", "8 bit", "recorded"}
    page = (out / PAGE_FILE).read_text()
    assert "largest difference, mm" in page
    assert "vlm.model.language_model.layers.0.mlp.down_proj" in page
    quantization = read_quantization(out)
    assert quantization is not None
    assert quantization.largest.keys() == quantization.layers.keys()
    assert min(map(min, quantization.largest.values())) > 0
    assert 0.99 < told["exported"]["worst"] <= told["exported"]["mean"] < 1


def test_a_gate_that_is_missed_leaves_nothing(tmp_path, episodes):
    gate = tmp_path / "gate.json"
    gate.write_text('{"error": 0.0}')
    words = ["quantize", str(POLICY), "--calibrate", str(episodes), "--moments", "2", "--dtype", "float32"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "eight"), "--gate", str(gate)])
    assert result.exit_code == 1, result.output
    assert "missed: error" in result.output
    assert [each.name for each in tmp_path.iterdir()] == ["gate.json"]


def test_what_was_compared_in_16_bits_is_what_is_written(tmp_path):
    """A checkpoint in 32 bits, whose weights the comparison had rounded to 16."""

    def widen(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.float() * (1 + 2**-10)

    source = changed(POLICY, tmp_path / "source", widen)
    layers: dict[str, Format] = {"dit.layers.0.attn.o_proj": "int8"}
    for name, dtype in (("compared", torch.bfloat16), ("stored", None)):
        (tmp_path / name).mkdir()
        write_quantized(source, tmp_path / name, "int8", layers, dtype=dtype)
    weight = load_file(next(source.glob("*.safetensors")))["dit.layers.0.attn.o_proj.weight"]
    expected, _ = rounded(weight.bfloat16(), "int8")
    compared, stored = (
        load_file(next((tmp_path / name).glob("*.safetensors")))["dit.layers.0.attn.o_proj.weight"]
        for name in ("compared", "stored")
    )
    assert torch.equal(compared, expected)
    assert not torch.equal(stored, expected)


def test_wrong_input_is_refused_before_anything_is_written(tmp_path, folder):
    run, out = CliRunner().invoke, str(tmp_path / "out")
    for words, told in (
        ([str(POLICY), "--out", out, "--recipe", "int4"], "expected one of int8, fp8, int8-weights"),
        ([str(POLICY), "--out", out, "--recipe", "auto"], "--calibrate"),
        ([str(POLICY), "--out", out, "--gate", "x.json"], "--calibrate"),
        ([str(folder), "--out", out], "is quantised (recipe int8)"),
        ([str(POLICY), "--out", str(folder)], "is not empty"),
        ([str(POLICY), "--out", out, "--calibrate", str(tmp_path / "nowhere")], "nowhere"),
    ):
        result = run(app, ["quantize", *words])
        assert result.exit_code == 2, result.output
        assert told in result.output.replace("\n", " ")
        assert not Path(out).exists()


def changed(folder, out, change):
    shutil.copytree(folder, out)
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (out / "model.safetensors.index.json").unlink()
    return out


def test_damaged_folders_are_refused(tmp_path, folder):
    layer = "dit.layers.0.attn.o_proj"

    def load(out):
        with pytest.raises(CheckpointError) as refused:
            Engine.from_pretrained(out, "cpu", "float32", "reference")
        return str(refused.value)

    missing = changed(folder, tmp_path / "a", lambda tensors: tensors.pop(f"{layer}.weight_scale"))
    assert f"missing {layer}.weight_scale" in load(missing)

    def wide(tensors):
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.bfloat16)

    assert f"{layer}.weight has dtype torch.bfloat16, expected torch.int8" in load(
        changed(folder, tmp_path / "b", wide)
    )

    def eight(tensors):
        tensors["sink.weight"] = tensors["sink.weight"].to(torch.int8)

    assert "sink.weight has dtype torch.int8" in load(changed(folder, tmp_path / "c", eight))
    quantization = json.loads((folder / QUANTIZATION_FILE).read_text())
    del quantization["layers"][layer]
    other = shutil.copytree(folder, tmp_path / "d")
    (other / QUANTIZATION_FILE).write_text(json.dumps(quantization))
    assert f"{layer}.weight" in load(other)
    quantization["layers"]["dit.layers.99.attn.o_proj"] = "int8"
    (other / QUANTIZATION_FILE).write_text(json.dumps(quantization))
    assert "not of the model that config.json describes" in load(other)
    (other / QUANTIZATION_FILE).unlink()
    assert "has dtype I8" in load(other)
    with pytest.raises(CheckpointError, match="has dtype I8"):
        Engine.from_pretrained(other, "cpu", "float32", "reference", quantize="int8")
    shutil.copy(folder / QUANTIZATION_FILE, shutil.copytree(POLICY, tmp_path / "e"))
    assert "missing vlm.model.visual.blocks.0.attn.qkv.weight_scale" in load(tmp_path / "e")


def test_weights_that_are_not_finite_are_not_quantised(tmp_path):
    def spoil(tensors):
        tensors["dit.layers.0.attn.o_proj.weight"][3, 3] = float("nan")

    source = changed(POLICY, tmp_path / "source", spoil)
    with pytest.raises(CheckpointError, match=r"dit.layers.0.attn.o_proj.weight: expected finite"):
        make(source, tmp_path / "out", "int8-weights")
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_who_trains_or_converts_is_sent_to_the_source(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is quantised \(recipe int8\).*policy"):
        read_base(folder)
    words = ["convert", str(folder), "--to", "released-pt", "--out", str(tmp_path / "x.pt")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "is quantised (recipe int8)" in result.output.replace("\n", " ")
