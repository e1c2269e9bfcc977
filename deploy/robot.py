"""A robot's program: a policy that a server infers, executed here. Put your robot in the place of NullRobot.

It needs `pip install xr0-engine` alone. docs/deploy.md has the steps, docs/realtime.md what a robot is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from xr0_engine import Client
from xr0_engine.drive.null import NullRobot
from xr0_engine.executor import Executor, Limits, Recorder, Robot, Settings, frame_for
from xr0_engine.robot.layouts import find_layout
from xr0_engine.types import RobotInfo

PRIORITY = 20
"""Of the control loop, where the system allows it: other work on this computer then does not hold it up."""


def make_robot(info: RobotInfo, robot_type: str, state_width: int) -> Robot:
    """Yours: observe, command and stop. This one shows noise and moves nothing."""
    return NullRobot(info.views, find_layout(info.layout), robot_type, state_width)


def make_limits(width: int) -> Limits:
    """Yours: what the robot may be told at most, per column. These are none: fine for what moves nothing."""
    return Limits.none(width)


def main() -> int:
    """Exit code 1 if a command was late."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, help="wss://host:port of an `xr0 serve`")
    parser.add_argument("--ca-file", type=Path, help="its certificate, if it signed its own")
    parser.add_argument("--robot-type", help="if the policy has several")
    parser.add_argument("--record", type=Path, help="a folder for recordings, one a run")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()

    with ExitStack() as stack:
        client = stack.enter_context(Client(given.server, os.environ.get("XR0_API_KEY"), ca_file=given.ca_file))
        robot_type = client.metadata.resolve(given.robot_type)
        info = client.robot_info(robot_type)
        frame = frame_for(info)
        prefix = info.max_prefix or 0
        # A policy that was trained without prefixes is drawn on from the last chunk instead.
        settings = Settings(info.control_rate_hz, mode="async" if prefix else "guided", max_prefix=prefix)
        recorder = None
        if given.record is not None:
            path = given.record / time.strftime("%Y%m%d-%H%M%S.jsonl")
            recorder = stack.enter_context(Recorder(path, f"{robot_type} from {given.server}"))
        robot = make_robot(info, robot_type, client.metadata.state_width)
        executor = Executor(client, robot, frame, settings, make_limits(frame.width), recorder=recorder)
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
        report = executor.run(given.seconds)
    counts = {name: count for name, count in report.counts.items() if count}
    print(f"ended: {report.ended}; {counts}", file=sys.stderr)
    if report.last_error:
        print(f"last error: {report.last_error}", file=sys.stderr)
    return int(report.counts["deadline_misses"] > 0)


if __name__ == "__main__":
    sys.exit(main())
