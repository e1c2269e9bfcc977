"""Pictures of what the model saw and did: PNG through matplotlib, MP4 through PyAV, both imported when first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.robot.embodiment import Embodiment
from xr0_engine.robot.history import newest
from xr0_engine.robot.views import orient
from xr0_engine.types import ActionChunk, Observation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from xr0_engine.model.attention import Attention

STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Okabe and Ito's palette: told apart with any colour vision.
COLORS = ("#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9")
STAGES = ("preprocess", "vision", "prefill", "flow", "step", "decode")


def plot_chunk(chunk: ActionChunk, observation: Observation, embodiment: Embodiment, path: Path) -> None:
    """One chunk as curves over time beside the images that it comes from, as a PNG.

    chunk.actions are drawn in robot units, at the times when embodiment.control_rate_hz executes them. Raises
    ValueError if the chunk has no active column, OSError if path cannot be written.
    """
    from matplotlib.figure import Figure

    groups = embodiment.action_layout.panels(chunk.active_columns)
    if not groups:
        raise ValueError(f"chunk: expected active columns, robot type {chunk.robot_type!r} has none")
    rows = -(-len(groups) // 2)
    time_s = np.arange(len(chunk.actions)) / embodiment.control_rate_hz
    with style():
        figure = Figure(figsize=(13, max(1.7 * rows, 2.1 * len(embodiment.views)) + 0.7), layout="constrained")
        picture_part, curve_part = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 3.4))[0]
        figure.suptitle(f"{observation.instruction}   ·   {chunk.robot_type}", fontsize=12)
        pictures = picture_part.subplots(len(embodiment.views), 1, squeeze=False)[:, 0]
        for axes, view in zip(pictures, embodiment.views, strict=True):
            _show_image(axes, newest(observation.images[view.key]))
            axes.set_title(view.title)
        grid = curve_part.subplots(rows, 2, sharex=True, squeeze=False)
        # Down, then right: the left arm's panels above each other, the right arm's beside them.
        for axes, panel in zip(grid.T.flat, groups, strict=False):
            for column, color in zip(panel, COLORS, strict=False):
                values = chunk.actions[:, column.index]
                axes.plot(time_s, values, color=color, label=column.name, marker=".", markersize=3)
            axes.set_title(panel[0].group)
            axes.set_ylabel(panel[0].unit)
            axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
            if chunk.prefix_length:
                axes.axvspan(0, chunk.prefix_length / embodiment.control_rate_hz, color="0.9", zorder=0)
            if len(panel) > 1:
                axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1)
        for axes in list(grid.T.flat)[len(groups) :]:
            axes.set_visible(False)
        for axes in (grid.T.flat[min(rows, len(groups)) - 1], grid.T.flat[len(groups) - 1]):
            axes.set_xlabel("time after the images (s)")
            axes.tick_params(labelbottom=True)
        if chunk.prefix_length:
            curve_part.text(0.995, 0.005, "grey: the given prefix", ha="right", va="bottom", color="0.4")
        figure.savefig(path, dpi=110)


def plot_rollout(
    observations: Sequence[Observation],
    chunks: Sequence[ActionChunk],
    planned: Sequence[np.ndarray],
    measured: np.ndarray,
    embodiment: Embodiment,
    path: Path,
    title: str,
) -> None:
    """A closed loop with a robot of two arms as a PNG: camera frames, trajectories of joints, or of end effectors where
    the layout has no joints, and the latency of each stage.

    observations, chunks, planned: one of each per inference, timestamps in seconds from the start; planned: (T, A), a
    chunk's absolute rows. measured: (K, A), where the robot stood at every control tick, as such a row. Raises
    ValueError for a missing timestamp, OSError if path is not writable.
    """
    from matplotlib.figure import Figure

    starts_s = [observation.timestamp_s for observation in observations if observation.timestamp_s is not None]
    if len(starts_s) != len(observations):
        raise ValueError("observations: expected a timestamp_s in each, got None")
    shown = [observations[index] for index in spread(len(observations), 6)]
    with style():
        figure = Figure(figsize=(15, 12.5), layout="constrained")
        figure.suptitle(title, fontsize=13)
        picture_part, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.12, 1.3))[:, 0]
        curve_part, bar_part = lower.subfigures(1, 2, width_ratios=(3, 1))
        grid = picture_part.subplots(len(embodiment.views), len(shown), squeeze=False)
        for column, observation in enumerate(shown):
            grid[0, column].set_title(f"{observation.timestamp_s:.2f} s")
            for row, view in enumerate(embodiment.views):
                _show_image(grid[row, column], newest(observation.images[view.key]))
        for row, view in enumerate(embodiment.views):
            grid[row, 0].set_ylabel(view.title)
        _plot_trajectories(curve_part, starts_s, planned, measured, embodiment)
        _plot_latency(bar_part.subplots(), chunks)
        figure.savefig(path, dpi=100)


def plot_attention(attention: Attention, observation: Observation, embodiment: Embodiment, path: Path) -> None:
    """Where the sampled actions look, as a PNG: over each view as the model saw it, a row for each flow step, a column
    for each third of the sampled actions; below, what they take of each kind of token, by layer and by flow step.

    attention: Engine.attention's, of this observation. Raises ValueError if no action is sampled, OSError if path
    cannot be written.
    """
    from matplotlib.figure import Figure

    noisy = np.flatnonzero(attention.where("action", of="queries"))
    if not len(noisy):
        raise ValueError("attention: expected at least one sampled action, all of them were given")
    groups = [part for part in np.array_split(noisy, min(3, len(noisy))) if len(part)]
    steps, columns = len(attention.times), len(groups) * len(embodiment.views)
    with style():
        figure = Figure(figsize=(1.1 + 1.55 * columns, 1.5 * steps + 3.4), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.5 * steps + 0.6, 2.8))[:, 0]
        figure.suptitle(f"{observation.instruction}   ·   where the sampled actions look", fontsize=12)
        grid = upper.subplots(steps, columns, squeeze=False)
        for view_number, view in enumerate(embodiment.views):
            image = observation.images[view.key]
            # Videos: the newest frame stands for its last pictures.
            image = image[-1] if image.ndim == 4 else image
            image = image if observation.prepared else orient(image, view)
            taken = [_taken(attention, view.key, group) for group in groups]
            most = max(float(each.max()) for each in taken)
            for group_number, (group, maps) in enumerate(zip(groups, taken, strict=True)):
                column = view_number * len(groups) + group_number
                first, last = (attention.queries[place].index for place in (group[0], group[-1]))
                for row, weights in enumerate(maps):
                    _show_weights(grid[row, column], image, weights, most)
                title = view.title if group_number == 0 else ""
                grid[0, column].set_title(f"{title}\nactions {first} to {last}", loc="left")
        for row, time in enumerate(attention.times):
            grid[row, 0].set_ylabel(f"t = {time:.1f}")
        _plot_masses(lower, attention, noisy)
        figure.savefig(path, dpi=110)


def _taken(attention: Attention, view: str, queries: np.ndarray) -> np.ndarray:
    """(steps, rows, columns): Attention.picture of queries by number."""
    return attention.picture(view, np.isin(np.arange(len(attention.queries)), queries))


def _show_weights(axes: Axes, image: np.ndarray, weights: np.ndarray, most: float) -> None:
    """Weights (rows, columns) over a grey image, none to `most`; below it their sum in percent."""
    grey = image.mean(-1)
    _show_image(axes, np.repeat(grey[..., None], 3, -1).astype(np.uint8))
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    # Where nobody looks the picture stays as it is.
    opacity = 0.1 + 0.65 * weights / most
    axes.imshow(weights, cmap="inferno", vmin=0, vmax=most, alpha=opacity, extent=extent, interpolation="nearest")
    axes.set_xlabel(f"{100 * weights.sum():.1f} %", labelpad=1, fontsize=8)


def _plot_masses(part: Any, attention: Attention, noisy: np.ndarray) -> None:
    """Bars of what the queries `noisy` take of each kind of token, which add up to 1."""
    from xr0_engine.model.attention import KINDS

    by_layer, by_step = part.subplots(1, 2, squeeze=False)[0]
    kinds = [kind for kind in KINDS if attention.where(kind).any()]
    # (kinds, steps, layers)
    masses = np.stack([attention.mass(kind)[..., noisy].mean((2, 3)) for kind in kinds])
    layers, times = masses.mean(1), masses.mean(2)
    for axes, shares, names in (
        (by_layer, layers, [str(1 + layer) for layer in range(layers.shape[1])]),
        (by_step, times, [f"{time:.1f}" for time in attention.times]),
    ):
        below = np.zeros(shares.shape[1])
        for kind, share, color in zip(kinds, shares, COLORS, strict=False):
            axes.bar(names, share, bottom=below, color=color, label=_KIND_NAMES.get(kind, kind))
            below += share
        axes.set_ylim(0, 1)
        axes.grid(visible=False)
    by_layer.set_ylabel("share of attention")
    by_layer.set_xlabel("layer of the action head")
    by_step.set_xlabel("flow time (0 is noise)")
    by_step.legend(loc="center left", bbox_to_anchor=(1, 0.5))


_KIND_NAMES = {"action": "sampled actions"}


@contextmanager
def video_writer(path: Path, width: int, height: int, rate_hz: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an H.264 MP4 frame by frame: the function it gives takes (height, width, 3) uint8 RGB; even sizes only.

    Raises OSError if path cannot be written.
    """
    import av

    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate_hz), options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Encoding ends when write returns: threads still at work would slow down what the caller measures next.
        stream.thread_count = 1

        def write(frame: np.ndarray) -> None:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield write
        container.mux(stream.encode(None))


def _plot_trajectories(
    part: Any,
    starts_s: Sequence[float],
    planned: Sequence[np.ndarray],
    measured: np.ndarray,
    embodiment: Embodiment,
) -> None:
    """One small panel per joint or coordinate: what was measured, and every chunk's prediction from where it was
    made."""
    columns, rate_hz = embodiment.action_layout.columns, embodiment.control_rate_hz
    kind = "joints" if any(column.group.endswith("joints") for column in columns) else "position"
    unit = next(column.unit for column in columns if column.group.endswith(kind))
    shown_of = {
        side: [column for column in columns if column.group in (f"{side} {kind}", f"{side} gripper")]
        for side in ("left", "right")
    }
    grid = part.subplots(len(shown_of["left"]), 2, sharex=True)
    for column_axes, (side, shown) in zip(grid.T, shown_of.items(), strict=True):
        for axes, column in zip(column_axes, shown, strict=True):
            for start_s, rows in zip(starts_s, planned, strict=True):
                steps = np.arange(len(rows)) + 1
                times_s = start_s + steps / rate_hz
                axes.plot(times_s, rows[:, column.index], color=COLORS[0], linewidth=0.8, alpha=0.7)
            axes.plot(np.arange(len(measured)) / rate_hz, measured[:, column.index], color=COLORS[2])
            axes.set_ylabel(column.name or "gripper", rotation=0, ha="right", va="center")
        column_axes[0].set_title(f"{side} arm ({unit}; gripper 0 closed, 1 open)")
        column_axes[-1].set_xlabel("simulated time (s)")
    *predictions, executed = grid[0, 0].get_lines()
    part.legend(
        [executed, predictions[0]], ["executed", "predicted chunks"], loc="outside upper center", ncols=2, fontsize=10
    )


def _plot_latency(axes: Axes, chunks: Sequence[ActionChunk]) -> None:
    """A bar for the median of each stage, a dot for each inference."""
    stages = [stage for stage in (*STAGES, "total") if stage in chunks[0].timing_ms]
    times_ms = np.array([[chunk.timing_ms[stage] for chunk in chunks] for stage in stages])
    medians = np.median(times_ms, axis=1)
    axes.barh(stages, medians, color=["0.55" if stage == "total" else COLORS[2] for stage in stages], height=0.5)
    axes.plot(times_ms.ravel(), np.repeat(np.arange(len(stages)), len(chunks)), ".", color="black", alpha=0.5)
    for row, median in enumerate(medians):
        axes.annotate(f"{median:.1f}", (median, row), xytext=(5, 7), textcoords="offset points")
    axes.invert_yaxis()
    axes.set_xlabel("ms (bar: median, dot: one inference)")
    axes.set_title("latency per inference")


def _show_image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image)
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def spread(count: int, at_most: int) -> list[int]:
    """Indices of the first, the last, and evenly spread ones between."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist()


def style() -> Any:
    """How every figure of ours looks, while it is open."""
    import matplotlib

    return matplotlib.rc_context(STYLE)
