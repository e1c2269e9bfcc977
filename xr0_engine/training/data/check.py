"""Finds what of a dataset training would stop at, or take wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.robot.decode import LEFT, RIGHT
from xr0_engine.robot.embodiment import View
from xr0_engine.robot.images import aspect_fault
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.robot.views import orient
from xr0_engine.training.data import plausibility
from xr0_engine.training.data.description import COLUMNS, Description
from xr0_engine.training.data.episode import Episode, check_rate
from xr0_engine.training.data.language import LanguageLines
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.parallel import in_parallel
from xr0_engine.training.data.plausibility import Glance
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import (
    EpisodeFolder,
    Source,
    check_episode_files,
    checked_instructions,
    description_of,
    episode_files,
    is_lerobot,
    open_source,
)
from xr0_engine.training.named import is_function


@dataclass(frozen=True)
class Finding:
    """faults: what is wrong with an episode or a line, each with file and frame, row or tick; empty if nothing.

    status: of the episode. ticks: its length. A dataset as a whole has a finding of its own path, if it has faults.
    """

    name: str
    faults: tuple[str, ...]
    status: str = "success"
    ticks: int = 0


@dataclass(frozen=True, eq=False)
class _Look:
    """What a worker found in an episode. glance: None where it cannot be read."""

    finding: Finding
    glance: Glance | None = None


@dataclass(eq=False)
class Checker:
    """Checks datasets one after another, and compares how the pictures of one robot type lie in them.

    fast: decode only the first and the last frame of each view, instead of every one that training could ask for.
    processes: how many to use.
    """

    fast: bool = False
    processes: int = 1
    _pictures: dict[tuple[str, str], tuple[Path, np.ndarray]] = field(default_factory=dict, init=False)

    def check(self, path: Path) -> list[Finding]:
        """One finding an episode (or a line of a .jsonl file), in order, and one of the dataset if that has faults.

        Raises DataError if there is no dataset at all, and for a profile that episode files do not fit.
        """
        if path.suffix == ".jsonl":
            lines = LanguageLines(path)
            return list(in_parallel(partial(_line, lines), range(len(lines)), self.processes, "checking"))
        description = description_of(path)
        if is_function(path) or is_lerobot(description):
            dataset = open_source(path) if is_function(path) else LeRobotDataset(description)
            look = partial(_episode, dataset, self.fast)
            looks = list(in_parallel(look, range(len(dataset.names)), self.processes, "checking"))
        else:
            files = episode_files(description.folder)
            if not files:
                open_source(path)
            # Of the whole dataset, so not told for each of its files.
            check_episode_files(path, description)
            check_rate(files[0], description.embodiment)
            looks = list(in_parallel(partial(_file, description, self.fast), files, self.processes, "checking"))
        findings = _with_odd_pictures([look.finding for look in looks], [look.glance for look in looks])
        glances = [look.glance for look in looks if look.glance is not None and look.finding.status != "invalid"]
        faults = plausibility.hardly_moving(glances, _two_valued(description)) + self._lying_otherwise(
            path, description, glances
        )
        if all(finding.status == "invalid" for finding in findings):
            faults.append("nothing to train on: every episode is marked invalid")
        if faults:
            findings.append(Finding(str(path), tuple(f"{path}: {fault}" for fault in faults)))
        return findings

    def _lying_otherwise(self, path: Path, description: Description, glances: Sequence[Glance]) -> list[str]:
        """Views whose pictures lie otherwise than those of a dataset that was checked before."""
        faults = []
        for view, picture in plausibility.usual_pictures(glances).items():
            other, usual = self._pictures.setdefault((description.robot_type, view), (path, picture))
            if how := plausibility.lying(picture, usual):
                is_said = how == "upside down" and any(
                    it.key == view and it.rotate_180 for it in description.embodiment.views
                )
                remedy = "`pictures` in one's xr0.yaml is wrong" if is_said else "turn the pictures of one"
                faults.append(f"view {view}: its pictures lie {how} compared with those of {other}: {remedy}")
        return faults


def check(path: Path, fast: bool, processes: int) -> list[Finding]:
    """Checker.check of one dataset."""
    return Checker(fast, processes).check(path)


def report(checked: Sequence[tuple[Path, Sequence[Finding]]]) -> dict[str, Any]:
    """What `xr0 data check --json` prints: datasets, each with path, counts, verdict and findings that have faults.

    usable: whether nothing was found in any of them.
    """
    datasets = []
    for path, findings in checked:
        # A dataset's own finding is none of the episodes.
        whole = [finding for finding in findings if finding.name == str(path) and not finding.ticks]
        count = len(findings) if path.suffix == ".jsonl" else len(findings) - len(whole)
        faulty = sum(bool(finding.faults) for finding in findings)
        invalid = sum(finding.status == "invalid" for finding in findings)
        summary = f"{path}: {count} checked, {faulty} broken, {invalid} marked invalid (never supervised)"
        verdict = "fit to train on" if not faulty else "not fit to train on: mend these, or train without them"
        datasets.append(
            {
                "path": str(path),
                "checked": count,
                "broken": faulty,
                "invalid": invalid,
                "verdict": f"{summary}: {verdict}",
                "findings": [asdict(finding) for finding in findings if finding.faults],
            }
        )
    return {"usable": not any(dataset["broken"] for dataset in datasets), "datasets": datasets}


def _file(description: Description, fast: bool, file: Path) -> _Look:
    try:
        folder = EpisodeFolder(description, [file])
    except DataError as error:
        return _Look(Finding(str(file), (str(error),)))
    return _episode(folder, fast, 0)


def _episode(source: Source, fast: bool, number: int) -> _Look:
    name, description = source.names[number], source.description
    try:
        episode = source.load(number)
    except DataError as error:
        return _Look(Finding(name, (str(error),)))
    last = len(episode.motion) - 1
    faults, frames = [], {}
    try:
        checked_instructions(episode)
    except DataError as error:
        faults.append(str(error))
    for view in description.stored_views:
        try:
            frames[view.key] = _frames(episode, view, [0, last] if fast else range(last + 1))
        except DataError as error:
            # The first one of a view: a file that ends early would tell of every frame that it lacks.
            faults.append(f"{name}: {error}")
    actions = episode.motion.actions(0, last + 1)
    # Episode files have no columns that xr0.yaml could say something of.
    remedy = "`kind: periodic` in xr0.yaml unwraps it" if is_lerobot(description) else "write it without the jump"
    wraps = plausibility.wraps(actions, _angles(episode, description))
    faults += [f"{name}: {fault}; {remedy}" for fault in wraps]
    finding = Finding(name, tuple(faults), episode.status, last + 1)
    return _Look(finding, Glance.of(episode, frames))


def _frames(episode: Episode, view: View, ticks: Sequence[int]) -> list[np.ndarray]:
    """The first, the middle and the last of some frames that were all read, as the model sees them.

    Raises DataError for a frame that cannot be read, and for sizes that differ or are none for the model.
    """
    kept, shapes = [], set()
    for place, tick in enumerate(ticks):
        image = episode.image(view.key, tick)
        shapes.add(image.shape)
        if place in (0, len(ticks) // 2, len(ticks) - 1):
            kept.append(orient(image, view))
    if len(shapes) > 1:
        raise DataError(f"{episode.clips[view.key].path}: frames of several sizes: {sorted(shapes)}")
    if fault := aspect_fault(*kept[0].shape[:2]):
        raise DataError(f"{episode.clips[view.key].path}: {fault}; a profile with `resize` gives it another")
    return kept


def _angles(episode: Episode, description: Description) -> list[int]:
    """The action columns that an angle may wrap in: joints of an arm, and what the description calls nothing else."""
    layout = description.embodiment.action_layout
    if layout.mobile:
        # Its actions have no joints.
        return []
    columns = [*range(COLUMNS)[LEFT.joints], *range(COLUMNS)[RIGHT.joints]]
    if layout is not BIMANUAL and not description.action:
        # A dataset by function: only the profile says what its columns are.
        steps, two_valued = description.embodiment.step_columns, description.embodiment.two_valued_columns
        columns = sorted(set(range(description.width)) - {*(steps or ()), *(two_valued or ())})
    if description.action:
        plain = [(entry, column) for entry in description.action for column in entry.numbers]
        columns = [column for entry, column in plain if description.kind(entry, column) in (None, "absolute")]
    return [column for column in columns if episode.motion.columns[column]]


def _two_valued(description: Description) -> set[int]:
    """The action columns that are said to have two values."""
    kinds = {column: description.kind(entry, column) for entry in description.action for column in entry.numbers}
    said = {column for column, kind in kinds.items() if kind == "two_valued"}
    return said if description.action else set(description.embodiment.two_valued_columns or ())


def _with_odd_pictures(findings: Sequence[Finding], glances: Sequence[Glance | None]) -> list[Finding]:
    """The findings, with the episodes whose pictures lie otherwise than the others', or are of another size."""
    places = [place for place, glance in enumerate(glances) if glance is not None]
    seen = [glance for glance in glances if glance is not None]
    result = list(findings)
    found = zip(places, plausibility.turned(seen), plausibility.several_sizes(seen), strict=True)
    for place, ways, sizes in found:
        name, faults = result[place].name, result[place].faults
        told = [
            f"{name}: view {view}: its pictures lie {how} compared with those of the other episodes"
            for view, how in ways.items()
        ]
        told += [
            f"{name}: view {view}: pictures of several sizes: its {size}: make them alike, or give the profile `resize`"
            for view, size in sizes.items()
            if view not in ways
        ]
        result[place] = replace(result[place], faults=(*faults, *told))
    return result


def _line(lines: LanguageLines, index: int) -> Finding:
    try:
        return Finding(lines.sample(index).source, ())
    except DataError as error:
        return Finding(str(lines.path), (str(error),))
