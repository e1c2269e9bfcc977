"""Which profile and which views each dataset of a run is seen through: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from xr0_engine.robot.embodiment import Embodiment, embodiment_for, load_embodiment
from xr0_engine.training.config import DataConfig
from xr0_engine.training.data.description import Description, describe
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import seen_through
from xr0_engine.training.data.stream import weighted


def run_profile(data: DataConfig) -> Embodiment | None:
    """The profile of data.embodiment, None if the run names none. Raises ValueError."""
    try:
        return load_embodiment(data.embodiment) if data.embodiment else None
    except ValueError as error:
        raise ValueError(f"data.embodiment: {error}") from None


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


def _descriptions(data: DataConfig) -> Iterator[tuple[Path, Description]]:
    for text in (*data.robot, *data.validation):
        path, _ = weighted(text)
        yield path, describe(path)


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
    return f"{path}: trains on {', '.join(used)} of profile {profile.name}{unused}"
