"""Open-loop validation: how far predicted chunks are from recorded ones, in robot units, and the plot of a run.

The baseline predicts the mean of the training data, per step of the chunk and column, whatever it sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from xr0_engine.types import FileError

NOISE_SEED = 2**20 - 1
"""Validation starts from the same noise every time."""


@torch.no_grad()
def validate(
    policy: Policy,
    collate: Collator,
    samples: Iterable[RobotSample],
    batch_size: int,
    statistics: Mapping[str, ActionStatistics],
    world: World,
) -> dict[str, Any]:
    """Mean L1 over everything supervised, in robot units, all processes together.

    samples: the same in every process; each takes as many, so that up to a process's number of them are left out.
    Returns l1, baseline_l1, ratio (baseline over policy) and l1_by_step, baseline_by_step (T).
    """
    mine, shares = [], 0
    for number, sample in enumerate(samples):
        if number % world.size == world.rank:
            mine.append(sample)
        shares = (number + 1) // world.size
    if not shares:
        raise ValueError(f"validation: expected at least one sample for each of {world.size} processes")
    policy.eval()
    length, width = next(iter(statistics.values())).mean.shape
    sums = torch.zeros(3, length, dtype=torch.float64)
    for number, start in enumerate(range(0, shares, batch_size)):
        chosen = mine[start : min(start + batch_size, shares)]
        batch = collate.robot(chosen)
        generator = micro_batch_generator(NOISE_SEED, number * world.size + world.rank)
        noise = torch.randn(len(chosen), length, width, generator=generator)
        normalized = policy.predict(batch.to(world.device), noise.to(world.device)).float().cpu().numpy()
        for row, sample in enumerate(chosen):
            table = statistics[sample.robot_type]
            mask = batch.mask[row].numpy() > 0
            predicted = table.denormalize(normalized[row])
            for place, guess in enumerate((predicted, table.mean)):
                error = np.where(mask, np.abs(guess - sample.actions), 0).sum(1)
                sums[place] += torch.from_numpy(error.astype(np.float64))
            sums[2] += torch.from_numpy(mask.sum(1).astype(np.float64))
    policy.train()
    l1, baseline, count = world.sum(sums).double()
    per_step = count.clamp(min=1)
    return {
        "l1": float(l1.sum() / per_step.sum()),
        "baseline_l1": float(baseline.sum() / per_step.sum()),
        "ratio": float(baseline.sum() / l1.sum()),
        "l1_by_step": (l1 / per_step).tolist(),
        "baseline_by_step": (baseline / per_step).tolist(),
    }


def plot_run(folder: Path, out: Path) -> None:
    """Training loss, validation L1 over the steps and by step of the chunk, from the run's metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with reading(folder / "metrics.jsonl", FileError):
        lines = [line for _, line in json_lines(folder / "metrics.jsonl", FileError)]
        training = [line for line in lines if line.get("loss") is not None]
        checked = [line for line in lines if "validation/l1" in line]
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        left.plot([line["step"] for line in training], [line["loss"] for line in training], color="#0072B2")
        left.set(title="Training loss", xlabel="step", yscale="log")
        if checked:
            steps = [line["step"] for line in checked]
            middle.plot(steps, [line["validation/l1"] for line in checked], "o-", color="#D55E00", label="policy")
            baseline = checked[-1]["validation/baseline_l1"]
            middle.axhline(baseline, color="grey", linestyle="--", label="mean of the training data")
            middle.axhline(baseline / 3, color="grey", linestyle=":", label="a third of it")
            ratio = checked[-1]["validation/ratio"]
            middle.set(
                title=f"Open-loop L1 (last: {ratio:.1f} times below)",
                xlabel="step",
                ylabel="robot units",
                ylim=(0, None),
            )
            middle.legend(frameon=False)
            chunk = range(1, len(checked[-1]["validation/l1_by_step"]) + 1)
            right.plot(chunk, checked[-1]["validation/l1_by_step"], color="#D55E00", label="policy")
            right.plot(chunk, checked[-1]["validation/baseline_by_step"], "--", color="grey", label="mean")
            right.set(
                title="The last, by step of the chunk", xlabel="step of the chunk", ylabel="robot units", ylim=(0, None)
            )
            right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)
