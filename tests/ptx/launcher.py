"""Launches of kernels.launch on CPU tensors: compiled by Triton for a chip, executed by the machine, reports raised.

A launch runs at once and alone. Within `stream` launches are queued instead and run together, as a GPU's stream would:
a dependent launch then really starts before its predecessor has ended.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx import machine
from tests.ptx.decoder import Program, decode
from tests.ptx.machine import LoadedProgram, Report
from tests.ptx.settings import Settings, cache_folder
from xr0_engine.kernels.launch import Launch, Signature, compile_call

ROOT = Path(__file__).resolve().parents[2]
DECODING = ("parser", "instructions", "transfers", "clusters", "decoder", "registers")
"""Modules that decoded programs depend on."""
POISON = 0xFF
HIDDEN_PARAMETER_BYTES = 16
"""Triton's own, behind a kernel's: addresses of scratch memory that no kernel of ours uses."""
MAP_ALIGNMENT, MAP_MAGIC = 64, 0x70616D74
MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""Of a tensor map, as cpp/abi.h has it. Other dtypes of one byte are 0."""
SHOWN = 12
"""Reports that an error tells; the rest are counted."""
WITHOUT_ACCESS = frozenset(f"aten::{name}" for name in ("empty", "empty_strided", "new_empty", "empty_like", "detach"))
"""What PyTorch does without looking at memory; views are told from the others by themselves."""


class EmulationError(RuntimeError):
    """What the machine reported of a launch, with the lines of the kernel's source. reports: as told."""

    def __init__(self, message: str, reports: Sequence[Report]) -> None:
        super().__init__(message)
        self.reports = tuple(reports)


@dataclass
class Totals:
    """What this process has executed; the times in seconds."""

    launches: int = 0
    instructions: int = 0
    matrix_products: int = 0
    compiling_s: float = 0.0
    decoding_s: float = 0.0
    running_s: float = 0.0


Boxes = Sequence[dict[str, Any]]
"""Of each tensor descriptor, in the order of the parameters: what the compiler made of its block, which TMA copies."""


@dataclass(frozen=True)
class Queued:
    """A launch that is ready to run, with the tensors that it may touch."""

    call: Launch
    grid: machine.Grid
    tensors: list[Tensor]
    scratch: list[Tensor]


totals = Totals()
altered: Callable[[str, str], str] | None = None
"""(kernel's name, its PTX) -> the PTX that runs instead: how the emulator itself is proven."""
_loaded: dict[tuple[Any, ...], tuple[LoadedProgram, int, Boxes]] = {}
_stream: Stream | None = None


def run(call: Launch, arch: int, dependent: bool) -> None:
    """Execute a call on CPU tensors by the code for a chip; dependent: it may start before the launch ahead has ended.

    Raises EmulationError for everything that the machine reports, NotImplementedError for PTX that it does not know.
    """
    queued = prepare(call, arch, dependent)
    if _stream is None:
        execute([queued], arch)
    else:
        _stream.add(queued, arch)


@contextmanager
def stream(window: int = 16) -> Iterator[Stream]:
    """Within, up to `window` launches run as one stream of grids that overlap; what is left runs at its end.

    Whatever PyTorch computes or reads in between waits for the launches before it. What it does not see, such as an
    array of NumPy that shares a tensor's memory, needs `flush` before it is looked at. Scratch memory is poisoned
    before a window alone, not between its launches.
    """
    global _stream
    assert _stream is None, "a stream inside a stream"
    _stream = Stream(window)
    try:
        with _Waiting(_stream):
            yield _stream
        _stream.flush()
    finally:
        _stream = None


class Stream:
    """Launches that have not run yet."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._queue: list[Queued] = []
        self._arch = 0

    def add(self, queued: Queued, arch: int) -> None:
        self._queue.append(queued)
        self._arch = arch
        if len(self._queue) >= self.window:
            self.flush()

    def flush(self) -> None:
        """Run all. Raises as run."""
        queue, self._queue = self._queue, []
        if queue:
            execute(queue, self._arch)


class _Waiting(TorchDispatchMode):
    """Lets the stream run before PyTorch touches memory."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name not in WITHOUT_ACCESS:
            self.stream.flush()
        return func(*args, **(kwargs or {}))


def prepare(call: Launch, arch: int, dependent: bool) -> Queued:
    """Compiled, decoded, its arguments packed."""
    signature = Signature(call, dependent)
    key = (arch, call.kernel, call.cooperative, altered, *signature.key)
    if key not in _loaded:
        begin = time.perf_counter()
        binary = compile_call(call, signature, arch)
        totals.compiling_s += time.perf_counter() - begin
        text = binary.asm["ptx"]
        _loaded[key] = (
            LoadedProgram(decoded(altered(call.name, text) if altered else text)), binary.metadata.shared,
            getattr(binary.metadata, "tensordesc_meta", None) or (),
        )  # fmt: skip
    loaded, shared, boxes = _loaded[key]
    program = loaded.program
    grid = machine.Grid(
        program=loaded,
        blocks=(*call.grid, 1, 1)[:3],
        cluster=(*program.cluster, 1, 1, 1)[:3],
        warps=-(-int(np.prod(program.threads)) // 32) if program.threads else call.warps,
        shared_bytes=shared + program.static_shared,
        parameters=_packed(signature, program, boxes),
        early=dependent,
        cooperative=call.cooperative,
    )
    given = [value.base if isinstance(value, TensorDescriptor) else value for _, _, value in signature.given]
    tensors = [value for value in given if isinstance(value, Tensor)]
    # Between launches, what is in the scratch memory of split sums is undefined.
    scratch = [value for name, _, value in signature.given if name == "partials"]
    return Queued(call, grid, [*tensors, *call.reached], scratch)


def decoded(text: str) -> Program:
    """The program of a PTX text, from the cache or into it."""
    begin = time.perf_counter()
    path = cache_folder() / f"program-{hashlib.sha256(_decoder_digest() + text.encode()).hexdigest()[:32]}.npz"
    if path.exists():
        with np.load(path) as arrays:
            program = Program.load(dict(arrays))
    else:
        program = decode(text)
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **program.save())
        part.replace(path)
    totals.decoding_s += time.perf_counter() - begin
    return program


_digest = b""


def _decoder_digest() -> bytes:
    global _digest
    if not _digest:
        own = Path(__file__).parent
        sources = [own / f"{name}.py" for name in DECODING] + [own / "cpp" / "abi.h"]
        _digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).digest()
    return _digest


def _packed(signature: Signature, program: Program, boxes: Boxes) -> bytes:
    """The parameters as the driver lays them out, each at a multiple of its size.

    Raises NotImplementedError for a tensor descriptor of a chip without TMA, where it is something else.
    """
    data, left = b"", iter(boxes)
    if not boxes and any(kind[0] == "t" for _, kind, _ in signature.given):
        raise NotImplementedError(f"{program.name}: a tensor descriptor without TMA")
    for _, kind, value in signature.given:
        for alignment, item in _descriptor(value, next(left)) if kind[0] == "t" else [_item(kind, value)]:
            data += bytes(-len(data) % alignment) + item
    hidden = program.parameter_bytes - (len(data) + 7) // 8 * 8
    assert 0 <= hidden <= HIDDEN_PARAMETER_BYTES, (program.name, program.parameter_bytes, len(data))
    return data.ljust(program.parameter_bytes, b"\0")


def _item(kind: str, value: Any) -> tuple[int, bytes]:
    """(alignment, bytes) of an argument."""
    if kind[0] == "*":
        return 8, struct.pack("<Q", value.data_ptr())
    return 4, struct.pack("<f" if kind == "fp32" else "<i", value)


def _descriptor(descriptor: TensorDescriptor, box: dict[str, Any]) -> list[tuple[int, bytes]]:
    """_item of what Triton makes of a tensor descriptor: TensorMap of cpp/abi.h, then its sizes and strides.

    Raises NotImplementedError for maps that are not of plain tiles.
    """
    if box["fp4_padded"] or box.get("is_im2col", False):
        raise NotImplementedError(f"a tensor map of {box}")
    element, rank = descriptor.base.element_size(), len(descriptor.shape)
    sizes, strides, block = (list(each)[::-1] for each in (descriptor.shape, descriptor.strides, box["block_size"]))
    bytes_apart = [element * stride for stride in strides[1:]]
    dtype = MAP_TYPES.get(descriptor.base.dtype, 0 if element == 1 else -1)
    encoded = struct.pack(
        "<5Q5I10HI4B40x", descriptor.base.data_ptr(), *_five(bytes_apart)[:4], *_five(sizes), *_five(block),
        *_five([1] * rank), MAP_MAGIC, rank, dtype, box["swizzle"], descriptor.padding == "nan",
    )  # fmt: skip
    numbers = [(4, struct.pack("<i", size)) for size in descriptor.shape]
    return [(MAP_ALIGNMENT, encoded), *numbers, *((8, struct.pack("<q", stride)) for stride in descriptor.strides)]


def _five(numbers: list[int]) -> list[int]:
    """Those of five dimensions, zero behind the last."""
    return numbers + [0] * (5 - len(numbers))


def execute(queue: Sequence[Queued], arch: int) -> None:
    """Run launches as one stream of grids. Raises EmulationError for what the machine reports."""
    settings = Settings.current()
    for queued in queue:
        for scratch in queued.scratch:
            ctypes.memset(scratch.data_ptr(), POISON, scratch.nbytes)
    ranges = _ranges([tensor for queued in queue for tensor in queued.tensors])
    begin = time.perf_counter()
    outcome = machine.run([queued.grid for queued in queue], ranges, settings)
    totals.running_s += time.perf_counter() - begin
    totals.launches += len(queue)
    totals.instructions += outcome.executed
    totals.matrix_products += outcome.matrix_products
    if outcome.reports or outcome.status != "finished":
        raise EmulationError(_told(queue, outcome, arch, settings), outcome.reports)


def _ranges(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The memory of tensors, from each one's first element to its last; what overlaps is one range."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted({_span(tensor) for tensor in tensors if tensor.numel()}):
        if merged and low < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _told(queue: Sequence[Queued], outcome: machine.Outcome, arch: int, settings: Settings) -> str:
    names = ", ".join(f"{queued.call.name}{queued.call.grid}" for queued in queue)
    lines = [f"{names} on sm_{arch}, {settings}: {outcome.status}, {len(outcome.reports)} reports"]
    for report in outcome.reports[:SHOWN]:
        times = f", {report.count} times" if report.count > 1 else ""
        lines.append(f"{report.kind}{times}: {report.text}")
        for word, line, grid in zip(("at", "after"), report.lines, report.grids, strict=True):
            if line:
                lines.append(f"  {word} {_where(queue[max(grid, 0)], line)}")
    if len(outcome.reports) > SHOWN:
        lines.append(f"and {len(outcome.reports) - SHOWN} more")
    return "\n".join(lines)


def _where(queued: Queued, line: int) -> str:
    frames = queued.grid.program.program.where(line)
    places = [f"{_shown(Path(file))}:{number}" for file, number in frames]
    return f"{', in '.join(places) or 'an unknown line'} ({queued.call.name}, PTX line {line})"


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
