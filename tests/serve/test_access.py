"""Keys and addresses."""

from __future__ import annotations

import base64

import pytest

from xr0_engine.serve.access import check_bind, is_allowed, is_local_name, read_keys

KEYS = ("first-key-1", "second-key")


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("Api-Key second-key", True),
        ("api-key first-key-1", True),
        ("Bearer second-key", True),
        (basic("anyone:second-key"), True),
        (basic("second-key:"), False),
        ("Basic %%%", False),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), False),
        ("Api-Key second-ke", False),
        ("Api-Key second-key1", False),
        ("Api-Key \udcff", False),
        ("Digest second-key", False),
        ("second-key", False),
        ("Api-Key", False),
        ("", False),
        (None, False),
    ],
)
def test_header(header, allowed):
    assert is_allowed(header, KEYS) is allowed
    assert is_allowed(header, ())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    check_bind(host, (), allow_anyone=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.3", "robot.example"])
def test_other_addresses_need_one(host):
    with pytest.raises(ValueError, match="takes API keys"):
        check_bind(host, (), allow_anyone=False)
    check_bind(host, KEYS, allow_anyone=False)
    check_bind(host, (), allow_anyone=True)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("", False),
        (None, False),
    ],
)
def test_host_header(host, local):
    assert is_local_name(host) is local


def test_keys_of_file_and_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# robots\nfirst-key-1\n\n  second-key \n")
    assert read_keys(file, " third-key,fourth-key ,") == (*KEYS, "third-key", "fourth-key")
    assert read_keys(None, "") == ()


@pytest.mark.parametrize("text", ["short", "with space", "umläut-key"])
def test_key_that_cannot_be_one(text):
    with pytest.raises(ValueError, match="API key 1: expected at least 8") as refused:
        read_keys(None, text)
    assert text not in str(refused.value)


def test_file_without_keys_is_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(ValueError, match="expected an API key on each line"):
        read_keys(file, "")
