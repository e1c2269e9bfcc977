from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("triton")


def compile_step(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may have Triton's interpreter in the compiler's place."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "xr0_engine", "bench", "compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


@pytest.mark.parametrize("arch", [89, 90, 120], ids=lambda arch: f"sm_{arch}")
def test_every_kernel_of_the_published_model_fits_the_chip(arch):
    done = compile_step("--arch", str(arch), "--case", "bimanual", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["faults"] == []
    names = {kernel["name"].strip("_") for kernel in report["kernels"]}
    assert names >= {"wide", "whole_linear", "swiglu", "attention", "whole_attention", "euler_step", "embed"}
    assert all(0 < kernel["registers"] <= 255 and kernel["spills"] == 0 for kernel in report["kernels"])


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        (("--arch", "75"), {}, "arch: expected one of 80"),
        (("--arch", "89", "--dtype", "int4"), {}, "dtype: expected"),
        (("--arch", "89", "--size", "tiny"), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1 is set"),
    ],
    ids=["unknown chip", "unknown precision", "interpreter"],
)
def test_wrong_calls_are_one_line(arguments, environment, complaint):
    done = compile_step(*arguments, **environment)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
