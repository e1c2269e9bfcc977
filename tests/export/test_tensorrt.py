"""Engines for a GPU that is not here: really built, and what cannot be built is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from tests.export.cases import LIBERO
from xr0_engine.export.layers import Layer, parse_layers, summarise
from xr0_engine.export.onnx import export_onnx
from xr0_engine.export.tensorrt import build_engines
from xr0_engine.exported.manifest import MANIFEST_FILE, EngineManifest, sha256

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs TensorRT for RTX (pip install 'xr0-engine[tensorrt]')",
)


@pytest.fixture
def graphs(exported, tmp_path):
    """The export without its weights: enough for what is refused before they are read."""
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    return folder


@needs_builder
def test_engines_for_a_4090_are_built_without_a_gpu(checkpoint, tmp_path):
    folder = tmp_path / "export"
    export_onnx(checkpoint, LIBERO, "bf16", folder)
    built = build_engines(folder, "rtx4090")
    out = folder / "rtx4090"
    assert built == EngineManifest.read(out)
    assert {path: sha256(path) for path in built.located(out)} == {
        path: record.sha256 for path, record in built.located(out).items()
    }
    assert (built.compute_capability, built.export_sha256) == ("8.9", sha256(folder / MANIFEST_FILE))
    assert set(built.stages) == set(built.facts) == {"vision", "prefill.96", "flow.96"}
    for key, facts in built.facts.items():
        assert facts["engine_bytes"] == (out / f"{key}.engine").stat().st_size > 0
        layers = json.loads((out / f"{key}.layers.json").read_text())
        summary = facts["layers"]
        assert len(layers) >= summary["count"] > summary["fused"] > 0
        assert max(summary["precisions"], key=summary["precisions"].get) == "BFloat16"
    # Strongly typed: what the graph asks for in float32 stays so.
    assert built.facts["flow.96"]["layers"]["precisions"]["Float"] > 0
    operators = {op for layer in json.loads((out / "flow.96.layers.json").read_text()) for op in layer["operators"]}
    assert {"step0.dit.layers.0.attn.Attention.1", "step1.dit.layers.0.attn.Attention.1"} <= operators


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            {"target": "h100"}, ValueError, "target: expected rtx4090, rtx5090, a100 or local; got 'h100'", id="target"
        ),
        pytest.param(
            {"builder": "tvm"}, ValueError, "builder: expected tensorrt-rtx, tensorrt; got 'tvm'", id="builder"
        ),
        pytest.param(
            {"builder": "tensorrt"},
            NotImplementedError,
            "builds on the GPU that it builds for",
            id="tensorrt elsewhere",
        ),
        pytest.param({"stages": ["decode"]}, ValueError, "stages: .* holds vision, .*; got decode", id="stage"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, error, message, graphs):
    with pytest.raises(error, match=message):
        build_engines(**{"folder": graphs, "target": "rtx4090", **arguments})
    assert not (graphs / "rtx4090").exists()


def test_plain_tensorrt_says_what_to_install(graphs):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("it is installed")
    with pytest.raises(RuntimeError, match="tensorrt is not installed: install NVIDIA TensorRT"):
        build_engines(graphs, "local", "tensorrt")


@needs_builder
def test_local_target_needs_a_gpu(graphs):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="target local: torch finds no CUDA GPU here"):
        build_engines(graphs, "local")


@needs_builder
def test_graph_that_the_builder_cannot_read_leaves_nothing(graphs):
    manifest = json.loads((graphs / MANIFEST_FILE).read_text())
    size = manifest["files"]["vision.onnx"]["bytes"]
    (graphs / "vision.onnx").write_bytes(b"\xff" * size)
    with pytest.raises(RuntimeError, match=r"vision\.onnx: the builder cannot read it"):
        build_engines(graphs, "rtx4090", stages=["vision"])
    assert [path.name for path in graphs.iterdir() if path.is_dir()] == []


def test_target_that_exists_is_not_overwritten(graphs):
    (graphs / "rtx4090").mkdir()
    with pytest.raises(ValueError, match="exists; remove it to build again"):
        build_engines(graphs, "rtx4090")


LOG = """Layers:
Name: a, LayerType: gemm, Inputs: [ { Name: x, Datatype: Half }], Constants: [], Outputs: [ { Name: y, Datatype: Half \
}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: up][ONNX Layer: gate]
Name: b, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, EventId: 1, Metadata:\x20

I/O Tensors:
 Name: x"""


def test_layers_are_read_from_the_builders_log():
    layers = parse_layers(["something else", LOG])
    assert layers[0] == Layer("a", "gemm", ("Half",), "t", ("up", "gate"))
    assert summarise(layers) == {
        "count": 1,
        "fused": 1,
        "operators": 2,
        "types": {"gemm": 1},
        "precisions": {"Half": 1},
    }


@pytest.mark.parametrize("log", [[], ["Layers:\nLayer(gemm): a"]], ids=["none", "another form"])
def test_log_in_another_form_is_an_error(log):
    with pytest.raises(RuntimeError, match="does not tell the layers"):
        parse_layers(log)
