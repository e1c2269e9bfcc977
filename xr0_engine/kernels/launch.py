"""Launching Triton kernels: on a GPU, in the interpreter or, as compiled code, in the emulator, all three on the spot;
or on paper, to be compiled for a GPU that is not there."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = {"": 0, "80": 80, "86": 86, "89": 89, "90": 90, "120": 120}.get(os.environ.get("XR0_EMULATE", ""), -1)
"""Compute capability of the chip whose code runs on the CPU, 0 for none. As env.py: emulated_arch."""
if EMULATED < 0:
    raise ValueError(f"XR0_EMULATE: expected 80, 86, 89, 90 or 120; got {os.environ['XR0_EMULATE']!r}")
if EMULATED and INTERPRETED:
    raise ValueError("XR0_EMULATE, TRITON_INTERPRET: expected one of them, got both; unset one")

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
L2_BYTES = {80: 40e6, 86: 6e6, 89: 72e6, 90: 50e6, 100: 126e6, 120: 96e6}
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


class PassesFailed(Exception):
    """Of the compiler, whose passes raise a RuntimeError like any other."""


COMPILER_FAULTS = (CompilationError, OutOfResources, PTXASError, PassesFailed)
"""What a kernel raises that does not fit the chip or cannot be compiled."""


@dataclass(frozen=True)
class Launch:
    """One kernel call. arguments: by parameter name, constexprs among them, PDL left out. The rest as launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    cooperative: bool = False
    reached: Sequence[Tensor] = ()

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a chip. Bytes of shared memory, registers per thread, bytes spilled per thread.

    constexprs: by parameter's name; of a function, its name.
    """

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
    """90 for an H200, and for the CPU that emulates one."""
    if device.type == "cpu" and EMULATED:
        return EMULATED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 in the interpreter, which runs one program after the other, and on paper."""
    if device.type == "cpu" and EMULATED:
        return _emulator().processors()
    return _multiprocessors(device) if device.type == "cuda" else 1


def l2_bytes(device: torch.device, arch: int) -> float:
    """Of a GPU's cache; elsewhere that of the largest one of its compute capability."""
    return _l2_bytes(device) if device.type == "cuda" else L2_BYTES[arch]


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=8)
def _l2_bytes(device: torch.device) -> float:
    return float(torch.cuda.get_device_properties(device).L2_cache_size)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
    cooperative: bool = False,
    reached: Sequence[Tensor] = (),
) -> None:
    """Run kernel over grid. arguments: every parameter by name but PDL, which is true where the chip can do it. A
    TensorDescriptor, which TMA reads, is an argument of its own and no field of a named tuple.

    cooperative: all programs run at once, and may wait for each other. reached: tensors that the kernel reaches through
    addresses in memory; what it is given is among its arguments.

    A kernel with PDL calls gdc_wait() before it reads or writes what an earlier kernel may still use, and
    gdc_launch_dependents() once its own successor may start.
    """
    device = next(_tensors(arguments.values())).device
    if device.type == "meta":
        assert _recorded is not None, "tensors on the meta device need recording()"
        _recorded.append(Launch(kernel, grid, arguments, warps, stages, cooperative, reached))
        return
    if INTERPRETED:
        kernel[grid](**arguments, PDL=False)
        return
    dependent = _dependent and capability(device) >= DEPENDENT_LAUNCH_FROM
    if EMULATED and device.type == "cpu":
        call = Launch(kernel, grid, arguments, warps, stages, cooperative, reached)
        _emulator().run(call, EMULATED, dependent)
        return
    options = _options(warps, stages, dependent, cooperative)
    # Triton takes the current GPU, whichever the tensors are on.
    with torch.cuda.device(device):
        try:
            if _compile_only:
                kernel.warmup(**arguments, PDL=dependent, grid=grid, **options)
            else:
                kernel[grid](**arguments, PDL=dependent, **options)
        except RuntimeError as error:
            raise_named(error)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments and in their named tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "_asdict"):
            yield from _tensors(value)


def _emulator() -> Any:
    """tests/ptx of the checkout that this file is in: the emulator is no part of an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "ptx" / "__init__.py").is_file():
        raise RuntimeError(f"XR0_EMULATE: the emulator is in tests/ptx of a checkout, and {root} is none; unset it")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("tests.ptx")


def _options(warps: int, stages: int, dependent: bool, cooperative: bool) -> dict[str, Any]:
    # Fused or not is chosen place by place, so that lanes that each add up the same row would not agree on its last
    # bit, and which lane's store stays is not defined: without it they agree, and what is stored is defined.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if dependent:
        options["launch_pdl"] = True
    if cooperative:
        options["launch_cooperative_grid"] = True
    return options


def variants(launches: list[Launch]) -> list[Launch]:
    """Those among them that compile to different code, in the order of their first appearance."""
    return list({Signature(call).key: call for call in launches}.values())


def compile_for(call: Launch, arch: int) -> Compiled:
    """Compile one call for a chip, at hand or not. Raises what Triton raises if the code cannot be compiled."""
    signature = Signature(call, arch >= DEPENDENT_LAUNCH_FROM)
    binary = compile_call(call, signature, arch)
    registers, spills = _resources(binary.asm["cubin"])
    named = signature.named_constants.items()
    constexprs = {name: value.__name__ if isinstance(value, triton.JITFunction) else value for name, value in named}
    return Compiled(call.name, arch, binary.metadata.shared, registers, spills, 32 * call.warps, constexprs)


def compile_call(call: Launch, signature: Signature, arch: int) -> Any:
    """Triton's compiled kernel, with asm and metadata."""
    # As a launch takes it: of Gluon another than of Triton.
    source = _source_of(call.kernel)(
        call.kernel,
        signature=signature.types,
        constexprs=signature.constants,
        attrs={place: [["tt.divisibility", 16]] for place in signature.divisible},
    )
    options = _options(call.warps, call.stages, signature.named_constants["PDL"], call.cooperative)
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except RuntimeError as error:
        raise_named(error)


def _source_of(kernel: Any) -> type[ASTSource]:
    return GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource


def raise_named(error: RuntimeError) -> NoReturn:
    """Raises PassesFailed for what the compiler's passes raise, else the error itself."""
    if "PassManager::run failed" in str(error):
        raise PassesFailed("the compiler failed") from error
    raise error


class Signature:
    """A call's arguments, as a launch has them; the fields of a named tuple are arguments of their own.

    types: by parameter's name; of a named tuple, one of types. constants: what is compiled in, None and 1 among it, and
    divisible: the multiples of 16, both by the parameter's number, and the field's. named_constants: by the name alone.
    given: what is left for the launch, one entry each: name, type, value.
    """

    def __init__(self, call: Launch, dependent: bool = False) -> None:
        self.constants: dict[tuple[int, ...], Any] = {}
        self.named_constants: dict[str, Any] = {}
        self.divisible: list[tuple[int, ...]] = []
        self.types: dict[str, Any] = {}
        self.given: list[tuple[str, str, Any]] = []
        for index, parameter in enumerate(call.kernel.params):
            value = dependent if parameter.name == "PDL" else call.arguments[parameter.name]
            type_of = self._constant if parameter.is_constexpr else self._type
            if parameter.do_not_specialize:
                type_of = self._as_it_is
            self.types[parameter.name] = type_of((index,), parameter.name, value)
        self.key = (call.name, *self.types.items(), *self.constants.items(), *self.divisible, call.warps, call.stages)

    def _constant(self, place: tuple[int, ...], name: str, value: Any) -> str:
        self.constants[place] = value
        self.named_constants |= value._asdict() if hasattr(value, "_asdict") else {name: value}
        return "constexpr"

    def _as_it_is(self, place: tuple[int, ...], name: str, value: int) -> str:
        self.given.append((name, "i32", value))
        return "i32"

    def _type(self, place: tuple[int, ...], name: str, value: Any) -> Any:
        if value is None or (type(value) is int and value == 1):
            return self._constant(place, name, value)
        if hasattr(value, "_asdict"):
            fields = enumerate(value._asdict().items())
            return value._make([self._type((*place, index), *field) for index, field in fields])
        if isinstance(value, TensorDescriptor | GluonTensorDescriptor):
            # Gluon's says how it lies in shared memory.
            layout = f",{value.layout!r}" if isinstance(value, GluonTensorDescriptor) else ""
            kind = f"tensordesc<{DTYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
            self.given.append((name, kind, value))
            return kind
        if isinstance(value, float):
            kind = "fp32"
        else:
            kind = "*" + DTYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            aligned = value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
            if aligned % 16 == 0:
                self.divisible.append(place)
        self.given.append((name, kind, value))
        return kind


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
