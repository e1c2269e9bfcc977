"""Open-loop validation: how far predicted chunks are from recorded ones, in robot units, and the plot of a run.

The baseline predicts the mean of the training data, per step of the chunk and column, whatever it sees. A single chunk
of a policy that knows no more than the spread of the data is further away than it, by up to the square root of two for
the normal distribution; the mean of several chunks is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xr0_engine.files import json_lines, reading
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.training.batch import Collator
from xr0_engine.training.data.samples import RobotSample
from xr0_engine.training.distributed import World
from xr0_engine.training.draws import micro_batch_generator
from xr0_engine.training.model import Policy
from xr0_engine.training.run_folder import METRICS_FILE
from xr0_engine.types import FileError

NOISE_SEED = 2**20 - 1
"""Validation starts from the same noise every time."""
CLOSED_LOOP = "closed_loop/"
"""How the names of what closed-loop validation says begin."""


@torch.no_grad()
def validate(
    policy: Policy,
    collate: Collator,
    samples: Iterable[RobotSample],
    batch_size: int,
    statistics: Mapping[str, ActionStatistics],
    world: World,
    draws: int = 1,
) -> dict[str, Any]:
    """Mean L1 over everything supervised, in robot units, all processes together.

    samples: the same in every process; each takes as many, so that up to a process's number of them are left out. What
    is held of them is this process's batch, and the next while it is read. draws: chunks for each sample, from as many
    noises. Returns l1, of the first of them; l1_mean, of their mean, as the baseline is a mean; baseline_l1; ratio and
    ratio_mean, the baseline over each; l1_by_step, baseline_by_step (T). Raises ValueError for fewer samples than
    processes.
    """
    policy.eval()
    length, width = next(iter(statistics.values())).mean.shape
    sums = torch.zeros(4, length, dtype=torch.float64)
    for number, chosen in enumerate(_shares(samples, batch_size, world)):
        batch = collate.robot(chosen)
        generator = micro_batch_generator(NOISE_SEED, number * world.size + world.rank)
        noise = torch.stack([torch.randn(len(chosen), length, width, generator=generator) for _ in range(draws)])
        normalized = policy.predict(batch.to(world.device), noise.to(world.device)).float().cpu().numpy()
        for row, sample in enumerate(chosen):
            table = statistics[sample.robot_type]
            mask = batch.mask[row].numpy() > 0
            guesses = table.denormalize(normalized[0, row]), table.denormalize(normalized[:, row].mean(0)), table.mean
            for place, guess in enumerate(guesses):
                error = np.where(mask, np.abs(guess - sample.actions), 0).sum(1)
                sums[place] += torch.from_numpy(error.astype(np.float64))
            sums[3] += torch.from_numpy(mask.sum(1).astype(np.float64))
    policy.train()
    l1, l1_mean, baseline, count = world.sum(sums).double()
    per_step = count.clamp(min=1)
    return {
        "l1": float(l1.sum() / per_step.sum()),
        "l1_mean": float(l1_mean.sum() / per_step.sum()),
        "baseline_l1": float(baseline.sum() / per_step.sum()),
        "ratio": float(baseline.sum() / l1.sum()),
        "ratio_mean": float(baseline.sum() / l1_mean.sum()),
        "l1_by_step": (l1 / per_step).tolist(),
        "baseline_by_step": (baseline / per_step).tolist(),
    }


def _shares(samples: Iterable[RobotSample], batch_size: int, world: World) -> Iterator[list[RobotSample]]:
    """This process's batches: every world.size-th sample, as many in every process, since they predict together."""
    mine: list[RobotSample] = []
    number = -1
    for number, sample in enumerate(samples):
        if number % world.size == world.rank:
            mine.append(sample)
        if (number + 1) % (batch_size * world.size) == 0:
            yield mine
            mine = []
    total = number + 1
    # What the last ones in turn have and the others have not is left out.
    if rest := mine[: total % (batch_size * world.size) // world.size]:
        yield rest
    if total < world.size:
        raise ValueError(f"validation: expected at least one sample for each of {world.size} processes, got {total}")


def plot_run(folder: Path, out: Path) -> None:
    """Training loss, validation L1 over the steps and by step of the chunk, what closed-loop validation says if there
    is one; from the run's metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with reading(folder / METRICS_FILE, FileError):
        lines = [line for _, line in json_lines(folder / METRICS_FILE, FileError)]
        training = [line for line in lines if line.get("loss") is not None]
        checked = [line for line in lines if "validation/l1" in line]
        driven = [line for line in lines if any(name.startswith(CLOSED_LOOP) for name in line)]
        panels = 1 + 2 * bool(checked) + bool(driven)
        figure, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 3.6), layout="constrained", squeeze=False)
        left, *others = axes[0]
        left.plot([line["step"] for line in training], [line["loss"] for line in training], color="#0072B2")
        left.set(title="Training loss", xlabel="step", yscale="log")
        if checked:
            _plot_open_loop(others[0], others[1], checked)
        if driven:
            _plot_closed_loop(others[-1], driven)
    for one in axes[0]:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _plot_open_loop(over_steps: Any, by_step: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    steps, last = [line["step"] for line in lines], lines[-1]
    over_steps.plot(steps, [line["validation/l1"] for line in lines], "o-", color="#D55E00", label="policy")
    # A run that began before there was one.
    if "validation/l1_mean" in last:
        means = [line.get("validation/l1_mean", math.nan) for line in lines]
        over_steps.plot(steps, means, "o-", color="#E69F00", label="mean of the policy's chunks")
    baseline = last["validation/baseline_l1"]
    over_steps.axhline(baseline, color="grey", linestyle="--", label="mean of the training data")
    over_steps.axhline(baseline / 3, color="grey", linestyle=":", label="a third of it")
    title = f"Open-loop L1 (last: {last['validation/ratio']:.1f} times below)"
    over_steps.set(title=title, xlabel="step", ylabel="robot units", ylim=(0, None))
    over_steps.legend(frameon=False)
    chunk = range(1, len(last["validation/l1_by_step"]) + 1)
    by_step.plot(chunk, last["validation/l1_by_step"], color="#D55E00", label="policy")
    by_step.plot(chunk, last["validation/baseline_by_step"], "--", color="grey", label="mean")
    by_step.set(
        title="The last, by step of the chunk", xlabel="step of the chunk", ylabel="robot units", ylim=(0, None)
    )
    by_step.legend(frameon=False)


def _plot_closed_loop(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(CLOSED_LOOP))
    for name in names:
        values = [line.get(name, math.nan) for line in lines]
        axes.plot([line["step"] for line in lines], values, "o-", label=name.removeprefix(CLOSED_LOOP))
    axes.set(title="Closed loop", xlabel="step")
    axes.legend(frameon=False)
