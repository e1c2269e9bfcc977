"""Compiles what test modules record for chips that are not here.

That happens in a process of its own, since this one may have Triton's interpreter in the compiler's place. A module
offers `record_launches()`, which calls launchers on meta tensors, or `record_launches(arch)` where tactics depend on
the chip; its test hands its own name to `assert_compiles`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from dataclasses import asdict

from tests.support import ROOT

ARCHS = (89, 90, 120)
MAX_REGISTERS = 255


def assert_compiles(module: str) -> None:
    """Every variant that tests/kernels/<module>.py records fits the chip it is compiled for, and spills nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert {entry["arch"] for entry in compiled} == set(ARCHS)
    too_big = [
        entry
        for entry in compiled
        if entry["shared"] > entry["shared_limit"] or entry["spills"] > 0 or entry["registers"] > MAX_REGISTERS
    ]
    assert too_big == []


def main(module: str) -> None:
    from xr0_engine.kernels.arguments import SHARED_LIMIT
    from xr0_engine.kernels.launch import compile_for, recording, variants

    record = importlib.import_module(f"tests.kernels.{module}").record_launches
    compiled = []
    for arch in ARCHS:
        with recording() as launches:
            record(arch) if inspect.signature(record).parameters else record()
        compiled += [
            {**asdict(compile_for(call, arch)), "shared_limit": SHARED_LIMIT[arch]} for call in variants(launches)
        ]
    print(json.dumps(compiled, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
