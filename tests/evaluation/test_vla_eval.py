"""Episodes that vla-eval's own code runs, through its model server and a server of ours; without a simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vla_eval", reason="needs vla-eval: pip install vla-eval==0.8.0")

import vla_eval.api
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
from vla_eval.specs import check_specs

from tests.serve.support import EchoEngine, backend
from xr0_engine.evaluation.benchmark import Task, Trial
from xr0_engine.evaluation.episode import noise_seed
from xr0_engine.evaluation.vla_eval import XR0ModelServer
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

STEPS = 23


class Fake(StepBenchmark):
    """What LIBEROBenchmark sends and takes, without a simulator. runs: what each instance was given and asked for."""

    runs: list[SimpleNamespace] = []  # noqa: RUF012 (shared with the test by intention)

    def __init__(
        self,
        suite: str = "libero_spatial",
        seed: int = 7,
        send_wrist_image: bool = False,
        send_state: bool = False,
        quat_no_antipodal: bool = False,
    ) -> None:
        super().__init__()
        self.suite, self.wrist, self.state = suite, send_wrist_image, send_state
        self.run = SimpleNamespace(actions=[], asked=(send_wrist_image, send_state, quat_no_antipodal))
        self.runs.append(self.run)

    def get_tasks(self):
        return [{"name": "open the drawer", "suite": self.suite, "task_id": 0, "task_obj": object()}]

    def reset(self, task):
        return len(self.run.actions)

    def step(self, action):
        self.run.actions.append(np.asarray(action["actions"]))
        return StepResult(obs=len(self.run.actions), reward=0.0, done=False, info={})

    def make_obs(self, raw_obs, task):
        images = {name: np.full((256, 256, 3), raw_obs, np.uint8) for name in ("agentview", "wrist")[: 1 + self.wrist]}
        state = {"states": np.full(8, raw_obs / 10)} if self.state else {}
        return {"images": images, "task_description": task["name"], **state}

    def check_done(self, step_result):
        return step_result.done

    def get_step_result(self, step_result):
        return {"success": step_result.done}

    def get_metadata(self):
        return {"max_steps": STEPS, "max_episodes_per_task": 50}

    get_action_spec = LIBEROBenchmark.get_action_spec
    get_observation_spec = LIBEROBenchmark.get_observation_spec

    @property
    def send_wrist_image(self) -> bool:
        return self.wrist

    @property
    def send_state(self) -> bool:
        return self.state


@pytest.fixture
def engine():
    return EchoEngine()


@pytest.fixture
def url(engine):
    with BackgroundServer(backend(engine), ServerConfig(port=0)) as server:
        yield server.url


def evaluate(server: XR0ModelServer, **changes):
    """Two episodes of the fake's task, run by vla-eval in this process."""
    Fake.runs.clear()
    entry = {"benchmark": f"{__name__}:Fake", "episodes_per_task": 2, "params": {"seed": 7, **changes}}
    # The test is imported under a name that only pytest knows.
    import sys

    sys.modules.setdefault(__name__, sys.modules[Fake.__module__])
    (result,) = vla_eval.api.evaluate(server, {"benchmarks": [entry]}, docker=False, no_save=True)
    return result


def test_an_episode_looks_every_ten_steps_and_acts_as_the_policy_says(engine, url):
    server = XR0ModelServer(url, seed=3)
    result = evaluate(server)
    server.client.close()
    (run,) = Fake.runs
    assert result["num_errors"] == 0
    assert [episode["steps"] for episode in result["tasks"][0]["episodes"]] == [STEPS, STEPS]
    assert run.asked == (True, True, True)
    looks = [step for start in (0, STEPS) for step in range(start, start + STEPS, 10)]
    assert [int(seen.images["base"][0, 0, 0]) for seen in engine.seen] == looks
    assert all(seen.prepared and seen.instruction == "Open the drawer." for seen in engine.seen)
    assert all(seen.robot_type == "libero_all" for seen in engine.seen)
    # The engine answers with the state's first number.
    expected = [max(look for look in looks if look <= step) / 10 for step in range(2 * STEPS)]
    np.testing.assert_allclose(np.stack(run.actions), np.repeat(np.float32(expected)[:, None], 7, axis=1))


def test_the_noise_is_the_trials_own(url, monkeypatch):
    server = XR0ModelServer(url, seed=3, execute=5)
    seeds = []
    infer = server.client.infer
    monkeypatch.setattr(server.client, "infer", lambda seen, seed: (seeds.append(seed), infer(seen, seed=seed))[1])
    evaluate(server, suite="libero_10")
    server.client.close()
    task = Task("10", 0, "open the drawer", "open the drawer")
    assert seeds == [noise_seed(Trial(task, number, 3), call) for number in (0, 1) for call in range(5)]


def test_what_is_not_known_fails_the_episode_and_says_why(engine, url):
    server = XR0ModelServer(url)
    result = evaluate(server, suite="libero_spatial_swap")
    episodes = result["tasks"][0]["episodes"]
    assert {episode["failure_reason"] for episode in episodes} == {"model_act"}
    assert not engine.seen
    result = evaluate(server, send_wrist_image=False)
    server.client.close()
    (detail, _) = (episode["failure_detail"] for episode in result["tasks"][0]["episodes"])
    assert "images: expected agentview, wrist, got ['agentview']" in detail
    assert not engine.seen


def test_a_policy_that_fails_is_no_success(engine, url):
    server = XR0ModelServer(url)
    engine.broken.append(RuntimeError("out of memory"))
    result = evaluate(server)
    server.client.close()
    first, second = result["tasks"][0]["episodes"]
    assert (first["metrics"]["success"], first["failure_reason"]) == (False, "model_act")
    assert second["steps"] == STEPS


def test_what_it_says_of_itself_is_what_vla_evals_libero_takes(url):
    server = XR0ModelServer(url)
    server.client.close()
    libero = LIBEROBenchmark(**server.get_observation_params())
    assert check_specs(
        server.get_action_spec(),
        libero.get_action_spec(),
        server.get_observation_spec(),
        libero.get_observation_spec(),
    ) == []  # fmt: skip


def test_other_policies_and_benchmarks_are_refused_before_anything_is_served(url):
    with pytest.raises(ValueError, match="needs a policy of embodiment libero"):
        XR0ModelServer(url, robot_type="bimanual")
    with pytest.raises(ValueError, match="benchmark: expected one of libero"):
        XR0ModelServer(url, benchmark="calvin")
    with pytest.raises(ConnectionError):
        XR0ModelServer("ws://127.0.0.1:9", timeout_s=0.2)
