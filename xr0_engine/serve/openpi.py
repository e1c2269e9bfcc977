"""What openpi's examples call things, and how its LIBERO example prepares what it sends (docs/serving.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from xr0_engine.types import RobotInfo

# Names under which the examples send their cameras -> the view, where the robot has no view of that very name.
# None: the robot's first view.
_VIEWS = {
    "image": None,
    "cam_high": None,
    "wrist_image": "left_wrist",
    "cam_left_wrist": "left_wrist",
    "cam_right_wrist": "right_wrist",
}

# Keys of the LIBERO example's pictures, which its client has turned by 180 degrees, upright.
_LIBERO_IMAGES = {"observation/image": "image", "observation/wrist_image": "wrist_image"}
LIBERO_EMBODIMENT = "libero"
LIBERO_STATE = 8
"""Position of the end effector 3, its rotation as axis-angle 3, joints of the gripper 2."""
LIBERO_COLUMNS = 7
"""What LIBERO's environment takes of an action: position 3, rotation 3, gripper 1."""


def view_of(name: str, views: Sequence[str]) -> str:
    """The view that a camera's name means: itself, or what openpi's examples call it; else the name as it is."""
    return (_VIEWS[name] or views[0]) if name not in views and name in _VIEWS else name


def turned_back(images: Mapping[str, np.ndarray], keys: Iterable[str], robot: RobotInfo) -> dict[str, np.ndarray]:
    """The images, view -> image, with those raw again that the LIBERO example's client has turned.

    keys: of the request, as sent. Where the policy does not turn a view, nothing is turned back.
    """
    upright = {view_of(_LIBERO_IMAGES[key], robot.views) for key in keys if _is_example(key, robot)}
    turned = {view for view, info in zip(robot.views, robot.preparation or (), strict=False) if info.rotate_180}
    return {view: image[::-1, ::-1] if view in upright & turned else image for view, image in images.items()}


def sends_libero(keys: Iterable[str], state: np.ndarray, robot: RobotInfo) -> bool:
    """Whether a request is the LIBERO example's as it is, with its 8 state values, for a robot of that profile."""
    is_example = any(_is_example(key, robot) for key in keys)
    return is_example and robot.embodiment == LIBERO_EMBODIMENT and state.shape == (LIBERO_STATE,)


def _is_example(key: str, robot: RobotInfo) -> bool:
    # A robot that has a view of that very name means its own.
    return key in _LIBERO_IMAGES and _LIBERO_IMAGES[key] not in robot.views
