"""Which kernel computes a product: as a tactic's schedule says."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xr0_engine.kernels.arguments import InputNorm, Tactic, Weight, Workspace
from xr0_engine.kernels.bulk import launch_bulk
from xr0_engine.kernels.product import launch_product
from xr0_engine.kernels.whole import launch_whole
from xr0_engine.kernels.wide import launch_wide


def launch_scheduled(
    kernel: Any,
    finish_tile: Any,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    col_scale: Tensor | None,
    norm: InputNorm | None,
    column_tiles: int,
    tile_weights: int,
    distance: int | None,
    tactic: Tactic,
    workspace: Workspace,
    epilogue: dict[str, Any],
) -> None:
    """Launch a product of column_tiles tiles of tile_weights weight rows each, with an epilogue.

    kernel: of tiles, one a program (launch_product); finish_tile: its epilogue alone, for the others. distance: between
    the weight rows of a pair, None where they follow each other. epilogue: further arguments.
    """
    product = (x, weight, bias, col_scale, norm, column_tiles, tile_weights)
    if tactic.schedule == "tiled":
        launch_product(kernel, *product, tactic, workspace, epilogue)
    elif tactic.schedule == "stream":
        launch_wide(finish_tile, *product, distance, tactic, workspace, epilogue)
    elif tactic.schedule == "tma":
        launch_bulk(finish_tile, *product, distance, tactic, workspace, epilogue)
    else:
        launch_whole(finish_tile, *product, distance, tactic, workspace, epilogue)
