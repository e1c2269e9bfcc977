"""Frozen layers on the host: the same bits as on the device, on the device only while they run."""

from __future__ import annotations

import pytest
import torch

from tests.support import CPU
from tests.training.support import Numbered, config_for, metrics, robot_sample, statistics, train
from tests.training.test_memory import measured
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import Collator
from xr0_engine.training.config import override
from xr0_engine.training.distributed import world
from xr0_engine.training.memory import forecast
from xr0_engine.training.model import build_policy, load_policy, model_config
from xr0_engine.training.trainer import Trainer

SHORT = ("optim.steps=3", "optim.warmup_steps=0", "run.log_every=1", "run.checkpoint_every=3", "data.batch_size=2")
RECIPES = {
    "finetune_head": (),
    "lora": ("lora.rank=4", "model.checkpoint_language=true"),
}
WITHIN = 0.1
"""As of test_memory. Seen: 1 %."""
MEASURED = ("loss", "grad_norm")


def config_of(recipe, base, *assignments):
    return config_for(recipe, base, *SHORT, *RECIPES[recipe], *assignments)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_run_is_the_same_bit_for_bit(recipe, base, tmp_path):
    for name, offloads in (("device", "false"), ("host", "true")):
        train(config_of(recipe, base, f"model.offload_frozen={offloads}"), tmp_path / name)
    lines = [metrics(tmp_path / name) for name in ("device", "host")]
    assert all(a[key] == b[key] for a, b in zip(*lines, strict=True) for key in MEASURED)
    file = "model/model-00001-of-00001.safetensors"
    assert (tmp_path / "host" / file).read_bytes() == (tmp_path / "device" / file).read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_what_runs_is_on_the_device(recipe, base):
    config = config_of(recipe, base, "model.offload_frozen=true")
    start = read_base(base)
    xr0 = model_config(start.config, config)
    policy, whole = (build_policy(each, xr0) for each in (config, override(config, ["model.offload_frozen=false"])))
    load_policy(policy, config, xr0, start, CPU)
    kept = policy.vlm.host._kept
    own = {name: parameter.shape for name, parameter in policy.named_parameters()}
    assert own | {name: value.shape for name, value in kept.items()} == {
        name: parameter.shape for name, parameter in whole.named_parameters()
    }
    layers = ("vlm.model.visual.blocks.", "vlm.model.language_model.layers.")
    frozen = [name for name, parameter in policy.named_parameters() if not parameter.requires_grad]
    assert not any(name.startswith(layers) for name in frozen)
    there: list[list[bool]] = []
    parts = [each.mlp.down_proj for each in policy.vlm.model.language_model.layers[:2]]
    parts[1].register_forward_hook(lambda *_: there.append([part.weight is not None for part in parts]))
    policy.vlm(Collator(base, xr0, statistics()).robot([robot_sample(0)]).inputs)
    assert there == [[False, True]]
    assert [part.weight for part in parts] == [None, None]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_forecast_is_without_what_the_host_keeps(recipe, base, tmp_path):
    config = config_of(recipe, base, "model.offload_frozen=true", "model.dtype=bfloat16")
    xr0 = model_config(read_base(base).config, config)
    batch = Collator(base, xr0, statistics()).robot([robot_sample(number) for number in range(2)])
    with world() as here:
        trainer = Trainer(config, tmp_path / "a", here, Numbered(robot_sample, 2), None, statistics())
        host = sum(value.numel() * value.element_size() for value in trainer.policy.vlm.host._kept.values())
    found, most = forecast(config, xr0, batch), measured(config, tmp_path / "b")
    assert abs(found.total / (most - host) - 1) < WITHIN
    assert found.frozen < forecast(override(config, ["model.offload_frozen=false"]), xr0, batch).frozen - host / 2


def test_a_layer_that_fails_leaves_nothing_behind(base):
    config = config_of("finetune_head", base, "model.offload_frozen=true")
    start = read_base(base)
    xr0 = model_config(start.config, config)
    policy = build_policy(config, xr0)
    load_policy(policy, config, xr0, start, CPU)
    layer = policy.vlm.model.language_model.layers[0]
    with pytest.raises(TypeError):
        layer(torch.zeros(1, 1, 64), nonsense=object())
    assert layer.mlp.down_proj.weight is None


@pytest.mark.parametrize(
    ("recipe", "assignments", "complaint"),
    [
        ("post_train_sync", (), "model.offload_frozen: expected false where the VLM's layers learn"),
        ("lora", ("lora.rank=4", "model.checkpoint_language=false"), "model.checkpoint_language: expected true with"),
        (
            "lora",
            ("lora.targets=vision", "model.checkpoint_language=true", "model.checkpoint_activations=false"),
            "model.checkpoint_activations: expected true with model.offload_frozen",
        ),
    ],
)
def test_settings_that_save_nothing_are_refused(recipe, assignments, complaint, base):
    with pytest.raises(ValueError, match=complaint):
        config_for(recipe, base, *assignments, "model.offload_frozen=true")
