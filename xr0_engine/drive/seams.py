"""Async against naive_async in the ALOHA simulation: how far apart two chunks are where one takes over from the other.

Simulated time, so the same everywhere; the seeds are those of the policy's noise and of the cube's place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.drive.policies import Source
from xr0_engine.drive.run import run
from xr0_engine.executor import Recorder, Settings, read_recording
from xr0_engine.executor.settings import Mode
from xr0_engine.sim import JOINT_NAMES, columns_to_joints

MODES: tuple[Mode, ...] = ("async", "naive_async")
# A frame that the model sees costs time to draw; small ones are enough to compare two ways to execute.
IMAGE_SIZE = (120, 160)
# Of the picture's example: long enough to be seen.
EXAMPLE_DELAY = 4
EXAMPLE_S = 5.0
_JOINTS = [index for index, name in enumerate(JOINT_NAMES) if not name.endswith("gripper")]


@dataclass(frozen=True)
class Row:
    """One mode at one delay, all seeds together; steps of the joints' targets from one action to the next, radians.

    seam_mean, seam_largest: where a new chunk takes over: mean over joints and seams, and the largest of all.
    inner_mean: between actions of one chunk. late: actions dropped because they came too late.
    """

    mode: Mode
    delay_steps: int
    seams: int
    seam_mean_rad: float
    seam_largest_rad: float
    inner_mean_rad: float
    late: int


@dataclass(frozen=True)
class Comparison:
    """title: the policy. rows: by delay, then mode. examples, at EXAMPLE_DELAY: mode -> commanded joints (steps, 14),
    and the steps at which another chunk took over."""

    title: str
    rows: list[Row]
    examples: dict[Mode, tuple[np.ndarray, list[int]]]


def compare(source: Callable[[int], Source], delays: Sequence[int], seconds: float, seeds: Sequence[int]) -> Comparison:
    """Execute a policy with every mode, delay (in steps) and seed. source: seed -> policy."""
    rows, examples, title = [], {}, ""
    with tempfile.TemporaryDirectory() as folder:
        for delay in delays:
            for mode in MODES:
                reports = []
                for seed in seeds:
                    made = source(seed)
                    title = made.title
                    settings = Settings(
                        rate_hz=made.control_rate_hz,
                        mode=mode,
                        margin=0,
                        expected_delay_s=delay / made.control_rate_hz,
                        max_prefix=made.max_prefix,
                    )
                    path = Path(folder) / f"{mode}-{delay}-{seed}.jsonl"
                    with Recorder(path, title) as recorder:
                        reports.append(run(made, settings, seconds, True, delay, seed, recorder, IMAGE_SIZE))
                    if delay == EXAMPLE_DELAY and seed == seeds[0]:
                        examples[mode] = _example(path)
                rows.append(_row(mode, delay, reports))
    return Comparison(title, rows, examples)


def table(comparison: Comparison) -> str:
    """Markdown: a line for each delay, milliradians."""
    lines = [
        "| delay (steps) | async: mean step at a seam | largest | naive_async: mean step at a seam | largest | "
        "within chunks | actions too late, async / naive |",
        "|---|---|---|---|---|---|---|",
    ]
    for prefixed, naive in zip(comparison.rows[::2], comparison.rows[1::2], strict=True):
        steps_rad = [
            prefixed.seam_mean_rad,
            prefixed.seam_largest_rad,
            naive.seam_mean_rad,
            naive.seam_largest_rad,
            prefixed.inner_mean_rad,
        ]
        cells = [f"{1e3 * step_rad:.1f}" for step_rad in steps_rad]
        lines.append(f"| {prefixed.delay_steps} | {' | '.join(cells)} | {prefixed.late} / {naive.late} |")
    return "\n".join(lines)


def plot(comparison: Comparison, path: Path) -> None:
    """The table as curves, and as an example the joint that jumps most, commanded in either mode."""
    import matplotlib
    from matplotlib.figure import Figure

    from xr0_engine.plot import COLORS, STYLE

    colors = dict(zip(MODES, (COLORS[2], COLORS[0]), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.6), layout="constrained")
        figure.suptitle(f"Where chunks meet, ALOHA simulation: {comparison.title}", fontsize=12)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
        for mode in MODES:
            rows = [row for row in comparison.rows if row.mode == mode]
            delays = [row.delay_steps for row in rows]
            means, largest = ([1e3 * row.seam_mean_rad for row in rows], [1e3 * row.seam_largest_rad for row in rows])
            left.plot(delays, means, "o-", color=colors[mode], label=f"{mode}, mean")
            left.plot(delays, largest, "^:", color=colors[mode], linewidth=1, label=f"{mode}, largest")
        prefixed = comparison.rows[::2]
        inner = [1e3 * row.inner_mean_rad for row in prefixed]
        left.plot([row.delay_steps for row in prefixed], inner, "--", color="0.4", label="within chunks, mean")
        left.set_xlabel("delay of the inference (steps of 1/30 s)")
        left.set_ylim(bottom=0)
        left.set_ylabel("step at a seam (mrad)")
        left.legend()
        _plot_example(right, comparison, colors)
        figure.savefig(path, dpi=110)


def _plot_example(axes: Any, comparison: Comparison, colors: dict[Mode, str]) -> None:
    naive, seams = comparison.examples["naive_async"]
    steps = np.abs(naive[seams] - naive[np.array(seams) - 1]).mean(axis=0)
    joint = max(_JOINTS, key=lambda index: float(steps[index]))
    for mode in reversed(MODES):
        joints, seams = comparison.examples[mode]
        time_s = np.arange(len(joints)) / 30
        axes.plot(time_s, joints[:, joint], color=colors[mode], label=mode)
        axes.plot(time_s[seams], joints[seams, joint], "o", color=colors[mode], markersize=4)
    axes.set_xlim(0, EXAMPLE_S)
    axes.set_xlabel("time (s)")
    axes.set_ylabel(f"{JOINT_NAMES[joint]}, commanded (rad)")
    axes.set_title(f"delay of {EXAMPLE_DELAY} steps; dot: another chunk takes over", loc="left")
    axes.legend()


def _row(mode: Mode, delay: int, reports: list[Any]) -> Row:
    weights = np.array([report.seams.count for report in reports], float)
    means = [columns_to_joints(report.seams.mean)[_JOINTS].mean() for report in reports]
    return Row(
        mode=mode,
        delay_steps=delay,
        seams=int(weights.sum()),
        seam_mean_rad=float(np.average(means, weights=weights)),
        seam_largest_rad=max(float(columns_to_joints(report.seams.largest)[_JOINTS].max()) for report in reports),
        inner_mean_rad=float(np.mean([columns_to_joints(report.inner.mean)[_JOINTS].mean() for report in reports])),
        late=sum(report.counts["late"] for report in reports),
    )


def _example(path: Path) -> tuple[np.ndarray, list[int]]:
    lines = [line for line in read_recording(path).lines["step"] if line["source"] == "chunk"]
    chunks = [line["chunk"] for line in lines]
    seams = [index for index in range(1, len(lines)) if chunks[index] != chunks[index - 1]]
    return columns_to_joints(np.array([line["row"] for line in lines])), seams
