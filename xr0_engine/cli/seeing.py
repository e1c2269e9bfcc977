"""The option --rerun, which is the same for every command that has it."""

from __future__ import annotations

from typing import Annotated

import typer

Rerun = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.rrd|URL",
        help="Show it in rerun: a new file for `rerun FILE.rrd`, or the address of a viewer that runs, such as "
        "rerun+http://127.0.0.1:9876/proxy (extra `viz`).",
    ),
]


def check_rerun(rerun: str | None) -> None:
    """Before anything is loaded. Errors as viz.sink.check_target."""
    if rerun is not None:
        from xr0_engine.viz.sink import check_target

        check_target(rerun)
