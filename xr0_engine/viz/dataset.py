"""A dataset to browse: a recording that says what it is and what is wrong with it, and one for each episode."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.robot.layouts import PLAIN
from xr0_engine.robot.views import orient
from xr0_engine.training.data.check import Checker, Finding
from xr0_engine.training.data.episode import Episode
from xr0_engine.training.data.parallel import in_parallel
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import Source, open_source
from xr0_engine.training.data.stats import Statistics, compute
from xr0_engine.viz.curves import (
    TIME,
    beside_pictures,
    groups_of,
    log_pictures,
    send_blueprint,
    send_rows,
    send_steps,
    style,
    views_of_curves,
)
from xr0_engine.viz.sink import SUFFIX, check_target, end_stream, open_stream

if TYPE_CHECKING:
    from rerun import RecordingStream

SHOWN = 10
"""Episodes, unless asked otherwise."""
CHUNK_LENGTH = 30
"""Of the statistics, unless all episodes are shorter."""
MOST_LISTED = 200
"""Faults, and wordings of the task."""


@dataclass(frozen=True)
class Shown:
    """episodes: how many, of how many that can be read. faults: how many were found in the whole dataset."""

    episodes: int
    readable: int
    faults: int


def show_dataset(path: Path, target: str | Path, numbers: Sequence[int] | None = None, processes: int = 1) -> Shown:
    """Show a dataset of episodes.

    path: as of open_source. target: as of check_target; a file holds everything, or is not there. numbers: of the
    episodes among those that can be read, in the dataset's order; None: the first SHOWN. All are checked, as by `xr0
    data check --fast`, whichever are shown. processes: how many to use.

    Raises DataError if there is nothing to show, ValueError for numbers that are none of its episodes' and for lines of
    text, OSError if it cannot be written; and as check_target.
    """
    target = check_target(target)
    if path.suffix == ".jsonl":
        raise ValueError(f"{path}: expected a dataset of episodes: lines of questions and answers have none to show")
    findings = Checker(fast=True, processes=processes).check(path)
    source = open_source(path, skip_broken=True)
    count = len(source.names)
    chosen = list(range(min(SHOWN, count))) if numbers is None else list(numbers)
    if wrong := [number for number in chosen if not 0 <= number < count]:
        raise ValueError(f"--episodes: expected 0 to {count - 1}, of those that can be read, got {wrong[0]}")
    faults = {finding.name: finding.faults for finding in findings if finding.faults}
    statistics = _statistics(path, source, processes)
    if "://" in target:
        _draw_overview(target, path, source, findings, statistics)
        draw = partial(_draw_episode, source, faults, None, target)
        list(in_parallel(draw, chosen, processes, "sending"))
    else:
        with tempfile.TemporaryDirectory(prefix=".xr0-view-", dir=Path(target).parent) as folder:
            first = str(Path(folder) / f"overview{SUFFIX}")
            _draw_overview(first, path, source, findings, statistics)
            draw = partial(_draw_episode, source, faults, Path(folder), "")
            parts = [first, *in_parallel(draw, chosen, processes, "drawing")]
            _join(parts, Path(folder) / f"whole{SUFFIX}").replace(target)
    return Shown(len(chosen), count, sum(map(len, faults.values())))


def read_numbers(text: str) -> list[int]:
    """`0-4,7` as numbers. Raises ValueError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--episodes: expected numbers such as 0-4,7, got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(numbers))


def _statistics(path: Path, source: Source, processes: int) -> Statistics | str:
    """Those that `xr0 data stats` makes of all episodes; or why there are none."""
    try:
        return compute([path], min(CHUNK_LENGTH, max(source.lengths)), 0.0, processes, skip_broken=True)
    except DataError as reason:
        return str(reason)


def _join(parts: Sequence[str], whole: Path) -> Path:
    """Several recordings as one file, which is rerun's own work."""
    command = [sys.executable, "-m", "rerun", "rrd", "merge", *parts, "-o", str(whole)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not whole.is_file():
        raise OSError(f"rerun could not join its recordings: {done.stderr.strip()[-400:]}")
    return whole


def _draw_overview(
    target: str, path: Path, source: Source, findings: Sequence[Finding], statistics: Statistics | str
) -> None:
    import rerun
    import rerun.blueprint as rrb

    stream = open_stream(target, "xr0 dataset", path.name)
    text = _told(path, source, findings, statistics)
    stream.log("overview", rerun.TextDocument(text, media_type="text/markdown"), static=True)
    lengths_s = np.array(source.lengths) / source.description.embodiment.control_rate_hz
    stream.log("length_s", rerun.BarChart(lengths_s), static=True)
    beside: list[Any] = [rrb.BarChartView(origin="/length_s", name="length of each episode (s)")]
    if isinstance(statistics, Statistics):
        layout, width = source.description.embodiment.action_layout, statistics.mean.shape[1]
        groups = groups_of(layout, width, statistics.std.max(0) > 0)
        for name in ("mean", "std"):
            for group in groups:
                style(stream, [name], group, None, 2.0 if name == "mean" else 0.7)
            send_steps(stream, [name], groups, getattr(statistics, name))
        beside.insert(0, views_of_curves(groups, [["mean"], ["std"]], "mean (thick) and std of the actions, by step"))
    document = rrb.TextDocumentView(origin="/overview", name="overview")
    right = rrb.Vertical(*beside, row_shares=[3, 1][-len(beside) :])
    send_blueprint(stream, rrb.Horizontal(document, right, column_shares=[2, 3]), lists_recordings=True)
    end_stream(stream, target)


def _told(path: Path, source: Source, findings: Sequence[Finding], statistics: Statistics | str) -> str:
    """The overview in Markdown."""
    description, statuses = source.description, Counter(source.statuses)
    rate_hz, ticks = description.embodiment.control_rate_hz, sum(source.lengths)
    faults = [fault for finding in findings for fault in finding.faults]
    lines = [
        f"# {path.name}",
        f"- {len(source.names)} episodes that can be read, {ticks} ticks at {rate_hz:g} Hz, {ticks / rate_hz:.0f} s",
        f"- status: {', '.join(f'{count} {status}' for status, count in statuses.items())}",
        f"- robot type `{description.robot_type}`, profile `{description.embodiment.name}`, "
        f"layout `{description.embodiment.layout}`",
        f"- views: {', '.join(view.key for view in description.stored_views)}",
        "",
        f"## {len(faults) or 'No'} faults",
        "By `xr0 data check --fast`: the first and the last frame of each view. Without `--fast` it decodes all.",
        "",
        *(f"- {fault}" for fault in faults[:MOST_LISTED]),
    ]
    if len(faults) > MOST_LISTED:
        lines.append(f"- and {len(faults) - MOST_LISTED} more")
    lines += ["", "## Statistics of the actions"]
    if isinstance(statistics, str):
        return "\n".join([*lines, f"None: {statistics}"])
    lines += [
        f"{statistics.windows} windows of {len(statistics.mean)} steps, as `xr0 data stats` takes them, of all "
        "episodes. Over all steps:",
        "",
        "| column | mean | std | unit |",
        "|---|---|---|---|",
    ]
    mean = statistics.mean.mean(0)
    std = np.sqrt((statistics.std**2 + (statistics.mean - mean) ** 2).mean(0))
    layout = description.embodiment.action_layout
    units = {column.index: column.unit for column in layout.columns}
    for column in np.flatnonzero(std > 0).tolist():
        unit = units.get(column, "robot units")
        lines.append(f"| {layout.label(column)} | {mean[column]:.4g} | {std[column]:.4g} | {unit} |")
    return "\n".join(lines)


def _draw_episode(
    source: Source, faults: dict[str, tuple[str, ...]], folder: Path | None, viewer: str, number: int
) -> str:
    """One episode, into a file of the folder or to a viewer. Returns where."""
    name = source.names[number]
    target = viewer if folder is None else str(folder / f"{number:06}{SUFFIX}")
    stream = open_stream(target, "xr0 episodes", f"{number}: {Path(name).stem}")
    stream.set_time(TIME, duration=0.0)
    for fault in faults.get(name, ()):
        _say(stream, fault, "ERROR")
    try:
        episode = source.load(number)
    except DataError as error:
        _say(stream, str(error), "ERROR")
    else:
        _draw_motion(stream, episode, source)
        _draw_pictures(stream, episode, source)
    end_stream(stream, target)
    return target


def _draw_motion(stream: RecordingStream, episode: Episode, source: Source) -> None:
    """Curves, and what was asked for when."""
    import rerun.blueprint as rrb

    motion, layout = episode.motion, source.description.embodiment.action_layout
    times_s = _times_s(episode)
    states = np.concatenate([motion.state(tick) for tick in range(len(motion))])
    actions = motion.actions(0, len(motion))
    width = actions.shape[1]
    groups = groups_of(layout, width, motion.columns)
    state_groups = groups_of(layout if states.shape[1] == width else PLAIN, states.shape[1])
    for group in groups:
        style(stream, ["action"], group, None, 1.5)
    for group in state_groups:
        style(stream, ["state"], group, None, 1.5)
    send_rows(stream, ["action"], groups, times_s, actions)
    send_rows(stream, ["state"], state_groups, times_s, states)
    _say(stream, f"status: {episode.status}")
    at = np.zeros(len(motion), np.int64) if episode.instruction_at is None else episode.instruction_at
    for tick in np.flatnonzero(np.diff(at, prepend=-1)):
        stream.set_time(TIME, duration=times_s[tick])
        # Several wordings of one task hold together.
        told = episode.instructions if episode.instruction_at is None else episode.instructions[at[tick] :][:1]
        for instruction in told[:MOST_LISTED]:
            _say(stream, f"task: {instruction}")
    curves = rrb.Tabs(
        views_of_curves(groups, [["action"]], "actions, as from the first tick"),
        views_of_curves(state_groups, [["state"]], "states"),
    )
    events = rrb.TextLogView(origin="/events", name="events")
    views = [view.key for view in source.description.stored_views]
    whole = beside_pictures(views, rrb.Vertical(curves, events, row_shares=[4, 1]))
    send_blueprint(stream, whole, lists_recordings=True)


def _draw_pictures(stream: RecordingStream, episode: Episode, source: Source) -> None:
    """Every tick's, as the model sees them in validation; of a view that cannot be read, what is wrong with it."""
    times_s = _times_s(episode)
    for view in source.description.stored_views:
        for tick, time_s in enumerate(times_s):
            stream.set_time(TIME, duration=time_s)
            try:
                faults = log_pictures(stream, {view.key: orient(episode.image(view.key, tick), view)})
            except DataError as error:
                faults = {view.key: str(error)}
            if faults:
                _say(stream, f"view {view.key}, tick {tick}: {faults[view.key]}", "ERROR")
                break


def _times_s(episode: Episode) -> np.ndarray:
    """(N,) float64, when each tick was."""
    return np.arange(len(episode.motion)) / episode.rate_hz if episode.times_s is None else episode.times_s


def _say(stream: RecordingStream, text: str, level: str = "INFO") -> None:
    import rerun

    stream.log("events", rerun.TextLog(text, level=level))
