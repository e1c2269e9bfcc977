"""openpi's examples: what they call things, and a LIBERO client that turns its pictures itself."""

from __future__ import annotations

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from tests.serve.support import LENGTHS, EchoEngine, backend
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.robot.embodiment import embodiment_for
from xr0_engine.serve.protocol import PolicyMetadata
from xr0_engine.serve.requests import read_request
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.worker import EngineThread
from xr0_engine.types import Observation

SAME = 1e-6
"""Robot units of order 1: the same float32 arithmetic on the same inputs, once through a socket."""

RNG = np.random.default_rng(0)
# As the simulator renders them, upside down.
RAW = {view: RNG.integers(0, 256, (64, 64, 3), np.uint8) for view in ("base", "left_wrist")}
STATE = RNG.standard_normal(8)


def example(**change: object) -> dict:
    """What the LIBERO example sends: pictures turned upright, and end effector and gripper alone as the state."""
    base, wrist = (np.ascontiguousarray(image[::-1, ::-1]) for image in RAW.values())
    sent = {"observation/image": base, "observation/wrist_image": wrist, "observation/state": STATE, "prompt": "Go."}
    return {name: value for name, value in {**sent, **change}.items() if value is not None}


def metadata(*robot_types: str) -> PolicyMetadata:
    robots = {name: embodiment_for(name).robot_info(LENGTHS.get(name, 10), 32, 6) for name in robot_types}
    return PolicyMetadata(robots, 32, 32, (0, 6), 1 << 20, 1 << 20, 100.0)


LIBERO = metadata("libero_all")
WHOLE_STATE = {"observation/state": np.ones(32)}


# openpi's way to connect is on its way out of websockets.
@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")
def test_libero_example_gets_what_it_expects(tmp_path):
    init_checkpoint(tmp_path / "tiny")
    engine = Engine.from_pretrained(tmp_path / "tiny", device="cpu", dtype="float32")
    state = np.concatenate([STATE, np.zeros(24)]).astype(np.float32)
    expected = engine.infer(Observation(RAW, "Go.", state, "libero_all"), seed=5).actions
    with BackgroundServer(EngineThread(lambda: engine, (64, 64), "libero_all")) as server:
        client = WebsocketClientPolicy("localhost", server.port)
        reply = client.infer(example(seed=5))
        client._ws.close()
    # LIBERO's environment takes 7 columns, and the example hands it what came.
    assert reply["actions"].shape == (10, 7)
    np.testing.assert_allclose(reply["actions"], expected[:, :7], rtol=0, atol=SAME)
    assert reply["normalized"].shape == (10, 32)


def test_observation_holds_raw_frames():
    request = read_request(example(), LIBERO)
    observation = request.observation
    assert (observation.prepared, request.columns) == (False, 7)
    for view, image in RAW.items():
        np.testing.assert_array_equal(observation.images[view], image)
    np.testing.assert_array_equal(observation.state, np.float32([*STATE, *np.zeros(24)]))


def test_client_with_a_state_of_its_own_takes_whole_actions():
    request = read_request(example(**WHOLE_STATE), LIBERO)
    np.testing.assert_array_equal(request.observation.images["base"], RAW["base"])
    assert request.columns is None


@pytest.mark.parametrize("prepared", [False, True])
def test_what_is_said_is_taken_literally(prepared):
    sent = example(**WHOLE_STATE, prepared=prepared)
    observation = read_request(sent, LIBERO).observation
    assert observation.prepared is prepared
    np.testing.assert_array_equal(observation.images["base"], sent["observation/image"])


def test_names_without_the_example_s_prefix_are_raw_frames():
    fields = {"image": RAW["base"], "wrist_image": RAW["left_wrist"], "state": np.ones(32), "prompt": "Go."}
    for view, image in read_request(fields, LIBERO).observation.images.items():
        np.testing.assert_array_equal(image, RAW[view])


def test_views_that_no_profile_turns_stay():
    sent = example(**WHOLE_STATE)
    read = read_request(sent, metadata("calvin_abc_orig")).observation
    np.testing.assert_array_equal(read.images["base"], sent["observation/image"])


OTHER_NAMES = {"observation/image": None, "observation/wrist_image": None, **RAW}


@pytest.mark.parametrize(
    ("change", "robot_type"),
    [
        pytest.param({"observation/state": STATE[:7]}, "libero_all", id="7 values"),
        pytest.param({"observation/state": STATE[None]}, "libero_all", id="a batch"),
        pytest.param({"prepared": False}, "libero_all", id="another client"),
        pytest.param(OTHER_NAMES, "libero_all", id="other names"),
        pytest.param({}, "calvin_abc_orig", id="another robot"),
    ],
)
def test_only_the_example_leaves_zeros_out(change, robot_type):
    with pytest.raises(ValueError, match="state: expected 32 values, got shape"):
        read_request(example(**change), metadata(robot_type))


def test_aloha_example():
    cameras = dict.fromkeys(("cam_high", "cam_left_wrist", "cam_right_wrist"), RAW["base"].transpose(2, 0, 1))
    fields = {"images": cameras, "state": np.ones(32), "prompt": "Go."}
    images = read_request(fields, metadata("bimanual")).observation.images
    assert sorted(images) == ["ego", "left_wrist", "right_wrist"]
    np.testing.assert_array_equal(images["ego"], RAW["base"])


@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")
def test_metadata_say_who_turns_and_crops():
    with BackgroundServer(backend(EchoEngine())) as server:
        client = WebsocketClientPolicy("localhost", server.port)
        robot = client.get_server_metadata()["robots"]["libero_all"]
        client._ws.close()
    assert robot["embodiment"] == "libero"
    assert robot["preparation"] == [
        {"title": "Base View", "rotate_180": True, "resize": None, "center_crop": 1.0},
        {"title": "Left-Wrist View", "rotate_180": True, "resize": None, "center_crop": 1.0},
    ]
