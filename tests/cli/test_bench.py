"""xr0 bench as it is called: files, tables, exit codes. What is measured is tested in tests/bench."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from xr0_engine.bench.cases import CASES
from xr0_engine.bench.results import read
from xr0_engine.cli import app
from xr0_engine.cli.bench import app as bench_app
from xr0_engine.engine import Engine
from xr0_engine.sizes import PUBLISHED

COMMANDS = [command.name or command.callback.__name__ for command in bench_app.registered_commands]
MEASURING = ("latency", "throughput", "coldstart", "jitter", "kernels", "ablate", "finetune")
TINY = ("--size", "tiny", "--device", "cpu", "--dtype", "float32", "--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "80")
        yield


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_help_lists_every_command():
    result = bench("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name not in result.output] == []
    assert {*MEASURING, "images", "roofline", "compare", "report", "machine"} <= set(COMMANDS)


def test_docs_list_every_command_and_case():
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| [A-Z]", text, re.MULTILINE)) == set(COMMANDS)
    assert [case for case in CASES if f"`{case}`, " not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_help(name):
    result = bench(name, "--help")
    assert result.exit_code == 0
    assert f" bench {name} [OPTIONS]" in result.output


def test_latency_writes_its_result_and_prints_a_table(tmp_path):
    file = tmp_path / "latency.json"
    result = bench("latency", *TINY, "--rounds", "2", "--json", str(file))
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    for text in ("libero, tiny, batch 1, float32", "prefill", "quartiles", "2 rounds", "1 of "):
        assert text in result.stdout
    written = read(file)
    assert written.complete
    assert len(written.series["released"]["total"]) == 2


@pytest.mark.parametrize(("case", "size"), [("libero", "4b"), ("robodojo", "5b"), ("robocasa365", "5b")])
def test_what_is_about_a_chip_on_paper_is_of_the_case_s_published_size(case, size):
    result = bench("roofline", "--case", case)
    assert result.exit_code == 0, result.stderr
    assert f"{case}, {size}, " in result.stdout


@pytest.mark.parametrize("name", ["roofline", "predict", "compile", "tune"])
def test_commands_about_a_chip_on_paper_say_so(name):
    assert f"[default: {PUBLISHED}]" in re.sub(r"[\s│]+", " ", bench(name, "--help").output)


def test_throughput_takes_batch_sizes():
    result = bench("throughput", *TINY, "--rounds", "1", "--batches", "1, 2")
    assert result.exit_code == 0, result.stderr
    assert "chunks per second" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_jitter_runs_a_loop():
    result = bench("jitter", *TINY, "--rate", "2", "--seconds", "0.5")
    assert result.exit_code == 0, result.stderr
    assert "of 1 deadlines missed" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", MEASURING)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ("--case", "kitchen"), "case: expected one of libero, bimanual, two_views, stress, robodojo, ", id="case"
        ),
        pytest.param(("--device", "cuda:99"), "device 'cuda:99': this machine has", id="missing GPU"),
        pytest.param(("--threads", "0"), "threads: expected at least 1", id="threads"),
        pytest.param(("--json", "/nowhere/at/all.json"), "--json: expected a file in a folder that exists", id="file"),
    ],
)
def test_mistake_is_one_line_and_exits_with_2(name, options, message):
    result = bench(name, *TINY, *options)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"xr0: error: {message}" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", [name for name in MEASURING if name != "jitter"])
def test_wrong_rounds_exit_with_2(name):
    result = bench(name, *TINY, "--rounds", "0")
    assert result.exit_code == 2
    assert "rounds" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("latency", "--boundary", "replay"), "it needs CUDA graphs", id="replay"),
        pytest.param(("latency", "--backend", "magic"), "backend: expected auto, reference", id="backend"),
        pytest.param(("tune",), "tuning measures kernels on a CUDA GPU", id="tuning without a GPU"),
        pytest.param(("graph",), "it needs CUDA graphs", id="graph without a GPU"),
        pytest.param(("ablate",), "`xr0 bench latency` compares", id="ablation without a GPU"),
        pytest.param(("tune", "--case", "kitchen"), "case: expected one of libero", id="case"),
        pytest.param(("tune", "--case", "libero,robodojo"), "cases of one model family", id="two families"),
        pytest.param(("latency", "--part", "tail"), "part: expected one of all, dit", id="part"),
        pytest.param(("throughput", "--batches", "1;2"), "batches: expected whole numbers", id="batches"),
        pytest.param(("jitter", "--rate", "0"), "rate: expected more than 0", id="rate"),
        pytest.param(("report", "none.json"), "none.json", id="no such result"),
    ],
)
def test_impossible_wish_exits_with_2(arguments, message):
    name, *options = arguments
    given = {"report": (), "tune": TINY[:-2], "graph": TINY[:-2]}.get(name, TINY)
    result = bench(name, *given, *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("reason", "exit_code"), [(KeyboardInterrupt(), 130), (ValueError("worn out"), 2)], ids=["Ctrl-C", "error"]
)
def test_interrupted_run_leaves_a_valid_file(monkeypatch, tmp_path, reason, exit_code):
    infer, calls = Engine.infer, itertools.count()

    def interrupted(self, *arguments):
        # The gate, two rounds of warm-up and one that counts come before.
        if next(calls) == 1 + 2 + 1:
            raise reason
        return infer(self, *arguments)

    monkeypatch.setattr(Engine, "infer", interrupted)
    file = tmp_path / "latency.json"
    result = bench("latency", *TINY, "--alone", "--rounds", "9", "--json", str(file))
    assert result.exit_code == exit_code
    assert "INTERRUPTED" in result.stdout
    written = read(file)
    assert not written.complete
    assert len(written.series["engine"]["total"]) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name):
    """On Python 3.10, too, where typing.get_type_hints hides what is annotated behind an Optional."""
    command = typer.main.get_command(bench_app).commands[name.strip("_")]
    assert [each.name for each in command.params if each.param_type_name == "option" and not each.help] == []
