"""Who has come in and has not yet shown what for: few per address, for a short time, and the newest always gets in.

It stands where connections are accepted, before TLS and before anything is read, so that it holds for every port. A
connection that is still nobody's when others need its place is ended, the oldest of the address with the most first;
whoever says at once what it wants is never the oldest. Clients have places of their own (service.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Callable
from typing import Any

WAITING_PER_ADDRESS = 64
"""Connections that have not yet shown what they are for. A good one is through in milliseconds."""
WAITING = 256
"""Of all addresses: the memory of these, with TLS, is some 100 MiB."""
ACCEPTED_AT_ONCE = 4
"""Before those that are connected get their turn again."""
BACKLOG = 1024
"""Connections that wait to be accepted: when they do not fit, the kernel has good ones wait for a second."""

Ends = tuple[Any, Any]


class Gate:
    """longest_s: how long a connection may wait. most_bytes: what those that wait may have under way together, as far
    as they announce it. turned_away: told of each that had to go before its time."""

    def __init__(self, longest_s: float, most_bytes: int, turned_away: Callable[[], None]) -> None:
        self._longest_s = longest_s
        self._most_bytes = most_bytes
        self._turned_away = turned_away
        self._waiting: dict[Ends, _Guest] = {}
        self._listeners: list[_Listener] = []

    def listen(self, host: str, port: int) -> list[socket.socket]:
        """Sockets that listen on all of the host's addresses, on one port. Raises OSError if it cannot be had."""
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=flags)
        sockets: list[socket.socket] = []
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                try:
                    listener = _Listener(self, family)
                except OSError:
                    # This machine knows the name but not the protocol, IPv6 for one.
                    if family == socket.AF_INET6 and len(found) > 1:
                        continue
                    raise
                sockets.append(listener)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address[0], port, *address[2:]))
                # A free port that the first has taken is the others' too.
                port = listener.getsockname()[1]
        except OSError as error:
            for one in sockets:
                one.close()
            raise OSError(error.errno, f"{host}:{port}: cannot listen: {str(error.strerror).lower()}") from None
        return sockets

    def enter(self, guest: _Guest) -> None:
        """One more that waits; whoever has waited longest of too many goes."""
        self._waiting[guest.ends] = guest
        guest.expiry = asyncio.get_running_loop().call_later(self._longest_s, self._expire, guest)
        same = [one for one in self._waiting.values() if one.group == guest.group]
        if len(same) > WAITING_PER_ADDRESS:
            self._turn_away(same[0])
        elif len(self._waiting) > WAITING:
            counts: dict[str, int] = {}
            for one in self._waiting.values():
                counts[one.group] = counts.get(one.group, 0) + 1
            most = max(counts, key=lambda group: counts[group])
            self._turn_away(next(one for one in self._waiting.values() if one.group == most))

    def weigh(self, transport: asyncio.BaseTransport, count: int) -> None:
        """A connection that waits has announced so many bytes: those before it go, if it is too much for all."""
        guest = self._waiting.get(_ends(transport))
        if guest is None:
            return
        guest.weight = count
        heavy = [one for one in self._waiting.values() if one.weight and one is not guest]
        while heavy and sum(one.weight for one in heavy) + count > self._most_bytes:
            self._turn_away(heavy.pop(0))

    def has_passed(self, transport: asyncio.BaseTransport) -> None:
        """It is a client, or has its answer: its place is free."""
        if guest := self._waiting.get(_ends(transport)):
            self.leave(guest)

    def leave(self, guest: _Guest) -> None:
        if self._waiting.get(guest.ends) is guest:
            del self._waiting[guest.ends]
        if guest.expiry is not None:
            guest.expiry.cancel()

    def close(self) -> None:
        """Ends all that wait."""
        for guest in list(self._waiting.values()):
            self._expire(guest)

    def _expire(self, guest: _Guest) -> None:
        self.leave(guest)
        guest.end()

    def _turn_away(self, guest: _Guest) -> None:
        self._expire(guest)
        self._turned_away()


class _Listener(socket.socket):
    def __init__(self, gate: Gate, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._gate = gate

    def listen(self, backlog: int = BACKLOG) -> None:
        # asyncio takes one number for how many may wait and how many it accepts at once.
        super().listen(BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        guest = _Guest(connection, address)
        guest.gate = self._gate
        self._gate.enter(guest)
        return guest, address


class _Guest(socket.socket):
    """A connection that tells the gate when it is closed. ends: our address and theirs, which name it. group: whose it
    is. weight: bytes that it has announced."""

    def __init__(self, connection: socket.socket, address: Any) -> None:
        family, kind, protocol = connection.family, connection.type, connection.proto
        super().__init__(family, kind, protocol, fileno=connection.detach())
        self.ends: Ends = (self.getsockname(), address)
        self.group = group_of(address[0])
        self.weight = 0
        self.expiry: asyncio.TimerHandle | None = None
        self.gate: Gate | None = None

    def end(self) -> None:
        """Whoever reads it finds its end, and closes it. Reset: the kernel need not remember it either."""
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            # Gone already.
            return

    def close(self) -> None:
        if self.gate is not None:
            self.gate.leave(self)
        super().close()


def group_of(address: str) -> str:
    """Whose an address is: itself, or of IPv6 the network that one site has (64 bits)."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))


def _ends(transport: asyncio.BaseTransport) -> Ends:
    return transport.get_extra_info("sockname"), transport.get_extra_info("peername")
