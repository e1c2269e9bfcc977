"""Policy type `xr0`: LeRobot's batches in, its actions out, by a policy that echoes what it was asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot_policy_xr0.configuration_xr0 import XR0Config
from lerobot_policy_xr0.modeling_xr0 import XR0Policy

from xr0_engine import ActionChunk
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.robot.embodiment import load_embodiment

RNG = np.random.default_rng(0)
WIDTH = 32


class Echo:
    """Action t of a chunk: the state's columns plus t, the prefix first. asked: (observation, prefix, seed)."""

    def __init__(self, length: int) -> None:
        self.length, self.asked = length, []

    def infer(self, observation, prefix=None, *, seed=None):
        self.asked.append((observation, prefix, seed))
        actions = observation.state[0] + np.arange(self.length, dtype=np.float32)[:, None]
        if prefix is not None:
            actions[: len(prefix)] = prefix
        return ActionChunk(actions, actions, np.ones(WIDTH, bool), "robot")


def config(cameras=("image", "image2"), state=8, action=7, **changes) -> XR0Config:
    images = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 24, 32)) for name in cameras}
    settings = {
        "server": "ws://127.0.0.1:8000",
        "device": "cpu",
        "views": {"base": "image", "left_wrist": "image2"},
        "input_features": {**images, "observation.state": PolicyFeature(FeatureType.STATE, (state,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (action,))},
    }
    return XR0Config(**{**settings, **changes})


def policy(profile="libero", length=10, max_prefix=6, **changes) -> XR0Policy:
    info = load_embodiment(profile).robot_info(length, WIDTH, max_prefix)
    made = XR0Policy(config(**changes), source=Echo(length), info=info)
    made.reset()
    return made


def batch(rows=1, state=8, **changes):
    """As LeRobot's preprocessor gives it, and the bytes of its images."""
    pixels = {name: RNG.integers(0, 256, (rows, 24, 32, 3), np.uint8) for name in ("image", "image2")}
    images = {
        f"observation.images.{name}": torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        for name, frames in pixels.items()
    }
    numbers = torch.arange(rows * state, dtype=torch.float32).view(rows, state) * 100
    made = {**images, "observation.state": numbers, "task": ["open the drawer"] * rows, "robot_type": ""}
    return {**made, **changes}, pixels


def test_what_lerobot_sees_comes_to_the_policy_unchanged():
    made = policy(prepared=True, robot_type="libero_all")
    given, pixels = batch(rows=2)
    made.predict_action_chunk(given)
    assert len(made._source.asked) == 2
    for row, (observation, prefix, seed) in enumerate(made._source.asked):
        np.testing.assert_array_equal(observation.images["base"], pixels["image"][row])
        np.testing.assert_array_equal(observation.images["left_wrist"], pixels["image2"][row])
        assert observation.state.shape == (1, WIDTH)
        np.testing.assert_array_equal(observation.state[0, :8], given["observation.state"][row].numpy())
        assert not observation.state[0, 8:].any()
        assert (observation.instruction, observation.robot_type) == ("open the drawer", "libero_all")
        assert observation.prepared
        assert (prefix, seed) == (None, None)


def test_images_may_be_bytes_and_the_task_one_text():
    made = policy()
    given, pixels = batch()
    given["observation.images.image"] = torch.from_numpy(pixels["image"]).permute(0, 3, 1, 2)
    made.predict_action_chunk({**given, "task": "go"})
    observation = made._source.asked[0][0]
    np.testing.assert_array_equal(observation.images["base"], pixels["image"][0])
    assert (observation.instruction, observation.prepared) == ("go", False)


def test_a_chunk_has_lerobots_columns():
    chunk = policy(action_columns=[6, 0, 2], action=3).predict_action_chunk(batch(rows=2)[0])
    assert chunk.shape == (2, 10, 3)
    assert chunk.dtype == torch.float32
    assert chunk[1, 4].tolist() == [1404, 804, 1004]


def test_state_columns_go_where_they_are_said_to():
    made = policy(state_columns=[5, 20], state=2)
    made.predict_action_chunk(batch(state=2)[0])
    state = made._source.asked[0][0].state[0]
    assert np.flatnonzero(state).tolist() == [20]
    assert state[20] == 100


@pytest.mark.parametrize(("steps", "looks"), [(None, [0, 10, 20]), (4, [0, 4, 8, 12, 16, 20, 24])])
def test_select_action_looks_again_after_its_steps(steps, looks):
    made = policy(n_action_steps=steps)
    seen = []
    for step in range(25):
        given = batch(rows=2)[0]
        given["observation.state"] = given["observation.state"] * 0 + step
        action = made.select_action(given)
        assert action.shape == (2, 7)
        seen.append(float(action[0, 0]))
    last = [max(look for look in looks if look <= step) for step in range(25)]
    assert seen == [look + (step - look) for step, look in enumerate(last)]
    assert len(made._source.asked) == 2 * len(looks)


def test_a_new_episode_executes_nothing_of_the_last():
    made = policy()
    made.select_action(batch()[0])
    made.reset()
    made.select_action(batch()[0])
    assert len(made._source.asked) == 2


def test_with_a_seed_the_noise_is_the_episodes_the_calls_and_the_rows():
    def seeds(seed):
        made = policy(seed=seed)
        for _ in range(2):
            made.predict_action_chunk(batch(rows=2)[0])
        made.reset()
        made.predict_action_chunk(batch(rows=2)[0])
        return [asked[2] for asked in made._source.asked]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 12
    assert seeds(None) == [None] * 6


BIMANUAL_STATE = [*range(7, 13), 6, *range(21, 27), 20]
BIMANUAL = {
    "profile": "bimanual",
    "length": 30,
    "views": {"ego": "top", "left_wrist": "image", "right_wrist": "image2"},
    "state_columns": BIMANUAL_STATE,
    "action_columns": BIMANUAL_STATE,
}


def bimanual(**changes) -> XR0Policy:
    settings = {**BIMANUAL, **changes}
    profile, length = settings.pop("profile"), settings.pop("length")
    info = load_embodiment(profile).robot_info(length, WIDTH, 6)
    chosen = config(("top", "image", "image2"), 14, len(settings["action_columns"]), **settings)
    return XR0Policy(chosen, source=Echo(length), info=info)


def test_two_arms_get_absolute_joints():
    given = batch(state=14)[0]
    given["observation.images.top"] = given["observation.images.image"]
    chunk = bimanual().predict_action_chunk(given)
    assert chunk.shape == (1, 30, 14)
    # The echo's delta is the state and t; to the state again, which has 0, 100, 200 ... in LeRobot's order.
    np.testing.assert_array_equal(chunk[0, 3].numpy(), 2 * np.arange(14) * 100 + 3)


def test_two_arms_have_no_columns_of_hands_and_no_prefix():
    with pytest.raises(ValueError, match=r"action_columns: .* columns \[0, 1\] move the hands"):
        bimanual(action_columns=[0, 1, *BIMANUAL_STATE[2:]])
    with pytest.raises(ValueError, match=r"state_columns: actions \[20\] are relative"):
        bimanual(state_columns=[*BIMANUAL_STATE[:-1], 5])
    with pytest.raises(ValueError, match="state_columns: expected 14 columns of layout bimanual, got none"):
        bimanual(state_columns=None)
    made = bimanual()
    assert not made.supports_rtc()
    given = batch(state=14)[0]
    given["observation.images.top"] = given["observation.images.image"]
    with pytest.raises(ValueError, match="relative to the pose at the observation"):
        made.predict_action_chunk(given, inference_delay=2, prev_chunk_left_over=torch.ones(10, 14))


def test_rtc_is_a_prefix_of_what_is_executed_meanwhile():
    made = policy(rtc_config=RTCConfig())
    assert made.supports_rtc()
    left_over = torch.arange(1, 71, dtype=torch.float32).view(10, 7)
    chunk = made.predict_action_chunk(batch()[0], inference_delay=3, prev_chunk_left_over=left_over)
    prefix = made._source.asked[0][1]
    assert prefix.shape == (3, WIDTH)
    np.testing.assert_array_equal(prefix[:, :7], left_over[:3].numpy())
    assert not prefix[:, 7:].any()
    np.testing.assert_array_equal(chunk[0, :3].numpy(), left_over[:3].numpy())
    assert chunk[0, 3, 1] == 103


@pytest.mark.parametrize(
    ("delay", "real", "expected"),
    [
        pytest.param(0, 10, None, id="no-delay"),
        pytest.param(None, 10, None, id="delay-unknown"),
        pytest.param(4, 2, 2, id="filled-up-with-zeros"),
        pytest.param(4, 0, None, id="nothing-left"),
        pytest.param(9, 10, 6, id="longer-than-trained"),
    ],
)
def test_a_prefix_is_what_there_is_and_was_trained(delay, real, expected, caplog):
    made = policy()
    left_over = torch.zeros(1, 10, 7)
    left_over[:, :real] = 1.5
    for _ in range(2):
        made.predict_action_chunk(batch()[0], inference_delay=delay, prev_chunk_left_over=left_over)
    prefix = made._source.asked[0][1]
    assert (None if prefix is None else len(prefix)) == expected
    assert sum("was trained with prefixes" in line for line in caplog.messages) == (delay == 9)


def test_rtc_is_refused_where_it_was_not_trained_or_makes_no_sense():
    untrained = policy(max_prefix=0)
    assert not untrained.supports_rtc()
    left_over = torch.ones(10, 7)
    with pytest.raises(ValueError, match="trained without prefixes"):
        untrained.predict_action_chunk(batch()[0], inference_delay=1, prev_chunk_left_over=left_over)
    with pytest.raises(ValueError, match="select_action executes chunk after chunk"):
        policy(rtc_config=RTCConfig()).select_action(batch()[0])
    with pytest.raises(ValueError, match="a batch of 2"):
        policy().predict_action_chunk(batch(rows=2)[0], inference_delay=1, prev_chunk_left_over=left_over)
    with pytest.raises(ValueError, match=r"prev_chunk_left_over: expected \(steps, 7\)"):
        policy().predict_action_chunk(batch()[0], inference_delay=1, prev_chunk_left_over=torch.ones(10, 6))
    with pytest.raises(ValueError, match="prev_chunk_left_over: expected finite"):
        policy().predict_action_chunk(batch()[0], inference_delay=1, prev_chunk_left_over=left_over * torch.nan)


PIXELS = torch.zeros(1, 3, 24, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation.state": None}, "observation.state: expected a tensor"),
        ({"observation.state": torch.zeros(1, 7)}, "observation.state: expected 8 numbers, got 7"),
        ({"observation.state": torch.zeros(1, 1, 8)}, "observation.state: expected 2 dimensions"),
        ({"observation.state": torch.full((1, 8), torch.nan)}, "observation.state: expected finite"),
        ({"observation.images.image": PIXELS[0]}, "observation.images.image: expected 4 dimensions"),
        ({"observation.images.image": PIXELS[:, :1]}, r"observation.images.image: expected \(1, 3, height, width\)"),
        ({"observation.images.image": PIXELS + 255}, r"expected values in \[0, 1\], got 255 to 255"),
        ({"observation.images.image": PIXELS + torch.nan}, r"expected values in \[0, 1\]"),
        ({"observation.images.image": PIXELS.int()}, "expected uint8 or floats"),
        ({"observation.images.image": PIXELS.permute(0, 2, 3, 1)}, r"expected \(1, 3, height, width\), got \(1, 24"),
        ({"task": None}, "task: expected 1 texts, got None"),
        ({"task": [""]}, "task: expected 1 texts"),
        ({"task": ["a", "b"]}, "task: expected 1 texts"),
    ],
)
def test_other_batches_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        policy().predict_action_chunk(batch(**changes)[0])


def test_what_the_policy_does_not_take_is_refused():
    with pytest.raises(ValueError, match="noise: expected none"):
        policy().predict_action_chunk(batch()[0], noise=torch.zeros(1, 10, 7))
    with pytest.raises(ValueError, match="no further arguments, got guidance"):
        policy().predict_action_chunk(batch()[0], guidance=1)
    for call in (lambda: policy().forward({}), lambda: policy().get_optim_params(), config().get_optimizer_preset):
        with pytest.raises(NotImplementedError, match="xr0 train"):
            call()


MEAN_STD = {"STATE": NormalizationMode.MEAN_STD}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": None}, "server, checkpoint: expected one of them"),
        ({"checkpoint": "folder"}, "server, checkpoint: expected one of them"),
        ({"n_obs_steps": 2}, "n_obs_steps: expected 1"),
        ({"state_columns": [1, 1]}, "state_columns: expected columns from 0, none twice"),
        ({"action_columns": [-1]}, "action_columns: expected columns from 0"),
        ({"action_columns": [0, 1]}, "action_columns: expected 7 columns"),
        ({"action_columns": [0, 1, 2, 3, 4, 5, 32]}, "action_columns: expected columns below 32"),
        ({"views": {"base": "image", "left_wrist": "image"}}, "views: expected one camera for each view"),
        ({"views": {"base": "image", "wrist": "image2"}}, "views: expected some of base, left_wrist, got wrist"),
        ({"views": {"base": "image"}}, r"the policy sees left_wrist \(observation.images.left_wrist\)"),
        ({"n_action_steps": 0}, "n_action_steps: expected at least 1"),
        ({"n_action_steps": 11}, "n_action_steps: expected 1 to 10"),
        ({"normalization_mapping": MEAN_STD}, "normalization_mapping: expected IDENTITY"),
        ({"output_features": {}}, "output_features: expected action"),
        ({"input_features": {}}, "input_features: expected images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        policy(**changes)


def test_an_engine_in_this_process_gives_what_it_gives_alone(tmp_path):
    folder = tmp_path / "tiny"
    init_checkpoint(folder, "tiny")
    settings = {"server": None, "checkpoint": str(folder), "robot_type": "libero_all", "dtype": "float32", "seed": 5}
    made = XR0Policy(config(**settings))
    given = batch()[0]
    given["observation.state"] = given["observation.state"] / 1000
    seed = made._seed(0)
    chunk = made.predict_action_chunk(given)
    (observation,) = made._map.observations(given)
    alone = made._source.infer(observation, seed=seed)
    np.testing.assert_array_equal(chunk[0].numpy(), alone.actions[:, :7])
