"""Measurements as files: one JSON per run, schema 1, written and read here alone."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.env import emulated_arch
from xr0_engine.files import read_json, reading
from xr0_engine.types import FileError
from xr0_engine.whole import write_whole

SCHEMA = 1
KINDS = (
    *("latency", "throughput", "coldstart", "jitter", "kernels", "images", "ablate", "finetune"),
    *("roofline", "predict"),
)
DEADLINES_HZ = (30, 100)
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99_9": 99.9}
PACKAGES = ("torch", "triton", "transformers", "numpy")

Series = Mapping[str, Mapping[str, Sequence[float]]]
"""Rival -> stage -> milliseconds, one per round. Rounds of one run have the same index in every rival."""


def current_commit() -> str | None:
    """The git commit that this package runs from, with `-dirty` if tracked files differ; None if not from a clone."""
    package = Path(__file__).resolve().parent
    # An installed package may lie inside somebody else's clone: only a tracked file makes the commit ours.
    if output_of("git", "-C", str(package), "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = output_of("git", "-C", str(package), "rev-parse", "HEAD")
    changes = output_of("git", "-C", str(package), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changes else commit


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Result:
    """One run.

    kind: one of KINDS. command: what was typed. environment: from `environment`. case: name, size, robot_type, views
    [[h, w], ...], tokens, chunk_length, prefix_length, batch, dtype, as far as the kind has them. boundary: what lies
    between the start and the stop of the clock. facts: free numbers beside the samples. complete: False if the run was
    cut short; it then holds the rounds that were finished.
    """

    kind: str
    command: str
    environment: Mapping[str, Any]
    case: Mapping[str, Any]
    boundary: str
    backend: str
    series: Series
    facts: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = True
    created: str = field(default_factory=utc_now)
    commit: str | None = field(default_factory=current_commit)
    schema: int = SCHEMA

    @property
    def emulated(self) -> str | None:
        """The chip, as `sm_90`, whose kernels a CPU executed, so that times are the emulator's; None for real ones."""
        return self.environment.get("emulated")


def write(result: Result, path: Path) -> None:
    """The file appears whole or not at all. Raises ValueError for a result that `read` would refuse, OSError."""
    content = asdict(result)
    _check(content, "result")
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(path, text + "\n")


def read(path: Path) -> Result:
    """Raises ValueError that names the file and its fault, OSError if there is none. Incomplete runs are returned too:
    look at `complete`."""
    content = read_json(path, FileError)
    with reading(path, FileError):
        _check(content, str(path))
    return Result(**content)


def environment(device: str | Any) -> dict[str, Any]:
    """What a measurement depends on beside the code. device: cpu, cuda, cuda:N or a torch.device.

    clocks_mhz are a GPU's at the time of the call: call it right after measuring. emulated: only where kernels are, as
    Result has it.
    """
    import torch

    chosen = torch.device(device)
    gpu: dict[str, Any] = {"device": "cpu", "driver": None, "clocks_mhz": None}
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        gpu = {"device": properties.name, **_gpu_state(f"GPU-{properties.uuid}")}
    return {
        "device": gpu["device"],
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "driver": gpu["driver"],
        "clocks_mhz": gpu["clocks_mhz"],
        "os": platform.platform(),
        **({"emulated": f"sm_{arch}"} if (arch := emulated_arch()) else {}),
    }


def summary(samples: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """p50, p90, p99, p99_9 and max of some milliseconds, and the shares (0 to 1) over 33.3 ms and over 10 ms.

    A percentile that so few samples cannot tell (p99.9 needs 1000) is None. Raises ValueError if there are none.
    """
    if len(samples) == 0:
        raise ValueError("samples: expected at least one, got none")
    values = np.asarray(samples, dtype=np.float64)
    found: dict[str, float | None] = {}
    for name, percent in PERCENTILES.items():
        # Fewer than this many and the percentile would only repeat the maximum; the median needs one.
        needed = 1 if percent == 50 else round(100 / (100 - percent))
        found[name] = float(np.percentile(values, percent)) if len(values) >= needed else None
    found["max"] = float(values.max())
    return found | {f"missed_{rate}hz": float((values > 1000 / rate).mean()) for rate in DEADLINES_HZ}


def output_of(*command: str) -> str | None:
    """Standard output of a command, stripped; None if there is no such command or it fails."""
    try:
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _check(content: Any, where: str) -> None:
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError(f"{where} is no benchmark result: it has no schema")
    if content["schema"] != SCHEMA:
        raise ValueError(f"{where} has schema {content['schema']!r:.80}; this version reads {SCHEMA}")
    names = {field.name for field in fields(Result)}
    if content.keys() != names:
        raise ValueError(
            f"{where} is corrupt: missing {sorted(names - content.keys())}, unknown {sorted(content.keys() - names)}"
        )
    expected: dict[str, type | tuple[type, ...]] = {
        "kind": str,
        "command": str,
        "boundary": str,
        "backend": str,
        "created": str,
        "commit": (str, type(None)),
        "complete": bool,
        "environment": dict,
        "case": dict,
        "series": dict,
        "facts": dict,
    }
    for name, kind in expected.items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{where} is corrupt: {name} is {content[name]!r:.80}")
    if content["kind"] not in KINDS:
        raise ValueError(f"{where}: kind: expected one of {', '.join(KINDS)}; got {content['kind']!r:.80}")
    for rival, stages in content["series"].items():
        if not isinstance(stages, dict):
            raise ValueError(f"{where} is corrupt: series of {rival} is {stages!r:.80}")
        for stage, samples in stages.items():
            if not isinstance(samples, list | tuple) or not all(_is_time(value) for value in samples):
                raise ValueError(
                    f"{where} is corrupt: {rival}, {stage}: expected milliseconds, finite and not negative"
                )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _gpu_state(uuid: str) -> dict[str, Any]:
    query = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm")
    line = output_of("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits")
    if line is None:
        return {"driver": None, "clocks_mhz": None}
    driver, *clocks = (part.strip() for part in line.split(","))
    # A GPU that does not tell a clock says so in words.
    named = zip(("sm", "memory", "max_sm"), clocks, strict=True)
    return {"driver": driver, "clocks_mhz": {name: int(clock) if clock.isdigit() else None for name, clock in named}}


def processor() -> str:
    """Its name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
