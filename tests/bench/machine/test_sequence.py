"""The real sequence, from the command to the page: on the emulator, without optional packages, without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import GOLDEN, ROOT
from xr0_engine.bench import results
from xr0_engine.bench.machine import state

OPTIONAL = ("transformers", "huggingface_hub", "tensorboard", "matplotlib", "av", "pyarrow", "websockets", "msgpack")
"""What a machine may lack that has torch, triton and what they and the command line need."""
BLOCKER = f"""
import socket, sys
from importlib.machinery import PathFinder

class Refusing(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else super().find_spec(name, path, target)

sys.meta_path[:] = [Refusing if each is PathFinder else each for each in sys.meta_path]

def refuse(*arguments):
    raise OSError("no network here")

socket.socket.connect = socket.getaddrinfo = refuse
"""


def machine(folder: Path, *options: str, minutes: float = 60) -> str:
    """Exit code 0, in a process of its own that finds no optional packages and no network; what it printed."""
    blocker = folder.parent / "without"
    blocker.mkdir(exist_ok=True)
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(blocker), str(ROOT))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xr0_engine", "bench", "machine", "--emulate", "90", "--out", str(folder)]
    done = subprocess.run(
        [*command, "--minutes", str(minutes), *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def golden(tmp_path):
    """One case."""
    if not GOLDEN.is_dir():
        pytest.skip(f"the golden cases are not at {GOLDEN}")
    folder = tmp_path / "golden"
    folder.mkdir()
    for name in ("grouped.json", "grouped.weights.safetensors", "grouped.prefix1.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)
    return folder


def test_the_sequence_runs_to_its_page_and_goes_on_where_it_was(tmp_path, golden):
    pytest.importorskip("triton")
    out = tmp_path / "out"
    first = machine(out, "--golden", str(golden), "--only", "doctor,memory-reference")
    assert "doctor (at most" in first
    left = state.read(out)
    assert {name for name, each in left.ended.items() if each.verdict == "passed"} == {"doctor", "memory-reference"}
    assert left.ended["released-libero"].reason == "not asked for (--only)"

    second = machine(out, "--golden", str(golden), "--only", "machine,golden-chained,memory")
    assert "doctor (at most" not in second
    assert "golden-chained (at most" in second
    compared = state.printed(out / state.RESULTS / "golden-chained.json")
    assert {each["quantity"] for each in compared} >= {"vision tokens", "KV block", "actions, one step"}
    assert all(each["passed"] and "relative RMS" in each["measure"] for each in compared)

    (memory,) = (result for name, result in state.results_of(out) if name == "memory-reference.json")
    assert memory.emulated == "sm_90"
    assert memory.command.startswith("xr0 bench latency --size tiny --device cpu")
    assert str(tmp_path) not in json.dumps(results.asdict(memory))
    facts = state.printed(out / state.FACTS)
    assert facts["emulated"] == 90
    assert not any(facts["optional"].values())
    html = (out / state.PAGE).read_text()
    assert "<strong>EMULATED</strong>" in html
    assert "not installed" in html
    for file in out.rglob("*"):
        if file.is_file() and file.name != ".lock":
            assert str(tmp_path) not in file.read_text(), file
