"""What the means of a loss are taken over: all micro-batches of an optimiser step, in all processes.

A mean for each micro-batch would give an element of a sparsely supervised one more weight than its neighbours have. So
each micro-batch divides its sums by the counts of the whole step, which are known before its backward pass: then every
supervised element weighs alike, as in one batch of that size. What a micro-batch draws or measures for itself stays its
own: the prefix, the hidden columns, and the mean error that its error weights are relative to, for which the model
would have to run over all of them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xr0_engine.training.batch import IGNORED, LanguageBatch, RobotBatch
from xr0_engine.training.config import FlowConfig
from xr0_engine.training.draws import FlowDraw
from xr0_engine.training.losses import spectrum_selection


class Counts(NamedTuple):
    """Of one micro-batch: how much of it counts. Of a step: what each of its micro-batches divides its sums by.

    elements: supervised action values behind the prefix, in all draws. rows: samples times draws, which the frequency
    loss weighs alike. samples: those with anything supervised, which Choice Policies weigh alike. tokens: of text, to
    be predicted. bins: of spectra, that XR-1's spectrum term selects, in all draws.
    """

    elements: float = 0.0
    rows: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    bins: float = 0.0


def count(batch: RobotBatch | LanguageBatch, draw: FlowDraw | None, flow: FlowConfig | None = None) -> Counts:
    """Of one micro-batch; draw: in flow matching. flow: None selects no bins."""
    if isinstance(batch, LanguageBatch):
        return Counts(tokens=float((batch.labels[:, 1:] != IGNORED).sum()))
    samples = float((batch.mask.sum((1, 2)) > 0).sum()) if draw is None or batch.turn is not None else 0.0
    if draw is None:
        return Counts(samples=samples)
    mask, draws = batch.mask[:, draw.prefix_length :], len(draw.t) // len(batch.mask)
    selects = flow is not None and flow.frequency == "selected"
    bins = float(spectrum_selection(mask, flow.frequency_excluded).sum()) * draws if flow and selects else 0.0
    return Counts(float(mask.sum()) * draws, float(len(draw.t)), samples, bins=bins)


def step_counts(
    batches: Sequence[RobotBatch | LanguageBatch],
    draws: Sequence[FlowDraw | None],
    sum_over_processes: Callable[[Tensor], Tensor],
    flow: FlowConfig | None = None,
) -> Counts:
    """What this process's micro-batches of a step divide their sums by; every process calls it with as many.

    Robot and language data keep their shares of the step's micro-batches. Gradients are averaged over the processes
    and added up over the micro-batches, so that a process divides by its part of what all of them hold.
    """
    own = [
        [*count(batch, draw, flow), float(isinstance(batch, RobotBatch)), float(isinstance(batch, LanguageBatch))]
        for batch, draw in zip(batches, draws, strict=True)
    ]
    *totals, robot, language = sum_over_processes(torch.tensor(own, dtype=torch.float64).sum(0)).tolist()
    kinds = Counts(elements=robot, rows=robot, samples=robot, tokens=language, bins=robot)
    # Where there is nothing to sum up, any divisor gives 0.
    return Counts(*(len(batches) * total / kind if total else 1.0 for total, kind in zip(totals, kinds, strict=True)))
