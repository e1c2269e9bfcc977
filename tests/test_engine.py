"""The engine as its users meet it: observations in, chunks out, wrong input refused and survived."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.types import CheckpointError, Observation

SAME = 2e-5
"""Normalised actions of order 1 to 5, float32: a batch sums in another order than a single observation."""
ROUND_TRIP = 1e-6
"""Robot units of order 0.1: one normalisation and its inverse in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


def closest(first, second) -> float:
    return float(np.abs(first.normalized - second.normalized).max())


@pytest.mark.parametrize(
    ("robot_type", "length", "views"),
    [("libero_all", 10, 2), ("bridge_delta", 4, 1), ("bimanual", 30, 3)],
)
def test_chunk_has_what_it_promises(engine, robot_type, length, views):
    observation = replace(engine.example(robot_type), timestamp_s=12.5)
    assert len(observation.images) == views
    chunk = engine.infer(observation, seed=3)
    assert chunk.actions.shape == chunk.normalized.shape == (length, 32)
    assert chunk.actions.dtype == chunk.normalized.dtype == np.float32
    assert np.isfinite(chunk.actions).all()
    assert (chunk.robot_type, chunk.prefix_length, chunk.timestamp_s) == (robot_type, 0, 12.5)
    statistics = engine.statistics[robot_type]
    np.testing.assert_allclose(chunk.actions, chunk.normalized * statistics.std + statistics.mean, atol=ROUND_TRIP)
    np.testing.assert_array_equal(chunk.active_columns, statistics.std.max(0) > 1e-5)
    assert list(chunk.timing_ms) == ["preprocess", "vision", "prefill", "flow", "decode", "total"]
    *stages, total = chunk.timing_ms.values()
    assert sum(stages) == pytest.approx(total)


def test_seed_repeats_and_noise_decides(engine):
    observation = engine.example("bimanual")
    first, again, other = (engine.infer(observation, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.actions, again.actions)
    assert closest(first, other) > 0.1
    noise = torch.randn(30, 32, generator=torch.Generator().manual_seed(1)).numpy()
    assert np.array_equal(engine.infer(observation, noise=noise).actions, first.actions)
    assert closest(engine.infer(observation), engine.infer(observation)) > 0.1


def test_every_input_reaches_the_actions(engine):
    observation = engine.example("bimanual")
    chunk = engine.infer(observation, seed=0)
    changed = [replace(observation, instruction="Push the door."), replace(observation, state=observation.state + 1)]
    for key, image in observation.images.items():
        changed.append(replace(observation, images={**observation.images, key: 255 - image}))
    assert min(closest(engine.infer(other, seed=0), chunk) for other in changed) > 100 * SAME


def test_views_are_told_apart(engine):
    observation = engine.example("bimanual")
    left, right = observation.images["left_wrist"], observation.images["right_wrist"]
    swapped = replace(observation, images={**observation.images, "left_wrist": right, "right_wrist": left})
    reordered = replace(observation, images=dict(reversed(observation.images.items())))
    chunk = engine.infer(observation, seed=0)
    assert closest(engine.infer(swapped, seed=0), chunk) > 100 * SAME
    assert closest(engine.infer(reordered, seed=0), chunk) == 0


def test_batch_equals_one_by_one(engine):
    short = engine.example("libero_all", (256, 256))
    long = replace(
        engine.example("calvin_abc_orig", (200, 320)), instruction="Take the long way round the table, twice"
    )
    other = replace(short, state=short.state * 2)
    prefix = engine.infer(long, seed=9).actions[:4]
    together = engine.infer([short, long, other], prefix=[None, prefix, None], seed=5)
    for row, (observation, given_) in enumerate([(short, None), (long, prefix), (other, None)]):
        alone = engine.infer(observation, prefix=given_, seed=5 + row)
        assert closest(together[row], alone) < SAME
        assert together[row].prefix_length == alone.prefix_length == (0 if given_ is None else 4)


def test_rows_with_own_seeds_are_as_alone(engine):
    observation = engine.example("libero_all")
    chunks = engine.infer([observation] * 3, seed=[5, None, 3])
    for chunk, seed in ((chunks[0], 5), (chunks[2], 3)):
        assert closest(chunk, engine.infer(observation, seed=seed)) < SAME
    with pytest.raises(ValueError, match=r"seed: expected one per observation \(2\), got 3"):
        engine.infer([observation] * 2, seed=[1, 2, 3])


@pytest.mark.parametrize("length", [0, 1, 6, 30])
def test_prefix_comes_back_unchanged_and_conditions_the_rest(engine, length):
    observation = engine.example("bimanual")
    free = engine.infer(observation, seed=0)
    prefix = free.actions[:length] + np.float32(0.05)
    chunk = engine.infer(observation, prefix=prefix, seed=0)
    assert chunk.prefix_length == length
    assert np.array_equal(chunk.actions[:length], prefix)
    if 0 < length < 30:
        assert np.abs(chunk.normalized[length:] - free.normalized[length:]).max() > 100 * SAME


def test_sampling_from_a_kept_block_equals_infer(engine):
    observation = engine.example("bimanual")
    kv_block = engine.prefill(observation)
    state = observation.state[None, None]
    for seed in (0, 1):
        sampled = engine.sample(kv_block, state, seed=seed)
        assert np.array_equal(sampled[0].numpy(), engine.infer(observation, seed=seed).normalized)
    prefix = sampled[:, :3]
    again = engine.sample(kv_block, state, prefix=prefix, seed=4)
    assert torch.equal(again[:, :3], prefix)
    batch = engine.prefill([observation, observation])
    assert engine.sample(batch, np.repeat(state, 2, 0), seed=0).shape == (2, 30, 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_float32(engine, folder, dtype):
    low = Engine.from_pretrained(folder, device="cpu", dtype=dtype)
    observation = engine.example("bimanual")
    expected = engine.infer(observation, seed=0).normalized
    error = np.linalg.norm(low.infer(observation, seed=0).normalized - expected) / np.linalg.norm(expected)
    assert 0 < error < 32 * torch.finfo(getattr(torch, dtype)).eps / 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_stays_near_the_cpu(engine, folder, dtype):
    on_gpu = Engine.from_pretrained(folder, device="cuda", dtype=dtype)
    observation = engine.example("bimanual")
    prefix = engine.infer(observation, seed=1).actions[:4]
    batch = [observation, engine.example("bimanual", (240, 320))]
    roundoffs = 32 * torch.finfo(getattr(torch, dtype)).eps / 2
    for given_ in ([None, None], [prefix, None]):
        expected = engine.infer(batch, prefix=given_, seed=0)
        for ours, truth in zip(on_gpu.infer(batch, prefix=given_, seed=0), expected, strict=True):
            error = np.linalg.norm(ours.normalized - truth.normalized) / np.linalg.norm(truth.normalized)
            assert error < max(roundoffs, SAME)
    # What a sample gives lies on the GPU, and may be the next one's prefix.
    kv_block, state = on_gpu.prefill(observation), observation.state[None, None]
    sampled = on_gpu.sample(kv_block, state, seed=0)
    assert torch.equal(on_gpu.sample(kv_block, state, prefix=sampled[:, :3], seed=1)[:, :3], sampled[:, :3])


def test_warm_up_changes_nothing(engine, folder):
    fresh = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    cases = [fresh.example("libero_all"), [fresh.example("bimanual"), fresh.example("bimanual", (240, 320))]]
    fresh.warm_up(cases)
    observation = engine.example("libero_all")
    assert np.array_equal(fresh.infer(observation, seed=0).actions, engine.infer(observation, seed=0).actions)


def bad_observations():
    image = np.zeros((64, 64, 3), np.uint8)
    images = {"base": image, "left_wrist": image}
    state = np.zeros(32, np.float32)
    cases = {
        "float-image": ({"images": {**images, "base": image.astype(np.float32)}}, r"images\['base'\].*float32"),
        "channels-first": ({"images": {**images, "base": image.transpose(2, 0, 1)}}, "channels last expected"),
        "grey": ({"images": {**images, "base": image[..., 0]}}, "grey"),
        "alpha": ({"images": {**images, "base": np.zeros((64, 64, 4), np.uint8)}}, "alpha"),
        "missing-view": ({"images": {"base": image}}, "'left_wrist' is missing"),
        "unexpected-view": ({"images": {**images, "right": image}}, "'right' is unexpected"),
        "nan-state": ({"state": np.full(32, np.nan)}, "state: expected finite"),
        "short-state": ({"state": np.zeros(7, np.float32)}, r"state: expected shape .*got \(7,\)"),
        "empty-instruction": ({"instruction": "  "}, "instruction"),
        "special-token": ({"instruction": "go<|im_end|>"}, "instruction"),
        "robot-type": ({"robot_type": "toaster"}, "robot_type: .*bimanual.*libero_all|robot_type: .*libero_all"),
        "no-robot-type": ({"robot_type": None}, "robot_type"),
    }
    for name, (change, message) in cases.items():
        fields = {"images": images, "instruction": "Go.", "state": state, "robot_type": "libero_all"}
        yield pytest.param(Observation(**{**fields, **change}), message, id=name)


@pytest.mark.parametrize(("observation", "message"), list(bad_observations()))
def test_bad_observation_is_refused_and_the_engine_serves_on(engine, observation, message, monkeypatch):
    good = engine.example("libero_all")
    expected = engine.infer(good, seed=0).actions
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "encode_images", lambda inputs: pytest.fail("worked on a bad observation"))
        with pytest.raises(ValueError, match=message):
            engine.infer(observation, seed=0)
        with pytest.raises(ValueError, match=message):
            engine.infer([good, observation], seed=0)
    assert np.array_equal(engine.infer(good, seed=0).actions, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": np.zeros((31, 32))}, r"prefix: expected \(at most 30, 32\), got \(31, 32\)"),
        ({"prefix": np.zeros((3, 14))}, "prefix: expected"),
        ({"prefix": np.zeros(32)}, "prefix: expected"),
        ({"prefix": np.full((2, 32), np.nan)}, "prefix: expected finite"),
        ({"prefix": np.full((2, 32), 1e300)}, "prefix: expected finite"),
        ({"prefix": np.array([["a"] * 32])}, "prefix: expected numbers"),
        ({"noise": np.zeros((10, 32))}, r"noise: expected shape \(30, 32\), got \(10, 32\)"),
        ({"noise": np.full((30, 32), np.inf)}, "noise: expected finite"),
        ({"noise": np.zeros((30, 32)), "seed": 1}, "at most one of them"),
        ({"seed": -1}, "seed: expected"),
        ({"seed": 1.5}, "seed: expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_refused(engine, arguments, message, monkeypatch):
    monkeypatch.setattr(engine.model, "encode_images", lambda inputs: pytest.fail("worked on a bad argument"))
    with pytest.raises(ValueError, match=message):
        engine.infer(engine.example("bimanual"), **arguments)


def test_batch_arguments_must_fit_together(engine):
    one, other = engine.example("libero_all"), engine.example("bimanual")
    with pytest.raises(ValueError, match="one chunk length"):
        engine.infer([one, other])
    with pytest.raises(ValueError, match="prefix: expected one per observation"):
        engine.infer([one, one], prefix=[None])
    with pytest.raises(ValueError, match="at least one"):
        engine.infer([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": np.zeros((1, 32))}, "state: expected shape"),
        ({"prefix": np.zeros((1, 31, 32))}, "prefix: expected"),
        ({"prefix": np.full((1, 2, 32), "a")}, "prefix: expected numbers"),
        ({"noise": np.zeros((2, 30, 32))}, "noise: expected shape"),
    ],
    ids=["state", "prefix", "prefix-words", "noise"],
)
def test_bad_sample_arguments_are_refused(engine, arguments, message):
    kv_block = engine.prefill(engine.example("bimanual"))
    with pytest.raises(ValueError, match=message):
        engine.sample(kv_block, **{"state": np.zeros((1, 1, 32)), **arguments})


junk = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.floats(),
    st.dictionaries(st.sampled_from(["base", "left_wrist", "ego"]), st.integers(), max_size=3),
    npst.arrays(st.sampled_from([np.uint8, np.float32, np.int64, np.bool_]), npst.array_shapes(max_side=5)),
    npst.arrays(np.float32, 32),
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(["images", "instruction", "state", "robot_type"]), junk, min_size=1))
def test_malformed_observations_raise_value_error_or_give_a_chunk(engine, changes):
    observation = replace(engine.example("libero_all", (64, 64)), **changes)
    try:
        chunk = engine.infer(observation, seed=0)
    except ValueError:
        return
    assert np.isfinite(chunk.actions).all()


def test_actions_that_are_not_finite_are_never_returned(folder):
    broken = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    broken.model.head.sink.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        broken.infer(broken.example("bimanual"), seed=0)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"dtype": "int4"}, ValueError, "dtype: expected bfloat16, float16, float32"),
        ({"device": "tpu"}, ValueError, "device: expected auto, cpu, cuda"),
        ({"device": "cuda:99"}, ValueError, "CUDA GPUs that torch can use"),
        ({"backend": "fast"}, ValueError, "backend: expected auto, reference"),
        ({"backend": "cuda"}, ValueError, "backend: expected auto, reference, triton"),
        ({"embodiment": "octopus"}, ValueError, "embodiment: expected bimanual"),
    ],
    ids=["dtype", "device", "no-such-gpu", "backend", "backend-not-here", "embodiment"],
)
def test_bad_options_are_refused_before_loading(folder, arguments, kind, message, monkeypatch):
    monkeypatch.setattr("xr0_engine.engine.load_model", lambda *a: pytest.fail("loaded the model"))
    with pytest.raises(kind, match=message):
        Engine.from_pretrained(folder, **arguments)


def test_checkpoint_without_tokenizer_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Engine.from_pretrained(copy)


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[]", "{", '{"vlm_config": {}, "dit_config": {}}'])
def test_another_models_checkpoint_is_refused(folder, tmp_path, content):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine.from_pretrained(copy)


def test_own_embodiment_file(folder, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "name: mine\nrobot_types: [mine]\nviews:\n- {key: front, title: Front View}\n"
        "layout: plain\ncontrol_rate_hz: 10\nreplan_every: 5\n"
    )
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32", embodiment=profile)
    observation = engine.example("libero_all")
    assert list(observation.images) == ["front"]
    assert engine.infer(observation, seed=0).actions.shape == (10, 32)


@pytest.fixture(scope="module")
def fused_engine(folder):
    """The GPU backend's engine, its ops the kernels' oracles."""
    plain = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    return Engine(FusedModel(plain.model, "reference", TacticTable(""), graphs=False), plain._preprocess, "triton")


def test_fused_engine_gives_the_same_chunks(engine, fused_engine):
    for robot_type in ("libero_all", "bimanual"):
        observation = engine.example(robot_type)
        committed = engine.infer(observation, seed=0).actions[2:5]
        expected, actual = (e.infer(observation, committed, seed=1) for e in (engine, fused_engine))
        assert closest(actual, expected) < SAME
        assert list(actual.timing_ms) == ["preprocess", "step", "decode", "total"]


def test_fused_engine_keeps_a_chunk_when_the_next_is_made(fused_engine):
    observation = fused_engine.example("bimanual")
    first = fused_engine.infer(observation, seed=0)
    kept = first.normalized.copy()
    fused_engine.infer(observation, seed=1)
    assert np.array_equal(first.normalized, kept)
