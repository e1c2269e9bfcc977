"""The kernels of `xr0 bench kernels` under pytest-benchmark, which compares runs and keeps their history: `make bench`.

On a GPU the published sizes, in bfloat16; on a CPU the small ones, in float32, on one thread: several wait for each
other as soon as anything else runs. Boundary: from the call to the end of its work, caches overwritten before.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.step.ceilings import Ceilings, measure_ceilings
from xr0_engine.bench.step.kernels import KernelSpec, check, kernel_specs, overwrite_caches, random_tensors
from xr0_engine.bench.step.workload import Workload
from xr0_engine.bench.timing import WARM_UP

DEVICE, DTYPE, SIZE = (
    (torch.device("cuda"), "bfloat16", "4b") if torch.cuda.is_available() else (torch.device("cpu"), "float32", "small")
)
CASES_TIMED = ("libero", "bimanual")
ROUNDS = 20


def specs_of(case: str) -> list[KernelSpec]:
    return kernel_specs(*Workload.of_case(Setup(CASES[case], size=SIZE)), DTYPE)


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    torch.set_num_threads(1)
    return measure_ceilings(DEVICE, DTYPE)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=f"{case}: {spec.name}, {spec.shape}", marks=pytest.mark.benchmark(group=case))
        for case in CASES_TIMED
        for spec in specs_of(case)
    ],
)
@torch.inference_mode()
def test_kernel(benchmark: BenchmarkFixture, spec: KernelSpec, ceilings: Ceilings) -> None:
    kernel = spec.make(random_tensors(DEVICE, DTYPE))
    benchmark.extra_info["error_against_float64"] = check(spec.name, kernel, DTYPE)
    benchmark.extra_info["bound_ms"] = spec.bound_ms(ceilings)

    def call() -> None:
        kernel.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.pedantic(call, setup=overwrite_caches(DEVICE), rounds=ROUNDS, warmup_rounds=WARM_UP)
