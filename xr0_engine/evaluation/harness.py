"""vla-eval's observations to ours and our chunks to its actions, benchmark by benchmark; vla_eval.py serves it.

vla-eval (github.com/allenai/vla-evaluation-harness, 0.8) prepares images and actions itself, in each benchmark in
another way. A benchmark is here only if what the checkpoint saw, and what it commands, come through unchanged. The
others are refused, with what stands in the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xr0_engine.types import Observation, RobotInfo


@dataclass(frozen=True)
class Adapted:
    """A benchmark of vla-eval that is understood.

    cameras: view key of the embodiment profile -> vla-eval's name of the camera. image_size: (height, width) that they
    come in. prepared: they are what the model saw; False: the profile still has to be applied. embodiment: the profile
    that the policy must have. state: the key of the state, state_width its columns; zeros follow. action_width: leading
    columns of ours that it takes, as they are. suites: its name of a suite -> ours, which names the noise. params: what
    the benchmark is asked to send, and how.
    """

    name: str
    cameras: Mapping[str, str]
    image_size: tuple[int, int]
    prepared: bool
    embodiment: str
    state: str
    state_width: int
    action_width: int
    suites: Mapping[str, str]
    params: Mapping[str, Any] = field(default_factory=dict)

    def observation(self, given: Mapping[str, Any], state_width: int, robot_type: str | None) -> Observation:
        """vla-eval's observation as ours. state_width: S of the policy.

        Raises ValueError for a field that is missing, of another shape or kind, or not known.
        """
        images = given.get("images")
        names = sorted(images) if isinstance(images, Mapping) else None
        if not isinstance(images, Mapping) or set(images) != set(self.cameras.values()):
            raise ValueError(
                f"images: expected {', '.join(self.cameras.values())}, got {names}: name none of "
                f"{', '.join(self.params)} in the benchmark's params, this server asks for all of them"
            )
        for name, image in images.items():
            if not isinstance(image, np.ndarray) or image.shape != (*self.image_size, 3) or image.dtype != np.uint8:
                what = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
                raise ValueError(f"images, {name}: expected {(*self.image_size, 3)} uint8, got {what}")
        return Observation(
            images={view: images[name] for view, name in self.cameras.items()},
            instruction=self._instruction(given.get("task_description")),
            state=self._state(given.get(self.state), state_width),
            robot_type=robot_type,
            prepared=self.prepared,
        )

    def actions(self, chunk: np.ndarray) -> np.ndarray:
        """(T, A) float32 of the policy -> (T, action_width) as vla-eval's benchmark takes them."""
        return np.ascontiguousarray(chunk[:, : self.action_width], dtype=np.float32)

    def check_policy(self, info: RobotInfo, execute: int | None) -> int:
        """How many actions of a chunk are executed before the next look.

        Raises ValueError for a policy of another robot, and for more actions than a chunk has.
        """
        if info.embodiment not in (self.embodiment, None) or set(info.views) != set(self.cameras):
            raise ValueError(
                f"robot_type: {self.name} needs a policy of embodiment {self.embodiment} with views "
                f"{', '.join(self.cameras)}, got {info.embodiment} with {', '.join(info.views)}"
            )
        count = execute if execute is not None else info.replan_every or info.chunk_length
        if type(count) is not int or not 1 <= count <= info.chunk_length:
            raise ValueError(f"execute: expected 1 to {info.chunk_length}, the actions of a chunk, got {count!r}")
        return count

    def suite(self, task: Mapping[str, Any]) -> str:
        """Our name of the task's suite. Raises ValueError for one that is not known."""
        suite = task.get("suite")
        if suite not in self.suites:
            raise ValueError(
                f"suite: expected one of {', '.join(self.suites)}, got {suite!r}: in vla-eval's LIBERO-Pro and "
                "LIBERO-Mem the state's rotation has another form than the checkpoints were trained on; `xr0 eval "
                "libero` has LIBERO-PRO's suites"
            )
        return self.suites[str(suite)]

    def _instruction(self, text: object) -> str:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"task_description: expected the task in words, got {text!r:.80}")
        # As the released evaluation has it; whatever else a policy's profile does to a text leaves this one.
        return text.strip().removesuffix(".").capitalize() + "."

    def _state(self, value: object, width: int) -> np.ndarray:
        """(1, width) float32."""
        given = np.asarray(value, dtype=np.float64) if isinstance(value, np.ndarray | list) else None
        if given is None or given.shape != (self.state_width,) or not np.isfinite(given).all():
            what = "none" if value is None else f"{value!r:.80}"
            raise ValueError(f"{self.state}: expected {self.state_width} finite numbers, got {what}")
        state = np.zeros((1, width), np.float32)
        state[0, : self.state_width] = given
        return state


LIBERO = Adapted(
    name="libero",
    cameras={"base": "agentview", "left_wrist": "wrist"},
    image_size=(256, 256),
    # vla-eval turns both cameras' images by 180 degrees itself.
    prepared=True,
    embodiment="libero",
    state="states",
    state_width=8,
    # It makes -1 or 1 of the gripper's column; robosuite takes no more than its sign from what the released one gives.
    action_width=7,
    suites={f"libero_{name}": name for name in ("spatial", "object", "goal", "10", "90")},
    # quat_no_antipodal: q and -q are different rotations, as in the released evaluation.
    params={"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True},
)
ADAPTED = {LIBERO.name: LIBERO}
REFUSED = {
    "calvin": "it enlarges the gripper camera's 84 pixels to 200 and adds actions up in metres and radians, where the "
    "checkpoints saw 84 pixels and give the simulator's relative actions: use `xr0 eval calvin`",
    "simpler": "it makes a gripper command of its own, two-valued or kept for 15 steps, of a number between 0 and 1, "
    "and has other horizons than the released evaluation: use `xr0 eval simpler`",
}


def find_adapted(name: str) -> Adapted:
    """Raises ValueError, with the reason, for a benchmark whose observations or actions come through changed."""
    if name in ADAPTED:
        return ADAPTED[name]
    reason = f": {REFUSED[name]}" if name in REFUSED else ""
    raise ValueError(f"benchmark: expected one of {', '.join(ADAPTED)}, got {name!r}{reason}")
