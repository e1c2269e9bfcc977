"""What is timed computes what it should, and costs what is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support import CPU
from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.results import read, write
from xr0_engine.bench.step import kernels, suite
from xr0_engine.bench.step.ceilings import Ceilings
from xr0_engine.bench.step.kernels import Kernel, check, kernel_specs, random_tensors
from xr0_engine.bench.step.roofline import operators
from xr0_engine.bench.step.workload import Workload
from xr0_engine.sizes import tiny_config

SETUP = Setup(CASES["libero"], size="tiny", device="cpu", dtype="float32")
WORK = replace(Workload.of_case(SETUP)[1], batch=2, grids=((16, 16),) * 4)
TOY = Ceilings("toy", {"float32": 1e9}, 1e9, "datasheet")


@pytest.fixture(autouse=True)
def no_large_buffers(monkeypatch):
    monkeypatch.setattr(kernels, "COPIED_BYTES", 1000)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, dtype: TOY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_kernel_agrees_with_float64(dtype):
    random = random_tensors(CPU, dtype)
    for spec in kernel_specs(tiny_config(), WORK, dtype):
        kernel = spec.make(random)
        assert str(kernel.call().dtype) == f"torch.{dtype}"
        check(spec.name, kernel, dtype)


def test_every_operator_of_the_roofline_is_a_kernel():
    specs = kernel_specs(tiny_config(), WORK, "float32")
    assert len({spec.name for spec in specs}) == len(specs)
    costs = operators(tiny_config(), WORK, "float32")
    assert {spec.cost for spec in specs} >= set(costs)


def test_bound_is_of_one_call():
    spec = next(spec for spec in kernel_specs(tiny_config(), WORK, "float32") if spec.name == "flow: QKV")
    rows, inputs, outputs = 2 * 12, 128, 3 * 128
    assert spec.shape == f"{rows}x{inputs}x{outputs}"
    assert spec.bound_ms(TOY) == pytest.approx(1e3 * 2 * rows * inputs * outputs / 1e9)


@pytest.mark.parametrize("fault", [1e-3, float("nan")], ids=["off", "NaN"])
def test_wrong_kernel_is_not_timed(fault):
    exact = torch.ones(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="nothing was timed: flow: norm is off by"):
        check("flow: norm", Kernel(lambda: torch.ones(4) + fault, lambda: exact), "float32")


def test_result_and_its_table(tmp_path, capsys):
    measured, reason = kernels.measure(SETUP, 2, "xr0 bench kernels")
    write(measured, tmp_path / "kernels.json")
    result = read(tmp_path / "kernels.json")
    assert reason is None
    assert (result.kind, result.boundary, result.backend) == ("kernels", "kernel", "reference")
    names = list(result.facts["bound_ms"])
    assert list(result.series["reference"]) == names == list(result.facts["shapes"])
    assert {len(samples) for samples in result.series["reference"].values()} == {2}
    kernels.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    lines = [line.strip() for line in lines]
    assert [name for name in names if any(line.startswith(f"{name} ") for line in lines)] == names


class OneCall:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}
        self.rounds = 0

    def pedantic(self, call, setup, rounds, warmup_rounds):
        setup()
        call()
        self.rounds = rounds


def test_suite_times_what_was_checked(monkeypatch):
    monkeypatch.setattr(suite, "DEVICE", CPU)
    monkeypatch.setattr(suite, "DTYPE", "float32")
    spec = kernel_specs(tiny_config(), WORK, "float32")[0]
    benchmark = OneCall()
    suite.test_kernel(benchmark, spec, TOY)
    assert benchmark.rounds == suite.ROUNDS
    assert benchmark.extra_info["bound_ms"] == spec.bound_ms(TOY)
    assert benchmark.extra_info["error_against_float64"] < kernels.GATE["float32"]


def test_products_come_first_in_each_stage():
    specs = kernel_specs(tiny_config(), WORK, "float32")
    for stage in ("vision", "prefill", "flow"):
        is_product = [bool(spec.cost.shape) for spec in specs if spec.cost.stage == stage]
        assert is_product == sorted(is_product, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"dtype": "int8"}, "dtype: expected", id="dtype"),
        pytest.param({"size": "huge"}, "size: expected", id="size"),
        pytest.param({"backend": "cuda"}, "backend: expected auto, reference, triton; got 'cuda'", id="backend"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.measure(replace(SETUP, **change), 1, "")
