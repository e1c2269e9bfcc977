"""The golden cases, and that a wrong model does not pass them."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support import GOLDEN
from xr0_engine.cli import app
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.golden import verify
from xr0_engine.golden.cases import golden_config
from xr0_engine.golden.verify import verify_folder

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


XR1 = GOLDEN.parent / "golden_xr1"
XR1_QUANTITIES = {"vision tokens", "KV block", "flow trace", "actions"}
needs_xr1 = pytest.mark.skipif(not XR1.is_dir(), reason=f"the golden cases of Xiaomi-Robotics-1 are not at {XR1}")


@needs_xr1
def test_every_golden_case_of_xr1_passes():
    """Videos and the published size among them."""
    comparisons = list(verify_folder(XR1, "reference", "cpu", "float32"))
    assert [c for c in comparisons if not c.passed] == []
    files = {path.stem for path in XR1.glob("xr1_*.*.safetensors") if not path.stem.endswith(".weights")}
    quantities = {name: {c.quantity for c in comparisons if c.case == name} for name in files}
    assert all(found >= XR1_QUANTITIES for found in quantities.values()), quantities
    trained = {case: found for case, found in quantities.items() if ".train_" in case}
    assert len(trained) == 2
    assert all(found >= {"velocity", "candidates", "scores", "losses"} for found in trained.values())
    assert "L1 error" in trained["xr1_post.train_prefix5_batch3"]
    seeded = {c.case for c in comparisons} - files
    assert seeded >= {"real_shape_xr1.post.prefix0", "real_shape_xr1.post.prefix6", "real_shape_xr1.video.prefix0"}


@pytest.fixture
def joint(tmp_path):
    """A folder with the model that is post-trained and its case with a prefix, to tamper with."""
    for name in ("xr1_post.json", "xr1_post.weights.safetensors", "xr1_post.train_prefix5_batch3.safetensors"):
        shutil.copyfile(XR1 / name, tmp_path / name)
    return tmp_path


def change_json(folder, part, field, value):
    path = folder / "xr1_post.json"
    golden = json.loads(path.read_text())
    golden[part][field] = value
    path.write_text(json.dumps(golden))


@needs_xr1
def test_a_spectrum_of_the_base_velocity_fails(joint):
    change_json(joint, "training", "freq_excluded_dims", [])
    assert failures(joint) == {"losses"}


@needs_xr1
@pytest.mark.parametrize(
    ("tensor", "wrong"),
    [
        ("proposals of another state", {"candidates", "scores", "losses"}),
        ("train.hidden_columns", {"velocity", "L1 error", "losses"}),
        ("train.action_mask", {"velocity", "L1 error", "losses"}),
    ],
)
def test_a_wrong_step_of_xr1s_training_fails(tensor, wrong, joint):
    path = joint / ("xr1_post.train_prefix5_batch3" if tensor.startswith("train") else "xr1_post.weights")
    path = path.with_name(path.name + ".safetensors")
    held = load_file(path)
    if tensor == "train.action_mask":
        # As if steps behind an episode's end were supervised.
        held[tensor] = held[tensor].amax(1, keepdim=True).expand_as(held[tensor]).contiguous()
    elif tensor == "train.hidden_columns":
        held[tensor] = 1 - held[tensor]
    else:
        held["state_projector_choice.layers.2.weight"].neg_()
    save_file(held, path)
    assert failures(joint) == wrong


@needs_xr1
@pytest.mark.parametrize(
    ("tensor", "place", "value", "message"),
    [
        ("choice.input_ids", (0, -3), 7, "choice.input_ids: expected 12 action tokens and a score behind a state"),
        ("choice.input_ids", (0, -3), 10**6, "choice.input_ids: expected ids from 0 below 384"),
        ("choice.steps", (0,), 13, "choice.input_ids: expected 13 action tokens"),
        ("choice.condition_end", (1,), 10**6, "choice.input_ids: expected 8 action tokens"),
    ],
)
def test_a_turn_that_is_none_is_named(tensor, place, value, message, joint):
    path = joint / "xr1_post.train_prefix5_batch3.safetensors"
    case = load_file(path)
    case[tensor][place] = value
    save_file(case, path)
    with pytest.raises(ValueError, match=message):
        list(verify_folder(joint, "reference", "cpu", "float32"))


@pytest.fixture
def videos(tmp_path):
    """A folder with the model that sees videos and one case, to tamper with."""
    for name in ("xr1_video.json", "xr1_video.weights.safetensors", "xr1_video.padded_batch2.safetensors"):
        shutil.copyfile(XR1 / name, tmp_path / name)
    return tmp_path


@needs_xr1
def test_a_video_of_one_frame_repeated_fails(videos):
    """Its temporal patches hold two frames."""
    path = videos / "xr1_video.padded_batch2.safetensors"
    case = load_file(path)
    frames = case["pixel_values_videos"].view(-1, 3, 2, 256)
    case["pixel_values_videos"] = frames[:, :, :1].repeat(1, 1, 2, 1).flatten(1)
    save_file(case, path)
    assert failures(videos) == {"vision tokens", "KV block", "flow trace", "actions"}


@needs_xr1
@pytest.mark.parametrize(("field", "value"), [("position_offset", 10), ("local_window", 4)])
def test_a_wrong_mode_of_xr1_fails(videos, field, value):
    path = videos / "xr1_video.json"
    golden = json.loads(path.read_text())
    golden["action_head"][field] = value
    path.write_text(json.dumps(golden))
    assert failures(videos) >= {"flow trace", "actions"}


@needs_xr1
@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("family", "xr0", "family is 'xr0', its action_head that of 'xr1'"), ("family", "xr2", "family is 'xr2'")],
)
def test_a_family_that_contradicts_the_head_is_refused(videos, field, value, complaint):
    path = videos / "xr1_video.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=complaint):
        list(verify_folder(videos, "reference", "cpu", "float32"))


@needs_xr1
def test_images_and_videos_together_are_refused(videos):
    path = videos / "xr1_video.padded_batch2.safetensors"
    case = load_file(path)
    save_file({**case, "pixel_values": case["pixel_values_videos"].clone()}, path)
    with pytest.raises(ValueError, match="expected images or videos, got both"):
        list(verify_folder(videos, "reference", "cpu", "float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("folder", [GOLDEN, pytest.param(XR1, marks=needs_xr1)], ids=["xr0", "xr1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_golden_case_passes_on_a_gpu(dtype, folder):
    comparisons = list(verify_folder(folder, "reference", "cuda", dtype))
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
        ("sideways", "triton", ValueError, "way: expected one of table, chained, layered, persistent, streamed, "),
        ("chained", "reference", ValueError, "way: backend 'reference' has one way alone, got 'chained'"),
        ("overlap", "triton", NotImplementedError, "way 'overlap': it takes two streams of a CUDA GPU"),
    ],
)
def test_way_that_cannot_be_is_refused(way, backend, kind, message, monkeypatch):
    monkeypatch.setattr(verify, "resolve_backend", lambda name, device: name)
    with pytest.raises(kind, match=message):
        list(verify_folder(GOLDEN, backend, "cpu", "float32", way))


@pytest.mark.parametrize(
    ("way", "flow", "overlap", "dependent"),
    [
        ("table", "persistent", True, True),
        ("chained", "chained", False, True),
        ("layered", "layered", False, True),
        ("persistent", "persistent", False, True),
        ("streamed", "streamed", False, True),
        ("separate", "chained", False, False),
    ],
)
def test_the_flow_runs_as_the_way_says(way, flow, overlap, dependent, one_case, monkeypatch):
    """What the model and its launches are told, where a backend has kernels of its own."""
    launch = pytest.importorskip("xr0_engine.kernels.launch")
    tables = []

    class Told(verify.FusedModel):
        def __init__(self, model, backend, table, graphs):
            tables.append((table.flow, table.overlap, launch._dependent))
            super().__init__(model, "reference", TacticTable(""), graphs)

    monkeypatch.setattr(verify, "resolve_backend", lambda name, device: name)
    monkeypatch.setattr(verify, "tactics_for", lambda device: TacticTable("", overlap=True, flow="persistent"))
    monkeypatch.setattr(verify, "FusedModel", Told)
    comparisons = list(verify_folder(one_case, "triton", "cpu", "float32", way))
    assert [each for each in comparisons if not each.passed] == []
    assert tables == [(flow, overlap, dependent)]
    assert launch._dependent


def test_another_way_than_was_asked_for_is_told(one_case, monkeypatch):
    """What a streamed flow is not for runs chained, and does not pass for streamed."""

    class Oracle(verify.FusedModel):
        def __init__(self, model, backend, table, graphs):
            super().__init__(model, "reference", table, graphs)

    monkeypatch.setattr(verify, "resolve_backend", lambda name, device: name)
    monkeypatch.setattr(verify, "FusedModel", Oracle)
    told = {each.quantity for each in verify_folder(one_case, "triton", "cpu", "float32", "streamed")}
    assert "actions, one step, chained flow" in told
    assert "actions, one step" in {
        each.quantity for each in verify_folder(one_case, "triton", "cpu", "float32", "chained")
    }


def test_truncated_weights_are_named(one_case):
    path = one_case / "grouped.weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"grouped\.weights\.safetensors is truncated or corrupt"):
        list(verify_folder(one_case, "auto", "cpu", "float32"))


def test_golden_configuration_reads_both_modes():
    configs = {p.stem: golden_config(json.loads(p.read_text())) for p in GOLDEN.glob("*.json")}
    assert (configs["grouped"].head.local_window, configs["grouped"].head.position_offset) == (4, 10)
    assert (configs["full_causal"].head.local_window, configs["full_causal"].head.position_offset) == (None, 0)
