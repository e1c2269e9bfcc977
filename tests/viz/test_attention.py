"""Where chunks look, in rerun."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.viz.support import read, series
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app
from xr0_engine.engine import Engine
from xr0_engine.viz.attention import Attending, overlaid


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return folder


class View:
    def __init__(self):
        self.told = []

    def attended(self, pictures):
        self.told.append(pictures)


def test_weights_lie_over_their_part_of_the_picture():
    image = np.full((40, 60, 3), (30, 60, 90), np.uint8)
    weights = np.zeros((2, 3), np.float32)
    weights[1, 2] = 1
    shown = overlaid(image, weights)
    assert (shown[:20] == 60).all()
    assert (shown[20:, 40:] == shown[30, 50]).all()
    assert shown[30, 50, 0] > 150 > shown[30, 50, 2]
    assert (overlaid(image, np.zeros((2, 3))) == 60).all()


def test_the_chunk_is_the_engines(checkpoint):
    engine = Engine.from_pretrained(checkpoint, "cpu", "float32")
    view = View()
    policy = Attending(engine, view, seed=7)
    observation = engine.example("bimanual", (96, 128))
    prefix = engine.infer(observation, seed=1).actions[:3]
    for number, given in enumerate((None, prefix)):
        chunk = policy.infer(observation, given)
        np.testing.assert_array_equal(chunk.actions, engine.infer(observation, given, seed=7 + number).actions)
    assert [sorted(pictures) for pictures in view.told] == [sorted(observation.images)] * 2
    for image in view.told[0].values():
        assert (image.shape, image.dtype) == ((96, 128, 3), np.uint8)
    # Something is looked at most in one of the views.
    assert max(float(np.ptp(image.astype(float), -1).max()) for image in view.told[0].values()) > 100
    assert policy.robot_info("bimanual") == engine.robot_info("bimanual")


def test_drive_shows_it(checkpoint, tmp_path):
    run = tmp_path / "run.rrd"
    given = [
        "--env",
        "null",
        "--checkpoint",
        checkpoint,
        "--robot-type",
        "bimanual",
        "--device",
        "cpu",
        "--seconds",
        "1",
    ]
    given += ["--image-size", "128x96", "--delay-steps", "3", "--rerun", run, "--attention"]
    result = CliRunner().invoke(app, ["drive", *map(str, given)])
    assert result.exit_code == 0, result.stderr
    rows = read(run)
    assert [row["time"] for row in rows["/attention/ego"]] == [row["time"] for row in rows["/camera/ego"]]
    with Image.open(io.BytesIO(bytes(rows["/attention/ego"][0]["blob"][0]))) as picture:
        assert picture.size == (128, 96)
    assert len(series(rows, "/commands/left_joints")[0]) > 20


@pytest.mark.parametrize(
    "given",
    [
        ["--rerun", "run.rrd", "--delay-steps", "3"],
        ["--rerun", "run.rrd", "--checkpoint", "tiny"],
        ["--checkpoint", "tiny", "--delay-steps", "3"],
        ["--rerun", "run.rrd", "--checkpoint", "tiny", "--delay-steps", "3", "--mode", "guided"],
    ],
    ids=["no checkpoint", "real time", "no rerun", "guided"],
)
def test_where_it_cannot_be_shown(given):
    result = CliRunner().invoke(app, ["drive", "--attention", *given])
    assert (result.exit_code, "--attention: expected with --rerun" in result.stderr) == (2, True)
