"""Frozen layers whose weights stay in the machine's memory, for cards that the frozen part alone would fill.

A layer's weights are copied to the device when its forward pass begins and let go when it ends. With gradients its
activations must be computed again in the backward pass, which copies them once more: else the graph would keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class HostWeights:
    """The frozen parameters of some layers, out of these layers' hands: no one who asks for a model's parameters sees
    them. Without values until fill()."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """model: whose names they bear. Layers with frozen parameters run with copies of them from now on, in dtype."""
        names = {module: name for name, module in model.named_modules()}
        self._kept: dict[str, Tensor] = {}
        self._device = torch.device("meta")
        for layer in layers:
            places = []
            for module in layer.modules():
                for own, parameter in list(module.named_parameters(recurse=False)):
                    if not parameter.requires_grad:
                        name = f"{names[module]}.{own}"
                        self._kept[name] = torch.empty_like(parameter, dtype=dtype)
                        places.append((module, own, name))
                        # What the module is asked for meanwhile is None, as a bias that a layer does not have.
                        module.register_parameter(own, None)
            layer.forward = partial(self._run, layer.forward, places)

    def fill(self, values: Callable[[str], Tensor], device: torch.device) -> None:
        """values: a parameter's name -> its value. device: where the layers run."""
        self._device = device
        for name, empty in self._kept.items():
            # Not a view of the checkpoint's file; and what is copied from memory that may be moved is waited for.
            kept = torch.empty(empty.shape, dtype=empty.dtype, pin_memory=device.type == "cuda")
            self._kept[name] = kept.copy_(values(name))

    def _run(
        self, forward: Callable[..., Any], places: Sequence[tuple[nn.Module, str, str]], *args: Any, **kwargs: Any
    ) -> Any:
        for module, own, name in places:
            module._parameters[own] = self._kept[name].to(self._device, non_blocking=True, copy=True)  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            for module, own, _ in places:
                module._parameters[own] = None
