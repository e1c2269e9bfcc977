"""Recipes, overrides and the saved config."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from xr0_engine.training.config import TrainConfig, keys, override
from xr0_engine.training.recipes import RECIPES, post_train_async, post_train_sync, pretrain_vlm, tiny

ALL = [pytest.param(recipe(), id=name) for name, recipe in RECIPES.items()]
ALL += [pytest.param(tiny(recipe()), id=f"{name}-tiny") for name, recipe in RECIPES.items()]


@pytest.mark.parametrize("config", ALL)
def test_json_round_trip(config):
    assert TrainConfig.from_json(config.to_json()) == config


def test_async_is_sync_with_the_released_additions():
    config = post_train_async()
    assert (config.model.local_window, config.model.position_offset) == (4, 10)
    assert (config.flow.prefix, config.flow.max_prefix, config.flow.column_dropout) == ("code", 6, 0.5)
    assert config.flow.reweight_errors
    plain = replace(config, recipe="post_train_sync", model=post_train_sync().model, flow=post_train_sync().flow)
    assert plain == post_train_sync()


def test_released_recipes_are_what_the_released_code_runs():
    with_prefixes, without = RECIPES["released_async"](), RECIPES["released_sync"]()
    for run in (with_prefixes, without):
        assert (run.model.train, run.model.local_window, run.model.position_offset) == ("all", 4, 10)
        assert (run.model.train_text_embeddings, run.model.checkpoint_activations) == (False, True)
        assert (run.model.dtype, run.data.batch_size, run.data.augment) == ("bfloat16", 16, True)
        assert (run.flow.frequency_weight, run.flow.frequency_masked, run.flow.mse_weight) == (1, False, 0.5)
        assert (run.flow.column_dropout, run.flow.reweight_errors, run.flow.max_prefix) == (0.5, True, 6)
        assert (run.flow.time, run.flow.repeat) == ("beta", 4)
        assert not run.data.normalize_instruction
        assert run.optim == post_train_sync().optim
    assert (with_prefixes.flow.prefix, without.flow.prefix) == ("code", "none")


def test_published_schedule():
    optim = post_train_sync().optim
    assert (optim.peak_lr, optim.min_lr, optim.warmup_steps, optim.steps) == (1e-4, 5e-7, 2_000, 30_000)
    assert (optim.betas, optim.weight_decay, optim.clip_norm) == ((0.9, 0.95), 0.1, 1.0)
    assert (post_train_sync().data.batch_size, post_train_sync().flow.repeat) == (16, 4)
    assert pretrain_vlm().data.language_every == 7


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("optim.steps=7", ("optim", "steps"), 7),
        ("optim.peak_lr=1e-3", ("optim", "peak_lr"), 1e-3),
        ("optim.weight_decay=1", ("optim", "weight_decay"), 1.0),
        ("optim.betas=0.8,0.9", ("optim", "betas"), (0.8, 0.9)),
        ("data.augment=false", ("data", "augment"), False),
        ("data.robot=a,b=2", ("data", "robot"), ("a", "b=2")),
        ("data.statistics=7", ("data", "statistics"), "7"),
        ("model.local_window=none", ("model", "local_window"), None),
        ("model.local_window=3", ("model", "local_window"), 3),
        ("flow.prefix=paper", ("flow", "prefix"), "paper"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_override(assignment, key, value):
    config = override(post_train_async(), [assignment])
    part, name = key
    assert getattr(getattr(config, part), name) == value
    assert type(getattr(getattr(config, part), name)) is type(value)


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("optim.step=7", r"no key 'optim.step'; did you mean 'optim.steps'\?"),
        ("optim.peaklr=7", r"did you mean 'optim.peak_lr'\?"),
        ("batch_size=7", r"did you mean 'data.batch_size'\?"),
        ("optimm.clip_norm=7", r"did you mean 'optim.clip_norm'\?"),
        ("zzz=1", "no key 'zzz'; known: model.checkpoint, "),
        ("recipe=x", "no key 'recipe'"),
        ("optim.steps", "expected key=value, got 'optim.steps'"),
        ("optim.steps=1.5", "optim.steps: expected int, got 1.5"),
        ("optim.steps=true", "optim.steps: expected int, got True"),
        ("optim.peak_lr=fast", "optim.peak_lr: expected float, got 'fast'"),
        ("optim.peak_lr=nan", "optim.peak_lr: expected float"),
        ("optim.betas=0.9", "optim.betas: expected 2 values"),
        ("flow.time=late", "flow.time: expected beta, logistic_normal, uniform, got 'late'"),
        ("data.batch_size=0", "data.batch_size: expected at least 1, got 0"),
        ("data.language_every=1", "data.language_every: expected 0"),
        ("data.validation_fraction=1", "data.validation_fraction: expected 0 to below 1"),
        ("optim.min_lr=1", "optim.min_lr: expected at most peak_lr"),
        ("model.train=vlm", "model.train: expected `all` or `head` with objective flow"),
        ("optim.average=1", "optim.average: expected 0 to below 1, got 1.0"),
        ("flow.column_dropout=2", "flow.column_dropout: expected 0 to 1"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_wrong_override_is_refused_by_name(assignment, complaint):
    with pytest.raises(ValueError, match=complaint):
        override(post_train_async(), [assignment])


def test_saved_config_with_an_unknown_key_is_refused():
    raw = json.loads(post_train_sync().to_json())
    raw["optim"]["peak_rate"] = 1
    with pytest.raises(ValueError, match=r"no key 'optim.peak_rate'; did you mean 'optim.peak_lr'\?"):
        TrainConfig.from_json(json.dumps(raw))


def test_every_key_is_listed_once():
    names = [name for name, _ in keys(post_train_sync())]
    assert len(names) == len(set(names))
    assert {"model.checkpoint", "data.robot", "run.seed"} <= set(names)
