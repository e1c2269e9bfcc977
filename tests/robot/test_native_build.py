"""What of xr0_engine._C this machine builds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import ROOT

CAN_BUILD = shutil.which("c++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


@pytest.mark.skipif(not CAN_BUILD, reason="no C++ compiler or no Python headers: the package works without _C here")
def test_module_is_built_where_a_compiler_is_present():
    assert importlib.util.find_spec("xr0_engine._C") is not None


@pytest.mark.skipif(not CAN_BUILD, reason="no C++ compiler or no Python headers")
@pytest.mark.parametrize(
    ("asked", "message"),
    [("1", "XR0_BUILD_CUDA=1, but nvcc was not found"), ("yes", "expected auto, 0 or 1; got 'yes'")],
)
def test_cuda_that_cannot_be_built_is_an_error(asked, message, tmp_path):
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"],
        cwd=ROOT,
        env={**os.environ, "XR0_BUILD_CUDA": asked, "CUDACXX": str(tmp_path / "no-nvcc")},
        capture_output=True,
        text=True,
    )
    assert build.returncode != 0
    assert message in " ".join(build.stderr.split())
