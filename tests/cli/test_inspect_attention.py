"""xr0 inspect --attention: files in, a picture of where the policy looks out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app

pytest.importorskip("matplotlib")

TASK = ["-t", "put the bowl on the plate"]
LIBERO = ["--robot-type", "libero_all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    init_checkpoint(folder / "tiny", "tiny")
    rng = np.random.default_rng(0)
    for view in ("base", "left_wrist"):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{view}.png")
    np.save(folder / "prefix.npy", np.zeros((3, 32), np.float32))
    return folder


def run(folder: Path, *arguments: str, views=("base", "left_wrist")):
    images = [word for view in views for word in ("--attention", f"{view}={folder / view}.png")]
    options = ("--dtype", "float32", "--device", "cpu")
    return CliRunner().invoke(app, ["inspect", str(folder / "tiny"), *images, *arguments, *options])


@pytest.mark.parametrize("prefixed", [False, True], ids=["plain", "prefix"])
def test_a_picture_and_the_shares(folder, tmp_path, prefixed):
    prefix = ["--prefix", str(folder / "prefix.npy")] if prefixed else []
    result = run(folder, *TASK, *LIBERO, *prefix, "--out", str(tmp_path / "looks.png"))
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "looks.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    words = result.stdout.splitlines()[0].partition(": ")[2].split(", ")
    shares = {kind: float(share) for kind, share, _ in (word.split() for word in words)}
    assert list(shares) == ["image", "text", "sink", "state", "prefix", "action"]
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert (shares["prefix"] > 0) == prefixed


@pytest.mark.parametrize(
    ("arguments", "views", "complaint"),
    [
        pytest.param([*TASK, *LIBERO], ("base", "left_wrist"), "--out: expected a .png file", id="no out"),
        pytest.param([*TASK, "--out", "x.jpg"], ("base", "left_wrist"), "--out: expected a .png file", id="jpg"),
        pytest.param(["--out", "x.png"], ("base",), "--attention VIEW=FILE and --instruction", id="no task"),
        pytest.param([*TASK, "--out", "x.png"], (), "--attention VIEW=FILE and --instruction", id="no images"),
        pytest.param([*TASK, "--out", "x.png", "--json"], ("base",), "and no --json", id="json"),
        pytest.param([*TASK, *LIBERO, "--out", "x.png"], ("base",), "'left_wrist' is missing", id="a view too few"),
        pytest.param([*TASK, *LIBERO, "--out", "x.png"], ("base", "base"), "every view once", id="a view twice"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, tmp_path, monkeypatch, arguments, views, complaint):
    monkeypatch.chdir(tmp_path)
    result = run(folder, *arguments, views=views)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_task_without_images_is_refused(folder):
    result = CliRunner().invoke(app, ["inspect", str(folder / "tiny"), *TASK])
    assert (result.exit_code, "expected only beside --attention" in result.stderr) == (2, True)
