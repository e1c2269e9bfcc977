"""Viewers of rerun that are none."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest


@pytest.fixture
def silent_viewer():
    """The address of something that accepts every connection, and never says a word or reads one."""
    listener, kept = socket.create_server(("127.0.0.1", 0)), []

    def accept():
        # Until it is closed.
        with suppress(OSError):
            while True:
                kept.append(listener.accept()[0])

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"rerun+http://127.0.0.1:{listener.getsockname()[1]}/proxy"
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for each in (listener, *kept):
        each.close()
