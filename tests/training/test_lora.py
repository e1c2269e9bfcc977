"""Adapters: what learns, resumed bit for bit, exported merged or alone, run by the engine; recomputed layers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support import CPU, load, random_inputs
from tests.training import test_joint
from tests.training.support import Numbered, config_for, metrics, robot_sample, statistics, tiny_checkpoint, train
from xr0_engine import Engine, Observation
from xr0_engine.cli import app
from xr0_engine.model.adapter import ADAPTER_FILE, DOWN, UP, WEIGHTS_FILE
from xr0_engine.quantize.folder import write_quantized
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import Collator
from xr0_engine.training.checkpoint import Export, checkpoints
from xr0_engine.training.config import LoraConfig, override
from xr0_engine.training.distributed import world
from xr0_engine.training.draws import draw_flow, micro_batch_generator
from xr0_engine.training.lora import LAYERS
from xr0_engine.training.model import build_policy, load_policy, model_config, set_parameter
from xr0_engine.training.trainer import Trainer
from xr0_engine.types import CheckpointError

RANK = 4
SHORT = ("optim.steps=6", "optim.warmup_steps=1", "run.log_every=1", "run.checkpoint_every=3", f"lora.rank={RANK}")
ROUNDED_KV = 0.02
"""Keys and values of order 1, from weights that differ by bfloat16's rounding, 2**-9 of each: measured 0.007."""
EXACT = ("loss", "grad_norm", "loss_by_step", "loss_by_time")


def lora_config(base, *assignments):
    return config_for("lora", base, *SHORT, *assignments)


def loaded(config, base, seed=7):
    """A policy whose adapters' products are not zero, as they are after some steps."""
    start = read_base(base)
    xr0 = model_config(start.config, config)
    policy = build_policy(config, xr0)
    load_policy(policy, config, xr0, start, CPU)
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if name.endswith(UP):
            torch.nn.init.normal_(parameter, std=0.1)
    return policy, xr0


def exporter(config, base):
    start = read_base(base)
    tables = {name: replace(item, epsilon=1e-6) for name, item in statistics().items()}
    return Export(model_config(start.config, config), start, tables, 0, None, config.lora)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(lora_config(base, "model.checkpoint_language=true"), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "adapter"
    exporter(lora_config(base), base).adapter_of_checkpoint(checkpoints(run / "checkpoints")[-1], out)
    return out


class Stopped(Exception):
    pass


class StopsAtFive(Numbered):
    def __next__(self):
        if self.number == 5:
            raise Stopped
        return super().__next__()


def test_it_learns_and_resumes_bit_for_bit(base, run, tmp_path):
    config = lora_config(base, "model.checkpoint_language=true")
    with pytest.raises(Stopped):
        train(config, tmp_path, source=StopsAtFive(robot_sample, config.data.batch_size))
    resumed, whole = train(config, tmp_path), metrics(run)
    assert [[line[name] for name in EXACT] for line in resumed] == [[line[name] for name in EXACT] for line in whole]
    files = [folder / "model" / "model-00001-of-00001.safetensors" for folder in (run, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_holds_the_adapters_and_the_head(base, run, adapter):
    held = load_file(adapter / WEIGHTS_FILE)
    started = load_file(base / "model-00001-of-00001.safetensors")
    assert {name for name in started if not name.startswith("vlm.")} <= held.keys()
    vlm = {name for name in held if name.startswith("vlm.")}
    assert {name.rpartition(".")[2] for name in vlm} == {DOWN, UP}
    # Keys and values of the last layer, and all of the one before: what is behind the last keys has no gradient.
    assert len(vlm) == 2 * (7 + 2)
    assert all(bool(value.any()) for name, value in held.items() if name.endswith(UP))
    changed = load_file(run / "model" / "model-00001-of-00001.safetensors")
    same = {name for name in started if torch.equal(started[name], changed[name])}
    assert {name for name in started if name.startswith("vlm.") and name not in same} == {
        name.replace(UP, "weight") for name in vlm if name.endswith(UP)
    }


def test_convert_writes_the_folder_that_the_run_exported(base, run, adapter, tmp_path):
    out = tmp_path / "merged"
    told = CliRunner().invoke(app, ["convert", str(adapter), "--like", str(base), "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert "with adapters of rank 4: vlm_attention, vlm_mlp" in told.output
    files = sorted(path.name for path in (run / "model").iterdir())
    assert sorted(path.name for path in out.iterdir()) == files
    assert all((out / name).read_bytes() == (run / "model" / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        pytest.param([], "is an adapter: --like BASE, the checkpoint that it was trained on", id="no base"),
        pytest.param(["--like", "{adapter}"], "adapter is of another base", id="not a base"),
        pytest.param(["--like", "{base}", "--step", "3"], "step: only for a released run", id="step"),
        pytest.param(["--like", "{base}", "--dtype", "int8"], "dtype: expected bfloat16 or float32", id="dtype"),
    ],
)
def test_what_convert_cannot_merge_leaves_nothing(options, complaint, base, adapter, tmp_path):
    given = [option.format(base=base, adapter=adapter) for option in options]
    out = tmp_path / "merged"
    told = CliRunner().invoke(app, ["convert", str(adapter), "--out", str(out), *given])
    assert told.exit_code == 2
    assert complaint in told.output
    assert not out.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_at_load_is_the_merged_folder_bit_for_bit(dtype, base, run, adapter):
    sample = robot_sample(3)
    observation = Observation(sample.images, sample.instruction, sample.state, prepared=True)
    over = Engine.from_pretrained(base, dtype=dtype, adapter=adapter)
    folder = Engine.from_pretrained(run / "model", dtype=dtype)
    expected = folder.infer(observation, seed=1).actions
    assert np.array_equal(over.infer(observation, seed=1).actions, expected)
    assert over.config == folder.config
    eight = [Engine.from_pretrained(run / "model", quantize="int8")]
    eight += [Engine.from_pretrained(base, quantize="int8", adapter=adapter)]
    assert np.array_equal(*(engine.infer(observation, seed=1).actions for engine in eight))


def test_the_engine_computes_what_the_trainer_trained(base, adapter):
    config = lora_config(base)
    policy, xr0 = loaded(config, base)
    held = load_file(adapter / WEIGHTS_FILE)
    for name, parameter in policy.named_parameters():
        if (stored := name.removeprefix("head.")) in held:
            set_parameter(parameter, held[stored])
    inputs = random_inputs(xr0, [[(8, 8)]], [[3, 4]])
    expected = policy.prefill(inputs)
    model = Engine.from_pretrained(base, dtype="float32", adapter=adapter).model
    kv = model.prefill(inputs, model.encode_images(inputs))
    expected = replace(expected, keys=expected.keys.detach())
    plain = load(base)
    before = plain.prefill(inputs, plain.encode_images(inputs))
    error = float((kv.keys - expected.keys).abs().max())
    assert error < ROUNDED_KV
    assert float((before.keys - expected.keys).abs().max()) > 3 * error


@pytest.mark.parametrize("target", LAYERS)
def test_each_target_is_what_learns_beside_the_head(target, base):
    config = lora_config(base, f"lora.targets={target}")
    policy, xr0 = loaded(config, base)
    batch = Collator(base, xr0, statistics()).robot([robot_sample(number) for number in range(2)])
    policy(batch, draw_flow(policy.flow, micro_batch_generator(0, 0), *batch.actions.shape)).loss.backward()
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    adapted = {name.rpartition(".")[0] for name in learning if name.endswith(DOWN)}
    assert adapted
    assert all(LAYERS[target].fullmatch(name) for name in adapted)
    assert {name for name in learning if name.startswith("vlm.")} == {
        f"{name}.{half}" for name in adapted if name.startswith("vlm.") for half in (DOWN, UP)
    }
    assert {name for name, _ in policy.named_parameters() if name.startswith("head.")} - learning == {
        f"{name}.{kind}"
        for name in adapted
        if name.startswith("head.")
        for kind in ("weight", "bias")[: 2 if name.endswith("qkv_proj") else 1]
    }
    assert [name for name, p in policy.named_parameters() if p.requires_grad and not bool(p.grad.any())] == []


def test_it_begins_as_the_base(base):
    start = read_base(base)
    policies = []
    for config in (lora_config(base, "lora.targets=vlm_attention,vision,projector,dit"), config_for("lora", base)):
        config = replace(config, lora=config.lora if not policies else LoraConfig())
        xr0 = model_config(start.config, config)
        policies.append(build_policy(config, xr0))
        load_policy(policies[-1], config, xr0, start, CPU)
    batch = Collator(base, xr0, statistics()).robot([robot_sample(0)])
    draw = draw_flow(policies[0].flow, micro_batch_generator(0, 0), *batch.actions.shape)
    assert torch.equal(policies[0](batch, draw).loss, policies[1](batch, draw).loss)


def test_the_dit_too_in_bfloat16_merged_as_trained(base, tmp_path):
    config = lora_config(base, "lora.targets=vlm_mlp,dit", "model.dtype=bfloat16", "model.checkpoint_activations=true")
    train(config, tmp_path / "run")
    out = tmp_path / "adapter"
    exporter(config, base).adapter_of_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1], out)
    held = load_file(out / WEIGHTS_FILE)
    assert "dit.layers.0.attn.qkv_proj.weight" not in held
    assert held["sink.weight"].dtype == torch.bfloat16
    assert held[f"dit.layers.0.attn.qkv_proj.{DOWN}"].dtype == torch.float32
    sample = robot_sample(3)
    observation = Observation(sample.images, sample.instruction, sample.state, prepared=True)
    engines = Engine.from_pretrained(base, adapter=out), Engine.from_pretrained(tmp_path / "run" / "model")
    assert np.array_equal(*(engine.infer(observation, seed=1).actions for engine in engines))


def test_it_composes_with_the_recipe_of_the_other_family(tmp_path):
    test_joint.write_checkpoint(tmp_path / "base", test_joint.small())
    config = override(test_joint.config_for(tmp_path / "base", "optim.steps=1"), [f"lora.rank={RANK}"])
    with world() as here:
        source = Numbered(test_joint.sample, config.data.batch_size)
        Trainer(config, tmp_path / "run", here, source, None, test_joint.statistics()).run()
    start = read_base(tmp_path / "base")
    out = tmp_path / "adapter"
    export = Export(model_config(start.config, config), start, test_joint.statistics(), 0, None, config.lora)
    export.adapter_of_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1], out)
    assert not any(name.startswith("proposals") for name in load_file(out / WEIGHTS_FILE))
    Engine.from_pretrained(tmp_path / "base", adapter=out)


@pytest.mark.parametrize(
    ("assignments", "complaint"),
    [
        (["lora.rank=-1"], "lora.rank: expected 0 or more, got -1"),
        (["lora.rank=full"], "lora.rank: expected int, got 'full'"),
        (["lora.alpha=0"], "lora.alpha: expected more than 0, got 0.0"),
        (
            ["lora.targets=vlm"],
            "lora.targets: expected vlm_attention, vlm_mlp, vision, projector, dit, got 'vlm'",
        ),
        (["lora.targets="], "lora.targets: expected at least one of vlm_attention, vlm_mlp, vision, projector, dit"),
        (["lora.targets=dit", "model.fresh_head=true"], "lora.targets: expected none of dit with model.fresh_head"),
        (["lora.targets=dit,dit"], "lora.targets: expected each once, got dit, dit"),
        (["model.train=head"], "lora.rank: expected 0 with model.train=head"),
        (["model.train_text_embeddings=true"], "lora.rank: expected 0 with model.train_text_embeddings"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused_by_name(assignments, complaint, base):
    with pytest.raises(ValueError, match=complaint):
        lora_config(base, *assignments)


def test_a_rank_that_saves_nothing_is_refused_before_any_work(base, tmp_path):
    config = lora_config(base, "lora.rank=64")
    complaint = r"lora.rank: expected less than 64, the narrow side of vlm\S*\.q_proj, got 64"
    with world() as here, pytest.raises(ValueError, match=complaint):
        Trainer(config, tmp_path, here, Numbered(robot_sample, 4), None, statistics())
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused_with_both_hashes(base, adapter, tmp_path):
    other = tiny_checkpoint(tmp_path / "other")
    told = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(told, indent=1))
    said = json.loads((adapter / ADAPTER_FILE).read_text())["base_sha256"]
    with pytest.raises(
        CheckpointError, match=rf"is of another base, model with SHA-256 {said}; {other} has [0-9a-f]{{64}}"
    ):
        Engine.from_pretrained(other, adapter=adapter)


def test_a_quantised_base_is_refused_with_the_remedy(base, adapter, tmp_path):
    write_quantized(base, tmp_path, "int8", {"dit.layers.0.attn.o_proj": "int8-weights"})
    with pytest.raises(
        CheckpointError, match=r"quantised \(recipe int8\).*export the run without --adapter, and `xr0 q"
    ):
        Engine.from_pretrained(tmp_path, adapter=adapter)


def test_an_adapter_is_no_checkpoint_and_a_checkpoint_no_adapter(base, adapter):
    with pytest.raises(
        CheckpointError, match=r"is an adapter and holds no base: Engine.from_pretrained\(BASE, adapter="
    ):
        Engine.from_pretrained(adapter)
    with pytest.raises(
        CheckpointError, match=r"holds no adapter.json; expected a folder of `xr0 train export RUN --ad"
    ):
        Engine.from_pretrained(base, adapter=base)


def without_a_half(folder):
    held = load_file(folder / WEIGHTS_FILE)
    del held[next(name for name in held if name.endswith(UP))]
    save_file(held, folder / WEIGHTS_FILE)


def of_no_layer(folder):
    held = load_file(folder / WEIGHTS_FILE)
    save_file({**held, f"vlm.nowhere.{UP}": torch.zeros(2, 2)}, folder / WEIGHTS_FILE)


def unexpected(folder):
    held = load_file(folder / WEIGHTS_FILE)
    save_file({**held, "dit.strange": torch.zeros(2)}, folder / WEIGHTS_FILE)


def told(**values):
    def change(folder):
        content = json.loads((folder / ADAPTER_FILE).read_text())
        (folder / ADAPTER_FILE).write_text(json.dumps(content | values))

    return change


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        pytest.param(without_a_half, r"does not fit its base: missing \S+\.lora_up", id="half"),
        pytest.param(of_no_layer, r"vlm.nowhere.lora_up is of no layer of the base", id="layer"),
        pytest.param(unexpected, r"unexpected dit.strange", id="tensor"),
        pytest.param(told(rank=3), r"lora_down has shape \[4, 64\], expected \[3, 64\]", id="rank"),
        pytest.param(told(rank=0), r"adapter.json: rank: expected", id="no-rank"),
        pytest.param(told(alpha=-1), r"adapter.json: alpha: expected more than 0", id="alpha"),
        pytest.param(told(version=2), r"adapter.json: version: expected 1, got 2", id="version"),
        pytest.param(told(format="peft"), r"adapter.json: format: expected 'xr0-adapter'", id="format"),
        pytest.param(told(targets="all"), r"adapter.json: targets: expected a list of names", id="targets"),
        pytest.param(lambda folder: (folder / WEIGHTS_FILE).unlink(), "adapter.safetensors is missing", id="file"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(damage, complaint, base, adapter, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    damage(copy)
    with pytest.raises(CheckpointError, match=complaint):
        Engine.from_pretrained(base, adapter=copy)


def test_a_run_without_adapters_exports_none(base, tmp_path):
    config = config_for("finetune_head", base, "optim.steps=1")
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="--adapter: the run has no adapters, it trained layers whole"):
        exporter(config, base).adapter_of_checkpoint(
            checkpoints(tmp_path / "run" / "checkpoints")[-1], tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def saved_bytes(module, inputs):
    kept = {}

    def pack(value):
        kept[value.data_ptr()] = value.nbytes
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(inputs)
    return sum(kept.values())


@pytest.mark.parametrize("recipe", ["lora", "post_train_async", "pretrain_vlm"])
def test_recomputed_language_layers_change_no_bit(recipe, base, tmp_path):
    """The DiT reads the same keys and values, and gradients through them are the same."""
    lines, saved = [], []
    for recomputed in ("false", "true"):
        config = config_for(recipe, base, "optim.steps=2", "run.log_every=1", f"model.checkpoint_language={recomputed}")
        lines.append(train(config, tmp_path / recomputed))
        start = read_base(base)
        xr0 = model_config(start.config, config)
        policy = build_policy(config, xr0)
        load_policy(policy, config, xr0, start, CPU)
        inputs = random_inputs(xr0, [[(8, 8)]], [[3, 4]])
        saved.append(saved_bytes(policy.vlm, inputs))
    assert [[line[name] for name in EXACT[:2]] for line in lines[0]] == [
        [line[name] for name in EXACT[:2]] for line in lines[1]
    ]
    # What is left: each layer's input, keys and values; and the vision tower's, where it learns.
    assert saved[1] < 0.7 * saved[0]
