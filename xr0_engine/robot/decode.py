"""From the model's chunk to robot actions, and back: the one home of the chunk anchoring. NumPy only.

`decode` and `encode_prefix` serve every layout. The rest is layout `bimanual` (spec section 3.4), whose chunks are
anchored at the pose of their observation: `recover` turns them into absolute targets, `anchor` is its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xr0_engine.robot.normalize import ActionStatistics

BIMANUAL_COLUMNS = 32

# Robots report float32 matrices, often from angles: rounding stays far below this, a swapped axis far above.
ROTATION_TOLERANCE = 1e-3

SHORTEST_QUATERNION = 1e-12


def decode(normalized: np.ndarray, statistics: ActionStatistics) -> np.ndarray:
    """The sampled chunk in robot units. normalized: (T, A) float32. Returns (T, A) float32.

    Raises ValueError for another shape.
    """
    return statistics.denormalize(normalized)


def encode_prefix(actions: np.ndarray, statistics: ActionStatistics) -> np.ndarray:
    """The inverse of decode for the first P actions of a chunk. actions: (P, A), robot units. Returns (P, A) float32.

    Masked columns become 0. Raises ValueError for another width, or more rows than the chunk has.
    """
    return statistics.normalize(actions)


@dataclass(frozen=True)
class ArmColumns:
    """Where one arm stands in the 32 columns of action and state."""

    position: slice
    rotation: slice
    gripper: slice
    joints: slice


LEFT = ArmColumns(position=slice(0, 3), rotation=slice(3, 6), gripper=slice(6, 7), joints=slice(7, 13))
RIGHT = ArmColumns(position=slice(14, 17), rotation=slice(17, 20), gripper=slice(20, 21), joints=slice(21, 27))


@dataclass(frozen=True, eq=False)
class ArmPose:
    """Absolute pose of one arm, or a trajectory of poses: `...` is () or (T,), the same for all four.

    position_m: (..., 3), end effector, metres. rotation: (..., 3, 3), end effector, rotation matrix.
    joints_rad: (..., 6), radians. gripper: (..., 1), the robot's own units. Kept as float64.
    Raises ValueError for another shape, values that are not finite, and matrices that are no rotation.
    """

    position_m: np.ndarray
    rotation: np.ndarray
    joints_rad: np.ndarray
    gripper: np.ndarray

    def __post_init__(self) -> None:
        steps = np.shape(self.position_m)[:-1]
        for name, shape in (("position_m", (3,)), ("rotation", (3, 3)), ("joints_rad", (6,)), ("gripper", (1,))):
            object.__setattr__(self, name, checked_part(name, getattr(self, name), steps, shape))
        check_rotations(self.rotation)


@dataclass(frozen=True, eq=False)
class BimanualPose:
    """Absolute pose of both arms, or a trajectory of poses. Raises ValueError if the arms differ in length."""

    left: ArmPose
    right: ArmPose

    def __post_init__(self) -> None:
        if self.left.position_m.shape != self.right.position_m.shape:
            left, right = self.left.position_m.shape, self.right.position_m.shape
            raise ValueError(f"right: expected as many poses as left, positions {left}, got {right}")

    def arms(self) -> tuple[tuple[ArmColumns, ArmPose], tuple[ArmColumns, ArmPose]]:
        return (LEFT, self.left), (RIGHT, self.right)

    def state(self) -> np.ndarray:
        """The proprio state of one pose: grippers and joints, the other columns zero. Returns (1, 32) float32.

        Raises ValueError for a trajectory.
        """
        check_single("pose", self.left.position_m)
        state = np.zeros((1, BIMANUAL_COLUMNS), dtype=np.float32)
        for columns, arm in self.arms():
            state[0, columns.gripper] = arm.gripper
            state[0, columns.joints] = arm.joints_rad
        return state


def anchor(targets: BimanualPose, origin: BimanualPose) -> np.ndarray:
    """Absolute targets of T steps as actions anchored at the origin. Returns (T, 32) float64, reserved columns 0.

    Position `R0^T (p - p0)`, rotation `Log(R0^T R)`, gripper and joints `target - current`.
    Raises ValueError unless targets is a trajectory and origin a single pose.
    """
    check_single("origin", origin.left.position_m)
    actions = np.zeros((count_targets(targets.left.position_m), BIMANUAL_COLUMNS))
    for (columns, arm), start in zip(targets.arms(), (origin.left, origin.right), strict=True):
        inverse = _transposed(start.rotation)
        # Row vectors: (R0^T d)^T = d^T R0.
        actions[:, columns.position] = (arm.position_m - start.position_m) @ start.rotation
        actions[:, columns.rotation] = rotation_log(inverse @ arm.rotation)
        actions[:, columns.gripper] = arm.gripper - start.gripper
        actions[:, columns.joints] = arm.joints_rad - start.joints_rad
    return actions


def recover(actions: np.ndarray, origin: BimanualPose) -> BimanualPose:
    """The inverse of anchor: absolute targets from actions (T, 32) in robot units and their observation's pose.

    Raises ValueError for another shape, values that are not finite, or an origin that is not a single pose.
    """
    check_single("origin", origin.left.position_m)
    actions = checked_actions(actions, BIMANUAL_COLUMNS)
    left, right = (
        ArmPose(
            position_m=start.position_m + actions[:, columns.position] @ _transposed(start.rotation),
            rotation=start.rotation @ rotation_exp(actions[:, columns.rotation]),
            joints_rad=start.joints_rad + actions[:, columns.joints],
            gripper=start.gripper + actions[:, columns.gripper],
        )
        for columns, start in origin.arms()
    )
    return BimanualPose(left, right)


def checked_actions(actions: np.ndarray, width: int) -> np.ndarray:
    """A chunk to recover targets from, (T, width) float64. Raises ValueError for another shape, and values that are not
    finite."""
    values = np.asarray(actions, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(f"actions: expected shape (T, {width}), got {values.shape}")
    return _finite("actions", values)


def checked_part(name: str, value: np.ndarray, steps: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A part of a pose, or of a trajectory of poses, as float64: (*steps, *shape), steps () or (T,).

    Raises ValueError for another shape, and values that are not finite.
    """
    values = np.asarray(value, dtype=np.float64)
    if len(steps) > 1 or values.shape != steps + shape:
        raise ValueError(f"{name}: expected shape {shape} or (T, {shape}), the same T for all, got {values.shape}")
    return _finite(name, values)


def check_single(name: str, position_m: np.ndarray) -> None:
    """position_m: of an arm of the pose. Raises ValueError for a trajectory."""
    if position_m.ndim != 1:
        raise ValueError(f"{name}: expected a single pose, got a trajectory of {len(position_m)}")


def count_targets(position_m: np.ndarray) -> int:
    """T. position_m: of an arm of the targets. Raises ValueError for a single pose."""
    if position_m.ndim != 2:
        raise ValueError("targets: expected a trajectory, got a single pose")
    return len(position_m)


def check_rotations(rotation: np.ndarray) -> None:
    """rotation: (..., 3, 3). Raises ValueError for matrices that are no rotations."""
    residual = np.abs(_transposed(rotation) @ rotation - np.eye(3)).max(initial=0)
    if residual > ROTATION_TOLERANCE or (np.linalg.det(rotation) < 0).any():
        raise ValueError(f"rotation: expected rotation matrices, got R^T R off by {residual:.1e} or a reflection")


def quaternion_log(xyzw: np.ndarray) -> np.ndarray:
    """Axis-angle vectors (..., 3) float64 in radians, length 0 to pi, of quaternions (..., 4), real part last, of any
    length; 0 for one shorter than SHORTEST_QUATERNION, as benchmarks have it (spec section 8)."""
    given = np.asarray(xyzw, dtype=np.float64)
    length = np.linalg.norm(given, axis=-1, keepdims=True)
    is_one = length >= SHORTEST_QUATERNION
    # q and -q are the same rotation: w >= 0 picks the angle of at most pi.
    q = np.where(given[..., 3:] < 0, -given, given) / np.where(is_one, length, 1)
    sine = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., 3:])
    scale = np.divide(angle, sine, out=np.full_like(sine, 2.0), where=sine > 0)
    axis_angle: np.ndarray = np.where(is_one, q[..., :3] * scale, 0)
    return axis_angle


def rotation_exp(axis_angle: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of axis-angle vectors (..., 3) in radians. Stable down to angle 0."""
    x, y, z = np.moveaxis(axis_angle, -1, 0)
    zero = np.zeros_like(x)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*zero.shape, 3, 3)
    angle = np.linalg.norm(axis_angle, axis=-1)[..., None, None]
    # sin(a) / a and (1 - cos(a)) / a^2; NumPy's sinc(x) is sin(pi x) / (pi x), exact at 0.
    sine_term, cosine_term = np.sinc(angle / np.pi), 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    rotation: np.ndarray = np.eye(3) + sine_term * skew + cosine_term * (skew @ skew)
    return rotation


def rotation_log(rotation: np.ndarray) -> np.ndarray:
    """Axis-angle vectors (..., 3) in radians, length 0 to pi, of rotation matrices (..., 3, 3).

    Goes through the quaternion, so it is stable near 0 and near pi; at pi itself either of the two axes comes back.
    """
    r = rotation
    r00, r11, r22 = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
    x, y, z = r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]
    xy, xz, yz = r[..., 0, 1] + r[..., 1, 0], r[..., 0, 2] + r[..., 2, 0], r[..., 1, 2] + r[..., 2, 1]
    # 4 q q^T of the quaternion q = (w, x, y, z): every row is a multiple of q, that of the largest diagonal is safest.
    rows = (
        (1 + r00 + r11 + r22, x, y, z),
        (x, 1 + r00 - r11 - r22, xy, xz),
        (y, xy, 1 - r00 + r11 - r22, yz),
        (z, xz, yz, 1 - r00 - r11 + r22),
    )
    outer = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    largest = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    q = np.take_along_axis(outer, largest[..., None, None], axis=-2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    # q and -q are the same rotation: w >= 0 picks the angle of at most pi.
    q = np.where(q[..., :1] < 0, -q, q)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., :1])
    axis_angle: np.ndarray = q[..., 1:] * np.divide(angle, sine, out=np.full_like(sine, 2.0), where=sine > 0)
    return axis_angle


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrices, -1, -2)


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return values
