"""Released clients against a real engine behind their port: they get what the engine gives for prepared images."""

from __future__ import annotations

import pickle
from collections import OrderedDict, UserDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from tests.serve.test_legacy import ReleasedClient, free_port
from xr0_engine import Client, Engine, Observation
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.robot.embodiment import embodiment_for
from xr0_engine.robot.preprocess import images_to_patches
from xr0_engine.robot.prompt import TOKENIZER_FILE, build_prompt
from xr0_engine.serve.protocol import PolicyMetadata
from xr0_engine.serve.released import read_request
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.unpickle import restricted_loads
from xr0_engine.serve.worker import EngineThread

SAME = 1e-6
"""Robot units of order 1: the same float32 arithmetic on the same inputs, once through a socket."""

DIFFERENT = 1e-3
"""What another picture or prompt changes at least: a thousand times as much."""

# Robot type -> the sizes (width, height) of its raw frames, and what the released client calls them.
FRAMES = {
    "libero_all": {"base": (256, 256), "wrist_left": (256, 256)},
    "calvin_abcd_orig": {"base": (200, 200), "wrist_left": (84, 84)},
    "bridge_delta": {"base": (640, 480)},
    "fractal_delta": {"base": (640, 512)},
}
TITLES = {"bridge_delta": "Base View", "fractal_delta": "Ego View"}
TASK = "Put the spoon on the towel."


def released_prompt(robot_type: str, task: str) -> str:
    """The `language` of SimplerEnv's clients, as spec section 3.2 writes it out."""
    view = f"# {TITLES[robot_type]}\n<|vision_start|><|image_pad|><|vision_end|>\n"
    return (
        f"<|im_start|>user\nThe following observations are captured from multiple views.\n{view}"
        f"Generate robot actions for the task:\n{task} /no_cot<|im_end|>\n"
        "<|im_start|>assistant\n<cot></cot><|im_end|>\n"
    )


def prepared_as_released(robot_type: str, frame: np.ndarray) -> Image.Image:
    """A raw frame as the released evaluation of the robot type hands it over."""
    picture = Image.fromarray(frame)
    if robot_type == "libero_all":
        return picture.rotate(180)
    if robot_type == "bridge_delta":
        picture = picture.resize((256, 256))
    elif robot_type == "fractal_delta":
        picture = picture.resize((320, 256))
    width, height = picture.size
    kept_width, kept_height = int(0.95 * width), int(0.95 * height)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    cut = picture.crop((left, top, left + kept_width, top + kept_height))
    return cut.resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(engine):
    config = ServerConfig(port=0, legacy_port=free_port())
    with BackgroundServer(EngineThread(lambda: engine, image_size=(64, 64)), config) as server:
        yield server


@pytest.fixture
def ask(server):
    """Sends a dictionary as the released client does; what comes back, without the batch."""
    client = ReleasedClient(server.server.config.legacy_port)

    def ask(request: dict) -> np.ndarray:
        client.send(pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL))
        actions = client.receive()
        assert actions.dtype == torch.float32
        return actions[0].numpy()

    yield ask
    client.socket.close()


@pytest.mark.parametrize("robot_type", FRAMES)
def test_prepared_images_are_not_prepared_again(folder, server, ask, robot_type):
    rng = np.random.default_rng(0)
    raw = {
        name: rng.integers(0, 256, (height, width, 3), np.uint8) for name, (width, height) in FRAMES[robot_type].items()
    }
    sent = {name: prepared_as_released(robot_type, frame) for name, frame in raw.items()}
    state = rng.standard_normal(32)
    language = released_prompt(robot_type, TASK) if robot_type in TITLES else TASK
    request = {"task_id": robot_type, "state": state[None, None], "language": language, "seed": 7, **sent}
    actions = ask(request)

    profile = embodiment_for(robot_type)
    untouched = [replace(view, rotate_180=False, resize=None, center_crop=1.0) for view in profile.views]
    plain = Engine.from_pretrained(
        folder, device="cpu", dtype="float32", embodiment=replace(profile, views=tuple(untouched))
    )
    keys = [view.key for view in profile.views]
    images = {key: np.asarray(image) for key, image in zip(keys, sent.values(), strict=True)}
    observation = Observation(images, TASK, state.astype(np.float32), robot_type)
    np.testing.assert_allclose(actions, plain.infer(observation, seed=7).actions, rtol=0, atol=SAME)

    with Client(server.url) as client:
        # What the server makes of raw frames is what the released client made of them.
        frames = dict(zip(keys, raw.values(), strict=True))
        from_raw = client.infer(replace(observation, images=frames), seed=7).actions
        np.testing.assert_allclose(from_raw, actions, rtol=0, atol=SAME)
        same = client.infer(replace(observation, prepared=True), seed=7).actions
        np.testing.assert_allclose(same, actions, rtol=0, atol=SAME)
        twice = client.infer(observation, seed=7).actions
    assert np.abs(twice - actions).max() > DIFFERENT


def tensors(engine: Engine, folder, observation: Observation, prompt_end: str = " /no_cot") -> dict:
    """What the released bimanual client makes of an observation on its side. Its own prompt has an empty prompt_end."""
    vision = engine.config.vision
    views = embodiment_for("bimanual").views
    pixels, grids = images_to_patches([observation.images[view.key] for view in views], vision)
    counts = [height * width // vision.spatial_merge_size**2 for height, width in grids]
    prompt = build_prompt([view.title for view in views], counts, observation.instruction)
    ids = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode(prompt.replace(" /no_cot", prompt_end)).ids
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
        "state": torch.from_numpy(observation.state)[None, None],
    }


@pytest.fixture(scope="module")
def bimanual(engine):
    return engine.example("bimanual", (96, 128))


@pytest.fixture(scope="module")
def bimanual_server(engine):
    config = ServerConfig(port=0, legacy_port=free_port())
    with BackgroundServer(EngineThread(lambda: engine, (64, 64), "bimanual"), config) as server:
        yield server


@pytest.fixture
def ask_bimanual(bimanual_server):
    client = ReleasedClient(bimanual_server.server.config.legacy_port)

    def ask(request: object) -> np.ndarray:
        client.send(pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL))
        return client.receive()[0].numpy()

    yield ask
    client.socket.close()


def test_tensors_are_run_as_they_were_sent(engine, folder, bimanual, ask_bimanual):
    expected = engine.infer(bimanual, seed=3).actions
    sent = tensors(engine, folder, bimanual)
    np.testing.assert_allclose(ask_bimanual({**sent, "seed": 3}), expected, rtol=0, atol=SAME)
    without_ending = ask_bimanual({**tensors(engine, folder, bimanual, prompt_end=""), "seed": 3})
    assert np.abs(without_ending - expected).max() > DIFFERENT
    # In bfloat16, as a client may cast them, they come close.
    halved = {**sent, "pixel_values": sent["pixel_values"].bfloat16(), "state": sent["state"].bfloat16()}
    near = np.abs(ask_bimanual({**halved, "seed": 3}) - expected).max()
    assert 0 < near < np.abs(without_ending - expected).max()


def test_padding_of_tensors_changes_nothing(engine, folder, bimanual, ask_bimanual):
    sent = tensors(engine, folder, bimanual)
    more = torch.full((1, 5), 3)
    padded = {
        **sent,
        "input_ids": torch.cat([sent["input_ids"], more], 1),
        "attention_mask": torch.cat([sent["attention_mask"], torch.zeros_like(more)], 1),
    }
    np.testing.assert_array_equal(ask_bimanual({**padded, "seed": 1}), ask_bimanual({**sent, "seed": 1}))


def test_prefix_of_tensors_is_in_robot_units(engine, folder, bimanual, ask_bimanual):
    committed = engine.infer(bimanual, seed=0).actions
    expected = engine.infer(bimanual, prefix=committed[:4], seed=3).actions
    sent = {**tensors(engine, folder, bimanual), "action": torch.from_numpy(committed)[None], "seed": 3}
    np.testing.assert_allclose(ask_bimanual({**sent, "prefix_length": 4}), expected, rtol=0, atol=SAME)
    none = ask_bimanual({**sent, "prefix_length": torch.tensor([0])})
    np.testing.assert_allclose(none, engine.infer(bimanual, seed=3).actions, rtol=0, atol=SAME)


def test_features_of_transformers_are_a_dictionary(engine, folder, bimanual, ask_bimanual):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'xr0-engine[train]'")
    named = {**tensors(engine, folder, bimanual), "seed": 3}
    expected = ask_bimanual(named)
    sent = transformers.BatchFeature(named)
    sent["mm_token_type_ids"] = torch.zeros_like(sent["input_ids"])
    for features in (sent, transformers.BatchEncoding(named), UserDict(named), OrderedDict(named)):
        np.testing.assert_array_equal(ask_bimanual(features), expected)


@pytest.fixture(scope="module")
def metadata(server) -> PolicyMetadata:
    return server.server.metadata


PICTURE = Image.new("RGB", (32, 32), "red")
ONE_VIEW = {"task_id": "bridge_delta", "state": np.zeros((1, 1, 32)), "base": PICTURE, "language": TASK, "seed": 1}
TWO_VIEWS = {**ONE_VIEW, "task_id": "libero_all", "wrist_left": PICTURE}


def read(request: dict, metadata: PolicyMetadata) -> Observation:
    return read_request(restricted_loads(pickle.dumps(request), 1 << 20), metadata).observation


WHOLE = released_prompt("bridge_delta", TASK)
WRONG_PICTURES = {
    "titles of another robot": (
        {"language": released_prompt("fractal_delta", TASK)},
        "language: robot type 'bridge_delta': expected the task alone or the prompt .*# Base View",
    ),
    "other ending": ({"language": WHOLE.replace(" /no_cot", "")}, "language: robot type"),
    "half a prompt": ({"language": WHOLE[20:]}, "language: robot type"),
    "no language": ({"language": None}, "language: expected text, got nothing"),
    "a wrist that is not there": (
        {"wrist_left": PICTURE},
        "wrist_left: expected no image of that name, got one: robot type 'bridge_delta' has base",
    ),
    "no image": ({"base": None}, "base: expected an image, got nothing: robot type 'bridge_delta' has base"),
    "alpha": ({"base": PICTURE.convert("RGBA")}, "image 'base': .*with alpha"),
    "grey": ({"base": PICTURE.convert("L")}, "image 'base': .*grey image"),
    "a view missing": (
        {"task_id": "libero_all"},
        "wrist_left: expected an image, got nothing: robot type 'libero_all' has base, left_wrist",
    ),
    "views without a name": (
        {"task_id": "bimanual"},
        "base: expected no image of that name, got one: robot type 'bimanual' has ego, left_wrist",
    ),
    "unknown robot type": ({"task_id": "widowx"}, "task_id: expected one of .*, got 'widowx'; clients that name none"),
    "number": ({"task_id": 4}, "task_id: expected one of .*, got 4; clients that name none"),
    "short state": ({"state": np.zeros((1, 1, 8))}, "state: expected 32 values"),
    "two states": ({"state": np.zeros((2, 1, 32))}, "state: expected a batch of one"),
    "unknown field": ({"prefix_length": 3}, "'prefix_length': unknown field; expected task_id, state"),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG_PICTURES.values(), ids=WRONG_PICTURES)
def test_wrong_pictures_are_refused_by_name(metadata, change, complaint):
    with pytest.raises(ValueError, match=complaint):
        read({**ONE_VIEW, **change}, metadata)


def test_views_have_the_released_names(metadata):
    one = read({**ONE_VIEW, "task_id": "fractal_delta"}, metadata)
    assert (list(one.images), one.prepared, one.instruction) == (["ego"], True, TASK)
    assert list(read(TWO_VIEWS, metadata).images) == ["base", "left_wrist"]


# What a client may write in another way, and no other meaning.
ALIKE = {
    "the task alone": {"language": TASK},
    "the whole prompt": {"language": WHOLE},
    "the prompt with its image tokens": {"language": WHOLE.replace("<|image_pad|>", "<|image_pad|>" * 64)},
    "state in lists": {"state": [[[0.0] * 32]]},
    "state in lists of NumPy's numbers": {"state": list(np.zeros(32))},
    "state as a tensor": {"state": torch.zeros(32)},
    "seed as a tensor": {"seed": torch.tensor(1)},
    "seed as an array": {"seed": np.array([1])},
}


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE)
def test_what_means_the_same_is_taken_alike(metadata, change):
    request = read_request(restricted_loads(pickle.dumps({**ONE_VIEW, **change}), 1 << 20), metadata)
    observation = request.observation
    assert (observation.instruction, observation.state.shape[-1], request.seed) == (TASK, 32, 1)
    assert not observation.state.any()


def test_numbered_tasks_mean_the_only_robot_type(metadata):
    alone = replace(metadata, robots={"libero_all": metadata.robots["libero_all"]})
    assert read({**TWO_VIEWS, "task_id": 4}, alone).robot_type == "libero_all"
    # A name means itself: another robot's request is not this one's.
    with pytest.raises(ValueError, match="task_id: expected one of libero_all, got 'bridge_delta'"):
        read(ONE_VIEW, alone)


ACTION = torch.zeros(1, 30, 32)
WRONG_TENSORS = {
    "batch": ({"input_ids": torch.zeros(2, 9, dtype=torch.long)}, "input_ids: expected a batch of one"),
    "mask": ({"attention_mask": torch.ones(1, 3)}, "attention_mask: expected the shape of input_ids"),
    "no mask": ({"attention_mask": None}, "attention_mask: expected a tensor, got nothing"),
    "video": ({"image_grid_thw": torch.tensor([[2, 4, 4]] * 3)}, "image_grid_thw: expected pictures, of time 1"),
    "one grid": ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "image_grid_thw: expected a row .* for each view"),
    "list": ({"pixel_values": [1.0]}, "pixel_values: expected a tensor, got list"),
    "no state": ({"state": None}, "state: expected numbers, got nothing"),
    "prefix without action": ({"prefix_length": 2}, "action: expected a tensor, got nothing"),
    "action without length": ({"action": ACTION}, "prefix_length: expected how many"),
    "length of texts": ({"action": ACTION, "prefix_length": [["x" * 50_000] + [""] * 99]}, "prefix_length: expected"),
    "too long": ({"action": ACTION, "prefix_length": 31}, "prefix_length: expected how many of action's 30 rows"),
    "untrained": ({"action": ACTION, "prefix_length": 9}, "action, prefix_length: expected 0 to 4"),
    "narrow action": ({"action": ACTION[..., :7], "prefix_length": 2}, "expected 0 to 4 actions of 32 columns"),
    "text beside tokens": ({"language": "Go."}, "'language': unknown field; expected input_ids"),
}


@pytest.mark.parametrize(("change", "complaint"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors_are_refused_by_name(engine, folder, bimanual, metadata, change, complaint):
    sent = {**tensors(engine, folder, bimanual), "task_id": "bimanual", **change}
    with pytest.raises(ValueError, match=complaint):
        read(sent, metadata)
