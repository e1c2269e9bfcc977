"""Golden cases through the kernels as they are compiled, every launch executed and checked, chained, a
launch a layer, and one for all."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest

from tests.support import GOLDEN
from xr0_engine.comparison import Comparison
from xr0_engine.env import emulated_arch
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.golden import verify as golden

pytest.importorskip("triton")

from tests.ptx import stream

pytestmark = [
    pytest.mark.skipif(emulated_arch() is None, reason="needs XR0_EMULATE=90"),
    pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden cases are not at {GOLDEN}"),
]
QUANTITIES = {"vision tokens", "KV block", "flow trace", "actions", "actions, one step"}


def verify(folder, dtype: str, flow: str, monkeypatch) -> list[Comparison]:
    monkeypatch.setattr(golden, "tactics_for", lambda device: TacticTable("", flow=flow))
    return list(golden.verify_folder(folder, "triton", "cpu", dtype))


def one_case(folder, model: str, case: str):
    source = GOLDEN if (GOLDEN / f"{model}.json").is_file() else GOLDEN.parent / "golden_xr1"
    for name in (f"{model}.json", f"{model}.weights.safetensors", f"{model}.{case}.safetensors"):
        shutil.copyfile(source / name, folder / name)
    return folder


def assert_passed(comparisons: list[Comparison]) -> None:
    assert {each.quantity for each in comparisons} == QUANTITIES
    assert [each for each in comparisons if not each.passed] == []


@pytest.mark.parametrize(
    ("flow", "overlapped"),
    [
        pytest.param("chained", False, id="chained, one by one"),
        *(pytest.param(flow, True, id=f"{flow}, overlapped") for flow in ("chained", "layered", "persistent")),
    ],
)
def test_a_case_passes_whichever_way_it_runs(flow, overlapped, monkeypatch, tmp_path):
    folder = one_case(tmp_path, "grouped", "prefix1")
    with stream() if overlapped else nullcontext():
        assert_passed(verify(folder, "bfloat16", flow, monkeypatch))


@pytest.mark.parametrize(
    ("model", "case", "dtype"),
    [
        ("grouped", "prefix4_two_views", "bfloat16"),
        pytest.param("grouped", "prefix6_batch2", "bfloat16", marks=pytest.mark.one_chip),
        pytest.param("full_causal", "one_view", "float16", marks=pytest.mark.one_chip),
        ("xr1_post", "prefix4_two_views", "bfloat16"),
        pytest.param("xr1_video", "padded_batch2", "bfloat16", marks=pytest.mark.one_chip),
    ],
)
def test_cases_pass(model, case, dtype, monkeypatch, tmp_path):
    """Chained where the flow is traced, as one kernel in the step."""
    assert_passed(verify(one_case(tmp_path, model, case), dtype, "persistent", monkeypatch))
