"""The page's part of what failed: causes, videos, and every failed episode."""

from __future__ import annotations

from html import escape
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from xr0_engine.bench.tell.page import folded, table
from xr0_engine.evaluation.benchmark import Episode
from xr0_engine.evaluation.rates import cause, causes, condition_label, failed, trial_order
from xr0_engine.evaluation.results import Results
from xr0_engine.evaluation.tables import plain, told_repeats

MOST_VIDEOS = 12
"""Shown at once: a browser fetches the beginning of each."""
MOST_FAILURES = 200
"""Listed; the others are in episodes.jsonl."""


def failure_section(results: Results) -> str:
    """Empty without a failure or a repeat."""
    found = sorted(filter(failed, results.episodes), key=lambda episode: trial_order(episode.key))
    repeats = sum(episode.repeats for episode in results.episodes)
    note = f'<p class="note">{escape(told_repeats(repeats))}</p>' if repeats else ""
    if not found:
        return f"<section><h2>No failure</h2>{note}</section>" if note else ""
    filmed = [episode for episode in found if _video(results.folder, episode)]
    shown = "".join(_filmed(results.folder, episode) for episode in filmed[:MOST_VIDEOS])
    videos = f'<div class="videos">{shown}</div>' if filmed else ""
    counted = table(["", "episodes"], [[reason, str(count)] for reason, count in causes(found).items()])
    listed = "".join(
        f"<tr><th scope='row'>{escape(_told_trial(episode))}</th><td>{escape(episode.name)}</td>"
        f"<td>{escape(cause(episode))}</td><td>{_link(results.folder, episode)}</td></tr>"
        for episode in found[:MOST_FAILURES]
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "task", "cause", "video"))
    every = (
        f'<div class="table"><table class="wide"><thead><tr>{head}</tr></thead><tbody>{listed}</tbody></table></div>'
    )
    left = len(found) - MOST_FAILURES
    more = f'<p class="note">and {left} more in episodes.jsonl</p>' if left > 0 else ""
    word = "failure" if len(found) == 1 else "failures"
    return (
        f"<section><h2>{len(found)} {word}</h2>{note}{counted}{videos}"
        f"{folded('Every failed episode', every + more)}</section>"
    )


def _told_trial(episode: Episode) -> str:
    where = f"{episode.suite}, task {episode.task}, trial {episode.trial}"
    return f"{where}; {condition_label(episode.mode, episode.delay_steps)}"


def _filmed(folder: Path, episode: Episode) -> str:
    source = escape(_video(folder, episode) or "")
    return (
        f'<figure><video controls muted playsinline preload="metadata" src="{source}#t=0.01"></video>'
        f"<figcaption><b>{escape(plain(episode.name))}</b>{escape(_told_trial(episode))}"
        f"<br>{escape(cause(episode))}, {episode.steps} steps</figcaption></figure>"
    )


def _link(folder: Path, episode: Episode) -> str:
    source = _video(folder, episode)
    return f'<a href="{escape(source)}">video</a>' if source else ""


def _video(folder: Path, episode: Episode) -> str | None:
    """A file of the folder as a relative address; None for what is not there, or not in the folder."""
    if episode.video is None:
        return None
    path = PurePosixPath(episode.video)
    inside = not path.is_absolute() and ".." not in path.parts
    return quote(f"./{path}") if inside and (folder / path).is_file() else None
