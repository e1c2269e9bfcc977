"""Small programs for the machine, written as PTX: their arrays, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from tests.ptx import machine
from tests.ptx.decoder import decode
from tests.ptx.machine import Grid, LoadedProgram, Outcome
from tests.ptx.settings import Settings

SETTINGS = Settings(
    seed=1, asynchronous="waited", processors=8, resident=16, quantum=50, check="all", budget=1 << 22
)  # fmt: skip
LANES = 32
SEEDS = range(6)

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry kernel({parameters})
{{
.reg .pred %p<32>;
.reg .b16 %h<64>;
.reg .b32 %r<512>;
.reg .b64 %d<64>;
{loads}
{body}
ret;
}}
"""


@cache
def program(body: str, arrays: int) -> LoadedProgram:
    """Of a body in which %d0, %d1, ... hold the arrays' addresses, %r0 the thread, %r1 the block, %r2 the lane, and %r3
    the thread within the grid."""
    parameters = ", ".join(f".param .u64 array{index}" for index in range(arrays))
    loads = [f"ld.param.b64 %d{index}, [array{index}];" for index in range(arrays)]
    loads += ["mov.u32 %r0, %tid.x;", "mov.u32 %r1, %ctaid.x;", "mov.u32 %r2, %laneid;", "mov.u32 %r3, %ntid.x;"]
    loads += ["mad.lo.s32 %r3, %r1, %r3, %r0;"]
    return LoadedProgram(decode(HEAD.format(parameters=parameters, loads="\n".join(loads), body=body)))


def grid(
    body: str, *arrays: np.ndarray, blocks: int = 1, warps: int = 1, shared: int = 0, cluster: int = 1,
    early: bool = False, cooperative: bool = False,
) -> Grid:  # fmt: skip
    """One launch of a body on these arrays, which it may change."""
    assert all(array.flags.c_contiguous for array in arrays), "the machine reads arrays row by row"
    addresses = b"".join(array.ctypes.data.to_bytes(8, "little") for array in arrays)
    return Grid(
        program(body, len(arrays)), (blocks, 1, 1), (cluster, 1, 1), warps, shared, addresses, early, cooperative
    )  # fmt: skip


def run(grids: Sequence[Grid], arrays: Sequence[np.ndarray], settings: Settings = SETTINGS) -> Outcome:
    """The grids as one stream."""
    ranges = sorted({(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays if array.nbytes})
    return machine.run(grids, ranges, settings)


def execute(body: str, *arrays: np.ndarray, settings: Settings = SETTINGS, **launch: int) -> Outcome:
    """One launch."""
    return run([grid(body, *arrays, **launch)], arrays, settings)


def kinds(outcome: Outcome) -> set[str]:
    return {report.kind for report in outcome.reports}


def compute(body: str, *arrays: np.ndarray, **launch: int) -> None:
    """One launch that must be free of faults."""
    outcome = execute(body, *arrays, **launch)
    assert outcome.status == "finished", outcome
    assert not outcome.reports, outcome.reports


def place(array: int, size: int, register: str = "%d60") -> str:
    """The address of this thread's element of an array, in a register."""
    return f"mad.wide.u32 {register}, %r3, {size}, %d{array};"


def lanewise(instruction: str, sources: Sequence[np.ndarray], result: np.dtype | type) -> np.ndarray:
    """An instruction on each element: its sources are {a}, {b}, {c}, {e} in it, its result {d}.

    sources: of one length, a multiple of 32; their items' sizes, and the result's, say which registers they take.
    """
    out = np.zeros(len(sources[0]), result)
    registers = dict(
        zip("abce", (_register(each.dtype.itemsize, 10 + n) for n, each in enumerate(sources)), strict=False)
    )
    registers["d"] = _register(out.itemsize, 9)
    lines = []
    for index, source in enumerate(sources):
        size = source.dtype.itemsize
        lines += [place(index, size), f"ld.global.b{8 * size} {_register(size, 10 + index)}, [%d60];"]
    lines += [instruction.format(**registers), place(len(sources), out.itemsize)]
    lines += [f"st.global.b{8 * out.itemsize} [%d60], {registers['d']};"]
    compute("\n".join(lines), *sources, out, blocks=len(out) // LANES)
    return out


def _register(size: int, number: int) -> str:
    return f"%{ {8: 'd', 4: 'r', 2: 'h', 1: 'h'}[size] }{number}"


def spread(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every combination of the sources' values, and the first ones again up to a multiple of 32."""
    grids = [each.ravel() for each in np.meshgrid(*values, indexing="ij")]
    length = -(-len(grids[0]) // LANES) * LANES
    return [np.ascontiguousarray(np.resize(each, length)) for each in grids]
