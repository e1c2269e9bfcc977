"""Which kernel computes a product: as a tactic's schedule says."""

from __future__ import annotations

from typing import Any

from xr0_engine.kernels.bulk import launch_bulk
from xr0_engine.kernels.calls import ProductCall, launch_tiles
from xr0_engine.kernels.swapped import launch_swapped
from xr0_engine.kernels.whole import launch_whole
from xr0_engine.kernels.wide import launch_wide


def launch_scheduled(kernel: Any, call: ProductCall) -> None:
    """kernel: of tiles, one a program, for launch_tiles. Raises what the schedule's launch raises."""
    schedule = call.tactic.schedule
    if schedule == "tiled":
        launch_tiles(kernel, call)
    elif schedule == "stream":
        launch_wide(call)
    elif schedule == "tma":
        launch_bulk(call)
    elif schedule in ("swapped", "warpgroups"):
        launch_swapped(call)
    else:
        launch_whole(call)
