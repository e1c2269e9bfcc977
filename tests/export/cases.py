"""The case that tests export."""

from __future__ import annotations

from xr0_engine.exported.manifest import ExportCase

LIBERO = ExportCase("libero", "libero_all", (64, 64))
"""Of cameras so small that a view is four tokens."""
