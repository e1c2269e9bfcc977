"""A product as its op asks for it, on the host: what every schedule's launch starts from, and the launch of tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from xr0_engine.kernels.arguments import STATS_COLUMNS, InputNorm, Schedule, Tactic, Weight, Workspace, slot_columns
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.library import library_product
from xr0_engine.kernels.product import MIN_DOT, MOST_FLOAT8, STREAM_ROW_TILES, WARPGROUP_ROWS, How, Product
from xr0_engine.kernels.shapes import expect, strided

EIGHT_BIT_SCHEDULES: tuple[Schedule, ...] = ("tiled", "stream")
"""Those of products both of whose factors have 8 bits."""


@dataclass(frozen=True)
class ProductCall:
    """A product with all that surrounds it.

    x: (B, M, K); weight, x_scale, bias, col_scale, norm: as linear has them. column_tiles: of tile_weights weight rows
    each. distance: those are tile_weights / 2 pairs (n, n + distance); None: they follow each other. finish_tile: the
    epilogue's function, as finish_linear; epilogue: its arguments.
    """

    x: Tensor
    weight: Weight
    x_scale: Tensor | None
    bias: Tensor | None
    col_scale: Tensor | None
    norm: InputNorm | None
    column_tiles: int
    tile_weights: int
    distance: int | None
    finish_tile: Any
    epilogue: dict[str, Any]
    tactic: Tactic
    workspace: Workspace

    @property
    def rows(self) -> int:
        """Of all batches."""
        return self.x.shape[0] * self.x.shape[1]

    @property
    def flat_x(self) -> Tensor:
        """(rows, K), of batches that follow each other (bulk.py: check_factors)."""
        x = self.x
        return x.as_strided((self.rows, x.shape[2]), (x.stride(1), 1)) if x.shape[0] > 1 else x[0]

    @property
    def column_step(self) -> int:
        """Weight rows from a tile's first to the next one's: of pairs that are farther apart than a tile, half."""
        together = self.distance is None or 2 * self.distance == self.tile_weights
        return self.tile_weights if together else self.tile_weights // 2

    def product(self, row_tiles: int, partials: Tensor | None, counters: Tensor | None) -> Product:
        norm = self.norm
        return Product(
            **strided("x", self.x, "bm"),
            **strided("w", self.weight.data, "n"),
            **strided("x_scale", self.x_scale, "b"),
            scale=self.weight.scale,
            bias=self.bias,
            col_scale=self.col_scale,
            **strided("sums", None if norm is None else norm.sums, "sbm"),
            column_sums=None if norm is None else norm.column_sums,
            norm_eps=0.0 if norm is None else norm.eps,
            partials=partials,
            counters=counters,
            rows=self.rows,
            batch_rows=self.x.shape[1],
            inputs=self.weight.data.shape[1],
            slots=self._slots,
            row_tiles=row_tiles,
        )

    def how(self, block_m: int, row_tiles: int, split_k: int = 1) -> How:
        """block_m: rows of a program; row_tiles: that read the same weight."""
        return How(
            NORM=None if self.norm is None else self.norm.kind,
            SLOTS=triton.next_power_of_2(self._slots),
            LIBRARY=self.tactic.library,
            SPLIT_K=split_k,
            BLOCK_M=block_m,
            BLOCK_N=self.tile_weights,
            BLOCK_K=self.tactic.block_k,
            EVEN_K=self.weight.data.shape[1] % self.tactic.block_k == 0,
            STREAM=row_tiles <= STREAM_ROW_TILES,
            FACTOR=str(self.weight.factor).removeprefix("torch."),
        )

    @property
    def finishing(self) -> dict[str, Any]:
        """The epilogue's function and its arguments, for a kernel that takes any."""
        options = {name: self.epilogue.get(name) for name in ("CENTRED", "ACTIVATION", "OUT_SLOTS")}
        return {"FINISH": self.finish_tile, "end": self.epilogue["end"], **options}

    @property
    def _slots(self) -> int:
        """As many as the sums have: their width is their writer's."""
        return 1 if self.norm is None else self.norm.sums.shape[0]


def check_product(
    x: Tensor,
    weight: Weight,
    x_scale: Tensor | None,
    bias: Tensor | None,
    col_scale: Tensor | None,
    norm: InputNorm | None,
    tactic: Tactic,
) -> None:
    """Raises ValueError for shapes that do not belong together and for tiles that cannot be, NotImplementedError for
    tactics that 8-bit factors do not have."""
    batch, rows, inputs = x.shape
    outputs = weight.data.shape[0]
    expect("x", x, (batch, rows, inputs))
    expect("weight.data", weight.data, (outputs, inputs))
    for name, tensor, size in (
        ("weight.scale", weight.scale, outputs),
        ("bias", bias, outputs),
        ("col_scale", col_scale, inputs),
        ("norm.column_sums", None if norm is None else norm.column_sums, outputs),
    ):
        if tensor is not None:
            expect(name, tensor, (size,))
    if norm is not None:
        expect("norm.sums", norm.sums, (norm.sums.shape[0], batch, rows, 2))
        width = slot_columns("norm.sums", norm.sums, inputs)
        if norm.kind == "layer" and width != STATS_COLUMNS:
            raise ValueError(f"norm.sums: expected slots of {STATS_COLUMNS} columns for kind 'layer', got {width}")
        if (norm.kind == "layer") != (norm.column_sums is not None):
            raise ValueError(f"norm.column_sums: expected for kind 'layer' alone, got kind {norm.kind!r}")
    if weight.data.element_size() == 1 and weight.scale is None:
        raise ValueError(f"weight.scale: expected for {weight.data.dtype}, got None")
    eight_bits = x.element_size() == 1
    _check_eight_bits(x, weight, x_scale, col_scale, norm)
    for name in ("block_m", "block_n", "block_k"):
        size, least = getattr(tactic, name), MIN_DOT
        if name == "block_n" and tactic.schedule == "whole":
            least = MIN_DOT // 2
        if name == "block_k" and eight_bits:
            least = 2 * MIN_DOT
        if size < least or size & (size - 1):
            raise ValueError(f"tactic.{name}: expected a power of two of at least {least}, got {size}")
    if x.dtype == torch.float8_e4m3fn and tactic.block_k > MOST_FLOAT8 and tactic.block_m >= WARPGROUP_ROWS:
        raise NotImplementedError(
            f"tactic.block_k: at most {MOST_FLOAT8} of float8 for {WARPGROUP_ROWS} rows and more, got {tactic.block_k}"
        )
    if tactic.split_k < 1:
        raise ValueError(f"tactic.split_k: expected at least 1, got {tactic.split_k}")
    if tactic.library and tactic.schedule != "tiled":
        raise ValueError(f"tactic.schedule: expected 'tiled' with library, got {tactic.schedule!r}")
    if tactic.library and weight.data.element_size() == 1:
        raise NotImplementedError(f"library: {weight.data.dtype} weights; a tactic without library takes them")
    if eight_bits and tactic.schedule not in EIGHT_BIT_SCHEDULES:
        raise NotImplementedError(
            f"tactic.schedule {tactic.schedule!r}: x in {x.dtype}; {' and '.join(EIGHT_BIT_SCHEDULES)} take it"
        )


def _check_eight_bits(
    x: Tensor, weight: Weight, x_scale: Tensor | None, col_scale: Tensor | None, norm: InputNorm | None
) -> None:
    """Raises ValueError unless rows of 8 bits come with what they need, and others without."""
    eight_bits = x.dtype in (torch.int8, torch.float8_e4m3fn)
    if x_scale is None:
        if x.element_size() == 1:
            raise ValueError(f"x_scale: expected for {x.dtype}, got None")
        return
    if not eight_bits:
        raise ValueError(f"x: expected int8 or float8_e4m3fn with x_scale, got {x.dtype}")
    expect("x_scale", x_scale, (x.shape[0], x.shape[1]))
    if x_scale.dtype != torch.float32:
        raise ValueError(f"x_scale: expected float32, got {x_scale.dtype}")
    if weight.data.dtype != x.dtype:
        raise ValueError(f"weight.data: expected x's {x.dtype}, got {weight.data.dtype}")
    for name, given in (("norm", norm), ("col_scale", col_scale)):
        if given is not None:
            raise ValueError(f"{name}: expected None with x_scale, which quantize has applied; got one")


def launch_tiles(kernel: Any, call: ProductCall, more: dict[str, Any] | None = None) -> None:
    """Launch a kernel of tiles, one a program, or split_k programs a tile. more: its further arguments."""
    tactic, split_k = call.tactic, 1 if call.tactic.library else call.tactic.split_k
    if tactic.library:
        x, norm = library_product(call.x, call.weight.data, call.col_scale, call.norm, call.workspace)
        call = replace(call, x=x, norm=norm, col_scale=None)
    row_tiles = triton.cdiv(call.rows, tactic.block_m)
    tiles, split = row_tiles * call.column_tiles, split_k > 1
    numbers = tiles * split_k * tactic.block_m * call.tile_weights
    partials = call.workspace.partials(numbers) if split else None
    counters = call.workspace.counters(tiles) if split else None
    launch(
        kernel,
        (tiles * split_k,),
        {
            "program": None,
            "product": call.product(row_tiles, partials, counters),
            **call.epilogue,
            "HOW": call.how(tactic.block_m, row_tiles, split_k),
            **(more or {}),
        },
        tactic.warps,
        tactic.stages,
    )
