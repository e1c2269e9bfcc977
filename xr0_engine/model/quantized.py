"""Linear layers whose weights have 8 bits: what they compute, and how they take a model's linear layers' place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr0_engine.kernels import reference
from xr0_engine.model.layers import PackedLinears
from xr0_engine.model.quantization import WEIGHT_DTYPES, Format
from xr0_engine.model.xr0 import XR0Model


class QuantizedLinear(nn.Module):
    """weight: (N, K) in 8 bits; weight_scale: (N,) float32; bias: (N,) or None, in the model's dtype.

    Allocated without values: `take` a weight, or fill the parameters from a quantised checkpoint.
    """

    def __init__(self, linear: nn.Linear, format: Format) -> None:
        super().__init__()
        self.format: Format = format
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
        q, scale = reference.quantize_rows(weight.to(self.weight.device), self.weight.dtype)
        self.weight.data.copy_(q)
        self.weight_scale.data.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N) in x's dtype: sums, scales and bias in float32, rounded once."""
        if self.format == "int8-weights":
            y = F.linear(_wide(x), self.weight.to(_wide(x).dtype)).float() * self.weight_scale
        else:
            q, scale = reference.quantize_rows(x.flatten(0, -2), self.weight.dtype)
            y = reference.product_8bit(q, scale, self.weight, self.weight_scale).unflatten(0, x.shape[:-1])
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.format}"


def _wide(x: Tensor) -> Tensor:
    """What weights of 8 bits are multiplied with in 16: on a processor, whose sums are converted anyway, in float32."""
    return x if x.is_cuda else x.float()


def module_path(layer: str) -> str:
    """A layer's name in a checkpoint -> its place in the model."""
    return layer if layer.startswith("vlm.") else f"head.{layer}"


def put_quantized(model: nn.Module, layers: Mapping[str, Format]) -> dict[str, QuantizedLinear]:
    """Replace linear layers of a model that has no memory yet. Returns layer -> what stands there now. Raises
    AttributeError for a layer that the model has not."""
    placed = {}
    for layer, format in layers.items():
        linear = model.get_submodule(module_path(layer))
        assert isinstance(linear, nn.Linear), layer
        placed[layer] = QuantizedLinear(linear, format)
        model.set_submodule(module_path(layer), placed[layer])
    return placed


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
