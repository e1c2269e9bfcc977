"""Recipes: functions that return a training run's config, with the published values (spec section 4).

`tiny` variants have the same parts at sizes for which a CPU takes minutes.
"""

from __future__ import annotations

from dataclasses import replace

from xr0_engine.training.config import (
    ChoiceConfig,
    DataConfig,
    FlowConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

LOCAL_WINDOW = 4
POSITION_OFFSET = 10
COLUMN_DROPOUT = 0.5
BASE_VELOCITY = (17, 18, 19)
"""Columns of XR-1 that its spectrum term never sees, where the width has them."""


def post_train_sync() -> TrainConfig:
    """Whole model, one chunk after the other: no prefix, every action sees all earlier ones."""
    return TrainConfig("post_train_sync")


def post_train_async() -> TrainConfig:
    """Whole model, for asynchronous execution: Λ-mask, prefixes, column dropout, error-weighted loss."""
    return TrainConfig(
        "post_train_async",
        model=ModelConfig(local_window=LOCAL_WINDOW, position_offset=POSITION_OFFSET),
        flow=FlowConfig(prefix="code", column_dropout=COLUMN_DROPOUT, reweight_errors=True),
    )


def released_async() -> TrainConfig:
    """The released post-training as it is run: prefixes, an unmasked frequency loss, task text as recorded."""
    return TrainConfig(
        "released_async",
        model=ModelConfig(local_window=LOCAL_WINDOW, position_offset=POSITION_OFFSET),
        data=DataConfig(normalize_instruction=False),
        flow=FlowConfig(
            prefix="code",
            column_dropout=COLUMN_DROPOUT,
            reweight_errors=True,
            frequency_weight=1.0,
            frequency_masked=False,
        ),
    )


def released_sync() -> TrainConfig:
    """The same with `async_train: false`: no prefixes; window, offset and frequency loss stay."""
    run = released_async()
    return replace(run, recipe="released_sync", flow=replace(run.flow, prefix="none"))


def training_rtc() -> TrainConfig:
    """Whole model, prefixes alone: training-time real-time chunking, to compare post_train_async with."""
    return TrainConfig("training_rtc", flow=FlowConfig(prefix="code"))


def pretrain_vlm() -> TrainConfig:
    """Pre-training, step 1: the VLM with Choice Policies, co-trained on vision-language data at 1 : 6."""
    return TrainConfig(
        "pretrain_vlm",
        objective="choice",
        model=ModelConfig(train="vlm", train_text_embeddings=True),
        data=DataConfig(language_every=7),
        optim=OptimConfig(steps=40_000),
    )


def pretrain_dit() -> TrainConfig:
    """Pre-training, step 2: the VLM frozen, the DiT from scratch on its KV cache."""
    return TrainConfig(
        "pretrain_dit", model=ModelConfig(train="head", fresh_head=True), optim=OptimConfig(steps=40_000)
    )


def finetune_head() -> TrainConfig:
    """The DiT alone, for a 16 GB card: the VLM stays frozen in bfloat16."""
    return TrainConfig(
        "finetune_head",
        model=ModelConfig(train="head"),
        data=DataConfig(batch_size=4),
        optim=OptimConfig(steps=10_000, warmup_steps=500, accumulate=4),
    )


def lora() -> TrainConfig:
    """Adapters in the VLM's language layers and the whole DiT, for a 24 GB card: all else stays frozen in bfloat16."""
    return TrainConfig(
        "lora",
        model=ModelConfig(checkpoint_language=True),
        data=DataConfig(batch_size=4),
        lora=LoraConfig(rank=16),
        optim=OptimConfig(steps=10_000, warmup_steps=500, accumulate=4),
    )


def xr1_post_train() -> TrainConfig:
    """XR-1's post-training as released: flow, spectrum, choice and score on one pass of the VLM, prefixes."""
    return TrainConfig(
        "xr1_post_train",
        objective="joint",
        family="xr1",
        model=ModelConfig(position_offset=POSITION_OFFSET),
        data=DataConfig(batch_size=48, random_crop=False, normalize_instruction=False, state_quantiles=True),
        flow=FlowConfig(
            prefix="code",
            column_dropout=COLUMN_DROPOUT,
            reweight_errors=True,
            frequency_weight=1.0,
            frequency="selected",
            frequency_excluded=BASE_VELOCITY,
        ),
        choice=ChoiceConfig(action_weight=0.5, score_weight=0.5),
        optim=OptimConfig(steps=10_000, warmup_steps=500, peak_lr=2e-5, min_lr=5e-6, start_lr=5e-7),
    )


def xr1_robodojo() -> TrainConfig:
    """The same with RoboDojo's learning rates and chunks of ten steps."""
    run = xr1_post_train()
    optim = replace(run.optim, steps=60_000, peak_lr=1e-5, min_lr=5e-7)
    return replace(run, recipe="xr1_robodojo", data=replace(run.data, chunk_length=10), optim=optim)


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        post_train_sync,
        post_train_async,
        released_async,
        released_sync,
        training_rtc,
        pretrain_vlm,
        pretrain_dit,
        finetune_head,
        lora,
        xr1_post_train,
        xr1_robodojo,
    )
}


def tiny(config: TrainConfig) -> TrainConfig:
    """The recipe for a checkpoint of `xr0 init --size tiny` on a CPU: float32, small batches, short schedule."""
    return replace(
        config,
        model=replace(config.model, dtype="float32", checkpoint_activations=False, checkpoint_language=False),
        data=replace(config.data, batch_size=8, workers=1, augment=False, validation_samples=64),
        optim=OptimConfig(steps=600, warmup_steps=30, peak_lr=2e-3, min_lr=2e-5, weight_decay=0.01),
        run=RunConfig(log_every=10, validate_every=200, checkpoint_every=200),
    )
