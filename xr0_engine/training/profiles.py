"""Which profile and which views each dataset of a run is seen through: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from xr0_engine.robot.embodiment import Embodiment, builtin_embodiments, embodiment_for, load_embodiment
from xr0_engine.training.config import DataConfig
from xr0_engine.training.data.description import Description
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import description_of, seen_through
from xr0_engine.training.data.stream import weighted
from xr0_engine.training.named import is_function


def run_profile(data: DataConfig) -> Embodiment | None:
    """The profile of data.embodiment, None for the built-in one of each robot type. Raises ValueError.

    Of a run that names none and whose robot datasets are all functions with one profile, it is that one.
    """
    if data.embodiment:
        try:
            return load_embodiment(data.embodiment)
        except ValueError as error:
            raise ValueError(f"data.embodiment: {error}") from None
    datasets = [weighted(text)[0] for text in (*data.robot, *data.validation)]
    if not datasets or not all(map(is_function, datasets)):
        return None
    found = [description for _, description in _descriptions(data)]
    profile = found[0].embodiment
    if any(description.embodiment != profile for description in found) or _is_builtin(found):
        return None
    return profile


def check_profiles(data: DataConfig) -> list[str]:
    """A line for each robot dataset: the views that the run trains on, and those that it leaves out.

    Reads nothing but the datasets' descriptions. Raises DataError that names the dataset if its profile is not the
    run's in layout or rate, lacks a view of it, or is not the one that the trainer would choose.
    """
    profile = run_profile(data)
    return [_line(path, description, profile) for path, description in _descriptions(data)]


def check_robot_types(data: DataConfig, known: Collection[str]) -> None:
    """Raises DataError that names a dataset whose robot type is not among the statistics'."""
    for path, description in _descriptions(data):
        if description.robot_type not in known:
            raise DataError(
                f"{path}: robot type {description.robot_type!r}: the statistics are of {', '.join(sorted(known))}; "
                "give `xr0 data stats` all datasets of the run"
            )


def _is_builtin(found: Sequence[Description]) -> bool:
    """Whether each has the built-in profile of its robot type."""
    builtin = [load_embodiment(name) for name in builtin_embodiments()]
    return all(
        any(description.embodiment == profile and description.robot_type in profile.robot_types for profile in builtin)
        for description in found
    )


def _descriptions(data: DataConfig) -> Iterator[tuple[Path, Description]]:
    for text in (*data.robot, *data.validation):
        path, _ = weighted(text)
        yield path, description_of(path)


def _line(path: Path, description: Description, profile: Embodiment | None) -> str:
    own = description.embodiment
    if profile is None:
        try:
            profile = embodiment_for(description.robot_type)
        except ValueError as error:
            raise DataError(f"{path}: {error}, as data.embodiment") from None
        if profile != own:
            raise DataError(
                f"{path}: its profile {own.name!r} is not the built-in one of robot type {description.robot_type!r}, "
                f"{profile.name!r}: say which one the run shall see through, data.embodiment=NAME or PATH"
            )
    seen_through(profile, description, path)
    used = [view.key for view in profile.views]
    others = dict.fromkeys([*description.views, *(view.key for view in own.views)])
    left_out = [key for key in others if key not in used]
    unused = f"; left out: {', '.join(left_out)}" if left_out else ""
    shown = ""
    if profile.history is not None:
        shown = f", videos of {profile.history.frames} frames, {profile.history.stride} ticks apart"
    return f"{path}: trains on {', '.join(used)} of profile {profile.name}{shown}{unused}"
