"""Observations that come as tokens and patches: the same model inputs, or refused by the field."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import make_config
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.robot.limits import ImageLimits
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.robot.prompt import PromptTokenizer
from xr0_engine.robot.tokenized import MAX_TEXT_TOKENS, tokenized_inputs
from xr0_engine.sizes import published_xr1_config
from xr0_engine.types import ModelInputs, Observation, TokenizedObservation

VIEWS = ("base", "left_wrist")


@pytest.fixture(scope="module")
def preprocess(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenized") / "tiny"
    init_checkpoint(folder)
    return Preprocessor.load(folder)


@pytest.fixture(scope="module")
def inputs(preprocess) -> ModelInputs:
    rng = np.random.default_rng(0)
    images = {
        "base": rng.integers(0, 256, (64, 96, 3), np.uint8),
        "left_wrist": rng.integers(0, 256, (64, 64, 3), np.uint8),
    }
    return preprocess([Observation(images, "Go.", rng.standard_normal(32, dtype=np.float32), "libero_all")])


@pytest.fixture
def sent(inputs) -> TokenizedObservation:
    return TokenizedObservation(
        inputs.input_ids[0].numpy(), inputs.pixel_values.numpy(), inputs.image_grids, inputs.state[0, 0].numpy()
    )


def test_inputs_are_those_of_the_observation(preprocess, inputs, sent):
    made = tokenized_inputs(sent, VIEWS, preprocess.config, preprocess.statistics["libero_all"], preprocess.tokenizer)
    assert (made.image_grids, made.preamble_length) == (inputs.image_grids, inputs.preamble_length)
    names = ("input_ids", "attention_mask", "pixel_values", "position_ids", "state", "action_mask")
    for name in names:
        own, expected = getattr(made, name), getattr(inputs, name)
        assert own.dtype == expected.dtype
        torch.testing.assert_close(own, expected, rtol=0, atol=0)


CONFIG = make_config()
IMAGE = CONFIG.tokens.image


def without_opening(ids: np.ndarray) -> np.ndarray:
    """The second image's own token is missing: it stands behind other text."""
    ids = ids.copy()
    ids[np.flatnonzero(ids == CONFIG.tokens.vision_start)[1]] = 5
    return ids


WRONG = {
    "no ids": ({"input_ids": np.zeros(0, np.int64)}, "input_ids: expected 1 to 4096 tokens of text, got 0"),
    "ids of a batch": ({"input_ids": np.zeros((1, 4), np.int64)}, r"input_ids: expected whole numbers \(N,\)"),
    "ids with a point": ({"input_ids": np.zeros(4)}, r"input_ids: expected whole numbers \(N,\), got float64"),
    "ids of a list": ({"input_ids": [1, 2]}, r"input_ids: expected whole numbers \(N,\), got list"),
    "negative id": (lambda ids: np.append(ids, -1), "input_ids: expected ids below the model's 1024, got -1"),
    "id of another model": (lambda ids: np.append(ids, 151643), "were they made with this checkpoint's tokenizer"),
    "endless text": (lambda ids: np.append(ids, np.zeros(MAX_TEXT_TOKENS, np.int64)), "expected 1 to 4096 tokens"),
    "image tokens missing": (lambda ids: np.delete(ids, np.flatnonzero(ids == IMAGE)[0]), "input_ids: expected"),
    "more image tokens": (lambda ids: np.append(ids, IMAGE), "input_ids: expected image tokens for 2 images, got more"),
    "image without an opening": (without_opening, "input_ids: expected 2 images, one for each grid, got 1"),
    "an image too few": (
        {"image_grids": ((4, 6),)},
        r"image_grids: expected one for each view \(base, left_wrist\), got 1",
    ),
    "odd grid": ({"image_grids": ((4, 6), (3, 4))}, r"image_grids: expected multiples of 2 patches, got \(3, 4\)"),
    "empty grid": ({"image_grids": ((4, 6), (0, 4))}, "image_grids: expected multiples of 2 patches"),
    "large image": ({"image_grids": ((4, 6), (400, 400))}, "image_grids: expected at most 90000 pixels an image"),
    "patches missing": ({"pixel_values": np.zeros((30, 1536), np.float32)}, r"pixel_values: .*shape \(40, 1536\), got"),
    "pixels as they are": (
        {"pixel_values": np.full((40, 1536), 128.0)},
        r"pixel_values: expected pixels scaled to \[-1, 1\]",
    ),
    "NaN": ({"pixel_values": np.full((40, 1536), np.nan)}, "pixel_values: expected finite numbers"),
    "short state": ({"state": np.zeros(8)}, r"state: expected numbers of shape \(1, 32\), got float64 \(1, 8\)"),
    "infinite state": ({"state": np.full(32, 1e300)}, "state: expected finite numbers in float32"),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG.values(), ids=WRONG)
def test_wrong_field_is_refused(preprocess, sent, change, complaint):
    wrong = replace(sent, **(change if isinstance(change, dict) else {"input_ids": change(sent.input_ids)}))
    with pytest.raises(ValueError, match=complaint):
        tokenized_inputs(wrong, VIEWS, preprocess.config, preprocess.statistics["libero_all"], preprocess.tokenizer)


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        (ImageLimits(1024, 4096), "image_grids: expected at most 4096 pixels an image"),
        (ImageLimits(5000, 90_000), "image_grids: expected at least 5000 pixels an image"),
    ],
    ids=["most", "least"],
)
def test_limits_are_the_checkpoint_s(preprocess, sent, limits, complaint):
    statistics = preprocess.statistics["libero_all"]
    with pytest.raises(ValueError, match=complaint):
        tokenized_inputs(sent, VIEWS, preprocess.config, statistics, preprocess.tokenizer, limits)


@pytest.fixture(scope="module")
def without_names(tmp_path_factory) -> Preprocessor:
    """XR-1 with a tokenizer as Qwen has it, which has no tokens for training's turn."""
    folder = tmp_path_factory.mktemp("unnamed") / "tiny"
    init_checkpoint(folder, family="xr1")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    turn = ("<state>", "<score>", "<a_")
    content["added_tokens"] = [each for each in content["added_tokens"] if not each["content"].startswith(turn)]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: place for token, place in vocabulary.items() if not token.startswith(turn)}
    path.write_text(json.dumps(content), encoding="utf-8")
    return Preprocessor.load(folder)


class Counting:
    """A tokenizer that counts what it makes text of."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, skip_special_tokens):
        self.decoded += 1
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def test_a_prompt_that_comes_again_is_not_made_text_again(preprocess, inputs, sent, monkeypatch):
    """A robot sends its prompt at every step, and what a prompt asks for changes with its words alone."""
    tokenizer = PromptTokenizer(preprocess.tokenizer._tokenizer, CONFIG.tokens)
    counting = Counting(tokenizer._tokenizer)
    monkeypatch.setattr(tokenizer, "_tokenizer", counting)
    tokenizer.check_sent(sent.input_ids)
    # Neither the integers' width nor how many patches an image has says anything of the words.
    for ids in (sent.input_ids.copy(), sent.input_ids.astype(np.int32), np.insert(sent.input_ids, 20, [IMAGE] * 3)):
        tokenizer.check_sent(ids)
    assert counting.decoded == 1
    text = counting.tokenizer.decode(sent.input_ids.tolist(), False)
    for change in (("Go.", "Stop."), ("/no_cot", "/cot")):
        other = np.array(counting.tokenizer.encode(text.replace(*change)).ids)
        assert len(other) != len(sent.input_ids)
        if change[1] == "/cot":
            for _ in range(2):
                with pytest.raises(ValueError, match=r"asks for reasoning \(/cot\)"):
                    tokenizer.check_sent(other)
        else:
            tokenizer.check_sent(other)
    assert counting.decoded == 4


def test_tokens_of_training_are_where_qwens_numbering_has_them():
    expected = {151669: "<score>", 151670: "<state>"} | {151671 + index: f"<a_{index}>" for index in range(60)}
    assert published_xr1_config().choice_tokens == expected
    assert make_config().choice_tokens == {}


def test_what_no_prompt_may_hold_is_refused_though_the_tokenizer_has_no_name_for_it(without_names):
    prepare = without_names
    tokenizer = prepare.tokenizer._tokenizer
    assert tokenizer.token_to_id("<state>") is None
    observation = prepare.example("mobile", (64, 64))
    inputs = prepare([observation])
    ids = inputs.input_ids[0].numpy()

    pixels = inputs.pixel_values.numpy()

    def made(ids: np.ndarray, pixel_values=pixels, grids=inputs.image_grids, **limits) -> ModelInputs:
        sent = TokenizedObservation(ids, pixel_values, grids, observation.state)
        views = [view.key for view in prepare.resolve("mobile")[1].views]
        return tokenized_inputs(
            sent, views, prepare.config, prepare.statistics["mobile"], tokenizer=prepare.tokenizer, **limits
        )

    assert torch.equal(made(ids).input_ids, inputs.input_ids)
    image = prepare.config.tokens.image
    for offset, name in ((14, "<score>"), (15, "<state>"), (16, "<a_0>"), (75, "<a_59>")):
        with pytest.raises(ValueError, match=f"input_ids: expected the prompt alone, got {name}: .*training alone"):
            made(np.append(ids, image + offset))
    made(np.append(ids, image + 76))
    with pytest.raises(ValueError, match="image_grids: expected at least 3136 pixels an image"):
        made(ids, pixels[:12], ((2, 2),) * 3, limits=ImageLimits(3136, 90_000))
    for text in ("<state>", "put <a_59> there", "<score>"):
        with pytest.raises(ValueError, match=r"instruction: expected plain words, got <(state|a_59|score)>.*training"):
            prepare([replace(observation, instruction=text)])
    reasoning = tokenizer.encode(tokenizer.decode(ids.tolist(), False).replace("/no_cot", "/cot")).ids
    with pytest.raises(ValueError, match=r"input_ids: .* asks for reasoning \(/cot\), which is not supported"):
        made(np.array(reasoning))
    for text in ("stack the bowls /cot", "stack the bowls /no_cot", "/cot"):
        with pytest.raises(ValueError, match=r"instruction: expected the task alone, got '/(no_)?cot'.* not supported"):
            prepare([replace(observation, instruction=text)])
    for text in ("carry the bed/cot out", "move /cot-bed", "put <a_60> there"):
        prepare([replace(observation, instruction=text)])
