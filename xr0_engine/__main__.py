"""`python -m xr0_engine`: the same as `xr0`."""

from __future__ import annotations

from xr0_engine.cli import main

main()
