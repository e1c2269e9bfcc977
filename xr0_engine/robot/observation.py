"""Observations, checked before any work is done on them, and their states as the model takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from xr0_engine.config import ModelConfig
from xr0_engine.robot.embodiment import Embodiment, View
from xr0_engine.robot.images import array_fault, aspect_fault
from xr0_engine.robot.prompt import checked_instruction
from xr0_engine.robot.quantiles import StateStatistics
from xr0_engine.types import Observation


def validate_observation(observation: Observation, embodiment: Embodiment, config: ModelConfig) -> None:
    """Refuse an observation that the model cannot take, before any work on it.

    Raises ValueError that names the field, what was expected and what came. The robot type is checked where it is
    resolved.
    """
    if not isinstance(observation.prepared, bool | np.bool_):
        raise ValueError(f"prepared: expected true or false, got {observation.prepared!r:.80}")
    _validate_images(observation, embodiment)
    checked_instruction(observation.instruction)
    checked_state(observation.state, config)
    stamp = observation.timestamp_s
    if stamp is not None and not (_is_real(stamp) and -math.inf < stamp < math.inf):
        raise ValueError(f"timestamp_s: expected seconds as a finite number, or None, got {stamp!r}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)


def _validate_images(observation: Observation, embodiment: Embodiment) -> None:
    images = observation.images
    keys = [view.key for view in embodiment.views]
    expected = f"expected the views {', '.join(keys)} of embodiment {embodiment.name!r}"
    if not isinstance(images, Mapping):
        raise ValueError(f"images: {expected}, got {type(images).__name__}")
    faults = [f"{key!r} is missing" for key in keys if key not in images]
    faults += [f"{key!r} is unexpected" for key in images if key not in keys]
    if faults:
        raise ValueError(f"images: {expected}: {', '.join(faults)}")
    frames = None if embodiment.history is None else embodiment.history.frames
    shape = "(height, width, 3)" if frames is None else f"({frames}, height, width, 3)"
    for view in embodiment.views:
        fault = _image_fault(images[view.key], view, observation.prepared, frames)
        if fault:
            raise ValueError(f"images[{view.key!r}]: expected uint8 RGB of shape {shape}, got {fault}")


def _image_fault(image: np.ndarray, view: View, prepared: bool, frames: int | None) -> str | None:
    if frames is not None:
        if not isinstance(image, np.ndarray) or image.ndim != 4:
            shape = f"shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            return f"{shape}: the profile has a history, keep one (xr0_engine.robot.history.History)"
        if len(image) != frames:
            return f"{len(image)} frames: a history that is younger repeats its oldest frame"
        image = image[0]
    fault = array_fault(image)
    if fault is None:
        # A crop is enlarged to the size before it, so it changes no aspect.
        height, width = image.shape[:2] if prepared or view.resize is None else view.resize
        fault = aspect_fault(height, width)
    return fault


def checked_state(state: np.ndarray, config: ModelConfig, statistics: StateStatistics | None = None) -> np.ndarray:
    """The state as (state_length, S) float32, checked; as the model sees it where statistics are given."""
    shape = (config.head.state_length, config.head.state_dim)
    if not isinstance(state, np.ndarray) or state.dtype.kind not in "fiu":
        kind = f"dtype {state.dtype}" if isinstance(state, np.ndarray) else type(state).__name__
        raise ValueError(f"state: expected a NumPy array of real numbers, got {kind}")
    if state.shape != shape and not (shape[0] == 1 and state.shape == shape[1:]):
        short = f" or {shape[1:]}" if shape[0] == 1 else ""
        raise ValueError(f"state: expected shape {shape}{short}, got {state.shape}")
    # A value that float32 cannot hold becomes infinite and is refused with the others.
    with np.errstate(over="ignore"):
        converted = state.astype(np.float32).reshape(shape)
    finite = np.isfinite(converted)
    if not finite.all():
        at = np.argwhere(~finite).tolist()
        raise ValueError(f"state: expected finite values in float32, got NaN or infinity at {at}")
    return converted if statistics is None else statistics.normalize(state.reshape(shape)).astype(np.float32)
