"""A live guard beside a policy: is what it sees and says like what it was trained on? (docs/guard.md)

NumPy only: the robot's computer has it as well as the server. `Guard` is where to start.
"""

from __future__ import annotations

from xr0_engine.guard.guard import Guard
from xr0_engine.guard.profile import RobotProfile, read_guard, statistics_digest, write_guard
from xr0_engine.guard.thread import GuardThread

__all__ = ["Guard", "GuardThread", "RobotProfile", "read_guard", "statistics_digest", "write_guard"]
