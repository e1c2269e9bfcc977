"""Names at the package's root where a package that they need is missing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import xr0_engine
from tests.support import ROOT

IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}


def tried(lines: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def without(module: str, name: str) -> str:
    """The error of importing a name where there is no such module."""
    return tried(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise ModuleNotFoundError('No module named ' + name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"try:\n    from xr0_engine import {name}\n"
        "except ModuleNotFoundError as error:\n    print(error.name, error)\n"
    )


def test_engine_names_the_extra_that_brings_torch():
    told = without("torch", "Engine")
    assert told.startswith("torch xr0_engine.Engine needs torch, which is not installed: ")
    assert "pip install 'xr0-engine[cpu]', or 'xr0-engine[cuda]'" in told


@pytest.mark.parametrize(
    ("module", "name"), [("websockets", "Client"), ("msgpack", "AsyncClient"), ("yaml", "load_embodiment")]
)
def test_what_comes_with_the_package_is_named_too(module, name):
    assert f"xr0_engine.{name} needs {module}, which is not installed: pip install xr0-engine" in without(module, name)


@pytest.mark.parametrize("name", ["Client", "AsyncClient", "Observation", "load_embodiment", "ModelConfig"])
def test_a_robot_needs_no_torch(name):
    assert without("torch", name) == ""


def test_what_torch_itself_lacks_is_its_own_affair(tmp_path):
    """An installation of torch that is broken, not missing."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import torch._C_of_another_machine\n")
    told = tried(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    from xr0_engine import Engine\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    assert told == "No module named 'torch._C_of_another_machine'\n"


def test_every_package_that_comes_along_is_known():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    packages = [re.match(r"[\w-]+", entry)[0] for entry in re.findall(r'"(.*?)"', listed)]
    assert {IMPORTED_AS.get(package, package) for package in packages} == xr0_engine._INSTALLED_BY.keys() - {"torch"}
