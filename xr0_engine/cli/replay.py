"""`xr0 replay`: a recording as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    session: Annotated[Path, typer.Argument(help="What `xr0 drive --record` wrote.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")] = Path("session.png"),
    start: Annotated[float, typer.Option(min=0, help="Begin so many seconds into the session.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=0.1, max=120, help="Show so many.")] = 8.0,
) -> None:
    """Draw who gave the robot each of its actions, and when: chunks, prefixes, commands, delays.

    The columns that move most are drawn as curves. A session that was cut off can be drawn as far as it goes.
    """
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise ValueError(f"--out: expected a .png file in an existing folder, got {out}")

    from xr0_engine.drive.picture import plot_recording
    from xr0_engine.executor import read_recording

    plot_recording(read_recording(session), out, start, seconds)
    print(out)
