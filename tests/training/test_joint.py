"""XR-1's post-training: flow and Choice Policies on one pass of the VLM, from a random checkpoint to a trained one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import CPU
from tests.training.support import Numbered, metrics
from xr0_engine import Engine
from xr0_engine.checkpoint import write_checkpoint
from xr0_engine.config import ModelConfig
from xr0_engine.family import ACTION_TOKENS
from xr0_engine.model.choice import choice_shapes
from xr0_engine.robot.layouts import MOBILE
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.quantiles import StateStatistics
from xr0_engine.sizes import tiny_xr1_config
from xr0_engine.training.base import read_base
from xr0_engine.training.batch import Collator
from xr0_engine.training.choice_turn import BEFORE_ACTIONS, BEFORE_STATE, BEHIND_SCORE, choice_turn, fresh_turn_heads
from xr0_engine.training.config import MOST_CHOICE_STEPS, TrainConfig, override
from xr0_engine.training.counts import step_counts
from xr0_engine.training.data.samples import RobotSample
from xr0_engine.training.distributed import world
from xr0_engine.training.draws import draw_flow, micro_batch_generator
from xr0_engine.training.model import JointPolicy, build_policy, checkpoint_name, load_policy, model_config
from xr0_engine.training.optim import decays, learning_rate
from xr0_engine.training.recipes import RECIPES, tiny
from xr0_engine.training.trainer import Trainer
from xr0_engine.types import Observation

LENGTH, WIDTH = 8, 60
VIEWS = ("ego", "left_wrist", "right_wrist")


def small():
    config = tiny_xr1_config()
    text = replace(config.text, num_layers=2, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2)
    vision = replace(config.vision, depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=64)
    vision = replace(vision, deepstack_layers=(0,))
    head = replace(config.head, num_layers=2, hidden_size=64, num_kv_heads=2, output_width=64)
    return replace(config, text=text, vision=vision, head=head)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xr1") / "model"
    write_checkpoint(folder, small())
    return folder


def statistics() -> dict[str, ActionStatistics]:
    std = np.full((LENGTH, WIDTH), 0.5)
    state = StateStatistics("post_training", np.full(WIDTH, -2.0), np.full(WIDTH, 2.0))
    return {"mobile": ActionStatistics(np.zeros_like(std), std, 1e-6, MOBILE.active_columns, None, state)}


def sample(number: int) -> RobotSample:
    """Lines whose slopes are the state's; every third one ends after five steps."""
    rng = np.random.default_rng(number)
    state = np.zeros((1, WIDTH), np.float32)
    state[0, :16] = rng.uniform(-1, 1, 16)
    actions = np.zeros((LENGTH, WIDTH), np.float32)
    actions[:, :7] = state[0, :7] * np.linspace(0.2, 1, LENGTH)[:, None]
    mask = np.zeros((LENGTH, WIDTH), bool)
    mask[: 5 if number % 3 == 2 else LENGTH, list(MOBILE.active_columns)] = True
    images = {view: np.full((32, 32, 3), 60 * place + number % 60, np.uint8) for place, view in enumerate(VIEWS)}
    return RobotSample(images, "Follow the line", state, actions, mask, "mobile", f"episode.json:{number}")


def config_for(base, *assignments, recipe: str = "xr1_post_train") -> TrainConfig:
    sizes = ("data.batch_size=3", f"data.chunk_length={LENGTH}", "run.threads=1", "flow.repeat=2")
    return override(tiny(RECIPES[recipe]()), [f"model.checkpoint={base}", *sizes, *assignments])


def loaded(base, *assignments) -> tuple[JointPolicy, Collator]:
    config, start = config_for(base, *assignments), read_base(base)
    xr0 = model_config(start.config, config)
    policy = build_policy(config, xr0)
    load_policy(policy, config, xr0, start, CPU)
    assert isinstance(policy, JointPolicy)
    return policy, Collator(base, xr0, statistics(), None, True, config.choice.state_tokens)


def train(base, folder, steps: int, *assignments):
    config = config_for(base, f"optim.steps={steps}", "optim.warmup_steps=1", "run.log_every=1", *assignments)
    with world() as here:
        Trainer(config, folder, here, Numbered(sample, 3), None, statistics()).run()
    return metrics(folder)


def test_recipes_are_the_published_ones():
    released, robodojo = RECIPES["xr1_post_train"](), RECIPES["xr1_robodojo"]()
    for run in (released, robodojo):
        assert (run.objective, run.family, run.model.train, run.model.dtype) == ("joint", "xr1", "all", "bfloat16")
        assert (run.model.position_offset, run.model.local_window, run.model.train_text_embeddings) == (10, None, False)
        assert (run.flow.repeat, run.flow.prefix, run.flow.max_prefix, run.flow.column_dropout) == (4, "code", 6, 0.5)
        assert (run.flow.mse_weight, run.flow.frequency_weight, run.flow.reweight_errors) == (0.5, 1.0, True)
        assert (run.flow.frequency, run.flow.frequency_excluded) == ("selected", (17, 18, 19))
        assert (run.choice.action_weight, run.choice.score_weight, run.choice.candidates) == (0.5, 0.5, 5)
        assert (run.data.batch_size, run.data.augment, run.data.random_crop) == (48, True, False)
        assert (run.optim.warmup_steps, run.optim.start_lr, run.optim.weight_decay) == (500, 5e-7, 0.1)
    assert (released.optim.steps, released.optim.peak_lr, released.optim.min_lr) == (10_000, 2e-5, 5e-6)
    assert (robodojo.optim.peak_lr, robodojo.optim.min_lr, robodojo.data.chunk_length) == (1e-5, 5e-7, 10)
    assert MOST_CHOICE_STEPS == ACTION_TOKENS


def test_warm_up_begins_at_its_own_rate():
    optim = RECIPES["xr1_post_train"]().optim
    rates = [learning_rate(optim, step) for step in (0, 499, 500, 9_999)]
    np.testing.assert_allclose(rates, [5e-7 + 1.95e-5 / 500, 2e-5, 2e-5, 5e-6])


def test_what_decays_is_what_the_released_rule_says(base):
    policy, _ = loaded(base)
    for name, parameter in policy.named_parameters():
        excluded = any(part in name for part in ("bias", "norm", "ln", "rotary_emb", "adaln"))
        assert decays(name, parameter) == (not excluded), name


@pytest.mark.parametrize("recipe", ["post_train_sync", "finetune_head", "pretrain_vlm"])
def test_recipes_of_the_other_family_are_refused(recipe, base):
    config = config_for(base, recipe=recipe)
    with pytest.raises(ValueError, match=rf"recipe {recipe} trains Xiaomi-Robotics-0, the checkpoint is of .*-1"):
        model_config(read_base(base).config, config)


def test_xr1s_recipe_refuses_xr0(base, tmp_path):
    from tests.training.support import tiny_checkpoint

    other = tiny_checkpoint(tmp_path / "xr0")
    with pytest.raises(ValueError, match=r"recipe xr1_post_train trains Xiaomi-Robotics-1, the checkpoint is of .*-0"):
        model_config(read_base(other).config, config_for(other))


def test_the_turn_is_the_released_text(base):
    _, collate = loaded(base)
    turn = collate.robot([sample(0), sample(2)]).turn
    tokenizer = collate._markup
    filler = tokenizer.decode([int(turn.ids[0, turn.state])], skip_special_tokens=False)
    for row, steps in zip(turn.ids, (LENGTH, 5), strict=True):
        text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
        behind = filler * (LENGTH - steps)
        assert text == BEFORE_STATE + filler + BEFORE_ACTIONS + filler * (steps + 1) + BEHIND_SCORE + behind
    assert turn.steps.tolist() == [LENGTH, 5]


@pytest.fixture(scope="module")
def base_of_states(tmp_path_factory):
    """A base that takes four states."""
    folder = tmp_path_factory.mktemp("states") / "model"
    config = small()
    write_checkpoint(folder, replace(config, head=replace(config.head, state_length=4)))
    return folder


@pytest.mark.parametrize(("rule", "shown"), [("last", [3]), ("each", [0, 1, 2, 3])])
def test_how_many_states_stand_in_the_turn_is_the_run_s(rule, shown, base_of_states):
    policy, collate = loaded(base_of_states, f"choice.state_tokens={rule}")
    states = np.random.default_rng(0).uniform(-1, 1, (4, WIDTH)).astype(np.float32)
    samples = [replace(sample(number), state=states + number) for number in (0, 2)]
    batch, filler = collate.robot(samples), collate._preprocess.tokenizer.pad_id
    turn = batch.turn
    encoded = [len(collate._encode(text)) for text in (BEFORE_STATE, BEFORE_ACTIONS)]
    assert (turn.states, turn.state, turn.first_action) == (len(shown), encoded[0], sum(encoded) + len(shown))
    assert turn.ids[0, turn.state : turn.state + turn.states].tolist() == [filler] * len(shown)
    with torch.no_grad():
        plain = policy.vlm.model.language_model.embed_tokens(turn.ids)
        made = policy.proposals.embed(plain, turn, batch.inputs.state)
        expected = policy.proposals.state_projector_choice(batch.inputs.state[:, shown])
    assert made.shape == plain.shape
    torch.testing.assert_close(made[:, turn.state : turn.state + turn.states], expected)
    torch.testing.assert_close(made[:, turn.first_action], policy.proposals.action_embed.weight[0].expand(2, -1))
    changed = [token for token in range(turn.ids.shape[1]) if not torch.equal(made[0, token], plain[0, token])]
    steps = range(turn.first_action, turn.first_action + LENGTH + 1)
    assert changed == [*range(turn.state, turn.state + turn.states), *steps]


def test_an_older_state_reaches_the_proposals_where_each_has_a_token(base_of_states):
    found = {}
    for rule in ("last", "each"):
        policy, collate = loaded(base_of_states, f"choice.state_tokens={rule}")
        proposed = []
        for first in (0.0, 0.9):
            states = np.zeros((4, WIDTH), np.float32)
            states[0] = first
            with torch.no_grad():
                proposed.append(policy.propose(collate.robot([replace(sample(0), state=states)]))[1])
        found[rule] = torch.equal(*proposed)
    assert found == {"last": True, "each": False}


def test_the_dit_reads_the_same_with_and_without_the_turn(base):
    policy, collate = loaded(base)
    batch = collate.robot([sample(number) for number in range(3)])
    with torch.no_grad():
        kv, candidates, scores = policy.propose(batch)
        plain = policy.prefill(batch.inputs)
    assert kv.keys.shape == plain.keys.shape
    torch.testing.assert_close(kv.keys, plain.keys)
    torch.testing.assert_close(kv.values, plain.values)
    assert candidates.shape == (3, 5, LENGTH, WIDTH)
    assert scores.shape == (3, 5)


def test_a_short_samples_turn_ends_with_it(base):
    """Its proposals are the same beside longer ones, whose turns are padded for."""
    policy, collate = loaded(base)
    with torch.no_grad():
        _, beside, scores = policy.propose(collate.robot([sample(2), sample(0)]))
        batch = collate.robot([sample(2)])
        alone_turn = choice_turn(collate._encode, [5], 5, 0)
        shorter = replace(batch, turn=alone_turn, actions=batch.actions[:, :5], mask=batch.mask[:, :5])
        _, alone, alone_scores = policy.propose(shorter)
    assert alone_turn.ids.shape[1] == batch.turn.ids.shape[1] - (LENGTH - 5)
    torch.testing.assert_close(beside[:1, :, :5], alone)
    torch.testing.assert_close(scores[:1], alone_scores)


def test_gradients_reach_all_but_the_text_embeddings(base):
    policy, collate = loaded(base)
    batch = collate.robot([sample(number) for number in range(3)])
    draw = draw_flow(policy.flow, micro_batch_generator(0, 1), *batch.actions.shape)
    policy(batch, draw).loss.backward()
    silent = [name for name, p in policy.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert silent == ["vlm.model.language_model.embed_tokens.weight"]
    used = policy.proposals.action_embed.weight.grad.any(1)
    assert used.tolist() == [place < LENGTH for place in range(ACTION_TOKENS)]


def test_micro_batches_add_up_to_the_whole(base):
    """The four losses of two halves, divided by the counts of the step, are those of both together."""
    policy, collate = loaded(base, "flow.repeat=1", "flow.prefix=none")
    samples = [sample(number) for number in range(4)]
    whole = collate.robot(samples)
    draw = draw_flow(policy.flow, micro_batch_generator(0, 1), *whole.actions.shape)
    halves = [collate.robot(samples[:3]), collate.robot(samples[3:])]
    draws = [replace(draw, noise=draw.noise[part], t=draw.t[part]) for part in (slice(0, 3), slice(3, 4))]
    counts = step_counts(halves, draws, lambda values: values, policy.flow)
    with torch.no_grad():
        parts = [policy(half, drawn, counts).parts for half, drawn in zip(halves, draws, strict=True)]
        expected = policy(whole, draw).parts
    for name, value in expected.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, msg=name)


def test_a_run_is_resumed_bit_for_bit_and_gives_a_model(base, tmp_path):
    whole = train(base, tmp_path / "whole", 4, "run.checkpoint_every=2")
    with pytest.raises(InterruptedError):
        stop_after(2, base, tmp_path / "cut")
    resumed = train(base, tmp_path / "cut", 4, "run.checkpoint_every=2")
    names = ("loss", "mse", "frequency", "choice", "score", "grad_norm")
    assert [[line.get(name) for name in names] for line in whole if "loss" in line] == [
        [line.get(name) for name in names] for line in resumed if "loss" in line
    ]
    first, second = (stored(tmp_path / name / "model") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not choice_shapes(small()).keys() & first.keys()
    assert ModelConfig.load(tmp_path / "whole" / "model").head.position_offset == 10
    engine = Engine.from_pretrained(tmp_path / "whole" / "model", device="cpu", dtype="float32")
    asked = sample(0)
    chunk = engine.infer(Observation(asked.images, asked.instruction, asked.state, prepared=True), seed=0)
    assert chunk.actions.shape == (LENGTH, WIDTH)
    assert np.isfinite(chunk.actions).all()
    # The state is the statistics' quantiles' here too.
    told = engine.infer(Observation(asked.images, asked.instruction, asked.state + 100, prepared=True), seed=0)
    further = engine.infer(Observation(asked.images, asked.instruction, asked.state + 200, prepared=True), seed=0)
    assert np.array_equal(told.actions, further.actions)


def stored(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def stop_after(steps: int, base, folder):
    config = config_for(base, "optim.steps=4", "optim.warmup_steps=1", "run.log_every=1", "run.checkpoint_every=2")

    class Ends(Numbered):
        def __next__(self):
            # The step after the last is made ready meanwhile.
            if self.number > steps:
                raise InterruptedError
            return super().__next__()

    with world() as here:
        Trainer(config, folder, here, Ends(sample, 3), None, statistics()).run()


def test_choice_tensors_come_from_the_base_or_start_anew(base, tmp_path):
    fresh, _ = loaded(base)
    again, _ = loaded(base)
    weight = fresh.proposals.score_embed.weight
    assert torch.equal(weight, again.proposals.score_embed.weight)
    assert 0.01 < float(weight.detach().std()) < 0.03
    folder = tmp_path / "with"
    folder.mkdir()
    for file in base.iterdir():
        if "index" not in file.name and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    own = {checkpoint_name(f"proposals.{name}"): value + 1 for name, value in fresh_turn_heads(small(), 3).items()}
    assert own.keys() == choice_shapes(small()).keys()
    save_file({**stored(base), **own}, folder / "model.safetensors")
    kept, _ = loaded(folder)
    assert torch.equal(kept.proposals.score_embed.weight, own["vlm.model.score_embed.weight"])


def test_a_checkpoint_of_the_run_keeps_the_choice_tensors(base, tmp_path):
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    train(base, tmp_path / "run", 1, "model.dtype=bfloat16", "model.checkpoint_activations=true")
    saved = FileSystemReader(next((tmp_path / "run" / "checkpoints").iterdir())).read_metadata().state_dict_metadata
    assert sum(name.startswith("model.proposals.") for name in saved) == 14


@pytest.mark.parametrize(
    ("assignment", "has"), [("data.state_quantiles=true", False), ("data.state_quantiles=false", True)]
)
def test_states_by_quantiles_or_not_must_be_meant(assignment, has, base, tmp_path):
    tables = statistics() if has else {name: replace(item, state=None) for name, item in statistics().items()}
    with world() as here, pytest.raises(ValueError, match=r"robot type mobile: .*quantiles of states"):
        Trainer(config_for(base, assignment), tmp_path / "run", here, Numbered(sample, 3), None, tables)


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("model.train=head", "model.train: expected `all` with objective joint"),
        ("data.chunk_length=61", "data.chunk_length: expected at most 60 with objective joint"),
        ("optim.start_lr=1", "optim.start_lr: expected 0 to peak_lr"),
        ("choice.state_tokens=all", "choice.state_tokens: expected .*last.*each"),
        ("flow.frequency_excluded=-1", "flow.frequency_excluded: expected columns from 0"),
    ],
)
def test_contradictions_are_refused(assignment, complaint, base):
    with pytest.raises(ValueError, match=complaint):
        config_for(base, assignment)


def test_state_tokens_are_of_the_turn_alone(base):
    said = "choice.state_tokens: expected `last` with objective flow, which has no turn"
    with pytest.raises(ValueError, match=said):
        config_for(base, "choice.state_tokens=each", recipe="post_train_async")


def test_other_numbers_of_candidates_are_refused(base):
    with pytest.raises(ValueError, match=r"choice.candidates: expected 5, as the family has; got 3"):
        model_config(read_base(base).config, config_for(base, "choice.candidates=3"))
