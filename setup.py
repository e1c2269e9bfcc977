"""Only the native module xr0_engine._C; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()
# The tools of the build requirements, which need not be on PATH, rather than those of the system.
CMAKE = str(Path(cmake.CMAKE_BIN_DIR, "cmake"))
NINJA = str(Path(ninja.BIN_DIR, "ninja"))


class CMakeBuild(build_ext):
    """Builds an extension with CMake. A CMake or compiler error stops the installation."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        # Fresh: the cache of an earlier build may name tools of a build environment that is gone.
        configure = [CMAKE, "--fresh", "--no-warn-unused-cli", "-G", "Ninja", "-S", str(SOURCE), "-B", str(build)]
        options = {
            "CMAKE_MAKE_PROGRAM": NINJA,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": module.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        # XR0_BUILD_CUDA: auto (where nvcc is found), 0 or 1. XR0_CUDA_ARCHS: for example "89;90".
        options |= {name: os.environ[name] for name in ("XR0_BUILD_CUDA", "XR0_CUDA_ARCHS") if name in os.environ}
        subprocess.run([*configure, *(f"-D{name}={value}" for name, value in options.items())], check=True)
        subprocess.run([CMAKE, "--build", str(build)], check=True)
        if not module.exists():
            self.warn(
                "xr0_engine._C was not built (reason above); preprocessing uses NumPy instead. To get it, install "
                "a C++17 compiler and Python's headers, then xr0-engine again (Debian: apt-get install g++ python3-dev)"
            )


# Optional: setuptools then accepts that a machine without a compiler yields no file.
setup(ext_modules=[Extension("xr0_engine._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
