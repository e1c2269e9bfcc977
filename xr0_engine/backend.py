"""Which backend runs the network, on which device, in which precision: what a machine has, and what a user may ask for.

`reference` is PyTorch's own operators (kernels/reference.py) and runs everywhere; `triton` is fused/ on our kernels. A
backend asked for by name works or raises; only "auto" may choose.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version

import torch

from xr0_engine.env import emulated_arch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Precisions that the network runs in."""


def resolve_dtype(name: str) -> torch.dtype:
    """Raises ValueError for a name that is not in DTYPES."""
    if name not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_fault() -> str | None:
    """Why Triton's kernels cannot run on this machine, None if they can."""
    if not triton_installed():
        return "triton is not installed: pip install 'xr0-engine[cuda]'"
    if not torch.cuda.is_available() and not interpreted() and emulated_arch() is None:
        return "torch finds no CUDA GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, to test them)"
    if interpreted() and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return "Triton's interpreter fails with NumPy 2.4 before Triton 3.7: pip install 'numpy<2.4' or 'triton>=3.7'"
    return None


def _release(package: str) -> tuple[int, ...]:
    """(3, 6) of 3.6.0."""
    return tuple(int(part) for part in version(package).split(".")[:2])


def auto_checks(device: torch.device) -> bool:
    """Whether "auto" asks there for the kernels' self-check (fused/choice.py): on a CUDA GPU, or on a CPU that executes
    a GPU's compiled kernels in its place."""
    return not interpreted() and (device.type == "cuda" or emulated_arch() is not None)


def kernel_devices() -> list[torch.device]:
    """The CUDA GPUs, or the CPU where something executes kernels on it."""
    if interpreted() or emulated_arch() is not None:
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def backend_status() -> dict[str, str | None]:
    """Backend name -> None if it can be used on this machine, else the reason why not."""
    return {"reference": None, "triton": triton_fault()}


def resolve_backend(name: str, device: torch.device | None = None) -> str:
    """The backend to use for a requested name or "auto", on a device if one is given.

    auto is `reference`, which runs everywhere; an engine asks the kernels' self-check before (fused/choice.py). Raises
    ValueError for an unknown name, NotImplementedError for one that cannot be used here, with one that can.
    """
    status = backend_status()
    if name == "auto":
        return "reference"
    if name not in status:
        raise ValueError(f"backend: expected auto, {', '.join(status)}; got {name!r}")
    if status[name] is not None:
        raise NotImplementedError(f"backend {name!r}: {status[name]}; use backend='reference'")
    on_cpu = interpreted() or emulated_arch() is not None
    if name == "triton" and device is not None and (interpreted() if device.type == "cuda" else not on_cpu):
        place = "in Triton's interpreter, on the CPU" if interpreted() else "on a CUDA GPU"
        raise NotImplementedError(f"backend 'triton': runs {place}, not on {device}; use backend='reference' there")
    return name


def resolve_device(name: str) -> torch.device:
    """auto is the first CUDA GPU if there is one, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA GPUs that torch can use")
    return device
