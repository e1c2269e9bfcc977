"""Every XR0_* environment variable that the installed package reads (setup.py reads XR0_BUILD_CUDA, XR0_CUDA_ARCHS)."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """XR0_CACHE: where `xr0 demo` keeps the checkpoint that it makes; default ~/.cache/xr0-engine."""
    return Path(os.environ.get("XR0_CACHE", "~/.cache/xr0-engine")).expanduser()
