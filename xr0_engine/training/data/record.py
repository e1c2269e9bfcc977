"""Rolls out the scripted expert in the ALOHA simulation, and keeps the episodes in which it succeeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from xr0_engine.files import read_json, reading, whole
from xr0_engine.sim import CAMERAS, CONTROL_RATE_HZ, INSTRUCTION, AlohaEnv, choose_renderer
from xr0_engine.training.data.episode import PARTS, Episode, part_columns, poses_of, save_episode
from xr0_engine.training.data.expert import ARMS, Kinematics, Unreachable, plan_transfer, transferred
from xr0_engine.training.data.motion import BimanualMotion
from xr0_engine.training.data.parallel import progress_bar, worker_pool
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip, video_writer
from xr0_engine.whole import PARTIAL, only_writer, publish, write_whole

# Every joint starts this far off its rest pose at most: the policy must not see one start only.
START_SPREAD_RAD = 0.1
SETTINGS_FILE = "recording.json"
VIDEOS = "videos"


@dataclass(frozen=True)
class Settings:
    """What a recording depends on besides the seeds. width, height: of the frames, in pixels."""

    width: int = 160
    height: int = 120
    start_spread_rad: float = START_SPREAD_RAD


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
    Raises ValueError if the folder was recorded with other settings or is being recorded, RuntimeError if this machine
    cannot simulate.
    """
    choose_renderer()
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
    env.reset(seed)
    vary_start(env, np.random.default_rng(seed), settings.start_spread_rad)
    try:
        plan = plan_transfer(env)
    except Unreachable:
        return False
    name = f"episode_{seed:06d}"
    videos = folder / VIDEOS
    videos.mkdir(exist_ok=True)
    paths = {view: videos / f"{name}.{view}.mp4" for view in CAMERAS}
    partial = {view: path.with_name(f".{path.stem}{PARTIAL}.mp4") for view, path in paths.items()}
    measured, commanded = np.empty((2, *plan.shape))
    try:
        with ExitStack() as stack:
            write: dict[str, Callable[[np.ndarray], None]] = {
                view: stack.enter_context(video_writer(path, env.width, env.height, CONTROL_RATE_HZ))
                for view, path in partial.items()
            }
            for tick, targets in enumerate(plan):
                for view, image in env.observe().images.items():
                    write[view](image)
                measured[tick] = env.joints
                commanded[tick] = env.step(targets)
        if not transferred(env):
            return False
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


_env: AlohaEnv | None = None


def _try(folder: Path, seed: int, settings: Settings) -> bool:
    """In a worker, which keeps its simulation from one try to the next."""
    global _env
    if _env is None:
        _env = AlohaEnv(seed, settings.width, settings.height)
    return record_episode(_env, folder, seed, settings)


def vary_start(env: AlohaEnv, rng: np.random.Generator, spread_rad: float) -> None:
    """Move every joint by up to spread_rad, and tell the servos to stay there. After a reset, before the first step."""
    for index in range(len(ARMS)):
        joints = slice(8 * index, 8 * index + 6)
        env.physics.data.qpos[joints] += rng.uniform(-spread_rad, spread_rad, 6)
        env.physics.data.ctrl[joints] = env.physics.data.qpos[joints]
    env.physics.forward()


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
    if raw != asdict(settings):
        raise ValueError(f"{folder} was recorded with {raw}, not {asdict(settings)}: choose another folder")
    return failed


def _save(folder: Path, settings: Settings, failed: set[int]) -> None:
    write_whole(folder / SETTINGS_FILE, json.dumps(asdict(settings) | {"failed_seeds": sorted(failed)}))
