"""What the compiler is told of a launch's arguments: their types, what is compiled in, what is a multiple of 16."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.products import meta, meta_float
from xr0_engine.kernels import launch
from xr0_engine.kernels.launch import COMPILER_FAULTS, Launch, PassesFailed, Signature, compile_call, variants


class Pair(NamedTuple):
    x: Tensor | None
    rows: int
    eps: float = 1.0


class How(NamedTuple):
    BLOCK: int


PARAMETERS = {"program": False, "pair": False, "out": False, "HOW": True, "PDL": True}
KERNEL = SimpleNamespace(
    __name__="kernel",
    params=[
        SimpleNamespace(name=name, is_constexpr=is_it, do_not_specialize=False) for name, is_it in PARAMETERS.items()
    ],
)


def call(pair: Pair, block: int = 16) -> Launch:
    arguments = {"program": None, "pair": pair, "out": meta_float(8)[1:], "HOW": How(block)}
    return Launch(KERNEL, (1,), arguments, warps=4, stages=3)


def test_fields_are_arguments_of_their_own():
    signature = Signature(call(Pair(meta(4, 4), 32)), dependent=True)
    pair = Pair("*bf16", "i32", "fp32")
    constant = dict.fromkeys(("program", "HOW", "PDL"), "constexpr")
    assert signature.types == {"pair": pair, "out": "*fp32", **constant}
    assert type(signature.types["pair"]) is Pair
    assert signature.constants == {(0,): None, (3,): How(16), (4,): True}
    assert signature.divisible == [(1, 0), (1, 1)]


def test_none_and_one_are_compiled_in():
    signature = Signature(call(Pair(None, 1)))
    assert signature.types["pair"] == Pair("constexpr", "constexpr", "fp32")
    assert signature.constants == {(0,): None, (1, 0): None, (1, 1): 1, (3,): How(16), (4,): False}
    assert signature.named_constants == {"program": None, "x": None, "rows": 1, "BLOCK": 16, "PDL": False}


def test_a_descriptor_is_told_by_its_block():
    described = TensorDescriptor(meta(8, 64), [8, 64], [64, 1], [4, 64])
    signature = Signature(replace(call(Pair(None, 1)), arguments=call(Pair(None, 1)).arguments | {"out": described}))
    assert signature.types["out"] == "tensordesc<bf16[4, 64]>"
    assert ("out", "tensordesc<bf16[4, 64]>", described) in signature.given


@pytest.mark.parametrize(
    ("message", "error"), [("PassManager::run failed", PassesFailed), ("no space left", RuntimeError)]
)
def test_only_the_compilers_passes_are_the_compilers_fault(message, error, monkeypatch):
    """Whoever tries candidates goes on after those, and stops for anything else."""

    def fail(*arguments, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(launch.triton, "compile", fail)
    monkeypatch.setattr(launch, "ASTSource", lambda *arguments, **options: None)
    tried = call(Pair(meta(4, 4), 32))
    with pytest.raises(error):
        compile_call(tried, Signature(tried), 90)
    assert (error in COMPILER_FAULTS) == (error is PassesFailed)


@pytest.mark.parametrize(
    ("other", "count"),
    [
        pytest.param(call(Pair(meta(8, 8), 64, 2.0)), 1, id="values"),
        pytest.param(call(Pair(meta(4, 4), 33)), 2, id="alignment"),
        pytest.param(call(Pair(meta_float(4, 4), 32)), 2, id="dtype"),
        pytest.param(call(Pair(torch.empty(0, dtype=torch.bfloat16, device="meta"), 32), 32), 2, id="constant"),
    ],
)
def test_variants(other, count):
    assert len(variants([call(Pair(meta(4, 4), 32)), other])) == count
