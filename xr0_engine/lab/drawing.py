"""Pictures of the lab's floor: discs with soft edges on a plain ground, in NumPy."""

from __future__ import annotations

import numpy as np

SIDE = 64
"""Pixels of a picture's sides."""
EDGE = 1.1
"""The picture shows -EDGE to EDGE on both axes: what stands at the border of the square is seen whole."""
GROUND = (127, 127, 127)
"""0 to the model, as near as it can be: what it is shown is then what lies on the floor, not the floor."""
OBSTACLE = (16, 16, 20)
GOALS = ((250, 70, 40), (255, 200, 30))
"""Of each robot's disc, left one first."""
ROBOTS = ((20, 60, 250), (20, 190, 110))
ROBOT_RADIUS, GOAL_RADIUS = 0.1, 0.2


def draw(positions: np.ndarray, goals: np.ndarray, obstacle: np.ndarray | None = None) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 RGB, y upward. positions, goals: (R, 2) of R robots. obstacle: (3,) x, y, radius."""
    canvas = _EMPTY.copy()
    if obstacle is not None:
        _disc(canvas, obstacle[0], obstacle[1], obstacle[2], OBSTACLE)
    for (x, y), colour in zip(goals.tolist(), GOALS, strict=False):
        _disc(canvas, x, y, GOAL_RADIUS, colour)
    for (x, y), colour in zip(positions.tolist(), ROBOTS, strict=False):
        _disc(canvas, x, y, ROBOT_RADIUS, colour)
    return canvas


def _disc(canvas: np.ndarray, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
    scale = SIDE / (2 * EDGE)
    column, row, reach = (x + EDGE) * scale - 0.5, (EDGE - y) * scale - 0.5, radius * scale
    left, top = max(int(column - reach - 1), 0), max(int(row - reach - 1), 0)
    right, bottom = min(int(column + reach + 3), SIDE), min(int(row + reach + 3), SIDE)
    if left >= right or top >= bottom:
        return
    across = np.arange(left, right, dtype=np.float32) - np.float32(column)
    down = np.arange(top, bottom, dtype=np.float32) - np.float32(row)
    distance = np.sqrt(across[None] ** 2 + down[:, None] ** 2)
    covered = np.clip(np.float32(reach + 0.5) - distance, 0, 1)[..., None]
    # A soft edge says where a disc stands to a fraction of a pixel.
    part = canvas[top:bottom, left:right]
    part[:] = part + covered * (np.asarray(colour, np.float32) - part) + np.float32(0.5)


_EMPTY = np.full((SIDE, SIDE, 3), GROUND, np.uint8)
