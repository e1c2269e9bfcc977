"""Steps handed to a GPU one behind the other: the next one's vision beside this one's flow.

The flow is a chain of small kernels, which leave most of a GPU idle; the vision, which needs nothing of it, fills that.
It has a stream of lower priority: the flow's kernels go first, and what it takes is what they leave. Two steps of one
session share its buffers: a vision starts when the prefill before it has read what the last one left, and that is all
that it shares with what it runs beside (scratch memory is the prefill's too, the flow has its own).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from xr0_engine.fused.session import Session
from xr0_engine.model.network import StageClock
from xr0_engine.robot.calls import Given
from xr0_engine.types import ModelInputs

FIRST = -1
"""Priority of the prefill's and the flow's stream; the vision's has the lowest, which is 0."""


class Launched:
    """A step on its way."""

    def __init__(self, chunk: Tensor, done: torch.cuda.Event) -> None:
        self._chunk, self._done = chunk, done

    def is_done(self) -> bool:
        return self._done.query()

    def chunk(self) -> Tensor:
        """(B, T, A) float32 on the host, the caller's. Waits for it."""
        self._done.synchronize()
        return self._chunk


@dataclass(frozen=True)
class Underway:
    """A call of Engine.infer_all at work."""

    clock: StageClock
    given: Given
    launched: Launched


class Lookahead:
    """Two streams of a GPU, and what is ordered how between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._main, self._beside = torch.cuda.Stream(device, priority=FIRST), torch.cuda.Stream(device)

    def beside(self) -> AbstractContextManager[object]:
        """Within, what is queued runs beside the step before: where the inputs of a launch are made."""
        return torch.cuda.stream(self._beside)

    @torch.inference_mode()
    def launch(
        self, session: Session, inputs: ModelInputs, noise: Tensor, prefix: Tensor, prefix_length: Tensor
    ) -> Launched:
        """Queue a whole step and wait for nothing. inputs: on the host, or made within `beside`.

        What the caller queues next on its own stream runs behind it. Raises what Session.update raises; steps that were
        launched before go on.
        """
        callers, main, beside = torch.cuda.current_stream(self._device), self._main, self._beside
        assert session.vision_free is not None, "a session of another device"
        beside.wait_event(session.vision_free)
        try:
            with torch.cuda.stream(beside):
                session.update_patches(inputs)
                session.replay("vision")
            main.wait_stream(beside)
            main.wait_stream(callers)
            with torch.cuda.stream(main):
                session.update_rest(inputs, noise, prefix, prefix_length)
                session.replay("prefill")
                session.replay("flow")
                chunk, done = session.chunk_on_host(), torch.cuda.Event()
                done.record(main)
        finally:
            # After a failure too: whoever uses the buffers next is behind all of it.
            callers.wait_stream(beside)
            callers.wait_stream(main)
        return Launched(chunk, done)
