"""Every XR0_* environment variable that the package reads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """XR0_CACHE: where `xr0 demo` and `xr0 bench` keep the checkpoints that they make, and exports the sums of their
    files; default ~/.cache/xr0-engine."""
    return Path(os.environ.get("XR0_CACHE", "~/.cache/xr0-engine")).expanduser()


def api_keys() -> str:
    """XR0_API_KEYS: the keys that `xr0 serve` takes, with commas between them; default none."""
    return os.environ.get("XR0_API_KEYS", "")


def api_key() -> str | None:
    """XR0_API_KEY: the key that `xr0 drive` gives its server; default none."""
    return os.environ.get("XR0_API_KEY")
