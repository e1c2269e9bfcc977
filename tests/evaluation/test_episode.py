"""Acting trials out: on a fake world, action by action."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.fake import GRIPPER, WIDTH, PointBenchmark, PointExpert, as_line
from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.episode import PICTURE_EVERY, Execution, Interrupted, Unfit, act, noise_seed
from xr0_engine.serve.protocol import Busy
from xr0_engine.types import ActionChunk

MODES = ("sync", "naive", "async")


class Actor:
    """A policy that keeps what it was asked; chunk `n` of a trial has n + index / 100 in its second column."""

    def __init__(self, benchmark, chunk=None):
        self.benchmark, self.chunk = benchmark, chunk
        self.asked = []

    def robot_info(self, robot_type=None):
        return self.benchmark.info

    def infer(self, observation, prefix, seed):
        self.asked.append((observation, prefix, seed))
        if self.chunk is not None:
            return self.chunk(observation, prefix)
        actions = np.zeros((self.benchmark.chunk_length, WIDTH), np.float32)
        actions[:, 1] = len(self.asked) + np.arange(len(actions)) / 100
        length = 0 if prefix is None else len(prefix)
        actions[:length] = 0 if prefix is None else prefix
        return ActionChunk(actions, actions, actions.any(0), "point", length, observation.timestamp_s)


class Expert:
    """The fake's expert with a seed to ignore."""

    def __init__(self, world):
        self._expert = PointExpert(world)
        self.robot_info = self._expert.robot_info

    def infer(self, observation, prefix, seed):
        return self._expert.infer(observation, prefix)


def trial(benchmark, number=0, mode="sync", delay=0.0, suite="near"):
    return Trial(benchmark.suites()[suite][0], number, 0, mode, delay)


def execution(benchmark, **changed):
    return Execution(benchmark.rate_hz, benchmark.execute, **changed)


def run(benchmark, begin=Expert, execution_=None, **which):
    world = benchmark.open()
    episode = act(world, begin, trial(benchmark, **which), execution_ or execution(benchmark))
    return episode, world


def steps(world):
    return [row for what, row in world.log if what == "step"]


def looks(world):
    return [step for what, step in world.log if what == "observe"]


@pytest.mark.parametrize("layout", ["plain", "bimanual"])
@pytest.mark.parametrize("number", [0, 3])
def test_sync_without_delay_is_the_released_loop(layout, number):
    """Look, infer, execute, look again, until the goal or the horizon: every call and every action."""
    benchmark = PointBenchmark(layout=layout, horizon=11)
    episode, world = run(benchmark, number=number)
    plain = benchmark.open()
    plain.reset(trial(benchmark, number=number))
    expert, done, taken = benchmark.expert(plain), False, 0
    while not done and taken < benchmark.horizon:
        start = plain.pose()
        chunk = expert.infer(plain.observe())
        rows = chunk.actions.astype(float)
        for row in rows[: benchmark.execute]:
            if start is not None:
                # What the environment is told: joints where they were, plus the action.
                row = row + start.state()[0]
            plain.step(row)
            taken += 1
            done = plain.success
            if done or taken == benchmark.horizon:
                break
    assert [what for what, _ in world.log if what != "proceed"] == [what for what, _ in plain.log]
    assert looks(world) == looks(plain)
    for ours, theirs in zip(steps(world), steps(plain), strict=True):
        np.testing.assert_allclose(
            ours[:14] if layout == "bimanual" else ours, theirs[: 14 if layout == "bimanual" else 32], atol=1e-6
        )
    assert (episode.success, episode.steps, episode.calls) == (done, taken, len(looks(plain)))


def test_sync_without_delay_tells_a_plain_robot_the_actions_as_they_are():
    benchmark = PointBenchmark(horizon=10)
    actor = Actor(benchmark)
    _, world = run(benchmark, lambda world: actor)
    expected = [call + index / 100 for call in (1, 2, 3) for index in range(4)][:10]
    np.testing.assert_array_equal([row[1] for row in steps(world)], np.float32(expected))


@pytest.mark.parametrize("delay", [0, 1, 3, 2.5])
def test_in_sync_the_robot_stands_still_as_long_as_an_inference_takes(delay):
    benchmark = PointBenchmark(horizon=12)
    actor = Actor(benchmark)
    episode, world = run(benchmark, lambda world: actor, delay=delay)
    waits = int(np.ceil(delay))
    period = waits + benchmark.execute
    assert len(steps(world)) == episode.steps == 12
    assert looks(world) == list(range(0, 12, period))
    for index, row in enumerate(steps(world)):
        if index % period < waits:
            assert not row[:GRIPPER].any()
            # Before the first action the world says what is rest; then the gripper stays as it was told.
            assert row[GRIPPER] == (-1 if index < waits else 0)
        else:
            assert row[1] == np.float32(1 + index // period + (index % period - waits) / 100)
    assert episode.reaction_ms["p50"] >= 50 * waits


def test_a_robot_with_absolute_targets_stands_where_it_is():
    benchmark = PointBenchmark(layout="bimanual", horizon=6)
    world = benchmark.open()
    actor = Actor(benchmark)
    act(world, lambda world: actor, trial(benchmark, delay=3), execution(benchmark))
    for row in steps(world)[:3]:
        np.testing.assert_array_equal(row[7:13], 0)


class GuidedActor(Actor):
    """Keeps its guides."""

    def __init__(self, benchmark):
        super().__init__(benchmark)
        self.guides = []

    def infer(self, observation, prefix, seed, guide=None):
        self.guides.append(guide)
        return super().infer(observation, prefix, seed)


def test_guided_chunks_are_drawn_toward_what_is_planned():
    benchmark = PointBenchmark(horizon=20)
    actor = GuidedActor(benchmark)
    episode, _ = run(benchmark, lambda world: actor, mode="guided", delay=2.0)
    assert episode.error is None
    first, *rest = actor.guides
    assert (len(first.actions), first.frozen) == (0, 0)
    assert {guide.frozen for guide in rest[1:]} == {2}
    assert all(prefix is None for _, prefix, _ in actor.asked)
    for number, guide in enumerate(rest, start=1):
        # Second column: call and place in its chunk; what is guided to is the chunk before's.
        assert (np.floor(guide.actions[:, 1]) == number).all()


def test_a_policy_without_guides_cannot_be_guided():
    benchmark = PointBenchmark()
    with pytest.raises(Unfit, match=r"mode guided: .*infer"):
        run(benchmark, lambda world: Actor(benchmark), mode="guided", delay=2.0)


@pytest.mark.parametrize("mode", ["naive", "async"])
@pytest.mark.parametrize("delay", [0, 1, 2, 6])
def test_beside_execution_no_step_is_without_an_action(mode, delay):
    benchmark = PointBenchmark(horizon=40, chunk_length=12)
    actor = Actor(benchmark)
    episode, world = run(benchmark, lambda world: actor, mode=mode, delay=delay)
    lead = max(delay, 1)
    rows = steps(world)
    assert len(rows) == 40
    assert not np.any([row[:GRIPPER] for row in rows[:lead]])
    assert all(row[1] > 0 for row in rows[lead:])
    # Every `execute` actions, or as often as the delay makes it.
    assert set(np.diff(looks(world))[1:]) == {max(benchmark.execute, delay)}
    prefixes = [0 if prefix is None else len(prefix) for _, prefix, _ in actor.asked]
    assert prefixes[1:] == [lead if mode == "async" else 0] * (len(prefixes) - 1)
    assert episode.error is None


def test_a_prefix_is_what_is_executed_meanwhile():
    benchmark = PointBenchmark(horizon=30)
    actor = Actor(benchmark)
    _, world = run(benchmark, lambda world: actor, mode="async", delay=2)
    rows = steps(world)
    for (_, prefix, _), look in list(zip(actor.asked, looks(world), strict=True))[1:]:
        if look + len(prefix) <= len(rows):
            np.testing.assert_array_equal(prefix, np.float32(rows[look : look + len(prefix)]))


def test_reaction_is_the_age_of_what_an_action_was_chosen_by():
    benchmark = PointBenchmark(horizon=28)
    # Steps of 50 ms. Beside execution the first chunk is executed from its first action to its sixth.
    for mode, median, oldest in (("sync", 3.5, 5), ("naive", 4, 7), ("async", 4, 7)):
        episode, _ = run(benchmark, lambda world: Actor(benchmark), mode=mode, delay=2)
        assert episode.reaction_ms["p50"] == pytest.approx(50 * median, abs=25), mode
        assert 50 * (oldest - 1) < episode.reaction_ms["p99"] <= 50 * oldest, mode
    at_rest, _ = run(benchmark, lambda world: Actor(benchmark))
    assert at_rest.reaction_ms == {"p50": 75.0, "p99": 150.0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("delay", [0.0, 3.0])
def test_the_same_twice(mode, delay):
    benchmark = PointBenchmark(horizon=40, drift=0.01)
    first, second = (run(benchmark, mode=mode, delay=delay, number=2) for _ in range(2))
    assert as_line(first[0]) == as_line(second[0])
    np.testing.assert_array_equal(steps(first[1]), steps(second[1]))


def test_delay_costs_success():
    benchmark = PointBenchmark(horizon=60, drift=0.04)
    rates = [
        np.mean([run(benchmark, delay=delay, number=number, suite="far")[0].success for number in range(6)])
        for delay in (0, 1)
    ]
    assert rates[0] == 1
    assert rates[1] < 0.5


def test_noise_is_the_trial_s_own():
    benchmark = PointBenchmark()
    seeds = {}
    for mode in MODES:
        actor = Actor(benchmark)
        run(benchmark, lambda world, actor=actor: actor, mode=mode, delay=1)
        seeds[mode] = [seed for _, _, seed in actor.asked]
    shortest = min(map(len, seeds.values()))
    assert len({tuple(each[:shortest]) for each in seeds.values()}) == 1
    assert len(set(seeds["sync"])) == len(seeds["sync"])
    task = trial(benchmark)
    others = (replace(task, number=1), replace(task, seed=1), replace(task, task=benchmark.suites()["far"][0]))
    assert len({noise_seed(each, 0) for each in (task, *others)}) == 4
    # Written down, so that no change goes unnoticed: old results and new ones are compared trial by trial.
    assert noise_seed(task, 0) == 45099927774946721


def test_each_rollout_begins_with_a_fresh_policy():
    benchmark = PointBenchmark(rollouts=3, horizon=20)
    begun = []

    def begin(world):
        begun.append(world.steps)
        return Expert(world)

    episode, world = run(benchmark, begin)
    assert (episode.success, episode.solved, episode.rollouts) == (True, 3, 3)
    assert len(begun) == 3
    assert begun == sorted(set(begun))
    assert episode.calls == len(looks(world))
    assert episode.steps == len(steps(world))
    assert episode.facts == {"distance": episode.facts["distance"]}


def test_a_rollout_that_fails_fails_the_trial():
    episode, _ = run(PointBenchmark(rollouts=2, horizon=2))
    assert (episode.success, episode.solved, episode.rollouts, episode.steps) == (False, 0, 2, 4)
    assert episode.error is None


def test_what_the_world_raises_is_told():
    episode, _ = run(PointBenchmark(fault="raise"), number=1)
    assert not episode.success
    assert episode.steps == 2
    assert episode.error.startswith("world, rollout 1, step 2: ArithmeticError: the point left the table (fake.py:")
    episode, _ = run(PointBenchmark(fault="reset"), number=1)
    assert episode.error.startswith("world, rollout 0, step 0: ValueError: the table fell over")
    assert (episode.calls, episode.latency_ms, episode.reaction_ms) == (0, {}, {})


def nan(benchmark):
    actions = np.full((benchmark.chunk_length, WIDTH), np.nan, np.float32)
    return ActionChunk(actions, actions, actions.any(0), "point")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("chunk", "complaint"),
    [
        pytest.param(lambda *_: nan(PointBenchmark()), "expected finite values, got NaN", id="not finite"),
        pytest.param(
            lambda *_: ActionChunk(np.zeros((8, 7)), np.zeros((8, 7)), np.ones(7, bool), "point"),
            "expected shape (T, 32), got (8, 7)",
            id="another width",
        ),
    ],
)
def test_a_chunk_that_cannot_be_executed_is_the_policy_s_failure(mode, chunk, complaint):
    benchmark = PointBenchmark()
    actor = Actor(benchmark, chunk)
    episode, _ = run(benchmark, lambda world: actor, mode=mode)
    assert not episode.success
    assert episode.error.startswith("policy, rollout 1")
    assert complaint in episode.error
    assert len(actor.asked) == 1


def raising(error):
    def chunk(*_):
        raise error

    return chunk


@pytest.mark.parametrize("mode", MODES)
def test_an_error_of_the_policy_is_not_tried_again(mode):
    benchmark = PointBenchmark()
    actor = Actor(benchmark, raising(ValueError("state: expected 7 values")))
    episode, world = run(benchmark, lambda world: actor, mode=mode)
    assert episode.error.startswith("policy, rollout 1, step 0: ValueError: state: expected 7 values (test_episode.py:")
    assert len(actor.asked) == 1
    assert steps(world) == []


@pytest.mark.parametrize("error", [ConnectionError("gone"), TimeoutError("late"), Busy("shutting down")], ids=repr)
def test_a_server_that_is_gone_says_nothing_of_the_policy(error):
    benchmark = PointBenchmark()
    with pytest.raises(Interrupted, match=str(error)):
        run(benchmark, lambda world: Actor(benchmark, raising(error)))


def test_a_key_that_is_refused_is_no_failure():
    benchmark = PointBenchmark()
    with pytest.raises(PermissionError, match="key"):
        run(benchmark, lambda world: Actor(benchmark, raising(PermissionError("key"))))


@pytest.mark.parametrize(
    ("settings", "which", "complaint"),
    [
        pytest.param({"max_prefix": 0}, {"mode": "async"}, "needs a policy trained with prefixes", id="no prefixes"),
        pytest.param({}, {"mode": "async", "delay": 8}, "takes a prefix of 8 actions", id="delay"),
        pytest.param({"max_prefix": 9}, {"mode": "async"}, "prefixes of up to 7", id="longer than trained"),
    ],
)
def test_what_the_policy_cannot_do_is_refused(settings, which, complaint):
    benchmark = PointBenchmark()
    with pytest.raises(ValueError, match=complaint):
        run(benchmark, execution_=execution(benchmark, **settings), **which)
    with pytest.raises(ValueError, match="execute: the policy's chunks have 8 actions"):
        run(benchmark, execution_=Execution(benchmark.rate_hz, 9))
    with pytest.raises(ValueError, match="rate_hz: the policy's actions are for 20 Hz"):
        run(benchmark, execution_=Execution(30, 4))


def test_film():
    benchmark = PointBenchmark(horizon=10)
    pictures = []
    act(benchmark.open(), lambda world: Actor(benchmark), trial(benchmark), execution(benchmark), film=pictures.append)
    assert len(pictures) == 1 + 10 // PICTURE_EVERY + 1
    assert all(picture.shape == (16, 16, 3) for picture in pictures)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_policy_that_sees_the_past_is_given_videos(delay):
    """The world is looked at in every step, those that execute a chunk included; each rollout begins anew."""
    benchmark = PointBenchmark(horizon=9)
    actor = Actor(benchmark)
    info = replace(benchmark.info, history=(4, 2), state_length=2)
    actor.robot_info = lambda robot_type=None: info
    episode, world = run(benchmark, lambda world: actor, delay=delay)
    assert looks(world) == list(range(9))
    called = list(range(0, 9, benchmark.execute + delay))
    assert episode.calls == len(actor.asked) == len(called)
    for step, (observation, _, _) in zip(called, actor.asked, strict=True):
        video = observation.images["base"]
        assert video.shape[0] == 4
        assert observation.state.shape == (2, len(observation.state[0]))
        # The point moves at every step of a chunk, and its place is in the state.
        assert np.array_equal(*observation.state) == (step == 0)
        if step == 0:
            assert all(np.array_equal(frame, video[0]) for frame in video)
