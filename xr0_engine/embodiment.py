"""The earlier name of robot/embodiment.py, for programs that import it from here."""

from __future__ import annotations

from xr0_engine.robot.embodiment import Embodiment, View, builtin_embodiments, load_embodiment

__all__ = ["Embodiment", "View", "builtin_embodiments", "load_embodiment"]
