"""The golden cases, and that a wrong model does not pass them."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support import GOLDEN
from xr0_engine import golden
from xr0_engine.cli import app
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.golden import golden_config, verify_folder

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden cases are not at {GOLDEN}")

QUANTITIES = {"vision tokens", "KV block", "flow trace", "actions", "velocity", "losses"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_golden_case_passes(dtype):
    comparisons = list(verify_folder(GOLDEN, "reference", "cpu", dtype))
    assert [c for c in comparisons if not c.passed] == []
    files = {path.stem for path in GOLDEN.glob("*.*.safetensors") if not path.stem.endswith(".weights")}
    quantities = {name: {c.quantity for c in comparisons if c.case == name} for name in files}
    assert all(found >= QUANTITIES for found in quantities.values()), quantities
    assert {"L1 error"} <= quantities["grouped.prefix4_two_views"]
    seeded = {c.case for c in comparisons} - files
    assert len(seeded) == sum(len(load_file(p.with_suffix(".safetensors"))) for p in GOLDEN.glob("*.py")) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_golden_case_passes_on_a_gpu(dtype):
    comparisons = list(verify_folder(GOLDEN, "reference", "cuda", dtype))
    assert comparisons
    assert [c for c in comparisons if not c.passed] == []


@pytest.fixture
def one_case(tmp_path):
    """A folder with the smallest model and one case, to tamper with."""
    for name in ("grouped.json", "grouped.weights.safetensors", "grouped.prefix1.safetensors"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def failures(folder):
    return {c.quantity for c in verify_folder(folder, "auto", "cpu", "float32") if not c.passed}


def test_one_wrong_weight_fails(one_case):
    path = one_case / "grouped.weights.safetensors"
    weights = load_file(path)
    weights["dit.layers.2.attn.o_proj.weight"][3, 5] += 0.5
    save_file(weights, path)
    assert failures(one_case) == {"flow trace", "actions", "velocity", "L1 error", "losses"}


@pytest.mark.parametrize(
    ("field", "value"), [("local_window", 5), ("local_window", None), ("position_offset", 9), ("flow_steps", 4)]
)
def test_wrong_mode_fails(one_case, field, value):
    path = one_case / "grouped.json"
    golden = json.loads(path.read_text())
    golden["action_head"][field] = value
    path.write_text(json.dumps(golden))
    assert failures(one_case) >= {"flow trace", "actions"}


def test_command_exits_with_1_and_names_the_failure(one_case):
    path = one_case / "grouped.prefix1.safetensors"
    case = load_file(path)
    case["actions"][0, 5, 2] += 0.01
    save_file(case, path)
    result = CliRunner().invoke(app, ["verify", str(one_case), "--json"])
    assert result.exit_code == 1
    wrong = [row for row in json.loads(result.stdout) if not row["passed"]]
    assert [(row["case"], row["quantity"]) for row in wrong] == [("grouped.prefix1", "actions")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], "holds no golden cases"),
        ([str(GOLDEN), "--dtype", "int8"], "dtype: expected bfloat16, float16, float32; got 'int8'"),
        ([str(GOLDEN), "--backend", "magic"], "backend: expected auto, reference"),
        ([str(GOLDEN), "--device", "cuda:7"], "CUDA GPUs that torch can use"),
    ],
    ids=["no-folder", "no-cases", "dtype", "backend", "device"],
)
def test_wrong_call_exits_with_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["verify", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("way", "backend", "kind", "message"),
    [
        ("sideways", "triton", ValueError, "way: expected one of table, chained, layered, persistent, overlap, "),
        ("chained", "reference", ValueError, "way: backend 'reference' has one way alone, got 'chained'"),
        ("overlap", "triton", NotImplementedError, "way 'overlap': it takes two streams of a CUDA GPU"),
    ],
)
def test_way_that_cannot_be_is_refused(way, backend, kind, message, monkeypatch):
    monkeypatch.setattr(golden, "resolve_backend", lambda name, device: name)
    with pytest.raises(kind, match=message):
        list(verify_folder(GOLDEN, backend, "cpu", "float32", way))


@pytest.mark.parametrize(
    ("way", "flow", "overlap", "dependent"),
    [
        ("table", "persistent", True, True),
        ("chained", "chained", False, True),
        ("layered", "layered", False, True),
        ("persistent", "persistent", False, True),
        ("separate", "chained", False, False),
    ],
)
def test_the_flow_runs_as_the_way_says(way, flow, overlap, dependent, one_case, monkeypatch):
    """What the model and its launches are told, where a backend has kernels of its own."""
    launch = pytest.importorskip("xr0_engine.kernels.launch")
    tables = []

    class Told(golden.FusedModel):
        def __init__(self, model, backend, table, graphs):
            tables.append((table.flow, table.overlap, launch._dependent))
            super().__init__(model, "reference", TacticTable(""), graphs)

    monkeypatch.setattr(golden, "resolve_backend", lambda name, device: name)
    monkeypatch.setattr(golden, "tactics_for", lambda device: TacticTable("", overlap=True, flow="persistent"))
    monkeypatch.setattr(golden, "FusedModel", Told)
    comparisons = list(verify_folder(one_case, "triton", "cpu", "float32", way))
    assert [each for each in comparisons if not each.passed] == []
    assert tables == [(flow, overlap, dependent)]
    assert launch._dependent


def test_truncated_weights_are_named(one_case):
    path = one_case / "grouped.weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"grouped\.weights\.safetensors is truncated or corrupt"):
        list(verify_folder(one_case, "auto", "cpu", "float32"))


def test_golden_configuration_reads_both_modes():
    configs = {p.stem: golden_config(json.loads(p.read_text())) for p in GOLDEN.glob("*.json")}
    assert (configs["grouped"].head.local_window, configs["grouped"].head.position_offset) == (4, 10)
    assert (configs["full_causal"].head.local_window, configs["full_causal"].head.position_offset) == (None, 0)
