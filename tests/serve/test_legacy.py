"""The released TCP protocol: its client gets chunks, and no pickle gets to run anything."""

from __future__ import annotations

import io
import pickle
import socket
import struct
import threading
import tracemalloc
from contextlib import ExitStack, suppress

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from websockets.sync.client import connect

from tests.serve.support import EchoEngine, backend, observation, wait_until
from xr0_engine import Client
from xr0_engine.serve.protocol import Request, decode_reply
from xr0_engine.serve.requests import encode_request
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.unpickle import restricted_loads

MAX_PIXELS = 1 << 20
GO = observation(0.25, instruction="Go.")
IMAGE = Image.fromarray(GO.images["base"])
REQUEST = {
    "task_id": "libero_all",
    "state": GO.state[None],
    "base": IMAGE,
    "wrist_left": Image.fromarray(GO.images["left_wrist"]),
    "language": "Go.",
    "seed": 3,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_ports(count: int) -> int:
    """The first of so many in a row; from below those that connections of other tests are given."""
    for first in np.random.default_rng().integers(20_000, 32_000, 100):
        with ExitStack() as stack, suppress(OSError):
            for port in range(int(first), int(first) + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return int(first)
    raise AssertionError("no ports in a row")


class ReleasedClient:
    """Written against the released protocol: length, pickle; it unpickles what it gets."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)

    def send(self, payload: bytes) -> None:
        self.socket.sendall(struct.pack(">I", len(payload)) + payload)

    def receive(self):
        (length,) = struct.unpack(">I", self._exactly(4))
        return pickle.loads(self._exactly(length))

    def is_turned_away(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self.socket.recv(count - len(data)) or pytest.fail("the server closed the connection")
        return data


@pytest.fixture(scope="module")
def engine():
    return EchoEngine()


@pytest.fixture(scope="module")
def server(engine):
    config = ServerConfig(port=0, legacy_port=free_port(), max_message_bytes=1 << 20)
    with BackgroundServer(backend(engine), config) as server:
        yield server


@pytest.fixture
def client(server):
    client = ReleasedClient(server.server.config.legacy_port)
    yield client
    client.socket.close()


def test_released_client_gets_chunks(client, engine):
    for protocol in (2, 3, 4, 5):
        client.send(pickle.dumps(REQUEST, protocol))
        actions = client.receive()
        assert (type(actions).__module__, type(actions).__name__) == ("torch", "Tensor")
        assert (actions.shape, str(actions.dtype)) == ((1, 10, 32), "torch.float32")
        assert (actions[0, 0, 0].item(), actions[0, 0, -1].item()) == (0.25, 3)
        for view, image in GO.images.items():
            np.testing.assert_array_equal(engine.seen[-1].images[view], image)


# Pickle writes the second time as a reference.
SHARED, SHAPE = "the same text", (64, 48)
TOO_DEEP = b"N" + b"\x85" * 15_000


class Bomb:
    """What pickle runs on loading, if it may."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it went off')",)


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


IMAGE_CLASS = named("PIL.Image", "Image")
SIZE_BOMB = ({}, "RGB", (100_000, 100_000), None, b"")
BOMBS = {
    "code": pickle.dumps({"state": Bomb()}),
    "code in a list": pickle.dumps([[Bomb()]]),
    "code in protocol 0": pickle.dumps(Bomb(), 0),
    "eval": opcodes(named("builtins", "eval"), b"\x8c\x03", b"1+1", b"\x85R"),
    "attribute of an admitted module": opcodes(named("numpy", "load")),
    "dotted name": opcodes(named("PIL.Image", "Image.open")),
    "torch": opcodes(named("torch.storage", "_load_from_bytes"), b"C\x01x\x85R"),
    "state for a class": opcodes(IMAGE_CLASS, b"N}\x8c\x0c__setstate__K\x01s\x86b"),
    "call of a number": opcodes(b"K\x01)R"),
    "object of a number": opcodes(b"K\x01)\x81"),
    "extension": opcodes(b"\x82\x01"),
    "persistent object": opcodes(b"\x8c\x01xQ"),
    "next buffer": opcodes(b"\x97"),
    "memo of 2 billion": opcodes(b"Nr\xff\xff\xff\x7f", b"j\xff\xff\xff\x7e"),
    "bytes of 1 TB": opcodes(b"\x8e" + struct.pack("<Q", 1 << 40)),
    "byte array of 1 TB": opcodes(b"\x96" + struct.pack("<Q", 1 << 40)),
    "frame of 1 TB": opcodes(b"\x95" + struct.pack("<Q", 1 << 40)),
    "array of 1 TB": opcodes(
        named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R",
        b"(K\x01J\xff\xff\xff\x7f\x85" + named("numpy", "dtype") + b"\x8c\x02f8\x85R\x89C\x00tb",
    ),
    "array made by its class": opcodes(named("numpy", "ndarray"), b"J\xff\xff\xff\x7f\x85\x85R"),
    "image of 30 GB": opcodes(IMAGE_CLASS, b")\x81", pickle.dumps(list(SIZE_BOMB), 4)[2:-1], b"b"),
    "image without a state": opcodes(IMAGE_CLASS, b")\x81"),
    "class alone": opcodes(IMAGE_CLASS),
    "objects in an array": pickle.dumps(np.array([{}, {}])),
    "twice of twice": opcodes(b"K\x01", b"2\x86" * 40),
    "twice of twice from the memo": opcodes(b"K\x01", *(b"\x94h%c\x86" % index for index in range(40))),
    "twice of twice as a key": opcodes(b"}K\x01", *(b"\x94h%c\x86" % index for index in range(40)), b"Ns"),
    "lists filled afterwards": opcodes(b"]\x94]\x94(h\x00h\x00eh\x01(K\x01K\x01e"),
    "map in two places": opcodes(b"]}\x94h\x00\x86a"),
    "long shape in two places": opcodes(b"((" + b"K\x01" * 1000 + b"t\x94h\x00t"),
    "many opcodes": opcodes(b"N0" * 20_000, b"N"),
    "empty stack": opcodes(),
    "no end": b"\x80\x04N",
    "nothing": b"",
    "noise": np.random.default_rng(0).bytes(500),
    "bytes of one text without end": opcodes(
        b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"\x940](",
        (named("_codecs", "encode") + b"h\x00\x8c\x06latin1\x86R") * 64,
        b"e",
    ),
    "encoding of its own": opcodes(named("_codecs", "encode"), b"\x8c\x01x\x8c\x03hex\x86R"),
    "encoder alone": opcodes(named("_codecs", "encode")),
    "module beside the pictures": opcodes(named("PIL.ImageFile", "ImageFile")),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bomb_does_not_go_off(bomb):
    tracemalloc.start()
    with pytest.raises(ValueError, match="pickle: expected"):
        restricted_loads(bomb, MAX_PIXELS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_survive(protocol):
    picture = io.BytesIO()
    IMAGE.save(picture, "PNG")
    value = {
        "state": np.arange(32, dtype=np.float32),
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 3)),
        "axes moved": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1),
        "axes swapped": np.arange(24.0).reshape(2, 3, 4).swapaxes(1, 2),
        "part": np.arange(24.0).reshape(4, 6)[1:, ::2],
        "picture": IMAGE,
        "grey": IMAGE.convert("L"),
        "file": Image.open(picture),
        "number": np.int64(3),
        "list": [1.5, "a", None, True, (2, b"x", b"", b"\xff\x00")],
        "numbers": [*np.arange(3.0)],
        "text of an array": np.array(["open", "it"])[0],
        "same picture": IMAGE,
        "same text": SHARED,
        "same shape": [SHARED, SHAPE, SHAPE],
    }
    read = restricted_loads(pickle.dumps(value, protocol), MAX_PIXELS)
    for name in ("list", "numbers", "text of an array", "same text", "same shape"):
        assert read[name] == value[name]
    np.testing.assert_array_equal(read["grey"], np.asarray(IMAGE.convert("L")))
    for name in ("state", "columns first", "axes moved", "axes swapped", "part", "big-endian", "empty", "number"):
        np.testing.assert_array_equal(read[name], value[name])
        assert read[name].dtype == value[name].dtype
    for name in ("picture", "same picture", "file"):
        np.testing.assert_array_equal(read[name], np.asarray(IMAGE))


def opened(image: Image.Image, kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


FACTS = PngInfo()
FACTS.add_text("transparency", "none")
FACTS.add_itxt("title", "a picture", "en")
PICTURE_FILES = {
    "PNG with texts": ("PNG", {"pnginfo": FACTS, "dpi": (72, 72)}),
    "TIFF with a resolution": ("TIFF", {"dpi": (72, 72.5)}),
    "BMP": ("BMP", {}),
    "PPM": ("PPM", {}),
    "WEBP": ("WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("kind", "options"), PICTURE_FILES.values(), ids=PICTURE_FILES)
def test_picture_opened_from_any_file_survives(kind, options, protocol):
    sent = pickle.dumps({"base": opened(IMAGE, kind, **options)}, protocol)
    np.testing.assert_array_equal(restricted_loads(sent, MAX_PIXELS)["base"], np.asarray(IMAGE))


UNUSABLE = {
    "palette": (IMAGE.convert("P"), "got 'P': send `image.convert\\('RGB'\\)`"),
    "inks": (IMAGE.convert("CMYK"), "got 'CMYK': send `image.convert\\('RGB'\\)`"),
    # Pillow's conversion would make them white.
    "16 bits": (Image.new("I;16", (4, 4)), "expected mode RGB, got 'I;16'$"),
    "real numbers": (Image.new("F", (4, 4)), "expected mode RGB, got 'F'$"),
    "transparent colour": (
        opened(IMAGE, "PNG", transparency=(0, 0, 0)),
        "without transparency: lay it on a background",
    ),
}


@pytest.mark.parametrize(("image", "complaint"), UNUSABLE.values(), ids=UNUSABLE)
def test_picture_of_another_mode_is_refused_by_its_field(image, complaint):
    with pytest.raises(ValueError, match=f"'base': image: .*{complaint}"):
        restricted_loads(pickle.dumps({"base": image}), MAX_PIXELS)


def test_image_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="expected at most 100 pixels, got 48 x 64"):
        restricted_loads(pickle.dumps({"base": IMAGE}), 100)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(BOMBS["code"], id="bomb"),
        pytest.param(pickle.dumps([1]), id="no dictionary"),
        pytest.param(opcodes(b"}", TOO_DEEP, b"Ns"), id="deep key"),
        pytest.param(opcodes(b"}\x8c\x04seed", TOO_DEEP, b"s"), id="deep seed"),
        pytest.param(pickle.dumps({**REQUEST, "state": [["x" * 500_000] + [""] * 1000]}), id="texts as state"),
        pytest.param(pickle.dumps({**REQUEST, "more": 1}), id="unknown field"),
        pytest.param(pickle.dumps({**REQUEST, "state": None}), id="no state"),
        pytest.param(pickle.dumps({**REQUEST, "language": "Refuse me."}), id="refused by the engine"),
    ],
)
def test_wrong_request_ends_the_connection_and_no_more(server, client, payload):
    client.send(payload)
    assert client.is_turned_away()
    again = ReleasedClient(server.server.config.legacy_port)
    again.send(pickle.dumps(REQUEST))
    assert again.receive().shape == (1, 10, 32)
    again.socket.close()


@pytest.mark.parametrize(
    "head", [struct.pack(">I", 1 << 30), b"\xff\xff\xff\xff", b"GET "], ids=["1 GB", "4 GB", "HTTP"]
)
def test_huge_length_is_refused(client, head):
    client.socket.sendall(head)
    assert client.is_turned_away()


def test_half_a_message_is_no_request(server, client):
    payload = pickle.dumps(REQUEST)
    client.socket.sendall(struct.pack(">I", len(payload)) + payload[:100])
    client.socket.shutdown(socket.SHUT_WR)
    assert client.is_turned_away()


def test_both_protocols_take_turns(server, client):
    results = []
    with Client(server.url) as modern:
        asking = threading.Thread(target=lambda: results.extend(modern.infer(GO).actions[0, 0] for _ in range(10)))
        asking.start()
        for _ in range(10):
            client.send(pickle.dumps(REQUEST))
            results.append(client.receive()[0, 0, 0].item())
        asking.join()
    assert results == [0.25] * 20


def test_shutdown_answers_what_was_asked_in_either_protocol():
    engine = EchoEngine(gate=threading.Semaphore(0))
    config = ServerConfig(port=0, legacy_port=free_port())
    server = BackgroundServer(backend(engine), config)
    server.__enter__()
    with connect(server.url, compression=None) as modern:
        modern.recv()
        modern.send(encode_request(Request(GO, id=1)))
        wait_until(lambda: engine.seen)
        released = ReleasedClient(config.legacy_port)
        released.send(pickle.dumps(REQUEST))
        wait_until(lambda: len(server.server.busy) == 2)
        modern.send(encode_request(Request(GO, id=2)))
        # Answered after what was sent before it, so that has arrived.
        modern.send(b"")
        assert modern.recv().startswith("refused: ")
        leaving = threading.Thread(target=lambda: server.__exit__(None, None, None))
        leaving.start()
        wait_until(lambda: server.server.draining)
        engine.gate.release()
        assert decode_reply(modern.recv()).id == 1
        wait_until(lambda: len(engine.seen) == 2)
        engine.gate.release()
        assert released.receive().shape == (1, 10, 32)
        released.socket.close()
        wait_until(lambda: len(engine.seen) == 3 and len(server.server.monitor.clients) == 1)
        assert server.server.busy
        engine.gate.release()
        assert decode_reply(modern.recv()).id == 2
        leaving.join()


def test_each_rank_has_a_port_of_its_own():
    first = free_ports(3)
    config = ServerConfig(port=0, legacy_port=first, legacy_ranks=3)
    with BackgroundServer(backend(EchoEngine()), config):
        ranks = [ReleasedClient(first + rank) for rank in range(3)]
        for rank, client in enumerate(ranks):
            client.send(pickle.dumps({**REQUEST, "seed": rank}))
        assert [client.receive()[0, 0, -1].item() for client in ranks] == [0, 1, 2]
        for client in ranks:
            client.socket.close()


@pytest.mark.parametrize(("port", "ranks"), [(10086, 0), (65535, 2)])
def test_ports_that_are_none(port, ranks):
    with pytest.raises(ValueError, match=f"legacy_ranks: expected at least 1, and ports up to 65535, got {ranks}"):
        ServerConfig(legacy_port=port, legacy_ranks=ranks)


def test_port_without_keys_stays_on_this_machine():
    with pytest.raises(ValueError, match="takes API keys"):
        ServerConfig(host="0.0.0.0", keys=("some-api-key",), legacy_port=10086)
