"""vla-eval's observations to ours, our chunks to its actions: what comes through, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from xr0_engine.evaluation.harness import LIBERO, find_adapted
from xr0_engine.robot.embodiment import load_embodiment

RNG = np.random.default_rng(0)


def given(**changes: object) -> dict[str, object]:
    """As LIBEROBenchmark.make_obs of vla-eval 0.8 gives it, with what it is asked for."""
    images = {name: RNG.integers(0, 256, (256, 256, 3), np.uint8) for name in ("agentview", "wrist")}
    states = np.array([0.1, 0.2, 0.3, 3.1, -0.2, 0.1, 0.04, -0.04])
    text = "pick up the black bowl"
    more = {"controller_states": np.zeros(8, np.float32)}
    return {"images": images, "task_description": text, "states": states, **more, **changes}


def info(name: str = "libero"):
    return load_embodiment(name).robot_info(10, 32, 6)


def test_images_are_given_as_they_are_and_said_to_be_prepared():
    seen = given()
    observation = LIBERO.observation(seen, 32, "libero_all")
    assert observation.prepared
    assert observation.images["base"] is seen["images"]["agentview"]
    assert observation.images["left_wrist"] is seen["images"]["wrist"]
    assert observation.robot_type == "libero_all"


def test_text_and_state_are_the_released_evaluations():
    observation = LIBERO.observation(given(task_description="Put the BOWL down."), 32, None)
    assert observation.instruction == "Put the bowl down."
    assert observation.state.shape == (1, 32)
    assert observation.state.dtype == np.float32
    np.testing.assert_array_equal(observation.state[0, :8], given()["states"].astype(np.float32))
    assert not observation.state[0, 8:].any()


def test_actions_are_the_first_seven_columns_unchanged():
    chunk = RNG.normal(size=(10, 32)).astype(np.float32)
    actions = LIBERO.actions(chunk)
    np.testing.assert_array_equal(actions, chunk[:, :7])
    assert actions.flags.c_contiguous


def image(shape=(256, 256, 3), dtype=np.uint8) -> dict[str, np.ndarray]:
    return {"agentview": np.zeros(shape, dtype), "wrist": np.zeros((256, 256, 3), np.uint8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"images: expected agentview, wrist, got None"),
        ({"images": {"agentview": np.zeros((256, 256, 3), np.uint8)}}, r"got \['agentview'\].*send_wrist_image"),
        ({"images": {**image(), "third": image()["wrist"]}}, r"got \['agentview', 'third', 'wrist'\]"),
        ({"images": image((224, 224, 3))}, r"images, agentview: expected \(256, 256, 3\) uint8, got \(224, 224, 3\)"),
        ({"images": image(dtype=np.float32)}, r"got \(256, 256, 3\) float32"),
        ({"images": {**image(), "wrist": [[0]]}}, r"images, wrist: expected .* got list"),
        ({"task_description": " "}, r"task_description: expected the task in words"),
        ({"task_description": None}, r"task_description: expected the task in words"),
        ({"states": None}, r"states: expected 8 finite numbers, got none"),
        ({"states": np.zeros(7)}, r"states: expected 8 finite numbers"),
        ({"states": np.full(8, np.nan)}, r"states: expected 8 finite numbers"),
        ({"states": "12345678"}, r"states: expected 8 finite numbers"),
    ],
)
def test_other_observations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LIBERO.observation(given(**changes), 32, None)


def test_a_policy_is_of_the_benchmarks_robot_and_executes_what_a_chunk_has():
    assert LIBERO.check_policy(info(), None) == 10
    assert LIBERO.check_policy(info(), 5) == 5
    for count in (0, 11, True):
        with pytest.raises(ValueError, match="execute: expected 1 to 10"):
            LIBERO.check_policy(info(), count)
    for other in ("calvin", "bimanual"):
        with pytest.raises(ValueError, match="needs a policy of embodiment libero"):
            LIBERO.check_policy(info(other), None)


def test_suites_have_our_names():
    assert [LIBERO.suite({"suite": f"libero_{name}"}) for name in ("spatial", "10", "90")] == ["spatial", "10", "90"]
    for suite in ("libero_spatial_swap", "libero_mem", None):
        with pytest.raises(ValueError, match=r"suite: expected one of .*xr0 eval libero"):
            LIBERO.suite({"suite": suite})


@pytest.mark.parametrize(
    ("name", "reason"),
    [("calvin", "84 pixels"), ("simpler", "a gripper command of its own"), ("robocasa", "'robocasa'$")],
)
def test_benchmarks_that_change_what_comes_through_are_refused(name, reason):
    assert find_adapted("libero") is LIBERO
    with pytest.raises(ValueError, match=f"benchmark: expected one of libero.*{reason}"):
        find_adapted(name)
