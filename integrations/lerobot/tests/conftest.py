"""The package itself and, where LeRobot is not installed, stand-ins for it, before the tests import either."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

if "lerobot" not in sys.modules and find_spec("lerobot") is None:
    import lerobot_standins

    lerobot_standins.install()
