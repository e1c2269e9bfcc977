"""Guides: in requests, and over real sockets to engines that take them and to others."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tests.serve.support import EchoEngine, observation
from tests.serve.test_protocol import METADATA
from tests.serve.test_server import GO, get, serving
from xr0_engine import AsyncClient, Client
from xr0_engine.serve.protocol import Refused, Request
from xr0_engine.serve.requests import encode_request, read_fields, read_request
from xr0_engine.types import Guide


class GuidedEngine(EchoEngine):
    """Its chunks are the guide's mean."""

    takes_guides = True

    def infer(self, observation, prefix=None, *, seed=None, guide=None):
        chunk = super().infer(observation, prefix, seed=seed)
        return (
            chunk if guide is None else replace(chunk, actions=chunk.actions * 0 + guide.actions.mean() + guide.frozen)
        )


def test_a_guide_goes_to_the_engine():
    guide = Guide(np.full((5, 32), 0.25, np.float32), 3)

    async def ask(url: str):
        async with AsyncClient(url) as client:
            return await client.infer(GO, guide=guide)

    with serving(GuidedEngine()) as server, Client(server.url) as client:
        assert client.infer(GO, guide=guide).actions.mean() == 3.25
        assert asyncio.run(ask(server.url)).actions.mean() == 3.25


def test_an_engine_without_guides_refuses_them_and_stays_healthy():
    guide = Guide(np.zeros((5, 32), np.float32), 3)
    with serving() as server, Client(server.url) as client:
        for _ in range(4):
            with pytest.raises(Refused, match="guide: this policy takes none"):
                client.infer(GO, guide=guide)
        assert get(server, "/healthz")[0] == 200


@pytest.mark.parametrize("length", [0, 5])
def test_a_guide_survives(length):
    actions = np.random.default_rng(0).standard_normal((length, 32)).astype(np.float32)
    request = Request(observation(), seed=7, id=12, guide=Guide(actions, min(length, 2)))
    read = read_request(read_fields(encode_request(request)), METADATA)
    assert read.guide.frozen == min(length, 2)
    np.testing.assert_array_equal(read.guide.actions, actions)


def test_without_a_guide_a_request_is_what_it_was():
    """Servers that know none refuse the field."""
    assert b"guide" not in encode_request(Request(observation()))


def test_what_is_no_guide_is_not_sent():
    with pytest.raises(Refused, match="guide: expected a Guide, got ndarray"):
        encode_request(Request(observation(), guide=np.zeros((3, 32))))
    with pytest.raises(Refused, match="guide, actions: expected finite"):
        encode_request(Request(observation(), guide=Guide(np.full((3, 32), np.nan), 1)))
