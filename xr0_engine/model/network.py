"""The one face of a network: what an engine runs, whoever computes it.

XR0Model has it by PyTorch's operators, fused.FusedModel by our kernels, exported.ExportedModel by graphs of an export.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from xr0_engine.config import ModelConfig, VisionConfig
from xr0_engine.model.flow import Trace
from xr0_engine.types import KVBlock, ModelInputs, VisionTokens

Mark = Callable[[str], None]
"""Called with the name of each stage when its work has been handed to the device."""


Grids: TypeAlias = tuple[tuple[int, int], ...]


Method = TypeVar("Method", bound=Callable[..., Any])


def own_arithmetic(method: Method) -> Method:
    """For a Network's methods: no autograd, and no autocast that a caller has switched on for a model of his own."""

    @wraps(method)
    def run(self: Network, *given: Any, **named: Any) -> Any:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *given, **named)

    return run  # type: ignore[return-value]


def own_gradients(method: Method) -> Method:
    """As own_arithmetic, for methods that differentiate: they switch autograd on where they need it. What was made
    under own_arithmetic has to be cloned first."""

    @wraps(method)
    def run(self: Network, *given: Any, **named: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return method(self, *given, **named)

    return run  # type: ignore[return-value]


def unmarked(stage: str) -> None:
    """A Mark for those who do not ask."""


class StageClock:
    """Wall-clock milliseconds from mark to mark. wait: called before each, for work that is still under way."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self._wait = wait
        self._marks = [("start", self._now())]

    def mark(self, stage: str) -> None:
        self._marks.append((stage, self._now()))

    def finish(self) -> dict[str, float]:
        """Stage -> its time; `total`."""
        spans = {
            stage: 1e3 * (end - begin)
            for (_, begin), (stage, end) in zip(self._marks[:-1], self._marks[1:], strict=True)
        }
        return spans | {"total": 1e3 * (self._marks[-1][1] - self._marks[0][1])}

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()


class Network(Protocol):
    """Patches and tokens to a normalised action chunk, on one device, without autograd. Shapes as in types.py."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def patch_buffer(self, grids: Grids) -> Tensor:
        """New memory for pixel_values of images with these grids (height, width in patches), as suits the network."""

    def encode_images(self, inputs: ModelInputs) -> VisionTokens:
        """inputs.pixel_values through the vision tower. Raises ValueError if they have other columns than patches."""

    def prefill(self, inputs: ModelInputs, vision: VisionTokens) -> KVBlock:
        """The keys and values that the DiT reads. Raises ValueError if image tokens and images do not match."""

    def sample(
        self, kv: KVBlock, state: Tensor, noise: Tensor, prefix: Tensor, prefix_length: Tensor, trace: Trace = None
    ) -> Tensor:
        """One chunk per row of a KV block: (B, T, A) float32, in the model's units (spec section 2.5).

        state: (B, state_length, S); noise, prefix: (B, T, A) float32, prefix read where the row's prefix_length (B,)
        covers it; trace, if given, receives z before each step and after the last.
        """

    def step(
        self, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor, mark: Mark = unmarked
    ) -> Tensor:
        """All three at once, as fast as the network can: (B, T, A) float32 on its device, which its next call may
        overwrite. mark: called after `vision`, `prefill` and `flow` or, where they are one piece of work, `step`."""


def full_buffer(vision: VisionConfig, grids: Grids, dtype: torch.dtype) -> Tensor:
    """Network.patch_buffer of a network that multiplies whole patches: (P, patch_dim) on the host."""
    return torch.empty(sum(height * width for height, width in grids), vision.patch_dim, dtype=dtype, device="cpu")


def whole_patches(pixel_values: Tensor, vision: VisionConfig) -> Tensor:
    """(P, patch_dim): where pixel_values have one frame, it is repeated. Raises ValueError for other columns."""
    if vision.frames_of(pixel_values.shape[1]) == vision.temporal_patch_size:
        return pixel_values
    frame = pixel_values.unflatten(1, (vision.in_channels, 1, vision.patch_size**2))
    return frame.expand(-1, -1, vision.temporal_patch_size, -1).flatten(1)


def step_by_stages(
    network: Network, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor, mark: Mark
) -> Tensor:
    """Network.step of a network that runs its stages one after the other."""
    kv = block_by_stages(network, inputs, mark)
    chunk = network.sample(kv, inputs.state, noise, prefix, prefix_length)
    mark("flow")
    return chunk


def block_by_stages(network: Network, inputs: ModelInputs, mark: Mark = unmarked) -> KVBlock:
    """The first two stages."""
    vision = network.encode_images(inputs)
    mark("vision")
    kv = network.prefill(inputs, vision)
    mark("prefill")
    return kv
