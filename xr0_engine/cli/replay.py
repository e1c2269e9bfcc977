"""`xr0 replay`: a recording as a picture, or in rerun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xr0_engine.cli.seeing import Rerun, check_rerun


def replay(
    session: Annotated[Path, typer.Argument(help="What `xr0 drive --record` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Where the picture goes; session.png, if --rerun is not given either."),
    ] = None,
    start: Annotated[float, typer.Option(min=0, help="Begin so many seconds into the session.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=0.1, max=120, help="Show so many.")] = 8.0,
    rerun: Rerun = None,
) -> None:
    """Draw who gave the robot each of its actions, and when: chunks, prefixes, commands, delays.

    The columns that move most are drawn as curves; --rerun shows all columns, of the whole session. A session that was
    cut off can be drawn as far as it goes.
    """
    if out is None and rerun is None:
        out = Path("session.png")
    if out is not None and (out.suffix.lower() != ".png" or not out.parent.is_dir()):
        raise ValueError(f"--out: expected a .png file in an existing folder, got {out}")
    check_rerun(rerun)

    from xr0_engine.executor import read_recording

    recording = read_recording(session)
    if out is not None:
        from xr0_engine.drive.picture import plot_recording

        plot_recording(recording, out, start, seconds)
        print(out)
    if rerun is not None:
        from xr0_engine.viz import replayed

        replayed(recording, rerun)
        print(rerun)
