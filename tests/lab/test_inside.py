"""Inside a policy: interventions and attention against policies whose every dependence is known."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from xr0_engine.lab.demonstrations import Demonstrations
from xr0_engine.lab.inside import BATCH, GROUPS, HELD_OUT, PREFIX, inside, windows
from xr0_engine.lab.robots import VIEW
from xr0_engine.lab.tasks import CHUNK, TASKS
from xr0_engine.model.attention import Attention, Token
from xr0_engine.training.data.windows import Windows
from xr0_engine.types import ActionChunk

WIDTH = 32
ROUNDING = 1e-4
"""float32 actions of up to 255: a picture's mean."""
SHARES = {"image": 0.3, "text": 0.1, "sink": 0.15, "state": 0.05, "prefix": 0.25, "action": 0.15}


class Known:
    """Action i is half of the prefix's last, to the power of i; the picture's mean, the state's first, the seed."""

    def __init__(self):
        self.batches, self.asked = [], []

    def infer(self, observation, prefix, seed):
        self.batches.append(len(observation))
        self.asked += zip(observation, prefix, seed, strict=True)
        none = np.zeros((0, WIDTH), np.float32)
        return [self._chunk(o, none if p is None else p, s) for o, p, s in zip(observation, prefix, seed, strict=True)]

    def _chunk(self, observation, prefix, seed):
        normalized = np.zeros((CHUNK, WIDTH), np.float32)
        normalized[: len(prefix)] = prefix
        for index in range(len(prefix), CHUNK):
            normalized[index, :2] = seed
            if len(prefix):
                normalized[index, :2] += 0.5 ** (index - PREFIX + 1) * prefix[-1, :2]
            normalized[index, 0] += observation.images[VIEW].mean()
            normalized[index, 1] += observation.state[0]
        # Columns that the robot does not have are noise.
        normalized[:, 2:] = np.random.default_rng(len(self.asked)).standard_normal((CHUNK, WIDTH - 2))
        return ActionChunk(normalized, normalized, np.arange(WIDTH) < 2, "lab_point", len(prefix))

    def attention(self, observation, prefix, seed):
        """A flow step and a layer later, more on the prefix and less on the picture."""
        prefix = () if prefix is None else prefix
        actions = [Token("prefix" if index < len(prefix) else "action", index) for index in range(CHUNK)]
        queries = (Token("sink", 0), Token("state", 0), *actions)
        keys = (Token("image", 0, "top"), Token("text", 1), *queries)
        weights = np.zeros((2, 3, 2, len(queries), len(keys)), np.float32)
        number = {kind: sum(key.kind == kind for key in keys) for kind in SHARES}
        for column, key in enumerate(keys):
            weights[..., column] = SHARES[key.kind] / number[key.kind]
        moved = 0.1 * (np.arange(2)[:, None] + np.arange(3)).reshape(2, 3, 1, 1)
        weights[..., 0] -= moved
        if len(prefix):
            weights[..., 4 : 4 + len(prefix)] += moved[..., None] / len(prefix)
        # What others than noisy actions look at is no matter.
        weights[:, :, :, : 2 + len(prefix)] = 0
        return Attention(weights, np.array([0, 0.5], np.float32), queries, keys, len(prefix))


@pytest.fixture(scope="module")
def asked():
    return windows(TASKS["chase-eight"], 24)


def test_what_alone_is_exchanged_is_measured(asked):
    engine = Known()
    found = inside(engine, asked)
    assert found.prefix_length == PREFIX
    difference = np.array([np.abs(window.other_prefix - window.prefix)[:, :2] for window in asked])
    expected = [*difference.mean((0, 2)), *(0.5**i * difference[:, -1].mean() for i in range(1, CHUNK - PREFIX + 1))]
    np.testing.assert_allclose(found.sensitivity["prefix"], expected, atol=ROUNDING)
    pictures = [np.mean(w.other_image.images[VIEW]) - np.mean(w.observation.images[VIEW]) for w in asked]
    of_picture = np.abs(pictures).mean() / 2
    np.testing.assert_allclose(found.sensitivity["image"], [0] * PREFIX + [of_picture] * (CHUNK - PREFIX), rtol=1e-3)
    assert found.exchanged["prefix"] == pytest.approx(difference.mean(), rel=1e-5)
    assert found.exchanged["image"] > 0
    of_state = np.abs([w.other_state.state[0] - w.observation.state[0] for w in asked]).mean() / 2
    assert of_state > 0.01
    np.testing.assert_allclose(found.sensitivity["state"], [0] * PREFIX + [of_state] * (CHUNK - PREFIX), rtol=1e-3)
    # The same noise each time.
    assert [seed for _, _, seed in engine.asked] == 4 * list(range(24))
    json.dumps(asdict(found))


def test_without_a_prefix_the_picture_and_the_state_are_exchanged(asked):
    found = inside(Known(), [replace(one, prefix=one.prefix[:0], other_prefix=one.prefix[:0]) for one in asked])
    assert found.prefix_length == 0
    assert found.sensitivity.keys() == found.exchanged.keys() == {"image", "state"}
    assert min(min(changes) for changes in found.sensitivity.values()) > 0
    assert np.max(found.attention["prefix"]) == 0


def test_attention_is_that_of_noisy_actions_by_step_and_layer(asked):
    found = inside(Known(), asked[:3])
    shares = {group: np.array(found.attention[group]) for group in GROUPS}
    np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-6)
    moved = 0.1 * (np.arange(2)[:, None] + np.arange(3))
    np.testing.assert_allclose(shares["prefix"], SHARES["prefix"] + moved, atol=1e-6)
    np.testing.assert_allclose(shares["image"], SHARES["image"] - moved, atol=1e-6)
    for group, kind in (("own", "action"), ("text", "text"), ("state", "state"), ("sink", "sink")):
        np.testing.assert_allclose(shares[group], SHARES[kind], atol=1e-6)


def test_windows_go_in_batches(asked):
    engine = Known()
    inside(engine, [*asked, *asked, *asked])
    assert engine.batches == [BATCH, 3 * 24 - BATCH] * 4


@pytest.mark.parametrize("name", TASKS)
def test_windows_are_what_the_trainer_would_see(name):
    """Observation and prefix are those of a demonstration at a tick; the exchanged picture alone differs."""
    task, count = TASKS[name], 12
    dataset = Windows(Demonstrations(task, count, HELD_OUT), range(count), CHUNK)
    ticks = len(dataset) // count
    for number, window in enumerate(windows(task, count)):
        samples = (dataset.sample(number * ticks + tick) for tick in range(ticks))
        found = [s for s in samples if np.array_equal(s.images[VIEW], window.observation.images[VIEW])]
        same = [sample for sample in found if np.array_equal(sample.state.ravel(), window.observation.state.ravel())]
        assert len(same) >= 1
        np.testing.assert_allclose(window.prefix, same[0].actions[:PREFIX], atol=1e-6)
        other = replace(window.other_image, images=window.observation.images)
        np.testing.assert_array_equal(other.state, window.observation.state)
        assert (other.instruction, other.robot_type) == (same[0].instruction, task.robot_type)
        assert np.abs(window.other_image.images[VIEW].astype(int) - window.observation.images[VIEW]).max() > 50


def test_windows_are_the_same_every_time_and_unlike_the_training_data(asked):
    again, training = windows(TASKS["chase-eight"], 24), windows(TASKS["chase-eight"], 24, seed=0)
    for window, other in zip(asked, again, strict=True):
        np.testing.assert_array_equal(window.prefix, other.prefix)
        np.testing.assert_array_equal(window.other_image.images[VIEW], other.other_image.images[VIEW])
    assert not all(np.array_equal(a.prefix, b.prefix) for a, b in zip(asked, training, strict=True))
    following = [window.prefix for window in (*asked[1:], asked[0])]
    np.testing.assert_array_equal([window.other_prefix for window in asked], following)


def test_what_cannot_be_exchanged_is_refused(asked):
    with pytest.raises(ValueError, match="at least two windows"):
        windows(TASKS["chase-four"], 1)
    with pytest.raises(ValueError, match="prefixes of one length, got lengths \\[3, 4\\]"):
        inside(Known(), [replace(asked[0], prefix=asked[0].prefix[:3])])
    with pytest.raises(ValueError, match="at least one"):
        inside(Known(), [])
