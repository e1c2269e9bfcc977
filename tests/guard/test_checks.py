"""Each check sees what it is for, from the first observation that shows it, and nothing where all is well."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.guard.support import EVERY, RATE_HZ, chunk, drive, observation, picture, profile, states, targets
from xr0_engine.guard import Guard
from xr0_engine.guard.looks import Eye
from xr0_engine.types import TokenizedObservation

BEGIN = 50


@pytest.mark.parametrize("seed", range(1000, 1010))
def test_nothing_of_a_run_as_in_training(seed):
    assert drive(Guard(profile()), seed) == {}


def pictures(change, *views):
    def fault(seen):
        return replace(
            seen, images={key: change(image) if key in views else image for key, image in seen.images.items()}
        )

    return fault


def joints(change):
    return lambda seen: replace(seen, state=change(seen.state.copy()))


def swapped(seen):
    return replace(seen, images={"front": seen.images["wrist"], "wrist": seen.images["front"]})


FROZEN = picture("front", states(1000)[BEGIN])
FROZEN_STATE = states(1000)[BEGIN].astype(np.float32)[None]


def put(column, value):
    def change(state):
        state[0, column] = value
        return state

    return change


@pytest.mark.parametrize(
    ("name", "fault", "late"),
    [
        pytest.param("brightness front", pictures(np.zeros_like, "front"), 0, id="black"),
        pytest.param("contrast wrist", pictures(lambda image: image // 4 + 90, "wrist"), 0, id="fog"),
        pytest.param("turned front", pictures(lambda image: image[::-1, ::-1], "front"), 0, id="turned"),
        pytest.param("turned wrist", pictures(lambda image: image[:, ::-1], "wrist"), 0, id="mirrored"),
        pytest.param("turned front", pictures(lambda image: image[..., ::-1], "front"), 0, id="red and blue"),
        pytest.param("unlike front", pictures(lambda image: np.roll(image, 20, 1), "front"), 0, id="knocked"),
        pytest.param("swapped front", swapped, 0, id="swapped"),
        pytest.param("swapped wrist", swapped, 0, id="swapped, the other"),
        pytest.param("frozen front", pictures(lambda image: FROZEN, "front"), EVERY, id="frozen"),
        pytest.param("shape wrist", pictures(lambda image: image[6:-6], "wrist"), 0, id="another aspect"),
        pytest.param("state range", joints(lambda state: np.add(state, [0, 5, 0])), 0, id="offset"),
        pytest.param("state range", joints(put(2, 0.9)), 0, id="a joint that never moved"),
        pytest.param("state astray", joints(lambda state: np.add(state, [0.15, 0, 0])), 0, id="small offset"),
        pytest.param("state frozen", joints(lambda state: FROZEN_STATE), 2 * EVERY, id="state frozen"),
        pytest.param("misfit", joints(lambda state: np.pad(state, [(0, 0), (0, 1)])), 0, id="width"),
        pytest.param("misfit", joints(put(1, np.nan)), 0, id="nan"),
        pytest.param("instruction", lambda seen: replace(seen, instruction="Sing."), 0, id="instruction"),
    ],
)
def test_a_fault_is_seen(name, fault, late):
    found = drive(Guard(profile()), change=lambda tick, seen: fault(seen) if tick >= BEGIN else seen)
    assert min(found) >= BEGIN
    assert name in [each for tick, names in found.items() if tick <= BEGIN + late for each in names], found


def test_what_the_policy_says_of_itself():
    bent = lambda tick, path: chunk(targets(path, tick), 0.2 if tick < BEGIN else 0.6)  # noqa: E731
    assert drive(Guard(profile()), plan=bent) == {BEGIN: ["bend"]}

    def elsewhere(tick, path):
        actions = targets(path, tick)
        # From its fourth action on, another way than the chunk before; nobody executes as far.
        actions[13:, 1] += 1.0 * (tick == BEGIN)
        return chunk(actions, 0.2)

    assert "disagreement" in drive(Guard(profile()), plan=elsewhere)[BEGIN + EVERY]


def test_an_instruction_is_known_by_its_words():
    for words in ("Wave.", "  wave ", "WAVE!"):
        assert Guard(profile()).see(observation([0, 0, 0.3], words), 0.0) == []
    (warning,) = Guard(profile()).see(observation([0, 0, 0.3], "Wave twice."), 0.0)
    assert (warning.name, warning.value, warning.threshold) == ("instruction", 1.0, 0.5)
    assert "'Wave twice.'" in warning.detail


def test_a_warning_is_counted_once_as_long_as_it_lasts():
    guard = Guard(profile())
    # Dark, then well for four observations, then dark again.
    dark = lambda tick: tick < 30 or tick >= 80  # noqa: E731
    black = pictures(np.zeros_like, "front")
    drive(guard, change=lambda tick, seen: black(seen) if dark(tick) else seen)
    assert guard.counts["brightness front"] == 2


def test_a_detail_says_what_is_to_be_looked_at():
    guard = Guard(profile())
    upside = pictures(lambda image: image[::-1, ::-1], "front")
    details = {each.name: each.detail for each in guard.see(upside(observation([0, 0, 0.3])), 0.0)}
    assert details["turned front"] == "the picture looks turned by 180 degrees"
    details = {each.name: each.detail for each in Guard(profile()).see(observation([0, 0, 0.9]), 0.0)}
    assert details["state range"] == "column 2 is 0.9, in training 0.3 to 0.3"


def test_nothing_is_said_across_a_pause():
    """An episode may have ended in between: neither jump nor astray."""
    guard = Guard(profile())
    for begin_s, seed in ((0.0, 1000), (60.0, 1001)):
        path = states(seed)
        for tick in range(0, 60, EVERY):
            assert guard.see(observation(path[tick]), begin_s + tick / RATE_HZ) == []
            assert guard.plan(chunk(targets(path, tick), 0.2)) == []


def test_an_executor_may_wait():
    """A robot that stands still while the policy thinks is where its chunk sent it, whatever the time."""
    guard, path, time_s = Guard(profile()), states(1000), 0.0
    for tick in range(0, 140, EVERY):
        assert guard.see(observation(path[tick]), time_s) == []
        assert guard.plan(chunk(targets(path, tick), 0.2)) == []
        time_s += (EVERY + 4) / RATE_HZ


def test_tokens_are_left_to_others_and_files_are_told():
    state = np.array([[0, 0, 0.3]], np.float32)
    tokens = TokenizedObservation(np.zeros(3, np.int64), np.zeros((4, 768), np.float32), ((2, 2),), state)
    assert Guard(profile()).see(tokens, 0.0) == []
    for picture_ in (b"JPEG", np.zeros((48, 64), np.uint8), np.zeros((48, 64, 3), np.float32)):
        (warning,) = Guard(profile()).see(observation([0, 0, 0.3], front=picture_), 0.0)
        assert warning.name == "unseen front"
        assert "as files are not" in warning.detail


@pytest.mark.parametrize("state", [np.float32(0.3), np.zeros((1, 0), np.float32), np.zeros(0, np.float32)])
def test_a_state_that_is_none_is_told(state):
    (warning,) = Guard(profile()).see(replace(observation([0, 0, 0.3]), state=state), 0.0)
    assert warning.name == "misfit"


def test_what_lasts_is_told_at_the_second_look_or_where_it_is_twice_as_far():
    robot = replace(profile(), thresholds=profile().thresholds | {"state range": 0.1})
    # Ranges of these joints are 2 and 2.
    states_ = {"once": [0, 0, 0, 1.3, 0], "twice": [0, 1.3, 1.3, 0, 0], "far": [0, 0, 1.5, 0, 0]}
    found = {}
    for name, path in states_.items():
        guard = Guard(
            replace(robot, low=np.full(3, -1.0), high=np.ones(3), scale=np.full(3, 2.0), speed=np.full(3, 1e6))
        )
        looks = [guard.see(observation([value, 0, 0.3]), float(tick)) for tick, value in enumerate(path)]
        found[name] = [tick for tick, warnings in enumerate(looks) for one in warnings if one.name == "state range"]
    assert found == {"once": [], "twice": [2], "far": [2]}


def test_slow_loops_are_looked_at_as_well():
    """Chunks of so many actions that two seconds do not reach from one look to the next."""
    guard, path = Guard(profile()), states(1000, 400)
    many = lambda tick: np.repeat(targets(path, tick), 5, axis=0)  # noqa: E731
    found = []
    for number, tick in enumerate(range(0, 400, 80)):
        state = path[tick] + (np.array([50.0, 0, 0]) if number == 3 else 0)
        found += guard.see(observation(state), tick / RATE_HZ)
        found += guard.plan(chunk(many(tick), 0.2))
    assert "state jump" in [warning.name for warning in found]


def test_an_eye_sees_what_the_policy_sees():
    frame = picture("front", [0, 0, 0])
    plain, turned, close = Eye(False, 1.0), Eye(True, 1.0), Eye(False, 0.5)
    np.testing.assert_array_equal(turned.look(frame).thumbnail, plain.look(frame).thumbnail[::-1, ::-1])
    middle = np.ascontiguousarray(frame[12:36, 16:48])
    np.testing.assert_array_equal(close.look(frame).thumbnail, plain.look(middle).thumbnail)
    # What comes prepared is turned and cropped already.
    np.testing.assert_array_equal(close.look(middle, prepared=True).thumbnail, plain.look(middle).thumbnail)
    again = Eye(False, 1.0)
    changes = [again.look(each).change for each in (frame, frame.copy(), 255 - frame)]
    assert changes[:2] == [None, 0.0]
    assert changes[2] > 50
