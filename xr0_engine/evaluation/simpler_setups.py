"""What lies where in SimplerEnv's episodes: tasks, variants and positions, as data.

Google robot: SimplerEnv's own evaluation scripts (github.com/simpler-env/SimplerEnv, scripts/), of visual matching and
of variant aggregation. WidowX: the released evaluation's list (eval_simplerenv/env_options), which gives every task 120
steps where SimplerEnv's script has 60 for three of the four. Numbers of episodes are those of the released tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

WIDOWX, GOOGLE_VM, GOOGLE_VA = "widowx", "google_vm", "google_va"
Point = tuple[float, float]


@dataclass(frozen=True)
class Setup:
    """One episode. env: its name for gymnasium. variant: what is unusual, for reports. build: arguments of the
    environment's own. overlay: the photograph behind the scene, None without. robot_xy, robot_yaw_rad: where the robot
    stands. place: the objects', `episode_id` or `init_xy` (metres)."""

    env: str
    scene: str
    variant: str
    robot: str
    robot_xy: Point
    place: tuple[str, int | Point]
    robot_yaw_rad: float = 0.0
    overlay: str | None = None
    build: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SetupTask:
    """A row of the released tables. instruction: in general; the simulator names the objects of each episode. steps:
    name of the field of Simpler that holds its horizon."""

    suite: str
    name: str
    instruction: str
    steps: str
    setups: tuple[Setup, ...]


# Recoloured arms of visual matching; None: as it is.
URDFS = (None, "recolor_tabletop_visual_matching_1", "recolor_tabletop_visual_matching_2",
         "recolor_cabinet_visual_matching_1")  # fmt: skip
CANS: tuple[dict[str, Any], ...] = ({"lr_switch": True}, {"upright": True}, {"laid_vertically": True})
TABLE_SCENE, DRAWER_SCENE = "google_pick_coke_can_1_v4", "frl_apartment_stage_simple"
BACKGROUNDS = ("google_pick_coke_can_1_v4_alt_background", "google_pick_coke_can_1_v4_alt_background_2")
TEXTURES = ("Baked_sc1_staging_objaverse_cabinet1_h870", "Baked_sc1_staging_objaverse_cabinet2_h870")
LIGHTS = ("slightly_darker_lighting", "slightly_brighter_lighting")
LEVELS = ("Top", "Middle", "Bottom")
# Where the robot stood in the photographs a0 to c2: x, y, yaw.
STANDS = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
GOOGLE = "google_robot_static"
RAY_TRACED = {"shader_dir": "rt"}
NEAR_YAW_RAD, NEAR_EPISODES, BRIDGE_EPISODES = -0.09, 60, 24


def _grid(xs: tuple[float, float, int], ys: tuple[float, float, int]) -> list[Point]:
    """Positions, x outermost. xs, ys: first, last, count."""
    return [(float(x), float(y)) for x, y in product(np.linspace(*xs), np.linspace(*ys))]


CAN_GRID = _grid((-0.35, -0.12, 5), (-0.02, 0.42, 5))
APPLE_GRID = _grid((-0.08, -0.02, 3), (-0.02, 0.08, 3))


def _bridge(env: str, sink: bool = False) -> tuple[Setup, ...]:
    scene, robot, xy, overlay = (
        ("bridge_table_1_v2", "widowx_sink_camera_setup", (0.127, 0.06), "bridge_sink.png")
        if sink
        else ("bridge_table_1_v1", "widowx", (0.147, 0.028), "bridge_real_eval_1.png")
    )
    return tuple(
        Setup(env, scene, "base", robot, xy, ("episode_id", episode), overlay=overlay)
        for episode in range(BRIDGE_EPISODES)
    )


def _cans(
    env: str, scene: str, variant: str, overlay: str | None = None, build: Mapping[str, Any] | None = None
) -> Iterator[Setup]:
    for can in CANS:
        for xy in CAN_GRID:
            name = f"{variant}/{next(iter(can))}"
            yield Setup(env, scene, name, GOOGLE, (0.35, 0.20), ("init_xy", xy), 0.0, overlay, can | dict(build or {}))


def _near(
    env: str, scene: str, variant: str, overlay: str | None = None, build: Mapping[str, Any] | None = None
) -> Iterator[Setup]:
    for episode in range(NEAR_EPISODES):
        place = ("episode_id", episode)
        yield Setup(env, scene, variant, GOOGLE, (0.35, 0.21), place, NEAR_YAW_RAD, overlay, dict(build or {}))


def _table_variants(env: str, alternative_cameras: Sequence[str]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(env, scene, variant, build) of variant aggregation at the table, distractors apart."""
    return [
        (env, TABLE_SCENE, "base", {}),
        *((env, scene, f"texture_{n}", {}) for n, scene in enumerate(TEXTURES, 1)),
        *((env, scene, f"background_{n}", {}) for n, scene in enumerate(BACKGROUNDS, 1)),
        *((env, TABLE_SCENE, light, {light: True}) for light in LIGHTS),
        *((camera, TABLE_SCENE, f"camera_{n}", {}) for n, camera in enumerate(alternative_cameras, 1)),
    ]


DRAWER_VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (DRAWER_SCENE, "base", {}),
    ("modern_bedroom_no_roof", "background_1", {}),
    ("modern_office_no_roof", "background_2", {}),
    (DRAWER_SCENE, "brighter", {"light_mode": "brighter"}),
    (DRAWER_SCENE, "darker", {"light_mode": "darker"}),
    (DRAWER_SCENE, "cabinet_2", {"station_name": "mk_station2"}),
    (DRAWER_SCENE, "cabinet_3", {"station_name": "mk_station3"}),
)


def _drawers_vm(
    envs: Sequence[str], stands: Sequence[str], places: Sequence[Point], build: dict[str, Any]
) -> tuple[Setup, ...]:
    matched = {"station_name": "mk_station_recolor", "light_mode": "simple", "disable_bad_material": True}
    setups = []
    for urdf, env, stand, xy in product(URDFS, envs, stands, places):
        x, y, yaw_rad = STANDS[stand]
        variant = f"{urdf or 'base'}/{stand}"
        options = RAY_TRACED | matched | {"urdf_version": urdf} | build
        overlay = f"open_drawer_{stand}.png"
        place = ("init_xy", xy)
        setups.append(Setup(env, "dummy_drawer", variant, GOOGLE, (x, y), place, yaw_rad, overlay, options))
    return tuple(setups)


def _drawers_va(
    envs: Sequence[str], stands: Sequence[Point], places: Sequence[Point], build: dict[str, Any]
) -> tuple[Setup, ...]:
    return tuple(
        Setup(env, scene, variant, GOOGLE, stand, ("init_xy", xy), build=RAY_TRACED | options | build)
        for (scene, variant, options), env, stand, xy in product(DRAWER_VARIANTS, envs, stands, places)
    )


def _drawer_envs(verb: str) -> list[str]:
    return [f"{verb}{level}DrawerCustomInScene-v0" for level in LEVELS]


CAN_ENV, PUT_ENVS = "GraspSingleOpenedCokeCanInScene-v0", ["PlaceIntoClosedTopDrawerCustomInScene-v0"]
DISTRACTOR_ENV = "GraspSingleOpenedCokeCanDistractorInScene-v0"
CAN_CAMERAS = (
    "GraspSingleOpenedCokeCanAltGoogleCameraInScene-v0",
    "GraspSingleOpenedCokeCanAltGoogleCamera2InScene-v0",
)
NEAR_ENV, NEAR_MATCHED_ENV = "MoveNearGoogleInScene-v0", "MoveNearGoogleBakedTexInScene-v0"
NEAR_CAMERAS = ("MoveNearAltGoogleCameraInScene-v0", "MoveNearAltGoogleCamera2InScene-v0")
FRONT: Sequence[Point] = [(0.0, 0.0)]

PICK, NEAR = "pick coke can", "move an object near another"
OPENING, CLOSING, PUTTING = "open a drawer", "close a drawer", "open the top drawer, then place the apple into it"


def all_tasks() -> tuple[SetupTask, ...]:
    """Every task of every suite, in the order of the released tables."""
    cans = _table_variants(CAN_ENV, CAN_CAMERAS)
    cans[3:3] = [
        (DISTRACTOR_ENV, TABLE_SCENE, "distractors", {}),
        (DISTRACTOR_ENV, TABLE_SCENE, "more_distractors", {"distractor_config": "more"}),
    ]
    nears = _table_variants(NEAR_ENV, NEAR_CAMERAS)
    nears.insert(1, (NEAR_ENV, TABLE_SCENE, "no_distractor", {"no_distractor": True}))
    cans_vm = (
        setup
        for urdf in URDFS
        for setup in _cans(
            CAN_ENV, TABLE_SCENE, urdf or "base", "google_coke_can_real_eval_1.png", {"urdf_version": urdf}
        )
    )
    nears_vm = (
        setup
        for urdf in URDFS
        for setup in _near(
            NEAR_MATCHED_ENV, TABLE_SCENE, urdf or "base", "google_move_near_real_eval_1.png", {"urdf_version": urdf}
        )
    )
    around = _grid((0.65, 0.85, 3), (-0.2, 0.2, 3))
    close_by = _grid((0.65, 0.65, 1), (-0.2, 0.2, 3))
    return (
        SetupTask(WIDOWX, "put_carrot_on_plate", "put carrot on plate", "widowx_steps",
                  _bridge("PutCarrotOnPlateInScene-v0")),
        SetupTask(WIDOWX, "put_eggplant_in_basket", "put eggplant into yellow basket", "widowx_steps",
                  _bridge("PutEggplantInBasketScene-v0", sink=True)),
        SetupTask(WIDOWX, "put_spoon_on_table_cloth", "put the spoon on the towel", "widowx_steps",
                  _bridge("PutSpoonOnTableClothInScene-v0")),
        SetupTask(WIDOWX, "stack_green_cube_on_yellow_cube", "stack the green block on the yellow block",
                  "widowx_steps", _bridge("StackGreenCubeOnYellowCubeBakedTexInScene-v0")),
        SetupTask(GOOGLE_VM, "pick_coke_can", PICK, "pick_steps", tuple(cans_vm)),
        SetupTask(GOOGLE_VM, "move_near", NEAR, "near_steps", tuple(nears_vm)),
        SetupTask(GOOGLE_VM, "open_drawer", OPENING, "drawer_steps",
                  _drawers_vm(_drawer_envs("Open"), list(STANDS), FRONT, {})),
        SetupTask(GOOGLE_VM, "close_drawer", CLOSING, "drawer_steps",
                  _drawers_vm(_drawer_envs("Close"), list(STANDS), FRONT, {})),
        SetupTask(GOOGLE_VM, "put_in_drawer", PUTTING, "put_steps",
                  _drawers_vm(PUT_ENVS, ("a0", "b0", "c0"), APPLE_GRID, {"model_ids": "baked_apple_v2"})),
        SetupTask(GOOGLE_VA, "pick_coke_can", PICK, "pick_steps",
                  tuple(setup for env, scene, variant, build in cans
                        for setup in _cans(env, scene, variant, build=build))),
        SetupTask(GOOGLE_VA, "move_near", NEAR, "near_steps",
                  tuple(setup for env, scene, variant, build in nears
                        for setup in _near(env, scene, variant, build=build))),
        SetupTask(GOOGLE_VA, "open_drawer", OPENING, "drawer_steps",
                  _drawers_va(_drawer_envs("Open"), around, FRONT, {})),
        SetupTask(GOOGLE_VA, "close_drawer", CLOSING, "drawer_steps",
                  _drawers_va(_drawer_envs("Close"), around, FRONT, {})),
        SetupTask(GOOGLE_VA, "put_in_drawer", PUTTING, "put_steps",
                  _drawers_va(PUT_ENVS, close_by, APPLE_GRID, {"model_ids": "apple"})),
    )  # fmt: skip
