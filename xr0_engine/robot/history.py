"""The recent past of a robot, for models that see videos instead of pictures (spec section 8). NumPy only."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from xr0_engine.types import Observation, RobotInfo

MOST_FRAMES = 64
"""Of a video; the released have four."""
LONGEST_STRIDE = 64
"""Control steps from one frame to the next; the released have two."""


@dataclass(frozen=True)
class FrameHistory:
    """What a robot's views are where the model is given the recent past: videos of so many frames, stride control steps
    apart, of which the last is the newest. Raises ValueError that names every wrong field."""

    frames: int
    stride: int

    def __post_init__(self) -> None:
        faults = [
            f"{name}: expected a whole number from 1 to {most}, got {value!r:.80}"
            for name, value, most in (("frames", self.frames, MOST_FRAMES), ("stride", self.stride, LONGEST_STRIDE))
            if type(value) is not int or not 0 < value <= most
        ]
        if faults:
            raise ValueError("history: " + "; ".join(faults))

    @property
    def span(self) -> int:
        """Control steps that it takes, the newest included."""
        return 1 + self.stride * (self.frames - 1)

    def places(self, seen: int) -> list[int]:
        """Which of the steps that were seen the frames are of, counted from the first: where they reach back beyond
        that, the first is taken again. seen: how many, at least one."""
        last = self.frames - 1
        return [max(0, seen - 1 - self.stride * (last - number)) for number in range(self.frames)]


class History:
    """The observations of an episode's last control steps, and the one that a policy is given: videos of them.

    Push one at every control step, those that execute a chunk included; observe when a chunk is to be inferred; reset
    before the next episode. What is pushed is kept, not copied. frames: FrameHistory, of the profile. state_length: the
    states that the policy takes, stride steps apart; 1 takes the newest.
    """

    def __init__(self, frames: FrameHistory, state_length: int = 1) -> None:
        self.frames = frames
        self._states = FrameHistory(state_length, frames.stride)
        self._kept: deque[Observation] = deque(maxlen=max(frames.span, self._states.span))

    @classmethod
    def of(cls, robot: RobotInfo) -> History:
        """As an engine or a server tells it of a robot type; where it tells nothing, of one picture and state.

        Raises ValueError as RobotInfo.past_stride does.
        """
        frames = robot.history[0] if robot.history else 1
        return cls(FrameHistory(frames, robot.past_stride), robot.state_length or 1)

    def __len__(self) -> int:
        """Observations that are kept."""
        return len(self._kept)

    def reset(self) -> None:
        """Forget everything: an episode ends, or the robot was moved by someone else."""
        self._kept.clear()

    def push(self, observation: Observation) -> None:
        """What the robot sees at the next control step: a picture of each view, (H, W, 3), a state, (S,) or (1, S).

        Raises ValueError for views, or sizes of pictures or states, other than those before.
        """
        found = _shapes(observation)
        if self._kept and found != (before := _shapes(self._kept[-1])):
            raise ValueError(
                f"observation: expected the views and sizes of the one before, {before}, got {found}; reset before "
                "another robot or episode"
            )
        self._kept.append(observation)

    def observe(self) -> Observation:
        """The newest observation, its images (frames, H, W, 3) and its state (state_length, S), the oldest first.

        Pictures alone where the profile has one frame. Raises RuntimeError before the first push.
        """
        if not self._kept:
            raise RuntimeError("history: nothing was pushed in this episode")
        newest = self._kept[-1]
        images: Mapping[str, np.ndarray] = newest.images
        if self.frames.frames > 1:
            places = self.frames.places(len(self._kept))
            images = {view: np.stack([self._kept[place].images[view] for place in places]) for view in images}
        states = [np.atleast_2d(self._kept[place].state) for place in self._states.places(len(self._kept))]
        return replace(newest, images=images, state=newest.state if len(states) == 1 else np.concatenate(states))


def newest(view: np.ndarray) -> np.ndarray:
    """A view's picture, (H, W, 3): itself, or the last of its video."""
    return view[-1] if view.ndim == 4 else view


def _shapes(observation: Observation) -> dict[str, tuple[int, ...]]:
    images = {view: np.shape(image) for view, image in observation.images.items()}
    for view, shape in images.items():
        if len(shape) != 3:
            raise ValueError(f"images[{view!r}]: expected one picture of (height, width, 3), got {shape}")
    state = np.shape(observation.state)
    if len(state) != 1 and state[:-1] != (1,):
        raise ValueError(f"state: expected one state (S,), got {state}")
    return {**images, "state": state[-1:]}
