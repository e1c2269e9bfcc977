"""What a chip can do at most: by its datasheet, as measured by others, or as measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from xr0_engine.backend import DTYPES
from xr0_engine.bench.cases import Setup
from xr0_engine.kernels import reference

COPIED_BYTES = 2**28
"""Of the copy that measures bandwidth: eight times the largest cache of a common CPU."""
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
ROUNDS = 5
HERE = "here"
"""In place of a chip's name: measure this machine."""


@dataclass(frozen=True)
class Ceilings:
    """What a chip can do at most.

    operations_s: dtype -> operations per second, dense, accumulated in float32 (int32 for int8); bytes_s: memory
    bandwidth; source: datasheet or measured.
    """

    name: str
    operations_s: Mapping[str, float]
    bytes_s: float
    source: str

    def peak(self, dtype: str) -> float:
        """Raises ValueError for a dtype whose peak is not known here."""
        if dtype not in self.operations_s:
            known = ", ".join(self.operations_s)
            raise ValueError(f"dtype: the ceilings of {self.name} are known for {known}; got {dtype!r}")
        return self.operations_s[dtype]


def _chip(name: str, tera_bytes: float, source: str, half: float, **others: float) -> Ceilings:
    """half: bfloat16 and float16, whose peaks are equal; others: dtype -> tera-operations per second."""
    tera = {"bfloat16": half, "float16": half, **others}
    return Ceilings(name, {dtype: 1e12 * rate for dtype, rate in tera.items()}, 1e12 * tera_bytes, source)


CHIPS = {
    chip.name: chip
    for chip in (
        _chip("a100", 2.039, "datasheet", 312, int8=624),
        _chip("h100", 3.35, "datasheet", 989, fp8=1979, int8=1979),
        _chip("h200", 4.3, "measured", 790),
        _chip("l40s", 0.864, "datasheet", 362, fp8=733, int8=733),
        _chip("rtx4090", 1.0, "datasheet", 165, fp8=330, int8=660),
        _chip("rtx5090", 1.792, "datasheet", 209, fp8=419, int8=838),
    )
}
"""SXM modules with 80 GB (a100, h100) and 141 GB (h200)."""


def measure_ceilings(device: torch.device, *dtypes: str) -> Ceilings:
    """What this machine reaches with the libraries at hand: a copy larger than its caches, a large square product.

    dtypes: of bfloat16, float16, float32 and int8. The best of some rounds, since a ceiling is looked for. Not yet
    measured on a GPU. Raises ValueError for a dtype that torch cannot multiply everywhere.
    """
    if unknown := [dtype for dtype in dtypes if dtype not in (*DTYPES, "int8")]:
        raise ValueError(f"dtype: ceilings can be measured for {', '.join(DTYPES)}, int8; got {unknown[0]!r}")
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_seconds(lambda: target.copy_(source), device)
    size = MATMUL_SIZE[device.type]
    rates = {dtype: 2 * size**3 / _matmul_seconds(device, dtype, size) for dtype in dtypes}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Ceilings(name, rates, 2 * COPIED_BYTES / copy_s, "measured")


def _matmul_seconds(device: torch.device, dtype: str, size: int) -> float:
    if dtype == "int8":
        q, weight = torch.randint(-127, 128, (2, size, size), dtype=torch.int8, device=device)
        return _best_seconds(lambda: reference.integer_product(q, weight), device)
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    product = torch.empty_like(a)
    return _best_seconds(lambda: torch.mm(a, b, out=product), device)


def highest(first: Ceilings, second: Ceilings) -> Ceilings:
    """Of two measurements of one machine: what disturbs one lowers it, so the higher rates are the ceilings."""
    peaks = {dtype: max(rate, second.operations_s[dtype]) for dtype, rate in first.operations_s.items()}
    return replace(first, operations_s=peaks, bytes_s=max(first.bytes_s, second.bytes_s))


def rates(ceilings: Mapping[str, Any]) -> str:
    """Ceilings, as a result's facts hold them, in words."""
    peaks = [f"{rate / 1e12:.3g} T/s in {dtype}" for dtype, rate in ceilings["operations_s"].items()]
    return ", ".join([*peaks, f"{ceilings['bytes_s'] / 1e12:.3g} TB/s"])


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(1 + ROUNDS):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def ceilings_for(chip: str, setup: Setup, dtypes: Set[str] = frozenset()) -> Ceilings:
    """Of a chip in CHIPS, or for HERE what the setup's device reaches, in its dtype and in these. Raises ValueError for
    what is wrong in them."""
    if chip == HERE:
        return measure_ceilings(setup.prepare(), *dict.fromkeys((setup.dtype, *sorted(dtypes))))
    if chip not in CHIPS:
        raise ValueError(f"chip: expected {HERE}, {', '.join(CHIPS)}; got {chip!r}")
    return CHIPS[chip]
