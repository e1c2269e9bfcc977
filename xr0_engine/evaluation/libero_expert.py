"""A scripted policy for LIBERO that looks into the world: it picks a thing up and puts it where the goal wants it.

It plans one chunk at every call, from where hand and things are at that moment, on a model of the arm's controller. Of
what is executed while it plans it knows the prefix alone: delay costs it what it costs any policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xr0_engine.evaluation.libero_env import LiberoEnv
from xr0_engine.types import ActionChunk, Observation, RobotInfo

CHUNK_LENGTH, WIDTH = 10, 32
GRIPPER = 6
OPEN, CLOSE = -1.0, 1.0

# robosuite's OSC_POSE: an action of 1 moves the goal by so much, a critically damped spring pulls the hand there.
REACH_M, REACH_RAD = 0.05, 0.5
STIFFNESS = 150.0
DAMPING = 2 * np.sqrt(STIFFNESS)
PHYSICS_S, PHYSICS_STEPS = 0.002, 25
# Of the gripper's range of 2, from open (-1) to closed (1), in a control step.
GRIPPER_SPEED = 0.25

# Between the fingers there are 8 cm; a thing that is wider is taken by its rim, so far inside of its edge.
GRASP_WIDTH_M, RIM_M = 0.07, 0.014
# The grasp is so far below a thing's top, at most in its middle.
GRASP_DEPTH_M, RIM_DEPTH_M = 0.03, 0.032
# Moves sideways are so far above what lies below; over a place, the thing is let go so far above it.
CLEAR_M, DROP_M = 0.10, 0.012
# Over the place or thing, straight down from here; arrived.
OVER_M, ARRIVED_M, ALIGNED_RAD = 0.012, 0.008, 0.12
OPENED, GRIPPED = -0.7, 0.9


@dataclass(frozen=True)
class Box:
    """What a thing takes up, upright, in metres. center: (3,). half: (3,) along its own axes. yaw: of the
    first, rad."""

    center: np.ndarray
    half: np.ndarray
    yaw: float

    @property
    def top(self) -> float:
        return float(self.center[2] + self.half[2])

    @property
    def bottom(self) -> float:
        return float(self.center[2] - self.half[2])


@dataclass(frozen=True)
class Hand:
    """The grasp point between the fingers. position, velocity: (3,) m, m/s. yaw, spin: of the fingers' axis, rad,
    rad/s. closed: from -1 to 1. carried: (3,), from the hand to the thing it holds, m; None if it holds nothing."""

    position: np.ndarray
    velocity: np.ndarray
    yaw: float
    spin: float
    closed: float
    carried: np.ndarray | None


@dataclass(frozen=True)
class Errand:
    """thing: (3,), where it is. grasp: (3,) and yaw, where the hand takes it. place: (3,), where it goes. clear: the
    hand's height for moves sideways."""

    thing: np.ndarray
    grasp: np.ndarray
    yaw: float
    place: np.ndarray
    clear: float


class PickAndPlace:
    """A Policy for goals of the kinds `on` and `in`, one thing after the other; it needs no camera.

    Raises ValueError for a goal of another kind (drawers, doors, knobs), at the first call.
    """

    def __init__(self, env: LiberoEnv, rate_hz: float, views: tuple[str, ...], robot_type: str | None) -> None:
        self._env, self._robot_type = env, robot_type
        self._info = RobotInfo(
            chunk_length=CHUNK_LENGTH,
            control_rate_hz=rate_hz,
            replan_every=CHUNK_LENGTH,
            views=views,
            layout="plain",
            action_width=WIDTH,
            max_prefix=CHUNK_LENGTH - 1,
            step_columns=tuple(range(GRIPPER)),
            two_valued_columns=(GRIPPER,),
        )

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self._info

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        scene = Scene(self._env)
        errand = scene.errand()
        hand = scene.hand(errand)
        actions = np.zeros((CHUNK_LENGTH, WIDTH), np.float32)
        given = 0 if prefix is None else len(prefix)
        for index, action in enumerate(actions):
            if prefix is not None and index < given:
                action[:] = prefix[index]
            else:
                action[: GRIPPER + 1] = decide(hand, errand)
            hand, errand = act_out(hand, errand, action)
        active = np.arange(WIDTH) <= GRIPPER
        robot_type = self._robot_type or "libero"
        return ActionChunk(actions, actions, active, robot_type, given, observation.timestamp_s)


def decide(hand: Hand, errand: Errand) -> np.ndarray:
    """The next action, (7,), from what is the case alone."""
    at = hand.position
    if hand.carried is not None:
        target = errand.place - hand.carried
        if not _over(at, target):
            return _move(hand, _high(at, target, errand.clear), hand.yaw, CLOSE)
        if at[2] > target[2] + ARRIVED_M:
            return _move(hand, target, hand.yaw, CLOSE)
        return _move(hand, target, hand.yaw, OPEN)
    if np.linalg.norm(errand.thing[:2] - errand.place[:2]) < OVER_M * 2 and errand.thing[2] < errand.place[2] + CLEAR_M:
        # It lies there: let go, and leave upwards.
        above = at if hand.closed > OPENED else np.array([*at[:2], errand.clear])
        return _move(hand, above, hand.yaw, OPEN)
    aligned = abs(_half_turn(errand.yaw - hand.yaw)) < ALIGNED_RAD
    if not _over(at, errand.grasp) or not (aligned or at[2] < errand.grasp[2] + ARRIVED_M):
        return _move(hand, _high(at, errand.grasp, errand.clear), errand.yaw, OPEN)
    if at[2] > errand.grasp[2] + ARRIVED_M:
        ready = hand.closed <= OPENED
        return _move(hand, errand.grasp if ready else at, errand.yaw, OPEN)
    return _move(hand, errand.grasp, hand.yaw, CLOSE)


def act_out(hand: Hand, errand: Errand, action: np.ndarray) -> tuple[Hand, Errand]:
    """Hand and thing a control step later, as the controller's spring moves them."""
    position, velocity, yaw, spin = hand.position.copy(), hand.velocity.copy(), hand.yaw, hand.spin
    goal, goal_yaw = position + REACH_M * action[:3], yaw + REACH_RAD * float(action[5])
    for _ in range(PHYSICS_STEPS):
        velocity += PHYSICS_S * (STIFFNESS * (goal - position) - DAMPING * velocity)
        position += PHYSICS_S * velocity
        spin += PHYSICS_S * (STIFFNESS * (goal_yaw - yaw) - DAMPING * spin)
        yaw += PHYSICS_S * spin
    closed = float(np.clip(hand.closed + GRIPPER_SPEED * np.sign(action[GRIPPER]), -1, 1))
    carried, thing = hand.carried, errand.thing
    if carried is not None and closed < GRIPPED:
        carried = None
    elif carried is None and closed >= GRIPPED and np.linalg.norm(errand.grasp - position) < 2 * OVER_M:
        carried = thing - position
    if carried is not None:
        thing = position + carried
        errand = replace(errand, thing=thing)
    return Hand(position, velocity, yaw, spin, closed, carried), errand


def _over(at: np.ndarray, target: np.ndarray) -> bool:
    return float(np.linalg.norm(at[:2] - target[:2])) < OVER_M


def _high(at: np.ndarray, target: np.ndarray, clear: float) -> np.ndarray:
    """Up first, then sideways."""
    sideways = at[:2] if at[2] < clear - 2 * ARRIVED_M else target[:2]
    return np.array([*sideways, clear])


def _move(hand: Hand, target: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
    turn = _half_turn(yaw - hand.yaw)
    action = np.zeros(GRIPPER + 1)
    action[:3] = np.clip((target - hand.position) / REACH_M, -1, 1)
    action[5] = np.clip(turn / REACH_RAD, -1, 1)
    action[GRIPPER] = gripper
    return action


def _half_turn(angle: float) -> float:
    """To -pi/2 .. pi/2: fingers are alike."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


class Scene:
    """What lies where, now."""

    def __init__(self, env: LiberoEnv) -> None:
        self._robosuite: Any = env.env.env
        self._model, self._data = env.model, env.data
        self._robot = self._robosuite.robots[0]
        goals = [tuple(goal) for goal in self._robosuite.parsed_problem["goal_state"]]
        others = [" ".join(goal) for goal in goals if goal[0] not in ("on", "in") or len(goal) != 3]
        if others:
            raise ValueError(f"the scripted policy picks and places; it cannot reach the goal {', '.join(others)}")
        open_goals = [goal for goal in goals if not self._robosuite._eval_predicate(goal)]
        _, self._thing, self._place = (open_goals or goals)[0]

    def hand(self, errand: Errand) -> Hand:
        import mujoco

        gripper = self._robot.gripper
        site = self._model.site(gripper.important_sites["grip_site"]).id
        position = self._data.site_xpos[site].copy()
        velocity = np.zeros(6)
        mujoco.mj_objectVelocity(self._model, self._data, mujoco.mjtObj.mjOBJ_SITE, site, velocity, 0)
        closed = float(gripper.current_action[1])
        thing = self._robosuite.objects_dict[self._thing]
        held = closed >= GRIPPED and self._robosuite._check_grasp(gripper=gripper, object_geoms=thing)
        carried = errand.thing - position if held else None
        return Hand(position, velocity[3:], self._yaw(), float(velocity[2]), closed, carried)

    def errand(self) -> Errand:
        thing = self._box(self._thing)
        origin = self._origin(self._thing)
        grasp, yaw = self._grasp(thing)
        place, ground = self._destination(thing)
        clear = max(thing.top if thing.bottom < ground else 0.0, ground) + CLEAR_M + 2 * thing.half[2]
        return Errand(origin, grasp, yaw, place + (origin - thing.center), clear)

    def _grasp(self, thing: Box) -> tuple[np.ndarray, float]:
        yaws = [thing.yaw, thing.yaw + np.pi / 2]
        widths = 2 * thing.half[:2]
        fits = [
            (abs(_half_turn(yaw - self._yaw())), yaw)
            for yaw, width in zip(yaws, widths, strict=True)
            if width < GRASP_WIDTH_M
        ]
        if fits:
            yaw = min(fits)[1]
            height = max(thing.top - GRASP_DEPTH_M, float(thing.center[2]))
            return np.array([*thing.center[:2], height]), yaw
        yaw = self._yaw()
        outwards = np.array([np.cos(yaw), np.sin(yaw)])
        radius = float(thing.half[:2].mean()) - RIM_M
        sides = [thing.center[:2] + sign * radius * outwards for sign in (-1, 1)]
        side = max(sides, key=self._room)
        return np.array([*side, thing.top - RIM_DEPTH_M]), yaw

    def _room(self, spot: np.ndarray) -> float:
        """Metres from a spot to the nearest other thing's centre."""
        others = [name for name in self._robosuite.obj_body_id if name != self._thing]
        return min((float(np.linalg.norm(self._origin(name)[:2] - spot)) for name in others), default=1.0)

    def _destination(self, thing: Box) -> tuple[np.ndarray, float]:
        """Where the thing's centre goes, and the height of what is below it."""
        if self._place in self._robosuite.object_sites_dict:
            site = self._model.site(self._place).id
            center, half = self._data.site_xpos[site], self._model.site_size[site]
            owner = self._robosuite.object_sites_dict[self._place].parent_name
            ground = self._box(owner).top if owner else float(center[2])
            inside = ground > center[2] + half[2] / 2
            low = center[2] + DROP_M if not inside else max(center[2], ground - 2 * thing.half[2])
            return np.array([*center[:2], low + thing.half[2] + DROP_M]), ground
        under = self._box(self._place)
        return np.array([*self._origin(self._place)[:2], under.top + thing.half[2]]), under.top

    def _origin(self, name: str) -> np.ndarray:
        origin: np.ndarray = self._data.xpos[self._robosuite.obj_body_id[name]].copy()
        return origin

    def _yaw(self) -> float:
        """Of the line through the fingers."""
        left, right = (
            self._data.geom(name).xpos for name in ("gripper0_finger1_pad_collision", "gripper0_finger2_pad_collision")
        )
        across = left - right
        return float(np.arctan2(across[1], across[0]))

    def _box(self, name: str) -> Box:
        """Of a thing's geoms, in the axes of its body turned upright."""
        model, data = self._model, self._data
        root = self._robosuite.obj_body_id[name]
        geoms = [i for i in range(model.ngeom) if model.body_rootid[model.geom_bodyid[i]] == model.body_rootid[root]]
        geoms = [i for i in geoms if model.geom_contype[i] or model.geom_conaffinity[i]] or geoms
        rotation = data.xmat[root].reshape(3, 3)
        # The horizontal axis that says most of how it is turned.
        first = rotation[:, int(np.argmax(np.hypot(rotation[0], rotation[1])))]
        yaw = float(np.arctan2(first[1], first[0]))
        upright = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        corners = [data.geom_xpos[i] + self._points(i) @ data.geom_xmat[i].reshape(3, 3).T for i in geoms]
        turned = np.concatenate(corners) @ upright.T
        low, high = turned.min(0), turned.max(0)
        return Box(upright.T @ ((low + high) / 2), (high - low) / 2, yaw)

    def _points(self, geom: int) -> np.ndarray:
        """(n, 3), a mesh's vertices, or the corners of a box around another shape."""
        model = self._model
        mesh = int(model.geom_dataid[geom])
        if mesh >= 0:
            first = int(model.mesh_vertadr[mesh])
            vertices: np.ndarray = model.mesh_vert[first : first + int(model.mesh_vertnum[mesh])]
            return vertices
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        corners: np.ndarray = model.geom_aabb[geom, :3] + signs * model.geom_aabb[geom, 3:]
        return corners
