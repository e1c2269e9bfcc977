"""Who may connect: addresses, API keys, TLS."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import ssl
from pathlib import Path

MIN_KEY_LENGTH = 8


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
    """Whether an Authorization header carries one of the keys: as Api-Key, as Bearer, or as the password of Basic.

    Without keys everyone is allowed. Takes the same time whichever key it is.
    """
    if not keys:
        return True
    scheme, _, credentials = (authorization or "").partition(" ")
    given = credentials.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() not in ("api-key", "bearer"):
        return False
    offered = given.encode("utf-8", "surrogateescape")
    matches = [hmac.compare_digest(offered, key.encode()) for key in keys]
    return any(matches)


def is_local_name(header: str | None) -> bool:
    """Whether a Host header names this machine itself.

    A web page can have its own name resolve to 127.0.0.1 and then counts as of the same origin; the name betrays it.
    """
    name = (header or "").strip()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return is_loopback(name)


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """None without files. Raises ValueError if one is missing or they do not fit."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError("TLS: expected a certificate and its key, got one of them")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"TLS: expected PEM files, got {certificate} and {key}: {error}") from None
    return context


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own and reaches no further."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
