"""Runs in processes of their own, on the fake: what dies, hangs or is killed, and what goes on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.fake import WIDTH, PointBenchmark, a_run, as_line
from tests.evaluation.support import Told, a_job, evaluate
from tests.support import ROOT
from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.desk import Call, Desk
from xr0_engine.evaluation.policies import FromEngine
from xr0_engine.evaluation.results import Writer, read_results
from xr0_engine.evaluation.runner import check, plan, run
from xr0_engine.evaluation.worker import Simulation
from xr0_engine.serve.protocol import Refused
from xr0_engine.types import ActionChunk

# Starting Python, on a busy machine.
PATIENCE_S = 120.0


class Engine:
    """Goes to the goal as the expert does, from the state alone; a little noise by the seed. Keeps its batches."""

    def __init__(self, benchmark):
        self.benchmark, self.batches = benchmark, []

    def infer(self, observation, prefix=None, seed=None, guide=None):
        if not isinstance(observation, list):
            self.batches.append(1)
            return self._chunk(observation, prefix, seed)
        self.batches.append(len(observation))
        return [self._chunk(*each) for each in zip(observation, prefix, seed, strict=True)]

    def _chunk(self, observation, prefix, seed):
        if "far" in observation.instruction and self.benchmark.robot == "shy":
            raise ValueError("instruction: too far")
        noise = np.random.default_rng(seed).normal(0, 0.002, (self.benchmark.chunk_length, 2))
        actions = np.zeros((self.benchmark.chunk_length, WIDTH), np.float32)
        point, goal = observation.state[:2], observation.state[2:4]
        for index in range(len(actions)):
            actions[index, :2] = np.clip(goal - point, -0.1, 0.1) + noise[index]
            point = point + actions[index, :2]
        actions[:, 6] = 1
        length = 0 if prefix is None else len(prefix)
        actions[:length] = 0 if prefix is None else prefix
        return ActionChunk(actions, actions, actions.any(0), "point", length)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What all runs below come to, whatever happens on the way: key -> line."""
    found, _ = evaluate(PointBenchmark(), tmp_path_factory.mktemp("undisturbed"))
    return {episode.key: as_line(episode) for episode in found.episodes}


def lines(found):
    return {episode.key: as_line(episode) for episode in found.episodes}


def test_plan():
    benchmark = PointBenchmark()
    tasks = benchmark.suites()["far"]
    trials = plan(benchmark, tasks, None, 3, ("sync", "async"), (0.0, 2.0))
    assert len(trials) == len({trial.key for trial in trials}) == 2 * 5 * 2 * 2
    assert {trial.seed for trial in trials} == {3}
    assert [trial.task.index for trial in trials] == sorted(trial.task.index for trial in trials)


def test_a_run(undisturbed):
    assert len(undisturbed) == 8
    assert all(line["success"] and line["facts"] for line in undisturbed.values())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param("kill", "process was ended by signal 9", id="killed"),
        pytest.param("hang", "gave no sign of life for", id="hanging"),
    ],
)
def test_a_simulator_that_dies_is_replaced(undisturbed, tmp_path, fault, reason):
    benchmark = PointBenchmark(fault=fault, once=str(tmp_path / "once"))
    found, told = evaluate(benchmark, tmp_path / "run", jobs=2 if fault == "kill" else 1, hang_s=8.0)
    assert lines(found) == undisturbed
    # The fault is of task 0 of either suite, and happens once in all.
    assert [reason in each for each in told.reasons] == [True]
    assert sorted(episode.repeats for episode in found.episodes) == [0] * 7 + [1]
    assert sorted(told.episodes, key=lambda episode: episode.key) == sorted(found.episodes, key=lambda each: each.key)


def test_one_that_always_dies_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("xr0_engine.evaluation.runner.MOST_REPEATS", 1)
    benchmark = PointBenchmark(fault="kill", tasks=1, names=("near",))
    found, told = evaluate(benchmark, tmp_path)
    by_trial = {episode.trial: episode for episode in found.episodes}
    assert by_trial[0].success
    assert (by_trial[1].success, by_trial[1].repeats) == (False, 1)
    assert by_trial[1].error == "given up after 1 repeats: its simulator's process was ended by signal 9"
    assert len(told.reasons) == 1


class Nobody:
    """A connection to a parent that says nothing."""

    def send(self, told): ...


def test_a_trial_that_raises_is_a_failure(undisturbed, tmp_path):
    benchmark = PointBenchmark(fault="raise")
    trials = [Trial(task, number, 0) for task in benchmark.suites()["near"] for number in (0, 1)]
    with Simulation(Nobody(), a_job(benchmark, tmp_path)) as simulation:
        episodes = [simulation.attempt(trial).episode for trial in trials]
    failed = [(episode.task, episode.trial) for episode in episodes if episode.error]
    assert failed == [(0, 1)]
    # Those after it are what they would have been.
    for episode in episodes:
        assert episode.error or as_line(episode) == undisturbed[episode.key]


def test_an_error_of_a_benchmark_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with exit code 1\. The last that it wrote.*TypeError"):
        evaluate(PointBenchmark(fault="open"), tmp_path)
    assert read_results(tmp_path).episodes == ()


def test_a_policy_that_does_not_fit_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match="execute: the policy's chunks have 8 actions"):
        evaluate(PointBenchmark(execute=9), tmp_path)
    # An expert tells in its world; others are asked before anything is started.
    benchmark = PointBenchmark()
    source = FromEngine({}, None, benchmark.info)
    trials = plan(benchmark, benchmark.suites()["near"], 1, 0, ("async",), (0.0, 9.0))
    with pytest.raises(ValueError, match="--mode async, --delay-steps 9: expected_delay_s"):
        check(a_job(benchmark, tmp_path, source), trials)


def test_an_engine_of_the_parent(tmp_path):
    batch = 4
    benchmark = PointBenchmark()
    source = FromEngine({}, None, benchmark.info)
    engine = Engine(benchmark)
    with Desk(lambda: engine, batch) as desk:
        found, _ = evaluate(benchmark, tmp_path, jobs=2, modes=("sync", "async"), source=source, desk=desk)
    assert len(found.episodes) == 16
    assert all(episode.success for episode in found.episodes)
    assert sum(engine.batches) == sum(episode.calls for episode in found.episodes)
    assert max(engine.batches) <= batch


def test_a_policy_that_refuses(tmp_path):
    benchmark = PointBenchmark(robot="shy", tasks=1)
    source = FromEngine({}, None, benchmark.info)
    with Desk(lambda: Engine(benchmark)) as desk:
        found, _ = evaluate(benchmark, tmp_path, trials=1, source=source, desk=desk)
        failed = {episode.suite: episode.error for episode in found.episodes}
        assert failed["near"] is None
        assert failed["far"].startswith("policy, rollout 1, step 0: Refused: instruction: too far")
        # The very first of a run: nothing fits, and nothing is a failure.
        far = [Trial(benchmark.suites()["far"][0], 0, 0)]
        with (
            Writer(tmp_path / "far", a_run()) as writer,
            pytest.raises(ValueError, match=r"the policy does not take what point shows it: .*too far"),
        ):
            run(a_job(benchmark, tmp_path / "far", source), far, writer, Told(), desk=desk)
    assert read_results(tmp_path / "far").episodes == ()


def test_what_waits_is_inferred_together():
    benchmark = PointBenchmark()
    world = benchmark.open()
    observations, replies = [], {}
    for number in range(6):
        world.reset(Trial(benchmark.suites()["near"][0], number, 0))
        observations.append(world.observe())
    loud = replace(observations[3], instruction="far")

    everything_is_asked = threading.Event()

    class Slow(Engine):
        def infer(self, *arguments, **named):
            everything_is_asked.wait(PATIENCE_S)
            return super().infer(*arguments, **named)

    engine = Slow(replace(benchmark, robot="shy"))
    with Desk(lambda: engine, batch=4) as desk:
        for number, observation in enumerate([*observations[:3], loud, *observations[4:]]):
            desk.ask(Call(observation, None, number, lambda reply, number=number: replies.__setitem__(number, reply)))
        everything_is_asked.set()
        end = time.monotonic() + PATIENCE_S
        while len(replies) < 6 and time.monotonic() < end:
            time.sleep(0.001)
    assert isinstance(replies[3], Refused)
    # The first went alone, or with what had come by then; one that is refused is tried again without the others.
    assert max(engine.batches) == 4
    for number in (0, 1, 2, 4, 5):
        np.testing.assert_array_equal(
            replies[number].actions, Engine(benchmark)._chunk(observations[number], None, number).actions
        )


def test_an_engine_that_cannot_be_loaded():
    def load():
        raise ValueError("checkpoint: expected a folder")

    with pytest.raises(ValueError, match="expected a folder"):
        Desk(load)
    with pytest.raises(ValueError, match="batch"):
        Desk(load, batch=0)


@pytest.mark.parametrize(
    ("video", "kept"), [("none", [False, False]), ("failures", [False, True]), ("all", [True, True])]
)
def test_videos(tmp_path, video, kept):
    av = pytest.importorskip("av")
    benchmark = PointBenchmark(fault="raise")
    trials = [Trial(benchmark.suites()["near"][0], number, 0) for number in (0, 1)]
    with Simulation(Nobody(), a_job(benchmark, tmp_path, video=video)) as simulation:
        episodes = [simulation.attempt(trial).episode for trial in trials]
    assert [episode.success for episode in episodes] == [True, False]
    assert [episode.video is not None for episode in episodes] == kept
    shown = [episode for episode in episodes if episode.video]
    assert sorted(map(str, tmp_path.rglob("*.mp4"))) == sorted(str(tmp_path / episode.video) for episode in shown)
    for episode in shown:
        with av.open(str(tmp_path / episode.video)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert frames[0].shape == (16, 16, 3)
        assert len(frames) == -(-episode.steps // 4) + episode.success


def test_what_a_run_that_was_killed_left_of_videos_is_removed(tmp_path):
    left = tmp_path / "videos" / ".near-0-0-sync-0.partial.mp4"
    left.parent.mkdir()
    left.touch()
    evaluate(PointBenchmark(names=()), tmp_path)
    assert not left.exists()


def test_a_disk_that_takes_no_video_ends_the_run_not_the_episode(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "videos").touch()
    benchmark = PointBenchmark()
    with Simulation(Nobody(), a_job(benchmark, tmp_path, video="all")) as simulation:
        told = simulation.attempt(Trial(benchmark.suites()["near"][0], 0, 0))
    assert told.kind == "OSError"
    assert "videos/near-0-0-sync-0.mp4" in told.reason


def test_videos_need_their_package(tmp_path, monkeypatch):
    monkeypatch.setattr("xr0_engine.evaluation.film.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install 'xr0-engine"):
        check(a_job(PointBenchmark(), tmp_path, video="all"), [])


SCRIPT = """
if __name__ == "__main__":
    from pathlib import Path

    from tests.evaluation.fake import PointBenchmark
    from tests.evaluation.support import evaluate

    evaluate(PointBenchmark(pace_s=0.3), Path({folder!r}))
"""


def start(tmp_path):
    """A run in a process of its own, as a user has it: its folder, once it has some episodes."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT.format(folder=str(folder)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(process.stderr.read().decode())
        if (folder / "run.json").exists() and len(read_results(folder).episodes) >= 2:
            return process, folder
        time.sleep(0.02)
    raise AssertionError("no episodes")


def children(process):
    path = f"/proc/{process.pid}/task/{process.pid}/children"
    return [int(word) for word in Path(path).read_text().split()]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_killed_is_continued(undisturbed, tmp_path, number):
    process, folder = start(tmp_path)
    ours = children(process)
    process.send_signal(number)
    process.wait(PATIENCE_S)
    process.stderr.close()
    # Nobody is left behind.
    end = time.monotonic() + PATIENCE_S
    while any(map(is_alive, ours)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(is_alive, ours))
    kept = read_results(folder).episodes
    assert 2 <= len(kept) < 8
    found, told = evaluate(PointBenchmark(), folder)
    assert found.episodes[: len(kept)] == kept
    assert len(told.episodes) == 8 - len(kept)
    assert lines(found) == undisturbed
