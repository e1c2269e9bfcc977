"""What a policy tells of itself, against how it is about to be executed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xr0_engine.executor.settings import Settings
from xr0_engine.executor.worker import Request
from xr0_engine.robot.layouts import Frame, find_layout
from xr0_engine.types import ActionChunk, RobotInfo

# A prefix goes to the model's units and back in float32, good to 1e-6 of its size; one that was ignored is far off.
PREFIX_TOLERANCE = 1e-4


def frame_for(info: RobotInfo) -> Frame:
    """The frame of a robot type's actions: `frame_for(policy.robot_info("libero_all"))`.

    Raises ValueError for a layout that is not known here, or a policy that does not tell how wide its actions are.
    """
    if info.action_width is None:
        raise ValueError("action_width: the policy does not tell it; make the frame yourself")
    steps, two_valued = info.step_columns or (), info.two_valued_columns or ()
    return find_layout(info.layout).frame_of(info.action_width, steps, two_valued)


def check_fit(info: RobotInfo, robot_type: str | None, settings: Settings, frame: Frame) -> None:
    """Raises ValueError that names every difference between what a policy tells and how it would be executed."""
    found = [*_chunk_problems(info, settings), *_frame_problems(info, settings, frame)]
    if found:
        raise ValueError(f"the policy and its execution differ, robot type {robot_type!r}: " + "; ".join(found))


def _chunk_problems(info: RobotInfo, settings: Settings) -> list[str]:
    found = []
    if not math.isclose(settings.rate_hz, info.control_rate_hz):
        found.append(
            f"rate_hz: the policy's actions are for {info.control_rate_hz:g} Hz, Settings have {settings.rate_hz:g}: "
            f"Settings(rate_hz={info.control_rate_hz:g})"
        )
    if settings.mode == "sync":
        if settings.execute is not None and settings.execute > info.chunk_length:
            found.append(
                f"execute: the policy's chunks have {info.chunk_length} actions, Settings execute {settings.execute}: "
                f"Settings(execute={info.chunk_length}), or None for all"
            )
    elif settings.mode == "async":
        longest = info.chunk_length - 1 if info.max_prefix is None else min(info.max_prefix, info.chunk_length - 1)
        if settings.max_prefix > longest:
            remedy = f"Settings(max_prefix={longest})" if longest else "mode sync, guided or naive_async"
            found.append(
                f"max_prefix: the policy takes prefixes of up to {longest} actions, of chunks of {info.chunk_length}, "
                f"Settings have {settings.max_prefix}: {remedy}"
            )
    return found


def _frame_problems(info: RobotInfo, settings: Settings, frame: Frame) -> list[str]:
    remedy = "frame_for(policy.robot_info(robot_type)) makes the right frame"
    if frame.layout != info.layout:
        return [f"frame: the policy's actions are of layout {info.layout}, the frame is of {frame.layout}: {remedy}"]
    if info.action_width is not None and frame.width != info.action_width:
        return [f"frame: the policy's actions have {info.action_width} columns, the frame has {frame.width}: {remedy}"]
    found = []
    known = find_layout(info.layout).frame_of(frame.width, info.step_columns or (), info.two_valued_columns or ())
    if info.step_columns is not None and (known.delta != frame.delta).any():
        found.append(
            f"frame: columns {_listed(known.delta)} of the policy's actions are steps, delta_columns of the frame are "
            f"{_listed(frame.delta)}: {remedy}"
        )
    interpolates = settings.commands_per_action > 1 or settings.motion_kept > 0
    if interpolates and (known.held & ~frame.held).any():
        found.append(
            f"frame: columns {_listed(known.held)} of the policy's actions have two values and nothing between them, "
            f"held_columns of the frame are {_listed(frame.held)}: {remedy}"
        )
    return found


def _listed(mask: np.ndarray) -> str:
    columns: Sequence[int] = np.flatnonzero(mask).tolist()
    return ", ".join(map(str, columns)) or "none"


def checked_rows(frame: Frame, request: Request, chunk: ActionChunk) -> np.ndarray:
    """A chunk's actions in the fixed frame. Raises ValueError if it cannot be executed."""
    rows = frame.absolute(chunk.actions, request.snapshot.origin)
    if chunk.prefix_length != request.prefix_length:
        raise ValueError(f"prefix_length: expected {request.prefix_length}, got {chunk.prefix_length}")
    if request.prefix is not None:
        kept = chunk.actions[: request.prefix_length]
        if kept.shape != request.prefix.shape or np.abs(kept - request.prefix).max() > PREFIX_TOLERANCE:
            raise ValueError("actions: expected the prefix as the first actions, got others")
    return rows
