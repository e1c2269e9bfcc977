"""A linear layer of the model, or several that read one input, as the fused ops multiply by it.

In 16 bits the norm before it is folded into its weight, in place. A weight in 8 bits stays as it is stored: its norm
goes to the columns of the input, or with the rows into 8 bits. Shape legend: B batch, M rows, K columns in, N out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xr0_engine.fused.ops import FusedOps, InputNorm, RowScratch, Weight
from xr0_engine.model.layers import PackedLinears, RMSNorm
from xr0_engine.model.quantization import WEIGHT_DTYPES, Format, mixed_layers
from xr0_engine.model.quantized import QuantizedLinear

LEAST_CAPABILITY = {"int8": 80, "fp8": 89}
"""Format of rows -> the least compute capability of GPUs that multiply it."""
CHIPS = {"int8": "RTX 30, A100 and newer", "fp8": "RTX 40, H100 and newer"}


@dataclass(frozen=True)
class Product:
    """weight: (N, K); bias: (N,) or None. rows: int8 or float8_e4m3fn, to which rows of the input are rounded first;
    None: they are multiplied in 16 bits.

    column_sums: (N,) float32, of a layer norm's folded weight. col_scale, shift: (K,) float32, a norm's weight and a
    layer norm's bias, where they are not folded.
    """

    weight: Weight
    bias: Tensor | None = None
    rows: torch.dtype | None = None
    column_sums: Tensor | None = None
    col_scale: Tensor | None = None
    shift: Tensor | None = None

    @staticmethod
    def of(layer: nn.Module, dtype: torch.dtype) -> Product:
        """Of a linear layer, quantised or not, or of packed ones. dtype: the model's. Raises NotImplementedError for
        packed ones of several formats."""
        if isinstance(layer, PackedLinears):
            parts = [layer.get_submodule(name) for name in layer.part_sizes]
            if len({getattr(part, "format", None) for part in parts}) > 1:
                raise NotImplementedError(
                    f"{', '.join(layer.part_sizes)}: the kernels multiply them at once, and these have several formats"
                )
            assert layer.packed is not None, "the model was not packed"
            return Product(Weight(layer.packed, layer.packed_scale, dtype), None, _rows_of(parts[0]))
        if isinstance(layer, QuantizedLinear):
            return Product(Weight(layer.weight, layer.weight_scale, dtype), layer.bias, _rows_of(layer))
        assert isinstance(layer, nn.Linear), type(layer)
        return Product(Weight(layer.weight), layer.bias)

    @staticmethod
    def after_rms_norm(norm: RMSNorm, layer: nn.Module) -> Product:
        """Of an input that `norm` comes before."""
        plain = Product.of(layer, norm.weight.dtype)
        if plain.weight.scale is None:
            fold_rms_norm(norm, [plain.weight.data])
            return plain
        return replace(plain, col_scale=norm.weight.float())

    @staticmethod
    def after_layer_norm(norm: nn.LayerNorm, linear: nn.Module) -> Product:
        plain = Product.of(linear, norm.weight.dtype)
        if plain.weight.scale is None:
            assert isinstance(linear, nn.Linear)
            fold_layer_norm(norm, linear)
            return replace(plain, column_sums=plain.weight.data.float().sum(1))
        return replace(plain, col_scale=norm.weight.float(), shift=norm.bias.float())

    def wide(self) -> Tensor:
        """The weight as it is multiplied, (N, K) float32."""
        data, scale = self.weight.data.float(), self.weight.scale
        return data if scale is None else data * scale[:, None]

    def take(
        self,
        ops: FusedOps,
        x: Tensor,
        scratch: RowScratch,
        norm: InputNorm | None = None,
        col_scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the product's op multiplies, and its options that depend on it: x (B, M, K), or its rows in 8 bits.

        norm: the one before it, without column_sums. col_scale, shift: (K,) float32 of what is no part of the model's
        norms; they take the place of its own. A shift is read where rows have 8 bits: else it is in the op's bias.
        """
        scale = self.col_scale if col_scale is None else col_scale
        if self.rows is not None:
            rows = scratch.eight[: x.numel()].view(x.shape).view(self.rows)
            row_scale = scratch.scale[: x.shape[0] * x.shape[1]].view(x.shape[:2])
            ops.quantize(x, rows, row_scale, norm=norm, col_scale=scale, bias=self.shift if shift is None else shift)
            return rows, {"x_scale": row_scale}
        if norm is not None and scale is not None and self.shift is not None:
            # By columns it would be applied to rows whose mean is still in them, and round that.
            normed = scratch.normed[: x.numel()].view(x.shape)
            ops.layer_norm(x, scale, self.shift, norm.eps, normed)
            return normed, {}
        if norm is not None and self.column_sums is not None:
            norm = replace(norm, column_sums=self.column_sums)
        return x, {"norm": norm, "col_scale": scale}


def scratch_for(products: Iterable[tuple[Product, int]], dtype: torch.dtype, device: torch.device) -> RowScratch:
    """products: each with how many rows its input has. dtype: of the model."""
    eight = scale = normed = 0
    for product, rows in products:
        elements = rows * product.weight.data.shape[1]
        if product.rows is not None:
            eight, scale = max(eight, elements), max(scale, rows)
        elif product.shift is not None:
            normed = max(normed, elements)
    return RowScratch(
        torch.zeros(eight, dtype=torch.int8, device=device),
        torch.zeros(scale, device=device),
        torch.zeros(normed, dtype=dtype, device=device),
    )


def fold_rms_norm(norm: RMSNorm, weights: list[Tensor]) -> None:
    """Move the norm's weight into what multiplies its output, in place: the two together stay what they are."""
    for weight in weights:
        weight.copy_(weight.float() * norm.weight.float())
    norm.weight.fill_(1)


def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """The same for a LayerNorm, whose bias goes into the linear layer's."""
    weight = linear.weight.float()
    linear.bias.copy_(linear.bias.float() + weight @ norm.bias.float())
    linear.weight.copy_(weight * norm.weight.float())
    norm.weight.fill_(1)
    norm.bias.zero_()


def refusal_of(layers: Mapping[str, Format], text_layers: int, arch: int) -> str | None:
    """Why the kernels do not run a model of so many text layers with these in 8 bits, None if they do. arch: compute
    capability, 0 if there is no GPU."""
    for format, least in LEAST_CAPABILITY.items():
        if format in layers.values() and 0 < arch < least:
            return f"layers of format {format} need a GPU of compute capability {least / 10} ({CHIPS[format]})"
    if mixed := mixed_layers(layers, text_layers):
        return f"the kernels multiply {' and '.join(mixed)} at once, which have several formats"
    return None


def _rows_of(layer: nn.Module) -> torch.dtype | None:
    format = layer.format if isinstance(layer, QuantizedLinear) else "int8-weights"
    return None if format == "int8-weights" else WEIGHT_DTYPES[format]
