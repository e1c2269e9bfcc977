"""xr0 demo: the closed loop from rendered frames to motion, end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.drive.policies import TRAINED
from xr0_engine.engine import Engine

STAGES = {"preprocess", "vision", "prefill", "flow", "decode", "total"}


@pytest.fixture(autouse=True)
def _simulator() -> None:
    for package in ("gym_aloha", "av", "matplotlib"):
        pytest.importorskip(package)
    from xr0_engine.sim import choose_renderer

    try:
        choose_renderer()
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A policy with random weights: half a second of it shows all that the demo does."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder)
    return str(folder)


def film(path):
    import av

    with av.open(path) as opened:
        assert opened.streams.video[0].average_rate == 30
        return [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]


def test_demo_films_the_robot(tiny, tmp_path):
    out = tmp_path / "made" / "demo"
    result = CliRunner().invoke(app, ["demo", tiny, "--seconds", "0.6", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["checkpoint"], facts["frames"], facts["success"]) == (tiny, 18, False)
    # A random checkpoint says that it takes prefixes: inferred ahead while the robot moves on.
    assert (facts["mode"], facts["delay_steps"], facts["inferences"]) == ("async", 2.0, 2)
    assert facts["latency_ms"].keys() == STAGES
    for times in facts["latency_ms"].values():
        assert 0 <= times["p50"] <= times["p90"] <= times["max"]
    with Image.open(facts["png"]) as picture:
        assert (picture.format, facts["png"]) == ("PNG", str(out / "rollout.png"))
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    with Image.open(facts["webp"]) as picture:
        assert (picture.format, picture.size, picture.n_frames, picture.info["loop"]) == ("WEBP", (320, 240), 6, 0)
    frames = film(facts["mp4"])
    assert len(frames) == 18
    # From outside, and the policy's three views.
    assert frames[0].shape == (360, 4 * 480, 3)
    # The arms have moved.
    assert np.abs(frames[0].astype(int) - frames[-1].astype(int)).max() > 100


def test_end_effectors_move_the_robot_of_the_other_family(tmp_path, monkeypatch):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--family", "xr1", "--seconds", "0.4", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["robot_type"], facts["frames"], facts["inferences"]) == ("mobile", 12, 1)
    frames = film(facts["mp4"])
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50


def test_an_end_effector_row_is_reached_by_joints():
    from xr0_engine.evaluation.aloha_body import EndEffectorBody
    from xr0_engine.sim import AlohaEnv

    with AlohaEnv(width=32, height=32) as env:
        body = EndEffectorBody(env)
        frame = body.layout.frame_of(60)
        row = frame.start(body.pose())
        # Two centimetres up with the left arm, whose gripper opens; the right arm is asked for what is out of reach.
        row[[2, 6]] += 0.02, 0.3
        row[8] += 5.0
        right = env.joints[7:13].copy()
        targets = body.targets(row)
        np.testing.assert_array_equal(targets[7:13], right)
        assert targets[6] == pytest.approx(row[6])
        for _ in range(30):
            env.step(targets)
        reached = frame.start(body.pose())
        # What the servos hold.
        np.testing.assert_allclose(reached[:3], row[:3], rtol=0, atol=5e-3)


def test_an_unknown_family_exits_with_2(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--family", "xr2", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "family: expected xr0 or xr1; got 'xr2'" in result.stderr


def test_demo_prints_a_latency_table_and_what_came_of_it(tiny, tmp_path):
    options = ["--seconds", "0.1", "--mode", "sync", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["demo", tiny, *options])
    assert result.exit_code == 0, result.stderr
    for text in (*STAGES, "p50", "p90", "max", "did not change hands: 0.1 s, mode sync", "rollout.png", "rollout.mp4"):
        assert text in result.stdout


def test_the_model_sees_frames_of_the_size_asked_for(tiny, tmp_path, monkeypatch):
    sizes = []
    infer = Engine.infer

    def look(engine, observation, *rest, **more):
        # Warming up takes a list.
        for seen in observation if isinstance(observation, list) else [observation]:
            sizes.append({image.shape for image in seen.images.values()})
        return infer(engine, observation, *rest, **more)

    monkeypatch.setattr(Engine, "infer", look)
    options = ["--seconds", "0.1", "--width", "160", "--height", "120"]
    result = CliRunner().invoke(app, ["demo", tiny, *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert sizes
    assert all(size == {(120, 160, 3)} for size in sizes)


def test_demo_makes_a_checkpoint_of_the_other_family_and_says_that_it_is_random(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XR0_CACHE", str(cache))
    options = ["--family", "xr1", "--seconds", "0.1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0, result.stderr
    assert [folder.name for folder in cache.iterdir()] == ["xr1-tiny"]
    for text in ("random weights", "aimlessly"):
        assert text in result.stdout


def test_demo_brings_a_policy_along(tmp_path, monkeypatch):
    """In the precision that its rate was measured in; what it can do, tests/evaluation/test_aloha.py holds it to."""
    asked, load = [], Engine.from_pretrained
    monkeypatch.setattr(Engine, "from_pretrained", lambda *given: asked.append(given) or load(*given))
    result = CliRunner().invoke(app, ["demo", "--seconds", "0.1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert [given[0] for given in asked] == [TRAINED]
    assert asked[0][2] == "float32"
    assert "random" not in result.stdout


@pytest.mark.parametrize("seconds", ["0", "-1", "61", "nan", "soon"])
def test_seconds_out_of_range_exit_with_2(tiny, tmp_path, seconds):
    result = CliRunner().invoke(app, ["demo", tiny, f"--seconds={seconds}", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "seconds" in result.stderr
    assert not (tmp_path / "out").exists()


def test_empty_instruction_exits_with_2(tiny, tmp_path):
    result = CliRunner().invoke(app, ["demo", tiny, "--seconds", "0.1", "--out", str(tmp_path), "-t", ""])
    assert result.exit_code == 2
    assert "instruction" in result.stderr


def test_output_folder_that_is_a_file_exits_with_2(tiny, tmp_path):
    (tmp_path / "out").touch()
    result = CliRunner().invoke(app, ["demo", tiny, "--seconds", "0.1", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert str(tmp_path / "out") in result.stderr


def test_checkpoint_without_the_bimanual_robot_exits_with_2(tmp_path):
    init_checkpoint(tmp_path / "tiny")
    statistics = tmp_path / "tiny" / "preprocessor_config.json"
    content = json.loads(statistics.read_text())
    del content["action_config"]["bimanual"]
    statistics.write_text(json.dumps(content))
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "tiny"), "--seconds", "0.1", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "'bimanual'" in result.stderr
    assert "libero_all" in result.stderr
