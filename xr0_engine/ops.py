"""The ops that the model is made of, and the choice of backend. Nobody else imports kernels or _C.

`reference` is PyTorch's own operators (kernels/reference.py) and runs everywhere. A backend asked for by name works or
raises; only "auto" may choose.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from xr0_engine.kernels.reference import attention, lambda_attention, rms_norm, rotate

if importlib.util.find_spec("xr0_engine._C") is not None:
    from xr0_engine import _C

    native: str | None = None
else:
    native = "xr0_engine._C was not built: install a C++17 compiler and reinstall xr0-engine from source"

__all__ = [
    "attention",
    "backend_status",
    "frame_to_patches",
    "lambda_attention",
    "native",
    "resolve_backend",
    "resolve_device",
    "rms_norm",
    "rotate",
]


def backend_status() -> dict[str, str | None]:
    """Backend name -> None if it can be used on this machine, else the reason why not."""
    return {"reference": None, "triton": "not part of this version", "cuda": "not part of this version"}


def resolve_backend(name: str) -> str:
    """The backend to use for a requested name or "auto".

    Raises ValueError for an unknown name, NotImplementedError for one that cannot be used here, with one that can.
    """
    status = backend_status()
    if name == "auto":
        return "reference"
    if name not in status:
        raise ValueError(f"backend: expected auto, {', '.join(status)}; got {name!r}")
    if status[name] is not None:
        raise NotImplementedError(f"backend {name!r}: {status[name]}; use backend='reference'")
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


def frame_to_patches(frame: np.ndarray, patch: int, temporal: int, merge: int) -> np.ndarray:
    """Normalise a resized frame and cut it into patches in Qwen's order (spec section 3.1).

    frame: (H, W, 3) uint8, H and W multiples of patch * merge. Returns (H / patch * W / patch, 3 * temporal * patch**2)
    float32. Native where _C was built, NumPy otherwise, bit for bit the same.
    """
    height, width, channels = frame.shape
    out = np.empty((height // patch * (width // patch), channels * temporal * patch * patch), np.float32)
    if native is None:
        _C.frame_to_patches(frame, out, patch, temporal, merge)
        return out
    blocks = PIXEL_VALUES[frame].reshape(
        height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, channels
    )
    # -> block row, block column, row in block, column in block, channel, patch row, patch column
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    target = out.reshape(*ordered.shape[:5], temporal, patch, patch)
    target[...] = ordered[:, :, :, :, :, None]
    return out


def _pixel_values() -> np.ndarray:
    # The processor's own arithmetic: scaled in float64, rounded, then normalised in float32.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


PIXEL_VALUES = _pixel_values()
"""(256,) float32: what each 8-bit channel value becomes."""
