"""A server with a guard: what its clients see is looked at, counted, and shown; nobody waits for it."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.guard.support import unheeded, view
from tests.serve.support import LENGTHS, WIDTH, EchoEngine, backend, observation, wait_until
from tests.serve.test_server import get
from xr0_engine import Client
from xr0_engine.guard import Guard, RobotProfile, write_guard
from xr0_engine.robot.embodiment import embodiment_for
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.types import FileError

ROBOT = "libero_all"


def profile(robot_type=ROBOT, **more):
    embodiment = embodiment_for(robot_type)
    known = RobotProfile(
        robot_type=robot_type,
        control_rate_hz=float(embodiment.control_rate_hz),
        action_width=WIDTH,
        layout=embodiment.layout,
        views=tuple(view(each.key, each.rotate_180, each.center_crop) for each in embodiment.views),
        low=np.zeros(WIDTH),
        high=np.ones(WIDTH),
        scale=np.ones(WIDTH),
        speed=np.full(WIDTH, 1e6),
        instructions=("go",),
        following=None,
        thresholds={"state range": 0.1} | unheeded(embodiment.views),
    )
    return replace(known, **more)


def of_one_view(robot):
    views = (view("base"),)
    return replace(robot, views=views, thresholds=unheeded(views) | {"state range": 0.1})


@pytest.fixture
def guard(tmp_path):
    path = tmp_path / "guard.json"
    write_guard(path, profile())
    return path


def status(server):
    return json.loads(get(server, "/status.json")[1])["guard"]


def test_warnings_of_each_client_are_counted_and_shown(guard):
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, guard=guard)) as server:
        assert status(server) == {"robots": [ROBOT], "counts": {}, "recent": []}
        with Client(server.url) as one, Client(server.url) as two:
            for client in (one, two):
                client.infer(observation(0.5, instruction="Go."))
            for _ in range(3):
                one.infer(observation(5.0, instruction="Go."))
            two.infer(observation(0.5, instruction="Sing."))
            wait_until(lambda: sum(status(server)["counts"].values()) == 2)
        told = status(server)
        assert told["counts"] == {"state range": 1, "instruction": 1}
        assert {one["client"] for one in told["recent"]} == {1, 2}
        newest = next(one for one in told["recent"] if one["name"] == "state range")
        assert (newest["value"], newest["threshold"]) == (4.0, 0.1)
        assert newest["detail"] == "column 0 is 5, in training 0 to 1"
        metrics = get(server, "/metrics")[1]
        assert 'xr0_guard_warnings_total{check="state range"} 1.0' in metrics


def test_a_robot_without_thresholds_is_served_unguarded(guard):
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, guard=guard)) as server:
        with Client(server.url) as client:
            assert len(client.infer(observation(9.0, "bimanual")).actions) == LENGTHS["bimanual"]
            client.infer(observation(9.0, instruction="Go."))
            wait_until(lambda: status(server)["counts"])
        assert status(server)["counts"] == {"state range": 1}


def test_without_a_guard_there_is_none():
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        assert status(server) is None


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        pytest.param(replace(profile(), robot_type="crane"), "got crane, thresholds of another robot", id="type"),
        pytest.param(profile(control_rate_hz=5.0), "control_rate_hz: the file has 5", id="rate"),
        pytest.param(of_one_view(profile()), "views: the file has base", id="views"),
    ],
)
def test_thresholds_of_another_robot_keep_the_server_from_starting(tmp_path, other, complaint):
    path = tmp_path / "guard.json"
    write_guard(path, other)
    with (
        pytest.raises(FileError, match=complaint),
        BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, guard=path)),
    ):
        pass


def test_a_broken_file_is_refused_before_anything_is_loaded(tmp_path):
    path = tmp_path / "guard.json"
    path.write_text("{}")
    with pytest.raises(FileError, match="version"):
        BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, guard=path))


def test_a_guard_that_fails_says_so_once_and_others_go_on(guard, monkeypatch):
    honest = Guard.see

    def see(self, observation, time_s):
        if observation.instruction == "Break.":
            raise ArithmeticError("no sum")
        return honest(self, observation, time_s)

    monkeypatch.setattr(Guard, "see", see)
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, guard=guard)) as server:
        with Client(server.url) as one, Client(server.url) as two:
            for _ in range(2):
                one.infer(observation(0.5, instruction="Break."))
                wait_until(lambda: status(server)["counts"].get("failed") == 1)
            for _ in range(2):
                two.infer(observation(5.0, instruction="Go."))
                wait_until(lambda: status(server)["counts"].get("state range") == 1)
        (failed,) = [told for told in status(server)["recent"] if told["name"] == "failed"]
        assert "the guard looks no more: ArithmeticError: no sum" in failed["detail"]


def test_answers_that_were_left_out_are_forgotten_with_their_chunks(guard, monkeypatch):
    gate, seen, forgets = threading.Semaphore(0), [], []
    honest = Guard.see

    def see(self, observation, time_s):
        seen.append(time_s)
        gate.acquire()
        return honest(self, observation, time_s)

    monkeypatch.setattr(Guard, "see", see)
    monkeypatch.setattr(Guard, "forget", lambda self: forgets.append(len(seen)))
    with (
        BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, guard=guard)) as server,
        Client(server.url) as client,
    ):
        client.infer(observation(0.5, instruction="Go."))
        wait_until(lambda: len(seen) == 1)
        for _ in range(3):
            client.infer(observation(0.5, instruction="Go."))
        gate.release()
        wait_until(lambda: len(seen) == 2)
        gate.release()
        client.infer(observation(0.5, instruction="Go."))
        gate.release()
        wait_until(lambda: len(seen) == 3)
    # Before the second look alone: of three answers it is of the newest.
    assert forgets == [1]
