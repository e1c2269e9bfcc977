"""Robots to drive, where policies come from, pictures, and the commands `xr0 drive` and `xr0 replay`."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.executor.support import MarkedPolicy, execute
from xr0_engine.cli import app
from xr0_engine.drive import aloha
from xr0_engine.drive.aloha import LiveAloha, SimulatedAloha, aloha_limits
from xr0_engine.drive.null import NullRobot
from xr0_engine.drive.picture import plot_recording
from xr0_engine.drive.policies import TRAINED, from_checkpoint, scripted
from xr0_engine.drive.run import run
from xr0_engine.drive.wander import CHUNK_LENGTH, JOINTS, WanderPolicy
from xr0_engine.engine import Engine
from xr0_engine.executor import (
    Executor,
    PlainFrame,
    Recorder,
    SensorsNotReady,
    Settings,
    SystemClock,
    VirtualClock,
    read_recording,
)
from xr0_engine.robot.decode import BIMANUAL_COLUMNS, LEFT, RIGHT
from xr0_engine.robot.layouts import BIMANUAL, LAYOUTS, PLAIN
from xr0_engine.serve.worker import describe
from xr0_engine.sim import CONTROL_RATE_HZ, AlohaEnv, columns_to_joints, joints_to_columns

# Servos with friction stop this close to their target, and follow this fast.
SERVO_TOLERANCE_RAD = 0.05


@pytest.fixture
def env(renderer):
    with AlohaEnv(width=48, height=32) as env:
        yield env


def xr0(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def shades(path):
    with Image.open(path) as picture:
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


def test_simulation_is_as_far_as_the_clock(env):
    clock = VirtualClock(50.0)
    robot = SimulatedAloha(env, clock, "Go.")
    target = env.joints + 0.1
    robot.command(joints_to_columns(target).astype(np.float64))
    assert env.physics.time() == 0
    clock.jump(1.0)
    snapshot = robot.observe(clock.now())
    assert env.physics.time() == pytest.approx(1.0)
    assert snapshot.observation.timestamp_s == 51.0
    reached = columns_to_joints(snapshot.observation.state[0])
    np.testing.assert_allclose(reached, np.clip(target, *env.limits.T), atol=SERVO_TOLERANCE_RAD)
    np.testing.assert_allclose(snapshot.origin.left.joints_rad, reached[:6], atol=1e-6)
    assert snapshot.observation.instruction == "Go."


def test_pose_is_between_the_finger_tips(env):
    tips = env.physics.named.data.xpos[["vx300s_right/left_finger_link", "vx300s_right/right_finger_link"]]
    pose = env.pose.right
    assert np.linalg.norm(pose.position_m - tips.mean(axis=0)) < 0.1
    np.testing.assert_allclose(pose.rotation @ pose.rotation.T, np.eye(3), atol=1e-9)
    assert pose.position_m[0] > 0 > env.pose.left.position_m[0]


def test_limits_are_the_simulator_ranges(env):
    limits = aloha_limits(env)
    np.testing.assert_allclose(columns_to_joints(limits.low), env.limits[:, 0], atol=1e-6)
    np.testing.assert_allclose(columns_to_joints(limits.high), env.limits[:, 1], atol=1e-6)
    assert np.isfinite(limits.velocity).sum() == 12
    assert np.isinf(limits.velocity[[*range(6), 6, 20]]).all()
    assert np.isinf(limits.high[LEFT.position]).all()


def test_live_simulation_draws_beside_the_loop(env, monkeypatch):
    # Drawing takes longest where other work keeps the processor busy.
    monkeypatch.setattr(aloha, "MAX_FRAME_AGE_S", 60.0)
    clock = SystemClock()
    with LiveAloha(env, clock, "Go.") as robot:
        assert threading.current_thread().name != robot._cameras.name
        snapshot, deadline = None, clock.now() + 60
        while snapshot is None and clock.now() < deadline:
            try:
                snapshot = robot.observe(clock.now())
            except SensorsNotReady:
                clock.sleep_until(clock.now() + 0.01)
        robot.command(joints_to_columns(env.joints).astype(np.float64))
    assert snapshot is not None
    assert {image.shape for image in snapshot.observation.images.values()} == {(32, 48, 3)}
    assert abs(clock.now() - snapshot.observation.timestamp_s) < 60
    assert not robot._cameras.is_alive()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_null_robot(layout):
    snapshot = NullRobot(("ego",), layout, "r", state_width=32).observe(3.0)
    assert snapshot.observation.timestamp_s == 3.0
    # A layout with columns of its own has one width, whoever asks.
    width = layout.frame(32).width
    assert layout.frame(width).absolute(np.zeros((2, width)), snapshot.origin).shape == (2, width)


def test_null_robot_shows_videos_to_who_sees_them():
    robot = NullRobot(("ego",), PLAIN, "r", state_width=8, image_size=(32, 48), frames=4, state_length=3)
    observation = robot.observe(0.0).observation
    assert observation.images["ego"].shape == (4, 32, 48, 3)
    assert observation.state.shape == (3, 8)


@pytest.mark.parametrize("given", [0, 1, 2, 6], ids=lambda given: f"prefix-{given}")
def test_scripted_chunks_go_on_from_their_prefix(given):
    robot = NullRobot(("ego",), BIMANUAL, "bimanual", BIMANUAL_COLUMNS)
    prefix = np.outer(np.arange(given), 0.01 * JOINTS).astype(np.float32) if given else None
    chunk = WanderPolicy(0).infer(robot.observe(0.0).observation, prefix)
    assert chunk.actions.shape == (CHUNK_LENGTH, BIMANUAL_COLUMNS)
    assert chunk.prefix_length == given
    if given:
        np.testing.assert_array_equal(chunk.actions[:given], prefix)
    steps = np.abs(np.diff(chunk.actions, axis=0))
    assert steps.max() < 0.05
    assert steps[:, LEFT.position].max() == steps[:, RIGHT.gripper].max() == 0


def test_async_seams_are_smaller_than_naive_ones(env):
    """The same policy and delay; only the prefix differs."""
    largest = {}
    for mode in ("async", "naive_async"):
        report = run(scripted(0), Settings(CONTROL_RATE_HZ, mode, margin=0), 5.0, True, 4, 0, None, (32, 48))
        largest[mode] = report.seams.largest[JOINTS].max()
        assert report.seams.count > 4
        assert report.counts["held"] == 0
    assert largest["async"] < 0.03 < largest["naive_async"]


def test_checkpoint_executes_in_the_simulation(renderer, tiny_checkpoint):
    source = from_checkpoint(tiny_checkpoint, "bimanual", 0, "cpu", "float32", "reference")
    assert (source.layout, source.control_rate_hz, source.max_prefix) == (BIMANUAL, 30, 6)
    reports = [
        run(
            from_checkpoint(tiny_checkpoint, "bimanual", 0, "cpu", "float32", "reference"),
            Settings(30.0, margin=0),
            2.0,
            True,
            3,
            0,
            None,
            (32, 48),
        )
        for _ in range(2)
    ]
    assert reports[0].counts["chunks"] >= 3
    assert reports[0].counts["rejected"] == reports[0].counts["failed"] == 0
    # Simulated time and one seed: the same run.
    np.testing.assert_array_equal(reports[0].seams.largest, reports[1].seams.largest)


@pytest.mark.parametrize("delay_steps", [2.0, None], ids=["simulated time", "real time"])
def test_the_simulation_shows_the_views_that_the_policy_has(renderer, delay_steps):
    """The policy of the demo has one camera."""
    source = from_checkpoint(TRAINED, None, 0, "cpu", "float32", "auto")
    assert source.views == ("ego",)
    report = run(source, Settings(30, max_prefix=source.max_prefix), 1.0, True, delay_steps, 0, None, (48, 64))
    assert report.counts["failed"] == 0
    assert report.counts["chunks"]


def test_checkpoint_trained_without_prefixes_is_not_executed_async(tiny_checkpoint, tmp_path):
    folder = tmp_path / "no-prefixes"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_prefix": 0}))
    command = ["drive", "--env", "null", "--checkpoint", folder, "--robot-type", "bimanual", "--seconds", 0.5]
    refused = xr0(*command)
    assert (refused.exit_code, "mode: async needs a policy trained with prefixes" in refused.stderr) == (2, True)
    assert "ended: time" in xr0(*command, "--mode", "naive_async").stdout


def test_simulation_refuses_another_robot(tiny_checkpoint):
    source = from_checkpoint(tiny_checkpoint, "libero_all", 0, "cpu", "float32", "reference")
    with pytest.raises(ValueError, match="layout bimanual at 30 Hz"):
        run(source, Settings(20.0), 1.0, True, 1, 0, None)


def test_what_an_engine_tells_of_itself_is_what_a_server_tells_of_it(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, "cpu", "float32")
    served = describe(engine, (64, 64))
    assert served.robots == {name: engine.robot_info(name) for name in served.robots}
    assert {"libero_all", "bimanual"} <= served.robots.keys()
    with pytest.raises(ValueError, match="robot_type: expected one of"):
        engine.robot_info("r2d2")


def test_steps_and_two_values_of_the_profile_are_in_the_frame(tiny_checkpoint):
    source = from_checkpoint(tiny_checkpoint, "libero_all", 0, "cpu", "float32", "reference")
    assert np.flatnonzero(source.frame.delta).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.flatnonzero(source.frame.held).tolist() == [6]
    robot = NullRobot(source.views, source.layout, source.robot_type, source.state_width)
    frames = [(PlainFrame(32, ()), "are steps"), (source.frame, "for 20 Hz, Settings have 10")]
    for frame, complaint in frames:
        executor = Executor(source.policy, robot, frame, Settings(10.0), clock=VirtualClock(), delay_s=lambda _: 0.1)
        with pytest.raises(ValueError, match=complaint):
            executor.run(1.0)


def test_drive_takes_a_profile_and_a_size_like_serve(tiny_checkpoint, tmp_path, monkeypatch):
    profile = {"name": "mine", "robot_types": [], "layout": "plain", "control_rate_hz": 12, "replan_every": None}
    views = [{"key": "top", "title": "Base View"}]
    (tmp_path / "mine.yaml").write_text(json.dumps({**profile, "views": views}))
    seen = []
    observe = NullRobot.observe

    def watched(robot, now_s):
        seen.append(observe(robot, now_s))
        return seen[-1]

    monkeypatch.setattr(NullRobot, "observe", watched)
    command = ["drive", "--env", "null", "--checkpoint", tiny_checkpoint, "--robot-type", "libero_all", "--json"]
    command += ["--embodiment", tmp_path / "mine.yaml", "--image-size", "96x64", "--seconds", 1, "--delay-steps", 1]
    result = xr0(*command)
    assert result.exit_code == 0, result.output
    assert {view: image.shape for view, image in seen[0].observation.images.items()} == {"top": (64, 96, 3)}
    counts = json.loads(result.stdout)["counts"]
    assert counts["executed"] + counts["waited"] == 12


def test_real_time_warms_up_first_and_raises_its_errors(tiny_checkpoint):
    source = from_checkpoint(tiny_checkpoint, "libero_all", 0, "cpu", "float32", "reference")
    report = run(source, Settings(20.0, hang_s=20.0), 0.5, False, None, 0, None)
    assert report.counts["inferences"] > 0
    broken = MarkedPolicy(faults={1: ConnectionError("gone")})
    object.__setattr__(source, "policy", broken)
    with pytest.raises(ConnectionError):
        run(source, Settings(20.0), 0.5, False, None, 0, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "async"},
        {"policy": MarkedPolicy(faults=dict.fromkeys(range(2, 40), ValueError("bad")))},
    ],
    ids=["async", "failing"],
)
def test_picture_of_a_recording(tmp_path, settings):
    with Recorder(tmp_path / "run.jsonl", "a test") as recorder:
        execute(recorder=recorder, seconds=3, **settings)
    recording = read_recording(tmp_path / "run.jsonl")
    plot_recording(recording, tmp_path / "run.png", seconds=2)
    assert shades(tmp_path / "run.png") > 50
    with pytest.raises(ValueError, match="start: expected less than"):
        plot_recording(recording, tmp_path / "late.png", start_s=100)
    assert not (tmp_path / "late.png").exists()


def test_drive_then_replay(renderer, tmp_path):
    recording, png = tmp_path / "run.jsonl", tmp_path / "run.png"
    result = xr0("drive", "--delay-steps", 3, "--seconds", 1, "--record", recording, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["counts"]["executed"] == 27
    assert report["counts"]["deadline_misses"] == 0
    result = xr0("replay", recording, "--out", png)
    assert result.exit_code == 0, result.output
    assert shades(png) > 50


def test_drive_tells_what_it_counted():
    result = xr0("drive", "--env", "null", "--delay-steps", 2, "--seconds", 2, "--mode", "sync")
    assert result.exit_code == 0, result.output
    assert "deadlines missed: 0; ended: time" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--env", "moon"], "--env"),
        (["--server", "ws://x", "--checkpoint", "y"], "at most one"),
        (["--robot-type", "libero_all"], "--env null"),
        (["--trigger", "soon"], "--trigger"),
        (["--embodiment", "libero"], "--embodiment: expected only with --checkpoint"),
        (["--image-size", "640"], "--image-size: expected WIDTHxHEIGHT"),
        (["--env", "null", "--mode", "fast"], "mode"),
        (["--env", "null", "--delay-steps", "2", "--starvation", "panic"], "starvation"),
        (["--env", "null", "--checkpoint", "nowhere/at/all"], "nowhere"),
    ],
    ids=[
        "env",
        "two policies",
        "robot type",
        "trigger",
        "embodiment",
        "image size",
        "mode",
        "starvation",
        "checkpoint",
    ],
)
def test_drive_refuses(arguments, complaint):
    result = xr0("drive", *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr


@pytest.mark.parametrize("name", ["run.txt", "no/folder/run.png"])
def test_replay_refuses_a_wrong_picture(tmp_path, name):
    result = xr0("replay", tmp_path / "run.jsonl", "--out", tmp_path / name)
    assert result.exit_code == 2
    assert "--out" in result.stderr


def test_replay_without_a_recording(tmp_path):
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert xr0("replay", tmp_path / "other.jsonl", "--out", tmp_path / "a.png").exit_code == 2
    assert xr0("replay", tmp_path / "missing.jsonl", "--out", tmp_path / "a.png").exit_code == 2
