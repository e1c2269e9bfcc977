"""A released run as DeepSpeed and Lightning leave it, and its relatives, into a folder that the engine loads."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.exchange.support import BF16_ROUNDING, config_py, model_states, module_of, write_run
from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.config import ModelConfig
from xr0_engine.exchange.importing import ImportOptions, import_released
from xr0_engine.exchange.pickled import read_weights
from xr0_engine.model.weights import TIED_LM_HEAD, read_index
from xr0_engine.types import CheckpointError

SINK = "model.sink.weight"
COLUMNS = [*range(13), *range(14, 27)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def module(base):
    return module_of(base)


@pytest.fixture
def run(base, module, tmp_path):
    return write_run(tmp_path / "run", module, base)


def imported(source, out, base, **options):
    return import_released(source, out, base, ImportOptions(**{"robot_type": "bimanual", **options}))


def test_a_run_acts_as_the_model_it_holds(run, base, tmp_path):
    told = imported(run, tmp_path / "ours", base)
    config = ModelConfig.load(tmp_path / "ours")
    assert (config.head.local_window, config.head.position_offset) == (4, 10)
    assert (config.std_epsilon, config.normalize_instruction, config.head.max_prefix) == (1e-6, False, 6)
    assert any("bfloat16 weights that the released server loads" in line for line in told)

    # The same weights under the same settings, written by hand.
    hf = json.loads((base / "config.json").read_text())
    settings = {"local_window": 4, "position_offset": 10, "std_epsilon": 1e-6, "normalize_instruction": False}
    reference = shutil.copytree(base, tmp_path / "reference")
    (reference / "config.json").write_text(json.dumps({**hf, **settings}))
    engines = [Engine.from_pretrained(it, device="cpu", dtype="float32") for it in (tmp_path / "ours", reference)]
    chunks = [engine.infer(engine.example("bimanual"), seed=0) for engine in engines]
    used = chunks[1].active_columns
    np.testing.assert_allclose(chunks[0].actions[:, used], chunks[1].actions[:, used], atol=BF16_ROUNDING)
    assert engines[0].statistics.keys() == {"bimanual"}


def test_statistics_carry_the_columns_that_the_post_training_code_uses(run, base, tmp_path):
    imported(run, tmp_path / "ours", base)
    entry = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())["action_config"]["bimanual"]
    original = json.loads((base / "preprocessor_config.json").read_text())["action_config"]["bimanual"]
    assert entry["active_columns"] == COLUMNS
    assert (entry["mean"], entry["std"]) == (original["mean"], original["std"])


def test_weights_are_the_files_own(run, base, module, tmp_path):
    imported(run, tmp_path / "ours", base)
    written = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    assert {f"model.{name}" for name in written} | {f"model.{TIED_LM_HEAD}"} == set(module)
    assert all(torch.equal(value, module[f"model.{name}"]) for name, value in written.items())


def test_dtype_is_the_one_asked_for(run, base, tmp_path):
    imported(run, tmp_path / "ours", base, dtype="float32")
    assert {place.dtype for place in read_index(tmp_path / "ours").values()} == {torch.float32}
    with pytest.raises(ValueError, match="dtype: expected bfloat16 or float32, got 'int8'"):
        imported(run, tmp_path / "other", base, dtype="int8")


def test_tensors_that_are_views_of_one_buffer(base, module, tmp_path):
    """So DeepSpeed keeps the parameters of a ZeRO-2 run."""
    flat, views, start = torch.cat([value.flatten() for value in module.values()]), {}, 0
    for name, value in module.items():
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    run = write_run(tmp_path / "run", views, base)
    imported(run, tmp_path / "ours", base)
    written = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    assert torch.equal(written["sink.weight"], module[SINK])


def test_the_step_is_the_newest_unless_told(base, module, tmp_path):
    run = tmp_path / "run"
    for number in (200, 1000):
        state = {**module, SINK: torch.full_like(module[SINK], number)}
        model_states(run / f"global_step{number}", state)
    assert "global_step1000, global_step200" in refusal(lambda: read_weights(run))
    (run / "latest").write_text("global_step200\n")
    assert float(read_weights(run).tensors["sink.weight"][0, 0]) == 200
    for step in ("1000", "global_step1000"):
        assert float(read_weights(run, step).tensors["sink.weight"][0, 0]) == 1000
    with pytest.raises(ValueError, match="step: expected one of global_step1000, global_step200, got '7'"):
        read_weights(run, "7")
    (run / "latest").write_text("global_step3000")
    assert "names 'global_step3000', which holds no mp_rank_00" in refusal(lambda: read_weights(run))


def test_a_run_of_lightning_gives_what_the_released_server_takes(base, module, tmp_path):
    run = write_run(tmp_path / "run", module, base)
    early = {**module, SINK: torch.zeros_like(module[SINK])}
    model_states(run / "epoch=0-step=500.ckpt" / "checkpoint", early)
    assert torch.equal(read_weights(run).tensors["sink.weight"], module[SINK])
    assert not read_weights(run, "epoch=0-step=500").tensors["sink.weight"].any()
    one_step = read_weights(run / "last.ckpt")
    assert one_step.is_run
    assert torch.equal(one_step.tensors["sink.weight"], module[SINK])


def test_steps_of_lightning_are_chosen_by_their_number(base, module, tmp_path):
    """Where nobody names another place, Lightning puts them into `checkpoints`."""
    run = write_run(tmp_path / "run", module, base)
    shutil.rmtree(run / "last.ckpt")
    for number in (500, 1000):
        state = {**module, SINK: torch.full_like(module[SINK], number)}
        model_states(run / "checkpoints" / f"epoch=0-step={number}.ckpt" / "checkpoint", state)
    assert "epoch=0-step=1000.ckpt, epoch=0-step=500.ckpt" in refusal(lambda: read_weights(run))
    for number in (500, 1000):
        assert float(read_weights(run, str(number)).tensors["sink.weight"][0, 0]) == number
    assert "step: expected one of" in refusal(lambda: read_weights(run, "50"))
    imported(run, tmp_path / "ours", base, step="500")
    assert Engine.from_pretrained(tmp_path / "ours", "cpu", "float32").statistics["bimanual"].active_columns


def test_a_configuration_that_git_lfs_has_not_fetched(run, base, tmp_path):
    (run / "config.py").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    assert f"{run / 'config.py'} is a git-lfs pointer" in refusal(lambda: imported(run, tmp_path / "ours", base))


@pytest.mark.parametrize("holder", ["module", "model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["model.", "module.", "_forward_module.model.", "_orig_mod.model.", ""])
def test_converted_files_of_any_wrapping(module, tmp_path, holder, prefix):
    state = {prefix + name.removeprefix("model."): value for name, value in module.items()}
    torch.save({holder: state} if holder else state, tmp_path / "xr0.pt")
    weights = read_weights(tmp_path / "xr0.pt")
    assert set(weights.tensors) == {name.removeprefix("model.") for name in module}
    assert not weights.is_run


def test_a_converters_file_runs_as_told(base, module, tmp_path):
    file, statistics = tmp_path / "xr0.pt", base / "preprocessor_config.json"
    torch.save({"module": module}, file)
    assert "--mode post-training" in refusal(lambda: imported(file, tmp_path / "ours", base))
    imported(file, tmp_path / "ours", base, mode="benchmark", statistics=statistics, robot_type=None)
    engines = [Engine.from_pretrained(folder, device="cpu", dtype="float32") for folder in (tmp_path / "ours", base)]
    chunks = [engine.infer(engine.example("libero_all"), seed=0) for engine in engines]
    assert np.array_equal(chunks[0].actions, chunks[1].actions)
    entry = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())["action_config"]
    assert "active_columns" not in entry["libero_all"]
    assert len(entry) == 6


def test_merged_float32_in_parts_and_safetensors(base, module, tmp_path):
    """What DeepSpeed's zero_to_fp32.py writes."""
    folder = tmp_path / "merged"
    folder.mkdir()
    names, values = list(module), {name: value.float().clone() for name, value in module.items()}
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: values[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    options = {"mode": "post-training", "statistics": base / "preprocessor_config.json"}
    imported(folder, tmp_path / "ours", base, **options)
    # Its --safe_serialization: a folder without config.json.
    (tmp_path / "safe").mkdir()
    save_file(values, tmp_path / "safe" / "model.safetensors")
    imported(tmp_path / "safe", tmp_path / "again", base, **options)
    assert read_weights(tmp_path / "safe" / "model.safetensors").files == read_weights(tmp_path / "safe").files
    first, second = (load_file(next((tmp_path / it).glob("*.safetensors"))) for it in ("ours", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin is missing" in refusal(lambda: read_weights(folder))


def test_sizes_of_the_head_come_from_its_tensors(run, base, tmp_path):
    hf = json.loads((base / "config.json").read_text())
    like = shutil.copytree(base, tmp_path / "like")
    hf["dit_config"]["num_hidden_layers"] -= 1
    (like / "config.json").write_text(json.dumps(hf))
    told = imported(run, tmp_path / "ours", like)
    assert ModelConfig.load(tmp_path / "ours").head.num_layers == hf["dit_config"]["num_hidden_layers"] + 1
    assert any("num_layers" in line for line in told)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(("protocol", "told"), [(2, "posix.system"), (4, "an instruction that weights")])
def test_code_in_a_file_is_told_and_not_run(run, base, module, tmp_path, monkeypatch, protocol, told):
    monkeypatch.chdir(tmp_path)
    state = {"module": module, "ds_version": "0.17.0", "optimizer": Bomb()}
    file = run / "last.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt"
    torch.save(state, file, pickle_protocol=protocol)
    message = refusal(lambda: imported(run, tmp_path / "ours", base))
    assert str(file) in message
    assert told in message
    assert "save its weights alone" in message
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "ours").exists()


def test_code_in_the_runs_configuration_is_not_run(run, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run / "config.py"
    config.write_text("import os\nos.system('touch ran')\nbad = os.system('touch ran')\n" + config.read_text())
    imported(run, tmp_path / "ours", base)
    assert not (tmp_path / "ran").exists()
    config.write_text("import os\ndata = dict(params=dict(train_datasets=dict(mean=os.system('touch ran'), std=1)))")
    assert "no mean in data.params.train_datasets" in refusal(lambda: imported(run, tmp_path / "other", base))
    assert not (tmp_path / "ran").exists()


def test_statistics_from_yaml_with_numbers_that_it_takes_for_text(run, base, tmp_path):
    action_config = json.loads((base / "preprocessor_config.json").read_text())["action_config"]["bimanual"]
    rows = {name: "".join(f"        - {row}\n" for row in action_config[name]) for name in ("mean", "std")}
    text = f"data:\n  params:\n    train_datasets:\n      mean:\n{rows['mean']}      std:\n{rows['std']}"
    file = tmp_path / "earphone.yaml"
    file.write_text(text.replace("- [0.0,", "- [1e-06,"))
    imported(run, tmp_path / "ours", base, statistics=file)
    written = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())["action_config"]["bimanual"]
    assert np.asarray(written["std"]).dtype == np.float64
    assert np.shape(written["mean"]) == (30, 32)


@pytest.mark.parametrize(
    ("is_async", "option", "expected"),
    [(True, None, 6), (False, None, 0), (None, None, 0), (False, 3, 3)],
    ids=["async", "sync", "unsaid", "told"],
)
def test_prefixes_that_the_run_has_seen(run, base, tmp_path, is_async, option, expected):
    (run / "config.py").write_text(config_py(base, is_async=is_async, window=7))
    imported(run, tmp_path / "ours", base, max_prefix=option)
    head = ModelConfig.load(tmp_path / "ours").head
    assert (head.max_prefix, head.local_window) == (expected, 7)


def test_mode_and_its_parts_can_be_told(run, base, tmp_path):
    imported(run, tmp_path / "first", base, local_window=3, position_offset=0)
    head = ModelConfig.load(tmp_path / "first").head
    assert (head.local_window, head.position_offset) == (3, 0)
    imported(run, tmp_path / "second", base, mode="benchmark")
    config = ModelConfig.load(tmp_path / "second")
    assert (config.head.local_window, config.head.position_offset, config.std_epsilon) == (None, 0, 0.0)


def test_nothing_is_said_of_videos_and_states_of_a_family_without_them(run, base, tmp_path):
    like = shutil.copytree(base, tmp_path / "like")
    (like / "video_preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="Xiaomi-Robotics-0 has 1 state: leave --state-length out"):
        imported(run, tmp_path / "ours", like, state_length=4)
    imported(run, tmp_path / "ours", like, mode="benchmark")
    assert not (tmp_path / "ours" / "video_preprocessor_config.json").exists()


def refusal(call) -> str:
    with pytest.raises((CheckpointError, ValueError)) as caught:
        call()
    return str(caught.value)


def damaged_tensors(module):
    half = module[SINK].shape[1] // 2
    yield "missing", {name: it for name, it in module.items() if "sink" not in name}, ["missing sink.weight"]
    yield "unexpected", {**module, "model.extra": module[SINK]}, ["unexpected extra"]
    shape = module["model.t_projector.layers.0.bias"]
    yield "shape", {**module, "model.t_projector.layers.0.bias": shape[:half]}, ["t_projector.layers.0.bias has shape"]
    yield "lm head", {**module, f"model.{TIED_LM_HEAD}": module[f"model.{TIED_LM_HEAD}"] + 1}, ["the model ties them"]
    yield "nan", {**module, SINK: module[SINK] * float("nan")}, ["sink.weight holds NaN", "earlier step"]
    yield "integers", {**module, SINK: module[SINK].int()}, ["'model.sink.weight' is of int32", "expected tensors of"]
    yield "no tensor", {**module, SINK: [1.0]}, ["'model.sink.weight' is list"]
    yield "another model", OrderedDict(encoder=torch.zeros(3)), ["holds another model: encoder"]
    yield "empty", {}, ["got an empty one"]


def test_every_wrong_state_is_named_and_leaves_nothing(base, module, tmp_path):
    for kind, state, words in damaged_tensors(module):
        run = write_run(tmp_path / kind, state, base)
        message = refusal(lambda run=run: imported(run, tmp_path / "ours", base))
        assert [word for word in [*words, str(run)] if word not in message] == [], kind
        assert [path.name for path in tmp_path.iterdir() if "ours" in path.name] == [], kind


def damaged_files(file):
    whole = file.read_bytes()
    yield "truncated", whole[: len(whole) // 2], "truncated, or no file of torch.save"
    yield "empty", b"", "(0 bytes) is truncated"
    at = whole.rindex(b"PK\6\7") + 16
    yield "several disks", whole[:at] + b"\7" + whole[at + 1 :], "no file of torch.save"
    held: dict = {}
    held["module"] = held
    stream = io.BytesIO()
    torch.save(held, stream)
    yield "itself", stream.getvalue(), "'module' is dict"
    yield "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"
    yield "pickle", pickle.dumps({"module": {}}), "no file of torch.save"
    yield "text", b"not weights", "no file of torch.save"


def test_every_broken_file_is_named(run, base, tmp_path):
    file = run / "last.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt"
    for kind, content, words in list(damaged_files(file)):
        file.write_bytes(content)
        message = refusal(lambda: imported(run, tmp_path / "ours", base))
        assert (words in message, str(file) in message) == (True, True), kind


def test_folders_of_other_kinds_are_told_apart(base, tmp_path):
    assert "there is no file or folder" in refusal(lambda: read_weights(tmp_path / "nowhere"))
    assert "no step with mp_rank_00_model_states.pt" in refusal(lambda: read_weights(tmp_path))
    assert "the engine loads as it is" in refusal(lambda: read_weights(base))
    split = tmp_path / "zero3" / "global_step1"
    split.mkdir(parents=True)
    (split / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    assert "zero_to_fp32.py" in refusal(lambda: read_weights(tmp_path / "zero3"))
    assert "zero_to_fp32.py" in refusal(lambda: read_weights(tmp_path))


def test_what_is_not_in_the_files_is_asked_for(run, base, tmp_path):
    out = tmp_path / "ours"
    assert "give --robot-type" in refusal(lambda: imported(run, out, base, robot_type=None))
    several = base / "preprocessor_config.json"
    assert "choose by --robot-type" in refusal(lambda: imported(run, out, base, statistics=several, robot_type=None))
    assert "not 'mars'" in refusal(lambda: imported(run, out, base, statistics=several, robot_type="mars"))
    (run / "config.py").unlink()
    assert "--statistics FILE" in refusal(lambda: imported(run, out, base))
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"mean": [[0.0] * 7], "std": [[1.0] * 7]}))
    message = refusal(lambda: imported(run, out, base, statistics=wrong))
    assert (str(wrong) in message, "expected shape (T, 32), got (1, 7)" in message) == (True, True)
    assert not out.exists()


def test_the_command(run, base, tmp_path):
    def convert(*arguments):
        return CliRunner().invoke(app, ["convert", str(run), *map(str, arguments)])

    out = tmp_path / "ours"
    assert "--like CHECKPOINT" in convert("--out", out).stderr
    arguments = ("--out", out, "--like", base, "--robot-type", "bimanual")
    result = convert(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "mask: 4 actions back; position offset 10" in result.stdout
    again = convert(*arguments)
    assert (again.exit_code, "exists and is not empty" in again.stderr) == (2, True)
    assert "expected engine, released" in convert(*arguments, "--to", "onnx").stderr
    assert CliRunner().invoke(app, ["inspect", str(out)]).exit_code == 0


def test_a_checkpoint_of_ours_needs_no_conversion(base, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(base), "--out", str(tmp_path / "out")])
    assert (result.exit_code, "loads as it is" in result.stderr.replace("\n", " ")) == (2, True)
