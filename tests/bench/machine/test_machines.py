"""Several machines side by side; and that an emulator's times never stand beside measured ones."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from tests.bench.machine.support import facts, latency, leave
from tests.bench.tell.test_report import Page
from xr0_engine.bench import results
from xr0_engine.bench.machine.state import CRASHED, Ended
from xr0_engine.bench.tell import compare, readme
from xr0_engine.bench.tell.bounds import bounds_of
from xr0_engine.cli import app


def report(*arguments: object):
    return CliRunner().invoke(app, ["bench", "report", *map(str, arguments)])


@pytest.fixture
def folders(tmp_path):
    """Two GPUs and an emulator."""
    leave(tmp_path / "first", None, {"golden-persistent": Ended(CRASHED, "ended by signal 11", 4, 60, -11)})
    leave(tmp_path / "second", facts("NVIDIA GeForce RTX 4090", commit="fedcba9876543210-dirty"))
    leave(tmp_path / "third", facts(emulated=90))
    return tmp_path


def test_machines_stand_side_by_side(folders, tmp_path):
    out = tmp_path / "machines.html"
    told = report(folders / "first", folders / "second", "--out", out)
    assert told.exit_code == 0, told.stderr
    html = out.read_text()
    page = Page(html)
    assert page.open == []
    rows = re.findall(r'<tr><th scope="row">(NVIDIA[^<]*)</th>(.*?)</tr>', html)
    cells = [(name, re.findall(r"<td>(.*?)</td>", row)) for name, row in rows]
    h200, rtx = "NVIDIA H200 (first)", "NVIDIA GeForce RTX 4090 (second)"
    machines = dict(cells[:2])
    assert machines[h200][1:] == ["580.1", "2.13.0", "3.9.0", "0123456789", "4b", "11 of 12", "correct"]
    assert machines[rtx][-2:] == ["12 of 12", ""]
    assert [name for name, _ in cells[2:]] == [h200, rtx] * 2
    assert cells[2][1][:3] == ["0123456789", "100", "11.2"]
    assert cells[2][1][-2] == "79%"
    assert "Different commits: 0123456789, fedcba9876-dirty." in html


def test_one_commit_needs_no_warning(folders, tmp_path):
    report(folders / "first", folders / "first", "--out", tmp_path / "x.html")
    assert "Different commits" not in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["first", "third"], "sm_90, emulated (third) is emulated"),
        (["first", "second/results/bound-libero.json"], "expected files alone or folders alone, got both"),
        (["first", "first/logs"], "logs holds no run of `xr0 bench machine`: there is no state.json"),
        (
            ["first/results/latency-libero-replay.json", "third/results/bound-libero.json"],
            "the times of an emulator stand beside no measured ones, and bound-libero.json is emulated",
        ),
    ],
    ids=["emulated", "file and folder", "no run", "emulated file"],
)
def test_what_does_not_go_together_is_refused(folders, tmp_path, given, message):
    told = report(*(folders / name for name in given), "--out", tmp_path / "x.html")
    assert told.exit_code == 2
    assert message in told.stderr.replace("\n", " ")
    assert not (tmp_path / "x.html").exists()


def test_emulated_machines_alone_are_shown_as_such(folders, tmp_path):
    assert report(folders / "third", "--out", tmp_path / "x.html").exit_code == 0
    html = (tmp_path / "x.html").read_text()
    assert "Emulated: these are the emulator" in html
    assert "sm_90, emulated (third)" in html


def test_table_of_results_takes_no_emulated_ones(tmp_path):
    results.write(latency(facts(emulated=90)), tmp_path / "it.json")
    with pytest.raises(ValueError, match=r"an emulator's times are no measurements, and it\.json is emulated"):
        readme.render(tmp_path)


def test_emulated_results_are_compared_with_their_like_alone():
    real, emulated = latency(facts("cpu")), latency(facts("cpu", emulated=90))
    with pytest.raises(ValueError, match="emulated is None in A, 'sm_90' in B"):
        compare.compare([real, emulated])
    assert compare.compare([emulated, emulated]).rows


def test_an_emulated_bound_is_no_bound_of_a_measurement(folders):
    bound = results.read(folders / "third" / "results" / "bound-libero.json")
    real, emulated = latency(facts("cpu")), latency(facts("cpu", emulated=90))
    assert bounds_of(real, [bound]).ms == bounds_of(emulated, [bound]).ms == {}
