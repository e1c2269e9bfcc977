"""A model's code run on sizes alone: meta tensors, which have no values, and a ledger of what they would take.

What asks for a value has an answer that costs the most memory: no row of a batch is known to be without padding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """Bytes of the storages made inside that are alive. changed: called when they have become more.

    held: tensors that were there before; they and their views do not count.
    """

    def __init__(self, held: Iterable[Tensor], changed: Callable[[], None]) -> None:
        super().__init__()
        self.live = 0
        # A storage's number is another's when it is gone: they are kept.
        self._held = [value.untyped_storage() for value in held]
        self._known = {storage._cdata for storage in self._held}
        self._changed = changed

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._take(value.untyped_storage())
        return made

    def _take(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._freed, key, storage.nbytes())
        self._changed()

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class SizesAlone(TorchFunctionMode):
    """Inside, code runs on meta tensors where it asks for values. image_tokens: how many places a mask picks."""

    def __init__(self, image_tokens: int) -> None:
        super().__init__()
        self._image_tokens = image_tokens

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], kwargs.get("attn_mask"))
        if function is torch.tensor:
            # Its values are known, and some are asked for: the images' grids.
            return function(*args, **{**kwargs, "device": "cpu"})
        if function is Tensor.__bool__ and args[0].is_meta:
            return False
        if function in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            args = (args[0], self._places(args[1]), *args[2:])
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if any(value.is_meta for value in tensors) and not all(value.is_meta for value in tensors):
            args, kwargs = tree_map(lambda x: x.to(META) if isinstance(x, Tensor) else x, (args, kwargs))
        return function(*args, **kwargs)

    @staticmethod
    def backward(loss: Tensor) -> None:
        """As loss.backward(), which a mode is not there for: but what is computed again in it needs the mode."""
        one = torch.ones_like(loss)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _places(self, index: Any) -> Any:
        """Masks among an index become as many places as they pick."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            is_mask = isinstance(part, Tensor) and part.dtype == torch.bool
            places = torch.empty(self._image_tokens, dtype=torch.long, device=META) if is_mask else None
            parts += [part] if places is None else [places] * part.ndim
        return tuple(parts)


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps and makes, whatever torch would choose for a device without memory."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, spread = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        context.save_for_backward(q, k, v, out, spread, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        return *(torch.empty_like(value) for value in context.saved_tensors[:3]), None
