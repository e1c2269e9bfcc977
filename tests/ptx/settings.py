"""How the emulator runs, from the environment; XR0_EMULATE itself, which chip's code, is read by the package."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

ASYNCHRONOUS = {"waited": 0, "at-once": 1, "random": 2}
CHECKS = {"all": (1, 1), "bounds": (1, 0), "none": (0, 0)}
"""Names -> what cpp/abi.h calls check and race."""


@dataclass(frozen=True)
class Settings:
    """One schedule of the machine, and what is checked.

    seed: XR0_EMULATE_SEED, default 1: which warp goes on when; 0 lets them take turns.
    asynchronous: XR0_EMULATE_ASYNC: when copies and wgmma happen: `waited` (default), at the latest moment, which shows
    a wait that is missing; `at-once`; `random`.
    processors: XR0_EMULATE_PROCESSORS, default 8: what kernels are told the chip has.
    resident: XR0_EMULATE_RESIDENT, default 16, or as many as processors: blocks that run at a time. A cooperative grid
    of more is refused, as a chip refuses it.
    quantum: XR0_EMULATE_QUANTUM, default 500: most instructions of a warp before another's turn.
    check: XR0_EMULATE_CHECK: `all` (default); `bounds`, without races; `none`.
    budget: XR0_EMULATE_BUDGET, default 2^36: instructions after which a launch is taken to hang.
    """

    seed: int
    asynchronous: str
    processors: int
    resident: int
    quantum: int
    check: str
    budget: int

    @classmethod
    def current(cls) -> Settings:
        """Raises ValueError for a value that cannot be."""
        processors = _number("PROCESSORS", 8)
        return cls(
            _number("SEED", 1, 0), _choice("ASYNC", "waited", ASYNCHRONOUS), processors,
            _number("RESIDENT", max(16, processors)), _number("QUANTUM", 500), _choice("CHECK", "all", CHECKS),
            _number("BUDGET", 1 << 36),
        )  # fmt: skip


def cache_folder() -> Path:
    """XR0_EMULATE_CACHE: where the built machine and decoded programs are kept; default ~/.cache/xr0-engine/ptx, or a
    temporary folder where that cannot be written."""
    if chosen := os.environ.get("XR0_EMULATE_CACHE"):
        folder = Path(chosen).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xr0-engine" / "ptx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"xr0-engine-ptx-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    return folder


def _number(name: str, default: int, least: int = 1) -> int:
    text = os.environ.get(f"XR0_EMULATE_{name}", "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"XR0_EMULATE_{name}: expected a number of at least {least}; got {text!r}")
    return int(text)


def _choice(name: str, default: str, known: dict[str, object]) -> str:
    text = os.environ.get(f"XR0_EMULATE_{name}") or default
    if text not in known:
        raise ValueError(f"XR0_EMULATE_{name}: expected one of {', '.join(known)}; got {text!r}")
    return text
