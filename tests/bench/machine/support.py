"""A folder as a run on a GPU would leave it: made up, but in the shape of what the commands write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.bench import results
from xr0_engine.bench.machine.facts import OPTIONAL
from xr0_engine.bench.machine.page import write_page
from xr0_engine.bench.machine.plan import Step, Wish, parts_of, plan
from xr0_engine.bench.machine.state import FACTS, LEFT_OUT, LOGS, PASSED, RESULTS, Ended, State
from xr0_engine.bench.results import Result
from xr0_engine.fused.ops import Tactic
from xr0_engine.fused.tactics import TacticTable, write_tactics

COMMIT = "0123456789abcdef"
MEDIANS = {"vision": 2.1, "prefill": 6.3, "flow": 3.2, "total": 11.2}
BOUND = {"vision": 1.2, "prefill": 4.8, "flow": 2.9, "total": 8.9}
CASE = {
    "name": "libero",
    "size": "4b",
    "robot_type": "libero_all",
    "views": [[256, 256], [256, 256]],
    "tokens": 194,
    "chunk_length": 10,
    "prefix_length": 0,
    "batch": 1,
    "dtype": "bfloat16",
}


def facts(name: str = "NVIDIA H200", emulated: int | None = None, **changes: Any) -> dict[str, Any]:
    environment = {
        "device": "cpu" if emulated else name,
        "processor": "made up",
        "cores": 16,
        "threads": 16,
        "python": "3.11.7",
        "torch": "2.13.0",
        "triton": "3.9.0",
        "transformers": "5.23.0",
        "numpy": "2.4.0",
        "driver": None if emulated else "580.1",
        "clocks_mhz": None,
        "os": "Linux",
        **({"emulated": f"sm_{emulated}"} if emulated else {}),
    }
    slug = name.lower().replace(" ", "-")
    gpu = {"name": name, "slug": slug, "capability": 90, "memory_bytes": 140 * 2**30, "others": 0}
    told = {
        "version": "0.1",
        "commit": COMMIT,
        "environment": environment,
        "cuda": "13.0",
        "gpu": None if emulated else gpu,
        "emulated": emulated,
        "smi": {} if emulated else {"driver_version": "580.1", "power.limit": "700.00 W"},
        "native_cuda_fault": None,
        "optional": dict.fromkeys(OPTIONAL, True),
        "sanitizer": True,
        "disk_free_bytes": 2**36,
        "memory_available_bytes": 2**36,
        "checkpoints": ["4b"],
    }
    return told | changes


def samples(median_ms: float, rounds: int) -> list[float]:
    return (median_ms * np.exp(np.random.default_rng(0).normal(0, 0.02, rounds))).tolist()


def latency(given: dict[str, Any], boundary: str = "replay", rounds: int = 100, **changes: Any) -> Result:
    stages = MEDIANS if boundary == "replay" else {"total": 13.1}
    result = Result(
        kind="latency",
        command=f"xr0 bench latency --boundary {boundary}",
        environment=given["environment"],
        case=CASE,
        boundary=boundary,
        backend="triton",
        series={"engine": {stage: samples(ms, rounds) for stage, ms in stages.items()}},
        facts={"peak_memory_bytes": 10 * 2**30},
        commit=given["commit"],
        created="2026-01-01T00:00:00+00:00",
    )
    return replace(result, **changes)


def roofline(given: dict[str, Any]) -> Result:
    told = {"chip": given["environment"]["device"], "bound_ms": BOUND, "operators": []}
    return latency(given, kind="roofline", boundary="stage", backend="none", series={}, facts=told)


def kernels(given: dict[str, Any]) -> Result:
    ops = {
        "vision: linear 512x1024x4096": 0.04,
        "prefill: swiglu 192x19456x2560": 0.11,
        "flow: qkv 12x3072x1024": 0.004,
    }
    told = {
        "chip": given["environment"]["device"],
        "bound_ms": {name: 0.7 * ms for name, ms in ops.items()},
        "counts": dict(zip(ops, (24, 36, 80), strict=True)),
    }
    series = {"triton": {name: samples(ms, 20) for name, ms in ops.items()}}
    return latency(given, kind="kernels", boundary="kernel", series=series, facts=told)


def comparisons(worst: float = 0.013) -> list[dict[str, Any]]:
    quantities = {"vision tokens": 0.004, "KV block": 0.006, "actions": worst, "actions, replayed": 0.0}
    return [
        {
            "case": "grouped.prefix1",
            "quantity": name,
            "error": error,
            "tolerance": 0.125 if error else 0.0,
            "measure": "relative RMS",
            "passed": error <= 0.125,
        }
        for name, error in quantities.items()
    ]


def steps_of(given: dict[str, Any], folder: Path) -> list[Step]:
    wish = Wish(golden=Path("golden"), emulate=given["emulated"])
    return plan(given, wish, "tiny" if given["emulated"] else "4b", folder)


def leave(folder: Path, given: dict[str, Any] | None = None, ended: dict[str, Ended] | None = None) -> list[Step]:
    """Everything that a run writes, all passed but what `ended` says. Returns its steps."""
    given = given or facts()
    for each in (folder / RESULTS, folder / LOGS):
        each.mkdir(parents=True, exist_ok=True)
    steps = steps_of(given, folder)
    verdicts = {
        step.name: Ended(LEFT_OUT, step.left_out) if step.left_out else Ended(PASSED, "", 12.3, 60, 0) for step in steps
    }
    parts = {part: [step.name for step in found] for part, found in parts_of(steps).items()}
    state = State(folder, {}, {"size": "4b", "size_reason": None}, parts, verdicts | (ended or {}))
    state.write()
    (folder / FACTS).write_text(json.dumps(given))
    made = {
        "latency-libero-replay": latency(given),
        "latency-libero-update-replay": latency(given, "update+replay"),
        "bound-libero": roofline(given),
        "kernels-libero": kernels(given),
    }
    for name, result in made.items():
        results.write(result, folder / RESULTS / f"{name}.json")
    (folder / RESULTS / "golden-chained.json").write_text(json.dumps(comparisons()))
    verdict = {"device": "cuda:0", "runs": "triton: self-check of seeded model passed", "verdicts": []}
    (folder / RESULTS / "self-check.json").write_text(json.dumps({"ready": True, "auto": [verdict]}))
    key = "linear 12x1024x4096 bfloat16"
    measured = {"step libero": {"default": 12e3, "tuned": 11e3}, key: {"16x64x128 split 4, 4 warps, 3 stages": 9.1}}
    write_tactics(TacticTable("h200", {key: Tactic(16, 64)}, measured=measured), folder / "tactics.json")
    write_page(folder, given, steps, state)
    return steps
