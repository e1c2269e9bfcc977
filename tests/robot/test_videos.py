"""Videos, several states and quantiles through the preprocessor and the engine of a small XR-1."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.robot import patches
from xr0_engine.robot.embodiment import View, load_embodiment
from xr0_engine.robot.history import History
from xr0_engine.robot.limits import VIDEO_FILE
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.robot.views import orient
from xr0_engine.types import CheckpointError, Observation, TokenizedObservation

VIDEOS = {"state_length": 4, "action_length": 16, "embodiment": "robocasa365"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A checkpoint as RoboCasa365's."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sizes.json").write_text(json.dumps(VIDEOS))
    init_checkpoint(folder / "checkpoint", config=folder / "sizes.json", family="xr1")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A checkpoint of the robot types whose views are pictures."""
    folder = tmp_path_factory.mktemp("pictures") / "checkpoint"
    init_checkpoint(folder, "tiny", family="xr1")
    return folder


@pytest.fixture(scope="module")
def prepare(videos):
    return Preprocessor.load(videos)


@pytest.fixture
def seen(prepare):
    return prepare.example("robocasa365", (64, 96))


def test_a_video_is_its_temporal_patches_as_images(prepare, seen):
    """Three cameras of two temporal patches: six images of (1, h, w), under the token of an image."""
    inputs = prepare([seen])
    tokens = prepare.config.tokens
    assert inputs.image_grids == ((4, 6),) * 6
    ids = inputs.input_ids[0]
    assert int((ids == tokens.image).sum()) == 6 * 6
    assert tokens.video not in ids
    video = orient(seen.images["right"], load_embodiment("robocasa365").views[1])
    # The second temporal patch of the second camera, whose two frames differ.
    own = inputs.pixel_values[3 * 24 : 4 * 24].reshape(24, 3, 2, 256)
    for slot, frame in enumerate(video[2:]):
        alone = torch.empty(24, 768)
        patches.images_to_patches([frame], [(64, 96)], 16, 1, 2, alone)
        assert torch.equal(own[:, :, slot], alone.reshape(24, 3, 256))
    # Each spans 2 rows and 3 columns of positions, and the text between them is as long as in the prompt.
    starts = [int(at) for at in torch.nonzero(ids == tokens.vision_start)[:, 0]]
    positions = inputs.position_ids[:, 0]
    for start in starts:
        first = int(positions[0, start]) + 1
        assert positions[0, start + 1 : start + 7].tolist() == [first] * 6
        assert positions[1, start + 1 : start + 7].tolist() == [first + row for row in (0, 0, 0, 1, 1, 1)]
        assert positions[2, start + 1 : start + 7].tolist() == [first + column for column in (0, 1, 2, 0, 1, 2)]
        assert positions[:, start + 7].tolist() == [first + 3] * 3
    assert inputs.state.shape == (1, 4, 60)


def test_a_batch_of_videos_is_each_alone(videos):
    engine = Engine.from_pretrained(videos, device="cpu", dtype="float32", backend="reference")
    one = engine.example(image_size=(64, 96))
    other = replace(
        one, images={view: video[::-1] for view, video in one.images.items()}, instruction="Open the drawer"
    )
    noise = np.random.default_rng(0).standard_normal((2, 16, 60)).astype(np.float32)
    both = engine.infer([one, other], noise=noise)
    for observation, row, chunk in zip((one, other), noise, both, strict=True):
        alone = engine.infer(observation, noise=row)
        # Float32 sums in another order, of actions of some units.
        np.testing.assert_allclose(chunk.actions, alone.actions, rtol=0, atol=1e-4)
    assert np.abs(both[0].actions - engine.infer(other, noise=noise[0]).actions).max() > 1e-3


def test_a_still_picture_is_another_prompt_than_a_video_of_it(prepare, seen):
    """64 tokens instead of 128 in the released sizes, and no time stamps: never taken for each other."""
    still = replace(seen, images={view: video[-1] for view, video in seen.images.items()})
    with pytest.raises(ValueError, match=r"images\['left'\]: expected uint8 RGB of shape \(4, height, .*keep one \("):
        prepare([still])
    short = replace(seen, images={view: video[1:] for view, video in seen.images.items()})
    with pytest.raises(ValueError, match=r"images\['left'\]: .*got 3 frames: a history that is younger repeats"):
        prepare([short])


def test_videos_may_not_be_resized(prepare, seen):
    odd = replace(seen, images={view: video[:, :63] for view, video in seen.images.items()}, prepared=True)
    unresized = Preprocessor(prepare.config, prepare.tokenizer, prepare.statistics, prepare.embodiment)
    assert unresized([odd]).image_grids == ((4, 6),) * 6
    unresized.video_limits = replace(prepare.limits, resize=False)
    with pytest.raises(ValueError, match=r"image: expected multiples of 32 pixels.*height 63, width 96"):
        unresized([odd])


def test_the_file_of_videos_must_say_that_nothing_is_resized(videos, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in videos.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    told = {"do_resize": False, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3}
    (copy / VIDEO_FILE).write_text(json.dumps(told))
    assert not Preprocessor.load(copy).video_limits.resize
    for wrong, complaint in (
        ({"do_resize": True}, "do_resize is not false"),
        ({"image_mean": [0] * 3}, "image_mean is"),
    ):
        (copy / VIDEO_FILE).write_text(json.dumps(told | wrong))
        with pytest.raises(CheckpointError, match=rf"{VIDEO_FILE}: .*{complaint}"):
            Preprocessor.load(copy)


def test_pictures_under_one_title(pictures):
    inputs = Preprocessor.load(pictures)
    observation = inputs.example("robocasa_mg", (64, 64))
    ids = inputs([observation]).input_ids[0].tolist()
    start, end = inputs.config.tokens.vision_start, inputs.config.tokens.vision_end
    opened, closed = ([at for at, token in enumerate(ids) if token == one] for one in (start, end))
    # Nothing between the two cameras of the base, a heading before the wrist's.
    assert opened[1] == closed[0] + 1
    assert opened[2] > closed[1] + 1


@pytest.mark.parametrize("text", ["<state>", "put <a_3> there", "<score>", "go<state>"])
def test_a_turn_of_training_is_refused(text, pictures):
    prepare = Preprocessor.load(pictures)
    observation = replace(prepare.example("mobile", (64, 64)), instruction=text)
    with pytest.raises(ValueError, match=r"instruction: expected plain words, got <(state|a_3|score)>.*training alone"):
        prepare([observation])


def test_an_instruction_goes_in_as_it_comes(pictures):
    prepare = Preprocessor.load(pictures)
    found = {}
    for robot_type in ("mobile", "robodojo"):
        observation = replace(prepare.example(robot_type, (64, 64)), instruction=" open the door.")
        found[robot_type] = prepare.tokenizer._tokenizer.decode(prepare([observation]).input_ids[0].tolist(), False)
    assert "task:\n open the door. /no_cot" in found["mobile"]
    assert "task:\nopen the door /no_cot" in found["robodojo"]


def test_states_are_normalised_by_the_checkpoints_quantiles(pictures, tmp_path):
    file = "preprocessor_config.json"
    settings = json.loads((pictures / file).read_text())
    q01, q99 = [-1.0] * 60, [3.0] * 59 + [-1.0]
    settings["action_config"]["mobile"]["state"] = {"rule": "post_training", "q01": q01, "q99": q99}
    for other in pictures.iterdir():
        if other.suffix != ".safetensors":
            (tmp_path / other.name).write_bytes(other.read_bytes())
    (tmp_path / file).write_text(json.dumps(settings))
    prepare = Preprocessor.load(tmp_path)
    assert prepare.statistics["mobile"].to_json()["state"] == {"rule": "post_training", "q01": q01, "q99": q99}
    state = np.linspace(-2, 4, 60)
    inputs = prepare([replace(prepare.example("mobile", (64, 64)), state=state)])
    expected = np.clip(2 * (state + 1) / (4 + 1e-6) - 1, -1, 1)
    expected[59] = 0
    np.testing.assert_array_equal(inputs.state[0, 0].numpy(), expected.astype(np.float32))
    settings["action_config"]["mobile"]["state"] = {"rule": "post_training", "q01": [0.0], "q99": [1.0]}
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="'mobile': state: expected q01 and q99 of 60 columns, got 1"):
        Preprocessor.load(tmp_path)
    for wrong, complaint in (
        ({"rule": "mine"}, "state: expected a mapping with rule post_training or robodojo"),
        ({"q99": None}, "state, q99"),
        ({"by_mean": [1]}, "state, by_mean: expected with rule robodojo alone"),
    ):
        settings["action_config"]["mobile"]["state"] = {"rule": "post_training", "q01": q01, "q99": q99} | wrong
        (tmp_path / file).write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=rf"{file}: robot type 'mobile': {complaint}"):
            Preprocessor.load(tmp_path)


def test_actions_by_quantiles(pictures, tmp_path):
    file = "preprocessor_config.json"
    settings = json.loads((pictures / file).read_text())
    own = settings["action_config"]["robodojo"]
    own |= {"action_q01": [[-1.0] * 60], "action_q99": [[3.0] * 3 + [-1.0] * 57], "quantile_columns": [0, 1, 4]}
    for other in pictures.iterdir():
        if other.suffix != ".safetensors":
            (tmp_path / other.name).write_bytes(other.read_bytes())
    (tmp_path / file).write_text(json.dumps(settings))
    statistics = Preprocessor.load(tmp_path).statistics["robodojo"]
    actions = np.random.default_rng(0).standard_normal((10, 60))
    normalized = statistics.normalize(actions)
    np.testing.assert_allclose(normalized[:, 0], 2 * (actions[:, 0] + 1) / (4 + 1e-6) - 1, rtol=0, atol=1e-6)
    # Column 4 stands still by its quantiles: it passes as it is. Column 2 goes by mean and std.
    np.testing.assert_array_equal(normalized[:, 4], actions[:, 4].astype(np.float32))
    mean, std = np.array(own["mean"]), np.array(own["std"])
    np.testing.assert_allclose(normalized[:, 2], ((actions - mean) / (std + 1e-6))[:, 2], rtol=1e-4, atol=1e-5)
    active = statistics.action_mask[0] > 0
    np.testing.assert_allclose(statistics.denormalize(normalized)[:, active], actions[:, active], rtol=0, atol=1e-5)


def test_tokens_of_videos_are_the_videos(videos):
    """What a client that makes tokens and patches itself sends: the video token, and a grid for each temporal patch."""
    engine = Engine.from_pretrained(videos, device="cpu", dtype="float32", backend="reference")
    prepare, observation = engine._preprocess, engine.example(image_size=(64, 96))
    inputs = prepare([observation])
    ids = inputs.input_ids[0].numpy()
    tokens = engine.config.tokens
    sent = TokenizedObservation(
        input_ids=np.where(ids == tokens.image, tokens.video, ids),
        pixel_values=inputs.pixel_values.numpy(),
        image_grids=inputs.image_grids,
        state=observation.state,
        robot_type=observation.robot_type,
    )
    expected = engine.infer(observation, seed=0)
    np.testing.assert_array_equal(engine.infer_tokenized(sent, seed=0).actions, expected.actions)
    state_token = prepare.tokenizer._tokenizer.token_to_id("<state>")
    for wrong, complaint in (
        ({"input_ids": ids}, "input_ids: expected the token of videos"),
        ({"image_grids": inputs.image_grids[:3]}, "image_grids: expected 2, its temporal patches, for each view"),
        ({"state": observation.state[:1]}, r"state: expected numbers of shape \(4, 60\)"),
        ({"input_ids": np.append(sent.input_ids, state_token)}, "input_ids: expected the prompt alone, got <state>"),
    ):
        with pytest.raises(ValueError, match=complaint):
            engine.infer_tokenized(replace(sent, **wrong), seed=0)


def test_a_history_feeds_an_engine(videos):
    engine = Engine.from_pretrained(videos, device="cpu", dtype="float32", backend="reference")
    info = engine.robot_info()
    assert (info.history, info.state_length) == ((4, 2), 4)
    rng, history = np.random.default_rng(0), History.of(info)
    frames = [{view: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for view in info.views} for _ in range(8)]
    states = rng.standard_normal((8, 60)).astype(np.float32)
    for step in range(8):
        history.push(Observation(frames[step], "go", states[step]))
    chosen = [1, 3, 5, 7]
    videos_of = {view: np.stack([frames[step][view] for step in chosen]) for view in info.views}
    expected = engine.infer(Observation(videos_of, "go", states[chosen]), seed=0)
    np.testing.assert_array_equal(engine.infer(history.observe(), seed=0).actions, expected.actions)


def test_a_video_is_prepared_frame_by_frame():
    video = np.random.default_rng(0).integers(0, 256, (4, 50, 60, 3), dtype=np.uint8)
    for view in (
        View("a", "A", rotate_180=True),
        View("a", "A", center_crop=0.95),
        View("a", "A", resize=(32, 64), resize_filter="bilinear", rotate_180=True),
    ):
        np.testing.assert_array_equal(orient(video, view), np.stack([orient(frame, view) for frame in video]))
    bicubic, bilinear = (
        orient(video[0], View("a", "A", resize=(32, 64), resize_filter=f)) for f in ("bicubic", "bilinear")
    )
    assert not np.array_equal(bicubic, bilinear)
