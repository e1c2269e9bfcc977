"""xr0 infer: files in, one chunk out, and what it says when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from xr0_engine import Engine, Observation
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app

TASK = ["-t", "put the bowl on the plate"]
LIBERO = ["--robot-type", "libero_all"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return str(folder)


@pytest.fixture(scope="module")
def cameras(tmp_path_factory) -> dict[str, Path]:
    """View -> a PNG of noise, for the views of every profile used here."""
    folder = tmp_path_factory.mktemp("cameras")
    rng = np.random.default_rng(0)
    files = {view: folder / f"{view}.png" for view in ("base", "ego", "left_wrist", "right_wrist")}
    for file in files.values():
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file)
    return files


def run(*arguments):
    return CliRunner().invoke(app, ["infer", *arguments, "--dtype", "float32", "--device", "cpu"])


def views(cameras: dict[str, Path], *names: str) -> list[str]:
    return [word for name in names for word in ("-i", f"{name}={cameras[name]}")]


def test_json_is_the_engine_s_chunk(checkpoint, cameras):
    result = run(checkpoint, *views(cameras, "base", "left_wrist"), *TASK, *LIBERO, "--seed", "3", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    images = {view: np.asarray(Image.open(cameras[view])) for view in ("base", "left_wrist")}
    engine = Engine.from_pretrained(checkpoint, device="cpu", dtype="float32")
    chunk = engine.infer(Observation(images, TASK[1], np.zeros(32, np.float32), "libero_all"), seed=3)
    np.testing.assert_array_equal(np.float32(printed["actions"]), chunk.actions)
    assert printed["columns"] == {str(column): f"column {column} (robot units)" for column in range(7)}
    assert (printed["robot_type"], printed["control_rate_hz"], printed["prefix_length"]) == ("libero_all", 20, 0)
    assert printed["timestamp_s"] is None
    assert printed["timing_ms"].keys() == chunk.timing_ms.keys()
    assert (printed["backend"], printed["backend_reason"]) == ("reference", "the device is no GPU")


def test_table_names_columns_and_stages(checkpoint, cameras):
    bimanual = [*views(cameras, "ego", "left_wrist", "right_wrist"), *TASK, "--robot-type", "bimanual"]
    result = run(checkpoint, *bimanual)
    assert result.exit_code == 0, result.stderr
    assert "backend reference: the device is no GPU" in result.stdout
    for text in ("left joints (rad)", "forearm roll", "right position (m)", "30 actions at 30 Hz", "flow", "total"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_state_and_prefix_come_from_files_and_lists(checkpoint, cameras, tmp_path):
    state, prefix = np.linspace(-1, 1, 32, dtype=np.float32), np.zeros((2, 32))
    prefix[:, :7] = [[0.1] * 7, [0.2] * 7]
    (tmp_path / "state.json").write_text(json.dumps(state.tolist()))
    np.save(tmp_path / "state.npy", state)
    (tmp_path / "prefix.json").write_text(json.dumps(prefix.tolist()))
    common = [checkpoint, *views(cameras, "base", "left_wrist"), *TASK, *LIBERO, "--seed", "0", "--json"]
    common += ["--prefix", str(tmp_path / "prefix.json")]
    chunks = []
    for given in (",".join(map(str, state)), str(tmp_path / "state.json"), str(tmp_path / "state.npy"), None):
        result = run(*common, *([] if given is None else [f"--state={given}"]))
        assert result.exit_code == 0, result.stderr
        chunks.append(json.loads(result.stdout))
    assert chunks[0]["actions"] == chunks[1]["actions"] == chunks[2]["actions"] != chunks[3]["actions"]
    assert chunks[0]["prefix_length"] == 2
    np.testing.assert_array_equal(np.float32(chunks[0]["actions"])[:2, :7], np.float32(prefix[:, :7]))


def test_picture_is_written(checkpoint, cameras, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "chunk.png"
    result = run(checkpoint, *views(cameras, "base", "left_wrist"), *TASK, *LIBERO, "--plot", str(picture), "--json")
    assert result.exit_code == 0, result.stderr
    json.loads(result.stdout)
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_image_files_are_read_as_arrays_are(checkpoint, cameras, tmp_path):
    refused = {"P": None, "L": "is a grey image", "RGBA": "has an alpha channel"}
    for mode, reason in refused.items():
        with Image.open(cameras["base"]) as image:
            image.convert(mode).save(tmp_path / f"{mode}.png")
        given = ["-i", f"base={tmp_path / mode}.png", *views(cameras, "left_wrist")]
        result = run(checkpoint, *given, *TASK, *LIBERO, "--json")
        assert (result.exit_code == 0) == (reason is None), result.stderr
        if reason:
            assert f"{mode}.png {reason}" in result.stderr.replace("\n", " ")
            assert "--image base" in result.stderr


BASE, WRIST = "base={base}", "left_wrist={left_wrist}"


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        (["front.png"], [], "expected VIEW=FILE"),
        (["base=absent.png"], [], "--image base: expected a JPEG, PNG, WEBP or TIFF file"),
        (["base={text}"], [], "--image base: expected a JPEG, PNG, WEBP or TIFF file"),
        (["base={cut}"], [], "--image base: expected a JPEG, PNG, WEBP or TIFF file"),
        ([BASE, BASE], [], "every view once"),
        ([BASE], [], "left_wrist"),
        ([BASE, WRIST, "top={ego}"], [], "top"),
        ([BASE, WRIST], ["--state", "0.1,abc"], "--state: expected numbers"),
        ([BASE, WRIST], ["--state", "0.1,0.2"], "state"),
        ([BASE, WRIST], ["--state", "{text}"], "--state: expected numbers"),
        ([BASE, WRIST], ["--state", "absent.npy"], "--state: expected numbers"),
        ([BASE, WRIST], ["--prefix", "absent.json"], "--prefix: expected numbers"),
        ([BASE, WRIST], ["--prefix", "{ragged}"], "--prefix: expected numbers"),
        ([BASE, WRIST], ["--prefix", "{empty}"], "--prefix: expected numbers"),
        ([BASE, WRIST], ["--robot-type", "r2d2"], "libero_all"),
        ([BASE, WRIST], ["--embodiment", "r2d2"], "libero"),
        ([BASE, WRIST], ["--plot", "absent/chunk.png"], "existing folder"),
        ([BASE, WRIST], ["--plot", "chunk.jpg"], ".png"),
        ([BASE, WRIST], ["--seed", "-1"], "seed"),
        ([BASE, WRIST], ["--dtype", "int3"], "dtype"),
    ],
    ids=[
        *("no-view", "absent-image", "text-as-image", "cut-image", "view-twice", "view-missing", "view-unknown"),
        *("state-words", "state-short", "state-text-file", "state-absent", "prefix-absent", "prefix-ragged"),
        *("prefix-empty", "robot-type", "embodiment", "plot-folder", "plot-suffix", "seed", "dtype"),
    ],
)
def test_wrong_input_exits_with_2_and_says_what_was_expected(
    checkpoint, cameras, tmp_path, images, more, message, monkeypatch
):
    if "--seed" not in more:
        monkeypatch.setattr("xr0_engine.engine.load_model", lambda *_: pytest.fail("loaded the weights first"))
    files = dict(cameras)
    files |= {"text": tmp_path / "text.json", "ragged": tmp_path / "ragged.json", "empty": tmp_path / "empty.npy"}
    files["text"].write_text("no picture, no numbers")
    files["ragged"].write_text("[[1, 2], [3]]")
    files["empty"].touch()
    files["cut"] = tmp_path / "cut.png"
    files["cut"].write_bytes(cameras["base"].read_bytes()[:2000])
    given = [word for image in images for word in ("-i", image)]
    arguments = [word.format(**files) for word in (*given, *(LIBERO if "--robot-type" not in more else []), *more)]
    dtype = [] if "--dtype" in more else ["--dtype", "float32"]
    result = CliRunner().invoke(app, ["infer", checkpoint, *TASK, *arguments, *dtype])
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert message in result.stderr
    assert result.stdout == ""


def test_absent_checkpoint_exits_with_2(cameras, tmp_path):
    result = run(str(tmp_path / "nothing"), *views(cameras, "base", "left_wrist"), *TASK)
    assert result.exit_code == 2
    assert "nothing" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("state.json", b"[NaN]", "finite numbers, got NaN"),
        ("state.json", b"[" * 5000, "lists and objects in each other"),
        ("state.json", b'[["1"]]', "row 0: expected finite numbers, got '1'"),
        ("state.json", b"{}", "expected a table of numbers"),
        ("state.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'\n\n", "expected numbers"),
        ("state.npy", b"no array", "expected numbers"),
    ],
)
def test_files_of_numbers_are_one_line_of_error(checkpoint, cameras, tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    result = run(checkpoint, *views(cameras, "base", "left_wrist"), *TASK, *LIBERO, "--state", str(tmp_path / name))
    assert result.exit_code == 2
    assert result.stderr.startswith("xr0: error: --state: expected numbers")
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_npy_that_asks_for_more_than_it_has_reserves_nothing(checkpoint, cameras, tmp_path):
    path = tmp_path / "state.npy"
    np.save(path, np.zeros(32))
    path.write_bytes(path.read_bytes().replace(b"(32,), }        ", b"(9999999999,), }"))
    result = run(checkpoint, *views(cameras, "base", "left_wrist"), *TASK, *LIBERO, "--state", str(path))
    assert result.exit_code == 2
    assert result.stderr.startswith("xr0: error: --state: expected numbers")
