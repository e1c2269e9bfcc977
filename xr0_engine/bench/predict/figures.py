"""Figures of chips that the prediction goes by, each a range with its public source.

What no source states is an assumption and begins with that word. Sources by name:

datasheet: NVIDIA's datasheet or architecture whitepaper of the chip.
dissecting: "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499 (latencies in cycles of
    RTX 4090, A100 and H100; mma.sync reaches 62.9 % of an H100's peak, wgmma wants N of at least 64).
blackwell: "Dissecting the NVIDIA Blackwell Architecture with Microbenchmarks", arXiv 2507.10789 (an RTX 5080).
h100 study: "CUDA Performance Study - NVIDIA H100 SXM5", a public repository (1.98 GHz under light load; L2 131 ns,
    memory 288 ns; copies within L2 at 3.6 TB/s).
microbenchmark: smallscientist1/cuda_microbenchmark on GitHub (L2 of an RTX 4090: cp.async 1946 B a cycle; of an A100:
    2560 B a cycle, 3840 by cp.async).
no bubbles: "Look Ma, No Bubbles!", hazyresearch.stanford.edu, May 2025 (a launch in a CUDA graph on an H100: 1.3 us).
ocannl: ahrefs/ocannl issue 488 (an RTX 5070 Ti's graph: 0.58 us a node of kernels that do nothing).
tileops: tile-ai/TileOPs pull request 243 (an H200 streams a weight at 4.26 of 4.8 TB/s).
realtime-vla: Dexmal/realtime-vla (an RTX 4090 boosts to 2.79 GHz).
torch data: zzc0721/torch-performance-test-data pull request 15 (an RTX 5090's 8192^3 product in bfloat16: 236 TFLOP/s).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from xr0_engine.bench.step.ceilings import CHIPS as CEILINGS
from xr0_engine.bench.step.ceilings import Ceilings
from xr0_engine.fused.ops import SHARED_LIMIT

KIB, TERA, MICRO = 1024, 1e12, 1e-6


class Range(NamedTuple):
    """low and high are the ends of what sources say or what is assumed, not a chip's best and worst."""

    low: float
    central: float
    high: float
    source: str

    def scaled(self, factor: float) -> Range:
        return Range(self.low * factor, self.central * factor, self.high * factor, self.source)


@dataclass(frozen=True)
class Figures:
    """What a launch's time depends on.

    clock_hz: of the processors. memory_bytes_s: what streams reach. l2_bytes_cycle: from L2 to all processors,
    processor_bytes_cycle: to one. l2_cycles, memory_cycles: from a load to its data. mma_share: of the peak that the
    main loop of a good kernel keeps up; sync_share: of that what mma.sync reaches. launch_s: from the end of a kernel
    to the start of the next in a graph; dependent_s: the same where the next already waits. barrier_trips,
    atomic_trips: L2 latencies that a barrier of the grid and an atomic with its fence take. issue_share: of a
    scheduler's slots that one warp fills. overlap_power: p of the norm by which the times of what runs at once are
    joined: 1 adds them up, infinity takes the longest.
    """

    clock_hz: Range
    memory_bytes_s: Range
    l2_bytes_cycle: Range
    processor_bytes_cycle: Range
    l2_cycles: Range
    memory_cycles: Range
    mma_share: Range
    sync_share: Range
    launch_s: Range
    dependent_s: Range
    barrier_trips: Range
    atomic_trips: Range
    issue_share: Range
    overlap_power: Range


@dataclass(frozen=True)
class Chip:
    """processors: streaming multiprocessors. mma_cycle: operations (a multiplication and an addition are two) of 16-bit
    factors, summed in float32, of a processor in a cycle; l2_bytes: size. shared_bytes, threads: of a processor.
    """

    name: str
    arch: int
    processors: int
    mma_cycle: int
    l2_bytes: float
    figures: Figures

    @property
    def shared_bytes(self) -> int:
        """Each block takes RESERVED_SHARED of it beside its own."""
        return SHARED_LIMIT[self.arch] + RESERVED_SHARED

    @property
    def threads(self) -> int:
        return 1536 if self.arch in (86, 89, 120) else 2048

    @property
    def ceilings(self) -> Ceilings:
        """What bounds are computed with, as `xr0 bench roofline` does."""
        return CEILINGS.get(self.name) or Ceilings(
            self.name,
            dict.fromkeys(("bfloat16", "float16"), self.mma_cycle * self.processors * self.figures.clock_hz.central),
            self.figures.memory_bytes_s.high,
            "datasheet",
        )

    def settings(self) -> list[dict[str, float]]:
        """All figures at their centre, then each alone at one end, then at the other."""
        ranges = {field.name: getattr(self.figures, field.name) for field in fields(Figures)}
        centre = {name: found.central for name, found in ranges.items()}
        ends = [(name, end) for name, found in ranges.items() for end in (found.low, found.high)]
        return [centre, *(centre | {name: end} for name, end in ends)]


RESERVED_SHARED = 1024
REGISTERS, BLOCKS = 64 * KIB, 32
"""Of a processor, all chips."""

PORT = Range(48, 60, 64, "datasheet of the A100: 64 B a cycle; assumption: what a kernel reaches of it")
HOPPER_L2 = Range(2560, 3840, 5120, "assumption: as an A100, 2560 to 3840 (microbenchmark), 5120 (datasheet)")
MMA_SHARE = Range(0.80, 0.90, 0.97, "assumption; an RTX 4090's libraries reach 0.95 to 1.0 of the datasheet at 8192^3")
ALL_SYNC = Range(1.0, 1.0, 1.0, "datasheet: mma.sync is what the chip has")
BARRIER = Range(3.0, 4.5, 7.0, "assumption: an arrival, a fence, polls that find it, and the spread of the arrivals")
ATOMIC = Range(1.5, 2.2, 3.5, "assumption: a fence after the stores, then the atomic's way and back")
ISSUE = Range(0.25, 0.40, 0.60, "assumption: dependences between a warp's own instructions")
OVERLAP = Range(2.0, 4.0, 16.0, "assumption")
DEPENDENT = Range(0.30, 0.60, 1.00, "assumption; flashinfer pull request 2070: 0.44 us less than without").scaled(MICRO)
GRAPH_HOPPER = Range(0.90, 1.30, 1.60, "no bubbles").scaled(MICRO)
GRAPH = Range(0.58, 1.10, 1.60, "ocannl, no bubbles; assumption for this chip").scaled(MICRO)


def _memory(tera: float, low: float, central: float, high: float, source: str) -> Range:
    """Shares of the datasheet's rate."""
    return Range(low, central, high, source).scaled(tera * TERA)


def _chip(
    name: str, arch: int, processors: int, mma_cycle: int, l2_mb: float, clock_ghz: Range, memory: Range, l2: Range,
    l2_cycles: Range, memory_cycles: Range, sync: Range = ALL_SYNC, graph: Range = GRAPH,
) -> Chip:  # fmt: skip
    figures = Figures(
        clock_ghz.scaled(1e9), memory, l2, PORT, l2_cycles, memory_cycles, MMA_SHARE, sync, graph, DEPENDENT, BARRIER,
        ATOMIC, ISSUE, OVERLAP,
    )  # fmt: skip
    return Chip(name, arch, processors, mma_cycle, l2_mb * 1e6, figures)


_HOPPER_CLOCK = Range(1.50, 1.83, 1.98, "datasheet: 989 TFLOP/s at 1.83 GHz; h100 study; assumption: low")
_HOPPER_SYNC = Range(0.55, 0.63, 0.70, "dissecting")
_HOPPER_TRIPS = Range(240, 262, 330, "dissecting, h100 study; assumption: high from the far half")
_HOPPER_MEMORY = Range(479, 570, 700, "dissecting (PCIe), h100 study; assumption: high under load")
_ADA_TRIPS = Range(222, 273, 339, "dissecting; the spread over an L40's processors, arXiv 2606.22588")
_ADA_MEMORY = Range(541, 600, 750, "dissecting; assumption: under load")

CHIPS = {
    chip.name: chip
    for chip in (
        _chip(
            "a100", 80, 108, 2048, 40, Range(1.28, 1.41, 1.41, "datasheet"),
            _memory(2.039, 0.82, 0.88, 0.92, "datasheet; mli/transformers-benchmarks issue 4: an A800 at 0.89"),
            Range(2560, 3840, 5120, "microbenchmark, datasheet"), Range(212, 262, 330, "dissecting"),
            Range(466, 520, 650, "dissecting; assumption: under load"),
        ),
        _chip(
            "rtx3090", 86, 82, 512, 6, Range(1.40, 1.70, 1.90, "datasheet: 1.70; assumption: ends"),
            _memory(0.936, 0.86, 0.92, 0.95, "datasheet; llama.cpp pull request 15131: a 3090 Ti at 0.94"),
            Range(768, 1152, 1536, "assumption: 48 slices, 16 to 32 B"), Range(220, 260, 320, "assumption: an A100's"),
            Range(500, 600, 750, "assumption"),
        ),
        _chip(
            "rtx4090", 89, 128, 512, 72, Range(2.40, 2.52, 2.79, "datasheet: 2.52; realtime-vla: 2.79"),
            _memory(1.008, 0.86, 0.914, 0.93, "datasheet; xytpai/nvbench: 0.92 TB/s read"),
            Range(1536, 1946, 2100, "microbenchmark"), _ADA_TRIPS, _ADA_MEMORY,
        ),
        _chip(
            "l40s", 89, 142, 1024, 96, Range(2.10, 2.40, 2.52, "datasheet: 2.52; assumption: less under its 350 W"),
            _memory(0.864, 0.80, 0.87, 0.91, "datasheet; assumption: with error correction"),
            Range(1536, 1946, 2100, "assumption: as an RTX 4090"), _ADA_TRIPS, _ADA_MEMORY,
        ),
        _chip(
            "h100", 90, 132, 4096, 50, _HOPPER_CLOCK, _memory(3.35, 0.80, 0.89, 0.93, "datasheet; share: tileops"),
            HOPPER_L2, _HOPPER_TRIPS, _HOPPER_MEMORY, _HOPPER_SYNC, GRAPH_HOPPER,
        ),
        _chip(
            "h200", 90, 132, 4096, 50, _HOPPER_CLOCK, _memory(4.8, 0.80, 0.89, 0.92, "datasheet; tileops"),
            HOPPER_L2, _HOPPER_TRIPS, _HOPPER_MEMORY, _HOPPER_SYNC, GRAPH_HOPPER,
        ),
        _chip(
            "b200", 100, 148, 8192, 126, Range(1.60, 1.85, 1.965, "datasheet: 2250 TFLOP/s at 1.85; assumption: ends"),
            _memory(8.0, 0.78, 0.87, 0.92, "datasheet; assumption: share"),
            Range(3840, 5700, 9000, "assumption: as an H100, by processors, to twice"),
            Range(262, 330, 420, "assumption"), Range(570, 750, 950, "assumption"),
            Range(0.20, 0.30, 0.50, "assumption: mma.sync as an H100's"), GRAPH_HOPPER,
        ),
        _chip(
            "rtx5090", 120, 170, 512, 96, Range(2.407, 2.60, 2.80, "datasheet; torch data: at least 2.71"),
            _memory(1.792, 0.83, 0.90, 0.93, "datasheet; assumption: share"),
            Range(1946, 2580, 2800, "assumption: as an RTX 4090, by processors"),
            Range(273, 320, 358, "dissecting (Ada), blackwell"), Range(600, 750, 877, "dissecting (Ada), blackwell"),
        ),
    )
}  # fmt: skip


def find_chip(name: str) -> Chip:
    """Raises ValueError for a chip that is not in CHIPS."""
    if name not in CHIPS:
        raise ValueError(f"chip: expected {', '.join(CHIPS)}; got {name!r}")
    return CHIPS[name]
