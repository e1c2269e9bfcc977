"""What a user installs: the wheel, built from a source distribution and, without compiler and links, from a zip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xr0_engine"
LINKED = ("kernels", "export", "training", "bench")
NATIVE = f"xr0_engine/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "outputs", "tests")
SETUP = [
    sys.executable,
    "-c",
    "import setuptools.build_meta as backend, sys; getattr(backend, sys.argv[1])(sys.argv[2])",
]


def build(source: Path, kind: str, out: Path, **environment: str) -> Path:
    """Run the build backend in this environment, as pip would in one of its own; without CUDA, which adds no file."""
    out.mkdir()
    command = [*SETUP, f"build_{kind}", str(out)]
    environment = {**os.environ, "XR0_BUILD_CUDA": "0", **environment}
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this one, because a build leaves folders behind and packs what it finds in older ones."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_SOURCES)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """Names in the wheel that is built from the source distribution."""
    work = tmp_path_factory.mktemp("build")
    shutil.unpack_archive(build(checkout, "sdist", work / "sdist"), work / "unpacked")
    (unpacked,) = (work / "unpacked").iterdir()
    return names_in(build(unpacked, "wheel", work / "wheel"))


def package_files(pattern: str) -> set[str]:
    """Names that files of the package have in the wheel."""
    return {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob(pattern)}


def test_only_top_level_name_is_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"xr0_engine"}


def test_every_module_is_in_the_wheel(wheel):
    modules = package_files("*.py")
    assert "xr0_engine/kernels/reference.py" in modules
    assert modules - wheel == set()


def test_data_files_are_in_the_wheel(wheel):
    data = {"xr0_engine/py.typed", "xr0_engine/_C.pyi", *package_files("*.yaml")}
    assert "xr0_engine/robot/embodiments/libero.yaml" in data
    assert data - wheel == set()


def test_sources_of_the_native_module_are_not_in_the_wheel(wheel):
    assert {name for name in wheel if name.endswith((".cpp", ".h", "CMakeLists.txt"))} == set()


@pytest.mark.skipif(not (ROOT / NATIVE).exists(), reason="this machine did not build xr0_engine._C")
def test_native_module_is_in_the_wheel(wheel):
    assert NATIVE in wheel


def test_zip_of_the_sources_installs_without_compiler_and_links(checkout, wheel, tmp_path):
    """What a download of the sources unpacks to where links are not kept: small files that name their target."""
    source = tmp_path / "unpacked"
    shutil.copytree(checkout, source, symlinks=True)
    for name in LINKED:
        (source / name).unlink()
        (source / name).write_text(f"xr0_engine/{name}", encoding="utf-8")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "XR0_BUILD_CUDA": "0", "CXX": str(tmp_path / "no-compiler")}
    subprocess.run([*command, "--target", str(target), str(source)], env=environment, check=True, capture_output=True)
    installed = {path.relative_to(target).as_posix() for path in (target / "xr0_engine").rglob("*") if path.is_file()}
    assert {name for name in installed if not name.endswith(".pyc")} == {
        name for name in wheel - {NATIVE} if ".dist-info" not in name
    }
    shown = subprocess.run(
        [sys.executable, "-c", "import xr0_engine.bench.cases as cases; print(cases.__file__)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(shown.stdout.strip()).is_relative_to(target)


def test_licence_is_in_the_wheel(wheel):
    assert [name for name in wheel if name.endswith(".dist-info/licenses/LICENSE")]


@pytest.mark.parametrize("name", LINKED)
def test_part_is_linked_at_the_root(name):
    """So that the top level shows the parts. Nothing needs the links."""
    assert (ROOT / name).readlink() == Path("xr0_engine", name)


def test_no_link_inside_the_package():
    assert [path for path in PACKAGE.rglob("*") if path.is_symlink()] == []
