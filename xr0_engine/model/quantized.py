"""Linear layers whose weights have 8 bits: what they compute, and how they take a model's linear layers' place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr0_engine.kernels import reference
from xr0_engine.model.dit import ActionHead
from xr0_engine.model.layers import PackedLinears
from xr0_engine.model.quantization import MOST, ROW_FORMATS, WEIGHT_DTYPES, Format
from xr0_engine.model.xr0 import XR0Model


class QuantizedLinear(nn.Module):
    """weight: (N, K) in 8 bits; weight_scale: (N,) float32; bias: (N,) or None, in the model's dtype. largest: None, or
    what tells the magnitude that rows are rounded by now, all alike, as in an export, instead of each by its own.

    Allocated without values: `take` a weight, or fill the parameters from a quantised checkpoint.
    """

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        super().__init__()
        self.format: Format = format
        self.largest: Callable[[], float] | None = None
        place = linear.weight.device
        weight = torch.empty(linear.weight.shape, dtype=WEIGHT_DTYPES[format], device=place)
        scale = torch.empty(len(weight), dtype=torch.float32, device=place)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """To another device as every module; a cast of the model is none of these: their dtypes are their meaning."""
        kept = self.weight.dtype, self.weight_scale.dtype
        super()._apply(fn, recurse)
        for parameter, dtype in zip((self.weight, self.weight_scale), kept, strict=True):
            if parameter.dtype != dtype:
                if not parameter.is_meta:
                    raise TypeError(f"a quantised layer cannot be cast to {parameter.dtype}: load it anew")
                parameter.data = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
        return self

    def take(self, weight: Tensor) -> None:
        """Quantise the weight of the layer in whose place this one stands, (N, K) floating point."""
        q, scale = rounded(weight.to(self.weight.device), self.format)
        self.weight.data.copy_(q)
        self.weight_scale.data.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N) in x's dtype: sums, scales and bias in float32 or as exact, rounded once; of
        8-bit weights alone on a GPU, the weight is rounded to x's dtype first."""
        rows = x.flatten(0, -2)
        if self.format == "int8-weights" and x.is_cuda:
            # Scaled before the product, which in float16 would overflow without.
            y = F.linear(rows, (self.weight.float() * self.weight_scale[:, None]).to(x.dtype)).float()
            y = (y if self.bias is None else y.add_(self.bias.float())).to(x.dtype)
        elif self.format == "int8-weights":
            y = reference.product_8bit_weight(rows, self.weight, self.weight_scale)
            y = (y if self.bias is None else y.add_(self.bias.float())).to(x.dtype)
        else:
            if self.largest is None:
                q, scale = reference.quantize_rows(rows, self.weight.dtype)
            else:
                whole = torch.tensor(self.largest() / MOST[self.format], dtype=x.dtype, device=x.device)
                q, scale = rounded_by(rows, whole, self.format), whole.float().expand(len(rows))
            y = reference.product_8bit(q, scale, self.weight, self.weight_scale, self.bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.format}"


def rounded(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """A weight (N, K) in 8 bits, and its scales (N,) float32."""
    return reference.quantize_rows(weight, WEIGHT_DTYPES[format])


def rounded_by(rows: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Rows (M, K) in 8 bits by one scale, () in their dtype, as ONNX's QuantizeLinear has it: to nearest, ties to even,
    what is beyond cut off."""
    if format == "int8":
        return reference.quantize_by(rows, scale)
    return (rows / scale).clamp(-MOST[format], MOST[format]).to(WEIGHT_DTYPES[format])


def module_path(layer: str) -> str:
    """A layer's name in a checkpoint -> its place in the model."""
    return layer if layer.startswith("vlm.") else f"head.{layer}"


def put_quantized(model: nn.Module, layers: Mapping[str, Format], path: Callable[[str], str] = module_path) -> None:
    """Replace linear layers of a model that has no memory yet. path: where a layer is. Raises AttributeError for one
    that the model has not."""
    for layer, format in layers.items():
        linear = model.get_submodule(path(layer))
        assert isinstance(linear, nn.Linear), layer
        model.set_submodule(path(layer), QuantizedLinear(linear, format))


def round_by(model: XR0Model, largest: Mapping[str, Sequence[float]]) -> None:
    """Let a quantised model's layers round rows as an export of it does. largest: as Quantization has it."""
    head = model.head
    for layer, values in largest.items():
        module = model.get_submodule(module_path(layer))
        if isinstance(module, QuantizedLinear) and module.format in ROW_FORMATS:
            module.largest = partial(_of_step, head, values) if len(values) > 1 else partial(float, values[0])


def _of_step(head: ActionHead, values: Sequence[float]) -> float:
    return values[head.step]


@contextmanager
def quantized(model: XR0Model, layers: Mapping[str, Format]) -> Iterator[None]:
    """Within, these layers of a loaded model are in 8 bits; its own weights stay, and are back afterwards."""
    linears = {layer: model.get_submodule(module_path(layer)) for layer in layers}
    packed = {module: module.packed for module in model.modules() if isinstance(module, PackedLinears)}
    try:
        for layer, linear in linears.items():
            assert isinstance(linear, nn.Linear), layer
            stands_in = QuantizedLinear(linear, layers[layer])
            stands_in.take(linear.weight)
            model.set_submodule(module_path(layer), stands_in)
        for module in packed:
            module.packed = None
        model.forget_preambles()
        yield
    finally:
        for layer, linear in linears.items():
            model.set_submodule(module_path(layer), linear)
        for module, whole in packed.items():
            module.packed = whole
        model.forget_preambles()
