"""What of xr0_engine._C this machine builds."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest


@pytest.mark.skipif(
    shutil.which("c++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="no C++ compiler or no Python headers: the package works without _C here",
)
def test_module_is_built_where_a_compiler_is_present():
    assert importlib.util.find_spec("xr0_engine._C") is not None
