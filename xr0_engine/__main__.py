"""`python -m xr0_engine`: the same as `xr0`."""

from __future__ import annotations

import sys

from xr0_engine.cli import main

sys.exit(main())
