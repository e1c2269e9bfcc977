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
    before, _dependent = _dependent, False
    try:
        yield
    finally:
        _dependent = before


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
    return list({_Signature(call).key: call for call in launches}.values())


def compile_for(call: Launch, arch: int) -> Compiled:
    """Compile one call for a chip, at hand or not. Raises what Triton raises if the code cannot be compiled."""
    signature = _Signature(call, arch >= DEPENDENT_LAUNCH_FROM and not call.cooperative)
    source = ASTSource(
        call.kernel,
        signature=signature.types,
        constexprs=signature.constants,
        attrs={place: [["tt.divisibility", 16]] for place in signature.divisible},
    )
    constexprs = signature.named_constants
    options = _options(call.warps, call.stages, constexprs["PDL"], call.cooperative)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _resources(binary.asm["cubin"])
    return Compiled(call.name, arch, binary.metadata.shared, registers, spills, 32 * call.warps, constexprs)


class _Signature:
    """A call's arguments, as a launch has them; the fields of a named tuple are arguments of their own.

    types: by parameter's name; of a named tuple, one of types. constants: what is compiled in, None and 1 among it, and
    divisible: the multiples of 16, both by the parameter's number, and the field's. named_constants: by the name alone.
    """

    def __init__(self, call: Launch, dependent: bool = False) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.named_constants: dict[str, Any] = {}
        self.divisible: list[tuple[int, ...]] = []
        self.types: dict[str, Any] = {}
        for index, parameter in enumerate(call.kernel.params):
            value = dependent if parameter.name == "PDL" else call.arguments[parameter.name]
            type_of = self._constant if parameter.is_constexpr else self._type
            self.types[parameter.name] = type_of((index,), parameter.name, value)
        self.key = (call.name, *self.types.items(), *self.constants.items(), *self.divisible, call.warps, call.stages)

    def _constant(self, place: tuple[int, ...], name: str, value: Any) -> str:
        self.constants[place] = value
        self.named_constants |= value._asdict() if hasattr(value, "_asdict") else {name: value}
        return "constexpr"

    def _type(self, place: tuple[int, ...], name: str, value: Any) -> Any:
        if value is None or (type(value) is int and value == 1):
            return self._constant(place, name, value)
        if hasattr(value, "_asdict"):
            fields = enumerate(value._asdict().items())
            return value._make([self._type((*place, index), *field) for index, field in fields])
        if isinstance(value, float):
            return "fp32"
        aligned = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
        if aligned % 16 == 0:
            self.divisible.append(place)
        return "*" + DTYPES[value.dtype] if isinstance(value, Tensor) else "i32"


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
