"""Inputs of a step as views of one buffer, on the host and on the device: everything goes over in one transfer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; kernels load 16 at once, and a cache line is 128."""


class Staging:
    """host, device: name -> tensor. On a GPU the host's side is pinned, and `upload` does not hold the host up."""

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        """fields: name -> shape and dtype."""
        offsets, total = {}, 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = total
            total += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self._uploaded = torch.cuda.Event() if on_gpu else None

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[offsets[name] : offsets[name] + torch.Size(shape).numel() * dtype.itemsize]
                .view(dtype)
                .view(shape)
                for name, (shape, dtype) in fields.items()
            }

        self.host, self.device = views(self._host), views(self._device)

    def wait(self) -> None:
        """Until the last upload has read the host's side, so that it can be written again."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def upload(self) -> None:
        """Copy all of it on the current stream."""
        self._device.copy_(self._host, non_blocking=True)
        if self._uploaded is not None:
            # The current stream of this device: another one may be current.
            self._uploaded.record(torch.cuda.current_stream(self._device.device))
