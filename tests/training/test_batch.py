"""Samples to tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.training.support import (
    ACTIVE,
    LENGTH,
    language_sample,
    robot_sample,
    statistics,
    without_supervision,
)
from xr0_engine.config import ModelConfig
from xr0_engine.training.batch import IGNORED, Collator


@pytest.fixture(scope="module")
def collate(base):
    return Collator(base, ModelConfig.load(base), statistics())


def test_robot_batch(collate):
    samples = [robot_sample(number) for number in range(3)]
    batch = collate.robot(samples)
    assert batch.actions.shape == batch.mask.shape == (3, LENGTH, 32)
    torch.testing.assert_close(batch.actions[1, :, :ACTIVE], torch.from_numpy(samples[1].actions[:, :ACTIVE]) / 0.5)
    assert not batch.actions[..., ACTIVE:].any()
    assert batch.mask[..., :ACTIVE].all()
    assert not batch.mask[..., ACTIVE:].any()
    assert batch.sources == ("episode.json:0", "episode.json:1", "episode.json:2")
    assert torch.equal(batch.inputs.state[2], torch.from_numpy(samples[2].state))


def test_what_the_sample_masks_is_not_supervised(collate):
    sample = robot_sample(0)
    sample.mask[4:] = False
    batch = collate.robot([sample, without_supervision(robot_sample(1))])
    assert batch.mask[0].sum() == 4 * ACTIVE
    assert not batch.mask[1].any()
    # The engine's mask of used columns is another matter: it is the robot type's.
    assert batch.inputs.action_mask[1, :, :ACTIVE].all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(
            {"robot_type": "other"}, "episode.json:7: statistics are of robot type bridge_delta; .*'other'", id="robot"
        ),
        pytest.param(
            {"actions": np.zeros((4, 32), np.float32)},
            r"episode.json:7: expected .* shape \(6, 32\).*got \(4, 32\)",
            id="length",
        ),
        pytest.param({"mask": np.ones((6, 3), bool)}, r"got \(6, 32\) and \(6, 3\)", id="mask"),
        pytest.param({"actions": np.full((6, 32), np.nan, np.float32)}, "episode.json:7: actions hold NaN", id="nan"),
        pytest.param({"images": {}}, "'base' is missing", id="view"),
    ],
)
def test_wrong_sample_is_refused_by_name(change, complaint, collate):
    with pytest.raises(ValueError, match=complaint):
        collate.robot([replace(robot_sample(7), **change)])


def test_language_batch_predicts_what_the_assistant_says(collate, base):
    batch = collate.language([language_sample(0), language_sample(3)])
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for row in range(2):
        ids = batch.inputs.input_ids[row][batch.inputs.attention_mask[row]]
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        said = tokenizer.decode(batch.labels[row][batch.labels[row] != IGNORED].tolist(), skip_special_tokens=False)
        answer = f"The cube is {('red', 'black')[row]}."
        assert said == f"{answer}<|im_end|>"
        assert text == (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What colour is the cube?<|im_end|>\n"
            f"<|im_start|>assistant\n{answer}<|im_end|>\n"
        )
    predicted = batch.labels != IGNORED
    assert torch.equal(batch.labels[predicted], batch.inputs.input_ids[predicted])
    assert batch.inputs.image_grids == ((2, 2), (2, 2))


def test_images_stand_where_the_text_says(collate, base):
    sample = replace(language_sample(0), conversations=(("user", "This: <image> What?"), ("assistant", "A cube.")))
    ids = collate.language([sample]).inputs.input_ids[0].tolist()
    text = Tokenizer.from_file(str(base / "tokenizer.json")).decode(ids, skip_special_tokens=False)
    assert "user\nThis: <|vision_start|><|image_pad|><|vision_end|> What?" in text
    twice = replace(sample, conversations=(("user", "<image><image>"),))
    with pytest.raises(ValueError, match=r"questions.jsonl:0: expected 1 <image> in the text or none, got 2"):
        collate.language([twice])


def test_text_without_images(collate):
    batch = collate.language([replace(language_sample(0), images=())])
    assert batch.inputs.image_grids == ()
    assert batch.inputs.position_ids[0, 0, -1] == batch.inputs.input_ids.shape[1] - 1
