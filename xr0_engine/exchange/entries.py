"""A robot type's statistics in the mode that weights are to be run in, and how many states they take at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xr0_engine.config import ModelConfig
from xr0_engine.exchange.modes import Mode
from xr0_engine.exchange.recipe import QUANTILES, RELEASED_STATE, Recipe
from xr0_engine.family import FAMILIES
from xr0_engine.robot.embodiment import embodiment_for
from xr0_engine.robot.quantiles import ROBODOJO_RULE, refuse_unowned
from xr0_engine.types import CheckpointError

STATE_LENGTHS = {"mobile": 1, "robodojo": 1, "robocasa_mg": 1, "robocasa365": 4, "vlabench_choice": 1}
"""Robot type -> states of an observation, of the released Xiaomi-Robotics-1 (spec section 8)."""


def entry_in(mode: Mode, file: Path, name: str, entry: Any) -> Any:
    """A robot type's entry of `action_config` with what the mode's code always does: its columns, how it normalises
    states and actions. name: the robot type. An entry that is no mapping stays as it is.

    Raises CheckpointError for an entry of other code, and for one that lacks what the code normalises states by.
    """
    if not isinstance(entry, Mapping):
        return entry
    where = f"{file}: robot type {name!r}"
    if mode.state_rule is not None:
        try:
            refuse_unowned(entry)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
    # What is null is not said, and by plain quantiles nothing goes.
    apart = ("state", RELEASED_STATE, *QUANTILES)
    made = {key: value for key, value in entry.items() if key not in apart and value is not None}
    if mode.columns:
        _check_layout(where, name, mode)
        # What the code uses whatever the statistics (spec section 3.3); a run with other columns names its own.
        made = {"active_columns": list(mode.columns), **made}
    rule = made.setdefault("rule", mode.action_rule)
    if rule is None:
        del made["rule"]
    if rule != mode.action_rule:
        raise CheckpointError(
            f"{where}: rule {rule!r:.80} of its actions is not that of the {mode.whose}: choose another --mode"
        )
    if rule == ROBODOJO_RULE and isinstance(table := entry.get("mean"), list) and len(table) == 1:
        raise CheckpointError(
            f"{where}: mean has one row, and rows are the steps of a chunk: repeat those of mean and std for each step"
        )
    state = _state(where, mode, entry)
    return made if state is None else {**made, "state": state}


def _check_layout(where: str, name: str, mode: Mode) -> None:
    try:
        layout = embodiment_for(name).action_layout
    except ValueError:
        # A robot of one's own.
        return
    if layout.active_columns is not None and layout.active_columns != mode.columns:
        raise CheckpointError(
            f"{where}: the engine knows it by layout {layout.name}, the columns of the {mode.whose} are those of "
            f"{mode.layout}: choose another --mode, or another --robot-type"
        )


def _state(where: str, mode: Mode, entry: Mapping[str, Any]) -> Any:
    """How states are normalised: None for not at all."""
    state = entry.get("state")
    if mode.state_rule is None:
        # What a released configuration holds besides is nothing that this code reads.
        if state is not None:
            raise CheckpointError(
                f"{where}: `state` normalises its states, the {mode.whose} take them as they are: leave it out, or "
                "choose another --mode"
            )
        return None
    state = entry.get(RELEASED_STATE) if state is None else state
    # As released data configurations have them: without a rule, so for the code that has but one.
    is_released = isinstance(state, Mapping) and state.keys() <= set(QUANTILES)
    form = "`state`: {rule, q01, q99}, a number for each column"
    if mode.state_rule == ROBODOJO_RULE:
        form += ", and by_mean, mean and std for those that are gaussian in the run's configuration"
        if is_released:
            raise CheckpointError(
                f"{where}: nothing says what its q01 and q99 are of; those of states go into {form}; those of actions "
                "are action_q01 and action_q99, with quantile_columns"
            )
    elif isinstance(state, Mapping) and is_released:
        state = {"rule": mode.state_rule, **state}
    if state is None:
        raise CheckpointError(
            f"{where} lacks statistics of its states, by which this code normalises them: give --statistics FILE with "
            f"{form}"
        )
    if isinstance(state, Mapping) and state.get("rule") != mode.state_rule:
        raise CheckpointError(
            f"{where}: state: expected rule {mode.state_rule}, as the {mode.whose} has it, got "
            f"{state.get('rule')!r:.80}: give {form}, or choose another --mode"
        )
    return state


def state_length(
    base: ModelConfig,
    like: Path | None,
    mode: Mode,
    recipe: Recipe | None,
    robot_types: Iterable[str],
    option: int | None,
) -> tuple[int, str]:
    """How many states the weights take at a time, of which no tensor tells, and by whose word.

    base: the configuration of like, which is None if that is a VLM alone and says nothing of states; like is not asked
    where the mode tells. Raises ValueError where nobody tells it, they contradict each other, or the family leaves
    nothing to say.
    """
    if base.family == "xr0":
        if option is not None:
            raise ValueError(
                f"state_length: an observation of {FAMILIES[base.family].title} has {base.head.state_length} state: "
                "leave --state-length out"
            )
        return base.head.state_length, f"as {FAMILIES[base.family].title} has it"
    if option is not None:
        return option, "as you say"
    told = {}
    if mode.state_length is not None:
        told[f"the {mode.whose}"] = mode.state_length
    elif like is not None:
        told[f"{like}/config.json"] = base.head.state_length
    if recipe is not None and recipe.state_length is not None:
        told[str(recipe.file)] = recipe.state_length
    told |= {f"robot type {name}": STATE_LENGTHS[name] for name in robot_types if name in STATE_LENGTHS}
    remedy = "--state-length 1, as the base and the released post-training have; RoboCasa365 has 4"
    if not told:
        raise ValueError(f"state_length: no tensor and no file given says how many states an observation has: {remedy}")
    if len(set(told.values())) > 1:
        words = ", ".join(f"{value} by {whose}" for whose, value in told.items())
        raise ValueError(f"state_length: how many states an observation has is {words}: {remedy}")
    whose, value = next(iter(told.items()))
    return value, f"by {whose}"
