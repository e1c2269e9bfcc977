"""Every XR0_* environment variable that the package reads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """XR0_CACHE: where `xr0 demo` and `xr0 bench` keep the checkpoints that they make, exports the sums of their files,
    and engines what the GPU kernels' self-check found; default ~/.cache/xr0-engine."""
    return Path(os.environ.get("XR0_CACHE", "~/.cache/xr0-engine")).expanduser()


def api_keys() -> str:
    """XR0_API_KEYS: the keys that `xr0 serve` takes, with commas between them; default none."""
    return os.environ.get("XR0_API_KEYS", "")


def api_key() -> str | None:
    """XR0_API_KEY: the key that `xr0 drive` and `xr0 eval` give an `xr0 serve`; default none."""
    return os.environ.get("XR0_API_KEY")


EMULATED_CHIPS = {"80": 80, "86": 86, "89": 89, "90": 90, "120": 120}


def emulated_arch() -> int | None:
    """XR0_EMULATE: compute capability (90 for sm_90) of the chip whose compiled kernels a CPU executes instead of a
    GPU, in a checkout with its tests; default none. What is timed then is the emulator. kernels/launch.py reads it too.

    Raises ValueError for another chip, or if Triton's interpreter is asked for as well.
    """
    name = os.environ.get("XR0_EMULATE", "")
    if not name:
        return None
    if name not in EMULATED_CHIPS:
        raise ValueError(f"XR0_EMULATE: expected one of {', '.join(EMULATED_CHIPS)}; got {name!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("XR0_EMULATE, TRITON_INTERPRET: expected one of them, got both; unset one")
    return EMULATED_CHIPS[name]
