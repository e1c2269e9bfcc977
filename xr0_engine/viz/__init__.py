"""What happens, in the viewer of rerun (https://rerun.io): as a file of it, or live (docs/seeing.md).

`RunView` is a recorder for an Executor, `ServiceView` watches a server. Extra `viz`; rerun is imported when the first
of them is made.
"""

from __future__ import annotations

from xr0_engine.viz.run import RunView, replayed
from xr0_engine.viz.service import ServiceView

__all__ = ["RunView", "ServiceView", "replayed"]
