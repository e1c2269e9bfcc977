"""Launching Triton kernels: on a GPU, in the interpreter, or on paper, to be compiled for a GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
"""Compute capability -> streaming multiprocessors of the chip that default tactics are made for."""

DEPENDENT_LAUNCH_FROM = 90
"""Compute capability from which a kernel may start before the one ahead of it has ended."""

DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


COMPILER_FAULTS = (CompilationError, OutOfResources, PTXASError)
"""What a kernel raises that does not fit the chip or cannot be compiled."""


@dataclass(frozen=True)
class Launch:
    """One kernel call. arguments: by parameter name, constexprs among them, PDL left out. cooperative: as launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    cooperative: bool = False

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a chip. Bytes of shared memory, registers per thread, bytes spilled per thread."""

    name: str
    arch: int
    shared: int
    registers: int
    spills: int
    threads: int
    constexprs: dict[str, Any] = field(compare=False)


_recorded: list[Launch] | None = None
_compile_only = False
_dependent = True


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, calls whose tensors are on the meta device are written down instead of run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@contextmanager
def compiling(threads: int) -> Iterator[None]:
    """Within, calls compile their kernels on so many threads and run nothing; at its end all are there.

    What cannot be compiled is left out: it raises when it is launched.
    """
    global _compile_only
    _compile_only = True
    try:
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _compile_only = False


@contextmanager
def without_dependent_launch() -> Iterator[None]:
    """Within, every kernel starts when the one before it has ended, to measure what the overlap buys."""
    global _dependent
    _dependent = False
    try:
        yield
    finally:
        _dependent = True


@lru_cache(maxsize=8)
def capability(device: torch.device) -> int:
    """90 for an H200."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 in the interpreter, which runs one program after the other, and on paper."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
    cooperative: bool = False,
) -> None:
    """Run kernel over grid. arguments: every parameter by name but PDL, which is true where the chip can do it.

    cooperative: all programs run at once, and may wait for each other; such a kernel has no dependent launch.

    A kernel with PDL calls gdc_wait() before it reads or writes what an earlier kernel may still use, and
    gdc_launch_dependents() once its own successor may start.
    """
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        assert _recorded is not None, "tensors on the meta device need recording()"
        _recorded.append(Launch(kernel, grid, arguments, warps, stages, cooperative))
        return
    if INTERPRETED:
        kernel[grid](**arguments, PDL=False)
        return
    dependent = _dependent and capability(device) >= DEPENDENT_LAUNCH_FROM and not cooperative
    options = _options(warps, stages, dependent, cooperative)
    if _compile_only:
        kernel.warmup(**arguments, PDL=dependent, grid=grid, **options)
        return
    kernel[grid](**arguments, PDL=dependent, **options)


def _options(warps: int, stages: int, dependent: bool, cooperative: bool) -> dict[str, Any]:
    options = {"num_warps": warps, "num_stages": stages}
    if dependent:
        options["launch_pdl"] = True
    if cooperative:
        options["launch_cooperative_grid"] = True
    return options


def variants(launches: list[Launch]) -> list[Launch]:
    """Those among them that compile to different code, in the order of their first appearance."""
    return list({_specialisation(call): call for call in launches}.values())


def compile_for(call: Launch, arch: int) -> Compiled:
    """Compile one call for a chip, at hand or not. Raises what Triton raises if the code cannot be compiled."""
    signature, constexprs, divisible = _signature(call, arch)
    names = list(signature)
    source = ASTSource(
        call.kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = _options(call.warps, call.stages, constexprs["PDL"], call.cooperative)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _resources(binary.asm["cubin"])
    return Compiled(call.name, arch, binary.metadata.shared, registers, spills, 32 * call.warps, constexprs)


def _specialisation(call: Launch) -> tuple[Any, ...]:
    signature, constexprs, divisible = _signature(call, 0)
    return (call.name, *signature.items(), *constexprs.items(), *divisible, call.warps, call.stages)


def _signature(call: Launch, arch: int) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Parameter -> type, the constexprs' values, and the parameters that are multiples of 16, as a launch has them."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible = []
    dependent = arch >= DEPENDENT_LAUNCH_FROM and not call.cooperative
    for parameter in call.kernel.params:
        name = parameter.name
        value = dependent if name == "PDL" else call.arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                divisible.append(name)
    return signature, constexprs, divisible


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes spilled, read from the binary by the cuobjdump that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump's report was not understood: {text}"
    return int(found[1]), int(found[2])
