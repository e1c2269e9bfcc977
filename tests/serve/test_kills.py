"""A moment of kills.py, and of soak.py's bad network: nothing is lost, and what would be is noticed."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import numpy as np
import pytest

from tests.serve.kills import Drive, kill_again_and_again
from tests.serve.marked import INDEX, LENGTH, NUMBER, MarkedEngine, MarkedRobot, mark, seen
from tests.serve.proxy import Proxy, Trouble
from tests.serve.soak import Use, growth
from tests.serve.support import WIDTH, backend, wait_until
from xr0_engine.serve.client import Client
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

FLIPS = 15


def test_a_killed_server_costs_no_more_than_what_is_told():
    told = kill_again_and_again(1, random.Random(0))
    assert told["faults"] == []
    assert len(told["kills"]) == 1
    assert told["kills"][0]["lost"] > 0
    assert told["counts"]["chunks"] > told["kills"][0]["answered"]


def commands_through(trouble: Trouble) -> MarkedRobot:
    """A robot that was told what came through so many flips, and more than a chunk: after them all of it comes."""
    robot = MarkedRobot()
    with (
        BackgroundServer(backend(MarkedEngine()), ServerConfig(port=0)) as server,
        Proxy(server.port, trouble) as proxy,
        Client(f"ws://127.0.0.1:{proxy.port}", timeout_s=0.5) as client,
    ):
        trouble.share = 0.3
        while trouble.counts["flip"] < FLIPS or robot.commands <= LENGTH:
            if trouble.counts["flip"] >= FLIPS:
                trouble.share = 0.0
            with suppress(ConnectionError, RuntimeError, ValueError):
                for row in client.infer(robot.observe(0.0).observation).actions:
                    robot.command(row)
            if not client.connected:
                time.sleep(0.01)
    return robot


@pytest.fixture
def flips(monkeypatch):
    """A network that does nothing else."""
    monkeypatch.setattr(Trouble, "KINDS", ("flip",))
    return Trouble(0.0, 3)


def test_bits_that_flip_on_the_way_move_no_robot(flips):
    assert commands_through(flips).wrong == 0


def test_without_the_digest_they_would(flips, monkeypatch):
    monkeypatch.setattr(Client, "_check", lambda *_: None)
    assert commands_through(flips).wrong > 0


def test_what_does_not_add_up_is_told():
    with BackgroundServer(backend(MarkedEngine()), ServerConfig(port=0)) as server, Drive(server.url) as drive:
        wait_until(lambda: drive.report.counts["chunks"] > 1)
    assert drive.faults() == []
    drive.report.counts["late"] += 1
    drive.report.counts["executed"] += 100
    assert [fault.split()[0] for fault in drive.faults()[:1]] == ["actions"]
    assert len(drive.faults()) == 3


def test_marked_robot_knows_its_own_actions():
    robot = MarkedRobot()
    observation = robot.observe(0.0).observation
    row = mark(1, 4, seen(observation)).astype(float)
    for number, column, change, wrong in ((1, NUMBER, 0, 0), (2, INDEX, 1, 1), (3, WIDTH - 1, 1, 2), (4, NUMBER, 1, 3)):
        changed = row.copy()
        changed[column] += change
        robot.command(changed)
        # To be held where it is, once told, is no further fault.
        robot.command(changed)
        assert (robot.commands, robot.wrong) == (2 * number, wrong)


def test_what_grows_is_noticed_and_what_comes_and_goes_is_not():
    rng = np.random.default_rng(0)
    steady = [Use(100 + 20 * rng.random(), 10 + int(rng.integers(5)), 8) for _ in range(100)]
    leaks = [Use(it.memory_mib + 0.5 * place, it.descriptors, 8) for place, it in enumerate(steady)]
    assert abs(growth(steady)["memory_mib"]) < 5
    assert growth(steady)["descriptors"] == growth(steady)["threads"] == 0
    assert growth(leaks)["memory_mib"] > 15
