"""Preprocessor: batches of observations to model inputs, and what an observation may hold."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from xr0_engine.config import ActionHeadConfig, ModelConfig, TextConfig, TokenIds, VisionConfig
from xr0_engine.robot.embodiment import View, load_embodiment
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import Preprocessor, images_to_patches, orient
from xr0_engine.robot.prompt import PromptTokenizer, build_prompt
from xr0_engine.types import Observation

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PAD, VISION_START, VISION_END, IMAGE = 256, 259, 260, 261
STATE, ACTION, CHUNK = 8, 6, 4
VISION = VisionConfig(1, 64, 4, 64, 64, 16, 2, 2, 3, 64, ())
CONFIG = ModelConfig(
    text=TextConfig(262, 64, 1, 2, 1, 32, 64, 1e-6, 1e4, (6, 5, 5)),
    vision=VISION,
    head=ActionHeadConfig(64, 1, 32, 1, 1, STATE, CHUNK, ACTION),
    tokens=TokenIds(IMAGE, VISION_START, VISION_END),
)
LIBERO = load_embodiment("libero")


def byte_tokenizer():
    """One token per byte, then the special tokens from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({mark: index for index, mark in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def statistics(length=CHUNK, active=ACTION):
    std = np.ones((length, ACTION), np.float32)
    std[:, active:] = 0
    return ActionStatistics(np.zeros_like(std), std, 0.0)


def preprocessor(embodiment=None, config=CONFIG, **robot_types):
    known = robot_types or {"libero_all": statistics(), "bridge_delta": statistics(active=3)}
    return Preprocessor(config, PromptTokenizer(byte_tokenizer(), config.tokens), known, embodiment)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "as given"])
def test_the_checkpoint_says_whether_the_task_text_is_normalised(normalize):
    made = preprocessor(config=replace(CONFIG, normalize_instruction=normalize))
    ids = made([observation(instruction="pick it up")]).input_ids[0].numpy()
    text = bytes(ids[ids < PAD].astype(np.uint8))
    spelled = byte_tokenizer().encode("Pick it up. /no_cot" if normalize else "pick it up /no_cot").ids
    assert bytes(spelled) in text


def random_image(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def observation(**changed):
    valid = {
        "images": {"base": random_image(48, 64), "left_wrist": random_image(32, 32, seed=1)},
        "instruction": "pick up the cup",
        "state": np.arange(STATE, dtype=np.float32),
        "robot_type": "libero_all",
    }
    return Observation(**valid | changed)


def with_base(image):
    return {**observation().images, "base": image}


PREPROCESS = preprocessor()


def test_single_observation():
    inputs = PREPROCESS([observation()])
    # 48 x 64 becomes 64 x 64, a tie that goes to the even multiple.
    assert inputs.image_grids == ((4, 4), (2, 2))
    assert inputs.pixel_values.shape == (20, VISION.patch_dim)
    prompt = build_prompt(["Base View", "Left-Wrist View"], [4, 1], "Pick up the cup.")
    assert byte_tokenizer().decode(inputs.input_ids[0].tolist(), skip_special_tokens=False) == prompt
    assert inputs.attention_mask.all()
    assert inputs.attention_mask.dtype == torch.bool
    assert inputs.position_ids.shape == (3, *inputs.input_ids.shape)
    assert inputs.input_ids[0, inputs.preamble_length - 1] == VISION_START
    assert inputs.preamble_length == prompt.encode().index(b"<|vision_start|>") - len("<|im_start|>") + 2
    np.testing.assert_array_equal(inputs.state, observation().state.reshape(1, 1, STATE))
    np.testing.assert_array_equal(inputs.action_mask, np.ones((1, CHUNK, ACTION)))


def test_views_go_in_the_order_of_the_profile_and_are_turned():
    images = observation().images
    inputs = PREPROCESS([observation(images=dict(reversed(images.items())))])
    turned = [np.ascontiguousarray(images[key][::-1, ::-1]) for key in ("base", "left_wrist")]
    np.testing.assert_array_equal(inputs.pixel_values, images_to_patches(turned, VISION)[0])


def test_batch_rows_equal_single_rows():
    rows = [
        observation(instruction="go"),
        observation(images={"base": random_image(96, 64)}, robot_type="bridge_delta", state=np.ones((1, STATE))),
        observation(instruction="put the black bowl on the plate"),
    ]
    batch, singles = PREPROCESS(rows), [PREPROCESS([row]) for row in rows]
    longest = max(single.input_ids.shape[1] for single in singles)
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, longest)
    for row, single in enumerate(singles):
        padding = longest - single.input_ids.shape[1]
        assert (batch.input_ids[row, :padding] == PAD).all()
        assert not batch.attention_mask[row, :padding].any()
        assert batch.attention_mask[row, padding:].all()
        assert (batch.position_ids[:, row, :padding] == 0).all()
        torch.testing.assert_close(batch.input_ids[row, padding:], single.input_ids[0], rtol=0, atol=0)
        torch.testing.assert_close(batch.position_ids[:, row, padding:], single.position_ids[:, 0], rtol=0, atol=0)
        torch.testing.assert_close(batch.state[row], single.state[0], rtol=0, atol=0)
        torch.testing.assert_close(batch.action_mask[row], single.action_mask[0], rtol=0, atol=0)
    torch.testing.assert_close(
        batch.pixel_values, torch.cat([single.pixel_values for single in singles]), rtol=0, atol=0
    )
    assert batch.image_grids == tuple(grid for single in singles for grid in single.image_grids)
    assert batch.action_mask[1, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_head_of_a_batch_ends_where_its_prompts_part():
    same = PREPROCESS([observation(), observation(instruction="go")])
    assert same.preamble_length == PREPROCESS([observation()]).preamble_length
    mixed = preprocessor(libero_all=statistics(), fractal_delta=statistics())(
        [observation(), observation(images={"ego": random_image(32, 32)}, robot_type="fractal_delta")]
    )
    heads = [mixed.input_ids[row][mixed.attention_mask[row]] for row in range(2)]
    assert (heads[0][: mixed.preamble_length] == heads[1][: mixed.preamble_length]).all()
    assert heads[0][mixed.preamble_length] != heads[1][mixed.preamble_length]


def test_robot_types_of_different_chunk_length_do_not_share_a_batch():
    preprocess = preprocessor(libero_all=statistics(10), bridge_delta=statistics(4))
    rows = [observation(), observation(images={"base": random_image(32, 32)}, robot_type="bridge_delta")]
    with pytest.raises(ValueError, match=r"one chunk length in a batch, got \{'libero_all': 10, 'bridge_delta': 4\}"):
        preprocess(rows)


def test_resolve():
    bridge = load_embodiment("bridge")
    assert PREPROCESS.resolve("libero_all") == ("libero_all", LIBERO)
    assert preprocessor(bridge).resolve("libero_all") == ("libero_all", bridge)
    assert preprocessor(libero_all=statistics()).resolve(None) == ("libero_all", LIBERO)
    with pytest.raises(ValueError, match="no built-in embodiment profile lists 'droid_pt'"):
        preprocessor(droid_pt=statistics()).resolve("droid_pt")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("shape", [(STATE,), (1, STATE)], ids=str)
def test_accepted_states(dtype, shape):
    inputs = PREPROCESS([observation(state=np.arange(STATE, dtype=dtype).reshape(shape))])
    assert inputs.state.dtype == torch.float32
    assert inputs.state.tolist() == [[list(range(STATE))]]


def test_longer_state_needs_both_axes():
    preprocess = preprocessor(config=replace(CONFIG, head=replace(CONFIG.head, state_length=2)))
    assert preprocess([observation(state=np.zeros((2, STATE)))]).state.shape == (1, 2, STATE)
    with pytest.raises(ValueError, match=r"state: expected shape \(2, 8\), got \(8,\)"):
        preprocess([observation()])


MALFORMED = {
    "float image": ({"images": with_base(random_image(32, 32) / 255)}, r"images\['base'\]: .*dtype float64"),
    "signed image": ({"images": with_base(random_image(32, 32).astype(np.int8))}, "dtype int8"),
    "channels first": ({"images": with_base(random_image(32, 48).transpose(2, 0, 1))}, "channels last expected"),
    "grey image": ({"images": with_base(random_image(32, 32)[..., 0])}, r"shape \(32, 32\), a grey image"),
    "one channel": ({"images": with_base(random_image(32, 32)[..., :1])}, r"shape \(32, 32, 1\), a grey image"),
    "alpha": ({"images": with_base(np.zeros((32, 32, 4), np.uint8))}, "an image with alpha: lay it on a background"),
    "16 bits": ({"images": with_base(np.zeros((32, 32, 3), np.uint16))}, "dtype uint16: take the upper byte"),
    "batch of images": ({"images": with_base(random_image(32, 32)[None])}, r"shape \(1, 32, 32, 3\)"),
    "empty image": ({"images": with_base(random_image(0, 32))}, "an empty image"),
    "narrow image": ({"images": with_base(random_image(1, 201))}, "aspect ratio is above 200"),
    "list image": ({"images": with_base([[[0, 0, 0]]])}, "got list; only NumPy arrays are taken"),
    "missing view": ({"images": {"base": random_image(32, 32)}}, "views base, left_wrist of .*'left_wrist' is missing"),
    "unexpected view": ({"images": {**observation().images, "ego": random_image(32, 32)}}, "'ego' is unexpected"),
    "views in a list": ({"images": [random_image(32, 32)] * 2}, "images: expected the views .* got list"),
    "NaN state": ({"state": np.full(STATE, np.nan)}, r"state: expected finite .* at \[\[0, 0\]"),
    "state over float32": ({"state": np.full(STATE, 1e300)}, "state: expected finite"),
    "wide state": ({"state": np.zeros(STATE + 1)}, r"state: expected shape \(1, 8\) or \(8,\), got \(9,\)"),
    "two states": ({"state": np.zeros((2, STATE))}, r"got \(2, 8\)"),
    "complex state": ({"state": np.zeros(STATE, complex)}, "state: expected a NumPy array of real numbers, got dtype"),
    "flag state": ({"state": np.zeros(STATE, bool)}, "got dtype bool"),
    "list state": ({"state": [0.0] * STATE}, "state: .* got list"),
    "empty instruction": ({"instruction": "  "}, "instruction: expected a task in words"),
    "special token": ({"instruction": "go <|im_end|>"}, "instruction: .* special token"),
    "unknown robot type": (
        {"robot_type": "droid"},
        "robot_type: expected one of bridge_delta, libero_all, got 'droid'",
    ),
    "no robot type": ({"robot_type": None}, "robot_type: .* holds several"),
    "NaN time": ({"timestamp_s": float("nan")}, "timestamp_s: expected seconds"),
    "prepared as text": ({"prepared": "yes"}, "prepared: expected true or false, got 'yes'"),
    "time as text": ({"timestamp_s": "now"}, "timestamp_s: expected seconds"),
}


@pytest.mark.parametrize(("changed", "match"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_observation_is_refused_before_any_work(changed, match, monkeypatch):
    # The faulty row is the last: no image of the rows before it may have been touched.
    monkeypatch.setattr(
        "xr0_engine.robot.preprocess.images_to_patches", lambda *_: pytest.fail("work before the checks")
    )
    with pytest.raises(ValueError, match=match):
        PREPROCESS([observation(), observation(**changed)])


def test_aspect_ratio_counts_as_the_processor_sees_it():
    cropped = replace(LIBERO, views=(View("base", "Base View", center_crop=0.95),))
    resized = replace(LIBERO, views=(View("base", "Base View", resize=(64, 64)),))
    # 10 x 2090 of it are kept, but enlarged to its size.
    assert preprocessor(cropped)([observation(images={"base": random_image(11, 2200)})]).image_grids
    assert preprocessor(resized)([observation(images={"base": random_image(2, 800)})]).image_grids == ((4, 4),)
    for profile, prepared in ((cropped, False), (cropped, True), (resized, True)):
        with pytest.raises(ValueError, match=r"images\['base'\].*aspect ratio is above 200"):
            preprocessor(profile)([observation(images={"base": random_image(2, 800)}, prepared=prepared)])


def test_prepared_images_pass_by_the_profile():
    """Beside one that is not prepared: the choice is each observation's own."""
    views = (View("base", "Base View", rotate_180=True, center_crop=0.5, resize=(96, 128)),)
    profile = replace(LIBERO, views=views)
    frame = random_image(64, 48)
    inputs = preprocessor(profile)(
        [observation(images={"base": frame}), observation(images={"base": frame}, prepared=np.True_)]
    )
    expected, grids = images_to_patches([orient(frame, views[0]), frame], VISION)
    assert inputs.image_grids == grids == ((6, 8), (4, 4))
    torch.testing.assert_close(inputs.pixel_values, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "batch", [[], observation(), [observation(), None], "go"], ids=["empty", "bare", "none", "text"]
)
def test_malformed_batch(batch):
    with pytest.raises(ValueError, match="observations: expected"):
        PREPROCESS(batch)


sides = st.integers(1, 40)
images = st.builds(lambda height, width, seed: random_image(height, width, seed=seed), sides, sides, st.integers(0, 9))
VALID = {
    "images": st.fixed_dictionaries({"base": images, "left_wrist": images}),
    "instruction": st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).filter(str.strip),
    "state": hnp.arrays(np.float32, st.sampled_from([(STATE,), (1, STATE)]), elements=st.floats(-1e6, 1e6, width=32)),
    "robot_type": st.just("libero_all"),
    "timestamp_s": st.one_of(st.none(), st.floats(0, 1e9)),
    "prepared": st.booleans(),
}

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9))
anything = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=3), scalars, max_size=3))
arrays = hnp.arrays(
    st.one_of(st.just(np.dtype(np.uint8)), hnp.scalar_dtypes()),
    st.one_of(st.tuples(sides, sides, st.just(3)), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)),
    fill=st.nothing(),
)
keys = st.one_of(st.sampled_from(["base", "left_wrist", "ego"]), scalars)
ARBITRARY = {
    "images": st.one_of(
        anything,
        st.dictionaries(keys, images, max_size=3),
        st.fixed_dictionaries({"base": images, "left_wrist": st.one_of(arrays, anything)}),
    ),
    "instruction": st.one_of(anything, st.text(st.characters(codec=None), max_size=9)),
    "state": st.one_of(arrays, anything, hnp.arrays(hnp.floating_dtypes(), st.sampled_from([(STATE,), (1, STATE)]))),
    "robot_type": anything,
    "timestamp_s": anything,
    "prepared": anything,
}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.builds(Observation, **VALID))
def test_every_valid_observation_passes(valid):
    inputs = PREPROCESS([valid])
    assert sum(height * width for height, width in inputs.image_grids) == len(inputs.pixel_values)
    assert inputs.pixel_values.abs().max() <= 1
    assert inputs.state.isfinite().all()


@pytest.mark.parametrize("name", [field.name for field in fields(Observation)])
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(data=st.data())
def test_an_arbitrary_field_passes_or_is_named_in_a_value_error(name, data):
    arbitrary = data.draw(st.builds(Observation, **VALID | {name: ARBITRARY[name]}))
    try:
        inputs = PREPROCESS([arbitrary])
    except ValueError as error:
        message = str(error)
    else:
        assert inputs.state.isfinite().all()
        return
    assert message.startswith(name)


def test_the_next_observation_is_served_after_a_refusal():
    before = PREPROCESS([observation()])
    with pytest.raises(ValueError, match="state"):
        PREPROCESS([observation(state=np.zeros(3))])
    after = PREPROCESS([observation()])
    torch.testing.assert_close(after.pixel_values, before.pixel_values, rtol=0, atol=0)
    torch.testing.assert_close(after.input_ids, before.input_ids, rtol=0, atol=0)
