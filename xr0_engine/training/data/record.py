"""Rolls out the scripted expert in the ALOHA simulation, and keeps the episodes in which it succeeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.files import read_json, reading, whole
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.sim import CAMERAS, CONTROL_RATE_HZ, INSTRUCTION, ROBOT_TYPE, AlohaEnv, choose_renderer
from xr0_engine.training.data.episode import PARTS, Episode, part_columns, poses_of, save_episode
from xr0_engine.training.data.expert import before_meeting, down_to_pick, plan_transfer, transferred
from xr0_engine.training.data.kinematics import ARM_JOINTS, ARMS, GripperPose, Kinematics, Unreachable
from xr0_engine.training.data.motion import BimanualMotion
from xr0_engine.training.data.parallel import progress_bar, worker_pool
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip, video_writer
from xr0_engine.whole import PARTIAL, only_writer, publish, write_whole

if TYPE_CHECKING:
    from xr0_engine.engine import Engine

# Every joint starts this far off its rest pose at most: the policy must not see one start only.
START_SPREAD_RAD = 0.1
# Where the right gripper's grasp point is put (start_over_table): the cube's places and some more, above the cube even
# with the spread.
OVER_TABLE_M = np.array([[-0.02, 0.24], [0.36, 0.64], [0.1, 0.22]])
# How far every joint strays before an episode that begins midway, at the most (a standard deviation), and for how long:
# the gripper is then some centimetres beside the expert's way.
STRAY_RAD, STRAY_S = 0.06, 0.5
# Of a chunk of a policy's, between two looks: from, and below.
LED_STEPS = (5, 17)
SETTINGS_FILE = "recording.json"
VIDEOS = "videos"


@dataclass(frozen=True)
class Settings:
    """What a recording depends on besides the seeds.

    width, height: of the frames, in pixels. start_spread_rad: vary_start's. over_table: the share of the episodes that
    begin with the right gripper somewhere over the table (start_over_table): an episode from rest never shows a gripper
    that has come down beside the cube, or one whose place says nothing about the cube's. midway: the share that begins
    where the expert was led astray (start_midway), these among them: a policy is seldom just where the expert would be,
    and learns from them how to go on. policy: a checkpoint's folder; its policy leads these astray, not chance, and
    what it gets wrong the expert shows it (dataset aggregation, Ross et al. 1011.0686). seconds: how much of each
    episode is kept, from its start; None keeps all. views, antialias: as AlohaEnv's. Raises ValueError.
    """

    width: int = 160
    height: int = 120
    start_spread_rad: float = START_SPREAD_RAD
    over_table: float = 0.0
    midway: float = 0.0
    policy: str | None = None
    seconds: float | None = None
    views: tuple[str, ...] = tuple(CAMERAS)
    antialias: bool = True

    def __post_init__(self) -> None:
        for name in ("over_table", "midway"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        if self.policy is not None and not self.midway:
            raise ValueError("policy: it leads episodes astray that begin midway: expected midway above 0, got 0")
        if self.seconds is not None and self.seconds * CONTROL_RATE_HZ < 1:
            raise ValueError(f"seconds: expected at least one step of {CONTROL_RATE_HZ:g} Hz, got {self.seconds}")
        if not self.views or not set(self.views) <= set(CAMERAS) or len(set(self.views)) < len(self.views):
            raise ValueError(f"views: expected some of {', '.join(CAMERAS)}, got {', '.join(self.views) or 'none'}")


@dataclass(frozen=True)
class Recording:
    """What a call to record did. recorded, failed: tries of this call; present: episodes that were there before."""

    recorded: int
    failed: int
    present: int


def record(folder: Path, episodes: int, first_seed: int, settings: Settings, processes: int) -> Recording:
    """Fill a folder up to a number of successful episodes; those it holds already are kept and not made again.

    Episode n comes from seed n, from first_seed on: the cube's place and the arms' start. A try that fails is left out
    and another seed takes its place, so the first `episodes` seeds that succeed are kept, whatever the number of
    processes. A killed recording goes on with the same call: an episode's JSON appears last, when all of it is there.
    Raises ValueError if the folder was recorded with other settings or is being recorded, or the policy does not see
    through these views; RuntimeError if this machine cannot simulate; what policy_engine raises.
    """
    choose_renderer()
    if settings.policy is not None:
        # Before anything is written.
        missing = set(policy_engine(settings.policy).robot_info(ROBOT_TYPE).views) - set(settings.views)
        if missing:
            raise ValueError(f"views: expected {', '.join(sorted(missing))} too, which the policy looks through")
    with only_writer(folder):
        return _record(folder, episodes, first_seed, settings, processes)


def _record(folder: Path, episodes: int, first_seed: int, settings: Settings, processes: int) -> Recording:
    failed = _resume(folder, settings)
    for left in (folder / VIDEOS).glob(f".*{PARTIAL}.mp4"):
        left.unlink()
    done = {int(path.stem.rpartition("_")[2]) for path in folder.glob("episode_*.json")}
    present, tries = len(done), 0
    with progress_bar() as progress, worker_pool(processes) as pool:
        task = progress.add_task("recording", total=episodes, completed=len(done))
        running: dict[Future[bool], int] = {}
        seed = first_seed
        try:
            while len(done) < episodes or running:
                while len(done) + len(running) < episodes:
                    if seed not in done and seed not in failed:
                        running[pool.submit(_try, folder, seed, settings)] = seed
                    seed += 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    tried = running.pop(future)
                    tries += 1
                    if future.result():
                        done.add(tried)
                        progress.advance(task)
                    else:
                        failed.add(tried)
                        _save(folder, settings, failed)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    recorded = len(done) - present
    return Recording(recorded, tries - recorded, present)


def record_episode(env: AlohaEnv, folder: Path, seed: int, settings: Settings) -> bool:
    """Try once, and write episode_<seed>.json and its videos if the cube changed hands. Returns whether it did."""
    # A try that fails is not worth its pictures, which take most of the time.
    plan = _rehearsed(env, seed, settings)
    if plan is None:
        return False
    _start(env, seed, settings)
    if settings.seconds is not None:
        plan = plan[: round(settings.seconds * CONTROL_RATE_HZ)]
    name = f"episode_{seed:06d}"
    videos = folder / VIDEOS
    videos.mkdir(exist_ok=True)
    paths = {view: videos / f"{name}.{view}.mp4" for view in settings.views}
    partial = {view: path.with_name(f".{path.stem}{PARTIAL}.mp4") for view, path in paths.items()}
    measured, commanded = np.empty((2, *plan.shape))
    try:
        with ExitStack() as stack:
            write: dict[str, Callable[[np.ndarray], None]] = {
                view: stack.enter_context(video_writer(path, env.width, env.height, CONTROL_RATE_HZ))
                for view, path in partial.items()
            }
            for tick, targets in enumerate(plan):
                images = env.observe().images
                for view, keep in write.items():
                    keep(images[view])
                measured[tick] = env.joints
                commanded[tick] = env.step(targets)
        for view, path in partial.items():
            publish(path, paths[view])
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    clips = {view: Clip(path, 0.0, len(plan), CONTROL_RATE_HZ) for view, path in paths.items()}
    present = {(arm, part): True for arm in ARMS for part in PARTS}
    kinematics = Kinematics(env)
    motion = BimanualMotion(
        proprios=poses_of(_parts(kinematics, measured), len(plan)),
        targets=poses_of(_parts(kinematics, commanded), len(plan)),
        columns=part_columns(present),
    )
    path = folder / f"{name}.json"
    save_episode(path, Episode(str(path), "success", (INSTRUCTION,), clips, motion, CONTROL_RATE_HZ))
    return True


def _rehearsed(env: AlohaEnv, seed: int, settings: Settings) -> np.ndarray | None:
    """(ticks, 14) the expert's targets from an episode's start; None if they do not hand the cube over."""
    try:
        _start(env, seed, settings)
        plan = plan_transfer(env)
    except Unreachable:
        return None
    for targets in plan:
        env.step(targets)
    return plan if transferred(env) else None


def _start(env: AlohaEnv, seed: int, settings: Settings) -> None:
    """Raises Unreachable."""
    env.reset(seed)
    # Of its own: how an episode from rest starts does not depend on the share of the others.
    rng = np.random.default_rng((seed, 1))
    if rng.random() < settings.over_table:
        start_over_table(env, rng)
    vary_start(env, np.random.default_rng(seed), settings.start_spread_rad)
    rng = np.random.default_rng((seed, 2))
    if rng.random() < settings.midway:
        if settings.policy is None:
            start_midway(env, rng)
        else:
            start_where_led(env, rng, settings.policy)


_env: AlohaEnv | None = None


def _try(folder: Path, seed: int, settings: Settings) -> bool:
    """In a worker, which keeps its simulation from one try to the next."""
    global _env
    if _env is None:
        _env = AlohaEnv(seed, settings.width, settings.height, settings.views, settings.antialias)
    return record_episode(_env, folder, seed, settings)


def vary_start(env: AlohaEnv, rng: np.random.Generator, spread_rad: float) -> None:
    """Move every joint by up to spread_rad, and tell the servos to stay there. After a reset, before the first step."""
    for index in range(len(ARMS)):
        joints = slice(8 * index, 8 * index + 6)
        env.physics.data.qpos[joints] += rng.uniform(-spread_rad, spread_rad, 6)
        env.physics.data.ctrl[joints] = env.physics.data.qpos[joints]
    env.physics.forward()


def start_over_table(env: AlohaEnv, rng: np.random.Generator) -> None:
    """Put the right gripper over the table, pointing down as for a grasp and open by any part; the left arm anywhere on
    its way to where the cube changes hands. After a reset, before the first step. Raises Unreachable."""
    kinematics, joints = Kinematics(env), env.joints
    over = GripperPose(rng.uniform(*OVER_TABLE_M.T), down_to_pick())
    right = kinematics.inverse("right", over, joints[7:13])
    before = kinematics.inverse("left", before_meeting(), joints[:6])
    set_arm(env, "left", joints[:6] + rng.random() * (before - joints[:6]), joints[6])
    set_arm(env, "right", right, rng.random())
    env.physics.forward()


def start_midway(env: AlohaEnv, rng: np.random.Generator) -> None:
    """Let the expert hand the cube over up to any moment, its joints led astray meanwhile. Raises Unreachable."""
    plan = plan_transfer(env)
    stray, spread_rad = np.zeros((len(ARMS), ARM_JOINTS)), rng.uniform(0, STRAY_RAD)
    # An Ornstein-Uhlenbeck process.
    kept = np.exp(-1 / (STRAY_S * CONTROL_RATE_HZ))
    for targets in plan[: rng.integers(len(plan))]:
        stray = kept * stray + np.sqrt(1 - kept**2) * spread_rad * rng.standard_normal(stray.shape)
        env.step(targets + np.pad(stray, [(0, 0), (0, 1)]).ravel())


def start_where_led(env: AlohaEnv, rng: np.random.Generator, policy: str) -> None:
    """Let a policy drive up to any moment of the time that the expert would take. policy: as policy_engine's; of its
    chunks LED_STEPS are executed. Raises Unreachable, for a policy that gives no finite actions too."""
    engine = policy_engine(policy)
    left = int(rng.integers(len(plan_transfer(env))))
    while left > 0:
        observation = env.observe()
        try:
            chunk = engine.infer(observation, seed=int(rng.integers(2**31)))
        except RuntimeError as error:
            raise Unreachable(f"{policy}: {error}") from error
        for action in chunk.actions[: min(int(rng.integers(*LED_STEPS)), left)]:
            env.apply(action, observation)
            left -= 1


@cache
def policy_engine(policy: str) -> Engine:
    """policy: a checkpoint's folder. Raises what Engine.from_pretrained does; ValueError if it does not drive this
    robot as the simulation does."""
    from xr0_engine.engine import Engine

    engine = Engine.from_pretrained(policy, "cpu", "float32", "reference")
    robot = engine.robot_info(ROBOT_TYPE)
    if (robot.layout, robot.control_rate_hz) != (BIMANUAL.name, CONTROL_RATE_HZ):
        raise ValueError(
            f"policy: expected layout {BIMANUAL.name} at {CONTROL_RATE_HZ:g} Hz for the simulation, got {robot.layout} "
            f"at {robot.control_rate_hz:g} Hz"
        )
    return engine


def set_arm(env: AlohaEnv, arm: str, joints_rad: np.ndarray, gripper: float) -> None:
    """Put an arm at (6,) joints and a gripper's opening, and tell the servos to stay there."""
    from gym_aloha.constants import unnormalize_puppet_gripper_position

    begin = 8 * ARMS.index(arm)
    finger_m = unnormalize_puppet_gripper_position(gripper)
    for values in (env.physics.data.qpos, env.physics.data.ctrl):
        values[begin : begin + 8] = [*joints_rad, finger_m, -finger_m]


def _parts(kinematics: Kinematics, joints: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """(N, 14) joints and grippers as the parts of an episode."""
    parts = {}
    for index, arm in enumerate(ARMS):
        own = joints[:, 7 * index : 7 * index + 7]
        poses = [kinematics.forward(arm, row[:6]) for row in own]
        parts[arm, "position"] = np.stack([pose.position_m for pose in poses])
        parts[arm, "rotation"] = np.stack([pose.rotation.ravel() for pose in poses])
        parts[arm, "joints"], parts[arm, "gripper"] = own[:, :6], own[:, 6:]
    return parts


def _resume(folder: Path, settings: Settings) -> set[int]:
    """Seeds that have failed before."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        if any(folder.glob("episode_*.json")):
            raise ValueError(f"{folder} holds episodes but no {SETTINGS_FILE}: choose another folder")
        _save(folder, settings, set())
        return set()
    raw = read_json(path, DataError)
    with reading(path, DataError):
        failed = {whole({"failed_seeds": seed}, "failed_seeds") for seed in raw.pop("failed_seeds")}
    # Recordings from before a setting existed have its default; JSON has lists for tuples.
    known, wanted = (json.loads(json.dumps(_told(it))) for it in (Settings(), settings))
    if known | raw != wanted:
        raise ValueError(f"{folder} was recorded with {known | raw}, not {wanted}: choose another folder")
    return failed


def _told(settings: Settings) -> dict[str, Any]:
    """Settings as they are written down: a policy by what is in its folder, wherever that lies."""
    return asdict(settings) | {"policy": None if settings.policy is None else _policy_hash(settings.policy)}


@cache
def _policy_hash(policy: str) -> str:
    """Read once: what is written down is written anew with every try that fails."""
    from xr0_engine.exported.manifest import checkpoint_hash

    return checkpoint_hash(Path(policy))


def _save(folder: Path, settings: Settings, failed: set[int]) -> None:
    write_whole(folder / SETTINGS_FILE, json.dumps(_told(settings) | {"failed_seeds": sorted(failed)}))
