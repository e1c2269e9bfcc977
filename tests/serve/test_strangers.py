"""Those who are not let in: pages of other sites, names that lead here, wrong keys, and one key too often."""

from __future__ import annotations

import logging
import socket
import time

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.serve.test_server import KEY, get, serving
from xr0_engine import Client
from xr0_engine.serve import access
from xr0_engine.serve.access import WrongKeys, find_key, is_local_name, is_own_name
from xr0_engine.serve.service import ServerConfig

OTHER_KEY = "another-key"
ANYONE = {"host": "0.0.0.0", "allow_anyone": True}


def ask(port: int, *lines: str) -> bytes:
    """The first line of the answer to a request of these header lines."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join(("GET /status.json HTTP/1.1", *lines, "", "")).encode("latin-1"))
        return connection.makefile("rb").readline()


@pytest.mark.parametrize(
    "doubled",
    [
        ("Host: localhost", "Host: localhost"),
        ("Host: localhost", "host: evil.example"),
        ("Host: localhost", f"Authorization: Bearer {KEY}", "Authorization: Bearer wrong-horse"),
        ("Host: localhost", "Origin: http://localhost", "Origin: http://evil.example"),
        ("Host: localhost", "Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"),
        ("Host: localhost", "Upgrade: websocket", "Upgrade: websocket"),
    ],
    ids=lambda lines: lines[-1].partition(":")[0],
)
def test_header_that_comes_twice_is_a_bad_request(doubled):
    with serving() as server:
        assert ask(server.port, *doubled).startswith(b"HTTP/1.1 400 ")
        assert ask(server.port, "Host: localhost", "Accept: a", "Accept: b").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ["LOCALHOST", "LocalHost:8000", "localhost.", "[::1]:80", "127.0.0.1"])
def test_names_are_compared_without_case(name):
    assert is_local_name(name)
    with serving() as server:
        assert get(server, "/status.json", Host=name)[0] == 200


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("192.168.0.3:8000", True),
        ("[2001:db8::1]", True),
        ("localhost", True),
        (socket.gethostname().upper(), True),
        ("GPU-Box:8000", True),
        ("gpu-box.evil.example", False),
        ("evil.example", False),
        ("2130706433", False),
        ("", False),
        (None, False),
    ],
)
def test_own_names(host, own):
    assert is_own_name(host, ("gpu-box",)) is own


def test_names_that_lead_here_are_found_out_with_allow_anyone_too():
    with serving(**ANYONE, host_names=("gpu-box.example",)) as server:
        for path in ("/", "/status.json", "/metrics", "/frames/1/base"):
            assert get(server, path, Host="evil.example")[0] == 403
        assert get(server, "/status.json", Host="GPU-box.example:80")[0] == 200
        assert get(server, "/status.json", Host="10.0.0.7")[0] == 200
        assert get(server, "/healthz", Host="evil.example") == (200, "ok")
        url = f"ws://127.0.0.1:{server.port}"
        with pytest.raises(InvalidStatus), connect(url, origin="http://evil.example"):
            pass
        # Robots have names for it that it does not know.
        with connect(url, additional_headers={"X-Robot": "1"}) as robot:
            robot.recv()


@pytest.mark.parametrize("config", [{}, {"keys": (KEY,)}, ANYONE], ids=["this machine", "keys", "anyone"])
@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
def test_a_page_whose_name_leads_here_opens_no_websocket(config, origin):
    """To its browser it is of one origin with the server; but browsers tell the origin of every websocket, always."""
    key = {"Authorization": f"Bearer {KEY}"} if "keys" in config else {}
    opens = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x" * 22 + "==", "Origin": origin}
    with serving(**config) as server:
        for host in ("evil.example", f"localhost:{server.port}"):
            told = get(server, "/", Host=host, **opens, **{"Sec-WebSocket-Version": "13"}, **key)
            assert told == (403, "expected no origin: web pages cannot open websockets here")


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
    ids=["image", "image of a neighbour", "frame", "origin", "no origin to tell"],
)
@pytest.mark.parametrize("config", [{}, {"keys": (KEY,)}, ANYONE], ids=["this machine", "keys", "anyone"])
def test_pages_of_other_sites_get_no_pictures(headers, config):
    key = {"Authorization": f"Bearer {KEY}"} if "keys" in config else {}
    with serving(**config) as server:
        for path in ("/frames/1/base", "/status.json"):
            assert get(server, path, **headers, **key)[0] == 403


def test_own_page_and_links_to_it_are_answered():
    with serving() as server:
        own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
        assert get(server, "/status.json", **own)[0] == 200
        assert get(server, "/status.json", Origin=f"http://localhost:{server.port}")[0] == 200
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert get(server, "/", **link)[0] == 200


def test_wrong_keys_are_logged_by_address_and_slowed(caplog, monkeypatch):
    monkeypatch.setattr(access, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(access, "LONGEST_DELAY_S", 0.4)
    caplog.set_level(logging.WARNING)
    with serving(keys=(KEY,)) as server:
        took = []
        for _ in range(5):
            start = time.monotonic()
            assert get(server, "/status.json", Authorization="Bearer wrong-horse")[0] == 401
            took.append(time.monotonic() - start)
        assert min(took[3:]) > 0.35
        # Whoever brings none at all is asked for one, at once and without ado, and the right one is let in.
        assert get(server, "/status.json")[0] == 401
        with Client(server.url, KEY) as client:
            assert client.connected
    (told,) = [record.getMessage() for record in caplog.records if "wrong API key" in record.getMessage()]
    assert told == "127.0.0.1: wrong API key, 1 so far" or told == "::1: wrong API key, 1 so far"
    assert "wrong-horse" not in caplog.text


def test_wrong_keys_of_many_addresses_are_forgotten(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tries = WrongKeys()
    assert [tries.tried("10.0.0.1") for _ in range(3)] == [0.1, 0.2, 0.4]
    assert max(tries.tried("10.0.0.1") for _ in range(50)) == access.LONGEST_DELAY_S
    now[0] += access.FORGIVEN_S + 1
    assert tries.tried("10.0.0.1") == 0.1
    for number in range(2 * access.ADDRESSES):
        tries.tried(f"10.1.{number // 256}.{number % 256}")
    assert len(tries._tries) == access.ADDRESSES


def test_which_key_it_is():
    assert [find_key(f"Bearer {key}", (KEY, OTHER_KEY)) for key in (KEY, OTHER_KEY, "wrong-horse")] == [0, 1, None]


def test_one_key_leaves_places_to_the_others():
    with serving(keys=(KEY, OTHER_KEY), max_clients=5) as server:
        clients = [Client(server.url, KEY) for _ in range(3)]
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(server.url, additional_headers={"Authorization": f"Api-Key {KEY}"}),
        ):
            pass
        assert refused.value.response.status_code == 503
        assert refused.value.response.body == b"too many clients with this key: expected at most 3"
        with Client(server.url, OTHER_KEY), Client(server.url, OTHER_KEY):
            pass
        clients.pop().close()
        with Client(server.url, KEY, timeout_s=5):
            pass
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("keys", "given", "places"),
    [((), None, 32), ((KEY,), None, 32), ((KEY, OTHER_KEY), None, 30), ((KEY, OTHER_KEY), 4, 4), ((KEY,), 40, 32)],
)
def test_places_per_key(keys, given, places):
    assert ServerConfig(keys=keys, max_clients_per_key=given).places_per_key == places
    assert ServerConfig(keys=tuple(f"some-key-{n}" for n in range(40))).places_per_key == 1
