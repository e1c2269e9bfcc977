"""An emulator of NVIDIA GPUs for kernels as Triton compiles them: their PTX on a CPU, with what a GPU hides told.

`XR0_EMULATE=90` runs every launch of kernels/launch.py here. README.md says how it works and what it cannot show.
"""

from tests.ptx.launcher import EmulationError, run, stream
from tests.ptx.settings import Settings

__all__ = ["EmulationError", "processors", "run", "stream"]


def processors() -> int:
    """What a kernel is told of how many streaming multiprocessors there are."""
    return Settings.current().processors
