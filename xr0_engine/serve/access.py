"""Who may connect: addresses, API keys, names of this machine, TLS."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import logging
import socket
import ssl
import time
from collections import OrderedDict
from pathlib import Path

log = logging.getLogger("xr0_engine.serve")

MIN_KEY_LENGTH = 8

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0
"""Before a wrong key is told to be wrong: doubling with each of an address, which has so many tries at once as it has
places at the gate."""
FORGIVEN_S = 60.0
"""After so long without a wrong key an address starts anew."""
LOG_EVERY_S = 10.0
"""Of one address."""
ADDRESSES = 1024
"""That are remembered, those of the latest wrong keys."""


def check_bind(host: str, keys: tuple[str, ...], allow_anyone: bool) -> None:
    """Raises ValueError if other machines could reach the server without a key and nobody said that they may."""
    if not keys and not allow_anyone and not is_loopback(host):
        raise ValueError(
            f"host: {host} can be reached from other machines, so it takes API keys (--api-keys or XR0_API_KEYS); "
            "--allow-anyone serves without"
        )


def read_keys(file: Path | None, from_environment: str) -> tuple[str, ...]:
    """Keys of a file, one a line, and of a text with commas between them.

    Raises ValueError for a key shorter than 8 characters or with characters that a header cannot carry.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None else []
    candidates = (text.strip() for text in (*lines, *from_environment.split(",")))
    keys = tuple(key for key in candidates if key and not key.startswith("#"))
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
            # The key itself stays out of logs.
            raise ValueError(f"API key {number}: expected at least {MIN_KEY_LENGTH} printable ASCII characters")
    if file is not None and not keys:
        raise ValueError(f"{file}: expected an API key on each line, got none")
    return keys


def is_allowed(authorization: str | None, keys: tuple[str, ...]) -> bool:
    """Whether an Authorization header carries one of the keys; without keys everyone is allowed."""
    return not keys or find_key(authorization, keys) is not None


def find_key(authorization: str | None, keys: tuple[str, ...]) -> int | None:
    """Which of the keys an Authorization header carries: as Api-Key, as Bearer, or as the password of Basic.

    None for none of them. Takes the same time whichever key it is.
    """
    scheme, _, credentials = (authorization or "").partition(" ")
    given = credentials.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return None
    elif scheme.lower() not in ("api-key", "bearer"):
        return None
    offered = given.encode("utf-8", "surrogateescape")
    matches = [hmac.compare_digest(offered, key.encode()) for key in keys]
    return matches.index(True) if any(matches) else None


class WrongKeys:
    """Remembers, per address, who tried keys that are none."""

    def __init__(self) -> None:
        self._tries: OrderedDict[str, tuple[int, float, float]] = OrderedDict()

    def tried(self, address: str) -> float:
        """One more of that address. Seconds to wait before saying so; the log has it."""
        now = time.monotonic()
        count, last, logged = self._tries.pop(address, (0, now, -LOG_EVERY_S))
        count = 1 if now - last > FORGIVEN_S else count + 1
        if now - logged >= LOG_EVERY_S:
            log.warning("%s: wrong API key, %d so far", address, count)
            logged = now
        self._tries[address] = (count, now, logged)
        if len(self._tries) > ADDRESSES:
            self._tries.popitem(last=False)
        return float(min(FIRST_DELAY_S * 2 ** min(count - 1, 10), LONGEST_DELAY_S))


def is_local_name(header: str | None) -> bool:
    """Whether a Host header names this machine itself.

    A web page can have its own name resolve to 127.0.0.1 and then counts as of the same origin; the name betrays it.
    """
    return is_loopback(_host(header))


def is_own_name(header: str | None, names: tuple[str, ...]) -> bool:
    """Whether a Host header is an address, or a name that is known to be this machine's: names, and what it calls
    itself. An address cannot have been made to lead here by somebody's DNS."""
    host = _host(header)
    own = socket.gethostname()
    if host in {name.lower().rstrip(".") for name in (*names, own, f"{own}.local", "localhost")}:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host(header: str | None) -> str:
    """The name in a Host header, without its port, as names are compared."""
    name = (header or "").strip()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name.lower().removesuffix(".")


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """None without files. Raises ValueError if one is missing or they do not fit."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError("TLS: expected a certificate and its key, got one of them")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A client that negotiates again and again would cost far more than it pays.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"TLS: expected PEM files, got {certificate} and {key}: {error}") from None
    return context


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own and reaches no further."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
