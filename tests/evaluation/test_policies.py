"""Where policies come from: servers that are asked, checkpoints, experts."""

from __future__ import annotations

import pickle
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from openpi_client import image_tools
from websockets.sync.server import serve

from tests.evaluation.fake import PointBenchmark
from tests.serve.support import EchoEngine, backend
from xr0_engine import Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.evaluation import policies
from xr0_engine.evaluation.desk import Call, Desk
from xr0_engine.evaluation.episode import Unfit
from xr0_engine.evaluation.openpi import EXAMPLES, OpenpiClient, plain_words, square
from xr0_engine.serve.protocol import PolicyFailed, Refused
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.wire import pack, unpack
from xr0_engine.sim import columns_to_joints, joints_to_columns
from xr0_engine.types import Observation

WAIT_S, REPLY_S = 60.0, 60.0


def nobody(*_):
    raise AssertionError("the parent's engine was asked")


class Named:
    """A benchmark as far as sources look at it."""

    rate_hz = 20.0

    def __init__(self, name="libero", robot_type="libero_all"):
        self.name, self.robot_type = name, robot_type


def libero_observation():
    rng = np.random.default_rng(0)
    images = {view: rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for view in ("base", "left_wrist")}
    state = np.zeros(32, np.float32)
    state[:8] = np.arange(8)
    return Observation(images, "Pick up the bowl.", state, "libero_all", 1.5)


@contextmanager
def openpi_server(answer, greeting=b"\x80", process_request=None):
    """A server of openpi's protocol. answer: request -> what is sent back."""
    seen = []

    def handle(connection):
        connection.send(greeting)
        for message in connection:
            seen.append(unpack(message))
            reply = answer(seen[-1])
            if reply is None:
                connection.close()
                return
            connection.send(reply if isinstance(reply, str) else pack(reply))

    with serve(handle, "127.0.0.1", 0, process_request=process_request) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", seen
        finally:
            server.shutdown()
            thread.join()


def chunk(length=10, columns=7):
    return {"actions": np.arange(length * columns, dtype=np.float64).reshape(length, columns), "server_timing": {}}


def test_libero_as_openpi_s_example_asks():
    observation = libero_observation()
    with openpi_server(lambda request: chunk()) as (url, seen):
        source = policies.of_openpi(url, None, Named(), WAIT_S, REPLY_S)
        assert (source.told["kind"], source.told["checkpoint"], source.robot_type) == ("openpi", None, None)
        info = source.info
        assert (info.chunk_length, info.action_width, info.max_prefix, info.control_rate_hz) == (10, 32, 0, 20)
        assert (info.step_columns, info.two_valued_columns) == ((0, 1, 2, 3, 4, 5), (6,))
        with pickle.loads(pickle.dumps(source)).connect(Named(), nobody) as begin:
            actor = begin(None)
            assert actor.robot_info() == info
            got = actor.infer(observation, None, 7)
            with pytest.raises(Refused, match="openpi's protocol has no prefixes"):
                actor.infer(observation, got.actions[:2], 7)
    np.testing.assert_array_equal(got.actions[:, :7], chunk()["actions"])
    assert not got.actions[:, 7:].any()
    assert (got.actions.shape, got.actions.dtype, got.prefix_length, got.timestamp_s) == ((10, 32), np.float32, 0, 1.5)
    request = seen[-1]
    assert request.keys() == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    for view, name in (("base", "observation/image"), ("left_wrist", "observation/wrist_image")):
        upright = np.ascontiguousarray(observation.images[view][::-1, ::-1])
        np.testing.assert_array_equal(request[name], image_tools.resize_with_pad(upright, 224, 224))
    np.testing.assert_array_equal(request["observation/state"], np.arange(8))
    assert request["prompt"] == "pick up the bowl"


def test_aloha_as_openpi_s_example_asks():
    rng = np.random.default_rng(1)
    images = {
        view: rng.integers(0, 256, (240, 320, 3), dtype=np.uint8) for view in ("ego", "left_wrist", "right_wrist")
    }
    joints = np.arange(14, dtype=np.float32) / 10
    observation = Observation(images, "Transfer the cube.", joints_to_columns(joints)[None], "bimanual")
    with (
        openpi_server(lambda request: chunk(50, 14)) as (url, seen),
        OpenpiClient(url, None, EXAMPLES["aloha"], REPLY_S) as client,
    ):
        got = client.infer(observation, None, 0)
        assert client.robot_info().layout == "bimanual"
    request = seen[0]
    assert request.keys() == {"state", "images", "prompt"}
    np.testing.assert_array_equal(request["state"], joints)
    picture = image_tools.resize_with_pad(images["ego"], 224, 224).transpose(2, 0, 1)
    np.testing.assert_array_equal(request["images"]["cam_high"], picture)
    # Absolute joints there, anchored at the observation here.
    np.testing.assert_allclose(columns_to_joints(got.actions) + joints, chunk(50, 14)["actions"], rtol=1e-6)
    assert not got.actions[:, :6].any()


@pytest.mark.parametrize("size", [(256, 256), (480, 640), (640, 480), (224, 224), (100, 37), (8, 224)], ids=str)
def test_pictures_are_padded_as_openpi_s_client_does(size):
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(square(image), image_tools.resize_with_pad(image, 224, 224))


def test_prepared_pictures_are_not_turned():
    observation = libero_observation()
    prepared = Observation(observation.images, "x", observation.state, prepared=True)
    sent = EXAMPLES["libero"].ask(prepared)["observation/image"]
    np.testing.assert_array_equal(sent, square(observation.images["base"]))


@pytest.mark.parametrize(
    ("text", "expected"), [("Pick up the bowl.", "pick up the bowl"), ("open it", "open it"), ("", "")]
)
def test_plain_words(text, expected):
    assert plain_words(text) == expected


@pytest.mark.parametrize(
    ("answer", "complaint", "kind"),
    [
        pytest.param("Traceback:\n  ...\nKeyError: 'state'", "KeyError: 'state'", PolicyFailed, id="error"),
        pytest.param(chunk(10, 14), r"actions: expected \(T, 7\) .*got \(10, 14\)", Refused, id="another robot"),
        pytest.param({"actions": np.zeros((0, 7))}, r"got \(0, 7\)", Refused, id="empty"),
        pytest.param({"actions": [[0.0] * 7]}, "got list", Refused, id="list"),
        pytest.param({"action": 1}, "got NoneType", Refused, id="nothing"),
        pytest.param(None, "connection lost", ConnectionError, id="gone"),
    ],
)
def test_what_an_openpi_server_may_not_answer(answer, complaint, kind):
    with (
        openpi_server(lambda request: answer) as (url, _),
        OpenpiClient(url, None, EXAMPLES["libero"], REPLY_S) as client,
        pytest.raises(kind, match=complaint),
    ):
        client.infer(libero_observation(), None, 0)


def test_no_openpi_server():
    with pytest.raises(ConnectionError, match="cannot connect"):
        policies.of_openpi("ws://127.0.0.1:9", None, Named(), 0.1, REPLY_S)
    with pytest.raises(ValueError, match="expected ws://host:port"):
        policies.of_openpi("http://127.0.0.1:9", None, Named(), 0.1, REPLY_S)
    with pytest.raises(ValueError, match=r"--openpi: expected a benchmark .* libero, aloha; got calvin"):
        policies.of_openpi("ws://127.0.0.1:9", None, Named("calvin"), 0.1, REPLY_S)

    def refuse(connection, request):
        return connection.respond(401, "no key\n")

    with (
        openpi_server(lambda request: None, process_request=refuse) as (url, _),
        pytest.raises(PermissionError, match="401"),
    ):
        policies.of_openpi(url, "wrong", Named(), WAIT_S, REPLY_S)


class OneRobot(EchoEngine):
    robot_types = ("libero_all",)


def test_our_server_speaks_openpi_too():
    with BackgroundServer(backend(OneRobot()), ServerConfig(port=0)) as server:
        source = policies.of_openpi(server.url, None, Named(), WAIT_S, REPLY_S)
        assert (source.info.chunk_length, source.info.embodiment) == (10, "libero")
        with source.connect(Named(), nobody) as begin:
            actions = begin(None).infer(libero_observation(), None, 0).actions
    # Its actions hold the first value of the state.
    assert not actions.any()


def test_a_server_of_ours():
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        source = policies.of_server(server.url, None, None, None, Named(), WAIT_S, REPLY_S)
        assert source.told == {
            "kind": "server",
            "title": f"libero_all from {server.url.removeprefix('ws://')}",
            "checkpoint": None,
            "robot_type": "libero_all",
            "dtype": None,
            "backend": None,
        }
        with pickle.loads(pickle.dumps(source)).connect(Named(), nobody) as begin:
            actor = begin(None)
            assert actor.robot_info(source.robot_type) == source.info
            prefix = np.full((2, 32), 3, np.float32)
            got = actor.infer(libero_observation(), prefix, 11)
        np.testing.assert_array_equal(got.actions[:2], prefix)
        assert got.actions[5, -1] == 11
        with pytest.raises(ValueError, match="--robot-type: expected one of libero_all, bimanual; got 'r2d2'"):
            policies.of_server(server.url, None, None, "r2d2", Named(), WAIT_S, REPLY_S)
    gone = replace(source, wait_s=0.1)
    with pytest.raises(ConnectionError, match="cannot connect"), gone.connect(Named(), nobody):
        raise AssertionError("connected")


def test_a_server_that_came_back_with_another_policy():
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        source = policies.of_server(server.url, None, None, None, Named(), WAIT_S, REPLY_S)
        port = int(server.url.rpartition(":")[2])
    with (
        BackgroundServer(backend(EchoEngine()), ServerConfig(port=port, max_prefix=1)),
        pytest.raises(ValueError, match="came back with another policy"),
        source.connect(Named(), nobody),
    ):
        raise AssertionError("connected")


@pytest.mark.parametrize(
    ("known", "asked", "own", "chosen"),
    [
        (("a", "b"), "b", "a", "b"),
        (("a", "b"), None, "a", "a"),
        (("c",), None, "a", "c"),
        (("a", "b"), None, None, None),
        (("a", "b"), None, "c", None),
        (("a",), "b", "a", None),
    ],
)
def test_which_robot(known, asked, own, chosen):
    if chosen is None:
        with pytest.raises(ValueError, match="--robot-type: expected one of"):
            policies.choose_robot_type(known, asked, Named(robot_type=own))
    else:
        assert policies.choose_robot_type(known, asked, Named(robot_type=own)) == chosen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine.from_pretrained(checkpoint, "cpu", "float32")


def ask_all(engine, observations, batch):
    """The chunks of observations that were asked for all at once; seeds are their numbers."""
    answered, replies = threading.Event(), {}
    gate = threading.Event()

    class Gated:
        def infer(self, *arguments, **named):
            gate.wait(60)
            return engine.infer(*arguments, **named)

    def keep(number, reply):
        replies[number] = reply
        if len(replies) == len(observations):
            answered.set()

    with Desk(Gated, batch) as desk:
        for number, observation in enumerate(observations):
            desk.ask(Call(observation, None, number, lambda reply, number=number: keep(number, reply)))
        gate.set()
        assert answered.wait(60)
    return [replies[number].actions for number in range(len(observations))]


# What float32 rounds otherwise when rows are multiplied together, of actions of some tenths.
ROUNDING = 1e-4


def test_what_batches_change(engine):
    """Alone, chunks are the engine's bit for bit; together, only their rounding may differ."""
    example = engine.example("libero_all", (64, 64))
    texts = ("Do it.", "Pick up the red cube and place it on the plate.", "Open the drawer.")
    observations = [Observation(example.images, text, example.state, "libero_all") for text in texts]
    expected = [engine.infer(each, seed=number).actions for number, each in enumerate(observations)]
    for got, alone in zip(ask_all(engine, observations, 1), expected, strict=True):
        np.testing.assert_array_equal(got, alone)
    for got, alone in zip(ask_all(engine, observations, 3), expected, strict=True):
        np.testing.assert_allclose(got, alone, atol=ROUNDING * np.abs(alone).max())


def test_an_engine_tells_what_it_is(engine, checkpoint):
    source = policies.of_engine(engine, str(checkpoint), None, Named(), "float32")
    told = dict(source.told)
    assert len(told.pop("checkpoint")) == 64
    assert told.pop("threads") >= 1
    assert told == {
        "kind": "engine",
        "title": "tiny",
        "robot_type": "libero_all",
        "dtype": "float32",
        "backend": "reference",
    }
    assert source.info == engine.robot_info("libero_all")
    asked = []
    with source.connect(Named(), lambda *given: asked.append(given)) as begin:
        begin(None).infer(libero_observation(), None, 5)
    assert asked[0][1:] == (None, 5)


def test_experts():
    benchmark = PointBenchmark()
    world = benchmark.open()
    with policies.of_expert().connect(benchmark, nobody) as begin:
        first, second = begin(world), begin(world)
    assert first is not second
    assert first.robot_info() == benchmark.info

    class Without(Named):
        def expert(self, world):
            return None

    with (
        policies.of_expert().connect(Without(), nobody) as begin,
        pytest.raises(Unfit, match="--expert: libero has none"),
    ):
        begin(world)
