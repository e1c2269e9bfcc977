"""What a machine is, as far as its results depend on it; run as a module, it prints that. Nothing of it names anybody.

`python -m xr0_engine.bench.machine.facts DEVICE`: a process of its own, since asking a GPU occupies it.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xr0_engine import __version__
from xr0_engine.env import cache_dir, emulated_arch

OPTIONAL = {
    "transformers": "the released way, and the fine-tuning step",
    "huggingface_hub": "the fine-tuning step",
    "tensorboard": "the fine-tuning step",
    "flash_attn": "its attention as a rival when tuning",
}
"""Package -> which parts are left out without it."""
SMI = (
    "name", "driver_version", "vbios_version", "compute_cap", "memory.total", "memory.used", "power.limit",
    "power.default_limit", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "clocks.mem", "temperature.gpu", "pstate",
    "compute_mode", "persistence_mode", "mig.mode.current", "ecc.mode.current", "pcie.link.gen.current",
    "pcie.link.width.current",
)  # fmt: skip
"""What nvidia-smi is asked: nothing that tells one GPU from another of its kind."""
SMI_COMMAND = ("nvidia-smi", "--format=csv,noheader")
SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")


def examine(device: str) -> dict[str, Any]:
    """environment: as a result's. gpu: None, or name, slug (of its tactic table), capability (90), memory_bytes, others
    (processes that compute on it). smi: what nvidia-smi tells, by field. Raises ValueError for a device that is not
    there."""
    import torch

    from xr0_engine.backend import resolve_device
    from xr0_engine.bench.results import current_commit, environment, output_of
    from xr0_engine.fused.tactics import gpu_name
    from xr0_engine.robot.patches import native_cuda_fault

    # Before this process is one of them.
    computing = (output_of(*SMI_COMMAND, "--query-compute-apps=gpu_uuid") or "").split()
    place = resolve_device(device)
    gpu: dict[str, Any] | None = None
    smi: dict[str, str] = {}
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        uuid = f"GPU-{properties.uuid}"
        smi = read_smi(output_of(*SMI_COMMAND, f"--id={uuid}", f"--query-gpu={','.join(SMI)}"))
        gpu = {
            "name": properties.name,
            "slug": gpu_name(place),
            "capability": 10 * properties.major + properties.minor,
            "memory_bytes": properties.total_memory,
            "others": computing.count(uuid),
        }
    cache = cache_dir()
    return {
        "version": __version__,
        "commit": current_commit(),
        "environment": environment(place),
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "emulated": emulated_arch(),
        "smi": smi,
        "native_cuda_fault": native_cuda_fault(),
        "optional": {name: find_spec(name) is not None for name in OPTIONAL},
        "sanitizer": sanitizer() is not None,
        "disk_free_bytes": shutil.disk_usage(_existing(cache)).free,
        "memory_available_bytes": _memory_available(),
        "checkpoints": sorted(path.name for path in cache.iterdir() if path.is_dir()) if cache.is_dir() else [],
    }


def sanitizer() -> str | None:
    """Where compute-sanitizer is, None if it is not installed."""
    return shutil.which("compute-sanitizer") or next((path for path in SANITIZERS if Path(path).is_file()), None)


def read_smi(line: str | None) -> dict[str, str]:
    """SMI's fields as nvidia-smi tells them, those that it does not know left out; nothing without a line."""
    values = [] if line is None else [value.strip() for value in line.split(",")]
    return {name: value for name, value in zip(SMI, values, strict=False) if not value.startswith("[")}


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _memory_available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    found = next(line for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(found.split()[1])


if __name__ == "__main__":
    print(json.dumps(examine(sys.argv[1]), indent=1))
