"""Training on videos and several states: inputs as the engine makes them, a run of XR-1 on recorded episodes."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
import yaml

from tests.support import CPU
from tests.training.data.fixtures import write_dataset
from tests.training.support import metrics, values
from tests.training.test_joint import small, stored
from xr0_engine import Engine
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.history import FrameHistory, History
from xr0_engine.robot.limits import VIDEO_FILE
from xr0_engine.robot.normalize import read_statistics
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import Collator
from xr0_engine.training.config import override
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.stats import compute, merge
from xr0_engine.training.data.windows import Windows
from xr0_engine.training.draws import draw_flow, micro_batch_generator
from xr0_engine.training.model import build_policy, load_policy, model_config
from xr0_engine.training.recipes import RECIPES, tiny
from xr0_engine.training.start import resume_run, start_run
from xr0_engine.training.trainer import Trainer
from xr0_engine.types import ModelInputs, Observation

LENGTH, WIDTH, STATES = 4, 32, 4
NO_RESIZE = {"do_resize": False, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}


def video_profile():
    """Two arms whose views are videos, one of them resized and cropped."""
    wide = load_embodiment("bimanual")
    views = [replace(view, resize=(32, 64)) for view in wide.views]
    views[1] = replace(views[1], center_crop=0.9)
    history = FrameHistory(4, 2)
    return replace(wide, name="video", views=tuple(views), prompt="cameras", instruction="given", history=history)


def plain(value):
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base of two arms' columns and four states, episodes, of which one is shorter than the history,
    the profile, and statistics."""
    folder = tmp_path_factory.mktemp("videos")
    config = small()
    config = replace(config, head=replace(config.head, state_length=STATES, state_dim=WIDTH, action_dim=WIDTH))
    write_checkpoint(folder / "base", config, embodiment=video_profile())
    (folder / "base" / VIDEO_FILE).write_text(json.dumps(NO_RESIZE))
    write_dataset(folder / "episodes", (11, 3, 9))
    (folder / "video.yaml").write_text(yaml.safe_dump(plain(asdict(video_profile()))))
    merge(folder / "statistics.json", compute([folder / "episodes"], LENGTH, 0.0, 1, quantiles=True), False)
    return folder


def config_for(place, *assignments):
    sizes = ("data.batch_size=2", f"data.chunk_length={LENGTH}", "data.workers=0", "data.validation_samples=4")
    steps = ("run.threads=1", "flow.repeat=1", "optim.warmup_steps=1", "run.log_every=1", "run.checkpoint_every=1")
    steps = (*steps, "data.validation_draws=1", "run.validate_every=1", "optim.steps=2", "data.augment=true")
    data = (
        f"model.checkpoint={place / 'base'}",
        f"data.robot={place / 'episodes'}",
        f"data.statistics={place / 'statistics.json'}",
        f"data.embodiment={place / 'video.yaml'}",
    )
    return override(tiny(RECIPES["xr1_post_train"]()), [*sizes, *steps, *data, *assignments])


def collator(place, profile=None) -> Collator:
    xr0 = model_config(read_base(place / "base").config, config_for(place))
    statistics = read_statistics(place / "statistics.json", WIDTH, xr0.std_epsilon, xr0.double_statistics)
    return Collator(place / "base", xr0, statistics, profile or video_profile(), with_turn=True)


def assert_same(first: ModelInputs, second: ModelInputs) -> None:
    for field in fields(ModelInputs):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    start_run(config_for(place), folder)
    return folder


def test_a_step_s_inputs_are_bit_for_bit_what_the_engine_makes_of_the_session(place, run):
    """Every step of every episode, from the first on; the engine is the run's own export."""
    engine = Engine.from_pretrained(run / "model", device="cpu", dtype="float32", backend="reference")
    assert json.loads((run / "model" / VIDEO_FILE).read_text()) == NO_RESIZE
    assert not engine._preprocess.video_limits.resize
    robot = engine.robot_info("bimanual")
    assert (robot.history, robot.state_length) == ((4, 2), STATES)
    source, collate = open_source(place / "episodes", embodiment=video_profile()), collator(place)
    windows = Windows(source, range(3), LENGTH, state_length=STATES)
    first = 0
    for number, length in enumerate(source.lengths):
        episode, session = source.load(number), History.of(robot)
        for tick in range(length):
            images = {view.key: episode.image(view.key, tick) for view in video_profile().views}
            session.push(Observation(images, episode.instructions[0], episode.motion.state(tick)))
            trained = collate.robot([windows.sample(first + tick)]).inputs
            assert_same(trained, engine._preprocess([session.observe()]))
            assert trained.image_grids == ((2, 4),) * 6
        first += length
    chunk = engine.infer(session.observe(), seed=0)
    assert np.isfinite(chunk.actions).all()


def test_a_run_is_resumed_bit_for_bit(place, run, tmp_path, monkeypatch):
    step = Trainer._train_step

    def stops(self, *arguments):
        if self.step == 1:
            raise InterruptedError
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stops)
        with pytest.raises(InterruptedError):
            start_run(config_for(place), tmp_path / "cut")
    resume_run(tmp_path / "cut")
    whole, cut = metrics(run), metrics(tmp_path / "cut")
    names = ("loss", "mse", "frequency", "choice", "score", "grad_norm", "validation/l1", "validation/l1_mean")
    for name in names:
        assert values(whole, name) == values(cut, name), name
    assert len(values(whole, "loss")) == 2
    assert len(values(whole, "validation/l1")) == 3
    weights = [stored(folder / "model") for folder in (run, tmp_path / "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_loss_falls_and_what_is_in_the_past_matters(place):
    """Of one batch, by plain gradient descent on one draw: all of what differs from step to step is the weights."""
    config, base = config_for(place, "flow.prefix=none"), read_base(place / "base")
    policy = build_policy(config, model_config(base.config, config))
    load_policy(policy, config, model_config(base.config, config), base, CPU)
    source = open_source(place / "episodes", embodiment=video_profile())
    windows = Windows(source, [0], LENGTH, state_length=STATES)
    samples = [windows.sample(tick) for tick in (7, 8)]
    collate = collator(place)
    batch = collate.robot(samples)
    draw = draw_flow(config.flow, micro_batch_generator(0, 0), *batch.actions.shape)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(12):
        loss = policy(batch, draw).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0], losses
    # The oldest frame and the oldest state reach the prediction.
    noise = torch.randn(1, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    told = policy.predict(batch, noise)
    older = {view: np.concatenate([255 - video[:1], video[1:]]) for view, video in samples[0].images.items()}
    state = samples[0].state.copy()
    state[0] -= 0.5
    for change in ({"images": older}, {"state": state}):
        other = policy.predict(collate.robot([replace(samples[0], **change), samples[1]]), noise)
        assert not torch.equal(other[0, 0], told[0, 0]), change.keys()


def test_pictures_and_videos_in_a_batch_are_each_as_alone(place):
    """Robot types of both kinds in one run: the limits of videos are theirs, those of pictures the pictures'."""
    config = ModelConfig.load(place / "base")
    statistics = read_statistics(place / "statistics.json", WIDTH, 1e-6, True)
    table = next(iter(statistics.values()))
    prepare = Preprocessor.load(place / "base")
    both = Preprocessor(
        config, prepare.tokenizer, {"bimanual": table, "bimanual_2": table}, None, prepare.limits, prepare.video_limits
    )
    profiles = {"bimanual": video_profile(), "bimanual_2": load_embodiment("bimanual")}
    both.resolve = lambda robot_type: (robot_type, profiles[robot_type])
    rng = np.random.default_rng(0)
    state = rng.normal(size=(STATES, WIDTH)).astype(np.float32)

    def images(*frames):
        shape = (*frames, 72, 80, 3)
        return {view.key: rng.integers(0, 256, shape, dtype=np.uint8) for view in video_profile().views}

    pictures = Observation(images(), "Fold.", state, "bimanual_2")
    videos = Observation(images(4), "Fold.", state, "bimanual")
    inputs = both([pictures, videos])
    alone = [both([pictures]), both([videos])]
    assert inputs.image_grids == alone[0].image_grids + alone[1].image_grids == ((4, 4),) * 3 + ((2, 4),) * 6
    assert torch.equal(inputs.pixel_values, torch.cat([one.pixel_values for one in alone]))
    for row, one in enumerate(alone):
        kept = inputs.attention_mask[row]
        assert torch.equal(inputs.input_ids[row][kept], one.input_ids[0])
        assert torch.equal(inputs.position_ids[:, row][:, kept], one.position_ids[:, 0])


@pytest.mark.parametrize(
    ("history", "complaint"),
    [
        (FrameHistory(3, 2), r"'video': history: expected a multiple of 2 frames"),
        (FrameHistory(1, 2), r"'video': history: expected a multiple of 2 frames"),
    ],
    ids=str,
)
def test_a_history_that_the_model_s_patches_do_not_divide(history, complaint, place):
    with pytest.raises(ValueError, match=complaint):
        collator(place, replace(video_profile(), history=history))


def test_several_states_need_a_history_that_says_how_far_apart_they_are(place, tmp_path):
    with pytest.raises(DataError, match=r"episodes: the model takes 4 states, .*'bimanual' has no `history`"):
        start_run(config_for(place, "data.embodiment=bimanual"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
