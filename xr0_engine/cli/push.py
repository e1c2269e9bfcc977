"""xr0 push: a checkpoint to the Hugging Face hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, as the engine loads it; of a run, RUN/model.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    dry_run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what would be pushed to this new folder; no network.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="The run that made it, for the card; the folder above it if that is one.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results of `xr0 eval`, for the card; those of it that lie beside it are taken anyway."),
    ] = None,
) -> None:
    """Check a checkpoint and push it with a model card: recipe, data, statistics, evaluation, how to run it.

    The license is yours to choose: `xr0 push CHECKPOINT ORG/NAME --dry-run DIR`, complete DIR/README.md, then
    `xr0 push DIR ORG/NAME`.
    """
    from xr0_engine.publish.push import pack, write_parcel
    from xr0_engine.publish.push import push as send

    parcel = pack(checkpoint, name, run, results or [])
    size = f"{len(parcel.names)} files, {parcel.made.num_bytes / 2**20:.1f} MiB"
    if dry_run is not None:
        write_parcel(parcel, dry_run)
        print(f"wrote {dry_run}: {size}, nothing was pushed\nnext: xr0 push {dry_run} {name}")
        return
    address, keeps = send(parcel, private)
    print(f"pushed {size}: {address}")
    if keeps:
        print(
            "kept the README.md that is there, which somebody has written or changed and which may tell of earlier "
            "weights; one in the folder (--dry-run writes one) takes its place"
        )
    elif parcel.card is not None:
        print("its card names no license yet: choose one on the hub, in README.md")
