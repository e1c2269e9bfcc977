"""What others measured and published of comparable kernels, for the model to be held against.

used: the point gave one of the figures in figures.py, so that it says nothing new. The others were held back: nothing
in figures.py was chosen by them. One thing in the model was, after a first look: a kernel's own time, as profilers tell
it, holds the start that an empty kernel has too. A library's tiles are not known: the best of ours stand in for them.
"""

from __future__ import annotations

from dataclasses import dataclass

TERA = 1e12


@dataclass(frozen=True)
class Product:
    """rows x inputs times inputs x outputs, copies of it in one launch. us: published microseconds. bytes: of an
    element of a factor. cold: nothing is in L2 before."""

    chip: str
    by: str
    rows: int
    outputs: int
    inputs: int
    us: float
    source: str
    copies: int = 1
    bytes: int = 2
    cold: bool = False
    used: bool = False

    @property
    def what(self) -> str:
        copies = f"{self.copies} x " if self.copies > 1 else ""
        return f"{self.by} {copies}{self.rows}x{self.outputs}x{self.inputs}"


@dataclass(frozen=True)
class Peer:
    """A whole step of pi0 by Dexmal's Triton kernels in one CUDA graph: ten flow steps, a chunk of 63, no prompt."""

    chip: str
    views: int
    us: float
    source: str = "Dexmal/realtime-vla, README"
    used: bool = False

    @property
    def what(self) -> str:
        return f"pi0, {self.views} views, Triton"


def _rate(rows: int, outputs: int, inputs: int, tera: float) -> float:
    return 2e6 * rows * outputs * inputs / (tera * TERA)


_DEEPGEMM = "DeepGEMM README of March 2025 (H800, FP8)"
_GEMV = "tile-ai/TileOPs pull request 243"
_TRITON, _MLI, _TORCH = (
    "triton-lang/triton issue 6523",
    "mli/transformers-benchmarks issue 4",
    "torch data pull request 15",
)

PRODUCTS = (
    *(
        Product("h100", "DeepGEMM", m, n, k, _rate(m, n, k, tera), _DEEPGEMM, bytes=1, cold=True)
        for m, n, k, tera in (
            (64, 2112, 7168, 206), (64, 24576, 1536, 289), (64, 32768, 512, 219), (64, 7168, 16384, 336),
            (64, 4096, 7168, 287), (64, 7168, 2048, 295), (128, 2112, 7168, 352), (128, 24576, 1536, 535),
            (128, 7168, 16384, 645), (128, 4096, 7168, 533), (128, 7168, 2048, 510),
        )
    ),
    *(
        Product("h200", "GEMV", 1, n, k, 2e6 * n * k / (tera * TERA), _GEMV, cold=True, used=n == 57344)
        for n, k, tera in (
            (1024, 1024, 0.54), (7168, 16384, 3.47), (18432, 7168, 3.80), (28672, 8192, 4.02), (57344, 7168, 4.26)
        )
    ),
    Product("h200", "cuBLAS", 1024, 1024, 1024, 6.2, "tile-ai/TileOPs pull request 2110", cold=True),
    *(
        Product("h200", "cuBLAS, batched", m, m, m, us, "tile-ai/TileOPs pull request 2148", copies=batch, cold=True)
        for batch, m, us in ((8, 128, 3.2), (16, 512, 11.9), (8, 1024, 30.7))
    ),
    *(
        Product("a100", "cuBLAS", n, n, n, _rate(n, n, n, tera), _TRITON, cold=True)
        for n, tera in ((1024, 77.67), (2048, 143.4), (2560, 161.4), (2944, 176.1))
    ),
    *(
        Product("rtx4090", "cuBLAS", n, n, n, _rate(n, n, n, tera), source)
        for n, tera, source in (
            (512, 46.89, _MLI), (2040, 155.9, "pytorch/pytorch issue 181718"), (2048, 167.1, _MLI), (8192, 158.6, _MLI)
        )
    ),
    *(
        Product("rtx5090", "cuBLAS", n, n, n, _rate(n, n, n, tera), _TORCH, used=n == 8192)
        for n, tera in ((1024, 93.6), (2048, 173.9), (4096, 183.7), (8192, 236.0))
    ),
    Product("b200", "cuBLASLt", 272, 14336, 4096, 35.9, "vllm-project/vllm issue 35467"),
)  # fmt: skip

PEERS = tuple(
    Peer(chip, views, 1e3 * ms)
    for chip, found in (("rtx4090", (20.0, 27.3, 36.8)), ("rtx5090", (17.6, 24.0, 31.9)))
    for views, ms in zip((1, 2, 3), found, strict=True)
)


def pi0(views: int) -> list[tuple[str, tuple[int, ...], int]]:
    """(kind, shape, launches) of a step of pi0: SigLIP So400m, Gemma 2B, an action expert of 300M."""
    rows, tokens = 256 * views, 64
    return [
        ("linear", (rows, 1152, 588), 1),
        ("linear", (rows, 3456, 1152), 27),
        ("attention", (views, 16, 256, 16, 256, 80), 27),
        ("linear", (rows, 1152, 1152), 27),
        ("linear", (rows, 4304, 1152), 27),
        ("linear", (rows, 1152, 4304), 27),
        ("linear", (rows, 2048, 1152), 1),
        ("qkv", (rows, 2560, 2048, 256), 18),
        ("attention", (1, 8, rows, 1, rows, 256), 18),
        ("linear", (rows, 2048, 2048), 18),
        ("swiglu", (rows, 32768, 2048), 18),
        ("linear", (rows, 2048, 16384), 18),
        ("qkv", (tokens, 2560, 1024, 256), 180),
        ("lambda_attention", (1, 8, tokens, 1, rows, 256), 180),
        ("linear", (tokens, 1024, 2048), 180),
        ("swiglu", (tokens, 8192, 1024), 180),
        ("linear", (tokens, 1024, 4096), 180),
    ]


POINTS: tuple[Product | Peer, ...] = (*PRODUCTS, *PEERS)
