"""Where a policy comes from: a server, a checkpoint on this machine, or a script. And what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from xr0_engine.config import TRAINED_PREFIX
from xr0_engine.executor import Policy
from xr0_engine.guard import statistics_digest
from xr0_engine.robot.layouts import BIMANUAL, Frame, Layout, find_layout
from xr0_engine.types import RobotInfo

TRAINED = Path(__file__).parent / "aloha_transfer" / "policy"
"""A checkpoint that hands the cube over in the ALOHA simulation, seen through its top camera (`make demo-policy`)."""


@dataclass(frozen=True)
class Source:
    """A policy for one robot type, and how it wants to be executed.

    title: for people. control_rate_hz: actions per second. views: as in the embodiment profile. action_width,
    state_width: columns. max_prefix: the longest prefix that it takes. step_columns, two_valued_columns: as in the
    embodiment profile, empty where it does not say. frames: of each view's video, None where it is a picture.
    state_length: states of an observation. info: what it tells of the robot; statistics: guard.statistics_digest of its
    action statistics; None: it does not say.
    """

    policy: Policy
    title: str
    robot_type: str
    control_rate_hz: float
    views: tuple[str, ...]
    layout: Layout
    action_width: int
    state_width: int
    max_prefix: int
    step_columns: tuple[int, ...] = ()
    two_valued_columns: tuple[int, ...] = ()
    frames: int | None = None
    state_length: int = 1
    info: RobotInfo | None = None
    statistics: str | None = None

    @property
    def frame(self) -> Frame:
        """How its actions compare."""
        return self.layout.frame_of(self.action_width, self.step_columns, self.two_valued_columns)


def _source(
    policy: Policy, title: str, robot_type: str, robot: RobotInfo, action_width: int, state_width: int, max_prefix: int
) -> Source:
    return Source(
        policy=policy,
        title=title,
        robot_type=robot_type,
        control_rate_hz=robot.control_rate_hz,
        views=robot.views,
        layout=find_layout(robot.layout),
        action_width=action_width,
        state_width=state_width,
        max_prefix=max_prefix if robot.max_prefix is None else robot.max_prefix,
        step_columns=robot.step_columns or (),
        two_valued_columns=robot.two_valued_columns or (),
        frames=None if robot.history is None else robot.history[0],
        state_length=robot.state_length or 1,
        info=robot,
    )


@contextmanager
def from_server(url: str, api_key: str | None, robot_type: str | None, ca_file: Path | None = None) -> Iterator[Source]:
    """A server's policy. ca_file: as in Client.

    Raises ConnectionError, PermissionError or ValueError if it cannot be had, among others for an unknown layout.
    """
    from xr0_engine.serve.client import Client

    with Client(url, api_key, ca_file=ca_file) as client:
        metadata = client.metadata
        name = metadata.resolve(robot_type)
        title, most = f"{name} from {url}", metadata.prefix_range[1]
        yield _source(client, title, name, metadata.robot(name), metadata.action_width, metadata.state_width, most)


def from_checkpoint(
    checkpoint: str | Path,
    robot_type: str | None,
    seed: int,
    device: str,
    dtype: str,
    backend: str,
    embodiment: str | Path | None = None,
    tells_bend: bool = False,
) -> Source:
    """A checkpoint's policy, on this machine. seed: of the noise that the chunks grow from. embodiment: as in
    Engine.from_pretrained. tells_bend: for a guard, chunks say it where the backend can."""
    import torch

    from xr0_engine.engine import Engine
    from xr0_engine.model.xr0 import tell_bend
    from xr0_engine.robot.normalize import select_robot_type

    engine = Engine.from_pretrained(checkpoint, device, dtype, backend, embodiment)
    if tells_bend:
        tell_bend(engine.model)
    torch.manual_seed(seed)
    name = select_robot_type(engine.statistics, robot_type)
    robot, head, statistics = engine.robot_info(name), engine.config.head, engine.statistics[name]
    title = f"{name} from {checkpoint}"
    made = _source(engine, title, name, robot, head.action_dim, head.state_dim, engine.max_prefix)
    return replace(made, statistics=statistics_digest(statistics.mean, statistics.std))


def scripted(seed: int) -> Source:
    """Smooth random motions of the simulated robot; see WanderPolicy."""
    from xr0_engine.drive.wander import WanderPolicy
    from xr0_engine.robot.decode import BIMANUAL_COLUMNS
    from xr0_engine.sim import CAMERAS, CONTROL_RATE_HZ, ROBOT_TYPE

    return Source(
        policy=WanderPolicy(seed),
        title="scripted motions (no model)",
        robot_type=ROBOT_TYPE,
        control_rate_hz=CONTROL_RATE_HZ,
        views=tuple(CAMERAS),
        layout=BIMANUAL,
        action_width=BIMANUAL_COLUMNS,
        state_width=BIMANUAL_COLUMNS,
        max_prefix=TRAINED_PREFIX,
    )
